"""docs/methods.md: the functions it links to exist, its exercises are complete, its pictures are drawn."""

import importlib
import re

import figures
import pytest
import torchvision
from conftest import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text()
METHODS, EXERCISES = PAGE.split("\n## Exercises\n")


@pytest.mark.parametrize("method", ["MoCo v2", "DisCo", "SEED", "SSKD"])
def test_every_detail_names_its_function(method):
    section = re.search(rf"^## {method}\n(.*?)(?=^## |\Z)", METHODS, flags=re.DOTALL | re.MULTILINE)[1]
    details = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
    assert details and [int(number) for number in re.findall(r"^(\d+)\. ", section, flags=re.MULTILINE)] == list(
        range(1, len(details) + 1)
    )
    for detail in details:
        links = re.findall(r"\[`([\w.]+)`\]\(\.\./(\w+)\.py\)", detail)
        assert links, detail
        for name, script in links:
            found = importlib.import_module(script)
            for part in name.split("."):
                assert part in vars(found), f"{script}.py has no {name}"
                found = getattr(found, part)


def test_five_exercises_with_measured_solutions():
    exercises = re.split(r"^### \d\. ", EXERCISES, flags=re.MULTILINE)[1:]
    assert len(exercises) == 5
    for exercise in exercises:
        task, solution = exercise.split("<details>\n<summary>Solution</summary>\n")
        assert "?" in task and "<!-- table: exercise_" in solution and solution.rstrip().endswith("</details>")


def test_methods_are_drawn(tmp_path):
    figures.draw_methods().savefig(tmp_path / "methods.png", dpi=100)
    picture = torchvision.io.read_image(str(tmp_path / "methods.png"), torchvision.io.ImageReadMode.RGB)
    assert picture.shape[2] == 940
    colors = {tuple(color) for color in picture.flatten(1).T.unique(dim=0).tolist()}
    assert {(0, 114, 178), (191, 224, 245), (217, 217, 217)} <= colors  # trained, moving average, frozen
    texts = [text.get_text() for axes in figures.draw_methods().axes for text in axes.texts]
    assert {"MoCo v2", "DisCo", "SEED", "SSKD", "mean\nstudent", "queue of\nkeys"} <= set(texts)


def test_curves_are_those_of_the_four_methods():
    assert figures.SSKD_CURVES.keys() <= figures.load("exercises")["curves"].keys()
    assert figures.CURVES.keys() <= figures.load("quickstart")["curves"].keys()
