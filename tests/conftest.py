"""What the tests share: golden vectors, the small network they were computed with, and ways to run a script."""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

torch.set_num_threads(1)  # tests run side by side
ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
COLOR = {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "grey": 0.2, "blur": (0.1, 2.0), "blur_p": 0.5}  # MoCo v2's


class GoldenBackbone(nn.Module):
    """The backbone of the golden trajectories (golden data computed with the authors' code)."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.feature_dim = 2 * width

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x))).mean(dim=(2, 3))


def golden_state(vectors, prefix):
    """State dict of an Encoder from the golden arrays `prefix.KEY`."""
    state = {k.removeprefix(prefix + "."): torch.from_numpy(vectors[k]) for k in vectors if k.startswith(prefix + ".")}
    return {k.replace("fc.", "head.") if k.startswith("fc.") else f"backbone.{k}": v for k, v in state.items()}


def golden_encoder(vectors, prefix):
    """Encoder with the golden weights `prefix.KEY`."""
    state = golden_state(vectors, prefix)
    if "head.weight" in state:
        head = nn.Linear(*state["head.weight"].shape[::-1])
    else:
        head = common.mlp_head(
            state["head.0.weight"].shape[1], len(state["head.0.weight"]), len(state["head.2.weight"])
        )
    encoder = common.Encoder(GoldenBackbone(len(state["backbone.conv1.weight"])), head)
    encoder.load_state_dict(state)
    return encoder


def assert_close_state(module, vectors, prefix, tolerance=2e-4):
    """Every tensor of the module is the golden one, relative to the tensor's largest value."""
    state = module.state_dict()
    for name, expected in golden_state(vectors, prefix).items():
        error = (state[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{name} differs by {error:.1e}"


def golden_training(model, network, vectors, steps):
    """The golden experiment's loop and optimiser for `network` of a method, on this process's share of each batch.

    Returns the losses of every step, averaged over processes.
    """
    inputs = torch.from_numpy(vectors["images"][:steps])
    if inputs.ndim == 5:  # SEED's: one view, maybe with small crops
        names = [name for name in ("images", "small_images") if name in vectors]
        inputs = list(zip(*(torch.from_numpy(vectors[name][:steps]) for name in names), strict=True))
    ddp_model = common.distribute(model)
    optimizer = torch.optim.SGD(
        network.parameters(), float(vectors["meta_lr"]), momentum=0.9, weight_decay=1e-4, fused=True
    )
    history = []
    for views in inputs:
        losses, keys = ddp_model(*map(common.own_rows, views))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        model.enqueue(keys)
        history.append({name: common.gather(loss.detach()[None]).mean().item() for name, loss in losses.items()})
    return history


def golden_fill(shapes):
    """Weights that golden/teachers.npz was computed with: a function of each key's name (see its source's rule)."""
    state = {}
    for key, shape in shapes.items():
        rng = np.random.RandomState(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape, dtype=np.int64)
        elif key.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif key.endswith(("running_mean", "bias")):
            value = 0.1 * rng.randn(*shape)
        elif len(shape) == 1:
            value = rng.uniform(0.4, 0.8, shape)
        else:
            value = rng.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
        state[key] = torch.as_tensor(value) if key.endswith("tracked") else torch.as_tensor(value, dtype=torch.float32)
    return state


def start_script(line, processes=1, launch="", cwd=ROOT):
    """Start a command line, "SCRIPT.py --flag ...", as a user does, in a process group of its own; returns it.

    launch: further options of torchrun, which is used where there are any or several processes.
    """
    name, *args = line.split()
    command = [sys.executable, str(ROOT / name), *args]
    if processes > 1 or launch:
        where = [] if "--rdzv" in launch else ["--master_port", str(free_port())]
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *where, *launch.split()]
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as README says, for several agents
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **env}, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    STARTED.append(process)
    return process


STARTED = []


@pytest.fixture(autouse=True)
def end_what_a_failed_test_left():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def run_script(line, processes=1, cwd=ROOT, check=True):
    """Run a command line to its end; returns the finished process."""
    process = start_script(line, processes, cwd=cwd)
    out, errors = process.communicate(timeout=300)
    if check:
        assert process.returncode == 0, out + errors
    return subprocess.CompletedProcess(line, process.returncode, out, errors)


def run(line):
    """Run a command line in this process, which takes no start."""
    script, *arguments = line.split()
    common.list_folder.cache_clear()
    common.say.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        common.run_script(importlib.import_module(script.removesuffix(".py")).main)


def refused(line, capfd):
    """The one line that a command line ends with in this process, with exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(line)
    lines = [line for line in error_lines(capfd.readouterr().err) if "error: " in line]
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def error_lines(errors):
    """Lines of a script on stderr, without its progress bars."""
    lines = errors.replace("\x1b[A", "").replace("\r", "\n").splitlines()  # "cursor up", where another bar stood
    return [line for line in lines if line.strip() and "img/s" not in line]


def free_port():
    """A TCP port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _process(rank, processes, port, function, path, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.save(function(*args), path / f"{rank}.pth")
    torch.distributed.destroy_process_group()


def on_processes(processes, function, tmp_path, *args):
    """Results of function(*args) on every process of a gloo group, in the order of ranks."""
    torch.multiprocessing.spawn(_process, (processes, free_port(), function, tmp_path, args), nprocs=processes)
    return [torch.load(tmp_path / f"{rank}.pth") for rank in range(processes)]


def share_of(features, labels):
    """What `extract_features` returns on this process, of features and labels of all images."""
    missing = -len(labels) % common.world_size()
    features, labels = torch.cat([features, features[:missing]]), F.pad(labels, (0, missing), value=-1)
    return common.own_rows(features), labels


def both_modes(function):
    return {training: function(training) for training in (False, True)}


def assert_processes_agree(function, tmp_path):
    """function(training) gives losses and a state dict: equal on two processes, BatchNorm's statistics aside.

    In eval mode they are those of one process too; in train mode BatchNorm sees other companions, so that they are not.
    """
    one, other = on_processes(2, both_modes, tmp_path, function)
    for training, (history, state) in one.items():
        other_history, other_state = other[training]
        assert history == other_history
        names = [name for name in state if "running" not in name]
        for name in names:
            torch.testing.assert_close(state[name], other_state[name], rtol=0, atol=0)
        alone, alone_state = function(training)
        if training:
            assert history != alone
            continue
        for step, alone_step in zip(history, alone, strict=True):
            assert step == pytest.approx(alone_step, rel=1e-5)
        for name in names:
            torch.testing.assert_close(state[name], alone_state[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A short run of moco_v2.py on drawn images, as a user makes one; the path of its checkpoint."""
    out = tmp_path_factory.mktemp("teacher")
    run_script(
        "moco_v2.py --data shapes:64 --arch resnet8 --image-size 16 --batch-size 32 --queue-size 64 --dim 16 "
        f"--epochs 2 --out {out}"
    )
    return out / "checkpoint.pth"


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder in ImageNet's layout: JPEG files in colour, grey, CMYK, tiny and of odd shape; PNG and BMP files."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    shapes = [(60, 80), (80, 60), (3, 2), (20, 200), (200, 20), (64, 64), (50, 70), (1, 1)]
    modes = ["RGB", "L", "CMYK", "RGB", "RGB", "RGB", "P", "RGB"]
    suffixes = ["jpg", "JPEG", "jpg", "jpg", "jpeg", "bmp", "png", "jpg"]
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i, (shape, mode, suffix) in enumerate(zip(shapes, modes, suffixes, strict=True)):
                pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / f"{i}.{suffix}")
    return root


@pytest.fixture(scope="session")
def broken_folder(tmp_path_factory, image_folder):
    """The image folder with three unreadable training images (cut off, no image, empty) and one for validation."""
    root = tmp_path_factory.mktemp("broken") / "images"
    shutil.copytree(image_folder, root)
    os.truncate(root / "train" / "ant" / "0.jpg", 400)
    (root / "train" / "bee" / "1.JPEG").write_bytes(b"no image")
    (root / "train" / "bee" / "6.png").write_bytes(b"")
    (root / "val" / "ant" / "2.jpg").write_bytes(b"\xff\xd8\xff no image")
    return root
