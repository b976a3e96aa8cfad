"""Features of a frozen network and their nearest neighbours."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import on_processes

import common

CPU = torch.device("cpu")


def test_weighted_votes_do_not_overflow_at_low_temperatures():
    """exp(1 / 0.01) is no float32; 29 of 30 neighbours are of the right class."""
    train = torch.ones(30, 4), torch.tensor([1] + [0] * 29)
    query = torch.ones(1, 4), torch.tensor([0])
    for temperature in (1e-6, 0.002, 0.01, 0.07, 1e6):
        assert common.knn_accuracy(train, query, [30], 2, temperature)["knn_weighted"] == {30: 100}


def test_neighbours_are_searched_in_blocks_of_training_images(monkeypatch):
    """A matrix product can copy its factors: no product sees more than a block."""
    monkeypatch.setattr(common, "KNN_BLOCKS", (4, 6))
    normalize = F.normalize
    monkeypatch.setattr(F, "normalize", lambda x, dim: Product(normalize(x, dim=dim)))
    train = torch.randn(20, 3), torch.zeros(20, dtype=torch.long)
    similarity, numbers = common.nearest_neighbours(train, torch.randn(9, 3), 5)
    assert similarity.shape == numbers.shape == (9, 5) and set(Product.rows) == {6, 2}


class Product:
    """Unit rows that note how many columns they are multiplied with."""

    rows = ()

    def __init__(self, x):
        self.x = x

    def __matmul__(self, columns):
        Product.rows += (columns.shape[1],)
        return self.x @ columns


@pytest.mark.parametrize("processes, share", [(1, 16), (8, 2)])
def test_evaluation_takes_the_batch_of_one_process_from_each(processes, share, monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: processes)
    monkeypatch.setattr(common.dist, "broadcast", lambda *_: None)
    monkeypatch.setattr(common, "gather", lambda x: x)
    encoder, sizes = common.Encoder(common.build_backbone("resnet8", 16), torch.nn.Identity()), []
    encoder.features = lambda images: sizes.append(len(images)) or torch.zeros(len(images), 64)
    common.extract_features(encoder, common.load_dataset("shapes:160", None, "train", CPU, 16), 16, 16, 0, CPU)
    assert set(sizes) == {share} and sum(sizes) == 160 / processes


@pytest.mark.parametrize(("name", "temperature"), [("knn", None), ("knn_weighted", 0.07)])
def test_knn_counts_votes_as_written_out(name, temperature, monkeypatch):
    torch.manual_seed(0)
    train, train_labels = torch.randn(50, 4), torch.randint(5, (50,))
    query, labels = torch.randn(30, 4), torch.randint(5, (30,))
    train_labels[3], labels[4] = -1, -1  # cannot be read
    right = dict.fromkeys((1, 7, 50), 0)
    for x, label in zip(query, labels, strict=True):
        similarity = torch.cosine_similarity(train, x[None])
        similarity[3] = -torch.inf
        for k in right:
            votes = [0.0] * 5
            for j in similarity.argsort(descending=True)[: min(k, 49)].tolist():
                votes[train_labels[j]] += 1 if temperature is None else np.exp(similarity[j].item() / temperature)
            right[k] += votes.index(max(votes)) == label.item()
    for blocks in (common.KNN_BLOCKS, (7, 50), (7, 3), (1, 1)):
        monkeypatch.setattr(common, "KNN_BLOCKS", blocks)
        ours = common.knn_accuracy((train, train_labels), (query, labels), [1, 7, 50], 5, 0.07)[name]
        assert ours == pytest.approx({k: 100 * n / 29 for k, n in right.items()})


def features_of_own_weights(rank_has_others):
    """Features by a network that every process has made itself, as from files of its own."""
    torch.manual_seed(common.rank() if rank_has_others else 0)
    encoder = common.Encoder(common.build_backbone("resnet8", 16), nn.Identity())
    dataset = common.ArrayDataset(*common.draw_shapes(20, 16, 0), range(10), CPU)
    return common.gather(common.extract_features(encoder, dataset, 16, 10, 0, CPU)[0])


def test_all_processes_use_the_weights_of_one(tmp_path):
    """On a machine that does not share the folder, the file of that name may be another."""
    same, other = (on_processes(2, features_of_own_weights, tmp_path, others)[0] for others in (False, True))
    assert torch.equal(same, other)


def test_features_that_are_not_finite_are_refused():
    """All their neighbours would be the first images, and the accuracy that of chance."""
    encoder = common.Encoder(common.build_backbone("resnet8", 16), nn.Identity())
    encoder.backbone.conv1.weight.data.fill_(torch.inf)
    dataset = common.ArrayDataset(*common.draw_shapes(20, 16, 0), range(10), CPU)
    with pytest.raises(common.UserError, match="features are not finite"):
        common.extract_features(encoder, dataset, 16, 10, 0, CPU)
