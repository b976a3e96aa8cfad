"""What the method scripts share, in the order of an experiment. It contains no method.

Images              folders, torchvision's small sets, drawn shapes: data sets of torch, uint8 images
Views               random crops and flips where the images are, colour on the device
Loading             batches that are the same for any number of processes and workers
Networks            torchvision's and CIFAR's networks, heads, encoders
Files of networks   teachers and labelled networks, as these scripts and others wrote them
Features            features of a frozen backbone, k-NN
Runs                a run's folder: configuration, log, pictures, checkpoints, resume
Command line        the words that mean the same in every script
Processes           torchrun's environment, collectives, how a user's mistake ends
"""

import _codecs
import argparse
import contextlib
import copy
import difflib
import hashlib
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.export.passes import move_to_device_pass
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

try:
    import fcntl
except ImportError:
    sys.exit("these scripts run on Linux and macOS; on Windows, use its subsystem for Linux")

# --------------------------------------------------------------------------------------------------------------- Images
#
# A data set is one of torch's: `len(dataset)`, `dataset[i] -> (image, label)` and `classes`, a list of names. An image
# is a PIL image or a uint8 tensor (3, H, W); one that cannot be read raises. `load_dataset` opens all sets.

SMALL_SETS = {"cifar10": 32, "cifar100": 32, "stl10": 96, "fashion_mnist": 32, "shapes": 32}  # pixels of their images
IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green and blue
CIFAR_MEAN_STD = (0.5071, 0.4866, 0.4409), (0.2675, 0.2565, 0.2761)
# Entries whose names begin so are the system's, not data
HIDDEN = (".", "__MACOSX", "@eaDir", "@__thumb", "@Rec", "#recycle", "#snapshot", "~snapshot", "$R", "lost+found",
          "System Volume")  # fmt: skip


class ArrayDataset:
    """A small set as one uint8 tensor (N, 3, H, W) on the training device, where whole batches are cropped at once."""

    def __init__(self, images, labels, classes, device, mean_std=IMAGENET_MEAN_STD):
        self.images, self.classes, self.mean_std = images.to(device), list(classes), mean_std
        self.labels = torch.as_tensor(labels, dtype=torch.long, device=device)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class FolderDataset:
    """Image files below a folder: in ROOT/CLASS/, as ImageNet, or without `labelled` anywhere."""

    def __init__(self, root, labelled=True):
        self.root = str(root)
        self.names, self.labels, self.classes = list_folder(self.root, labelled)

    def __len__(self):
        return len(self.names)

    def path(self, index):
        """Path of an image file, a string."""
        return os.path.join(self.root, os.fsdecode(self.names[index].numpy().tobytes().rstrip(b"\0")))

    def __getitem__(self, index):
        return read_image(self.path(index)), self.labels[index]


@cache
def list_folder(root, labelled=True):
    """Names of the image files below a folder, labels (N,) and class names; rank 0 lists them once, for all processes.

    Classes and files are in torchvision's order. Without `labelled` there are no classes. Files that Pillow does not
    decode are passed over with one line, hidden ones in silence. Names: uint8 (N, longest name), each row the bytes of
    a name and zeros: a tensor, which workers do not copy. Raises UserError for a folder or a class without an image.
    """
    try:
        names, labels, classes = broadcast(find_images(root, labelled) if rank() == 0 else None)
    except OSError as error:
        raise UserError(f"{root}: {error}: pass --data FOLDER with train/ and val/ in it, or shapes") from None
    return torch.from_numpy(names).view(len(labels), -1), torch.tensor(labels), classes


def find_images(root, labelled):
    """The work of `list_folder` on rank 0: bytes of all names (an array), labels and class names."""

    def fail(error):
        raise error

    # Some of Pillow's formats are only recognised: files of data and films
    suffixes = Image.registered_extensions()
    formats = {*Image.OPEN, "MPO"} - {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
    suffixes = {suffix for suffix in suffixes if suffixes[suffix] in formats}
    found, others, classes = [], [], []
    above = {root: {os.path.realpath(root)}}  # of each folder, itself and those above, which a link in it can lead to
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        places = {name: os.path.join(folder, name) for name in folders if not name.startswith(HIDDEN)}
        places = {name: path for name, path in places.items() if os.path.realpath(path) not in above[folder]}
        above |= {path: above[folder] | {os.path.realpath(path)} for path in places.values()}
        folders[:] = places
        if labelled and folder == root:
            classes = sorted(folders)
        place = os.path.relpath(folder, root)
        label = place.split(os.sep)[0]
        for name in files:
            if not name.startswith(HIDDEN):
                known = os.path.splitext(name)[1].lower() in suffixes and (label != "." or not labelled)
                (found if known else others).append((label, place, name))
    if labelled and not classes:
        raise UserError(f"{root} has no folder for each class: pass another --data")
    empty = set(classes) - {label for label, _, _ in found}
    if empty or not found:
        where = os.path.join(root, min(empty)) if empty else f"{root} or {os.path.join(root, 'train')}"
        raise UserError(f"no image below {where}: pass another --data, or remove the folder")
    if others:
        example = os.path.normpath(os.path.join(root, *others[0][1:]))
        say(f"{root}: passed over {len(others)} files that are no images{' of a class' * labelled}, as {example}")
    numbers = {name: number for number, name in enumerate(classes)}
    found.sort()
    names = np.array([os.fsencode(os.path.normpath(os.path.join(place, name))) for _, place, name in found])
    return names.view(np.uint8), [numbers.get(label, 0) for label, _, _ in found], classes


def read_image(path):
    """Decode any image file to uint8 RGB (3, H, W)."""
    try:
        return torchvision.io.decode_jpeg(torchvision.io.read_file(path), mode="RGB")
    except (RuntimeError, AttributeError):  # another format, a broken file, or a torchvision without decoders
        with Image.open(path) as image:
            return to_rgb(image)


def to_rgb(image):
    """uint8 (3, H, W) of a PIL image or a uint8 tensor (1 or 3, H, W).

    Transparent pixels become white, an animation its first frame. Grey levels of 16 bits are scaled, and so are those
    of 32 bits that fill at least a quarter of a usual range: up to 1, 255 or 65,535. Raises ValueError for others.
    """
    if isinstance(image, torch.Tensor):
        if image.dtype != torch.uint8:
            raise TypeError(f"a tensor of {image.dtype} and not of uint8")
        return image.expand(3, -1, -1)
    if image.mode[0] in "IF":  # more than 8 bits of grey, which Pillow would cut off at 255
        levels = np.asarray(image)
        scaled = np.rint(levels * (255 / largest_grey(image, levels.min(), levels.max())))
        if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # white is 0
            scaled = 255 - scaled
        grey = np.where(levels == image.info.get("transparency"), 255, scaled)
        return torch.from_numpy(grey.astype(np.uint8)).expand(3, -1, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return TF.pil_to_tensor(image.convert("RGB"))


def largest_grey(image, low, high):
    """The grey level that is white in a PIL image of more than 8 bits, whose levels are low to high."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        twelve = image.format == "TIFF" and image.tag_v2.get(258) == (12,)  # bits per sample
        return 2**12 - 1 if twelve else 2**16 - 1
    for white in (1, 255, 65535) if image.mode == "F" else (255, 65535):
        if 0 <= low and high <= white and (high >= white / 4 or white == 1 or high == 0):
            return white
    raise ValueError(f"grey levels from {low:g} to {high:g}, and nothing says which is white")


def default_image_size(data):
    """Pixels of the images of --data where --image-size is not given: 224 for a folder."""
    return SMALL_SETS.get((data or "").partition(":")[0], 224)


def load_dataset(data, data_root, split, device, image_size=32):
    """One split of a data set: "pretrain" (all images that a method may use without labels), "train" or "val".

    data: a folder, a name of `SMALL_SETS` or "shapes:COUNT"; None means data/imagenet. image_size: of drawn images.
    """
    name, _, count = (data or "").partition(":")
    if name == "shapes":
        if not re.fullmatch(r"([1-9]\d+)?", count):
            raise UserError(f"--data {data}: pass a number of images, at least 10, as in shapes:2000")
        count, seed = (2000, 1) if split == "val" else (int(count or 8000), 0)
        return ArrayDataset(*draw_shapes(count, image_size, seed), TEXTURES, device)
    if data in SMALL_SETS:
        mean_std = CIFAR_MEAN_STD if data.startswith("cifar") else IMAGENET_MEAN_STD
        return ArrayDataset(*load_small_set(data, data_root, split), device, mean_std)
    folder = Path(data or "data/imagenet")
    if split != "pretrain":
        return FolderDataset(folder / split)
    # Without labels, images may lie anywhere: below train/, or where there is none, below the folder itself
    names = broadcast(sorted(next(os.walk(folder))[1]) if rank() == 0 and folder.is_dir() else ["train"])
    names = [name for name in names if not name.startswith(HIDDEN)]
    splits = [name for name in names if re.match(r"(train|val|valid|validation|test)([^a-z]|$)", name, re.IGNORECASE)]
    if "train" in names:
        if others := [name for name in names if name not in splits]:
            say(f"{folder}: images below train/ alone are used, and not those below {others[0]}/")
        return FolderDataset(folder / "train", labelled=False)
    if splits:
        raise UserError(f"{folder} has {splits[0]} and no train: rename it, or pass the folder of training images")
    return FolderDataset(folder, labelled=False)


def load_labelled(data, data_root, device, image_size=32):
    """The training and the validation images of a data set; see `load_dataset`."""
    train, val = (load_dataset(data, data_root, split, device, image_size) for split in ("train", "val"))
    if class_names(train) != class_names(val):
        differ = set(class_names(train)) ^ set(class_names(val))
        how = f"different classes, for one {min(differ)}" if differ else "the same classes in another order"
        raise UserError(f"train and val of {data or 'data/imagenet'} hold {how}")
    if mean_std_of(train) != mean_std_of(val):
        raise UserError(f"train and val of {data} differ in `mean_std`: a network gets its images in one way")
    return train, val


def class_names(dataset):
    """Names of a data set's classes, a list of strings; raises UserError where one's own has none."""
    if not hasattr(dataset, "classes"):
        raise UserError(f"{type(dataset).__name__} has no `classes`, a list of names: see docs/own-data.md")
    return list(map(str, dataset.classes))


def in_memory(dataset):
    """Whether a data set has its images and labels as tensors, so that batches are cropped at once on their device."""
    images, labels = getattr(dataset, "images", None), getattr(dataset, "labels", None)
    images = isinstance(images, torch.Tensor) and images.dtype == torch.uint8 and images.shape[1:2] == (3,)
    return images and isinstance(labels, torch.Tensor)


def separate(dataset):
    """A copy of a data set to read from: workers cannot share the files that one's own opens at its first image."""
    dataset = copy.copy(dataset)
    if hasattr(dataset, "dataset"):  # of a Part, or of torch's Subset
        dataset.dataset = separate(dataset.dataset)
    if hasattr(dataset, "datasets"):  # of torch's ConcatDataset
        dataset.datasets = list(map(separate, dataset.datasets))
    return dataset


def labels_of(dataset):
    """Labels of all images, (N,), as the data set returns them; -1 if unreadable.

    One's own data set is read once for them, unless up to a hundred images have those of its `labels` or `targets`.
    """
    if in_memory(dataset) or isinstance(dataset, FolderDataset):
        return dataset.labels
    dataset, labels = separate(dataset), np.full(len(dataset), -1)

    def read(indices):
        for index in indices.tolist():
            with contextlib.suppress(Exception):  # as many types as there are ways to be unreadable
                labels[index] = int(dataset[index][1])
        return labels[indices]

    given = np.asarray(getattr(dataset, "labels", getattr(dataset, "targets", ())))
    some = np.linspace(0, len(dataset) - 1, min(len(dataset), 100)).astype(int)
    if len(given) == len(dataset) and ((read(some) == given[some]) | (labels[some] < 0)).all():
        return torch.from_numpy(given.astype(int))
    return torch.from_numpy(read(np.arange(len(dataset))))


def subsample_per_class(dataset, fraction, seed):
    """A data set of `fraction` of each class's images, at least one, chosen by the seed."""
    if fraction == 1:
        return dataset
    order = np.random.default_rng([seed, 2006]).permutation(len(dataset))
    labels = labels_of(dataset).cpu().numpy()[order]
    classes = [order[labels == number] for number in range(len(dataset.classes))]
    kept = [members[: max(1, round(fraction * len(members)))] for members in classes]
    return subset(dataset, np.sort(np.concatenate(kept)))


def subset(dataset, indices):
    """A data set of the images with these indices, an array. Its `labels` may be replaced."""
    if in_memory(dataset):
        images, labels = dataset.images[indices], dataset.labels[indices]
        return ArrayDataset(images, labels, dataset.classes, images.device, mean_std_of(dataset))
    if not isinstance(dataset, FolderDataset):
        return Part(dataset, indices)
    part = copy.copy(dataset)
    part.names, part.labels = dataset.names[indices], dataset.labels[indices]
    return part


class Part:
    """Images of one's own data set; `labels` replace those that it returns."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices, self.labels = dataset, indices, ()
        self.classes, self.mean_std = dataset.classes, mean_std_of(dataset)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        image, label = self.dataset[int(self.indices[index])]
        return image, self.labels[index] if len(self.labels) else label


def describe_content(dataset):
    """Size and hash of a data set, a string; where it lies does not count.

    Hashed are classes, labels, and the values of a set in memory; of a folder, all names and up to a thousand files
    spread over it, the size and first 64 KiB of each; of another set, up to a hundred of its images and their labels.
    """
    digest, dataset = hashlib.sha256(json.dumps(class_names(dataset)).encode()), separate(dataset)
    size = f"{len(dataset)} images of {len(dataset.classes)} classes"
    for name in ("images", "names", "labels", "targets"):
        values = getattr(dataset, name, None)
        if isinstance(values, torch.Tensor):
            digest.update(values.cpu().contiguous().numpy())
        elif name in ("labels", "targets") and values is not None:
            digest.update(str(list(values)).encode())
    files = isinstance(dataset, FolderDataset)
    count = 0 if in_memory(dataset) else min(len(dataset), 1000 if files else 100)
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        try:
            if files:
                with open(dataset.path(index), "rb") as file:
                    digest.update(b"%d" % os.fstat(file.fileno()).st_size + file.read(2**16))
            else:
                (image, label), (again, _) = dataset[index], dataset[index]
                if not torch.equal(image := to_rgb(image), to_rgb(again)):
                    say("warning: images differ when they are read again: a run cannot be repeated or resumed exactly")
                    break
                digest.update(str(label).encode() + image.contiguous().numpy().tobytes())
        except Exception as error:  # as many types as there are ways to be unreadable
            digest.update(type(error).__name__.encode())
    return f"{size}, content {digest.hexdigest()[:16]}"


def load_small_set(name, root, split):
    """uint8 images (N, 3, H, W), labels (N,) and class names of a set of torchvision's; rank 0 fetches it."""
    names = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "fashion_mnist": "FashionMNIST"}
    opener, options = getattr(torchvision.datasets, names[name]), {"train": split != "val"}
    if name == "stl10":
        options = {"split": {"pretrain": "unlabeled", "train": "train", "val": "test"}[split]}
    if rank() > 0:
        broadcast(None)  # waits for rank 0
    try:
        found = opener(root, download=rank() == 0, **options)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:  # ... of a damaged file
        raise UserError(f"cannot open {name} in {root} ({error}): pass --data-root") from None
    if rank() == 0:
        broadcast(None)
    images = torch.as_tensor(found.data)
    if images.ndim == 3:  # grey: three channels that share their memory
        images = images[:, None].expand(-1, 3, -1, -1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, found.labels if name == "stl10" else found.targets, found.classes


TEXTURES = {  # patterns over points (u, v), mostly of period 2 pi; one ink where positive, another where negative
    "stripes": lambda u, v: np.sin(u),
    "double stripes": lambda u, v: np.sin(u) + np.sin(2 * u),
    "checks": lambda u, v: 1.5 * np.sin(u) * np.sin(v),
    "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.7,
    "mesh": lambda u, v: np.maximum(np.cos(u), np.cos(v)) - 0.6,
    "squares": lambda u, v: np.minimum(np.sin(u), np.sin(v) + 0.5),
    "waves": lambda u, v: np.sin(u + 1.5 * np.sin(v)),
    "rings": lambda u, v: np.sin(np.hypot(u, v)),
    "bricks": lambda u, v: np.maximum(np.cos(v), np.cos(u / 2 + np.pi / 2 * (np.floor(v / 2 / np.pi) % 2)) ** 8) - 0.5,
    "honeycomb": lambda u, v: np.cos(u) + np.cos(u / 2 + 0.75**0.5 * v) + np.cos(u / 2 - 0.75**0.5 * v) + 0.4,
}


def draw_shapes(count, size, seed):
    """Draw the built-in set: uint8 images (count, 3, size, size) and labels (count,) in ten classes of equal size.

    A class is the texture of a disc; all else varies. Colours are one palette with small changes: with free colours, a
    contrastive loss would tell images apart by colour and learn nothing else.
    """
    images = np.empty((count, 3, size, size), dtype=np.uint8)
    rng = np.random.default_rng([seed, 2104])
    labels = rng.permutation(np.arange(count) % len(TEXTURES))
    palette = np.array([[0.85, 0.65, 0.35], [0.25, 0.35, 0.60], [0.50, 0.50, 0.45], [0.40, 0.45, 0.55]])
    grid = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    for start in range(0, count, 1000):  # in parts, to keep memory small
        texture = labels[start : start + 1000]

        def vary(low, high, channels=1, count=texture.size):
            return rng.uniform(low, high, (count, channels, 1, 1)).astype(np.float32)

        x, y = grid - vary(-0.2, 0.2), grid[:, None] - vary(-0.2, 0.2)
        angle, radius, frequency = vary(0, 2 * np.pi), vary(0.33, 0.48), vary(7, 11)
        u = (np.cos(angle) * x + np.sin(angle) * y) / radius
        v = (np.cos(angle) * y - np.sin(angle) * x) / radius
        pattern_u, pattern_v = frequency * u + vary(-np.pi, np.pi), frequency * v + vary(-np.pi, np.pi)
        pattern = np.empty_like(u)
        for i, wave in enumerate(TEXTURES.values()):
            pattern[texture == i] = wave(pattern_u[texture == i], pattern_v[texture == i])
        inside = np.clip(0.5 - (np.hypot(u, v) - 1) * radius * size, 0, 1)  # edges one pixel soft
        ink = np.clip(0.5 + 2 * pattern, 0, 1)
        shade = np.clip(0.5 + vary(-0.3, 0.3) * grid + vary(-0.3, 0.3) * grid[:, None], 0, 1)
        light, dark, ground1, ground2 = (color[:, None, None] + vary(-0.05, 0.05, 3) for color in palette)
        image = inside * (ink * light + (1 - ink) * dark) + (1 - inside) * (shade * ground1 + (1 - shade) * ground2)
        image += vary(0.02, 0.06) * rng.standard_normal(image.shape, dtype=np.float32)
        images[start : start + 1000] = (image.clip(0, 1) * 255).round()
    return torch.from_numpy(images), torch.from_numpy(labels)


# ---------------------------------------------------------------------------------------------------------------- Views
#
# Crops and flips are made where the images are, colour on the device, for a whole batch. The CPU decides which images
# an operation changes, so that nothing waits for the device.


@dataclass(frozen=True)
class View:
    """How to make a view of an image: crop, flip and resize it, then colour operations in this order.

    size: pixels. scale: smallest and largest part of the area to crop (RandomResizedCrop); None: all of it, of a file
    the centre crop of evaluation. flip: probability. jitter: strengths of brightness, contrast, saturation and hue
    (ColorJitter). blur: smallest and largest sigma at 224 pixels, in proportion at another size. jitter_p, grey,
    blur_p: probabilities. augment: a further function (images, rng) -> images of floats (n, 3, size, size) in [0, 1];
    it can return several rows per image. All processes have the same rng: draw for all images, take `own_rows`.
    """

    size: int
    scale: tuple | None = None
    flip: float = 0.0
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    grey: float = 0.0
    blur: tuple = (0.0, 0.0)
    blur_p: float = 0.0
    augment: Callable | None = None

    def crop(self, image, random_params):
        """This view of one uint8 image (3, H, W), before colour. random_params: (1, CROP_PARAMS)."""
        if self.scale is None:
            crop = center_crop(image, self.size)
        else:
            (box,) = random_boxes(random_params, *image.shape[1:], self.scale)
            crop = TF.resized_crop(image, *box.tolist(), [self.size] * 2, antialias=True)
        return TF.horizontal_flip(crop) if random_params[0, -1] < self.flip else crop

    def crop_batch(self, images, random_params):
        """The same of float images (n, 3, H, W) of one size, all at once; without `scale`, of whole images."""
        height, width = images.shape[2:]
        boxes = np.tile([0, 0, height, width], (len(images), 1))
        if self.scale is not None:
            boxes = random_boxes(random_params, height, width, self.scale)
        return crop_and_resize(images, boxes, random_params[:, -1] < self.flip, self.size)

    def color(self, images, rng):
        """Colour operations and `augment` on float images (n, 3, size, size) in [0, 1], in place where possible."""
        if self.jitter_p or self.grey or self.blur_p:
            images = augment_color(images, self, rng)
        return self.augment(images, rng) if self.augment else images


CROP_PARAMS = 23  # random numbers for a crop and a flip: ten tries of area and of aspect ratio, position (2), flip


def random_boxes(random_params, height, width, scale):
    """RandomResizedCrop's boxes in images of height x width: (n, 4) integers top, left, height, width.

    random_params: (n, CROP_PARAMS) in [0, 1). scale: as of a `View`. Of ten tries of area and aspect ratio (3/4 to 4/3)
    the first that fits, else the largest centre crop.
    """
    area, aspect, position, _ = np.split(random_params, [10, 20, 22], axis=1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = np.exp(np.log(4 / 3) * (2 * aspect - 1))
    full = np.array([[height], [width]])
    sides = np.rint(np.sqrt([area / aspect, area * aspect]))  # (2, n, 10)
    fits = ((0 < sides) & (sides <= full[..., None])).all(axis=0)
    center = np.minimum(full, np.rint(full[::-1] * 4 / 3))
    sides = np.where(fits.any(axis=1), sides[:, np.arange(len(fits)), fits.argmax(axis=1)], center)
    starts = np.where(fits.any(axis=1), np.floor(position.T * (full - sides + 1)), (full - sides) // 2)
    return np.concatenate([starts, sides]).T.astype(np.int64)


def center_crop(image, size):
    """The papers' crop of evaluation, of a uint8 image (3, H, W): shorter side to 256 where the crop is 224.

    Of an image more than eight times as long as wide, the middle: its whole length could fill the memory.
    """
    shorter = min(image.shape[1:])
    image = TF.center_crop(image, [min(side, 8 * shorter) for side in image.shape[1:]])
    return TF.center_crop(TF.resize(image, [round(size * 256 / 224)], antialias=True), [size] * 2)


def crop_and_resize(images, boxes, flips, size):
    """Crop, resize (bilinear, antialiased) and flip float images (n, 3, H, W): (n, 3, size, size).

    boxes: from `random_boxes`; flips: (n,) bool. This is linear along each axis, hence two batched matrix products.
    """
    n, channels, height, width = images.shape
    flips = torch.from_numpy(flips).to(images.device, non_blocking=True)[:, None, None]
    if height == width == size and (boxes == [0, 0, size, size]).all():  # nothing to resize
        return torch.where(flips[..., None], images.flip(3), images)
    boxes = torch.from_numpy(boxes).to(images.device, non_blocking=True)
    rows = resize_weights(boxes[:, 0], boxes[:, 2], height, size)
    columns = resize_weights(boxes[:, 1], boxes[:, 3], width, size)
    columns = torch.where(flips, columns.flip(1), columns)
    images = torch.bmm(images.flatten(1, 2), columns.mT).view(n, channels, height, size)
    return rows[:, None] @ images


def resize_weights(start, length, full, size):
    """Weights (n, size, full) that resize the pixels [start, start + length) of an axis of `full` pixels to `size`."""
    start, length = start[:, None, None], length[:, None, None]
    stretch = length / size
    center = (torch.arange(size, device=start.device)[:, None] + 0.5) * stretch
    pixel = torch.arange(full, device=start.device) - start
    weights = (1 - (pixel + 0.5 - center).abs() / stretch.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length))
    return weights / weights.sum(dim=2, keepdim=True)


def draw_color(rng, n, view):
    """Random parameters of a view's colour operations for n images, a dict of arrays."""
    strengths = np.array(view.jitter)
    neutral = np.array([1, 1, 1, 0])  # factors of brightness, contrast and saturation, shift of hue
    return {
        "jitter": rng.random(n) < view.jitter_p,
        "order": rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1),
        "factors": rng.uniform(np.maximum(neutral - strengths, [0, 0, 0, -0.5]), neutral + strengths, (n, 4)),
        "grey": rng.random(n) < view.grey,
        "blur": rng.random(n) < view.blur_p,
        "sigma": rng.uniform(*view.blur, n) * view.size / 224,
    }


def augment_color(images, view, rng):
    """Colour jitter, random grey and blur of a view, in place. For images and rng, see `View`."""
    drawn = draw_color(rng, len(images) * world_size(), view)
    jitter, order, factors, grey, blur, sigma = map(own_rows, drawn.values())
    factors, sigma = (torch.from_numpy(x).to(images.device, images.dtype, non_blocking=True) for x in (factors, sigma))
    steps = [(jitter & (order[:, i] == j), JITTER[j], factors[:, j]) for i in range(4) for j in range(4)]
    steps += [(grey, lambda x, _: TF.rgb_to_grayscale(x), sigma)]
    steps += [(blur, partial(gaussian_blur, largest=view.blur[1] * view.size / 224), sigma)]
    for mask, operation, values in steps:
        if mask.any():
            rows = torch.from_numpy(np.flatnonzero(mask)).to(images.device, non_blocking=True)
            images[rows] = operation(images[rows], values[rows].view(-1, 1, 1, 1))
    return images


def adjust_hue(images, shift):
    """Shift the hue by a part of the colour circle, -0.5 to 0.5, in HSV."""
    value, brightest = images.max(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    sixth = torch.where(brightest == 0, green - blue, torch.where(brightest == 1, blue - red, red - green))
    sixth = sixth / chroma.clamp(min=1e-8) + 2 * brightest + 6 * shift  # hue in sixths of the circle
    k = (sixth + torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)).remainder(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


JITTER = (  # operations on images x (n, 3, H, W), each with factors (n, 1, 1, 1)
    lambda x, brightness: (x * brightness).clamp_(0, 1),
    lambda x, contrast: TF.rgb_to_grayscale(x).mean((2, 3), keepdim=True).lerp(x, contrast).clamp_(0, 1),
    lambda x, saturation: TF.rgb_to_grayscale(x).lerp(x, saturation).clamp_(0, 1),
    adjust_hue,
)


def gaussian_blur(images, sigma, largest):
    """Blur each image by its own sigma (n, 1, 1, 1) in pixels; the kernel reaches to three times the largest sigma."""
    radius = max(1, math.ceil(3 * largest))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-0.5 * (offsets / sigma.flatten(1)) ** 2, dim=1).repeat_interleave(images.shape[1], 0)
    blurred = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]
    blurred = F.conv2d(blurred, kernel[:, None, :, None], groups=len(kernel))
    blurred = F.conv2d(blurred, kernel[:, None, None, :], groups=len(kernel))
    return blurred.view_as(images)


def normalize(images, mean_std):
    """Subtract each channel's mean from float images (n, 3, H, W) and divide by its standard deviation, in place."""
    for channel, mean, std in zip(images.unbind(dim=1), *mean_std, strict=True):  # numbers need no copy to the device
        channel.sub_(mean).div_(std)
    return images


# -------------------------------------------------------------------------------------------------------------- Loading

UNREADABLE = {}  # {image: reason}, of this process's loaders


class Loader:
    """Batches of random views: the same images for any number of processes and workers.

    All random numbers of the global batch follow from (seed, epoch, step); each process takes its rows, and a resume
    needs no random state. An epoch leaves out the images that do not fill a last batch.
    """

    def __init__(self, dataset, views, batch_size, seed, workers, device):
        if batch_size > len(dataset):
            raise UserError(f"--batch-size {batch_size} is larger than the {len(dataset)} training images")
        if batch_size % world_size():
            raise UserError(f"--batch-size {batch_size} cannot be shared out over {world_size()} processes")
        self.dataset, self.views, self.seed, self.device = dataset, views, seed, device
        self.steps = []  # of the next batches
        self.batch_size = batch_size
        batches = TrainingBatches(dataset, views, batch_size, seed)
        self.loader = make_dataloader(batches, self.steps, workers, device)

    def __len__(self):
        return len(self.dataset) // self.batch_size

    def batches(self, steps):
        """Yield (views, labels) of a range of the run's steps, all in one epoch.

        views: normalised float tensors (n, 3, size, size) on the device; labels: (n,); n images per process.
        """
        self.steps[:] = steps
        for step, (views, labels) in zip(steps, to_device(self.loader, self.device), strict=True):
            rng = np.random.default_rng([self.seed, step // len(self), step, 1])
            views = [view.color(images, rng) for view, images in zip(self.views, views, strict=True)]
            yield [normalize(images, mean_std_of(self.dataset)) for images in views], labels


def mean_std_of(dataset):
    """Mean and standard deviation of the channels that a data set is normalised with: ImageNet's, or its own."""
    numbers = getattr(dataset, "mean_std", IMAGENET_MEAN_STD)
    try:
        return parse_mean_std(numbers)
    except (ValueError, TypeError):
        raise UserError(f"`mean_std` of a data set is {numbers}, and not means and deviations in [0, 1]") from None


def parse_mean_std(numbers):
    """((red, green, blue) means, the same of deviations), of two or six numbers for images in [0, 1], or ValueError."""
    mean, std = np.broadcast_to(np.array(numbers, float).reshape(2, -1), (2, 3)).tolist()
    if not np.isfinite([mean, std]).all() or min(std) <= 0 or min(mean) < 0 or max(mean) > 1:
        raise ValueError
    return tuple(mean), tuple(std)


class TrainingBatches:
    """This process's rows of the batch of each step, before colour. Workers hold it, and get numbers of steps."""

    def __init__(self, dataset, views, batch_size, seed):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.views = [replace(view, augment=None) for view in views]  # any function may stand there, even a lambda
        rows = batch_size // world_size()
        self.own = slice(rank() * rows, (rank() + 1) * rows)  # workers do not know the rank

    def __getitem__(self, step):
        epoch, batch = divmod(step, len(self.dataset) // self.batch_size)
        order = epoch_order(len(self.dataset), self.seed, epoch)[batch * self.batch_size :][: self.batch_size]
        rng = np.random.default_rng([self.seed, epoch, step, 0])
        random_params = rng.random((self.batch_size, len(self.views), CROP_PARAMS))[self.own].swapaxes(0, 1)
        return load_batch(self.dataset, order[self.own], self.views, random_params, (self.seed, epoch))


@lru_cache(maxsize=1)
def epoch_order(count, seed, epoch):
    """Order of the images in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class CenterCrops:
    """Batches of evaluation: centre crops of the images with these indices, in their order."""

    def __init__(self, dataset, image_size):
        self.dataset, self.views = dataset, [View(image_size)]

    def __getitem__(self, indices):
        return load_batch(self.dataset, np.array(indices), self.views, np.ones((1, len(indices), CROP_PARAMS)))


def load_batch(dataset, indices, views, random_params, seeds=None):
    """Views of n images before colour, a list of tensors (n, 3, size, size), labels (n,), {unreadable image: reason}.

    random_params: (views, n, CROP_PARAMS). Another image, chosen by seeds (seed, epoch) and index, replaces an
    unreadable one; in evaluation, without seeds, a black image with label -1. Views of a set in memory are floats on
    its device, others uint8. An error is returned, because a worker would raise it as a traceback.
    """
    if in_memory(dataset):
        indices = torch.from_numpy(indices).to(dataset.images.device, non_blocking=True)
        images = dataset.images[indices].float().div_(255)
        crops = [view.crop_batch(images, params) for view, params in zip(views, random_params, strict=True)]
        return crops, dataset.labels[indices].long(), {}
    n, unreadable = len(indices), {}
    crops = [torch.zeros(n, 3, view.size, view.size, dtype=torch.uint8) for view in views]
    labels = torch.full((n,), -1)
    for row, index in enumerate(indices):
        for attempt in range(10 if seeds else 1):
            if attempt:
                index = np.random.default_rng([*seeds, index, attempt]).integers(len(dataset))
            number = dataset.indices[index] if isinstance(dataset, Part) else index
            name = dataset.path(index) if isinstance(dataset, FolderDataset) else f"number {number}"
            try:
                image, label = dataset[int(index)]
                for rows, view, params in zip(crops, views, random_params, strict=True):
                    rows[row] = view.crop(to_rgb(image), params[row : row + 1])
                labels[row] = -1 if label is None else int(label)
                if labels[row] < 0 and not seeds:
                    raise ValueError(f"label {label}")
                break
            except Exception as error:  # decoders raise many types for broken files
                unreadable[name] = str(error).partition("\n")[0] or type(error).__name__
        else:
            if seeds:
                return UserError(f"10 unreadable images in a row, the last {name} ({unreadable[name]}): remove them")
    return crops, labels, unreadable


def make_dataloader(batches, sampler, workers, device):
    """torch's DataLoader of `batches[x]` for each x of the sampler: workers make those of files."""
    workers = 0 if in_memory(batches.dataset) else workers
    # A batch that takes longer than ten minutes is lost
    options = {"persistent_workers": True, "worker_init_fn": worker_init, "timeout": 600} if workers else {}
    pin_memory = device.type == "cuda" and not in_memory(batches.dataset)
    return DataLoader(batches, None, sampler=sampler, num_workers=workers, pin_memory=pin_memory, **options)


def worker_init(worker):
    """Make a worker ignore signals that reach all processes of a run: the main process needs it to save the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.excepthook = lambda *error: None  # hides errors of sharing batches when the main process ends
    # A batch that cannot be sent is lost, and the run would wait for it: end, which the main process notices at once
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_with_parent, daemon=True).start()


def end_worker(error, batch):
    """End a worker that cannot send a batch; silently if the main process is gone."""
    if not isinstance(error, BrokenPipeError):
        print(f"a batch cannot be sent: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def exit_with_parent():
    """End this process when its parent, and no other process, sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)


def to_device(loader, device):
    """Batches of `make_dataloader` on the device, views as floats in [0, 1]; records unreadable images."""
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        views, labels, found = batch
        UNREADABLE.update(found)
        views = [TF.to_dtype(x.to(device, non_blocking=True), torch.float32, scale=True) for x in views]
        yield views, labels.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------------- Networks

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def kaiming_init(module):
    """Initialise a convolution as He et al. (2015), by the number of outputs; for `network.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# CRD's networks for 32-pixel images (Tian et al., 2020), with torchvision's blocks where it has them. The parameters
# come in the order of the released files, so that the loader can rename the keys of those files.
conv_bn = partial(torchvision.ops.Conv2dNormActivation, activation_layer=None)  # keeps the size if its stride is 1


def stage_network(block, channels, depths, kernel=3, first_stride=1, classifier="fc"):
    """A stem, stages whose first block changes the channels and the size, pooling and a classifier of ten classes."""
    conv, norm = conv_bn(3, channels[0], kernel)
    layers = {"conv1": conv, "bn1": norm, "relu": nn.ReLU()}
    for number, depth in enumerate(depths):
        before, after = channels[number : number + 2]
        first = block(before, after, 2 if number else first_stride)
        layers[f"layer{number + 1}"] = nn.Sequential(first, *(block(after, after, 1) for _ in range(depth - 1)))
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), classifier: nn.Linear(channels[-1], 10)}
    return nn.Sequential(OrderedDict(layers))


def basic_block(in_channels, channels, stride):
    """torchvision's block of ResNet-18, with a convolution in the shortcut where the channels change."""
    shortcut = conv_bn(in_channels, channels, 1, stride) if in_channels != channels else None
    return torchvision.models.resnet.BasicBlock(in_channels, channels, stride, shortcut)


def cifar_resnet(depth, channels=(16, 16, 32, 64)):
    """ResNet for 32-pixel images (He et al., 2016, section 4.2): 6n + 2 layers, a stem and three stages of channels."""
    return stage_network(basic_block, channels, [(depth - 2) // 6] * 3).apply(kaiming_init)


class WideBlock(nn.Module):
    """Block of Wide ResNet: BatchNorm and ReLU before the convolutions."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1, self.bn2 = conv_bn(in_channels, channels, 3, stride)
        self.conv2, _ = conv_bn(channels, channels, 3)
        self.convShortcut = conv_bn(in_channels, channels, 1, stride)[0] if in_channels != channels else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.convShortcut(out) if self.convShortcut else x
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(out))))


def wide_resnet(depth, width):
    """Wide ResNet (Zagoruyko and Komodakis, 2016): 6n + 4 layers, `width` times the channels."""
    channels = (16, 16 * width, 32 * width, 64 * width)
    conv, _, relu, *stages, pool, flatten, classifier = stage_network(WideBlock, channels, [(depth - 4) // 6] * 3)
    layers = {f"block{n}": nn.Sequential(OrderedDict(layer=stage)) for n, stage in enumerate(stages, start=1)}
    layers = {"conv1": conv, **layers, "bn1": nn.BatchNorm2d(channels[-1]), "relu": relu}
    return nn.Sequential(OrderedDict(layers, pool=pool, flatten=flatten, fc=classifier)).apply(kaiming_init)


def cifar_vgg(layers):
    """VGG with BatchNorm from a row of `torchvision.models.vgg.cfgs`: three max-poolings and one linear layer."""
    start = layers.index(512)
    layers = layers[:start] + [layer for layer in layers[start:] if layer != "M"]
    features = torchvision.models.vgg.make_layers(layers, batch_norm=True)
    pool, classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    layers = OrderedDict(features=features, pool=pool, flatten=nn.Flatten(), classifier=classifier)
    return nn.Sequential(layers).apply(kaiming_init)


def cifar_mobilenet_v2():
    """MobileNetV2 of half the width, with ReLU, its third stage at full size."""
    # CRD's first block has the 1x1 convolution that torchvision leaves out where the expansion is exactly 1.
    setting = [[1.01, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2],
               [6, 320, 1, 1]]  # fmt: skip
    network = torchvision.models.MobileNetV2(10, 0.5, setting, round_nearest=4)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.ReLU6):
            network.set_submodule(name, nn.ReLU(inplace=True))
    return network


class ShuffleV1Block(nn.Module):
    """Block of ShuffleNet (Zhang et al., 2018), in 3 groups. With stride 2 it concatenates the pooled input."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.stride, self.groups = stride, 1 if in_channels == 24 else 3
        channels -= in_channels if stride == 2 else 0
        hidden = channels // 4
        self.conv1, self.bn1 = conv_bn(in_channels, hidden, 1, groups=self.groups)
        self.conv2, self.bn2 = conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.conv3, self.bn3 = conv_bn(hidden, channels, 1, groups=3)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(F.channel_shuffle(out, self.groups))))
        out = self.bn3(self.conv3(out))
        return F.relu(out + x if self.stride == 1 else torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], dim=1))


def shuffle_v2():
    """torchvision's ShuffleNet V2 with a stem of 1x1 and no max-pooling."""
    network = torchvision.models.shufflenet_v2_x1_0(num_classes=10)
    network.conv1[0] = nn.Conv2d(3, 24, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


def small_stem(network):
    """Give a torchvision ResNet a 3x3 stem of stride 1 without max-pooling (SimCLR, appendix B.9), in place."""
    network.conv1 = nn.Conv2d(3, network.bn1.num_features, 3, padding=1, bias=False)
    network.conv1.apply(kaiming_init)
    network.maxpool = nn.Identity()
    return network


CIFAR_NETWORKS = {
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(cifar_resnet, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    "ResNet50": lambda: small_stem(torchvision.models.resnet50(num_classes=10)),
    **{f"wrn_{depth}_{width}": partial(wide_resnet, depth, width) for depth in (16, 40) for width in (1, 2)},
    "vgg8": partial(cifar_vgg, [64, "M", 128, "M", 256, "M", 512, 512]),
    **{name: partial(cifar_vgg, torchvision.models.vgg.cfgs[row])
       for name, row in {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}.items()},
    "MobileNetV2": cifar_mobilenet_v2,
    "ShuffleV1": partial(stage_network, ShuffleV1Block, (24, 240, 480, 960), (4, 8, 4), 1, 2, "linear"),
    "ShuffleV2": shuffle_v2,
}  # fmt: skip


def widened_resnet50(times):
    """SwAV's ResNet-50 with so many times the channels in every layer; torchvision's are wide inside blocks only."""
    block = type("Bottleneck", (torchvision.models.resnet.Bottleneck,), {"expansion": 4 * times})
    network = torchvision.models.ResNet(block, [3, 4, 6, 3], width_per_group=64 * times)
    network.conv1 = nn.Conv2d(3, 64 * times, 7, 2, 3, bias=False)
    network.bn1 = nn.BatchNorm2d(64 * times)
    network.layer1[0].conv1 = nn.Conv2d(64 * times, 64 * times, 1, bias=False)
    network.layer1[0].downsample[0] = nn.Conv2d(64 * times, 256 * times, 1, bias=False)
    return network.apply(kaiming_init)


class Depthwise(nn.Conv2d):
    """A depthwise convolution without bias that computes maps of at most 3x3 pixels as matrix products on the CPU."""

    def forward(self, x):
        size = x.shape[2:]
        if x.device.type != "cpu" or max(size) > 3:
            return super().forward(x)
        pixels = torch.eye(size.numel(), dtype=x.dtype).unflatten(1, (1, *size))
        matrices = F.conv2d(pixels, self.weight, None, self.stride, self.padding, self.dilation)  # of each pixel
        return torch.einsum("ncp,pchw->nchw", x.flatten(2), matrices)


def speed_up_depthwise(network):
    """Make depthwise convolutions `Depthwise`, in place, for CPUs without AVX-512.

    There oneDNN takes the gradients of their weights on small maps image by image and channel by channel, which is half
    of the time of a step of MobileNetV3 on 24 pixels.
    """
    for module in network.modules():
        depthwise = isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels
        if depthwise and module.bias is None:
            module.__class__ = Depthwise


# torchvision's classification networks and their numbers of parameters, with classifiers of 1000 classes; not those
# whose files do not tell all: GoogLeNet, Inception (how images are transformed) and MNASNet (its version)
PARAMETERS = {name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
              for name in torchvision.models.list_models(module=torchvision.models)
              if not name.startswith(("googlenet", "inception", "mnasnet"))}  # fmt: skip
LARGE_NETWORKS = {name: partial(torchvision.models.get_model, name) for name in PARAMETERS}
LARGE_NETWORKS |= {f"resnet50w{times}": partial(widened_resnet50, times) for times in (2, 4, 5)}
LARGE_NETWORKS["resnet26"] = partial(torchvision.models.ResNet, torchvision.models.resnet.Bottleneck, [2, 2, 2, 2])
PARAMETERS |= {"resnet26": 15_995_176, "resnet50w2": 98_004_072, "resnet50w4": 383_571_176, "resnet50w5": 596_691_240}
NETWORK_NAMES = list({**CIFAR_NETWORKS, **LARGE_NETWORKS})


def build_backbone(arch, image_size=224, init=None):
    """A network without its classifier: (N, 3, H, W) -> features (N, feature_dim).

    Keys are torchvision's. Features are the classifier's input. Dropout and stochastic depth are off, as in the papers.
    At 32 pixels and less torchvision's ResNets get a 3x3 stem, and vgg11 to vgg19 are CIFAR's. Weights are random, or
    those of `init`, a file or "torchvision" as in `load_teacher`.
    Raises UserError for an unknown name, for images that are too small and for a file that does not fit.
    """
    if arch not in NETWORK_NAMES:
        close = " or ".join(difflib.get_close_matches(arch, NETWORK_NAMES, cutoff=0))
        raise UserError(f"unknown network {arch}, not one of torchvision's or CIFAR's: did you mean {close}?")
    small = image_size <= 32
    networks = {**LARGE_NETWORKS, **CIFAR_NETWORKS} if small else {**CIFAR_NETWORKS, **LARGE_NETWORKS}
    # A transformer of whole patches: where they do not divide the image, check_input_size refuses it
    options = {"image_size": image_size - image_size % int(arch[-2:])} if arch.startswith("vit_") else {}
    network = networks[arch](**options)
    if small and isinstance(network, torchvision.models.ResNet):
        small_stem(network)
    if small and torch.backends.cpu.get_cpu_capability() == "AVX2":
        speed_up_depthwise(network)
    remove_classifier(network)
    if not next(network.parameters()).is_meta:
        check_input_size(network, arch, image_size)
    if init:
        start, _, _, about = load_backbone(init, arch, image_size)
        load_strict(network, start.state_dict(), f"{init} as {arch}")
        say(f"starting from the backbone of {about['description']}; from now on normalised as those of --data")
    network.image_size = image_size
    return network


def remove_classifier(network):
    """Turn the last layer into the identity, dropout and stochastic depth off; sets classifier_name and feature_dim."""
    for module in network.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    network.classifier_name = layers[-1]
    network.feature_dim = network.get_submodule(layers[-1]).weight.shape[1]
    network.set_submodule(layers[-1], nn.Identity())


@torch.no_grad()
def check_input_size(network, name, image_size, option="--image-size"):
    """Raise UserError where the network does not take images of this size."""
    training = network.training
    try:
        network.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"{name} does not take images of {image_size} pixels ({why}): pass another {option}") from None
    network.train(training)


def mlp_head(in_dim, hidden_dim, out_dim):
    """MoCo v2's projection head: (N, in_dim) -> (N, out_dim) through one hidden layer."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))


class Encoder(nn.Sequential):
    """Backbone and projection head: images (N, 3, H, W) -> embedding (N, dim), not normalised, always float32.

    `amp` (None, torch.bfloat16 or torch.float16) is the precision inside. name: the attribute that the head becomes.
    mean_std: what the backbone's images are normalised with (None: anything). description: of what it was read from.
    """

    def __init__(self, backbone, head, name="head", mean_std=None, description=None):
        super().__init__(OrderedDict({"backbone": backbone, name: head}))
        self.amp, self.mean_std, self.description = None, mean_std, description
        widths = [module.out_features for module in head.modules() if isinstance(module, nn.Linear)]
        self.dim = widths[-1] if widths else backbone.feature_dim
        self.convert_from(CIFAR_MEAN_STD if mean_std == CIFAR_MEAN_STD else IMAGENET_MEAN_STD)

    def convert_from(self, mean_std):
        """Set the normalisation that images come with, to convert it (before: CIFAR's for its own, else ImageNet's)."""
        (mean, std), (own_mean, own_std) = torch.tensor([mean_std, self.mean_std or mean_std])[..., None, None]
        shift_scale = torch.stack([mean - own_mean, std]) / own_std
        equal = self.mean_std in (None, mean_std)  # then nothing is computed
        device = next(self.parameters(), shift_scale).device
        self.register_buffer("shift_scale", None if equal else shift_scale.to(device), persistent=False)

    def without_head(self):
        """This encoder, with its features as embedding."""
        self[1], self.dim = nn.Identity(), self.backbone.feature_dim
        return self

    def forward(self, images):
        return self.features_and_output(images)[1]

    def features_and_output(self, images):
        """Features (N, feature_dim) of the backbone, and the head's output, both float32."""
        images = images if self.shift_scale is None else self.shift_scale[0].addcmul(images, self.shift_scale[1])
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            features = self.backbone(images)
            return features.float(), self[1](features).float()

    @torch.no_grad()
    def features(self, images):
        """Features (N, feature_dim) of the backbone, float32, without gradient."""
        return self.features_and_output(images)[0]


# ---------------------------------------------------------------------------------------------------- Files of networks

# Where files keep what: patterns of the beginnings of each part's keys ("(?!)": none); other keys are not read. A file
# is of the first format whose recognised_by its keys have, also behind a prefix, which is removed. activation: a head's
FileFormat = namedtuple("FileFormat", "written_by recognised_by backbone head classifier activation",
                        defaults=("(?!)", "(?!)", nn.ReLU))  # fmt: skip
FILE_FORMATS = (
    FileFormat("moco_v2.py", r"encoder\.backbone\.", "encoder.backbone.", "encoder.head."),
    FileFormat("disco.py, seed.py, sskd.py", r"student\.backbone\.", "student.backbone.", "student.head.",
               "student.classifier."),
    FileFormat("MoCo v1 and v2, DisCo", r"encoder_q\.", "encoder_q.", "encoder_q.fc."),
    FileFormat("SEED", r"student\.fc\.", "student.", "student.fc."),
    FileFormat("SwAV, DeepCluster-v2, SeLa-v2", r"projection_head\.(\d|weight)", "", "projection_head.", "prototypes."),
    FileFormat("MoCo v3", r"base_encoder\.(fc|head)\.", "base_encoder.", "base_encoder.(fc|head)."),
    FileFormat("DINO, iBOT, DINOv2", r"(dino_)?head\.mlp\.", "backbone.", "(dino_)?head.mlp.", activation=nn.GELU),
    FileFormat("SimCLR, SimSiam", r"(backbone|encoder)\.fc\.0\.", "(backbone|encoder).", "(backbone|encoder).fc."),
    FileFormat("bare and labelled networks of torchvision, timm, Hugging Face, CRD, SSKD, or a backbone.pth", "", ""),
)  # fmt: skip
# What wraps a state dict, the best first: averaged weights, and of DINO's two networks the teacher
WRAPPERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema", "teacher", "target_encoder",
            "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "encoder", "backbone",
            "student", "params", "weights", "classy_state_dict", "base_model", "trunk")  # fmt: skip

# How a backbone's keys become torchvision's, row by row. It is of the first kind whose recognised_by is one of them;
# what is in front of that is left out. config: patterns of the only values that config.json may have.
KeyTable = namedtuple("KeyTable", "recognised_by config rows", defaults=({}, ()))
TRANSFORMER = KeyTable(r"(embeddings\.)?cls_token|class_token",  # DINO to DINOv2, timm, HF
                       {"hidden_act": "gelu", "act_layer": "gelu", "global_pool": "token"}, (
    (r"^embeddings\.(patch_embed)dings\.", r"\1."), (r"^embeddings\.", ""),
    (r"^cls_token$", "class_token"), (r"^reg_token$", "register_tokens"),
    (r"^(pos_embed|position_embeddings)$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj(ection)?\.(weight|bias)$", r"conv_proj.\2"),
    (r"^(blocks|encoder\.layer|layers)\.(\d+\.)?(\d+)\.", r"encoder.layers.encoder_layer_\3."),  # DINOv2: in chunks
    (r"\.((ls|layer_scale)1\.\w+|gamma_1)$", ".attn.proj.scale"),
    (r"\.((ls|layer_scale)2\.\w+|gamma_2)$", ".mlp.fc2.scale"),
    (r"\.(norm1|ln1|layernorm_before)\.", ".ln_1."), (r"\.(norm2|ln2|layernorm_after)\.", ".ln_2."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attention\.(?:attention\.)?([qkv])(?:_proj|uery|ey|alue)\.(.*)", r".self_attention.in_proj_\2.\1"),
    (r"\.(attn\.proj|attention\.output\.dense|attention\.o_proj)\.", ".self_attention.out_proj."),
    (r"\.(mlp\.fc1|mlp\.linear_1|ffn\.layers\.0\.0|intermediate\.dense)\.", ".mlp.0."),
    (r"\.(mlp\.fc2|mlp\.linear_2|ffn\.layers\.1|output\.dense)\.", ".mlp.3."),
    (r"^(norm|ln1|layernorm)\.", "encoder.ln."), (r"^(head|classifier)\.(weight|bias)$", r"heads.head.\2"),
))  # fmt: skip
CONVNEXT = KeyTable(r"stages\.0\.blocks\.0\.conv_dw\.weight|embeddings\.patch_embeddings\.weight|(model\.)?stages\.0\."
                    r"downsample_layers\.0\.weight|downsample_layers\.0\.0\.weight",
                    {"hidden_act": "gelu", "act_layer": "gelu", "global_pool": "avg", "output_stride": "32"}, (
    (r"^((model|encoder)\.|norms\..*)", ""),
    (r"^embeddings\.patch_embeddings\.", "stem.0."), (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^(stem|downsample_layers\.0|stages\.0\.downsample_layers)\.", "features.0."),
    (r"^(stages|downsample_layers)\.(\d)\.(downsampl\w+\.)?(?=\d\.[wb]\w+$)", lambda m: f"features.{2 * int(m[2])}."),
    (r"^stages\.(\d)\.(blocks\.|layers\.)?(\d+)", lambda m: f"features.{2 * int(m[1]) + 1}.{m[3]}.block"),
    (r"\.block\.(gamma|layer_scale_parameter)$", ".layer_scale"),
    (r"\.block\.(conv_dw|dwconv|depthwise_conv)\.", ".block.0."),
    (r"\.block\.(norm|layernorm|layer_norm)\.", ".block.2."),
    (r"\.block\.(mlp\.fc|pwconv|pointwise_conv)([12])\.", lambda m: f".block.{2 * int(m[2]) + 1}."),
    (r"^(head\.norm|norm3?|layernorm|layer_norm)\.", "classifier.0."),
    (r"^(head\.fc|head|classifier)\.(weight|bias)$", r"classifier.2.\2"),
))  # fmt: skip
CONVOLUTIONAL = {"act_layer": "relu", "global_pool": "avg", "output_stride": "32",
                 **dict.fromkeys(("architecture", "arch"), "(?!resnet(aa|blur)|vit|deit).*")}  # fmt: skip
RESNET = KeyTable(  # Hugging Face; layers by number; those with shortcuts are of kuangliu's, CRD's ResNet50 among them
    r"embedder\.embedder\.convolution\.weight|7\.0\.conv1\.weight|layer2\.0\.shortcut\.0\.weight",
    {**CONVOLUTIONAL, "hidden_act": "relu",
     **dict.fromkeys(("downsample_in_bottleneck", "downsample_in_first_stage"), "False")}, (
    (r"^(0|embedder\.embedder\.convolution)\.", "conv1."), (r"^(1|embedder\.embedder\.normalization)\.", "bn1."),
    (r"^([4-7])\.", lambda m: f"layer{int(m[1]) - 3}."),
    (r"^encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.(conv)?\w+\.", lambda m: f".{m[2] or 'bn'}{int(m[1]) + 1}."), (r"^classifier\.1\.", "fc."),
    (r"\.shortcut\.(0|convolution)\.", ".downsample.0."), (r"\.shortcut\.(1|normalization)\.", ".downsample.1."),
    (r"^linear\.", "fc."),
))  # fmt: skip
PLAIN = KeyTable(r"(conv1|features|stem|block0)(\.conv0|\.0)*\.weight", CONVOLUTIONAL, (
    (r"(denselayer\d+\.(?:norm|conv))\.(?=\d\.)", r"\1"), (r"^fc\.1\.", "fc."),  # old files; behind a dropout
))  # fmt: skip
KEY_TABLES = TRANSFORMER, CONVNEXT, RESNET, PLAIN
# Parts of config.json that describe a network, too
CONFIG_PARTS = ("model_args", "pretrained_cfg", "default_cfg", "vision_config", "backbone_config", "image_config",
                "encoder")  # fmt: skip
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
               "BOOL": torch.bool}  # fmt: skip
# What the pickle of a numpy scalar calls, none of it code of the file; numpy 1 had the other name
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
SAFE_GLOBALS = [*((NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")), np.dtype,
                _codecs.encode, *(type(np.dtype(code)) for code in "?bhilqBHILQefdg")]  # fmt: skip
EXPORT = "export it and pass FILE.pt2, see docs/teachers.md"


def weights_file(path):
    """The file of weights in a folder of timm or Hugging Face; else the path itself."""
    files = Path(path, "model.safetensors"), Path(path, "pytorch_model.bin")
    return next((file for file in files if file.is_file()), path)


def load_file(path, whole=False):
    """Read tensors and plain values of a checkpoint or safetensors onto the CPU, or raise UserError.

    The content tells which it is. whole: check all bytes before.
    """
    start = b""
    if re.search(r"-\d{5}-of-\d{5}\.", str(path)):
        raise UserError(f"{path} is one of several parts: join them with save_pretrained(max_shard_size='99GB')")
    try:
        with open(path, "rb") as file:
            start = file.read(50)
        if start[8:9] == b"{" or str(path).endswith(".safetensors"):
            return load_safetensors(bytearray(Path(path).read_bytes()))
        if whole and (changed := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"wrong checksum of {changed}")
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder without model.safetensors or pytorch_model.bin: pass its file, and "
                        "join one in parts with save_pretrained(max_shard_size='99GB')") from None  # fmt: skip
    except Exception as error:
        known = {"git-lfs": "a pointer of git-lfs: fetch the file itself with git lfs pull",
                 "TorchScript": "a TorchScript program: load it in Python and save its state_dict()",
                 "weights_only": "neither a file of torch.save nor safetensors"}  # fmt: skip
        why = next((known[sign] for sign in known if sign in f"{start}{error}"), str(error).partition("\n")[0])
        if code := re.search(r"GLOBAL (\S+)", str(error)):  # of torch's message about objects
            why = f"{code[1]} could run code: save the state dict alone"
        raise UserError(f"{path} is not a readable checkpoint ({why})") from None


def load_safetensors(content):
    """Tensors of a file's bytes: 8 with the length of the header, the header in JSON, and the data, little-endian."""
    start, state = 8 + int.from_bytes(content[:8], "little"), {}
    try:
        header, data = json.loads(content[8:start]), torch.frombuffer(content, dtype=torch.uint8)[start:]
        header.pop("__metadata__", None)
        for key in header:
            part = data[slice(*header[key]["data_offsets"])].clone()  # shorter than its shape where the file ends
            state[key] = part.view(SAFETENSORS[header[key]["dtype"]]).view(header[key]["shape"])
        return state
    except Exception as error:
        raise ValueError(f"safetensors that are cut off or damaged: {error}") from None


def load_teacher(path, arch=None, image_size=None, trust=False, mean_std=None):
    """Read a network with its projection head, frozen and in eval mode.

    path: a file of any format in `FILE_FORMATS`, or a folder of timm or Hugging Face; "torchvision" for its labelled
    weights of `arch`, fetched where missing; or, with `trust`, a .pt2 program of torch.export. The architecture is read
    from the file; `arch` insists on one. image_size: of a vision transformer (default: the file's own). mean_std: see
    `describe`. Returns an Encoder; without a head in the file its embedding is the features. Raises UserError for a
    file that fits nothing or only in part.
    """
    if not str(path).endswith(".pt2"):
        backbone, head, _, about = load_backbone(path, arch, image_size, mean_std)
    elif trust:
        backbone, head = Program(path, image_size), nn.Identity()
        what = "a program" + ", whose 1000 numbers look like logits," * (backbone.feature_dim == 1000)
        about = describe(path, what, backbone, {}, mean_std)
    else:
        raise UserError(f"{path} is a program, which can run any code: pass --trust-teacher if you trust its author")
    return Encoder(backbone, head, **about).requires_grad_(False).eval()


def load_backbone(path, arch, image_size=None, mean_std=None):
    """The backbone and the head of a file, with their weights, the state dict of its classifier, and `describe`'s dict.

    backbone.image_size is `image_size`, or else the size that the network was trained at, as far as it is known.
    """
    file = "" if path == "torchvision" else weights_file(path)
    checkpoint = load_file(file) if file else torchvision_weights(arch)
    file_format, table, parts, source = split_state(path, checkpoint)
    state, head, classifier = parts["backbone"], parts["head"], parts["classifier"]
    beside = settings_beside(file)
    beside |= {key: checkpoint[key] for key in ("image_size", "mean_std", "arch") if key in checkpoint}
    for key in table.config.keys() & beside.keys():
        if beside[key] is not None and not re.fullmatch(table.config[key], str(beside[key])):
            raise UserError(f"{path} is of {key} {beside[key]}, which is not known here: {EXPORT}")
    if not arch and checkpoint.get("arch") in NETWORK_NAMES:
        arch = checkpoint["arch"]
    arguments = beside.get("arguments")
    data = arguments.get("data") if isinstance(arguments, dict) else None  # of runs that kept no mean_std
    if table is TRANSFORMER and (not arch or arch.startswith("vit_")):
        name, backbone, state = build_transformer(path, state, beside, image_size, file_format.written_by == "MoCo v3")
    else:
        name, backbone, state = infer_arch(path, state, arch)
        data = data or "cifar" * (name in CIFAR_NETWORKS and backbone.image_size == 32)
        size = image_size or beside.get("image_size")
        backbone.image_size = size if isinstance(size, int) else backbone.image_size
    if name.startswith("convnext"):
        default = 1e-12 if beside.get("model_type") == "convnext" else 1e-6  # the first in Hugging Face's own
        backbone.classifier[0].eps = beside.get("layer_norm_eps", default)
    for key in {f"{backbone.classifier_name}.weight", f"{backbone.classifier_name}.bias"} & state.keys():
        classifier[key.rpartition(".")[2]] = state.pop(key)
    for key, value in [*state.items(), *head.items(), *classifier.items()]:
        if not value.isfinite().all():
            raise UserError(f"{path} holds weights that are not finite ({key})")
    load_strict(backbone, state, f"{path} as {name}", assign=True, advice=f"; for another network, {EXPORT}")
    widths = [len(value) for value in head.values() if value.ndim == 2]
    what = name + source + (f", embedding of {widths[-1]} of its head" if widths else ", no head")
    usual = ((0.5,) * 3,) * 2 if name == "efficientnet_v2_l" else IMAGENET_MEAN_STD
    usual = CIFAR_MEAN_STD if str(data).startswith("cifar") else usual
    about = describe(path, what, backbone, beside, mean_std, usual)
    return backbone, build_head(path, head, file_format.activation), classifier, about


def settings_beside(file):
    """Values of config.json and preprocessor_config.json beside a file, of our runs, timm or Hugging Face, a dict."""
    found = {}
    for name in ("config.json", "preprocessor_config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            content = json.loads(Path(file).with_name(name).read_text(encoding="utf-8-sig"))
            for part in (content, *map(content.get, CONFIG_PARTS)):
                found |= part if isinstance(part, dict) else {}
    return found


def describe(path, what, backbone, beside, given=None, usual=IMAGENET_MEAN_STD):
    """{"mean_std", "description"} of an Encoder: what its images are normalised with, and a line about what was read.

    The numbers are `given`, two or six, or those of the files beside it, or the usual ones.
    """
    pairs = [(beside.get(f"{kind}mean"), beside.get(f"{kind}std")) for kind in ("image_", "")]
    plain = ((0.0,) * 3, (1.0,) * 3) if beside.get("do_normalize") is False else None
    numbers = next(x for x in (given, beside.get("mean_std"), plain, *pairs, usual) if x and None not in x)
    try:
        mean, std = parse_mean_std(numbers)
    except (ValueError, TypeError):
        raise UserError(f"{path}: {numbers} cannot normalise images in [0, 1]: pass --teacher-mean-std with the means "
                        "of red, green and blue and the deviations, or one of each") from None  # fmt: skip
    origin = "--teacher-mean-std" if given else "assumed" if numbers is usual else "read"
    digits = " / ".join(" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    line = f"{path}: {what}, features of {backbone.feature_dim}, images normalised by {digits} ({origin})"
    return {"mean_std": (mean, std), "description": line}


def torchvision_weights(arch):
    """torchvision's labelled weights, fetched where missing, in the form of a file."""
    try:
        network = LARGE_NETWORKS[arch](weights="DEFAULT", progress=rank() == 0)
        return {"state_dict": network.state_dict(), "image_size": 224}
    except Exception as error:  # of any type where a file is damaged
        raise UserError(f"torchvision has no weights for {arch} ({error}): pass --teacher-arch or --arch, or remove "
                        f"a damaged file from {torch.hub.get_dir()}") from None  # fmt: skip


def split_state(path, checkpoint):
    """A file's format, its backbone's table, {"backbone", "head", "classifier": state dict}, and where they were."""
    state = checkpoint if isinstance(checkpoint, dict) else {}
    places, parts = [], {}

    def holds_weights(part):
        kinds = part.items() if isinstance(part, dict) else ()
        return any(getattr(x, "ndim", 0) > 0 or (name in WRAPPERS and holds_weights(x)) for name, x in kinds)

    while wrapper := next((name for name in WRAPPERS if holds_weights(state.get(name))), None):
        state = state[wrapper]
        places.append(wrapper)
    state = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor) and key != "n_averaged"}
    if not state:
        raise UserError(f"{path} holds no network's weights")
    # DataParallel, torch.compile and FSDP put these anywhere in front of a key, several times
    added = r"(^|\.)((module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.)+"
    state = {re.sub(added, r"\1", key): value for key, value in state.items()}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    file_format, outer = recognise(FILE_FORMATS, state)
    for part in ("head", "classifier", "backbone"):  # in this order: the backbone's prefix may begin the others, too
        start = re.escape(outer) + getattr(file_format, part).replace(".", r"\.")
        keys = [key for key in state if re.match(start, key)]
        parts[part] = {re.sub(start, "", key, count=1): state.pop(key) for key in keys}
    table, prefix = recognise(KEY_TABLES, parts["backbone"], "$")
    backbone = {}
    for key, value in parts["backbone"].items():
        label = re.fullmatch(r"(|.*\.)(classifier|head|fc)(\.1|\.fc)?\.(weight|bias)", key)
        if label and not key.startswith(prefix) and prefix.startswith(label[1]):  # a classifier beside the backbone
            whole = sum(other.startswith(f"{label[1]}{label[2]}.") for other in parts["backbone"]) <= 2
            parts["classifier"] |= {label[4]: value} if whole else {}
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            for pattern, name in table.rows:
                key = re.sub(pattern, name, key)
            backbone[key] = value[:, None, None] if key.endswith("layer_scale") and value.ndim == 1 else value
    backbone.pop("", None)
    place = ".".join([*places, outer + prefix]).strip(".")
    average = "averaged (EMA) " * bool(re.search(r"(^|[._])ema", place))
    return file_format, table, parts | {"backbone": backbone}, f", {average}weights of {place}" * bool(place)


def recognise(kinds, state, end=""):
    """The first of some formats or tables that the keys of a state dict fit, and what stands in front of them there."""
    for kind in kinds:
        found = {match[1] for key in state if (match := re.match(rf"(|.*?\.)({kind.recognised_by}){end}", key))}
        # A whole network and no part of one; of several the teacher's, and not the average that a student has
        found = [prefix for prefix in found if 5 * sum(key.startswith(prefix) for key in state) >= len(state)]
        orders = r"(^|[._])(teacher|ema)", r"^(?!.*(momentum|target))"
        if found:
            return kind, max(found, key=lambda prefix: ([bool(re.search(o, prefix)) for o in orders], -len(prefix)))
    return kinds[-1], ""


def build_head(path, state, activation=nn.ReLU):
    """The head of a file: a linear layer, or an MLP, which may have BatchNorm or LayerNorm; the identity for none."""
    if state.keys() == {"weight", "bias"}:
        head = nn.Linear(state["weight"].shape[-1], len(state["weight"]))
    else:  # keys begin with places in a Sequential; a place without weights is an activation
        head = nn.Sequential()
        places = [int(key.partition(".")[0]) for key in state if key.partition(".")[0].isdecimal()]
        for place in range(max(places, default=-1) + 1):
            weight, mean = state.get(f"{place}.weight"), state.get(f"{place}.running_mean")
            if mean is not None:
                head.append(nn.BatchNorm1d(len(mean), affine=weight is not None))
            elif weight is not None and weight.ndim == 1:
                head.append(nn.LayerNorm(len(weight)))
            elif weight is not None:
                head.append(nn.Linear(weight.shape[-1], len(weight), bias=f"{place}.bias" in state))
            else:
                head.append(activation())
    load_strict(head, state, f"head of {path}", assign=True)
    return head


def build_transformer(path, state, beside, image_size=None, moco_v3=False):
    """A name, torchvision's VisionTransformer on the meta device for a state dict of any origin, and the dict for it.

    LayerScale (DINOv2) is multiplied into the layer before it; registers become class tokens without a position.
    Positions are interpolated where image_size is not the file's, as DINO, DINOv2, timm or Hugging Face do.
    """
    state = {key: value for key, value in state.items() if not key.startswith(("mask", "decoder", "pooler"))}
    split = [key.removesuffix(".q") for key in state if key.endswith(".q")]  # Hugging Face's queries, keys and values
    try:
        positions = state["encoder.pos_embedding"]
        width, _, patch, _ = state["conv_proj.weight"].shape
        grid = math.isqrt(positions.shape[1])
        bare = positions.shape[1] == grid**2  # timm's, where the class token has no position
        positions = F.pad(positions, (0, 0, int(bare), 0))
        first, rest = positions.split([1, grid**2], dim=1)
        for key in split:
            state[key] = torch.cat([state.pop(f"{key}.{part}") for part in "qkv"])
        hidden = len(state["encoder.layers.encoder_layer_0.mlp.0.weight"])
        known = beside.get("num_attention_heads") or beside.get("num_heads")
        if beside.get("hidden_size") not in (None, width):
            raise UserError(f"{path} has {width} dimensions, config.json beside it {beside['hidden_size']}: move one")
        heads = int(known or 0) or {1280: 16, 1408: 16, 1664: 16, 384: 12 if moco_v3 else 6}.get(
            width, max(1, width // 64)
        )
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads of {width} dimensions")
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{path} is unlike torchvision's VisionTransformer in {error}, as with SwiGLU, a convolutional "
                        f"stem, two class tokens, relative or rotary positions: {EXPORT}") from None  # fmt: skip
    layers = [key.removesuffix(".scale") for key in state if key.endswith(".scale")]
    vit = split and not layers and beside.get("model_type") != "vit_msn"  # Hugging Face's ViT and MAE
    for layer in layers:
        scale = state.pop(f"{layer}.scale")
        for key in {f"{layer}.weight", f"{layer}.bias"} & state.keys():
            state[key] = torch.einsum("o,o...->o...", scale, state[key])
    registers = state.pop("register_tokens", torch.empty(1, 0, width))
    if (image_size or 0) % patch:
        raise UserError(f"{path}: patches of {patch} pixels do not divide images of {image_size}: change --image-size")
    size = image_size // patch if image_size else grid
    if size != grid:
        how = {"size": (size, size), "antialias": registers.numel() > 0 or bare or "architecture" in beside}
        if not split and not how["antialias"]:
            how = {"scale_factor": (size + 0.1) / grid}
        rest = rest.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        rest = F.interpolate(rest, mode="bicubic", **how).flatten(2).transpose(1, 2)
    state["encoder.pos_embedding"] = torch.cat([first, torch.zeros_like(registers), rest], dim=1)
    state["class_token"] = torch.cat([state["class_token"], registers], dim=1)

    depth = sum(key.endswith(".ln_1.weight") for key in state)
    norm = partial(nn.LayerNorm, eps=float(beside.get("layer_norm_eps") or (1e-12 if vit else 1e-6)))
    with torch.device("meta"):
        size = size * patch
        network = torchvision.models.VisionTransformer(size, patch, depth, heads, width, hidden, norm_layer=norm)
        network.class_token = nn.Parameter(torch.empty(state["class_token"].shape))
        network.encoder.pos_embedding = nn.Parameter(torch.empty(state["encoder.pos_embedding"].shape))
    remove_classifier(network)
    origin = "config.json" if known else "a guess from the width"
    return f"a vision transformer of {depth} blocks, {heads} heads ({origin})", network, state


class Program(nn.Module):
    """A program of torch.export from a file, as a frozen backbone: images (N, 3, H, W) -> features (N, feature_dim).

    Raises UserError unless it takes any number of images of `image_size` (default: the size that it was exported at).
    """

    def __init__(self, path, image_size=None):
        super().__init__()
        logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it repeats what is raised
        try:
            self.program = torch.export.load(path)
            for node in list(self.program.graph.nodes):
                if node.target is torch.ops.aten._assert_tensor_metadata.default:
                    self.program.graph.erase_node(node)  # it checks the precision, which autocast changes
            self.image_size = image_size or self.program.example_inputs[0][0].shape[-1]
            self.to("cpu")
            _, self.feature_dim = self(torch.zeros(3, 3, self.image_size, self.image_size)).shape
        except Exception as error:
            reason = (str(error) or type(error).__name__).partition("\n")[0]
            raise UserError(f"{path} is not a program that turns any number of images of --image-size into features "
                            f"(N, D) ({reason}): export it with a dynamic batch, at this size, in a wrapper that "
                            "returns one tensor") from None  # fmt: skip

    def forward(self, images):
        return self.network(images.contiguous())  # in the layout that it was exported with

    def train(self, mode=True):
        """Nothing: a program keeps the mode that it was exported in, and its own `train` raises."""
        return self

    def _apply(self, function, recurse=True):
        """Move the program with its constants and operations to another device; its precision stays."""
        device = function(torch.empty(0)).device
        self.network = move_to_device_pass(self.program, device).module().requires_grad_(False)
        return self


def infer_arch(path, state, arch=None):
    """Name of the network that a state dict fits best, its backbone on the meta device, and the dict with its keys.

    Raises UserError where no network has similar shapes. CRD's keys become those of `CIFAR_NETWORKS`, in their order.
    """
    # The last matrix of this name is a classifier of any number of classes, or there is none
    count = sum(value.numel() for value in state.values())
    matrices = [key for key in state if re.match("classifier|fc|head|linear", key) and state[key].ndim == 2]
    classes, width = state[max(matrices)].shape if matrices else (1000, 0)
    counts = count, count + (1000 - classes) * width
    near = sorted(PARAMETERS, key=lambda name: min(abs(PARAMETERS[name] - n) for n in counts))[:12]
    regnet = any("trunk_" in key for key in state)
    kernel = min((state[key].shape[-1] for key in state if re.fullmatch(PLAIN.recognised_by, key)), default=7)
    size = 32 if "conv1.weight" in state and kernel == 3 else 224
    trials = [(name, size) for name in near if ("regnet" in name) == regnet]
    trials += [(name, 32) for name in CIFAR_NETWORKS if kernel <= 3]
    crd = any(re.match(r"block0\.0\.|blocks\.0\.|linear\.", key) for key in state)
    best = -1
    for name, image_size in [(arch, size), (arch, 32)] if arch else trials:
        with torch.device("cpu" if "regnet" in name else "meta"):  # RegNets compute their widths with real tensors
            backbone = build_backbone(name, image_size)
        expected = {key: value.shape for key, value in backbone.state_dict().items()}
        renamed = state
        classifier = [f"{backbone.classifier_name}.weight", f"{backbone.classifier_name}.bias"]
        pairs = list(zip([*expected, *classifier], state, strict=False))
        kinds = all(ours.rpartition(".")[2] == key.rpartition(".")[2] for ours, key in pairs)  # weight, bias, ...
        if crd and kinds and len(state) - len(expected) in (0, 2) and not expected.keys() <= state.keys():
            renamed = {ours: state[key] for ours, key in pairs}
        shapes = {key: value.shape for key, value in renamed.items() if key not in classifier}
        same = len(expected.items() & shapes.items()) / max(len(expected), len(shapes))
        if same > best:
            best, found = same, (name, backbone, renamed)
        if same == 1:
            break
    if best <= 0.5 and not arch:
        some = ", ".join(f"{key} {list(value.shape)}" for key, value in list(state.items())[:3])
        known = "; ".join(file_format.written_by for file_format in FILE_FORMATS)
        raise UserError(f"{path} fits no network known here (it begins with {some}): {EXPORT}; these files are read: "
                        f"{known}")  # fmt: skip
    return found


def load_strict(module, state, what, assign=False, advice=""):
    """Load a state dict, with `assign` without a copy; raises UserError, naming keys, where it does not fit."""
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise UserError(f"{what} does not fit: {textwrap.shorten(str(error), 400)}{advice}") from None


# ------------------------------------------------------------------------------------------------------------- Features

KNN_BLOCKS = 256, 8192  # queries of all processes, and training images of this one, that are compared at a time


@torch.no_grad()
def extract_features(encoder, dataset, image_size, batch_size, workers, device):
    """Features of the centre crops of this process's share of the images, and the labels of all images.

    Returns features (share, feature_dim) and labels (world_size * share,): rank r has the features of images r * share
    to (r + 1) * share - 1. Images that cannot be read have the label -1. All use the weights of rank 0.
    batch_size: over all processes. Raises UserError if no image can be read.
    """
    if world_size() > 1:
        for values in (*encoder.parameters(), *encoder.buffers()):  # another machine's file may be another
            dist.broadcast(values, 0)
    share = -(-len(dataset) // world_size())
    numbers = range(len(dataset))[rank() * share :][:share]
    batches = BatchSampler(numbers, max(1, batch_size // world_size()), drop_last=False)
    loader = make_dataloader(CenterCrops(dataset, image_size), batches, workers, device)
    features = torch.zeros(share, encoder.backbone.feature_dim, device=device)
    labels = torch.full((share,), -1, device=device)
    training = encoder.training
    encoder.eval()
    start, finite = 0, torch.tensor(True, device=device)
    for (images,), targets in to_device(loader, device):
        own = slice(start, start := start + len(targets))
        features[own], labels[own] = encoder.features(normalize(images, mean_std_of(dataset))), targets
        finite &= features[own].isfinite().all()
    encoder.train(training)
    labels = gather(labels)
    if (labels < 0).all():
        name, reason = min(UNREADABLE.items(), default=("", ""))
        raise UserError(f"none of {len(dataset)} images can be read, for one {name} ({reason})")
    if (labels >= len(dataset.classes)).any() or (in_memory(dataset) and (dataset.labels < 0).any()):
        raise UserError(f"a label is {labels.max()}: those of {len(dataset.classes)} classes begin at 0")
    if not finite:
        raise UserError("features are not finite: use --amp off, or another file of weights")
    return features, labels


def nearest_neighbours(train, queries, k):
    """The k training images of highest cosine similarity, nearest first: similarities and image numbers.

    train: features and labels from `extract_features`. queries: features (M, D); each process passes M of its own and
    gets their neighbours, (M, k) each. Among equal similarities the lower number comes first. Where fewer than k images
    can be read, the last similarities are -inf.
    """
    (features, labels), found = train, []
    norms = features.norm(dim=1).clamp(min=1e-12)
    numbers = own_rows(torch.arange(len(labels), device=labels.device))
    # Breaks ties: smaller than the rounding error of a similarity, so it is subtracted in float64.
    offsets = (numbers.double() * 2**-52).masked_fill(own_rows(labels) < 0, torch.inf)
    blocks = [x.split(KNN_BLOCKS[1]) for x in (features, norms, offsets, numbers)]  # a product can copy its factors

    def best(similarity, images):
        similarity, places = similarity.topk(min(k, similarity.shape[1]), dim=1)
        return similarity, images.expand(len(similarity), -1).gather(1, places)

    for own in queries.split(max(1, KNN_BLOCKS[0] // world_size())):
        everyones = F.normalize(gather(own), dim=1)
        candidates = [best((everyones @ rows.T).div_(norm) - offset, images[None])
                      for rows, norm, offset, images in zip(*blocks, strict=True)]  # fmt: skip
        candidates = best(*(torch.cat(parts, dim=1) for parts in zip(*candidates, strict=True)))
        # Candidates of all shares for the queries of this process: (world_size * m, k) -> (m, world_size * k)
        similarity, images = best(*(own_rows(gather_unshuffled(x).view(len(x), -1)) for x in candidates))
        found.append((similarity.float(), images))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def knn_accuracy(train, val, ks, num_classes, temperature=0.07):
    """Accuracies in percent of votes of the k nearest training images: {"knn": {k: ...}, "knn_weighted": {k: ...}}.

    train, val: features and labels from `extract_features`. A plain vote counts 1, a weighted one
    exp(similarity / temperature) (Wu et al., 2018), divided by that of the nearest image, so that it cannot overflow.
    Ties go to the class of the lower number.
    """
    similarity, numbers = nearest_neighbours(train, val[0], max(ks))
    labels, targets, right = train[1][numbers].clamp(min=0), own_rows(val[1]), []
    for weight in (similarity.isfinite().float(), ((similarity - similarity[:, :1]) / temperature).exp()):
        for k in ks:
            votes = weight.new_zeros(len(labels), num_classes).scatter_add_(1, labels[:, :k], weight[:, :k])
            right.append((votes.argmax(dim=1) == targets).sum())
    percent = 100 * all_reduce(torch.stack(right)).double() / (val[1] >= 0).sum()
    plain, weighted = (dict(zip(ks, row, strict=True)) for row in percent.view(2, -1).tolist())
    return {"knn": plain, "knn_weighted": weighted}


def knn_probe(encoder, args, sets, image_size, device):
    """A function that returns {"knn": 20-NN accuracy in percent} of an Encoder on a training and a validation set."""

    def evaluate():
        train, val = (extract_features(encoder, x, image_size, args.batch_size, args.workers, device) for x in sets)
        return {"knn": knn_accuracy(train, val, [20], len(sets[0].classes))["knn"][20]}

    return evaluate if sets else None


# ----------------------------------------------------------------------------------------------------------------- Runs

LOG_EVERY = 50  # steps; reading a loss waits for the device
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm and spot machines send them before they take a machine away
INPUTS = ("teacher", "init", "weights", "label_list")  # arguments that name files, of which the content counts
MAY_CHANGE_ON_RESUME = {"out", "data", "data_root", *INPUTS, "workers", "max_steps", "knn_every", "checkpoint_minutes",
                        "max_bad_images", "trust_teacher"}  # fmt: skip


@contextlib.contextmanager
def writing(path, mode="ab"):
    """Open a file; an error, as of a full disk, becomes a UserError."""
    try:
        with open(path, mode) as file:
            yield file
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error if isinstance(error, RuntimeError) else error  # torch.save hides it
        if not isinstance(cause, OSError) and "PytorchStreamWriter" not in str(error):
            raise
        raise UserError(f"cannot write {path} ({cause}): correct that, then run the same command again") from None


def save_from_cpu(content, file):
    """torch.save with all tensors moved to the CPU, so that a machine without a GPU can load the file."""
    torch.save(tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, content), file)


def atomic_write(path, write):
    """Call `write(file)` on a new file and move it to `path`, which is whole at any moment, even if the power fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def describe_files(names):
    """Hashes of the files that an argument names and of what is said beside them, a list; other words stay."""
    hashes = []
    for name in [names] if isinstance(names, str) else names or ():
        file = Path(weights_file(name))
        if file.is_file():
            settings = settings_beside(file)  # of a run, the checkpoint and the arguments hold what counts
            settings = {} if "script" in settings else settings
            digest = hashlib.sha256(file.read_bytes())
            digest.update(json.dumps(settings, sort_keys=True).encode())
            name = digest.hexdigest()[:16]
        hashes.append(name)
    return hashes


def identity(config):
    """What must be equal to continue a run: the inputs' content, and the arguments that change the result."""
    arguments = {name: value for name, value in config["arguments"].items() if name not in MAY_CHANGE_ON_RESUME}
    arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
    return json.loads(json.dumps({"script": config["script"], **arguments, **config["inputs"]}))


class Run:
    """A run's folder: config.json, log.jsonl, views.png, checkpoint.pth and backbone.pth. Only rank 0 uses it.

    The same command in the same folder continues where it stopped. Refused are other arguments, another content of the
    `datasets`, and another content of the files that the arguments of `INPUTS` name; these may lie anywhere.
    metadata: what else config.json and the checkpoints hold; `loaded` is printed, too.
    """

    def __init__(self, script, args, *datasets, **metadata):
        self.script, self.args, self.folder, self.metadata = script, args, Path(args.out), metadata
        self.step, self.epoch, self.lr = 0, 0, 0.0
        self.losses, self.named = [], set()  # since the last line of the log; unreadable images that it names
        self.unsaved, self.saved_at = False, time.monotonic()
        self.stop_signal, self.of, self.pid = 0, None, os.getpid()
        self.identity = None
        UNREADABLE.clear()
        for number in STOP_SIGNALS:
            signal.signal(number, self.stop)
        if rank() > 0:
            return
        inputs = {f"data {n}" if n else "data": describe_content(dataset) for n, dataset in enumerate(datasets)}
        inputs |= {name: describe_files(vars(args)[name]) for name in INPUTS if name in args}
        failed, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).parent}" rev-parse HEAD 2> /dev/null')
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        versions |= {"python": platform.python_version(), "git_commit": None if failed else commit}
        config = {"script": script, **metadata, "arguments": vars(args), "inputs": inputs, "versions": versions,
                  "processes": world_size(), "classes": class_names(datasets[-1]) if datasets else []}  # fmt: skip
        self.identity = identity(config)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock()
            self.refuse_other_run()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot use {self.folder / 'config.json'} ({error}): pass another --out") from None
        self.write("config.json", config)
        for line in metadata.get("loaded", ()):
            print(line, file=sys.stderr)

    def lock(self):
        """Refuse a folder in which another process works. The lock ends with its process."""
        path = self.folder / ".lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # open until the process ends
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, workers of a killed process do not hold it
        except (BlockingIOError, PermissionError):
            raise UserError(f"{self.folder} is in use by {path.read_text()}: stop it, or pass another --out") from None
        except OSError as error:
            print(f"warning: cannot lock {self.folder} ({error.strerror}): start no second run there", file=sys.stderr)
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())

    def refuse_other_run(self):
        """Raise UserError if the folder holds another run; what only one version or k-NN knows of is ignored."""
        config, log = self.folder / "config.json", self.folder / "log.jsonl"
        if config.exists():
            old, new = identity(json.loads(config.read_text())), self.identity
            names = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
            found = [f"{name} {old[name]} there, {new[name]} here" for name in names]
        else:
            names = "checkpoint.pth", "backbone.pth", "eval.json"
            found = [f"{name}, but no config.json" for name in names if (self.folder / name).exists()]
        if log.exists() and log.stat().st_size and not (self.folder / "checkpoint.pth").exists():
            found.append("log.jsonl without its checkpoint.pth")
        if found:
            raise UserError(f"{self.folder} holds another run ({'; '.join(found)}): pass another --out")

    def start_or_resume(self, model, optimizer, scaler, frozen=None, of=None):
        """Load checkpoint.pth into model, optimizer and scaler; without one, save the start.

        Rank 0 reads it for all processes. frozen: a part of the model that checkpoints leave out. of: number and name
        of the weights that are evaluated; a checkpoint of the ones before is ignored.
        """
        names = [f"{name}.{key}" for name, part in model.named_modules() if part is frozen for key in part.state_dict()]
        self.state, self.frozen, self.of = (model, optimizer, scaler), names, of
        path, log = self.folder / "checkpoint.pth", self.folder / "log.jsonl"
        checkpoint = broadcast(load_file(path, whole=True) if rank() == 0 and path.exists() else {})
        if checkpoint and of and checkpoint.get("of") != of[0]:
            if checkpoint.get("of") != of[0] - 1:
                raise UserError(f"{self.folder} holds an evaluation that is ahead of its eval.json: pass another --out")
            checkpoint = {}
        self.step = checkpoint.get("step", 0)
        if not checkpoint:
            return self.save()  # shows now if the disk is full
        state = model.state_dict()
        load_strict(model, {**checkpoint["model"], **{name: state[name] for name in names}}, str(path))
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        self.losses = [row.to(next(model.parameters()).device) for row in checkpoint["losses"]]
        self.named |= set(checkpoint["unreadable"])
        if rank() == 0:
            print(f"continuing from step {self.step} of {self.folder}", file=sys.stderr)
            with writing(log) as file:
                file.truncate(min(checkpoint["log_bytes"], file.tell()))  # the run writes later lines again

    def epochs(self, epochs, steps, evaluate=None, every=1):
        """Yield the numbers of the epochs that are left, of `steps` steps each, with a checkpoint after each.

        evaluate: a function that returns a dict to log, called before each `every`-th epoch and at the end of the run.
        """
        self.steps, self.end = steps, min(epochs * steps, self.args.max_steps or epochs * steps)
        if self.step > (self.args.max_steps or self.step):
            raise UserError(f"{self.folder} is at step {self.step}: raise --max-steps, or pass another --out")
        images, name = self.args.batch_size, self.of[1] if self.of else self.script
        self.bar = tqdm(desc=name, total=self.end * images, initial=self.step * images, unit="img",
                        unit_scale=True, mininterval=1 if sys.stderr.isatty() else 30, disable=rank() > 0)  # fmt: skip
        while True:
            self.epoch = self.step // steps
            if evaluate and (self.step % (every * steps) == 0 or self.step >= self.end):
                self.metrics = evaluate()
                self.log(self.metrics)
            if self.step >= self.end:
                break
            yield self.epoch
            self.save()
        self.bar.close()

    def batches(self, loader):
        """Yield the batches that are left of this epoch; the first one of the run is drawn in views.png."""
        self.clock = self.step, time.perf_counter()
        for views, labels in loader.batches(range(self.step, min(self.end, (self.epoch + 1) * self.steps))):
            if self.step == rank() == 0 and isinstance(loader, Loader):
                self.draw_views(views, mean_std_of(loader.dataset))
            yield views, labels

    def end_step(self, losses, lr):
        """Count a step; log the mean losses every LOG_EVERY steps and at an epoch's end; save when it is time.

        losses: {name: scalar tensor}. One that is not finite raises UserError with the next log line or checkpoint.
        """
        self.step, self.lr, self.unsaved = self.step + 1, lr, True
        self.losses.append(torch.stack([value.detach() for value in losses.values()]))
        self.bar.update(self.args.batch_size)
        if len(self.losses) >= LOG_EVERY or self.step % self.steps == 0 or self.step == self.end:
            means = dict(zip(losses, self.average_losses().mean(dim=0).tolist(), strict=True))
            images, seconds = (self.step - self.clock[0]) * self.args.batch_size, time.perf_counter() - self.clock[1]
            self.log({**means, "lr": lr, "images_per_second": round(images / seconds, 1)})
            self.bar.set_postfix(loss=f"{means['loss']:.3f}", lr=f"{lr:.2g}", epoch=self.epoch, refresh=False)
            self.losses, self.clock = [], (self.step, time.perf_counter())
            self.name_unreadable()
        # All processes do the same after the same step: 1 is to save, more is a signal's number, to save and stop
        due = rank() == 0 and time.monotonic() - self.saved_at > 60 * self.args.checkpoint_minutes
        wanted = all_reduce(torch.tensor(self.stop_signal or int(due)), dist.ReduceOp.MAX).item()
        if wanted:
            self.save()

    def average_losses(self):
        """Losses since the last line of the log, (steps, losses) on the CPU, averaged over the processes."""
        losses = all_reduce(torch.stack(self.losses)).cpu() / world_size()  # the only wait for the device
        self.check_finite("a loss", losses.isfinite().all(dim=1))
        return losses

    def check_finite(self, what, finite):
        """Raise UserError if a loss or a weight is not finite. finite: (steps,), of the last steps."""
        if not finite.all():
            step = self.step - len(finite) + 1 + finite.int().argmin().item()
            where = f"step {step}, epoch {self.epoch}, learning rate {self.lr:g}"
            raise UserError(f"{what} is not finite at {where}: lower --lr or use --amp off, with another --out")

    def name_unreadable(self):
        """Name each unreadable image once, in the log and to the user; too many of them end the run."""
        everyones = [UNREADABLE] * world_size()
        if world_size() > 1:
            dist.all_gather_object(everyones, UNREADABLE)
        found = {path: reason for images in everyones for path, reason in images.items()}
        for path in sorted(found.keys() - self.named):
            self.log({"unreadable": path, "reason": found[path]})
            if rank() == 0:
                tqdm.write(f"warning: unreadable image {path} ({found[path]}), left out", file=sys.stderr)
        self.named |= found.keys()
        if len(self.named) > self.args.max_bad_images:
            found = f"{len(self.named)} unreadable images, one of them {min(self.named)}"
            raise UserError(f"{found}: repair or remove them, or raise --max-bad-images")

    def log(self, values):
        """Append a line to log.jsonl."""
        if rank() == 0:
            line = {"step": self.step, "epoch": self.epoch, **({"weights": self.of[1]} if self.of else {}), **values}
            with writing(self.folder / "log.jsonl") as log:
                log.write(json.dumps(line).encode() + b"\n")

    def save(self):
        """Write checkpoint.pth, with all that a resume needs, then stop if a signal asks for it."""
        model, optimizer, scaler = self.state
        losses = list(self.average_losses()) if self.losses else []
        largest = torch.nn.utils.get_total_norm(model.parameters(), torch.inf)
        self.check_finite("a weight", largest.isfinite()[None])
        if rank() == 0:
            with writing(self.folder / "log.jsonl") as log:
                os.fsync(log.fileno())
                log_bytes = log.tell()
            checkpoint = {
                **self.metadata,
                "of": self.of and self.of[0],
                "step": self.step,
                "model": {k: v for k, v in model.state_dict().items() if k not in self.frozen},
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "losses": losses,
                "log_bytes": log_bytes,
                "unreadable": sorted(self.named),
            }
            atomic_write(self.folder / "checkpoint.pth", lambda file: save_from_cpu(checkpoint, file))
        # Nothing is saved before rank 0 has written it; then all stop, whichever a signal reached meanwhile
        number = all_reduce(torch.tensor(self.stop_signal), dist.ReduceOp.MAX).item()
        self.unsaved, self.saved_at = False, time.monotonic()
        if number or self.stop_signal:
            self.stop(number or self.stop_signal)

    def stop(self, number, frame=None):
        """Stop after the current step, or now if everything is saved; called when a signal arrives."""
        self.stop_signal = number
        if not self.unsaved and os.getpid() == self.pid:  # and not a worker that starts
            raise Stopped(f"stopped by {signal.Signals(number).name}, everything is saved; the same command continues")

    def finish(self, backbone):
        """Write backbone.pth: the network without head, under torchvision's keys."""
        if rank() == 0:
            atomic_write(self.folder / "backbone.pth", lambda file: save_from_cpu(backbone.state_dict(), file))
            print(f"{self.folder}: checkpoint.pth, backbone.pth, log.jsonl, views.png")

    def draw_views(self, views, mean_std):
        """Write views.png: a row for each view, eight images wide. views: normalized (N, 3, size, size) each."""
        mean, std = torch.tensor(mean_std)[..., None, None]
        size = max(128, *(view.shape[-1] for view in views))
        images = torch.cat([F.interpolate(view[:8].cpu() * std + mean, size) for view in views])
        atomic_write(self.folder / "views.png", lambda file: torchvision.utils.save_image(images, file, format="png"))

    def write(self, name, content):
        """Write a JSON file into the folder, with lists of numbers in one line each."""
        if rank() == 0:
            text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), json.dumps(content, indent=2))
            atomic_write(self.folder / name, lambda file: file.write(text.encode() + b"\n"))


# --------------------------------------------------------------------------------------------------------- Command line


def number(kind, low, high=math.inf, *, open_below=False):
    """Type of an argument that is an int or a float from low to high; with `open_below`, low itself is refused."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (open_below and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not in {'(' if open_below else '['}{low}, {high}]")
        return value

    parse.__name__ = kind.__name__  # argparse prints it if the text is no number
    return parse


positive_int = number(int, 1)
positive_float = number(float, 0, open_below=True)
fraction = number(float, 0, 1)


def common_parser(script, docstring, *, epochs, batch_size, lr, weight_decay):
    """Parser with the arguments that mean the same in every script; the method's own defaults come in as keywords."""

    def error(message):
        raise UserError(message)

    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = error, parser.add_argument
    add("--data", help=f"folder with train/ and val/ (default data/imagenet) or one of {', '.join(SMALL_SETS)}[:COUNT]")
    add("--data-root", default="data", help="where torchvision keeps or puts the small sets (default %(default)s)")
    add("--image-size", type=positive_int, help="pixels (default 224 for a folder, 96 for stl10, else 32; "
        "in linear_eval.py that of the weights)")  # fmt: skip
    add("--epochs", type=positive_int, default=epochs, help="default %(default)s, the paper's")
    add("--max-steps", type=positive_int, help="stop after so many steps; the schedule still follows --epochs")
    add("--batch-size", type=positive_int, default=batch_size, help="over all processes (default %(default)s)")
    if script != "linear_eval":
        add("--init", metavar="FILE", help="start from a file's backbone or torchvision, its weights (default: random)")
    add("--weight-decay", type=number(float, 0), default=weight_decay, help="default %(default)s, the paper's")
    if lr is not None:
        add("--lr", type=positive_float, default=lr, help="learning rate (default %(default)s, for the default batch)")
    add("--seed", type=number(int, 0, 2**63), default=0, help="of weights, order and augmentation (%(default)s)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
    workers = min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    add("--workers", type=number(int, 0), default=workers, help="decoding processes per GPU (default %(default)s)")
    add("--out", default=f"runs/{script}", help="the run's folder (default %(default)s)")
    add("--checkpoint-minutes", type=positive_float, default=10.0, help="between two checkpoints (default %(default)s)")
    add("--max-bad-images", type=number(int, 0), default=100, help="unreadable images allowed (default %(default)s)")
    add("--amp", choices=list(AMP), default="off", help="mixed precision (default %(default)s, as in the papers)")
    add("--compile", action="store_true", help="torch.compile the networks")
    return parser


# ------------------------------------------------------------------------------------------------------------ Processes


class UserError(Exception):
    """A mistake that the user can correct; the message is one line that names it and the way out."""


class Stopped(BaseException):
    """A signal stopped the run, and everything is saved."""


def rank():
    """Number of this process, from 0; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes that train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def run_script(main):
    """Call `main()`; if one process fails, all exit and the cause is printed once.

    Exit status: 2 and one line for a `UserError` or one of `KNOWN_ERRORS`, 143 for a run that a signal stopped, 130 for
    Ctrl-C, else 1.
    """
    script = Path(sys.argv[0]).name
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except (Exception, Stopped, KeyboardInterrupt) as error:
        if dist.is_initialized():
            for number in (signal.SIGINT, *STOP_SIGNALS):  # torchrun now sends them to all processes
                signal.signal(number, signal.SIG_IGN)
        status, message = 1, traceback.format_exc()
        lost = re.search(r"Connection (closed|reset) by \w*\s?peer|Broken pipe|ncclRemoteError", str(error))
        known = [advice for pattern, advice in KNOWN_ERRORS.items() if re.search(pattern, str(error))]
        if isinstance(error, UserError):
            status, message = 2, f"{script}: error: {textwrap.shorten(str(error), 1000)}"
        elif known:
            status, message = 2, f"{script}: error: {known[0]} ({str(error).partition(chr(10))[0]})"
        elif isinstance(error, Stopped):
            status, message = 143, f"{script}: {error}"
        elif isinstance(error, KeyboardInterrupt):
            status, message = 130, "interrupted; the same command continues from the last checkpoint"
        elif isinstance(error, RuntimeError) and lost:  # gloo's or NCCL's; their other errors are printed whole
            message = "" if rank() else f"{script}: lost contact with another process ({lost[0]})"
    if not dist.is_initialized():
        if status != 2 or os.environ.get("LOCAL_RANK", "0") == "0":  # all processes meet the same mistake
            tqdm.write(message, file=sys.stderr)
        sys.exit(status)
    with contextlib.suppress(dist.DistError):  # the store is gone, with the process that failed first
        if message and dist.distributed_c10d._get_default_store().add("failures", 1) == 1:
            tqdm.write(f"\n{message}", file=sys.stderr)  # not in the line of rank 0's progress bar
    sys.stdout.flush(), sys.stderr.flush()
    time.sleep(1)  # other processes may still ask the store, if this one hosts it
    os._exit(status)  # a normal exit waits for collectives with processes that are gone


KNOWN_ERRORS = {  # a pattern of a library's message: the cause and the way out
    r"DataLoader worker \(pid|DataLoader timed out|No space left": "a loading process is lost for want of memory, open "
    "files (ulimit -n) or room in /dev/shm (docker run --shm-size): lower --workers or --batch-size",
    r"Too many open files|items of ancdata": "too many open files: raise `ulimit -n`, or lower --workers",
    r"Expected more than 1 value per channel": "BatchNorm needs more than one image per process: raise --batch-size",
    r"Target -?\d+ is out of bounds": "a label is out of range: those of C classes are 0 to C - 1",
    r"out of memory|can't allocate memory|Unable to allocate": "out of memory: lower --batch-size, --image-size or "
    "--queue-size",
    r"No working C\+\+ compiler|Failed to find C compiler": "no C++ compiler: install one, or leave out --compile",
}


@cache
def say(message):
    """Print a line to stderr, once, on one process."""
    if rank() == 0:
        tqdm.write(message, file=sys.stderr)


def init_device(seed):
    """Connect torchrun's processes, seed torch and return this process's device.

    The seed is the same on all processes, so that they build the same networks and queue. Raises UserError where a
    machine has fewer GPUs than processes, and where the processes cannot connect.
    """
    torch.manual_seed(seed)
    device, options = torch.device("cpu"), {"backend": "gloo"}
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"{processes} processes on {gpus} GPUs: lower --nproc_per_node")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)  # before the process group, whose communicator binds to it
        torch.backends.cudnn.benchmark = True
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            # A store of torchrun's agent survives a restart, with the addresses of processes that are gone
            shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if shared else "0"
            store, number, count = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"attempt {attempt}", store)
            dist.init_process_group(store=store, rank=number, world_size=count, **options)
        except (ValueError, dist.DistNetworkError) as error:
            raise UserError(f"cannot connect the processes ({error}): start with torchrun") from None
    return device


def sgd(params, lr, weight_decay):
    """Fused SGD with momentum 0.9; params as in torch.optim."""
    optimizer = torch.optim.SGD(params, lr, momentum=0.9, weight_decay=weight_decay, fused=True)
    # Otherwise SGD leaves its momentum buffers uninitialized if GradScaler skips the first step
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return optimizer


def set_lr(optimizer, lr):
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def distribute(model):
    """The model, in DistributedDataParallel if there are several processes; each keeps its own BatchNorm statistics."""
    if world_size() == 1:
        return model
    ddp_model = DistributedDataParallel(model)
    ddp_model.broadcast_buffers = False
    return ddp_model


def broadcast(value):
    """Rank 0's value, any Python object, on every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(x):
    """Concatenate every process's (N, ...) tensor in the order of ranks: (world_size * N, ...). No gradient flows."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_reduce(x, op=dist.ReduceOp.SUM):
    """Sum every process's tensor, or reduce it by `op`, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(x, op)
    return x


def shuffle(x):
    """This process's rows (N, ...) of the global batch, interleaved across processes, for shuffled BatchNorm.

    Batch statistics then do not reveal the positive pair (MoCo, section 3.3). The batch is in random order already.
    """
    return gather(x)[rank() :: world_size()]


def gather_unshuffled(x):
    """Undo `shuffle` and gather: (N, ...) of this process -> (world_size * N, ...) in the order of the global batch."""
    return gather(x).unflatten(0, (world_size(), len(x))).transpose(0, 1).flatten(0, 1)


def own_rows(x):
    """This process's rows of a tensor or array over the global batch: (B, ...) -> (B / world_size, ...)."""
    share = len(x) // world_size()
    return x[rank() * share : (rank() + 1) * share]
