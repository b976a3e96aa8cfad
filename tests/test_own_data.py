"""A data set of one's own: a torch Dataset works in all scripts after one line in `load_dataset`."""

import io
import json
import re
import zipfile

import pytest
import torch
import torchvision
from conftest import ROOT, error_lines, refused, run
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


def test_training_and_validation_images_are_normalised_alike(monkeypatch):
    """A network is given images in one way; one or three values mean the same."""
    numbers = {"train": ((0.5,), (0.25,)), "val": ([0.5] * 3, [0.25] * 3)}
    monkeypatch.setattr(common, "load_dataset", lambda data, root, split, *_: Levels(LABELS, mean_std=numbers[split]))
    assert common.mean_std_of(common.load_labelled("own", None, CPU)[0]) == ((0.5,) * 3, (0.25,) * 3)
    numbers["val"] = common.IMAGENET_MEAN_STD
    with pytest.raises(common.UserError, match="differ in `mean_std`"):
        common.load_labelled("own", None, CPU)


def test_labels_are_those_that_a_target_transform_gives():
    dataset = torchvision.datasets.FakeData(6, (3, 8, 8), 2, target_transform=lambda label: 1 - label)
    dataset.targets = [int(torchvision.datasets.FakeData(6, (3, 8, 8), 2)[i][1]) for i in range(6)]
    assert common.labels_of(dataset).tolist() == [1 - label for label in dataset.targets]


class Levels:
    """Images whose level is ten times their label, with whatever attributes a user's set may have."""

    def __init__(self, answers, **attributes):
        self.answers, self.classes = answers, ["ant", "bee", "cow"]
        vars(self).update(attributes)

    def __len__(self):
        return len(self.answers)

    def __getitem__(self, index):
        image = torch.full((3, 8, 8), 10 * self.answers[index], dtype=torch.uint8)
        return image, getattr(self, "label", self.answers[index])


CPU = torch.device("cpu")
LABELS = [0, 1, 2] * 4


def batch_of(dataset):
    """Mean level of each image of the first batch, as normalised, and its labels."""
    (((images,), labels),) = common.Loader(dataset, [common.View(8)], len(dataset), 0, 0, CPU).batches(range(1))
    mean, std = torch.tensor(common.mean_std_of(dataset))[..., None, None]
    return ((images * std + mean) * 25.5).mean(dim=(1, 2, 3)).round(), labels


def test_files_that_a_data_set_opens_are_not_shared_with_workers(zips, zip_file):
    """Workers would move each other's place in the file and read images of other names."""
    dataset = common.load_dataset(str(zip_file), None, "train", CPU)
    common.describe_content(dataset)
    concatenated = torch.utils.data.ConcatDataset([dataset])
    concatenated.classes = dataset.classes
    part = common.subset(concatenated, range(24))
    common.describe_content(part)
    assert (common.labels_of(part) < 0).sum() == (common.labels_of(dataset) < 0).sum() == 1 and dataset.file is None


def test_labels_are_those_that_are_returned():
    """Whatever `labels` and `targets` say; also of a part, and of a part whose labels are replaced."""
    wrong, short = Levels(LABELS, labels=[2] * 12), Levels(LABELS, targets=[1])
    assert [common.labels_of(dataset).tolist() for dataset in (wrong, short)] == [LABELS] * 2
    part = common.subsample_per_class(wrong, 0.5, seed=0)
    levels, labels = batch_of(part)
    assert len(part) == 6 and torch.equal(levels, labels.float())
    part.labels = 2 - common.labels_of(part)
    levels, labels = batch_of(part)
    assert torch.equal(2 - levels, labels.float())


def test_images_without_a_label_are_no_unreadable_images():
    dataset = Levels(LABELS, label=None)
    common.UNREADABLE.clear()
    levels, labels = batch_of(dataset)
    assert set(labels.tolist()) == {-1} and set(levels.tolist()) == {0, 1, 2} and not common.UNREADABLE


def test_a_part_keeps_normalisation_and_the_place_in_memory():
    """Training and validation images would else be prepared in two ways."""
    mean_std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    assert common.mean_std_of(common.subset(Levels(LABELS, mean_std=mean_std), torch.arange(3).numpy())) == mean_std
    images = torch.stack([Levels(LABELS)[i][0] for i in range(12)])
    dataset = Levels(LABELS, images=images, labels=torch.tensor(LABELS, dtype=torch.int32), mean_std=mean_std)
    part = common.subsample_per_class(dataset, 0.5, seed=0)
    assert common.in_memory(part) and len(part.images) == 6 and common.mean_std_of(part) == mean_std
    assert batch_of(dataset)[1].dtype == torch.long  # as cross_entropy needs them
    assert not common.in_memory(Levels(LABELS, images=images / 255, labels=torch.tensor(LABELS)))
    buffers = type("Buffers", (torch.nn.Module,), {"__len__": lambda self: 12, "classes": ["ant", "bee", "cow"]})()
    buffers.register_buffer("images", images)
    buffers.register_buffer("labels", torch.tensor(LABELS))
    assert len(common.subsample_per_class(buffers, 0.5, seed=0)) == 6


def test_labels_belong_to_the_identity():
    assert common.describe_content(Levels(LABELS)) == common.describe_content(Levels(LABELS))
    others = Levels(LABELS, labels=[0]), Levels(LABELS, labels=[1]), Levels(LABELS, label=0)
    assert len({common.describe_content(dataset) for dataset in (Levels(LABELS), *others)}) == 4


def test_images_that_differ_each_time_are_said_and_can_be_resumed(capfd):
    class Noise(Levels):
        def __getitem__(self, index):
            return torch.randint(256, (3, 8, 8), dtype=torch.uint8), 0

    common.say.cache_clear()
    assert common.describe_content(Noise(LABELS)) == common.describe_content(Noise(LABELS))
    assert common.describe_content(Noise(LABELS, labels=[1])) != common.describe_content(Noise(LABELS, labels=[2]))
    assert "images differ when they are read again" in capfd.readouterr().err


@pytest.mark.parametrize(
    "dataset, message",
    [
        (Levels([1, 2, 3] * 4), "a label is 3: those of 3 classes begin at 0"),
        (Levels(LABELS, label=None), "none of 12 images can be read, for one number 0 (label None)"),
        (Levels(LABELS, mean_std=((123, 116, 103), (58, 57, 57))), "`mean_std` of a data set is ((123"),
        (Levels(LABELS, mean_std=None), "`mean_std` of a data set is None"),
        (Levels(LABELS), "Levels has no `classes`"),
    ],
)
def test_a_mistake_in_a_data_set_is_one_line(dataset, message, monkeypatch, teacher_file, tmp_path, capfd):
    if "classes`" in message:
        del dataset.classes
    monkeypatch.setattr(common, "load_dataset", lambda *args: dataset)
    line = f"linear_eval.py --data own --weights {teacher_file} --batch-size 4 --knn 2 --workers 0 --out {tmp_path}/run"
    assert message in refused(line, capfd)
