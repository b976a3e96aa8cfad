"""Loading: the same images and features on any number of processes and workers."""

import argparse
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import COLOR, on_processes
from torchvision.transforms.v2 import functional as TF

import common

CPU = torch.device("cpu")


def loaded(dataset, batch_size, workers=0, step=0, stop=3):
    """Views and labels of the first steps, all in one tensor each."""
    views = [common.View(32, (0.2, 1.0), 0.5, **COLOR), common.View(24, (0.05, 0.14), 0.5)]
    loader = common.Loader(dataset, views, batch_size, seed=5, workers=workers, device=CPU)
    batches = list(loader.batches(range(step, stop)))
    return [torch.cat([views[i] for views, _ in batches]) for i in (0, 1)], torch.cat([labels for _, labels in batches])


def loaded_folder(root):
    return loaded(common.FolderDataset(root / "train"), 4, workers=common.rank())


def loaded_shapes():
    return loaded(common.load_dataset("shapes:48", None, "train", CPU), 12)


def results_of_a_process(image_folder, broken_folder, folder):
    """What the tests below compare, from one process: two of them are started once for all these tests."""
    return {
        "files": loaded_folder(image_folder),
        "broken files": loaded_folder(broken_folder),
        "shapes": loaded_shapes(),
        "listings": listings(image_folder),
        "fetches": fetches(folder),
        "shuffled": shuffled_rows(),
        "own statistics": features_after_own_batches(),
        "features": features_of_shapes(),
        "running mean": running_mean(),
    }


@pytest.fixture(scope="module")
def on_two(tmp_path_factory, image_folder, broken_folder):
    folder = tmp_path_factory.mktemp("on_two")
    return on_processes(2, results_of_a_process, folder, image_folder, broken_folder, folder)


@pytest.mark.parametrize("name", ["files", "broken files", "shapes"])
def test_images_are_the_same_for_any_number_of_processes_and_workers(name, on_two, image_folder, broken_folder):
    folders = {"files": image_folder, "broken files": broken_folder}
    alone, labels = loaded_folder(folders[name]) if name in folders else loaded_shapes()
    parts = [results[name] for results in on_two]
    for i in (0, 1):  # step by step, the two shares make the batch
        steps = [torch.cat(shares) for shares in zip(*(views[i].chunk(3) for views, _ in parts), strict=True)]
        torch.testing.assert_close(torch.cat(steps), alone[i], rtol=0, atol=1e-5)
    steps = [torch.cat(shares) for shares in zip(*(share.chunk(3) for _, share in parts), strict=True)]
    assert torch.equal(torch.cat(steps), labels)


def test_a_resumed_epoch_goes_on_with_the_same_images():
    dataset = common.load_dataset("shapes:40", None, "train", CPU)
    (whole, _), _ = loaded(dataset, 10, stop=4)
    (rest, _), _ = loaded(dataset, 10, step=2, stop=4)
    assert torch.equal(rest, whole[20:])


def test_views_and_epochs_differ_and_an_epoch_sees_every_image_once():
    dataset = common.load_dataset("shapes:40", None, "train", CPU)
    dataset.labels = torch.arange(40)
    loader = common.Loader(dataset, [common.View(32, (0.2, 1.0), 0.5, **COLOR)] * 2, 10, seed=0, workers=0, device=CPU)
    first, second = (list(loader.batches(range(step, step + 4))) for step in (0, 4))
    order, other = (torch.cat([labels for _, labels in batches]) for batches in (first, second))
    assert len(first) == len(loader) == 4 and sorted(order.tolist()) == sorted(other.tolist()) == list(range(40))
    assert not torch.equal(order, other)
    image = int(order[0])
    views = [*first[0][0], second[int((other == image).nonzero()) // 10][0][0]]
    rows = [views[0][0], views[1][0], views[2][int((other == image).nonzero()) % 10]]
    assert all((rows[i] - rows[j]).abs().mean() > 0.01 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_folder_decodes_every_kind_of_file_and_crops_for_evaluation(image_folder):
    from PIL import Image

    dataset = common.FolderDataset(image_folder / "train")
    assert len(dataset) == 16 and dataset.classes == ["ant", "bee"]
    (images,), labels, unreadable = common.CenterCrops(dataset, 28)[range(16)]
    assert images.dtype == torch.uint8 and images.shape == (16, 3, 28, 28) and labels.tolist() == [0] * 8 + [1] * 8
    assert not unreadable
    for i, image in enumerate(images):
        rgb = TF.pil_to_tensor(Image.open(dataset.path(i)).convert("RGB"))
        expected = TF.center_crop(TF.resize(rgb, [32], antialias=True), [28, 28])
        assert (image.int() - expected.int()).abs().max() <= 1, dataset.path(i)


def listings(root):
    """How often this process lists folders, and what it finds."""
    lister, calls = common.find_images, []

    def counting(root, labelled):
        calls.append(root)
        return lister(root, labelled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "find_images", counting)
        common.list_folder.cache_clear()
        datasets = [common.FolderDataset(root / split) for split in ("train", "val", "train")]
    found = [datasets[2].path(i) for i in range(16)], datasets[2].labels.tolist(), datasets[2].classes
    return len(calls), found


def test_one_process_lists_a_folder_once_in_torchvisions_order(on_two, image_folder):
    theirs = torchvision.datasets.ImageFolder(image_folder / "train")
    expected = [path for path, _ in theirs.samples], theirs.targets, theirs.classes
    assert [results["listings"] for results in on_two] == [(2, expected), (0, expected)]


def change_a_path(dataset):
    dataset.names[0] = 0


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_paths_are_not_copied_into_workers(start, image_folder):
    common.list_folder.cache_clear()
    dataset = common.FolderDataset(image_folder / "train")
    worker = torch.multiprocessing.get_context(start).Process(target=change_a_path, args=(dataset,))
    worker.start()
    worker.join()
    assert dataset.path(0) == f"{image_folder}/train/" and dataset.path(1).endswith("ant/1.JPEG")
    common.list_folder.cache_clear()


def fetches(folder):
    """Names of the folders that this process fetches a set into."""
    fetched = []

    def opener(root, download=False, **options):
        if download and not root.exists():
            time.sleep(0.2)
            root.mkdir()
            fetched.append(root.name)
        assert root.exists()
        return argparse.Namespace(data=np.zeros((1, 32, 32, 3), np.uint8), targets=[0], classes=[])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets, "CIFAR10", opener)
        common.load_small_set("cifar10", folder / "small", "train")
    return fetched


def test_one_process_fetches_a_small_set(on_two):
    assert [results["fetches"] for results in on_two] == [["small"], []]


def shuffled_rows():
    x = torch.arange(6.0).view(3, 2) + 10 * common.rank()
    return common.gather(x), common.shuffle(x), common.gather_unshuffled(common.shuffle(x))


def test_shuffle_interleaves_the_batch_and_is_undone(on_two):
    (everything, first, back), (everything1, second, back1) = (results["shuffled"] for results in on_two)
    assert torch.equal(everything, everything1) and everything[:, 0].tolist() == [0, 2, 4, 10, 12, 14]
    assert first[:, 0].tolist() == [0, 4, 12] and second[:, 0].tolist() == [2, 10, 14]
    assert torch.equal(back, everything) and torch.equal(back1, everything)


def features_after_own_batches():
    """Features by an encoder whose BatchNorm statistics are this process's own."""
    torch.manual_seed(0)
    encoder = common.Encoder(common.build_backbone("resnet8", 16), torch.nn.Identity())
    encoder(torch.randn(8, 3, 16, 16) + common.rank())
    dataset = common.subset(common.load_dataset("shapes:20", None, "val", CPU, 16), np.arange(100))
    return common.extract_features(encoder, dataset, 16, 100, 0, CPU)[0]


def test_features_are_by_the_statistics_of_rank_0(on_two):
    parts = [results["own statistics"] for results in on_two]
    torch.testing.assert_close(torch.cat(parts), features_after_own_batches(), rtol=1e-5, atol=1e-6)


def running_mean():
    """BatchNorm's running mean after two batches of ones on rank 1, and of zeros on rank 0."""
    norm = torch.nn.BatchNorm1d(1)
    model = common.distribute(norm)
    for _ in range(2):
        model(torch.full((4, 1), float(common.rank())))
    return norm.running_mean.item()


def test_each_process_keeps_its_own_batchnorm_statistics(on_two):
    assert [results["running mean"] for results in on_two] == pytest.approx([0.0, 0.19])


def features_of_shapes():
    torch.manual_seed(0)
    encoder = common.Encoder(common.build_backbone("resnet8"), torch.nn.Identity())
    dataset = common.load_dataset("shapes:37", None, "train", CPU)
    features, labels = common.extract_features(encoder, dataset, 32, 8, 0, CPU)
    return features, labels, encoder.training


def test_each_process_has_the_features_of_its_share_in_order(on_two):
    alone, labels, training = features_of_shapes()
    assert alone.shape == (37, 64) and torch.equal(labels, common.draw_shapes(37, 32, 0)[1]) and training
    shares, all_labels, _ = zip(*(results["features"] for results in on_two), strict=True)
    assert [len(share) for share in shares] == [19, 19]
    torch.testing.assert_close(torch.cat(shares)[:37], alone, rtol=1e-5, atol=1e-6)
    for same_labels in all_labels:
        assert torch.equal(same_labels, torch.cat([labels, torch.tensor([-1])]))
