"""Linear probe and k-NN judge features as the papers do, and run from end to end."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_script

import common
from linear_eval import Probe, cached_batches, step_decay


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


def test_accuracy_of_top_1_and_top_5():
    probe = Probe(8, 8, 2)
    probe.heads[0].weight.data.copy_(torch.eye(8))
    probe.heads[1].weight.data.copy_(-torch.eye(8))
    features = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]]).repeat(4, 1)
    top1, top5 = probe.accuracy(features, torch.tensor([0, 4, 5, 7]))
    assert top1 == [25.0, 25.0] and top5 == [50.0, 75.0]


def test_learning_rate_falls_at_60_and_80_percent():
    factors = [step_decay(epoch, 100) for epoch in (0, 59, 60, 79, 80, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


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
        f"--lr 1 0.1 --knn 5 10 --epochs 5 --batch-size 50 --out {tmp_path}"
    )
    done = run_script(line)
    results = json.loads((tmp_path / "eval.json").read_text())
    assert list(results) == [str(teacher_file), str(backbone), "random"]
    first, second, untrained = results.values()
    assert first == second != untrained and first["parameters"] == 77392 and first["feature_dim"] == 64
    assert first["knn"].keys() == {"5", "10"} and first["linear"]["top1_by_lr"].keys() == {"1", "0.1"}
    assert first["linear"]["top1"] == max(first["linear"]["top1_by_lr"].values()) <= first["linear"]["top5"]
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert float(rows["random"][3]) == pytest.approx(untrained["knn"]["10"], abs=0.01)
    assert float(rows[str(backbone)][4]) == pytest.approx(first["linear"]["top1"], abs=0.01)
    assert "img/s" not in run_script(line).stderr  # done already: the same command prints the same table
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["weights"] for line in log} == set(results)
    assert [line["knn"] for line in log if "knn" in line] == [result["knn"] for result in results.values()]


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


def test_released_teacher_on_jpeg_files(tmp_path, image_folder, released_file):
    """A released file, on a folder: crops and flips anew each epoch; stopped and resumed, the result is the same."""
    line = (
        f"linear_eval.py --data {image_folder} --image-size 40 --weights {released_file} --workers 1 "
        "--knn 3 --epochs 4 --batch-size 8 --lr 0.1 --out "
    )
    run_script(f"{line} {tmp_path}/whole")
    run_script(f"{line} {tmp_path}/parts --max-steps 3")
    (tmp_path / "parts" / "eval.json").unlink()
    again = run_script(f"{line} {tmp_path}/parts")
    assert "going on from step 3" in again.stderr
    first, second = (json.loads((tmp_path / f / "eval.json").read_text()) for f in ("whole", "parts"))
    assert first == second
