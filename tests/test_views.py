"""Views: crops, flips and colour are torchvision's, image by image."""

import numpy as np
import pytest
import torch
from conftest import COLOR, run
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import common


def random_images(n, height, width):
    """Smooth random images with full range, flat areas and exact greys among them: float (n, 3, height, width)."""
    images = TF.resize(torch.rand(n, 3, 6, 7), [height, width], antialias=True)
    images[0] = images[0].mean(0, keepdim=True)
    images[1] = images[1].mul(4).sub(1.5).clamp(0, 1)
    return images


@pytest.mark.parametrize("height, width", [(40, 60), (20, 200), (7, 3)])
def test_crop_boxes_have_torchvisions_distribution(height, width):
    """Deciles of every coordinate, over many boxes, also where most tries do not fit and the centre crop is taken."""
    torch.manual_seed(0)
    image, count = torch.empty(3, height, width), 6000
    theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    random_params = np.random.default_rng(0).random((count, common.CROP_PARAMS))
    ours = common.random_boxes(random_params, height, width, (0.2, 1.0))
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()
    for i in range(4):
        for value in np.unique(np.quantile(theirs[:, i], np.arange(0.1, 1, 0.1), method="nearest")):
            assert abs((ours[:, i] <= value).mean() - (theirs[:, i] <= value).mean()) < 0.03
    for i, j in ((0, 2), (1, 3), (2, 3)):  # and of their sums, so that they belong together
        one, other = ours[:, i] + ours[:, j], theirs[:, i] + theirs[:, j]
        for value in np.unique(np.quantile(other, [0.2, 0.5, 0.8], method="nearest")):
            assert abs((one <= value).mean() - (other <= value).mean()) < 0.03


@pytest.mark.parametrize("size", [16, 33])
def test_crop_and_resize_is_torchvisions_for_every_box(size):
    images = random_images(40, 30, 42)
    random_params = np.random.default_rng(1).random((40, common.CROP_PARAMS))
    boxes, flips = common.random_boxes(random_params, 30, 42, (0.05, 1.0)), random_params[:, -1] < 0.5
    assert 5 < flips.sum() < 35
    ours = common.crop_and_resize(images, boxes, flips, size)
    for image, box, flip, result in zip(images, boxes.tolist(), flips, ours, strict=True):
        expected = TF.resized_crop(image, *box, [size, size], antialias=True)
        torch.testing.assert_close(result, TF.horizontal_flip(expected) if flip else expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, low, high", [
    ("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.6, 1.4), ("hue", -0.1, 0.1), ("hue", -0.5, 0.5),
])  # fmt: skip
def test_color_operations_are_torchvisions(name, low, high):
    images = random_images(20, 16, 12)
    factors = torch.linspace(low, high, 20)
    operation = common.JITTER[["brightness", "contrast", "saturation", "hue"].index(name)]
    ours = operation(images, factors.view(-1, 1, 1, 1))
    for image, factor, result in zip(images, factors.tolist(), ours, strict=True):
        torch.testing.assert_close(result, getattr(TF, f"adjust_{name}")(image, factor), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [32, 224])
def test_blur_is_torchvisions(size):
    images = random_images(6, size, size)
    sigma = torch.linspace(0.1, 2.0, 6) * size / 224
    taps = 2 * int(np.ceil(3 * 2.0 * size / 224)) + 1
    ours = common.gaussian_blur(images, sigma.view(-1, 1, 1, 1), 2.0 * size / 224)
    for image, s, result in zip(images, sigma.tolist(), ours, strict=True):
        torch.testing.assert_close(result, TF.gaussian_blur(image, [taps, taps], [s, s]), rtol=0, atol=1e-5)


def test_color_augmentation_is_torchvisions_image_by_image():
    """Whole chain on uint8 values: order, which images are touched, grey and blur; within a step of 1/255."""
    images = (random_images(64, 96, 96) * 255).round() / 255
    parameters = common.draw_color(np.random.default_rng(2), 64, common.View(96, **COLOR))
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    expected = []
    for i, image in enumerate(images):
        if parameters["jitter"][i]:
            for operation in parameters["order"][i]:
                image = operations[operation](image, parameters["factors"][i, operation])
        if parameters["grey"][i]:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if parameters["blur"][i]:
            image = TF.gaussian_blur(image, [7, 7], [parameters["sigma"][i]] * 2)
        expected.append(image)
    ours = common.View(96, **COLOR).color(images.clone(), np.random.default_rng(2))
    assert (ours - torch.stack(expected)).abs().max() <= 1 / 255
    untouched = ~(parameters["jitter"] | parameters["grey"] | parameters["blur"])
    assert untouched.any() and torch.equal(ours[untouched], images[untouched])


def test_color_parameters_have_the_papers_distribution():
    n = 20000
    drawn = common.draw_color(np.random.default_rng(3), n, common.View(224, **COLOR))
    for name, probability in (("jitter", 0.8), ("grey", 0.2), ("blur", 0.5)):
        assert drawn[name].mean() == pytest.approx(probability, abs=0.015)
    for i, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        deciles = np.quantile(drawn["factors"][:, i], [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(deciles, np.linspace(low, high, 5), atol=0.02)
    np.testing.assert_allclose(np.quantile(drawn["sigma"], [0, 0.5, 1]), [0.1, 1.05, 2.0], atol=0.03)
    orders, counts = np.unique(drawn["order"], axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 0.8 * n / 24
    small = common.draw_color(np.random.default_rng(3), n, common.View(32, **COLOR))["sigma"]
    np.testing.assert_allclose(small, drawn["sigma"] * 32 / 224)


MOCO = {"scale": (0.2, 1.0), "flip": 0.5, "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "grey": 0.2,
        "blur": (0.1, 2.0), "blur_p": 0.5}  # fmt: skip
SMALL, LARGE = {**MOCO, "scale": (0.05, 0.14)}, {**MOCO, "scale": (0.14, 1.0)}
CIFAR, IMAGENET = {"scale": None, "flip": 0.5}, {"scale": (0.08, 1.0), "flip": 0.5}
STUDENT = "--teacher {teacher} --student resnet8"


@pytest.mark.parametrize("line, expected", [
    ("moco_v2.py --data shapes:32 --arch resnet8 --queue-size 16", [MOCO, MOCO]),
    (f"disco.py --data shapes:32 --queue-size 16 {STUDENT}", [MOCO, MOCO]),
    (f"seed.py --data shapes:32 --queue-size 16 {STUDENT}", [MOCO]),
    (f"seed.py --data shapes:32 --queue-size 16 {STUDENT} --small-crops 2 --small-size 8", [LARGE, SMALL, SMALL]),
    ("sskd.py --data shapes:32 --train-teacher resnet8", [CIFAR]),
    ("sskd.py --data {folder} --workers 0 --train-teacher resnet8", [IMAGENET]),
    ("linear_eval.py --data shapes:32 --weights {teacher} --lr 1 --knn 1", [IMAGENET]),
])  # fmt: skip
def test_scripts_train_on_the_papers_views(line, expected, teacher_file, image_folder, tmp_path, monkeypatch):
    found, start = [], common.Loader.__init__

    def init(self, dataset, views, *rest):
        found.append(views)
        start(self, dataset, views, *rest)

    monkeypatch.setattr(common.Loader, "__init__", init)
    line = line.format(teacher=teacher_file, folder=image_folder)
    run(f"{line} --image-size 16 --batch-size 16 --epochs 1 --max-steps 1 --out {tmp_path}")
    (views,) = found
    defaults = vars(common.View(0))
    assert [{**vars(view), "size": 0, "augment": None} for view in views] == [{**defaults, **view} for view in expected]
