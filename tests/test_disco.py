"""DisCo is the authors' DisCo, on one process and on several, and runs from end to end."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    GOLDEN,
    assert_close_state,
    assert_processes_agree,
    golden_encoder,
    golden_training,
    on_processes,
    run_script,
)

import common
from disco import DisCo, DistillationAlone, distill_loss


def golden_networks(vectors):
    return golden_encoder(vectors, "init_student"), golden_encoder(vectors, "init_teacher")


def golden_model(vectors):
    model = DisCo(
        *golden_networks(vectors),
        dim=int(vectors["meta_dim"]),
        queue_size=int(vectors["meta_queue_size"]),
        momentum=float(vectors["meta_momentum"]),
        temperature=float(vectors["meta_temperature"]),
        distill_weight=float(vectors["meta_batch"]),  # the released code sums over the batch
        teacher_bn={"train": "batch", "eval": "running"}[str(vectors["meta_teacher_bn"])],
    )
    model.queue.copy_(torch.from_numpy(vectors["init_queue"]))
    return model


@pytest.fixture(params=["batch", "running"])
def vectors(request):
    return dict(np.load(GOLDEN / f"disco_teacher_bn_{request.param}.npz"))


def test_golden_trajectory(vectors):
    model = golden_model(vectors)
    history = golden_training(model, model.student, vectors, 10)
    np.testing.assert_allclose([step["contrastive"] for step in history], vectors["contrastive_loss"], rtol=2e-4)
    released = (vectors["distill_loss_view1_sum"] + vectors["distill_loss_view2_sum"]) / vectors["meta_batch"]
    np.testing.assert_allclose([step["distill"] for step in history], released, rtol=2e-4)
    total = vectors["contrastive_loss"] + vectors["distill_loss_view1_sum"] + vectors["distill_loss_view2_sum"]
    np.testing.assert_allclose([step["loss"] for step in history], total, rtol=2e-4)
    assert_close_state(model.student, vectors, "final_student")
    assert_close_state(model.mean_student, vectors, "final_mean_student")
    np.testing.assert_allclose(model.queue, vectors["final_queue"], atol=2e-4)
    assert model.queue_ptr == vectors["final_queue_ptr"]


def test_teacher_stays_bit_identical(vectors):
    model = golden_model(vectors)
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    golden_training(model, model.student, vectors, 3)
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradients_reach_the_student_alone(vectors):
    model = golden_model(vectors)
    losses, keys = model(*torch.from_numpy(vectors["images"][0]))
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.student.parameters())
    frozen = [*model.mean_student.parameters(), *model.teacher.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert not keys.requires_grad


def test_distill_loss_is_averaged_over_images():
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    assert distill_loss(student, teacher) == 2.0  # (4 + 0) / 2


def test_distillation_alone_has_no_queue_and_no_mean_student():
    vectors = dict(np.load(GOLDEN / "disco_teacher_bn_running.npz"))
    model = DistillationAlone(*golden_networks(vectors), float(vectors["meta_batch"]))
    assert {name.partition(".")[0] for name in model.state_dict()} == {"student", "teacher"}
    first = golden_training(model, model.student, vectors, 3)[0]
    released = vectors["distill_loss_view1_sum"][0] + vectors["distill_loss_view2_sum"][0]
    assert first["loss"] == pytest.approx(released, rel=2e-4) and "contrastive" not in first


def share_of_training(training):
    """Three golden steps on this process's share of each batch; what every process ends with."""
    torch.manual_seed(0)
    vectors = dict(np.load(GOLDEN / "disco_teacher_bn_running.npz"))
    model = golden_model(vectors).train(training)
    return golden_training(model, model.student, vectors, 3), model.state_dict()


def test_two_processes(tmp_path):
    assert_processes_agree(share_of_training, tmp_path)


def images_for_the_keys():
    """What the key encoder sees of the golden batch's second views on this process."""
    vectors = dict(np.load(GOLDEN / "disco_teacher_bn_running.npz"))
    model, seen = golden_model(vectors), []
    model.mean_student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(*(common.own_rows(torch.from_numpy(view)) for view in vectors["images"][0]))
    return seen


def test_batchnorm_of_the_keys_is_shuffled(tmp_path):
    """Each process's batch statistics are those of images from all processes."""
    views = torch.from_numpy(np.load(GOLDEN / "disco_teacher_bn_running.npz")["images"][0])
    for rank, seen in enumerate(on_processes(2, images_for_the_keys, tmp_path)):
        assert len(seen) == 1 and torch.equal(seen[0], views[1][rank::2])


def test_the_users_line_on_jpeg_files(tmp_path, image_folder, teacher_file):
    """torchrun on two processes, ImageNet's layout under data/imagenet, the teacher's network read from its file."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenet").symlink_to(image_folder)
    line = f"disco.py --teacher {teacher_file} --student efficientnet_b0 --epochs 1 --batch-size 8"
    run_script(f"{line} --image-size 32 --workers 2", processes=2, cwd=tmp_path)
    out = tmp_path / "runs" / "disco"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2 and log[-1]["distill"] > 0
    arguments = json.loads((out / "config.json").read_text())["arguments"]
    assert (arguments["queue_size"], arguments["hidden_dim"], arguments["lr"]) == (65536, 2048, 0.03)
    from torchvision.models import efficientnet_b0

    missing = efficientnet_b0().load_state_dict(torch.load(out / "backbone.pth", weights_only=True), strict=False)
    assert set(missing.missing_keys) == {"classifier.1.weight", "classifier.1.bias"} and not missing.unexpected_keys


def test_resume_inside_an_epoch_ends_with_the_same_bits(tmp_path, teacher_file):
    line = (
        f"disco.py --data shapes:100 --image-size 16 --teacher {teacher_file} --student resnet8 --teacher-bn batch "
        "--batch-size 32 --queue-size 50 --epochs 2"
    )
    run_script(f"{line} --out {tmp_path}/whole")
    for stop in (2, 6):
        run_script(f"{line} --out {tmp_path}/parts --max-steps {stop}")
    first, second = (
        torch.load(tmp_path / f / "checkpoint.pth", weights_only=True)["model"] for f in ("whole", "parts")
    )
    assert first.keys() == second.keys() and not any(name.startswith("teacher.") for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("switches", ["--amp bf16", "--amp fp16 --no-contrastive"])
def test_mixed_precision_starts_with_the_losses_of_full_precision(switches, tmp_path, teacher_file):
    line = (
        f"disco.py --data shapes:64 --image-size 16 --teacher {teacher_file} --student resnet8 --batch-size 32 "
        "--queue-size 64 --max-steps 1"
    )
    logs = []
    for amp in (switches, switches.replace("bf16", "off").replace("fp16", "off")):
        run_script(f"{line} {amp} --out {tmp_path}/{len(logs)}")
        logs.append(json.loads((tmp_path / str(len(logs)) / "log.jsonl").read_text()))
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=0.02) and logs[0]["loss"] != logs[1]["loss"]
    assert ("contrastive" in logs[0]) == ("--no-contrastive" not in switches)
