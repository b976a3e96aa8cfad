"""Data sets and single images: what a folder holds, formats and grey levels, and the identity of data."""

import io
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision
from conftest import error_lines, refused, run
from PIL import Image, features

import common

CPU = torch.device("cpu")
MOCO = "moco_v2.py --arch resnet8 --image-size 16 --batch-size 4 --queue-size 8 --epochs 1 --workers 0"
EVAL = "linear_eval.py --image-size 16 --batch-size 4 --epochs 1 --workers 0"


@pytest.fixture
def folder(tmp_path, image_folder):
    """A copy of the image folder that a test may change."""
    shutil.copytree(image_folder, tmp_path / "images")
    return tmp_path / "images"


def names_in(dataset):
    return [os.path.relpath(dataset.path(i), dataset.root) for i in range(len(dataset))]


# ------------------------------------------------------------------------------------------------------- Which files


def test_hidden_entries_are_no_data(folder, capfd):
    """Notebooks' copies, macOS's resource forks and what network disks add: neither classes nor images."""
    expected = common.FolderDataset(folder / "train")
    image = folder / "train" / "ant" / "0.jpg"
    for name in (".ipynb_checkpoints/0.jpg", "ant/.ipynb_checkpoints/0.jpg", "ant/._0.jpg", ".x.jpg",
                 "bee/@eaDir/0.jpg", "__MACOSX/ant/._0.jpg"):  # fmt: skip
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / "train" / name)
    common.list_folder.cache_clear()
    for labelled in (True, False):
        found = common.FolderDataset(folder / "train", labelled)
        assert names_in(found) == names_in(expected)
    found = common.FolderDataset(folder / "train")
    assert found.classes == ["ant", "bee"] and torch.equal(found.labels, expected.labels)
    assert not capfd.readouterr().err


def test_every_format_that_pillow_decodes_is_listed_and_others_are_named_once(folder, capfd):
    image = Image.new("RGB", (8, 8), (200, 0, 0))
    suffixes = ["gif", "jfif", "JPE", "jp2", "tif", "webp", "tga", *(["avif"] if features.check("avif") else [])]
    (folder / "train" / "cow").mkdir()
    for suffix in suffixes:
        kind = {"jp2": "JPEG2000", "tif": "TIFF", "JPE": "JPEG", "jfif": "JPEG"}.get(suffix, suffix.upper())
        image.save(folder / "train" / "cow" / f"x.{suffix}", kind)
    for name in ("cow/list.txt", "cow/data.h5", "cow/film.mpg", "loose.jpg"):
        (folder / "train" / name).write_bytes(b"")
    common.say.cache_clear()
    common.list_folder.cache_clear()
    for _ in range(2):
        found = common.FolderDataset(folder / "train")
    assert sorted(names_in(found)[-len(suffixes) :]) == sorted(f"cow/x.{suffix}" for suffix in suffixes)
    for i in range(len(found) - len(suffixes), len(found)):
        red, green, blue = found[i][0].float().mean(dim=(1, 2))
        assert red > 180 and green < 20 and blue < 20, found.path(i)
    (line,) = error_lines(capfd.readouterr().err)
    assert "passed over 4 files" in line and any(name in line for name in ("list.txt", "data.h5", "film.mpg", "loose"))


def test_without_labels_images_may_lie_anywhere(tmp_path, image_folder, capfd):
    """Flat, at any depth, or below train/; evaluation needs classes and says so."""
    flat = tmp_path / "flat"
    (flat / "a" / "b").mkdir(parents=True)
    for i, place in enumerate(["", "a", "a/b", "a/b"] * 2):
        shutil.copy(image_folder / "train" / "ant" / "0.jpg", flat / place / f"{i}.jpg")
    (flat / "test.txt").write_text("a list, and no split")
    dataset = common.load_dataset(str(flat), None, "pretrain", CPU)
    assert len(dataset) == 8 and dataset.classes == []
    run(f"{MOCO} --data {flat} --out {tmp_path}/flat_run")
    assert json.loads((tmp_path / "flat_run" / "config.json").read_text())["inputs"]["data"].startswith("8 images")
    (tmp_path / "nested").mkdir()
    shutil.move(flat, tmp_path / "nested" / "train")
    assert len(common.load_dataset(str(tmp_path / "nested"), None, "pretrain", CPU)) == 8
    assert "nested/val" in refused(f"{MOCO} --data {tmp_path}/nested --knn-every 1 --out {tmp_path}/x", capfd)
    # ImageNet's layout gives the same images in the same order as with labels
    names = names_in(common.FolderDataset(image_folder / "train"))
    assert names_in(common.load_dataset(str(image_folder), None, "pretrain", CPU)) == names


def test_a_folder_with_splits_but_no_train_is_refused_and_links_in_a_circle_end(folder, capfd):
    """Its validation images would be trained on; a link to a folder above would repeat all images."""
    (folder / "train" / "ant" / "loop").symlink_to(folder / "train")
    (folder / "train" / "bee" / "other").symlink_to(folder / "train" / "ant")
    names = names_in(common.load_dataset(str(folder), None, "pretrain", CPU))
    assert len(names) == 24 and sum("other" in name for name in names) == 8
    os.rename(folder / "train", folder / "Train")
    assert "has Train and no train" in refused(f"{MOCO} --data {folder} --out {folder}/run", capfd)
    shutil.rmtree(folder / "val")
    os.rename(folder / "Train", folder / "valley")  # a class, and no split
    assert len(common.load_dataset(str(folder), None, "pretrain", CPU)) == 16


def test_folders_beside_train_are_named(folder, capfd):
    """They may be classes, of which one is called train."""
    shutil.copytree(folder / "train" / "ant", folder / "car")
    common.say.cache_clear()
    assert len(common.load_dataset(str(folder), None, "pretrain", CPU)) == 16
    assert "below train/ alone are used, and not those below car/" in capfd.readouterr().err


def test_a_folder_that_cannot_be_listed_is_an_error(folder, capfd, monkeypatch):
    scandir = os.scandir

    def no_entry(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", no_entry)
    assert "Permission denied" in refused(f"{MOCO} --data {folder} --out {folder}/run", capfd)


# -------------------------------------------------------------------------------------------------------- Grey levels

RAMP = np.linspace(0, 1, 1200).reshape(30, 40)
LEVELS = {  # name: what is saved, and the white of its range; None where nothing tells it
    "float from 0 to 1": (RAMP.astype(np.float32), 1),
    "dark float from 0 to 0.1": ((RAMP / 10).astype(np.float32), 1),
    "float to 255": ((RAMP * 255).astype(np.float32), 255),
    "float to 65,535": ((RAMP * 65535).astype(np.float32), 65535),
    "float to 4,095": ((RAMP * 4095).astype(np.float32), None),
    "float below 0": ((RAMP - 0.5).astype(np.float32), None),
    "not a number": (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), None),
    "int32 to 255": ((RAMP * 255).astype(np.int32), 255),
    "int32 to 65,535": ((RAMP * 65535).astype(np.int32), 65535),
    "int32 to 70,000": ((RAMP * 70000).astype(np.int32), None),
    "int32 to 1": ((RAMP > 0.5).astype(np.int32), None),
    "int32 to 4,095": ((RAMP * 4095).astype(np.int32), None),
    "int32 below 0": ((RAMP * 255 - 9).astype(np.int32), None),
    "uint16 to 4,095": ((RAMP * 4095).astype(np.uint16), 65535),
    "black": (np.zeros((30, 40), np.int32), 255),
}


@pytest.mark.parametrize("name", LEVELS)
def test_grey_levels_of_more_than_8_bits_are_scaled_or_unreadable(name, tmp_path):
    levels, white = LEVELS[name]
    Image.fromarray(levels).save(tmp_path / "x.tif")
    if white is None:
        with pytest.raises(ValueError, match=r"grey levels from .* nothing says which is white"):
            common.read_image(str(tmp_path / "x.tif"))
        return
    image = common.read_image(str(tmp_path / "x.tif"))
    assert image.dtype == torch.uint8 and image.shape == (3, 30, 40)
    assert np.abs(image.numpy() - levels / white * 255).max() <= 1


def test_where_white_is_0_grey_levels_are_inverted(tmp_path):
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(tmp_path / "x.tif", tiffinfo={262: 0})
    assert np.abs(common.read_image(str(tmp_path / "x.tif")).numpy() - (1 - RAMP) * 255).max() <= 1


def test_a_tensor_that_is_not_uint8_is_refused():
    """Floats from 0 to 1, as of ToTensor, would become black."""
    with pytest.raises(TypeError, match="float32"):
        common.to_rgb(torch.rand(3, 4, 4))


def test_pgm_files_of_more_than_8_bits_are_scaled_by_their_header(tmp_path):
    levels = (RAMP * 4095).astype(">u2")
    (tmp_path / "x.pgm").write_bytes(b"P5 40 30 4095\n" + levels.tobytes())
    assert np.abs(common.read_image(str(tmp_path / "x.pgm")).numpy() - RAMP * 255).max() <= 1


def test_a_strip_takes_no_memory_and_other_images_are_torchvisions(monkeypatch):
    """1 x 20,000 pixels would become 256 x 5,120,000."""
    resized, resize = [], common.TF.resize
    monkeypatch.setattr(common.TF, "resize", lambda x, *a, **k: resized.append(resize(x, *a, **k)) or resized[-1])
    assert common.center_crop(torch.zeros(3, 1, 20000, dtype=torch.uint8), 224).shape == (3, 224, 224)
    assert resized[0].numel() < 10**7
    image = torch.randint(256, (3, 40, 300), dtype=torch.uint8)
    theirs = common.TF.center_crop(resize(image, [37], antialias=True), [32] * 2)
    assert torch.equal(common.center_crop(image, 32), theirs)


# ----------------------------------------------------------------------------------------------------------- Identity


def test_moved_data_continues_and_replaced_images_do_not(folder, tmp_path, monkeypatch, capfd):
    """The same number of images in the same places is not the same data."""
    monkeypatch.chdir(tmp_path)
    run(f"{MOCO} --data images --out run")
    before = (tmp_path / "run" / "checkpoint.pth").read_bytes()
    shutil.copytree(folder, tmp_path / "copy")
    for data in ("images/", folder, "./images", "copy"):
        run(f"{MOCO} --data {data} --out run")
    for name in ("ant/0.jpg", "bee/5.bmp"):  # a file of another size, and one of the same
        content = (folder / "train" / name).read_bytes()
        (folder / "train" / name).write_bytes(content[:-2] + b"\x07\x07" if "bmp" in name else content + b"\0")
        assert "run holds another run (data" in refused(f"{MOCO} --data images --out run", capfd)
        (folder / "train" / name).write_bytes(content)
        run(f"{MOCO} --data images --out run")
    os.rename(folder / "train" / "ant" / "0.jpg", folder / "train" / "ant" / "00.jpg")
    assert "another run (data" in refused(f"{MOCO} --data images --out run", capfd)
    assert (tmp_path / "run" / "checkpoint.pth").read_bytes() == before


def test_moved_teachers_and_weights_continue_and_changed_ones_do_not(tmp_path, teacher_file, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    small = "--data shapes:64 --image-size 16 --batch-size 16 --epochs 1"
    for name in ("a.pth", "b.pth"):
        shutil.copy(teacher_file, name)
    disco = f"disco.py {small} --student resnet8 --queue-size 32 --out run --teacher"
    evaluation = f"linear_eval.py {small} --cached --lr 1 --out eval --weights"
    for line in (disco, evaluation):
        run(f"{line} a.pth")
        run(f"{line} ./b.pth")
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["a.pth"]
    assert "b.pth" in capfd.readouterr().out  # the table has the name of today
    teacher = common.load_file("b.pth")
    teacher["model"]["encoder.head.2.bias"] += 1
    torch.save(teacher, "b.pth")
    assert "run holds another run (teacher" in refused(f"{disco} b.pth", capfd)
    assert "eval holds another run (weights" in refused(f"{evaluation} b.pth", capfd)


def test_results_and_cached_features_of_other_images_are_not_taken(tmp_path, teacher_file, capfd):
    for split in ("train", "val"):
        for name, color in (("ant", "red"), ("bee", "blue")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (20, 20 + i), color).save(tmp_path / "images" / split / name / f"{i}.bmp")
    line = f"{EVAL} --data {tmp_path}/images --weights {teacher_file} --cached --lr 1 --knn 3 --out {tmp_path}/run"
    run(line)
    val = tmp_path / "images" / "val"
    for i in range(4):  # with the same sizes
        ant, bee = ((val / name / f"{i}.bmp").read_bytes() for name in ("ant", "bee"))
        (val / "ant" / f"{i}.bmp").write_bytes(bee)
        (val / "bee" / f"{i}.bmp").write_bytes(ant)
    assert "another run (data" in refused(line, capfd)
    first = json.loads((tmp_path / "run" / "eval.json").read_text())
    for path in (tmp_path / "run").iterdir():
        if not path.name.startswith("features"):  # these alone, as on a machine that does not share the folder
            path.unlink()
    run(line)
    again = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert [result["knn"]["3"] for results in (first, again) for result in results.values()] == [100, 0]


def test_the_validation_images_of_k_nn_belong_to_the_run(folder, tmp_path, capfd):
    line = f"{MOCO} --data {folder} --out {tmp_path}/run"
    run(f"{line} --max-steps 1 --knn-every 1")
    (folder / "val" / "ant" / "0.jpg").write_bytes((folder / "val" / "ant" / "2.jpg").read_bytes())
    assert "another run (data 2" in refused(f"{line} --knn-every 1", capfd)
    run(line)  # without k-NN they do not matter


def test_an_evaluation_of_more_steps_or_at_another_size_is_not_the_old_one(tmp_path, teacher_file, capfd):
    """Other steps continue; the image size comes from a file beside the weights, which may stay behind."""
    small = "linear_eval.py --data shapes:64 --batch-size 16 --knn 3 --cached --lr 1 --epochs 2"
    run(f"{small} --weights {teacher_file} --max-steps 1 --out {tmp_path}/run")
    run(f"{small} --weights {teacher_file} --out {tmp_path}/run")
    run(f"{small} --weights {teacher_file} --out {tmp_path}/fresh")
    one, fresh = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("run", "fresh"))
    assert one == fresh
    shutil.copytree(teacher_file.parent, tmp_path / "teacher")
    run(f"{small} --weights {tmp_path}/teacher/backbone.pth --out {tmp_path}/sized")
    shutil.copy(tmp_path / "teacher" / "backbone.pth", tmp_path / "alone.pth")
    assert "image-size 16 there, 32 here" in refused(
        f"{small} --weights {tmp_path}/alone.pth --out {tmp_path}/sized", capfd
    )
    line = f"{small} --weights {teacher_file} --max-steps 7 --out {tmp_path}/run"
    assert "is at step 8: raise --max-steps" in refused(line, capfd)  # and not the figures of eight steps
    (tmp_path / "run" / "eval.json").write_text("")
    assert "eval.json is damaged" in refused(f"{small} --weights {teacher_file} --out {tmp_path}/run", capfd)


def test_two_evaluations_without_their_results_do_not_start_again_in_the_same_log(tmp_path, teacher_file, capfd):
    line = (
        "linear_eval.py --data shapes:64 --image-size 16 --batch-size 16 --knn 3 --cached --lr 1 --epochs 1 --weights"
    )
    line = f"{line} {teacher_file} random --arch resnet8 --out {tmp_path}/run"
    run(line)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    (tmp_path / "run" / "eval.json").unlink()
    assert "ahead of its eval.json" in refused(line, capfd)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_an_unreadable_image_does_not_end_an_evaluation(broken_folder, tmp_path, teacher_file):
    run(f"{EVAL} --data {broken_folder} --weights {teacher_file} --lr 1 --out {tmp_path}/run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum("unreadable" in line for line in lines) == 4


def test_a_label_list_is_known_by_its_content(folder, tmp_path, teacher_file, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    names = "ant/0.jpg\nant/2.jpg\nbee/0.jpg\nbee/2.jpg\n"
    for name, content in (("a.txt", names), ("b.txt", names), ("c.txt", names.replace("2", "3"))):
        (tmp_path / name).write_text(content)
    line = f"{EVAL} --data {folder} --weights {teacher_file} --lr 1 --out run --label-list"
    run(f"{line} a.txt")
    run(f"{line} b.txt")
    assert "label_list" in refused(f"{line} c.txt", capfd)


def test_class_names_stand_in_the_config_and_beside_figures_per_class(tmp_path, image_folder, teacher_file):
    """Folders 10, 2 and 9 are classes 0, 1 and 2, in the order of their names."""
    for split in ("train", "val"):
        for name, source in (("10", "ant"), ("2", "bee"), ("9", "bee")):
            shutil.copytree(image_folder / split / source, tmp_path / "images" / split / name)
    run(f"{EVAL} --data {tmp_path}/images --weights {teacher_file} --lr 1 --out {tmp_path}/run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["classes"] == ["10", "2", "9"]
    (result,) = json.loads((tmp_path / "run" / "eval.json").read_text()).values()
    assert result["linear"]["classes"] == ["10", "2", "9"] and len(result["linear"]["per_class"]) == 3
    assert list(result["knn"]) == ["10", "20", "24"]  # as far as there are images


# -------------------------------------------------------------------------------------------------- Data sets in memory


def test_few_labels_are_balanced_and_fixed_by_the_seed(image_folder):
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 2)[torch.randperm(62)]
    images = torch.arange(62, dtype=torch.uint8).view(62, 1, 1, 1).expand(-1, 3, 4, 4)
    dataset = common.ArrayDataset(images, labels, "abc", torch.device("cpu"))
    part = common.subsample_per_class(dataset, 0.1, seed=0)
    assert len(part) == 7 and torch.bincount(part.labels).tolist() == [4, 2, 1] and len(dataset) == 62
    assert torch.equal(labels[part.images[:, 0, 0, 0].long()], part.labels)
    assert torch.equal(part.images, common.subsample_per_class(dataset, 0.1, seed=0).images)
    assert not torch.equal(part.images, common.subsample_per_class(dataset, 0.1, seed=1).images)
    folder = common.FolderDataset(image_folder / "train")
    part = common.subsample_per_class(folder, 0.5, seed=0)
    assert len(part) == len(folder) // 2 and torch.bincount(part.labels).tolist() == [4, 4]
    for i, label in enumerate(part.labels):
        assert folder.classes[label] in part.path(i).split("/")


def test_an_image_of_16_bits_keeps_its_grey_levels(tmp_path):
    from PIL import Image

    deep = np.linspace(0, 2**16 - 1, 1200).reshape(30, 40).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = common.read_image(str(tmp_path / "deep.png"))
    assert image.dtype == torch.uint8 and image.shape == (3, 30, 40)
    assert abs(image[0].numpy() - deep / 257).max() <= 1


def png(levels, kind, transparent=None):
    """A PNG file, byte for byte: levels (H, W, channels) of uint8 or uint16, PNG's colour type, its tRNS chunk."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 8 * levels.itemsize, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(levels.dtype.newbyteorder(">")).tobytes() for row in levels)
    chunks = chunk(b"IHDR", header) + (chunk(b"tRNS", transparent) if transparent else b"")
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [8, 16])
def test_transparent_pixels_are_white_and_an_animation_is_its_first_frame(bits, tmp_path):
    from PIL import Image

    dtype, full = {8: np.uint8, 16: np.uint16}[bits], 2**bits - 1
    color = np.full((1, 4, 3), [full, 0, full // 5], dtype)  # under all of the pixels, the transparent ones too
    alpha = np.array([full, full // 5 * 3, full // 5, 0], dtype).reshape(1, 4, 1)
    covered = np.array([1, 0.6, 0.2, 0])
    expected = 255 * (covered * [[1], [0], [0.2]] + 1 - covered)
    grey = np.array([full, full // 5, 0, 0], dtype).reshape(1, 4, 1)
    files = {
        "rgba": (png(np.concatenate([color, alpha], axis=2), 6), expected),
        "grey and alpha": (png(np.concatenate([color[..., 1:2], alpha], axis=2), 4), expected[[1]].repeat(3, 0)),
        "grey with a transparent level": (png(grey, 0, b"\0\0"), [[255, 51, 255, 255]] * 3),
    }
    palette = Image.fromarray(np.array([[0, 1, 2, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 51, 0, 0, 0, 9, 9, 9])
    for suffix, save in {"png": {}, "gif": {"save_all": True, "append_images": [palette.rotate(180)]}}.items():
        buffer = io.BytesIO()
        palette.save(buffer, suffix, transparency=2, **save)
        files[suffix] = buffer.getvalue(), [[255, 0, 255, 255], [0, 0, 255, 255], [51, 0, 255, 255]]
    for name, (content, pixels) in files.items():
        path = tmp_path / f"{name}.jpg"  # the content counts, not the name
        path.write_bytes(content)
        image = common.read_image(str(path))
        assert image.dtype == torch.uint8 and image.shape == (3, 1, 4), name
        assert np.abs(image[:, 0].numpy() - np.array(pixels)).max() <= 1, name


def test_shapes_are_balanced_repeatable_and_not_solved_by_pixels():
    """Raw pixels of the README's quick start stay below 50 %, as its table says."""
    sets = [common.load_dataset("shapes:3000", None, split, CPU, 24) for split in ("train", "val")]
    again, labels = common.draw_shapes(3000, 24, seed=0)
    assert again.dtype == torch.uint8 and again.shape == (3000, 3, 24, 24) and torch.equal(sets[0].images, again)
    assert labels.bincount().tolist() == [300] * 10 and torch.equal(sets[0].labels, labels)
    assert not (again[:2000] == sets[1].images).all(dim=(1, 2, 3)).any()
    train, val = ((common.normalize(x.images / 255, common.mean_std_of(x)).flatten(1), x.labels) for x in sets)
    accuracy = common.knn_accuracy(train, val, [10, 20], 10)["knn"]
    assert 40 < accuracy[20] < accuracy[10] < 50
    assert common.load_dataset("shapes:30", None, "train", CPU, 48).images.shape == (30, 3, 48, 48)


def test_small_sets_come_out_as_one_tensor(tmp_path, monkeypatch):
    """Shapes, splits and labels, from stand-ins that give what each of torchvision's classes stores."""

    def stored(data, **labels):
        def opener(root, download=False, **options):
            split = options.get("split", "train" if options.get("train") else "test")
            return type("Stored", (), {"data": data, **labels, "classes": ["a", "b"], "split": seen.append(split)})

        return opener

    seen, rng = [], np.random.default_rng(0)
    hwc, chw = rng.integers(0, 256, (6, 32, 32, 3), np.uint8), rng.integers(0, 256, (6, 3, 96, 96), np.uint8)
    sets = torchvision.datasets
    monkeypatch.setattr(sets, "CIFAR10", stored(hwc, targets=[0, 1, 2, 3, 4, 9]))
    monkeypatch.setattr(sets, "CIFAR100", stored(hwc, targets=[0, 1, 2, 3, 4, 99]))
    monkeypatch.setattr(sets, "STL10", stored(chw, labels=np.array([-1] * 6)))
    monkeypatch.setattr(sets, "FashionMNIST", stored(torch.from_numpy(hwc[..., 0]), targets=torch.arange(6)))
    for name, size in (("cifar10", 32), ("cifar100", 32), ("stl10", 96), ("fashion_mnist", 32)):
        for split in ("pretrain", "train", "val"):
            seen.clear()
            dataset = common.load_dataset(name, tmp_path, split, CPU)
            wanted = {"pretrain": "unlabeled"} if name == "stl10" else {"pretrain": "train"}
            assert seen[-1] == {**wanted, "train": "train", "val": "test"}[split]
            assert common.default_image_size(name) == size and dataset.classes == ["a", "b"]
            wanted = common.CIFAR_MEAN_STD if name.startswith("cifar") else common.IMAGENET_MEAN_STD
            assert common.mean_std_of(dataset) == wanted
            assert dataset.images.shape[:2] == (6, 3) and dataset.images.dtype == torch.uint8
    assert (dataset.images[0, 0] == dataset.images[0, 2]).all()  # grey, from Fashion-MNIST
    cifar = common.load_dataset("cifar10", tmp_path, "train", CPU).images
    assert (cifar.permute(0, 2, 3, 1).numpy() == hwc).all()


def test_a_turned_tiff_with_transparency_is_read(tmp_path):
    """Its size is another before Pillow loads it than after that."""
    Image.new("RGBA", (40, 20), (255, 0, 0, 255)).save(tmp_path / "turned.tif", tiffinfo={274: 6})
    image = common.read_image(tmp_path / "turned.tif")
    assert sorted(image.shape) == [3, 20, 40] and image.float().mean(dim=(1, 2)).tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", ["@__thumb", "@Recycle", "#recycle", "#snapshot", "~snapshot", "$Recycle.Bin"])
def test_folders_of_file_servers_are_no_classes(name, folder):
    shutil.copytree(folder / "train" / "ant", folder / "train" / name)
    shutil.copytree(folder / "train" / "ant", folder / "train" / "bee" / name)
    common.list_folder.cache_clear()
    found = common.FolderDataset(folder / "train")
    assert found.classes == ["ant", "bee"] and len(found) == 16


def test_a_damaged_file_of_a_small_set_is_one_line(tmp_path, capfd):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{split}-{kind}-ubyte").write_bytes(b"")
    line = f"moco_v2.py --data fashion_mnist --data-root {tmp_path} --arch resnet8 --out {tmp_path}/run"
    assert "cannot open fashion_mnist" in refused(line, capfd)
