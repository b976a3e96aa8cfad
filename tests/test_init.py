"""--init: a network starts from the backbone of a file."""

import pytest
import torch
import torchvision
from conftest import refused, run

import common

SMALL = "--data shapes:64 --image-size 16 --batch-size 16 --epochs 1 --max-steps 1 --lr 1e-9 --weight-decay 0"
LINES = {
    "moco_v2": f"moco_v2.py {SMALL} --arch resnet8 --queue-size 32",
    "disco": f"disco.py {SMALL} --teacher {{file}} --student resnet8 --queue-size 32",
    "seed": f"seed.py {SMALL} --teacher {{file}} --student resnet8 --queue-size 32",
    "sskd": f"sskd.py {SMALL} --train-teacher resnet8",
}


@pytest.mark.parametrize("script", LINES)
def test_every_method_starts_from_a_file(script, teacher_file, tmp_path, capfd):
    """The backbone alone; nearly no training follows. The file's name may change later, not its content."""
    line = LINES[script].format(file=teacher_file) + f" --out {tmp_path}/run"
    run(f"{line} --init {teacher_file}")
    errors = capfd.readouterr().err
    assert f"starting from the backbone of {teacher_file}: resnet8" in errors and "as those of --data" in errors
    state = torch.load(tmp_path / "run" / "backbone.pth", weights_only=True)
    start = common.load_teacher(teacher_file).backbone.state_dict()
    names = [name for name in start if name.endswith("weight")]
    for name in names:
        torch.testing.assert_close(state[name], start[name], rtol=1e-4, atol=1e-6)
    if script == "disco":  # the mean student, too
        model = common.load_file(tmp_path / "run" / "checkpoint.pth")["model"]
        torch.testing.assert_close(model["mean_student.backbone.conv1.weight"], start["conv1.weight"])
    if script == "moco_v2":
        (tmp_path / "other.pth").write_bytes(teacher_file.read_bytes())
        run(f"{line} --init {tmp_path}/other.pth")
        torch.save(start, tmp_path / "other.pth")
        assert "another run (init" in refused(f"{line} --init {tmp_path}/other.pth", capfd)
        assert "another run (init" in refused(line, capfd)


def test_a_file_of_another_network_is_refused(teacher_file, tmp_path, capfd):
    line = LINES["moco_v2"].replace("resnet8", "resnet20")
    message = refused(f"{line} --init {teacher_file} --out {tmp_path}/run", capfd)
    assert f"{teacher_file} as resnet20 does not fit" in message


def test_torchvisions_labelled_weights_are_a_start(monkeypatch):
    network = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *_, **__: network.state_dict())
    backbone = common.build_backbone("resnet18", 64, "torchvision")
    assert backbone.training and all(p.requires_grad for p in backbone.parameters())
    assert torch.equal(backbone.layer4[1].conv2.weight, network.layer4[1].conv2.weight)
    with pytest.raises(common.UserError, match=r"resnet18 does not fit.*conv1.weight"):  # its stem is another one
        common.build_backbone("resnet18", 32, "torchvision")
