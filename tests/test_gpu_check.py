"""The GPU check runs without a GPU, and its exit status says whether something is wrong."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import gpu_check
from gpu_check import Row, Window, waits_among
from pretend_cuda import PretendCuda

import moco_v2


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """A function that runs checks on the CPU and returns exit status, rows and the printed table."""

    def run(*names, minutes=7):
        line = f"gpu_check.py --device cpu --small --minutes {minutes} --out {tmp_path}/check.json --only"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(sys, "argv", [*line.split(), *names])
        status = gpu_check.main()
        report = json.loads((tmp_path / "check.json").read_text())
        assert report["device"] == "CPU" and report["torch"] == torch.__version__
        return status, report["rows"], capsys.readouterr().out

    return run


def test_checks_pass_on_the_cpu(check):
    names = ["golden", "views", "precision", "losses", "evaluation", "files"]
    status, rows, table = check(*names)
    assert status == 0, table
    assert list(dict.fromkeys(row["check"] for row in rows)) == names
    assert all(row["ok"] and row["value"] is not None for row in rows)
    judged = [row["what"] for row in rows if row["limit"] and not row["cost"]]
    assert table.count("  yes\n") == len(judged) >= 20


def test_checks_pass_on_the_pretended_gpu(tmp_path, monkeypatch):
    """No tensor of a check stays on the CPU where it meets others of the GPU."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    with PretendCuda():
        bench = gpu_check.Bench("cuda", True, tmp_path, 7)
        for name in ("golden", "views", "losses", "evaluation"):
            rows = list(gpu_check.CHECKS[name](bench))
            assert rows and all(row.ok(small=True) for row in rows), rows


def test_a_wrong_loss_is_found_and_the_other_checks_go_on(check, monkeypatch):
    right = moco_v2.info_nce
    monkeypatch.setattr(moco_v2, "info_nce", lambda *args, **options: 1.01 * right(*args, **options))
    status, rows, table = check("golden", "losses", "evaluation")
    assert status == 1 and "  no\n" in table
    failed = {(row["check"], row["what"].partition(",")[0]) for row in rows if not row["ok"]}
    assert failed == {("golden", "moco_v2"), ("losses", "moco_v2")}
    assert rows[-1]["check"] == "evaluation"


def test_an_exception_fails_its_check_alone(check, monkeypatch):
    def broken(bench):
        yield Row("before", 1)
        raise ValueError("a long story\nthe cause")

    monkeypatch.setitem(gpu_check.CHECKS, "views", broken)
    status, rows, _ = check("views", "evaluation")
    assert status == 1
    assert [(row["what"], row["ok"]) for row in rows[:2]] == [("before", True), ("ValueError: the cause", False)]
    assert all(row["ok"] for row in rows[2:]) and rows[-1]["check"] == "evaluation"


def test_what_the_time_does_not_allow_is_not_ok(check):
    status, rows, _ = check("golden", "speed", minutes=0)
    assert status == 1 and [row["ok"] for row in rows] == [False, False]


def test_limits():
    assert Row("", 2.0, "<= 2").ok(False) and not Row("", 2.1, "<= 2").ok(True)
    assert not Row("", math.nan, "<= 2").ok(True) and Row("", 5.0).ok(False)
    cost = Row("", 2.1, "<= 2", cost=True)
    assert cost.ok(True) and not cost.ok(False)


def test_waits_are_those_inside_the_ten_steps(monkeypatch):
    def event(name, start, end, device="CPU"):
        device = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)

    names = ["cudaStreamSynchronize", "cudaLaunchKernel", "cudaMemcpyAsync", "cudaMemcpy",
             "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pageable)"]  # fmt: skip
    events = [event("ten steps", 0, 99, "CUDA"), event("ten steps", 10, 20)]
    events += [event(name, 12, 13) for name in names] + [event("cudaDeviceSynchronize", at, at + 1) for at in (9, 21)]
    assert waits_among(events) == [names[0], names[3], names[5]]

    monkeypatch.setattr(gpu_check, "WAITS", "aten::item$")  # on the CPU this is all that reading a value shows
    window = Window(2)
    window.end_step = lambda *_: torch.ones(1).item()
    for _ in range(15):
        window(None, None, None)
    assert len(window.waits) == 10
