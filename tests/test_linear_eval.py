"""Linear probe and k-NN evaluate features as the papers do, and run from end to end."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import on_processes, run, run_script, share_of

import common
import linear_eval
from linear_eval import CachedBatches, Probe, evaluate, lr_factor


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


def test_metrics_by_hand():
    head = nn.Linear(8, 8)
    head.weight.data.copy_(torch.eye(8))
    head.bias.data.zero_()
    features = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]] * 4 + [[1.0, 2, 3, 4, 5, 6, 7, 8]])  # predicted 0 and 7
    metrics = evaluate(head, features, torch.tensor([0, 4, -1, 5, 7]))  # -1: an image that cannot be read
    assert metrics["top1"] == 50.0 and metrics["top5"] == 75.0
    assert metrics["per_class"] == [100.0, None, None, None, 0.0, 0.0, None, 100.0]
    confusion = torch.tensor(metrics["confusion"])
    assert confusion[0, 0] == confusion[4, 0] == confusion[5, 0] == confusion[7, 7] == 1 and confusion.sum() == 4


def test_learning_rate_falls_at_60_and_80_percent_or_by_discos_halvings():
    factors = [lr_factor("steps", epoch, 100) for epoch in (0, 59, 60, 79, 80, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    factors = [lr_factor("halvings", epoch, 100) for epoch in range(100)]
    falls = [epoch for epoch in range(1, 100) if factors[epoch] < factors[epoch - 1]]
    assert falls == [5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 80] and factors[99] == 0.5**11


def test_classifiers_start_as_in_the_papers():
    torch.manual_seed(0)
    for head in linear_eval.Probe(500, 100, 2).heads:
        assert head.weight.std().item() == pytest.approx(0.01, rel=0.05) and not head.bias.any()


def test_the_schedule_reaches_every_learning_rate(tmp_path, teacher_file):
    """Cut by 10 at 60 and 80 % of the epochs: the last of five epochs has a hundredth."""
    line = f"linear_eval.py --data shapes:32 --image-size 16 --batch-size 16 --cached --knn 3 --weights {teacher_file}"
    run(f"{line} --epochs 5 --lr 1 0.1 --out {tmp_path}")
    groups = common.load_file(tmp_path / "checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.001])


def test_cached_batches_see_every_image_once_an_epoch():
    features, labels = torch.arange(21.0)[:, None], torch.arange(21)
    labels[6] = -1  # cannot be read
    loader = CachedBatches(features, labels, 5, 0)
    batches = [list(loader.batches(range(step, stop))) for step, stop in ((0, 4), (4, 8), (6, 8))]
    assert len(loader) == 4 and [len(epoch) for epoch in batches] == [4, 4, 2]
    for epoch in batches[:2]:
        assert sorted(torch.cat([y for _, y in epoch]).tolist()) == [*range(6), *range(7, 21)]
        assert all(torch.equal(x[:, 0].long(), y) for (x,), y in epoch)
    assert not torch.equal(batches[0][0][1], batches[1][0][1])
    assert torch.equal(batches[2][0][1], batches[1][2][1])  # step 6 is the third of the second epoch
    with pytest.raises(common.UserError, match="--batch-size 21 is larger than the 20 readable images"):
        CachedBatches(features, labels, 21, 0)


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
    # An entry belongs to the weights of its name, wherever it stands
    (tmp_path / "eval.json").write_text(json.dumps(dict(reversed(results.items()))))
    again = run_script(line)
    assert "img/s" not in again.stderr and sorted(again.stdout.split("\n")) == sorted(done.stdout.split("\n"))
    results.pop(str(teacher_file))  # the others' figures are not taken for it
    (tmp_path / "eval.json").write_text(json.dumps(results))
    assert "ahead of its eval.json" in run_script(line, check=False).stderr


def test_features_separate_what_they_should(tmp_path):
    """A probe on raw class colours reaches 100 %: the evaluation itself does not lose accuracy."""
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


@pytest.mark.parametrize("options", ["--cached", "", "--finetune"])
def test_classifiers_and_neighbours_learn_from_training_labels_alone(tmp_path, monkeypatch, options):
    """All are wrong where validation labels are swapped."""

    def load_dataset(data, data_root, split, device, image_size=32):
        labels = torch.arange(40) % 2
        images = torch.randint(80, (40, 3, 16, 16), dtype=torch.uint8)
        images[labels == (split == "train"), 0] += 150
        return common.ArrayDataset(images, labels, ["ant", "bee"], device)

    monkeypatch.setattr(common, "load_dataset", load_dataset)
    line = "linear_eval.py --data own --image-size 16 --batch-size 10 --weights random --arch resnet8 --knn 5 --lr 1"
    run(f"{line} --epochs 5 --out {tmp_path} {options}")
    (result,) = json.loads((tmp_path / "eval.json").read_text()).values()
    assert result["knn"]["5"] == result.get("linear", result.get("finetune"))["top1"] == 0


def test_released_teacher_on_jpeg_files(tmp_path, image_folder, released_file, capsys):
    """A released file, on a folder: crops and flips anew each epoch; stopped and resumed, the result is the same."""
    line = (
        f"linear_eval.py --data {image_folder} --image-size 40 --weights {released_file} --workers 1 "
        "--knn 3 --epochs 4 --batch-size 8 --lr 0.1 --out "
    )
    run(f"{line} {tmp_path}/whole")
    run(f"{line} {tmp_path}/parts --max-steps 3")
    run(f"{line} {tmp_path}/parts")
    assert "continuing from step 3" in capsys.readouterr().err
    first, second = (json.loads((tmp_path / f / "eval.json").read_text()) for f in ("whole", "parts"))
    assert first == second


SMALL = "linear_eval.py --data shapes:120 --image-size 16 --knn 5 10 --batch-size 24"


def table_of(folder):
    return json.loads((folder / "eval.json").read_text())


PROTOCOLS = {"cached": "--cached", "crops": "--lr 1 --label-fraction 0.5"}


def batches_from_shares():
    torch.manual_seed(0)
    labels = torch.arange(40)
    labels[[3, 39]] = -1
    return list(CachedBatches(*share_of(torch.randn(40, 3), labels), 6, 0).batches(range(6)))


def neighbours_of_equal_images():
    """Training images, queries, and the neighbours that `nearest_neighbours` finds, five queries at a time.

    All products of features are exact, most images occur several times, and two cannot be read.
    """
    rng = np.random.default_rng(0)
    vectors = torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 2, 0], [0, 0, 4], [0, 0, -2]])
    train, queries = vectors[rng.integers(5, size=41)], vectors[rng.integers(5, size=12)]
    labels = torch.arange(41) % 3
    labels[[0, 30]] = -1
    shares = share_of(train, labels), common.own_rows(queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "KNN_BLOCKS", (5, 4))
        found = [common.nearest_neighbours(*shares, k) for k in (7, 39, 41)]
    return train, labels, queries, found


def results_of_a_process(out, teacher_file):
    """What does not depend on the number of processes, and the folders with both protocols' results."""
    for name, switches in PROTOCOLS.items():
        with pytest.MonkeyPatch.context() as patch:
            line = f"{SMALL} --weights {teacher_file} --epochs 3 {switches} --out {out}/{common.world_size()}/{name}"
            patch.setattr(sys, "argv", line.split())
            linear_eval.main()
    return {"batches": batches_from_shares(), "neighbours": neighbours_of_equal_images()}


@pytest.fixture(scope="module")
def on_one_two_three(tmp_path_factory, teacher_file):
    """Results of one, two and three processes, a list each, and the folder of the evaluations."""
    out = tmp_path_factory.mktemp("on_one_two_three")
    alone = results_of_a_process(out, teacher_file)
    return [[alone], *(on_processes(n, results_of_a_process, out, out, teacher_file) for n in (2, 3))], out


def test_results_are_the_same_on_one_two_and_three_processes(on_one_two_three):
    """2000 validation images cannot be divided by three; each counts once."""
    for name in PROTOCOLS:
        alone, *others = (table_of(on_one_two_three[1] / str(processes) / name) for processes in (1, 2, 3))
        assert alone == others[0] == others[1]
        (result,) = alone.values()
        assert sum(map(sum, result["linear"]["confusion"])) == 2000
        right = sum(row[i] for i, row in enumerate(result["linear"]["confusion"]))
        assert result["linear"]["top1"] == right / 20
        assert len(result["linear"]["top1_by_lr"]) == (6 if name == "cached" else 1)


def test_cached_batches_are_the_same_on_any_number_of_processes(on_one_two_three):
    ([alone], *several), _ = on_one_two_three
    for result in [*several[0], *several[1]]:
        for ((x,), y), ((features,), labels) in zip(result["batches"], alone["batches"], strict=True):
            assert torch.equal(x, features) and torch.equal(y, labels)


def test_equal_neighbours_come_in_order_on_any_number_of_processes(on_one_two_three):
    ([alone], *several), _ = on_one_two_three
    train, labels, queries, found = alone["neighbours"]
    similarity = F.normalize(queries, dim=1) @ F.normalize(train, dim=1).T
    similarity[:, labels < 0] = -torch.inf
    expected = similarity.sort(dim=1, descending=True, stable=True)
    for i, (similar, numbers) in enumerate(found):
        k = min(numbers.shape[1], 39)
        assert torch.equal(numbers[:, :k], expected.indices[:, :k])
        torch.testing.assert_close(similar, expected.values[:, : similar.shape[1]], rtol=0, atol=1e-9)
        for results in several:
            parts = [result["neighbours"][3][i] for result in results]
            assert torch.equal(torch.cat([numbers[:, :k] for _, numbers in parts]), numbers[:, :k])
            assert torch.equal(torch.cat([similar for similar, _ in parts]), similar)


def test_the_network_learns_when_fine_tuned_and_goes_on(tmp_path, teacher_file):
    line = f"{SMALL} --arch resnet8 --finetune --epochs 2 --backbone-lr 0.1 --max-steps 10 --weights"
    run(f"{line} {teacher_file} random --out {tmp_path}/whole")
    for stop in (3, 10):
        run(f"{line} random --out {tmp_path}/parts --max-steps {stop}")
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

    # What is evaluated is the network that was trained
    encoder = common.Encoder(common.build_backbone("resnet8", 16), Probe(64, 10, 1))
    encoder.load_state_dict(tuned)
    val = common.load_dataset("shapes:120", None, "val", torch.device("cpu"), 16)
    features = common.extract_features(encoder, val, 16, 24, 0, torch.device("cpu"))
    assert evaluate(encoder.head.heads[0], *features)["confusion"] == whole["random"]["finetune"]["confusion"]


def evaluate_again(line, out):
    """Evaluate without and with features in the folder, then where rank 0 alone sees eval.json: extractions of each."""
    counts = []
    extract, exists = common.extract_features, Path.exists
    for seen in (False, False, True):
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*line.split(), "--out", str(out)])
            patch.setattr(common, "extract_features", lambda *a, calls=calls, **k: calls.append(a) or extract(*a, **k))
            if common.rank() > 0:
                patch.setattr(Path, "exists", lambda path: exists(path) and path.name != "eval.json")
            if common.rank() == 0 and not seen:
                (out / "eval.json").unlink(missing_ok=True)
            linear_eval.main()
        counts.append(len(calls))
    return counts


def test_cached_features_are_used_again_and_rank_0_decides_what_is_done(tmp_path, teacher_file):
    """Features that another number of processes has written are not used."""
    line = f"{SMALL} --weights {teacher_file} --cached --epochs 2 --lr 1"
    assert evaluate_again(line, tmp_path / "one") == [2, 0, 0]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert on_processes(2, evaluate_again, tmp_path, line, tmp_path / "two") == [[2, 0, 0], [2, 0, 0]]
    assert table_of(tmp_path / "one") == table_of(tmp_path / "two")


def test_labels_by_list_and_by_fraction(tmp_path, image_folder, teacher_file):
    names = tmp_path / "names.txt"
    names.write_text("ant/0.jpg\nbee/1.JPEG\nant/3.jpg\nbee/7.jpg\n")
    line = f"linear_eval.py --data {image_folder} --image-size 16 --weights {teacher_file} --workers 0 --batch-size 4 "
    run(f"{line} --knn 2 --epochs 1 --lr 1 --label-list {names} --out {tmp_path}/list")
    run(f"{line} --knn 2 --epochs 1 --lr 1 --label-fraction 0.25 --out {tmp_path}/part")
    for folder in ("list", "part"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["inputs"]["data"].startswith("4 images")
    listed = linear_eval.subset_from_list(common.FolderDataset(image_folder / "train"), names)
    assert [listed.path(i)[-9:] for i in range(len(listed))] == ["ant/0.jpg", "ant/3.jpg", "ee/1.JPEG", "bee/7.jpg"]
    assert listed.labels.tolist() == [0, 0, 1, 1]
    shutil.copytree(image_folder / "train" / "ant", tmp_path / "train" / "ant")
    (tmp_path / "train" / "ant" / "0.jpg").rename(tmp_path / "train" / "ant" / "a name.jpg")
    names.write_text("a name.jpg\n\n7.jpg\n")
    assert len(linear_eval.subset_from_list(common.FolderDataset(tmp_path / "train"), names)) == 2
    with pytest.raises(common.UserError, match=r"names 7.jpg, and 2 training images have this name"):
        names.write_text("7.jpg\n")
        linear_eval.subset_from_list(common.FolderDataset(image_folder / "train"), names)


def test_picture_of_neighbours(tmp_path):
    """Two colours as classes, features the colour itself: each row's neighbours are of its colour, and framed so."""
    colors = torch.tensor([[200, 0, 0], [0, 200, 0]], dtype=torch.uint8)
    labels = torch.arange(24) % 2
    train = common.ArrayDataset(colors[labels][:, :, None, None].repeat(1, 1, 8, 8), labels, "ab", torch.device("cpu"))
    val = common.subset(train, np.arange(6))
    features = [(colors[dataset.labels].float(), dataset.labels.clone()) for dataset in (train, val)]
    features[0][1][0] = 1  # the wrong class
    path = tmp_path / "neighbors.png"
    linear_eval.draw_neighbours(path, (train, val), features, 8, queries=2, neighbours=12)
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
    """A checkpoint has it; a released file of 224 pixels is evaluated at 224, whatever the data set."""

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
        "random --arch resnet18": 32,
        f"{teacher_file} --image-size 20": 20,
    }
    for weights, size in cases.items():
        monkeypatch.setattr(sys, "argv", f"linear_eval.py --data shapes --weights {weights}".split())
        with pytest.raises(common.UserError) as error:
            linear_eval.main()
        assert str(error.value) == str(size)


def test_a_fine_tuned_network_keeps_its_normalisation(tmp_path):
    """Its checkpoint is a teacher, whose images are normalised as those that it was trained on."""
    torch.save({"state_dict": common.build_backbone("resnet8", 16).state_dict(), "mean_std": [[0.5] * 3] * 2},
               tmp_path / "weights.pth")  # fmt: skip
    line = "linear_eval.py --data shapes:64 --image-size 16 --batch-size 16 --knn 3 --finetune --max-steps 1"
    run(f"{line} --weights {tmp_path}/weights.pth --out {tmp_path}/run")
    assert common.load_teacher(tmp_path / "run" / "checkpoint.pth").mean_std == ((0.5,) * 3,) * 2
