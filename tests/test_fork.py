"""Whole runs of a method's script. A fork copies this file and leaves its own row in FORKS.

{teacher} is a checkpoint of a ResNet-8. {network} is the student: a ResNet-8, or where one process and two are compared
SqueezeNet, which has no BatchNorm. The flags on top of SMALL make a run of eight steps.
"""

import json

import pytest
import torch
from conftest import run, run_script

FORKS = {
    "disco.py": "--teacher {teacher} --student {network} --queue-size 30",
    "seed.py": "--teacher {teacher} --student {network} --queue-size 30 --lr 0.5 --warmup-epochs 0",
    "moco_v2.py": "--arch {network} --queue-size 30",
}
SMALL = "--data shapes:50 --batch-size 12 --epochs 2"
each_fork = pytest.mark.parametrize("script", FORKS)


def line_of(script, teacher_file, network, size=16):
    flags = FORKS[script].format(teacher=teacher_file, network=network)
    return f"{script} {SMALL} --image-size {size} {flags} --out"


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def weights_of(folder, name="backbone.pth"):
    return torch.load(folder / name, weights_only=True)


@each_fork
def test_it_trains_resumes_with_the_same_bits_and_is_evaluated(script, tmp_path, teacher_file):
    line = line_of(script, teacher_file, "resnet8")
    run(f"{line} {tmp_path}/whole")
    for stop in (3, 5, 8):  # inside the first epoch, inside the second, at the end
        run(f"{line} {tmp_path}/parts --max-steps {stop}")
    whole, parts = (weights_of(tmp_path / name, "checkpoint.pth") for name in ("whole", "parts"))
    assert whole["model"].keys() == parts["model"].keys() and whole["step"] == parts["step"] == 8
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    assert log_of(tmp_path / "whole")[-1]["loss"] > 0
    files = f"{tmp_path}/whole/checkpoint.pth {tmp_path}/whole/backbone.pth"
    run(f"linear_eval.py --data shapes:50 --image-size 16 --batch-size 10 --cached --epochs 1 --knn 5 --lr 1 "
        f"--weights {files} --out {tmp_path}/eval")  # fmt: skip
    checkpoint, backbone = json.loads((tmp_path / "eval" / "eval.json").read_text()).values()
    assert checkpoint == backbone and 0 <= backbone["knn"]["5"] <= 100


@pytest.mark.parametrize("script", [script for script in FORKS if "{teacher}" in FORKS[script]])
def test_the_teacher_gets_images_with_its_own_normalisation(script, tmp_path, teacher_file):
    """Whatever a fork takes from the teacher."""
    line = line_of(script, teacher_file, "resnet8")
    losses = []
    for flag in ("", "--teacher-mean-std 0.5 0.5"):
        run(f"{line} {tmp_path}/{len(losses)} --max-steps 1 {flag}")
        losses.append(log_of(tmp_path / str(len(losses)))[0]["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@each_fork
def test_one_process_equals_two(script, tmp_path, teacher_file):
    """Images, losses and weights; also where the number of processes changes within a run."""
    line = line_of(script, teacher_file, "squeezenet1_1", size=32)
    for processes, name in ((1, "one"), (2, "two")):
        run_script(f"{line} {tmp_path}/{name}", processes)
    for processes, stop in ((1, 3), (2, 8)):
        run_script(f"{line} {tmp_path}/grows --max-steps {stop}", processes)
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    alone = weights_of(tmp_path / "one")
    for name in ("two", "grows"):
        for key, value in weights_of(tmp_path / name).items():
            torch.testing.assert_close(value, alone[key], rtol=1e-3, atol=1e-5)
