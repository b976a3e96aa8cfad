"""Runs survive: kills, signals, full disks, damaged files, bad images; and they end in one line where they cannot."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import time

import faults
import pytest
import torch
from conftest import error_lines, free_port, on_processes, refused, run, run_script, start_script

import common

SMALL = "--data shapes:64 --image-size 16 --batch-size 16 --queue-size 50"
MOCO = f"moco_v2.py {SMALL} --arch resnet8 --dim 16"


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def wait_for(condition, seconds=120):
    """Wait until condition() holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def has_logged(folder):
    """A condition: the run has written a line more than now."""
    log = folder / "log.jsonl"
    size = log.stat().st_size if log.exists() else 0
    return lambda: log.exists() and log.stat().st_size > size


def assert_same_outcome(one, other):
    assert not faults.differences(faults.outcome(one), faults.outcome(other))


# ---------------------------------------------------------------------------------------------------------------- Kills


def test_three_kills_of_the_fault_program(tmp_path):
    """All 25, and on two processes: python tests/faults.py [--processes 2]"""
    for kind, number, _, differ in faults.survived(tmp_path, points=3, seed=5, processes=1):
        assert not differ, (kind, number)


def test_signals_save_and_a_second_process_is_refused(tmp_path, image_folder, teacher_file):
    """Sent to the whole group, as Slurm does: the loading processes too."""
    line = (
        f"disco.py --data {image_folder} --teacher {teacher_file} --student resnet8 --image-size 16 --batch-size 4 "
        "--queue-size 10 --workers 2 --epochs 30 --checkpoint-minutes 1000 --out"
    )
    run_script(f"{line} {tmp_path}/whole")
    out = tmp_path / "stopped"
    for number in (signal.SIGUSR1, signal.SIGTERM):
        ready = has_logged(out)
        process = start_script(f"{line} {out}")
        wait_for(ready)
        if number == signal.SIGUSR1:
            process.send_signal(signal.SIGSTOP)
            second = run_script(f"{line} {out}", check=False)
            process.send_signal(signal.SIGCONT)
            assert second.returncode == 2 and f"in use by process {process.pid}" in second.stderr
        start = time.monotonic()
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 143 and time.monotonic() - start < 10
        assert f"stopped by {number.name}" in errors and "Traceback" not in errors
        assert common.load_file(out / "checkpoint.pth")["step"] < 120
    run_script(f"{line} {out}")
    assert_same_outcome(tmp_path / "whole", out)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory, teacher_file):
    """A command line without its --out, and the folder of its undisturbed run on two processes."""
    line = (
        f"disco.py {SMALL} --teacher {teacher_file} --student resnet8 --epochs 40 --knn-every 20 "
        "--checkpoint-minutes 0.01 --out"
    )
    out = tmp_path_factory.mktemp("whole")
    run_script(f"{line} {out}", processes=2)
    return line, out


def test_torchrun_stops_and_brings_back(tmp_path, on_two):
    """SIGTERM to torchrun; the same command again, of which one process is killed: --max-restarts brings it back."""
    line, whole = on_two
    out = tmp_path / "run"
    ready = has_logged(out)
    process = start_script(f"{line} {out}", processes=2)
    wait_for(ready)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert errors.count("stopped by SIGTERM") == 1 and "lost contact" not in errors
    ready = has_logged(out)
    process = start_script(f"{line} {out}", processes=2, launch="--max-restarts=3")
    wait_for(ready)
    os.kill(worker_of(out), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "continuing from step" in errors and "Traceback" not in errors
    assert_same_outcome(whole, out)


def worker_of(out):
    """Number of the process that holds a run's folder, its rank 0."""
    return int((out / ".lock").read_text().split()[1])


def test_two_agents_go_on_after_one_was_killed(tmp_path, on_two):
    line, whole = on_two
    out = tmp_path / "run"
    launch = f"--nnodes=2 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=localhost:{free_port()} --rdzv-id=run"
    ready = has_logged(out)
    first = start_script(f"{line} {out}", processes=1, launch=launch)
    time.sleep(2)  # it keeps the meeting point, and so lives on
    second = start_script(f"{line} {out}", processes=1, launch=launch)
    wait_for(ready)
    workers = subprocess.run(["pgrep", "-P", str(second.pid)], capture_output=True, text=True).stdout.split()
    for process in (second.pid, *map(int, workers)):  # the agent first, so that it starts no other worker
        os.kill(process, signal.SIGKILL)
    third = start_script(f"{line} {out}", processes=1, launch=launch)
    for agent in (first, third):
        _, errors = agent.communicate(timeout=200)
        assert agent.returncode == 0, errors
    second.communicate(timeout=60)
    assert_same_outcome(whole, out)


def test_if_one_process_fails_all_exit_and_the_cause_is_printed_once(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys, torch, common\n"
        "def main():\n"
        "    common.init_device(0)\n"
        "    if common.rank() == 1:\n"
        "        raise ValueError('odd')\n"
        "    for _ in range(10**6):\n"
        "        common.gather(torch.ones(1))\n"
        "common.run_script(main)\n"
    )
    start = time.monotonic()
    done = run_script(str(script), processes=3, check=False)
    assert time.monotonic() - start < 60 and done.returncode == 1
    own = done.stderr.partition("torch/distributed/elastic")[0]
    assert own.count("Traceback") == 1 and own.count("ValueError: odd") == 1 and "gloo" not in done.stderr
    left = subprocess.run(["pgrep", "-f", str(script)], capture_output=True, text=True).stdout
    assert not left


FAILURES = {
    "NCCL error: unhandled system error\nLast error:\nError while creating segment /dev/shm/nccl": "/dev/shm",
    "NCCL WARN Bootstrap : no socket interface found": "no socket interface",
    "[pair.cc:553] Connection closed by peer [127.0.0.1]:30392": "lost contact with another process",
    "NCCL error: ncclRemoteError: a remote process exited": "lost contact with another process",
}


@pytest.mark.parametrize("error", FAILURES, ids=FAILURES.values())
def test_the_reason_of_a_communication_error_is_printed(error, capfd):
    def main():
        raise torch.distributed.DistBackendError(error)

    with pytest.raises(SystemExit):
        common.run_script(main)
    printed = capfd.readouterr().err
    assert FAILURES[error] in printed and ("lost contact" in printed) == FAILURES[error].startswith("lost contact")


def test_the_gpu_is_chosen_before_the_processes_connect(monkeypatch, capfd):
    """NCCL binds to the device in init_process_group; a mistake in the arguments comes before all of it."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(None, 3, 4)]))
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda name, store: store)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    device = common.init_device(0)
    assert device == torch.device("cuda:3") == calls[0] == calls[1]["device_id"] and len(calls) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "5 processes on 4 GPUs" in refused(f"{MOCO} --epochs 1 --out none", capfd)
    assert "--queue" in refused(f"{MOCO} --queue-size 0 --out none", capfd) and len(calls) == 2


# ---------------------------------------------------------------------------------------------------------------- Files


@pytest.fixture
def half_run(tmp_path):
    """Folder of a run with one of its two epochs done."""
    out = tmp_path / "run"
    run(f"{MOCO} --epochs 2 --out {out} --max-steps 4")
    return out


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_left(damage, half_run, capfd):
    path = half_run / "checkpoint.pth"
    DAMAGES[damage](path)
    content = path.read_bytes()
    assert f"{path} is not a readable checkpoint" in refused(f"{MOCO} --epochs 2 --out {half_run}", capfd)
    assert path.read_bytes() == content


class Code:
    def __reduce__(self):
        return os.system, ("touch ran.txt",)


def test_a_checkpoint_with_code_is_refused(half_run, capfd, monkeypatch):
    monkeypatch.chdir(half_run)
    torch.save({**common.load_file(half_run / "checkpoint.pth"), "scaler": Code()}, half_run / "checkpoint.pth")
    assert "could run code" in refused(f"{MOCO} --epochs 2 --out {half_run}", capfd)
    assert not (half_run / "ran.txt").exists()


def test_a_checkpoint_of_another_network_is_refused(half_run, capfd):
    checkpoint = common.load_file(half_run / "checkpoint.pth")
    del checkpoint["model"]["encoder.head.0.bias"]
    torch.save(checkpoint, half_run / "checkpoint.pth")
    assert "encoder.head.0.bias" in refused(f"{MOCO} --epochs 2 --out {half_run}", capfd)


@pytest.mark.parametrize("obstacle, word", [("full", "No space left"), ("folder", "Is a directory")])
@pytest.mark.parametrize("name", ["checkpoint.pth", "backbone.pth"])
def test_a_file_that_cannot_be_written_leaves_the_last_good_one(name, obstacle, word, half_run, capfd):
    beside = half_run / f".{name}.tmp"
    if obstacle == "full":
        beside.symlink_to("/dev/full")
    else:
        beside.mkdir()
    before = (half_run / name).read_bytes()
    message = refused(f"{MOCO} --epochs 2 --out {half_run}", capfd)
    assert word in message and name in message and "same command" in message
    assert name == "backbone.pth" or (half_run / name).read_bytes() == before
    beside.rmdir() if obstacle == "folder" else beside.unlink()
    run(f"{MOCO} --epochs 2 --out {half_run}")
    assert common.load_file(half_run / "checkpoint.pth", whole=True)["step"] == 8


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path, capfd):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    assert "cannot write" in refused(f"{MOCO} --epochs 1 --out {tmp_path}", capfd)


def test_another_data_set_and_another_teacher_are_refused(tmp_path, image_folder, teacher_file, capfd):
    shutil.copytree(image_folder, tmp_path / "images")
    shutil.copy(teacher_file, tmp_path / "teacher.pth")
    line = (
        f"disco.py --data {tmp_path}/images --teacher {tmp_path}/teacher.pth --student resnet8 --image-size 16 "
        f"--epochs 1 --batch-size 4 --queue-size 10 --workers 0 --out {tmp_path}/run"
    )
    run(line)
    run(f"{line} --workers 1 --checkpoint-minutes 3 --max-bad-images 7")  # do not change the result
    (tmp_path / "images" / "train" / "bee" / "1.JPEG").unlink()
    assert "images [16] there, [15] here" in refused(line, capfd)
    (tmp_path / "images" / "train" / "cow").mkdir()
    shutil.copy(image_folder / "train" / "ant" / "0.jpg", tmp_path / "images" / "train" / "cow" / "0.jpg")
    assert "classes [2] there, [3] here" in refused(line, capfd)
    shutil.rmtree(tmp_path / "images" / "train" / "cow")
    shutil.copy(image_folder / "train" / "bee" / "1.JPEG", tmp_path / "images" / "train" / "bee")
    assert "epochs 1 there, 2 here" in refused(f"{line} --epochs 2", capfd)
    teacher = common.load_file(teacher_file)
    teacher["model"]["encoder.head.2.bias"] += 1
    torch.save(teacher, tmp_path / "teacher.pth")
    assert f"content of {tmp_path}/teacher.pth" in refused(line, capfd)


def test_only_rank_0_reads_and_writes_the_folder(tmp_path):
    """Machines need no common folder, and an outdated view of a network disk does not matter."""
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, common, moco_v2\nos.chdir(os.environ.get('RANK', '0'))\ncommon.run_script(moco_v2.main)\n"
    )
    for folder in "01":
        (tmp_path / folder).mkdir()
    line = f"{script} {MOCO.partition(' ')[2]} --epochs 2 --out run"
    run_script(f"{line} --max-steps 4", processes=2, cwd=tmp_path)
    (tmp_path / "1" / "run").mkdir()
    (tmp_path / "1" / "run" / "checkpoint.pth").write_bytes(b"outdated")
    run_script(line, processes=2, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "1" / "run").iterdir()] == ["checkpoint.pth"]
    run_script(f"{MOCO} --epochs 2 --out {tmp_path}/whole", processes=2)
    assert_same_outcome(tmp_path / "whole", tmp_path / "0" / "run")


def save_slowly(folder):
    """Whether the checkpoint is there after the first save, which takes rank 0 a second."""
    write = common.atomic_write
    common.atomic_write = lambda path, *args: (time.sleep(1), write(path, *args))
    layer = torch.nn.Linear(2, 2)
    args = argparse.Namespace(out=str(folder / "run"))
    common.Run("slow", args).resume(layer, torch.optim.SGD(layer.parameters()), torch.amp.GradScaler("cpu"))
    return (folder / "run" / "checkpoint.pth").exists()


def test_no_process_goes_on_before_a_checkpoint_is_written(tmp_path):
    assert on_processes(2, save_slowly, tmp_path, tmp_path) == [True, True]


# -------------------------------------------------------------------------------------------------- Numbers and images


class Overflow(torch.amp.GradScaler):
    """A scaler with an infinite loss in the first step, as with the default scale on many networks."""

    first = True

    def scale(self, loss):
        self.first, first = False, self.first
        return super().scale(loss * torch.inf if first else loss)


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory):
    out = tmp_path_factory.mktemp("labelled")
    run(f"sskd.py --data shapes:64 --image-size 16 --batch-size 16 --epochs 1 --train-teacher resnet8 --out {out}")
    return out / "checkpoint.pth"


@pytest.mark.parametrize("script", ["moco_v2", "disco", "seed", "sskd", "linear_eval"])
def test_a_first_step_that_overflows_changes_nothing(script, tmp_path, teacher_file, labelled_file, monkeypatch):
    """Fused SGD must not continue from momentum buffers that a skipped first step allocated but did not fill."""
    small = f"{script}.py --data shapes:112 --image-size 16 --batch-size 16 --epochs 2"
    line = {
        "moco_v2": f"{small} --arch resnet8 --queue-size 50",
        "disco": f"{small} --teacher {teacher_file} --student resnet8 --queue-size 50",
        "seed": f"{small} --teacher {teacher_file} --student resnet8 --queue-size 50",
        "sskd": f"{small} --teacher {labelled_file} --student resnet8 --tf-weight 0 --ss-weight 0",
        "linear_eval": f"{small} --weights {teacher_file} --finetune --knn 5",
    }[script]
    run(f"{line} --amp bf16 --out {tmp_path}/bf16")
    monkeypatch.setattr(torch.amp, "GradScaler", Overflow)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(1e30))
    run(f"{line} --amp fp16 --out {tmp_path}/fp16")
    bf16, fp16 = ([row["loss"] for row in log_of(tmp_path / amp) if "loss" in row] for amp in ("bf16", "fp16"))
    assert fp16[-1] == pytest.approx(bf16[-1], rel=0.2)  # of the last seven steps; fp16 has made one step less


@pytest.mark.parametrize("processes", [1, 2])
def test_a_number_that_is_not_finite_stops_the_run(processes, tmp_path):
    done = run_script(f"{MOCO} --epochs 2 --lr 1e30 --out {tmp_path}/run", processes, check=False)
    lines = [line for line in error_lines(done.stderr) if "error: " in line]
    assert len(lines) == 1 and "step 2, epoch 0, learning rate 1e+30" in lines[0], done.stderr
    assert done.returncode == 2 or processes == 2
    checkpoint = common.load_file(tmp_path / "run" / "checkpoint.pth", whole=True)
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


@pytest.fixture
def bare_run(tmp_path, monkeypatch):
    """A run around one linear layer, which logs every five steps, in its first epoch of ten; and the layer."""
    monkeypatch.setattr(common, "LOG_EVERY", 5)
    layer = torch.nn.Linear(2, 2)
    args = argparse.Namespace(
        out=str(tmp_path / "run"), checkpoint_minutes=1e9, max_bad_images=0, max_steps=None,
        batch_size=4,
    )  # fmt: skip
    bare = common.Run("bare", args)
    bare.resume(layer, torch.optim.SGD(layer.parameters(), 0.1), torch.amp.GradScaler("cpu"))
    start_epoch(bare)
    return bare, layer


class Numbers:
    """A loader whose batches are their steps."""

    def batches(self, step, stop):
        yield from ((number, None) for number in range(step, stop))


def start_epoch(bare):
    """Begin or continue the bare run's epoch."""
    next(bare.epochs(1, 10))
    next(bare.batches(Numbers()))


def test_the_first_loss_that_is_not_finite_is_named(bare_run):
    bare, _ = bare_run
    for loss in [1.0, 2.0, float("inf"), 4.0]:
        bare.track({"loss": torch.tensor(loss)}, 0.1)
    with pytest.raises(common.UserError, match="a loss is not finite at step 3, epoch 0, learning rate"):
        bare.track({"loss": torch.tensor(5.0)}, 0.1)
    assert common.load_file(bare.folder / "checkpoint.pth")["step"] == 0
    assert not log_of(bare.folder)


def test_a_weight_that_is_not_finite_is_not_saved(bare_run):
    bare, layer = bare_run
    bare.track({"loss": torch.tensor(1.0)}, 0.1)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(common.UserError, match="a weight is not finite at step 1"):
        bare.save()
    assert common.load_file(bare.folder / "checkpoint.pth")["step"] == 0


def test_losses_between_two_lines_of_the_log_are_kept_with_the_checkpoint(bare_run):
    bare, _ = bare_run
    for step in range(1, 4):
        bare.track({"loss": torch.tensor(float(step))}, 0.1)
    bare.save()
    bare.track({"loss": torch.tensor(100.0)}, 0.1)
    bare.resume(*bare.state)
    assert bare.step == 3
    start_epoch(bare)
    for step in range(4, 6):
        bare.track({"loss": torch.tensor(float(step))}, 0.1)
    assert [(line["step"], line["loss"]) for line in log_of(bare.folder)] == [(5, 3.0)]


BAD = {"train/ant/0.jpg", "train/bee/1.JPEG", "train/bee/6.png", "val/ant/2.jpg"}


def test_unreadable_images_are_replaced_named_once_and_counted(tmp_path, broken_folder, capfd):
    line = (
        f"moco_v2.py --data {broken_folder} --arch resnet8 --image-size 16 --batch-size 8 --queue-size 16 --epochs 3 "
        f"--knn-every 1 --workers 1 --out {tmp_path}/run"
    )
    run(f"{line} --max-steps 4")
    assert len(error_lines(capfd.readouterr().err)) == 4
    run(line)
    assert len(error_lines(capfd.readouterr().err)) == 1  # that it continues: they are named once
    named = [values["unreadable"] for values in log_of(tmp_path / "run") if "unreadable" in values]
    assert len(named) == 4 and {name.removeprefix(f"{broken_folder}/") for name in named} == BAD
    assert "--max-bad-images" in refused(f"{line}2 --max-bad-images 3", capfd)


def test_unreadable_images_found_by_any_process_are_named(tmp_path, broken_folder):
    done = run_script(
        f"moco_v2.py --data {broken_folder} --arch resnet8 --image-size 16 --batch-size 8 --queue-size 16 --epochs 2 "
        f"--workers 1 --out {tmp_path}/run",
        processes=2,
    )
    lines = [line for line in error_lines(done.stderr) if "unreadable" in line]
    assert len(lines) == 3 and all(any(name in line for line in lines) for name in BAD if name.startswith("train"))


def test_evaluation_leaves_unreadable_images_out(broken_folder):
    encoder = common.Encoder(common.build_backbone("resnet8", 16), torch.nn.Identity())
    val = common.FolderDataset(broken_folder / "val")
    features, labels = common.extract_features(encoder, val, 16, 5, 0, torch.device("cpu"))
    kept = [i for i in range(len(val)) if not val.path(i).endswith("val/ant/2.jpg")]
    assert len(features) == len(labels) == len(val) and labels.tolist().count(-1) == 1
    assert torch.equal(labels[kept], val.labels[kept])


def test_a_signal_waits_for_the_step_and_stops_at_once_if_everything_is_saved(bare_run):
    bare, _ = bare_run
    bare.track({"loss": torch.tensor(1.0)}, 0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(common.Stopped, match="by SIGTERM"):
        bare.track({"loss": torch.tensor(1.0)}, 0.1)
    assert common.load_file(bare.folder / "checkpoint.pth")["step"] == 2
    with pytest.raises(common.Stopped, match="by SIGUSR1"):  # as during an evaluation between epochs
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
