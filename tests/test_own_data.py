"""A data set of one's own: a torch Dataset works in all scripts after one line in `load_dataset`."""

import io
import json
import re
import zipfile

import pytest
import torch
import torchvision
from conftest import ROOT, error_lines, run
from PIL import Image

import common


@pytest.fixture(scope="module")
def zip_file(tmp_path_factory):
    """PNG files in a zip, TRAIN_OR_VAL/CLASS/NUMBER.png, one of them no image."""
    path = tmp_path_factory.mktemp("zip") / "pictures.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split, count in (("train", 12), ("val", 6)):
            for name, color in (("ant", "red"), ("bee", "blue")):
                for i in range(count):
                    content = io.BytesIO()
                    Image.new("RGB", (20, 20 + i), color).save(content, "png")
                    broken = (split, name, i) == ("train", "bee", 3)
                    file.writestr(f"{split}/{name}/{i:02}.png", b"no image" if broken else content.getvalue())
    return path


@pytest.fixture(scope="module")
def own_data(zip_file):
    """The example of the documentation, and its line in `load_dataset`."""
    page = (ROOT / "docs" / "own-data.md").read_text()
    return re.findall(r"```(?:python|text)\n(.*?)```", page, flags=re.DOTALL)


@pytest.fixture
def zips(own_data, monkeypatch):
    """`common` as a user has it who followed the documentation."""
    definition, line = own_data
    names = {}
    exec(definition, names)
    opener = common.load_dataset

    def load_dataset(data, data_root, split, device, image_size=32):
        scope = {"data": data, "split": split, **names}
        exec("def opened():\n" + re.sub(r"^", "    ", line, flags=re.MULTILINE), scope)
        return scope["opened"]() or opener(data, data_root, split, device, image_size)

    monkeypatch.setattr(common, "load_dataset", load_dataset)


SMALL = "--image-size 16 --batch-size 6 --epochs 1"


def test_a_torch_dataset_works_in_all_scripts(zips, zip_file, tmp_path, capfd):
    teacher = f"{tmp_path}/moco/checkpoint.pth"
    data = f"--data {zip_file}"
    run(f"moco_v2.py {data} {SMALL} --arch resnet8 --queue-size 12 --knn-every 1 --workers 1 --out {tmp_path}/moco")
    (line,) = [line for line in error_lines(capfd.readouterr().err) if "unreadable" in line]
    assert "number 15" in line  # an image that cannot be read is replaced here, too
    run(f"disco.py {data} {SMALL} --teacher {teacher} --student resnet8 --queue-size 12 --workers 0 --out {tmp_path}/d")
    run(f"seed.py {data} {SMALL} --teacher {teacher} --student resnet8 --queue-size 12 --workers 0 --out {tmp_path}/s")
    line = f"linear_eval.py {data} {SMALL} --weights {teacher} --lr 1 --workers 0 --label-fraction 0.5 --knn 3 --out"
    run(f"{line} {tmp_path}/eval")
    (result,) = json.loads((tmp_path / "eval" / "eval.json").read_text()).values()
    assert result["knn"]["3"] == 100 and result["linear"]["classes"] == ["ant", "bee"]
    line = f"sskd.py {data} {SMALL} --workers 0 --label-noise 1 --max-steps 1"
    run(f"{line} --train-teacher resnet8 --out {tmp_path}/labelled")


def test_noise_and_subsets_reach_the_labels(zips, zip_file):
    """Also of a data set that gives labels itself; two classes, all labels wrong."""
    dataset = common.load_dataset(str(zip_file), None, "train", torch.device("cpu"))
    part = common.subsample_per_class(dataset, 0.5, seed=0)
    assert len(part) == 12 and common.labels_of(part).tolist() == [0] * 6 + [1] * 6
    part.labels = 1 - common.labels_of(part)
    loader = common.Loader(part, [common.View(8)], 12, 0, 0, torch.device("cpu"))
    (((images,), labels),) = loader.batches(range(1))
    blue = images[:, 2].mean(dim=(1, 2)) > 0
    assert torch.equal(labels, (~blue).long())


def test_the_identity_of_ones_own_data_is_its_images(zips, zip_file, tmp_path):
    described = common.describe_content(common.load_dataset(str(zip_file), None, "train", torch.device("cpu")))
    (tmp_path / "moved.zip").write_bytes(zip_file.read_bytes())
    moved = common.load_dataset(str(tmp_path / "moved.zip"), None, "train", torch.device("cpu"))
    assert common.describe_content(moved) == described and described.startswith("24 images of 2 classes")
    other = common.load_dataset(str(zip_file), None, "val", torch.device("cpu"))
    assert common.describe_content(other) != described


def test_classes_in_another_order_are_refused(monkeypatch):
    """A label would mean another class in validation, and the accuracy would look right."""

    def load_dataset(data, data_root, split, device, image_size=32):
        classes = ["bee", "ant"] if split == "val" else ["ant", "bee"]
        return common.ArrayDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [0, 1], classes, device)

    monkeypatch.setattr(common, "load_dataset", load_dataset)
    with pytest.raises(common.UserError, match="the same classes in another order"):
        common.load_labelled("own", None, torch.device("cpu"))


def test_labels_are_those_that_a_target_transform_gives():
    dataset = torchvision.datasets.FakeData(6, (3, 8, 8), 2, target_transform=lambda label: 1 - label)
    dataset.targets = [int(torchvision.datasets.FakeData(6, (3, 8, 8), 2)[i][1]) for i in range(6)]
    assert common.labels_of(dataset).tolist() == [1 - label for label in dataset.targets]
