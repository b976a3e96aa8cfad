"""SSKD's losses are the authors', on one process and on several, and its three stages run from end to end and go on."""

import itertools
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import GOLDEN, GoldenBackbone, on_processes, run, run_script
from torchvision.transforms.v2 import functional as TF

import common
import sskd
from sskd import SSKD, noisy_labels, selective_transfer_mask, ss_head_loss, sskd_losses, step_lr

WEIGHTS = {"ce": 0.1, "kd": 0.9, "tf": 2.7, "ss": 10.0}


@pytest.fixture(params=["sskd", "sskd_selective_tf"])
def vectors(request):
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / f"{request.param}.npz").items()}


def test_golden_losses_kept_rows_and_gradients(vectors):
    logits, embedding = vectors["student_logits"].requires_grad_(), vectors["student_ss_features"].requires_grad_()
    options = {"kd_temperature": "kd_T", "tf_temperature": "tf_T", "ss_temperature": "ss_T", "tf_ratio": "ratio_tf",
               "ss_ratio": "ratio_ss"}  # fmt: skip
    options = {name: vectors[f"meta_{released}"].item() for name, released in options.items()}
    teacher = vectors["teacher_logits"], vectors["teacher_ss_features"]
    losses = sskd_losses(logits, embedding, *teacher, vectors["labels"], **options)
    for name in WEIGHTS:
        assert losses[name].item() == pytest.approx(vectors[f"{name}_loss"].item(), rel=2e-5), name
    loss = sum(weight * losses[name] for name, weight in zip(WEIGHTS, vectors["meta_weights"], strict=True))
    loss.backward()
    for name, tensor in (("student_logits", logits), ("student_ss_features", embedding)):
        torch.testing.assert_close(tensor.grad, vectors[f"grad_{name}"], rtol=2e-4, atol=1e-6)
    kept = selective_transfer_mask(
        sskd.rotated(teacher[0]), vectors["labels"].repeat_interleave(3), options["tf_ratio"]
    )
    assert torch.equal(kept.nonzero()[:, 0], vectors["kept_tf"])
    similarity = sskd.similarities(teacher[1])
    kept = selective_transfer_mask(similarity, sskd.positive_targets(similarity), options["ss_ratio"])
    assert torch.equal(kept.nonzero()[:, 0], vectors["kept_ss"])
    assert ss_head_loss(vectors["head_features"]).item() == pytest.approx(vectors["head_loss"].item(), rel=2e-5)


def test_ties_in_the_error_level_are_broken_in_a_fixed_order():
    scores = torch.tensor([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [0.0, 1.0, 2.0], [3.0, 2.0, 2.0], [1.0, 0.0, 1.0]])
    target = torch.tensor([0, 1, 0, 2, 2])  # levels 0, 1, 2, 2, 1
    rows = {0.0: [1, 0, 0, 0, 0], 0.25: [1, 1, 0, 0, 0], 0.5: [1, 1, 0, 0, 1], 0.75: [1, 1, 1, 0, 1], 1.0: [1] * 5}
    for ratio, expected in rows.items():
        assert selective_transfer_mask(scores, target, ratio).tolist() == expected, ratio
    assert selective_transfer_mask(scores[2:4], target[2:4], 0.4).tolist() == [
        0,
        0,
    ]  # nothing left: the loss is 0, not 0 / 0
    loss = sskd.kd_loss(scores[2:4], scores[:2], 4.0, torch.zeros(2))
    assert loss == 0


def test_rotations_are_counter_clockwise_and_four_in_a_row():
    images = torch.rand(3, 3, 5, 5)
    rows = sskd.rotate_and_crop(images, None, rotations=4, padding=0)
    for i, image in enumerate(images):
        for k in range(4):
            expected = np.rot90(image.permute(1, 2, 0).numpy(), k)
            np.testing.assert_array_equal(rows[4 * i + k].permute(1, 2, 0).numpy(), expected)


def test_padded_crops_are_torchvisions():
    images, offsets = torch.rand(50, 3, 6, 7), np.random.default_rng(0).integers(0, 5, (50, 2))
    crops = sskd.rotate_and_crop(images, np.random.default_rng(0), rotations=1, padding=2)
    for image, (top, left), ours in zip(images, offsets, crops, strict=True):
        torch.testing.assert_close(ours, TF.crop(TF.pad(image, [2]), top, left, 6, 7), rtol=0, atol=0)


def padded_and_rotated():
    """Two batches of four rotations each, as bytes, with every image's number as its label."""
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = common.ArrayDataset(images, torch.arange(40), range(40), torch.device("cpu"), ((0, 0, 0), (1, 1, 1)))
    view = common.View(8, flip=0.5, augment=partial(sskd.rotate_and_crop, rotations=4, padding=2))
    loader = common.Loader(dataset, [view], 12, 5, 0, torch.device("cpu"))
    return images, [((255 * rows[0]).round().byte(), labels) for rows, labels in loader.batches(range(2))]


def test_rotations_share_the_flip_and_each_has_its_own_crop():
    images, batches = padded_and_rotated()
    flips, offsets = [], []
    for rows, labels in batches:
        for row, label in zip(rows.unflatten(0, (-1, 4)), labels, strict=True):
            found = []
            for flip in (False, True):
                image = images[label].flip(2) if flip else images[label]
                padded = [TF.pad(image.rot90(k, (1, 2)), [2]) for k in range(4)]
                crops = [{at: padded[k][:, at // 5 :, at % 5 :][:, :8, :8] for at in range(25)} for k in range(4)]
                places = [[at for at in crops[k] if torch.equal(crops[k][at], row[k])] for k in range(4)]
                found += [(flip, [place[0] for place in places])] if all(places) else []
            assert len(found) == 1
            flips.append(found[0][0])
            offsets += found[0][1]
    assert 6 <= sum(flips) <= 18 and len(set(offsets)) > 15  # of 24 and 25
    assert any(len(set(offsets[i : i + 4])) > 1 for i in range(0, len(offsets), 4))


def tiny_model(weights=WEIGHTS):
    torch.manual_seed(0)
    student, teacher = (sskd.Classifier(GoldenBackbone(width), nn.Linear(2 * width, 5)) for width in (4, 6))
    return SSKD(student, teacher, weights, kd_temperature=4.0, tf_temperature=4.0, ss_temperature=0.02, tf_ratio=0.5,
                ss_ratio=0.5)  # fmt: skip


def tiny_batch(seed, batch_size=12):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, 8, 8, generator=generator)
    return images, torch.randint(5, (batch_size,), generator=generator)


def train(model, parameters, loss_of, steps=3):
    """SGD on this process's share of each batch; the losses and what the model ends with."""
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    history = []
    for step in range(steps):
        images, labels = map(common.own_rows, tiny_batch(step))
        losses = loss_of(sskd.rotate_and_crop(images, None, model.rotations, padding=0), labels)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    return history, model.state_dict()


def student_share(weights):
    """Training of the student without BatchNorm's batch statistics, which differ from share to share."""
    model = tiny_model(weights).eval()
    if model.rotations > 1:
        model.teacher_head.requires_grad_(False)
    return train(model, [p for p in model.parameters() if p.requires_grad], common.distribute(model))


def head_share():
    model = tiny_model()
    ddp_model = common.distribute(model.teacher_head)

    def loss_of(images, labels):
        return {"loss": ss_head_loss(sskd.gather_with_gradient(ddp_model(model.teacher.features(images))))}

    return train(model, model.teacher_head.parameters(), loss_of)


COMBINATIONS = [names for size in range(1, 5) for names in itertools.combinations(WEIGHTS, size)]
SHARES = {names: partial(student_share, {name: WEIGHTS[name] for name in names}) for names in COMBINATIONS}
SHARES["head"] = head_share


def all_shares():
    return {name: share() for name, share in SHARES.items()}


def all_shares_and_rotations():
    return all_shares(), padded_and_rotated()[1]


def test_losses_and_weights_are_those_of_one_process(tmp_path):
    """For each combination of terms, and for the images: ranks, similarities and means are over the whole batch."""
    alone, batches = all_shares_and_rotations()
    on_three = on_processes(3, all_shares_and_rotations, tmp_path)
    for step, (rows, labels) in enumerate(batches):
        assert torch.equal(rows, torch.cat([parts[step][0] for _, parts in on_three]))
        assert torch.equal(labels, torch.cat([parts[step][1] for _, parts in on_three]))
    for results, _ in on_three:
        for name, (history, state) in results.items():
            for step, alone_step in zip(history, alone[name][0], strict=True):
                assert step == pytest.approx(alone_step, rel=1e-4), name
            for key, value in state.items():
                torch.testing.assert_close(value, alone[name][1][key], rtol=1e-4, atol=1e-6)
    for name, (_, state) in alone.items():
        learners = "teacher_head." if name == "head" else ("student.", "student_head.")
        before = tiny_model(WEIGHTS).state_dict()
        trained = {key for key, value in state.items() if not torch.equal(value, before[key])}
        assert trained == {key for key in state if key.startswith(learners) and "running" not in key
                           and "tracked" not in key}, name  # fmt: skip


def test_gradients_reach_the_student_and_its_head_alone():
    model = tiny_model()
    model.teacher_head.requires_grad_(False)
    images, labels = tiny_batch(0)
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    model.train()(sskd.rotate_and_crop(images, None, rotations=4, padding=0), labels)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("student"), name
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_of_zero_leave_out_what_is_not_needed():
    images, labels = tiny_batch(0)
    kd, ce = tiny_model({"ce": 1.0, "kd": 2.0, "tf": 0.0, "ss": 0.0}), tiny_model({"ce": 1.0, "kd": 0.0})
    assert (kd.rotations, ce.rotations, ce.teacher) == (1, 1, None)
    assert not any("head" in name or name.startswith("teacher") for name in ce.state_dict())
    losses = kd(images, labels)
    assert losses.keys() == {"loss", "ce", "kd"} and losses["loss"] == losses["ce"] + 2 * losses["kd"]
    assert ce(images, labels)["loss"] == losses["ce"]


def test_noise_turns_the_asked_part_of_labels_into_each_other_class():
    labels = torch.arange(4000) % 4
    noisy = noisy_labels(labels, 4, 0.3, seed=1)
    assert (noisy != labels).sum() == 1200 and noisy.min() >= 0 and noisy.max() < 4
    counts = torch.bincount(((noisy - labels) % 4)[noisy != labels], minlength=4)[1:]
    assert counts.min() > 340  # of 400
    assert torch.equal(noisy, noisy_labels(labels, 4, 0.3, seed=1))
    assert not torch.equal(noisy, noisy_labels(labels, 4, 0.3, seed=2))


def test_learning_rate_falls_at_the_released_epochs():
    rates = [step_lr(0.05, epoch, 240, sskd.CIFAR["milestones"]) for epoch in range(240)]
    falls = [epoch for epoch in range(1, 240) if rates[epoch] < rates[epoch - 1]]
    assert rates[0] == 0.05 and falls == [150, 180, 210] and rates[239] == pytest.approx(5e-5)
    for settings, expected in ((sskd.CIFAR, [30, 45]), (sskd.IMAGENET, [10, 20])):
        epochs = settings["head_epochs"]
        rates = [step_lr(1.0, epoch, epochs, settings["head_milestones"]) for epoch in range(epochs)]
        assert [epoch for epoch in range(1, epochs) if rates[epoch] < rates[epoch - 1]] == expected
    rates = [step_lr(1.0, epoch, 100, sskd.IMAGENET["milestones"]) for epoch in range(100)]
    assert [epoch for epoch in range(1, 100) if rates[epoch] < rates[epoch - 1]] == [30, 60, 90]


@pytest.mark.parametrize("line, expected", [
    ("--data cifar100 --teacher t.pth --student wrn_16_2", {"epochs": 240, "batch_size": 64, "lr": 0.05,
     "weight_decay": 5e-4, "head_epochs": 60, "head_lr": 0.05, "ce_weight": 0.1, "kd_weight": 0.9, "tf_weight": 2.7,
     "ss_weight": 10.0, "tf_ratio": 1.0, "ss_ratio": 0.75}),
    ("--data cifar100 --teacher t.pth --student MobileNetV2", {"lr": 0.01, "head_lr": 0.05}),
    ("--data cifar100 --teacher t.pth --student ShuffleV1 --lr 0.2", {"lr": 0.2}),
    ("--data cifar100 --train-teacher ShuffleV2", {"lr": 0.01, "ce_weight": 1.0, "kd_weight": 0.0, "tf_weight": 0.0,
     "ss_weight": 0.0, "out": "runs/sskd_teacher", "student": "ShuffleV2"}),
    ("--teacher torchvision --teacher-arch resnet34 --student resnet18", {"epochs": 100, "batch_size": 256, "lr": 0.1,
     "weight_decay": 5e-4, "head_epochs": 30, "head_lr": 0.1, "ce_weight": 0.1, "out": "runs/sskd"}),
    ("--data images --teacher t.pth --student resnet18 --epochs 7", {"epochs": 7, "batch_size": 256}),
])  # fmt: skip
def test_defaults_follow_data_and_network(line, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sskd.py", *line.split()])
    args = vars(sskd.parse_args())
    assert {name: args[name] for name in expected} == expected


SHAPES = "sskd.py --data shapes:60 --image-size 16 --batch-size 20"


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory):
    """A short run of sskd.py --train-teacher, as a user makes one; the path of its checkpoint."""
    out = tmp_path_factory.mktemp("labelled")
    run(f"{SHAPES} --train-teacher resnet14 --epochs 2 --out {out}")
    return out / "checkpoint.pth"


def test_three_stages_go_on_with_the_same_bits_and_give_a_plain_network(tmp_path, labelled_file, capsys):
    line = f"{SHAPES} --teacher {labelled_file} --student wrn_16_1 --head-epochs 2 --epochs 2 --label-noise 0.2"
    line += " --head-lr 0.02"
    capsys.readouterr()
    run(f"{line} --out {tmp_path}/whole")
    whole = capsys.readouterr().out
    models = {}
    for stop in (2, 6, 8, 12):  # inside the head's epochs, between the stages, inside the student's
        run(f"{line} --out {tmp_path}/parts --max-steps {stop}")
        parts = capsys.readouterr().out
        checkpoint = torch.load(tmp_path / "parts" / "checkpoint.pth", weights_only=True)
        assert checkpoint["step"] == stop
        # No accuracy of a student that has not begun
        assert (tmp_path / "parts" / "backbone.pth").exists() == ("validation images" in parts) == (stop >= 6)
        models[stop] = checkpoint["model"]
    assert whole.splitlines()[-1] == parts.splitlines()[-1] and "validation images" in whole
    first, second = (torch.load(tmp_path / f / "checkpoint.pth", weights_only=True) for f in ("whole", "parts"))
    assert first["step"] == second["step"] == 12
    assert {name.partition(".")[0] for name in first["model"]} == {"student", "student_head", "teacher_head"}
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
        if name.endswith("weight") and value.ndim > 1:  # a stage trains its own parts
            assert torch.equal(value, models[6][name]) == name.startswith("teacher_head"), name
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert "teacher_top1" in log[0] and [line["step"] for line in log if "top1" in line] == [6, 9, 12]
    assert [line["lr"] for line in log if "loss" in line] == pytest.approx([0.02, 0.002, 0.05, 0.05])
    assert all(line["ss"] > 0 and line["tf"] > 0 for line in log if "ce" in line)

    plain = common.CIFAR_NETWORKS["wrn_16_1"]()
    plain.load_state_dict(torch.load(tmp_path / "whole" / "backbone.pth", weights_only=True))
    images = torch.randn(4, 3, 16, 16)
    for file in ("backbone.pth", "checkpoint.pth"):
        student = sskd.load_classifier(tmp_path / "whole" / file)
        torch.testing.assert_close(plain.eval()(images), student(images))
        teacher = common.load_teacher(tmp_path / "whole" / file)  # of any other method: the features are the embedding
        assert torch.equal(teacher(images), student.features(images)) and teacher.dim == 64


def test_imagenets_layout_on_two_processes_and_the_verdict(tmp_path, image_folder, capsys):
    """A labelled file of torchvision as teacher, a torchvision network as student, judged on other data."""
    from torchvision.models import mobilenet_v3_small, resnet18

    torch.save(resnet18(num_classes=2).state_dict(), tmp_path / "labelled.pth")
    line = f"sskd.py --data {image_folder} --image-size 40 --teacher {tmp_path}/labelled.pth --workers 1"
    line += f" --student mobilenet_v3_small --batch-size 8 --head-epochs 1 --epochs 1 --out {tmp_path}/run"
    run_script(line, processes=2)
    state = torch.load(tmp_path / "run" / "backbone.pth", weights_only=True)
    mobilenet_v3_small(num_classes=2).load_state_dict(state)
    assert (tmp_path / "run" / "views.png").exists()
    run("linear_eval.py --data shapes:60 --image-size 40 --batch-size 20 --epochs 1 --knn 5 --weights "
        f"{tmp_path}/run/backbone.pth --out {tmp_path}/eval")  # fmt: skip
    assert f"{tmp_path}/run/backbone.pth" in capsys.readouterr().out


def test_few_labels_and_baselines_by_weights(tmp_path, labelled_file):
    baseline = "--tf-weight 0 --ss-weight 0"
    for name, switches in (("kd", baseline), ("ce", f"--ce-weight 1 --kd-weight 0 {baseline}")):
        line = f"{SHAPES} --teacher {labelled_file} --student resnet8 --label-fraction 0.4 --epochs 1 {switches}"
        run(f"{line} --out {tmp_path}/{name}")
        config = json.loads((tmp_path / name / "config.json").read_text())
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert config["inputs"]["data"].startswith("20 images") and log[-1]["step"] == 1
        assert ("kd" in log[-2]) == (name == "kd") and "ss" not in log[-2]


def test_torchvisions_labelled_weights_are_a_teacher(tmp_path, monkeypatch):
    """Their download stands in for by a file of the same kind."""
    import torchvision

    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.DEFAULT.__class__, "get_state_dict", lambda *_, **__: state)
    teacher = sskd.load_classifier("torchvision", "resnet18", num_classes=1000)
    images = torch.randn(2, 3, 64, 64)
    network = torchvision.models.resnet18()
    network.load_state_dict(state)
    torch.testing.assert_close(teacher(images), network.eval()(images))
    assert not any(p.requires_grad for p in teacher.parameters())
    encoder = common.load_teacher("torchvision", "resnet18")
    torch.testing.assert_close(encoder(images), teacher.features(images))
    assert encoder.backbone.image_size == 224
    with pytest.raises(common.UserError, match="1000 classes, --data has 10"):
        sskd.load_classifier("torchvision", "resnet18", num_classes=10)


def test_a_teacher_of_another_class_order_is_named(tmp_path, capfd):
    """Its accuracy is printed, with a warning near chance: the student would learn wrong answers in silence."""
    from PIL import Image

    for root, names in (("images", "abc"), ("renamed", "cab")):
        for split in ("train", "val"):
            for name, color in zip(names, ("red", "lime", "blue"), strict=True):
                (tmp_path / root / split / name).mkdir(parents=True)
                for i in range(8):
                    Image.new("RGB", (20, 20 + i), color).save(tmp_path / root / split / name / f"{i}.bmp")
    small = "--image-size 16 --batch-size 8 --workers 0"
    teacher = f"--train-teacher resnet8 --lr 0.05 --epochs 6 --out {tmp_path}/teacher"
    run(f"sskd.py --data {tmp_path}/images {small} {teacher}")
    line = f"sskd.py {small} --teacher {tmp_path}/teacher/checkpoint.pth --student resnet8 --max-steps 1 --data"
    printed = []
    for root in ("images", "renamed"):
        capfd.readouterr()
        run(f"{line} {tmp_path}/{root} --out {tmp_path}/{root}_run")
        printed.append(capfd.readouterr().err)
    assert "top-1 accuracy 100.00 %" in printed[0] and "warning" not in printed[0]
    assert "top-1 accuracy 0.00 %" in printed[1] and "class order" in printed[1] and "class 0 is a" in printed[1]
