"""MoCo v2 is the authors' MoCo v2, on one process and on several, and runs from end to end."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from moco_v2 import MoCo, cosine_lr, info_nce


def golden_model(vectors, momentum=None):
    model = MoCo(
        golden_encoder(vectors, "init"),
        dim=int(vectors["meta_dim"]),
        queue_size=int(vectors["meta_queue_size"]),
        momentum=float(vectors["meta_momentum"]),
        temperature=float(vectors["meta_temperature"]),
    )
    model.queue.copy_(torch.from_numpy(vectors["init_queue"]))
    return model


def test_info_nce_is_the_cross_entropy_of_the_paper():
    query, key = (F.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    queue = F.normalize(torch.randn(32, 8), dim=1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(info_nce(query, key, queue, 0.2), expected)


def test_golden_trajectory():
    vectors = dict(np.load(GOLDEN / "moco_v2.npz"))
    model = golden_model(vectors)
    losses = [step["loss"] for step in golden_training(model, model.encoder, vectors, 10)]
    np.testing.assert_allclose(losses, vectors["loss"], rtol=2e-4)
    assert_close_state(model.encoder, vectors, "final")
    assert_close_state(model.momentum_encoder, vectors, "final_key")
    np.testing.assert_allclose(model.queue, vectors["final_queue"], atol=2e-4)
    assert model.queue_ptr == vectors["final_queue_ptr"]


def test_gradients_reach_the_encoder_alone():
    vectors = dict(np.load(GOLDEN / "moco_v2.npz"))
    model = golden_model(vectors)
    losses, keys = model(*torch.from_numpy(vectors["images"][0]))
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.momentum_encoder.parameters())
    assert not keys.requires_grad


def test_queue_wraps_round_where_the_batch_does_not_divide_it():
    model = MoCo(golden_encoder(dict(np.load(GOLDEN / "moco_v2.npz")), "init"), dim=8, queue_size=10)
    before = model.queue.clone()
    model.enqueue(torch.full((7, 8), 1.0))
    model.enqueue(torch.full((7, 8), 2.0))
    assert model.queue[:, 0].tolist() == [2, 2, 2, 2, 1, 1, 1, 2, 2, 2] and model.queue_ptr == 4
    assert (before != model.queue).all()


def test_cosine_schedule():
    assert [round(cosine_lr(0.03, epoch, 4), 5) for epoch in range(5)] == [0.03, 0.02561, 0.015, 0.00439, 0.0]


def share_of_training(training):
    """Three golden steps on this process's share of each batch; what every process ends with."""
    torch.manual_seed(0)
    vectors = dict(np.load(GOLDEN / "moco_v2.npz"))
    model = golden_model(vectors).train(training)
    return golden_training(model, model.encoder, vectors, 3), model.state_dict()


def test_two_processes(tmp_path):
    assert_processes_agree(share_of_training, tmp_path)


def images_for_the_keys():
    """What the key encoder sees of the golden batch's second views on this process."""
    vectors = dict(np.load(GOLDEN / "moco_v2.npz"))
    model, seen = golden_model(vectors), []
    model.momentum_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(*(common.own_rows(torch.from_numpy(view)) for view in vectors["images"][0]))
    return seen


def test_batchnorm_of_the_keys_is_shuffled(tmp_path):
    """Each process's batch statistics are those of images from all processes."""
    views = torch.from_numpy(np.load(GOLDEN / "moco_v2.npz")["images"][0])
    for rank, seen in enumerate(on_processes(2, images_for_the_keys, tmp_path)):
        assert len(seen) == 1 and torch.equal(seen[0], views[1][rank::2])


def test_script_from_end_to_end(tmp_path):
    """A short run writes its folder; stopped inside an epoch and started again, it ends with the same bits."""
    line = (
        "moco_v2.py --data shapes:100 --arch resnet8 --image-size 16 --batch-size 32 --queue-size 50 --epochs 2 "
        "--knn-every 2 --out "
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run_script(f"{line} {whole}")
    assert "backbone.pth" in done.stdout and "img/s" in done.stderr and "loss=" in done.stderr
    for stop in (1, 4, 6):
        run_script(f"{line} {parts} --max-steps {stop}")
    names = {
        "config.json",
        "log.jsonl",
        "views.png",
        "checkpoint.pth",
        "backbone.pth",
        ".lock",
    }
    assert {path.name for path in whole.iterdir()} == {path.name for path in parts.iterdir()} == names

    first, second = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (whole, parts))
    assert first["step"] == second["step"] == 6
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for one, other in zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])

    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], "knn" in line) for line in log] == [(0, True), (3, False), (6, False), (6, True)]
    assert 0 <= log[-1]["knn"] <= 100 and all(line["loss"] > 0 and line["images_per_second"] > 0 for line in log[1:3])
    assert log[2]["lr"] == pytest.approx(0.015)
    assert json.loads((whole / "config.json").read_text())["arguments"]["queue_size"] == 50

    again = run_script(f"{line} {whole}")
    assert "continuing from step 6" in again.stderr and len((whole / "log.jsonl").read_text().splitlines()) == 4
    backbone = common.build_backbone("resnet8", 16)
    backbone.load_state_dict(torch.load(whole / "backbone.pth", weights_only=True))
