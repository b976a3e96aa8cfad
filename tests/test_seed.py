"""SEED is the authors' SEED, with and without small crops, on one process and on several, and runs from end to end."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    COLOR,
    GOLDEN,
    assert_close_state,
    assert_processes_agree,
    golden_encoder,
    golden_training,
    run_script,
)

import common
import seed
from seed import OBJECTIVES, SEED, seed_loss, warmup_cosine_lr


def golden_model(vectors, **options):
    model = SEED(
        golden_encoder(vectors, "init_student"),
        golden_encoder(vectors, "init_teacher"),
        dim=int(vectors["meta_dim"]),
        queue_size=int(vectors["meta_queue_size"]),
        student_temperature=float(vectors["meta_student_temperature"]),
        teacher_temperature=float(vectors["meta_teacher_temperature"]),
        small_crops="small_images" in vectors,
        **options,
    )
    model.queue.copy_(torch.from_numpy(vectors["init_queue"]))
    if "small_images" in vectors:
        model.small_queue.copy_(torch.from_numpy(vectors["init_small_queue"]))
    return model


@pytest.fixture(params=["seed", "seed_small_crops"])
def vectors(request):
    return dict(np.load(GOLDEN / f"{request.param}.npz"))


def inputs(vectors, step=0):
    return [torch.from_numpy(vectors[name][step]) for name in ("images", "small_images") if name in vectors]


def test_golden_trajectory(vectors):
    model = golden_model(vectors)
    history = golden_training(model, model.student, vectors, 10)
    assert len(history) == len(vectors["images"])
    total = vectors["loss"] + vectors.get("small_loss", 0)
    np.testing.assert_allclose([step["loss"] for step in history], total, rtol=2e-4)
    if "small_loss" in vectors:
        np.testing.assert_allclose([step["small"] for step in history], vectors["small_loss"], rtol=2e-4)
        np.testing.assert_allclose(model.small_queue, vectors["final_small_queue"], atol=2e-4)
    assert_close_state(model.student, vectors, "final_student")
    np.testing.assert_allclose(model.queue, vectors["final_queue"], atol=2e-4)
    assert model.queue_ptr == vectors.get("final_queue_ptr", 8 * 6 % 32)


def test_teacher_stays_bit_identical(vectors):
    model = golden_model(vectors)
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    golden_training(model, model.student, vectors, 3)
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_reach_the_student_alone(vectors, objective):
    model = golden_model(vectors, objective=objective)
    losses, keys = model(*inputs(vectors))
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert not any(key.requires_grad for key in (keys if isinstance(keys, tuple) else [keys]))


def test_the_loss_is_equation_by_equation():
    student, teacher, queue = (F.normalize(torch.randn(n, 5), dim=1) for n in (4, 4, 7))
    expected = 0
    for z_student, z_teacher in zip(student, teacher, strict=True):
        entries = torch.cat([queue, z_teacher[None]])  # D+
        p_teacher, p_student = torch.exp(entries @ z_teacher / 0.1), torch.exp(entries @ z_student / 0.3)
        p_teacher, p_student = p_teacher / p_teacher.sum(), p_student / p_student.sum()
        expected = expected - (p_teacher * p_student.log()).sum() / 4
    assert seed_loss(student, teacher, queue, 0.3, 0.1).item() == pytest.approx(expected.item(), rel=1e-5)


def test_objectives_of_the_papers_ablation():
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    queue = torch.tensor([[0.0, 1.0]])
    assert OBJECTIVES["l2"](student, teacher, queue, 1, 1) == 2.0  # (4 + 0) / 2
    logits = torch.tensor([[-1.0, 0.0], [1.0, 1.0]]) / 0.5
    expected = -logits.log_softmax(dim=1)[:, 0].mean()
    assert OBJECTIVES["contrastive"](student, teacher, queue, 0.5, None).item() == pytest.approx(expected.item())


def test_learning_rate_warms_up_to_the_scaled_one():
    rates = [warmup_cosine_lr(0.03, 1024, epoch, 200) for epoch in range(200)]
    assert rates[:5] == pytest.approx([0.03, 0.048, 0.066, 0.084, 0.102])
    assert rates[5] == pytest.approx(0.12 * 0.5 * (1 + np.cos(np.pi * 5 / 200))) and rates[100] == pytest.approx(0.06)
    assert warmup_cosine_lr(0.03, 256, 3, 200) == 0.03


def share_of_training(training):
    """Three golden steps on this process's share of each batch; what every process ends with."""
    torch.manual_seed(0)
    vectors = dict(np.load(GOLDEN / "seed_small_crops.npz"))
    model = golden_model(vectors).train(training)
    return golden_training(model, model.student, vectors, 3), model.state_dict()


def test_two_processes(tmp_path):
    assert_processes_agree(share_of_training, tmp_path)


def test_script_with_small_crops_stops_and_goes_on(tmp_path, teacher_file):
    """Stopped inside an epoch and started again, it ends with the same bits; its checkpoint is a teacher itself."""
    line = (
        f"seed.py --data shapes:100 --image-size 24 --teacher {teacher_file} --student resnet8 --batch-size 32 "
        "--queue-size 50 --epochs 2 --small-crops 2 --out"
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script(f"{line} {whole}")
    for stop in (2, 6):
        run_script(f"{line} {parts} --max-steps {stop}")
    first, second = (torch.load(f / "checkpoint.pth", weights_only=True)["model"] for f in (whole, parts))
    assert first.keys() == second.keys() and {"queue", "small_queue", "queue_ptr"} < first.keys()
    assert not any(name.startswith("teacher.") for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in log] == pytest.approx([0.03, 0.03 + (0.03 / 8 - 0.03) / 5])
    assert log[-1]["loss"] == pytest.approx(log[-1]["large"] + log[-1]["small"], rel=1e-5)
    assert common.load_teacher(whole / "checkpoint.pth").dim == 16


def test_a_labelled_teacher_gives_its_features(tmp_path):
    """torchvision's file, on two processes: the embedding is the pooled feature, the student's head follows it."""
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), tmp_path / "labelled.pth")
    line = f"seed.py --data shapes:32 --image-size 40 --teacher {tmp_path}/labelled.pth --student mobilenet_v3_small"
    run_script(f"{line} --batch-size 16 --queue-size 40 --epochs 1 --out {tmp_path}/run", processes=2)
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["model"]
    assert checkpoint["queue"].shape == (40, 512) and len(checkpoint["student.head.2.weight"]) == 512


class Seen(Exception):
    """What a script handed on; stops it there."""


@pytest.mark.parametrize("crops, views", [
    ("", [(224, (0.2, 1.0))]),
    ("--small-crops 6", [(224, (0.14, 1.0))] + [(96, (0.05, 0.14))] * 6),
    ("--small-crops 1 --image-size 112", [(112, (0.14, 1.0)), (48, (0.05, 0.14))]),
    ("--small-crops 1 --small-size 64", [(224, (0.14, 1.0)), (64, (0.05, 0.14))]),
])  # fmt: skip
def test_the_command_line_reaches_the_method(crops, views, tmp_path, teacher_file, monkeypatch):
    handed = {}

    def loader(dataset, views, *rest):
        handed["views"] = views
        return real_loader(dataset, views, *rest)

    def method(*arguments):
        raise Seen(arguments)

    real_loader = common.Loader
    monkeypatch.setattr(common, "Loader", loader)
    monkeypatch.setattr(seed, "SEED", method)
    line = f"seed.py --data shapes:10 --image-size 224 --teacher {teacher_file} --student resnet18 --queue-size 40"
    line += f" --batch-size 10 --objective l2 --student-temperature 0.3 --teacher-temperature 0.05 {crops}"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(Seen) as stop:
        seed.main()
    (student, teacher, *rest) = stop.value.args[0]
    assert student.head[0].out_features == 512 and student.dim == teacher.dim == 16
    assert rest == [16, 40, 0.3, 0.05, bool(crops), "l2"] and handed["views"] == [
        common.View(*view, 0.5, **COLOR) for view in views
    ]
