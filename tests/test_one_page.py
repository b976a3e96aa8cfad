"""docs/one-page.md: its program runs, and its losses are those of disco.py."""

import copy
import re

import pytest
import torch
from conftest import ROOT

import disco

SMALL = {"queue_size": 24, "batch_size": 8, "epochs": 2, "images": 32}


@pytest.fixture(autouse=True)
def double_precision():
    """Rounding then does not grow to a difference within a few steps."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def program():
    """The page's program with the settings of SMALL: the part before the training loop, and the loop."""
    page = (ROOT / "docs" / "one-page.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    line = next(line for line in code.splitlines() if " queue_size," in line)
    names, values = (part.split(", ") for part in line.partition("  #")[0].split(" = "))
    values = [str(SMALL.get(name, value)) for name, value in zip(names, values, strict=True)]
    code = code.replace(line, f"{', '.join(names)} = {', '.join(values)}")
    code = code.replace("torch.rand(512, ", f"torch.rand({SMALL['images']}, ")
    start = code.index("history = []")
    return code[:start], code[start:]


def test_losses_are_those_of_disco(program, capsys):
    torch.manual_seed(0)
    setup, loop = program
    page = {}
    exec(setup, page)
    student, teacher = copy.deepcopy(page["student"]), copy.deepcopy(page["teacher"])
    model = disco.DisCo(student, teacher, page["dim"], page["queue_size"], page["momentum"], page["temperature"],
                        page["w"])  # fmt: skip
    model.queue.copy_(page["queue"])
    optimizer = torch.optim.SGD(student.parameters(), page["base_lr"], momentum=0.9, weight_decay=1e-4)
    view, views = page["view"], []
    page["view"] = lambda batch: views.append(view(batch)) or views[-1]
    exec(loop, page)

    assert len(page["history"]) == len(views) / 2 == 8  # the queue, of 3 batches, is replaced twice
    pairs = zip(views[::2], views[1::2], strict=True)
    for step, ((view1, view2), expected) in enumerate(zip(pairs, page["history"], strict=True)):
        optimizer.param_groups[0]["lr"] = disco.cosine_lr(page["base_lr"], step // 4, page["epochs"])
        losses, keys = model(view1, view2)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        model.enqueue(keys)
        assert (losses["contrastive"].item(), losses["distill"].item()) == pytest.approx(expected, rel=1e-6), step
    assert capsys.readouterr().out.startswith("epoch 0: InfoNCE ")


def test_each_loss_is_disco_s(program):
    """With the page's own expressions, on random embeddings."""
    names = {"torch": torch, "F": torch.nn.functional, "temperature": 0.2}
    for name, rows in (("student1", 8), ("student2", 8), ("teacher1", 8), ("teacher2", 8), ("key", 8), ("queue", 24)):
        names[name] = torch.nn.functional.normalize(torch.randn(rows, 16))
    lines = [line.strip() for line in program[1].splitlines()]
    exec("\n".join(line for line in lines if line.startswith(("logits =", "contrastive =", "distill ="))), names)
    expected = disco.info_nce(names["student1"], names["key"], names["queue"], 0.2)
    torch.testing.assert_close(names["contrastive"], expected)
    expected = sum(disco.distill_loss(names[f"student{i}"], names[f"teacher{i}"]) for i in (1, 2))
    torch.testing.assert_close(names["distill"], expected)


def test_needs_torch_and_torchvision_alone(program):
    modules = re.findall(r"^(?:import|from) (\w+)", program[0], flags=re.MULTILINE)
    assert set(modules) == {"copy", "math", "torch", "torchvision"}
