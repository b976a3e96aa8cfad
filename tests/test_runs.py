"""Runs survive: kills, signals, full disks, damaged files, bad images; and they end in one line where they cannot."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import faults
import pytest
import torch
from conftest import ROOT, error_lines, free_port, on_processes, refused, run, run_script, start_script

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
    """All 25, and on two processes: python tests/tools/faults.py [--processes 2]"""
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
    assert "data 16 images of 0 classes" in refused(line, capfd)
    (tmp_path / "images" / "train" / "cow").mkdir()
    shutil.copy(image_folder / "train" / "ant" / "0.jpg", tmp_path / "images" / "train" / "cow" / "0.jpg")
    assert "here" in refused(line, capfd)  # 16 images again, but others
    shutil.rmtree(tmp_path / "images" / "train" / "cow")
    shutil.copy(image_folder / "train" / "bee" / "1.JPEG", tmp_path / "images" / "train" / "bee")
    assert "epochs 1 there, 2 here" in refused(f"{line} --epochs 2", capfd)
    teacher = common.load_file(teacher_file)
    teacher["model"]["encoder.head.2.bias"] += 1
    torch.save(teacher, tmp_path / "teacher.pth")
    assert "teacher [" in refused(line, capfd)


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
    common.Run("slow", args).start_or_resume(layer, torch.optim.SGD(layer.parameters()), torch.amp.GradScaler("cpu"))
    return (folder / "run" / "checkpoint.pth").exists()


def test_no_process_goes_on_before_a_checkpoint_is_written(tmp_path):
    assert on_processes(2, save_slowly, tmp_path, tmp_path) == [True, True]


def test_deleting_a_checkpoint_does_not_start_the_log_again(half_run, capfd):
    """Neither steps twice in the log, nor another network over the old one."""
    (half_run / "checkpoint.pth").unlink()
    kept = [half_run / name for name in ("log.jsonl", "backbone.pth", "views.png")]
    before = [path.read_bytes() for path in kept]
    assert "without its checkpoint.pth" in refused(f"{MOCO} --epochs 2 --out {half_run}", capfd)
    assert before == [path.read_bytes() for path in kept]


def test_what_is_frozen_is_passed_not_guessed_from_a_name(tmp_path):
    """A fork's moving average called `teacher` is saved, and a frozen network of another name is not."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("student", "teacher", "guide")})
    args = argparse.Namespace(out=str(tmp_path / "run"))
    rest = torch.optim.SGD(model["student"].parameters()), torch.amp.GradScaler("cpu")
    common.Run("fork", args).start_or_resume(model, *rest, frozen=model["guide"])
    assert {name.partition(".")[0] for name in common.load_file(tmp_path / "run" / "checkpoint.pth")["model"]} == {
        "student", "teacher"
    }  # fmt: skip
    mean, guide = model["teacher"].weight.clone(), torch.zeros(2, 2)
    for layer in model.values():
        torch.nn.init.zeros_(layer.weight)
    common.Run("fork", args).start_or_resume(model, *rest, frozen=model["guide"])
    assert torch.equal(model["teacher"].weight, mean) and torch.equal(model["guide"].weight, guide)


def test_only_an_error_of_the_file_is_called_one(tmp_path):
    """An error of CUDA that arises while a checkpoint is written keeps its traceback."""

    def write(error):
        def fail(file):
            raise error

        common.atomic_write(tmp_path / "x.pth", fail)

    with pytest.raises(RuntimeError, match="device-side assert"):
        write(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    for error in (OSError(28, "No space left"), RuntimeError("PytorchStreamWriter failed writing file data/0")):
        with pytest.raises(common.UserError, match=r"cannot write .*x.pth"):
            write(error)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_during_the_save_at_an_epochs_end_stops_before_the_next_evaluation(processes, tmp_path):
    """Rank 0 gets it while it writes; no evaluation and no step follow."""
    script = tmp_path / "signalled.py"
    script.write_text(
        "import os, signal, common, moco_v2\n"
        "write = common.atomic_write\n"
        "def signalled(path, function):\n"
        "    write(path, function)\n"
        "    if path.name == 'checkpoint.pth' and common.load_file(path)['step'] == 4:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "common.atomic_write = signalled\n"
        "common.run_script(moco_v2.main)\n"
    )
    line = f"{script} {MOCO.partition(' ')[2]} --epochs 3 --knn-every 1 --out {tmp_path}/run"
    done = run_script(line, processes, check=False)
    assert done.returncode == 143 or processes == 2, done.stderr
    assert "stopped by SIGTERM" in done.stderr and "Traceback" not in done.stderr.partition("elastic")[0]
    assert [values["step"] for values in log_of(tmp_path / "run")] == [0, 4]  # k-NN at the start, losses


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
    bare.start_or_resume(layer, torch.optim.SGD(layer.parameters(), 0.1), torch.amp.GradScaler("cpu"))
    start_epoch(bare)
    return bare, layer


class Numbers:
    """A loader whose batches are their steps."""

    def batches(self, steps):
        yield from ((number, None) for number in steps)


def start_epoch(bare):
    """Begin or continue the bare run's epoch."""
    next(bare.epochs(1, 10))
    next(bare.batches(Numbers()))


def test_the_first_loss_that_is_not_finite_is_named(bare_run):
    bare, _ = bare_run
    for loss in [1.0, 2.0, float("inf"), 4.0]:
        bare.end_step({"loss": torch.tensor(loss)}, 0.1)
    with pytest.raises(common.UserError, match="a loss is not finite at step 3, epoch 0, learning rate"):
        bare.end_step({"loss": torch.tensor(5.0)}, 0.1)
    assert common.load_file(bare.folder / "checkpoint.pth")["step"] == 0
    assert not log_of(bare.folder)


def test_a_weight_that_is_not_finite_is_not_saved(bare_run):
    bare, layer = bare_run
    bare.end_step({"loss": torch.tensor(1.0)}, 0.1)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(common.UserError, match="a weight is not finite at step 1"):
        bare.save()
    assert common.load_file(bare.folder / "checkpoint.pth")["step"] == 0


def test_losses_between_two_lines_of_the_log_are_kept_with_the_checkpoint(bare_run):
    bare, _ = bare_run
    for step in range(1, 4):
        bare.end_step({"loss": torch.tensor(float(step))}, 0.1)
    bare.save()
    bare.end_step({"loss": torch.tensor(100.0)}, 0.1)
    bare.start_or_resume(*bare.state)
    assert bare.step == 3
    start_epoch(bare)
    for step in range(4, 6):
        bare.end_step({"loss": torch.tensor(float(step))}, 0.1)
    assert [(line["step"], line["loss"]) for line in log_of(bare.folder)] == [(5, 3.0)]


def test_no_process_waits_for_a_batch_that_is_lost(tmp_path, image_folder):
    """A worker whose batch does not fit into /dev/shm, or that is killed, ends the run with one line."""
    script = tmp_path / "lost.py"
    script.write_text(
        "import os, sys, common, moco_v2\n"
        "class Lost:\n"
        "    def __reduce__(self):\n"
        "        raise OSError(28, 'No space left on device')\n"
        "load = common.load_batch\n"
        "def lost(*args):\n"
        "    if os.environ['LOSE'] == 'kill':\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return Lost(), *load(*args)[1:]\n"
        "common.load_batch = lost\n"
        "common.run_script(moco_v2.main)\n"
    )
    line = (
        f"{script} --data {image_folder} --arch resnet8 --image-size 16 --batch-size 8 --queue-size 8 --workers 1 --out"
    )
    for how in ("send", "kill"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOSE", how)
            done = run_script(f"{line} {tmp_path}/{how}", check=False)
        (message,) = error_lines(done.stderr)
        assert done.returncode == 2 and all(word in message for word in ("/dev/shm", "--workers")), message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_view_may_hold_any_function(workers, image_folder):
    """Also one that cannot be sent to a worker."""
    dataset, factor = common.FolderDataset(image_folder / "train"), 0.5
    view = common.View(16, augment=lambda images, rng: images * factor)
    loader = common.Loader(dataset, [view], 8, 0, workers, torch.device("cpu"))
    plain = common.Loader(dataset, [common.View(16)], 8, 0, 0, torch.device("cpu"))
    (((ours,), _), *_), (((whole,), _), *_) = (list(x.batches(range(2))) for x in (loader, plain))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in common.IMAGENET_MEAN_STD)
    torch.testing.assert_close(ours * std + mean, (whole * std + mean) / 2)


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


def test_a_set_of_which_no_image_can_be_read_is_one_line(tmp_path, image_folder, teacher_file, capfd):
    shutil.copytree(image_folder / "train", tmp_path / "images" / "train")
    for name in ("ant", "bee"):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        (tmp_path / "images" / "val" / name / "0.jpg").write_bytes(b"no image")
    line = f"--data {tmp_path}/images --image-size 16 --batch-size 8 --workers 0 --epochs 1 --out {tmp_path}/run"
    message = refused(f"linear_eval.py {line} --weights {teacher_file}", capfd)
    assert "none of 2 images can be read" in message and "val/ant/0.jpg" in message


def test_one_image_for_each_process_is_too_few_for_batchnorm(tmp_path, capfd):
    line = "moco_v2.py --data shapes:10 --image-size 32 --arch mobilenet_v3_small --batch-size 1 --queue-size 8"
    assert "raise --batch-size" in refused(f"{line} --out {tmp_path}/run", capfd)


@pytest.mark.parametrize("error, advice", [
    (OSError(24, "Too many open files"), "ulimit -n"),
    (RuntimeError("unable to open shared memory object: Too many open files (24)"), "ulimit -n"),
    (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "lower --batch-size"),
    (MemoryError("Unable to allocate 157. TiB for an array"), "lower --batch-size"),
    (IndexError("Target -1 is out of bounds."), "a label is out of range"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "lower --batch-size"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor"), "leave out --compile"),
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "leave out --compile"),
])  # fmt: skip
def test_known_errors_of_libraries_are_one_line(error, advice, capfd):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.run_script(main)
    assert stop.value.code == 2 and advice in capfd.readouterr().err


def test_an_error_in_a_worker_keeps_its_traceback(capfd):
    """It is a mistake in the code of a data set or a view, and not a lost process."""

    def main():
        raise RuntimeError("Caught TypeError in DataLoader worker process 0.\nOriginal Traceback: line 7")

    with pytest.raises(SystemExit) as stop:
        common.run_script(main)
    assert stop.value.code == 1 and "line 7" in capfd.readouterr().err


def test_windows_is_told_what_is_supported():
    line = "import sys; sys.modules['fcntl'] = None; import common"
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and done.stderr.count("\n") == 1 and "Linux and macOS" in done.stderr


def test_a_signal_waits_for_the_step_and_stops_at_once_if_everything_is_saved(bare_run):
    bare, _ = bare_run
    bare.end_step({"loss": torch.tensor(1.0)}, 0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(common.Stopped, match="by SIGTERM"):
        bare.end_step({"loss": torch.tensor(1.0)}, 0.1)
    assert common.load_file(bare.folder / "checkpoint.pth")["step"] == 2
    with pytest.raises(common.Stopped, match="by SIGUSR1"):  # as during an evaluation between epochs
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
