"""README and docs: Python blocks run, command lines parse, links lead somewhere, figures are those of docs/results."""

import argparse
import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import figures
import pytest
import torch
from conftest import ROOT
from torch.distributed.run import get_args_parser

import common

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [*ROOT.glob("*.py"), *(ROOT / "tests" / "tools").glob("*.py"), ROOT / "docs" / "figures.py"]
FLAGS = {flag for file in PROGRAMS for flag in re.findall(r'"(--[\w-]+)"', file.read_text())}
# Programs print their command line, at once because two may run beside each other, so that nothing runs.
SHELL = r"""
for program in python python3 pip torchrun srun wget curl; do
    eval "$program() { printf -v line '%q ' $program \"\$@\"; echo \"\$line\"; }"
done
PATH=/nowhere
set -eu
"""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    """The page's blocks of code in a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def prose(page):
    """The page's text without blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def command_lines(page):
    """Lists of words: every command line of the page's shell blocks, with variables and loops expanded by bash."""
    script = SHELL + "\n".join(blocks(page, "sh")).replace(". .venv/bin/activate", "true").replace(".venv/bin/", "")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={})
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def arguments(page, monkeypatch):
    """The words and the parsed arguments of each of the page's command lines that runs a script."""
    whole_names = functools.partialmethod(argparse.ArgumentParser.__init__, allow_abbrev=False)
    monkeypatch.setattr(argparse.ArgumentParser, "__init__", whole_names)
    for words in command_lines(page):
        if words[0] == "srun":
            words = words[1:]
        if words[0] == "torchrun":
            launch = get_args_parser().parse_args(words[1:])
            words = ["python", launch.training_script, *launch.training_script_args]
        if words[0] == "python" and words[1] != "-m":
            monkeypatch.setattr(sys, "argv", words[1:])
            yield words, vars(importlib.import_module(Path(words[1]).stem).parse_args())


@each_page
def test_command_lines_parse(page, monkeypatch):
    for words, args in arguments(page, monkeypatch):
        networks = {args.get(name) for name in ("arch", "student", "teacher_arch", "train_teacher")}
        assert networks - {None} <= set(common.NETWORK_NAMES), words


def test_quick_start_is_that_of_its_table(monkeypatch):
    rows = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())["rows"]
    commands = [args for _, args in arguments(PAGES[0], monkeypatch) if args["data"] == "shapes:3000"]
    runs = {Path(args["out"]).name: args for args in commands}
    for name in figures.CURVES:
        for column, argument in (("epochs", "epochs"), ("training lr", "lr")):
            assert set(rows[name][column]) == {runs[name][argument]}, (name, argument)


@each_page
def test_flags_and_names_in_the_text_exist(page):
    flags = {flag for code in re.findall(r"`([^`]+)`", prose(page)) for flag in re.findall(r"(?<!\S)--[\w-]+", code)}
    assert not flags - FLAGS - set(re.findall(r"--[\w-]+", get_args_parser().format_help()))
    assert not set(re.findall(r"`common\.(?!py`)(\w+)", prose(page))) - vars(common).keys()


@each_page
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", prose(page)):
        file = page.parent / target if target else page
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)$", prose(file), flags=re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, anchor
    assert page is PAGES[0] or f"](docs/{page.name}" in PAGES[0].read_text(), "README does not link to the page"


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python") and page.stem != "one-page"]  # it has its own test


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """With the files that a reader has after the runs which the pages show."""
    monkeypatch.chdir(tmp_path)
    teacher = common.Encoder(common.build_backbone("resnet18"), common.mlp_head(512, 512, 128))
    weights = {
        "disco/backbone": common.build_backbone("efficientnet_b0").state_dict(),
        "resnet18/backbone": teacher.backbone.state_dict(),
        "teacher/checkpoint": {f"encoder.{key}": value for key, value in teacher.state_dict().items()},
    }
    for name, state in weights.items():
        file = tmp_path / "runs" / f"{name}.pth"
        file.parent.mkdir(parents=True)
        torch.save(state, file)
    torch.save({"teacher": {}}, "checkpoint.pth")
    names = {"MyNetwork": lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 16, 16), torch.nn.Flatten())}
    for block in blocks(page, "python"):
        exec(block, names)
    if page.stem == "README":
        assert names["keys"].missing_keys == ["classifier.1.weight", "classifier.1.bias"]
        assert not names["keys"].unexpected_keys
        names["detector"].eval()([torch.rand(3, 64, 64)])
    if page.stem == "recipes":
        assert names["logits"].shape == (5, 10)


def test_numbers_of_parameters():
    counts = r"EfficientNet-B0 of ([\d,]+) .*?ResNet-50 of ([\d,]+) or a ResNet-101 of ([\d,]+),"
    counts = re.search(counts, PAGES[0].read_text().replace("\n", " ")).groups()
    for arch, count in zip(("efficientnet_b0", "resnet50", "resnet101"), counts, strict=True):
        with torch.device("meta"):
            parameters = sum(p.numel() for p in common.build_backbone(arch).parameters())
        assert f"{parameters:,}" == count


@each_page
def test_tables_are_those_of_the_results(page):
    assert page.read_text() == figures.fill(page.read_text()), "run python docs/figures.py tables --write"


def test_every_result_is_in_a_table():
    for path in (ROOT / "docs" / "results").glob("*.json"):
        names = [name for name, (experiment, *_) in figures.TABLES.items() if experiment == path.stem]
        shown = {row for name in names for row in figures.TABLES[name][2]}
        assert not json.loads(path.read_text())["rows"].keys() - shown, f"{path.name}: add a row to docs/figures.py"
        for name in names:
            assert any(f"<!-- table: {name} from" in page.read_text() for page in PAGES), f"no page shows {name}"


@pytest.mark.parametrize("picture", figures.PICTURES)
def test_pictures_are_those_of_the_results(picture):
    sources = [ROOT / "docs" / "results" / name for name in figures.PICTURES[picture]]
    path = ROOT / "docs" / picture
    digest = figures.digest(sources).encode() if all(source.exists() for source in sources) else b"no picture"
    assert digest in (path.read_bytes() if path.exists() else b"no picture"), "run python docs/figures.py"
