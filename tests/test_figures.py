"""docs/figures.py: results are collected from runs, tables and shares are right, pictures are drawn."""

import json
import shutil

import figures
import pytest
import torch
import torchvision

VERSIONS = {"torch": "2.14.1"}
# Each network's accuracies by 20-NN, for seeds 0 and 1; the linear probe is better by 1, 10-NN worse by 1
KNN = {"teacher": (90, 80), "disco": (70, 50), "seed": (50.126, 65), "moco_v2": (10, 20), "pixels": (40, 40)}


@pytest.fixture(autouse=True)
def docs(tmp_path, monkeypatch):
    """An empty folder in the place of docs/."""
    folder = tmp_path / "docs"
    folder.mkdir()
    monkeypatch.setattr(figures, "DOCS", folder)
    return folder


def write_run(folder, script, lines, finished=True, **arguments):
    folder.mkdir(parents=True)
    config = {"script": script, "arguments": {"epochs": 8, "lr": 0.003, **arguments}, "versions": VERSIONS}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "backbone.pth").touch()


def write_seed(folder, seed):
    """Runs of four networks, and their evaluation, with pictures of gray level 10 * NUMBER."""
    names = {"teacher": "moco_v2", "disco": "disco", "seed": "seed", "moco_v2": "moco_v2"}
    for name, script in names.items():
        lines = [{"step": 0, "epoch": 0, "knn": 15.004}, {"step": 50, "epoch": 0, "loss": 3.0},
                 {"step": 1000, "epoch": 8, "knn": KNN[name][seed]}]  # fmt: skip
        write_run(folder / name, script, lines)
    weights = {name: str(folder / name / "backbone.pth") for name in names} | {"pixels": "runs/pixels.pt2"}
    write_run(folder / "eval", "linear_eval", [], finished=False, weights=list(weights.values()))
    results = {}
    for number, (name, file) in enumerate(weights.items(), start=1):
        knn = KNN[name][seed]
        linear = {"lr": 0.3, "top1": knn + 1, "top1_by_lr": {"1": 2, "0.3": knn + 1, "0.1": 3}}
        results[file] = {"parameters": 77392, "knn": {"10": knn - 1, "20": knn, "200": 5}, "linear": linear}
        picture = torch.full((3, 8 * 74 + 2, 11 * 74 + 2), 10 * number, dtype=torch.uint8)
        torchvision.io.write_png(picture, str(folder / "eval" / f"neighbors{number if number > 1 else ''}.png"))
    (folder / "eval" / "eval.json").write_text(json.dumps(results))


@pytest.fixture
def results(tmp_path, docs):
    """Content of quickstart.json, collected from two seeds."""
    for seed in range(2):
        write_seed(tmp_path / "quickstart" / str(seed), seed)
    figures.collect(tmp_path / "quickstart")
    return json.loads((docs / "results" / "quickstart.json").read_text())


def test_collect(results, docs):
    assert results["seeds"] == [0, 1] and results["torch"] == ["2.14.1"]
    assert results["rows"].keys() == KNN.keys()
    expected = {"epochs": [8, 8], "training lr": [0.003] * 2, "10-NN": [49.13, 64], "20-NN": [50.13, 65]}
    assert results["rows"]["seed"] == expected | {"linear": [51.13, 66], "at lr": [0.3] * 2, "parameters": [77392] * 2}
    assert results["curves"]["disco"] == {"0": [15.0, 15.0], "8": [70, 50]}
    assert '\n      "20-NN": [90, 80],\n' in (docs / "results" / "quickstart.json").read_text()
    for name, gray in (("disco", 20), ("moco_v2", 40)):  # the second and fourth of --weights
        picture = torchvision.io.read_image(str(docs / "results" / f"neighbors_{name}.png"))
        assert picture.shape == (3, 5 * 74 + 2, 9 * 74 + 2) and (picture == gray).all()


def test_collect_leaves_out_unfinished_seeds(results, tmp_path, docs, capsys):
    folder = tmp_path / "quickstart"
    for seed, problem in enumerate(("no evaluation", "half of it", "a run that goes on", "none"), start=2):
        write_seed(folder / str(seed), 0)
        evaluation = folder / str(seed) / "eval"
        if problem == "no evaluation":
            (evaluation / "config.json").unlink()
        elif problem == "half of it":
            found = json.loads((evaluation / "eval.json").read_text())
            found.popitem()
            (evaluation / "eval.json").write_text(json.dumps(found))
        elif problem == "a run that goes on":
            (folder / str(seed) / "disco" / "backbone.pth").unlink()
    capsys.readouterr()
    figures.collect(folder)
    assert json.loads((docs / "results" / "quickstart.json").read_text())["seeds"] == [0, 1, 5]
    messages = capsys.readouterr().out.splitlines()
    reasons = "it has no eval", "eval.json lacks runs/pixels.pt2", "disco has no backbone.pth yet"
    assert messages == [f"{folder / str(seed)} is left out: {reason}" for seed, reason in enumerate(reasons, start=2)]


def test_collect_names_a_best_rate_at_the_edge(tmp_path, capsys):
    write_seed(tmp_path / "other" / "0", 0)
    path = tmp_path / "other" / "0" / "eval" / "eval.json"
    path.write_text(path.read_text().replace('"0.1": 3', '"0.5": 3'))
    figures.collect(tmp_path / "other")
    assert "the best learning rate of disco, 0.3, is at the edge of those probed" in capsys.readouterr().out


def test_a_second_evaluation_has_columns_of_its_own(tmp_path, docs, monkeypatch):
    write_seed(tmp_path / "other" / "0", 0)
    shutil.copytree(tmp_path / "other" / "0" / "eval", tmp_path / "other" / "0" / "eval_1percent")
    path = tmp_path / "other" / "0" / "eval_1percent" / "eval.json"
    path.write_text(path.read_text().replace('"20": 90', '"20": 30').replace('"20": 70', '"20": 25'))
    figures.collect(tmp_path / "other")
    row = json.loads((docs / "results" / "other.json").read_text())["rows"]["teacher"]
    assert row["20-NN"] == [90] and row["20-NN 1percent"] == [30] and row["linear"] == row["linear 1percent"] == [91]
    columns = ["20-NN", "20-NN 1percent", "gap 20-NN 1percent"]  # the network alone is at 10
    monkeypatch.setitem(figures.TABLES, "example", ("other", columns, {"disco": "DisCo"}))
    header, _, disco = figures.table_text("example").splitlines()
    assert header == "| network | 20-NN | 20-NN, 1 % | gap closed, 20-NN, 1 % |"
    assert disco == "| DisCo | 70.0 | 25.0 | 75.0 |"


def test_sskd_without_evaluation(tmp_path, docs):
    lines = [{"step": 0, "epoch": 0, "teacher_top1": 90.0}, {"step": 0, "epoch": 0, "top1": 10.0}]
    for seed in range(3):
        for number, name in enumerate(("ce", "kd") if seed < 2 else ("ce",)):
            last = {"step": 9, "epoch": 1, "top1": 80 + seed + 10 * number}
            write_run(tmp_path / "sskd" / str(seed) / name, "sskd", [*lines, last])
    figures.collect(tmp_path / "sskd")
    rows = json.loads((docs / "results" / "sskd.json").read_text())["rows"]
    assert rows["ce"]["top1"] == [80, 81, 82] and rows["kd"]["top1"] == [90, 91, None]
    assert rows["kd"]["teacher_top1"] == [90, 90, None]


def test_table_and_share_of_the_gap(results, monkeypatch):
    rows = {"teacher": "teacher", "disco": "DisCo", "seed": "SEED"}
    monkeypatch.setitem(figures.TABLES, "example", ("quickstart", ["parameters", "at lr", "20-NN", "gap linear"], rows))
    assert figures.table_text("example") == (
        "| network | parameters | best rate | 20-NN | gap closed, linear |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| teacher | 77,392 | 0.3 | 85.0 (80.0 to 90.0) |  |\n"
        "| DisCo | 77,392 | 0.3 | 60.0 (50.0 to 70.0) | 62.5 (50.0 to 75.0) |\n"
        "| SEED | 77,392 | 0.3 | 57.6 (50.1 to 65.0) | 62.6 (50.2 to 75.0) |\n"
    )
    monkeypatch.setitem(figures.VALUES, "example", (min, "example", ["disco", "seed"], ["gap linear"]))
    monkeypatch.setitem(figures.VALUES, "most", (max, "example", ["seed"], ["20-NN"]))
    text = "At least <!-- value: example -->99 % and\nat most <!-- value: most -->? %, not 7.\n"
    assert figures.fill(text) == text.replace("99", "50").replace("?", "65")
    assert figures.fill("<!-- value: example -->50.1.\n") == "<!-- value: example -->50.\n"


def test_difference_to_another_network_of_the_same_seed(results, monkeypatch):
    columns = ["20-NN", "20-NN minus disco"]
    rows = {"disco": "DisCo", "seed": "SEED"}
    monkeypatch.setitem(figures.TABLES, "example", ("quickstart", columns, rows))
    header, _, *lines = figures.table_text("example").splitlines()
    assert header == "| network | 20-NN | 20-NN, difference |"
    assert lines == [
        "| DisCo | 60.0 (50.0 to 70.0) |  |",
        "| SEED | 57.6 (50.1 to 65.0) | -2.4 (-19.9 to +15.0) |",
    ]


def test_a_seed_without_a_value_is_left_out_and_said(results, docs, monkeypatch):
    results["rows"]["disco"]["linear"][0] = None
    (docs / "results" / "quickstart.json").write_text(json.dumps(results))
    assert figures.cell_values(results, "disco", "linear") == [51]
    assert figures.cell_values(results, "disco", "gap linear") == [50]
    monkeypatch.setitem(figures.TABLES, "example", ("quickstart", ["parameters", "linear"], {"disco": "DisCo"}))
    assert "| DisCo (1 of 2 seeds) | 77,392 | 51.0 |" in figures.table_text("example")


def test_pages_are_written(results, docs, tmp_path, monkeypatch):
    monkeypatch.setitem(figures.TABLES, "example", ("quickstart", ["20-NN"], {"disco": "DisCo"}))
    monkeypatch.setitem(figures.TABLES, "later", ("other", ["20-NN"], {"disco": "DisCo"}))
    table = "| network | 20-NN |\n| --- | --- |\n| DisCo | 60.0 (50.0 to 70.0) |\n"
    (tmp_path / "README.md").write_text("One.\n\n<!-- table: example -->\n| old |\n| --- |\n\nTwo.\n")
    (docs / "results.md").write_text("<!-- table: later -->\n\nThree.\n<!-- table: example from a.json 1 -->\n")
    monkeypatch.setattr("sys.argv", ["figures.py", "tables", "--write"])
    for _ in range(2):
        figures.main()
        marker = f"<!-- table: example from quickstart.json {figures.digest([docs / 'results/quickstart.json'])} -->"
        assert (tmp_path / "README.md").read_text() == f"One.\n\n{marker}\n{table}\nTwo.\n"
        expected = f"<!-- table: later -->\nNo results yet.\n\nThree.\n{marker}\n{table}"
        assert (docs / "results.md").read_text() == expected


def test_pictures_are_drawn(results, docs, monkeypatch):
    curves = {name: {"5": [10, 20], "6": [50, 60]} for name in figures.SSKD_CURVES}
    (docs / "results" / "exercises.json").write_text(json.dumps({"curves": curves}))
    monkeypatch.setattr("sys.argv", ["figures.py"])
    figures.main()
    for name, sources in figures.PICTURES.items():
        path = docs / name
        picture = torchvision.io.read_image(str(path), torchvision.io.ImageReadMode.RGB)
        assert picture.shape[2] >= 1000 and len(picture.flatten(1).unique(dim=1)) > 1
        assert figures.digest([docs / "results" / file for file in sources]).encode() in path.read_bytes()
