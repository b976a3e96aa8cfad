"""Linear probe and k-NN judge features as the papers do, and run from end to end."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import on_processes, run, run_script

import common
import linear_eval
from linear_eval import Probe, cached_batches, evaluate, lr_factor


def test_heads_share_features_but_not_learning():
    """Training heads at several rates together gives each exactly what it would get alone."""
    features, labels = torch.randn(64, 12), torch.randint(5, (64,))

    def trained(rates):
        torch.manual_seed(0)
        probe = Probe(12, 5, len(rates))
        for head in probe.heads:
            torch.nn.init.zeros_(head.weight)
        groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(probe.heads, rates, strict=True)]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        for _ in range(20):
            losses = torch.stack([F.cross_entropy(logits, labels) for logits in probe(features)])
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
        return [head.weight for head in probe.heads]

    together = trained([0.1, 1.0, 3.0])
    for rate, weight in zip([0.1, 1.0, 3.0], together, strict=True):
        torch.testing.assert_close(weight, trained([rate])[0])


def test_verdict_by_hand():
    head = nn.Linear(8, 8)
    head.weight.data.copy_(torch.eye(8))
    head.bias.data.zero_()
    features = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]] * 3 + [[1.0, 2, 3, 4, 5, 6, 7, 8]])  # told 0, 0, 0 and 7
    verdict = evaluate(head, features, torch.tensor([0, 4, 5, 7]))
    assert verdict["top1"] == 50.0 and verdict["top5"] == 75.0
    assert verdict["per_class"] == [100.0, None, None, None, 0.0, 0.0, None, 100.0]
    confusion = torch.tensor(verdict["confusion"])
    assert confusion[0, 0] == confusion[4, 0] == confusion[5, 0] == confusion[7, 7] == 1 and confusion.sum() == 4


def test_plain_and_weighted_votes():
    torch.manual_seed(0)
    train, val = ((torch.randn(n, 4), torch.randint(3, (n,))) for n in (200, 100))
    args = argparse.Namespace(knn=[5, 50], knn_temperature=0.07)
    votes = linear_eval.k_nearest(args, train, val, 3)
    for name, temperature in (("knn", None), ("knn_weighted", 0.07)):
        expected = common.knn_accuracy(*train, *val, args.knn, 3, temperature)
        assert votes[name] == {str(k): accuracy for k, accuracy in expected.items()}
    assert votes["knn"]["50"] != votes["knn_weighted"]["50"]


def test_learning_rate_falls_at_60_and_80_percent_or_by_discos_halvings():
    factors = [lr_factor("steps", epoch, 100) for epoch in (0, 59, 60, 79, 80, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    factors = [lr_factor("halvings", epoch, 100) for epoch in range(100)]
    falls = [epoch for epoch in range(1, 100) if factors[epoch] < factors[epoch - 1]]
    assert falls == [5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 80] and factors[99] == 0.5**11


def test_cached_batches_see_every_image_once_an_epoch():
    features, labels = torch.arange(20.0)[:, None], torch.arange(20)
    batches = [list(cached_batches(features, labels, 5, 0, step, 8)) for step in (0, 4, 6)]
    for epoch in batches[:2]:
        assert sorted(torch.cat([y for _, y in epoch]).tolist()) == list(range(20))
        assert all(torch.equal(x[:, 0].long(), y) for x, y in epoch)
    assert not torch.equal(batches[0][0][1], batches[1][0][1])
    assert torch.equal(batches[2][0][1], batches[1][2][1])  # step 6 is the third of the second epoch


@pytest.fixture(scope="module")
def released_file(tmp_path_factory):
    """A released MoCo v2 file, with random weights."""
    encoder = common.Encoder(common.build_backbone("resnet18"), common.mlp_head(512, 512, 128))
    state = {f"module.encoder_q.{k}": v for k, v in encoder.backbone.state_dict().items()}
    state.update({f"module.encoder_q.fc.{k}": v for k, v in encoder.head.state_dict().items()})
    path = tmp_path_factory.mktemp("released") / "moco_v2.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, path)
    return path


def test_every_kind_of_weights_in_one_table(tmp_path, teacher_file):
    """backbone.pth, its checkpoint and an untrained network; eval.json agrees with the printed table."""
    backbone = teacher_file.parent / "backbone.pth"
    line = (
        f"linear_eval.py --data shapes:200 --image-size 16 --weights {teacher_file} {backbone} random --arch resnet8 "
        f"--lr 1 0.1 --knn 5 10 --epochs 5 --batch-size 50 --cached --out {tmp_path}"
    )
    done = run_script(line)
    results = json.loads((tmp_path / "eval.json").read_text())
    assert list(results) == [str(teacher_file), str(backbone), "random"]
    first, second, untrained = results.values()
    assert first == second != untrained and first["parameters"] == 77392 and first["feature_dim"] == 64
    assert first["knn"].keys() == {"5", "10"} and first["linear"]["top1_by_lr"].keys() == {"1", "0.1"}
    assert first["linear"]["top1"] == max(first["linear"]["top1_by_lr"].values()) <= first["linear"]["top5"]
    assert first["knn_weighted"].keys() == {"5", "10"} and len(first["linear"]["per_class"]) == 10
    assert sum(map(sum, first["linear"]["confusion"])) == 2000
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    top1 = [float(row[4]) for row in list(rows.values())[1:]]
    assert len(top1) == 3 and top1 == sorted(top1, reverse=True)
    assert float(rows["random"][3]) == pytest.approx(untrained["knn"]["10"], abs=0.01)
    assert float(rows[str(backbone)][4]) == pytest.approx(first["linear"]["top1"], abs=0.01)
    assert "img/s" not in run_script(line).stderr  # done already: the same command prints the same table
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["weights"] for line in log} == set(results)
    assert [line["knn"] for line in log if "knn" in line] == [result["knn"] for result in results.values()]
    assert all(line["seconds"].keys() == {"features", "knn", "training"} for line in log if "knn" in line)


def test_features_separate_what_they_should(tmp_path):
    """A probe on raw class colours reaches 100 %: the judge itself does not lose accuracy."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 7)):
        for name, color in (("blue", 2), ("green", 1), ("red", 0)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (20, 24, 3), dtype=np.uint8)
                pixels[..., color] += 150
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    out = tmp_path / "out"
    line = f"linear_eval.py --data {tmp_path} --image-size 16 --weights random --arch resnet8 --workers 1 --out {out}"
    run_script(f"{line} --knn 5 --epochs 10 --batch-size 10 --lr 1", processes=2)
    result = json.loads((out / "eval.json").read_text())["random"]
    assert result["linear"]["top1"] == result["linear"]["top5"] == result["knn"]["5"] == 100


def test_released_teacher_on_jpeg_files(tmp_path, image_folder, released_file, capsys):
    """A released file, on a folder: crops and flips anew each epoch; stopped and resumed, the result is the same."""
    line = (
        f"linear_eval.py --data {image_folder} --image-size 40 --weights {released_file} --workers 1 "
        "--knn 3 --epochs 4 --batch-size 8 --lr 0.1 --out "
    )
    run(f"{line} {tmp_path}/whole")
    run(f"{line} {tmp_path}/parts --max-steps 3")
    (tmp_path / "parts" / "eval.json").unlink()
    run(f"{line} {tmp_path}/parts")
    assert "going on from step 3" in capsys.readouterr().err
    first, second = (json.loads((tmp_path / f / "eval.json").read_text()) for f in ("whole", "parts"))
    assert first == second


SMALL = "linear_eval.py --data shapes:120 --image-size 16 --knn 5 10 --batch-size 24"


def table_of(folder):
    return json.loads((folder / "eval.json").read_text())


PROTOCOLS = {"cached": "--cached", "crops": "--lr 1 --label-fraction 0.5"}


def judge_twice(out, teacher_file):
    """Run both protocols on this or several processes."""
    for name, switches in PROTOCOLS.items():
        with pytest.MonkeyPatch.context() as patch:
            line = f"{SMALL} --weights {teacher_file} --epochs 3 {switches} --out {out}/{name}"
            patch.setattr(sys, "argv", line.split())
            linear_eval.main()


def test_verdict_is_the_same_on_one_two_and_three_processes(tmp_path, teacher_file):
    """2000 validation images do not share out evenly over three; each counts once."""
    judge_twice(tmp_path / "1", teacher_file)
    for processes in (2, 3):
        on_processes(processes, judge_twice, tmp_path, tmp_path / str(processes), teacher_file)
    for name in PROTOCOLS:
        alone, *others = (table_of(tmp_path / str(processes) / name) for processes in (1, 2, 3))
        assert alone == others[0] == others[1]
        (result,) = alone.values()
        assert sum(map(sum, result["linear"]["confusion"])) == 2000
        right = sum(row[i] for i, row in enumerate(result["linear"]["confusion"]))
        assert result["linear"]["top1"] == right / 20
        assert len(result["linear"]["top1_by_lr"]) == (6 if name == "cached" else 1)


def test_the_network_learns_when_fine_tuned_and_goes_on(tmp_path, teacher_file):
    line = f"{SMALL} --weights {teacher_file} random --arch resnet8 --finetune --epochs 2 --backbone-lr 0.1 --out"
    run(f"{line} {tmp_path}/whole")
    for stop in (3, 10):
        run(f"{line} {tmp_path}/parts --max-steps {stop}")
        if stop == 3:
            (tmp_path / "parts" / "eval.json").unlink()
    whole, parts = (table_of(tmp_path / folder) for folder in ("whole", "parts"))
    assert whole[str(teacher_file)]["finetune"].keys() >= {
        "top1",
        "top5",
        "lr",
        "backbone_lr",
        "per_class",
        "confusion",
    }
    assert whole[str(teacher_file)]["finetune"]["backbone_lr"] == 0.1
    assert whole["random"] == parts["random"]
    tuned = torch.load(tmp_path / "whole" / "checkpoint.pth", weights_only=True)["model"]
    torch.manual_seed(0)
    before = common.build_backbone("resnet8", 16).state_dict()
    assert not torch.equal(tuned["backbone.conv1.weight"], before["conv1.weight"])
    assert not torch.equal(tuned["backbone.bn1.running_mean"], before["bn1.running_mean"])


def test_cached_features_are_kept_and_used_again(tmp_path, teacher_file, monkeypatch):
    line = f"{SMALL} --weights {teacher_file} --cached --epochs 2 --lr 1 --out {tmp_path}"
    run(f"{line} --max-steps 3")
    (tmp_path / "eval.json").unlink()
    monkeypatch.setattr(common, "extract_features", None)
    run(line)
    assert table_of(tmp_path)[str(teacher_file)]["linear"]["top1"] > 0


def test_labels_by_list_and_by_fraction(tmp_path, image_folder, teacher_file):
    names = tmp_path / "names.txt"
    names.write_text("ant/0.jpg\nbee/1.JPEG\nant/3.jpg\nbee/7.jpg\n")
    line = f"linear_eval.py --data {image_folder} --image-size 16 --weights {teacher_file} --workers 0 --batch-size 4 "
    run(f"{line} --knn 2 --epochs 1 --lr 1 --label-list {names} --out {tmp_path}/list")
    run(f"{line} --knn 2 --epochs 1 --lr 1 --label-fraction 0.25 --out {tmp_path}/part")
    for folder in ("list", "part"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["inputs"]["images"] == [4, 16]
    listed = common.subset_from_list(common.FolderDataset(image_folder / "train"), names)
    assert [path.decode()[-9:] for path in listed.paths] == ["ant/0.jpg", "ant/3.jpg", "ee/1.JPEG", "bee/7.jpg"]
    assert listed.labels.tolist() == [0, 0, 1, 1]


def test_picture_of_neighbours(tmp_path):
    """Two colours as classes, features the colour itself: each row's neighbours are of its colour, and framed so."""
    colors = torch.tensor([[200, 0, 0], [0, 200, 0]], dtype=torch.uint8)
    labels = torch.arange(24) % 2
    train = common.ArrayDataset(colors[labels][:, :, None, None].repeat(1, 1, 8, 8), labels, 2, torch.device("cpu"))
    val = common.subset(train, np.arange(6))
    features = [(colors[dataset.labels].float(), dataset.labels.clone()) for dataset in (train, val)]
    features[0][1][0] = 1  # of the wrong class, to the judge

    class Folder:
        folder = tmp_path

        def name_unreadable(self, step):
            pass

    linear_eval.draw_neighbours(Folder(), "neighbors.png", train, val, *features, 8, queries=2, neighbours=12)
    picture = common.read_image(str(tmp_path / "neighbors.png"))
    assert picture.shape == (3, 2 * 74 + 2, 13 * 74 + 2)
    row, wrong, right, query = picture[:, 2 + 36], [], [], picture[:, 3, 10].tolist()
    for column in range(1, 13):
        frame = picture[:, 3, 74 * column + 3].tolist()
        (wrong if frame[0] > frame[2] else right).append(column)
        assert row[:, 74 * column + 36].tolist() == row[:, 36].tolist() == [200, 0, 0]
    assert len(wrong) == 1 and len(right) == 11 and query[0] == query[1] == query[2]
    assert picture[:, 74 + 36, 36].tolist() == [0, 200, 0]


def test_images_come_at_the_networks_size(tmp_path, teacher_file, monkeypatch):
    """A checkpoint tells it; a released file of 224 pixels is judged at 224, whatever the data set."""

    def load(data, root, device, size):
        raise common.UserError(str(size))

    monkeypatch.setattr(common, "load_labelled", load)
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *_, **__: state)
    torch.save(common.build_backbone("resnet18").state_dict(), tmp_path / "resnet18.pth")
    torch.save(common.build_backbone("wrn_16_1").state_dict(), tmp_path / "wrn.pth")
    cases = {
        str(teacher_file): 16,
        f"{tmp_path}/resnet18.pth {teacher_file}": 224,
        f"{tmp_path}/wrn.pth": 32,
        "torchvision --arch resnet18": 224,
        "random --arch resnet18": None,
        f"{teacher_file} --image-size 20": 20,
    }
    for weights, size in cases.items():
        monkeypatch.setattr(sys, "argv", f"linear_eval.py --data shapes --weights {weights}".split())
        with pytest.raises(common.UserError) as told:
            linear_eval.main()
        assert str(told.value) == str(size)
