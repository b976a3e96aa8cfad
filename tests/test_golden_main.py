"""The golden trajectories again, through each script's own main(): what it wires is the authors' experiment, too.

A script gets the golden networks, queue and images in the place of its own; the optimiser, the schedule, the loop and
what enters the queue are the script's.
"""

import importlib
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, assert_close_state, golden_encoder, run

import common

DISTIL = "--teacher t.pth --student resnet8 --max-bad-images 0"
CASES = {  # golden file: script and flags, and where the weights of the trained network are
    "moco_v2": ("moco_v2.py --arch resnet8 --dim 8", "encoder", ""),
    "disco_teacher_bn_running": (f"disco.py {DISTIL} --distill-weight 8", "student", "_student"),
    "disco_teacher_bn_batch": (f"disco.py {DISTIL} --distill-weight 8 --teacher-bn batch", "student", "_student"),
    "seed": (f"seed.py {DISTIL} --warmup-epochs 0", "student", "_student"),
    "seed_small_crops": (f"seed.py {DISTIL} --warmup-epochs 0 --small-crops 4", "student", "_student"),
}


def as_its_own(script, vectors, suffix, monkeypatch):
    """Make a script build the golden networks and queues and load the golden images."""
    trained = golden_encoder(vectors, f"init{suffix}")
    parts = {"build_backbone": trained.backbone, "mlp_head": trained.head, "check_input_size": None}
    if suffix:
        teacher = golden_encoder(vectors, "init_teacher").requires_grad_(False).eval()
        parts["load_teacher"] = teacher
    for name, part in parts.items():
        monkeypatch.setattr(common, name, lambda *_, part=part, **__: part)

    class GoldenLoader:
        def __init__(self, dataset, *_):
            self.dataset = dataset

        def __len__(self):
            return len(vectors["images"])

        def batches(self, steps):
            for step in steps:
                views = torch.from_numpy(vectors["images"][step])
                views = list(views) if views.ndim == 5 else [views]
                if "small_images" in vectors:
                    views += torch.from_numpy(vectors["small_images"][step]).unbind(dim=1)
                yield views, None

    def queues(size, *dims):
        given = [vectors[name] for name in ("init_queue", "init_small_queue") if name in vectors]
        assert (size, *dims) == given[0].shape
        return torch.from_numpy(given[drawn.pop(0)])

    drawn = [0, 1]
    method = {"moco_v2": "MoCo", "disco": "DisCo", "seed": "SEED"}[script]
    module = importlib.import_module(script)
    build = getattr(module, method)

    def build_with_queues(*args):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", queues)
            return build(*args)

    monkeypatch.setattr(module, method, build_with_queues)
    monkeypatch.setattr(common, "Loader", GoldenLoader)
    monkeypatch.setattr(common, "LOG_EVERY", 1)


@pytest.mark.parametrize("name", CASES)
def test_main_follows_the_golden_trajectory(name, tmp_path, monkeypatch):
    vectors = dict(np.load(GOLDEN / f"{name}.npz"))
    line, network, suffix = CASES[name]
    script, lr = line.partition(".")[0], float(vectors["meta_lr"])
    as_its_own(script, vectors, suffix, monkeypatch)
    lr = lr * 256 / 8 if script == "seed" else lr  # it is for 256 images
    line += f" --data shapes:80 --batch-size 8 --queue-size 32 --epochs 1 --lr {lr} --out {tmp_path}"
    for flag in ("momentum", "temperature", "student_temperature", "teacher_temperature"):
        if f"meta_{flag}" in vectors:
            line += f" --{flag.replace('_', '-')} {vectors[f'meta_{flag}']}"
    run(line)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    expected = vectors["contrastive_loss"] if script == "disco" else vectors["loss"] + vectors.get("small_loss", 0)
    values = [line.get("contrastive", line["loss"]) for line in log]
    np.testing.assert_allclose(values, expected, rtol=2e-4)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    (group,), state = checkpoint["optimizer"]["param_groups"], checkpoint["model"]
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (1e-4, 0.9, False)
    averages = {
        "moco_v2": {"momentum_encoder": "final_key"},
        "disco": {"mean_student": "final_mean_student"},
        "seed": {},
    }
    for part, prefix in {network: f"final{suffix}", **averages[script]}.items():
        trained = golden_encoder(vectors, prefix)
        trained.load_state_dict({key.removeprefix(f"{part}."): value for key, value in state.items()
                                 if key.startswith(f"{part}.")})  # fmt: skip
        assert_close_state(trained, vectors, prefix)
    for queue in ("queue", "small_queue"):
        if f"final_{queue}" in vectors:
            np.testing.assert_allclose(state[queue], vectors[f"final_{queue}"], atol=2e-4)


class Seen(Exception):
    """What a script builds its method with."""


OPTIONS = {
    "moco_v2": ("MoCo", "--arch resnet8 --dim 5 --momentum 0.7 --temperature 0.3", [5, 40, 0.7, 0.3]),
    "disco": ("DisCo", "--student resnet8 --teacher {teacher} --momentum 0.7 --temperature 0.3 --distill-weight 3 "
              "--teacher-bn batch", [16, 40, 0.7, 0.3, 3.0, "batch"]),
}  # fmt: skip


@pytest.mark.parametrize("script", OPTIONS)
def test_the_command_line_reaches_the_method(script, teacher_file, monkeypatch):
    method, flags, expected = OPTIONS[script]

    def build(*arguments):
        raise Seen(arguments)

    module = importlib.import_module(script)
    monkeypatch.setattr(module, method, build)
    line = f"{script}.py --data shapes:20 --image-size 16 --batch-size 10 --queue-size 40 {flags}"
    monkeypatch.setattr("sys.argv", line.format(teacher=teacher_file).split())
    with pytest.raises(Seen) as stop:
        module.main()
    assert list(stop.value.args[0])[-len(expected) :] == expected
