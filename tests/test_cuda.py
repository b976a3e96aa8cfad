"""On a pretended GPU, no step waits for the GPU, and the logs are those of the CPU."""

import json
import os

import pytest
import torch
from conftest import free_port, run
from pretend_cuda import PretendCuda

import common

SMALL = "--data shapes:64 --image-size 16 --batch-size 16 --epochs 1"
FILES = "--data {images} --image-size 16 --batch-size 4 --epochs 1 --workers 0"
LINES = {  # a command line: numbers of steps to stop after, in pairs, out of four steps an epoch
    f"moco_v2.py {SMALL} --arch resnet8 --queue-size 64 --knn-every 1": (2, 3),
    f"moco_v2.py {FILES} --arch resnet8 --queue-size 8": (2, 3),
    f"disco.py {SMALL} --teacher {{teacher}} --student resnet8 --queue-size 64": (2, 3),
    f"seed.py {SMALL} --teacher {{teacher}} --student resnet8 --queue-size 64 --small-crops 2": (2, 3),
    f"sskd.py {SMALL} --train-teacher resnet8": (2, 3),
    f"sskd.py {SMALL} --teacher {{labelled}} --student resnet8 --head-epochs 1": (2, 3, 6, 7),
    f"linear_eval.py {SMALL} --weights {{teacher}} --lr 1 0.1 --knn 5": (2, 3),
    f"linear_eval.py {SMALL} --weights {{teacher}} --lr 1 0.1 --knn 5 --cached": (2, 3),
    f"linear_eval.py {SMALL} --weights {{teacher}} --knn 5 --finetune": (2, 3),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, teacher_file, image_folder):
    out = tmp_path_factory.mktemp("labelled")
    run(f"sskd.py {SMALL} --train-teacher resnet8 --out {out}")
    return {"teacher": teacher_file, "labelled": out / "checkpoint.pth", "images": image_folder}


def check(line, stops, out, before_each=lambda: None):
    """Run `line` on the pretended GPU up to each of the stops, and once on the CPU.

    A run that stops a step later waits no more often: only the first step, the log, evaluation and saving wait.
    """
    waits = {}
    for stop in stops:
        before_each()
        with PretendCuda() as cuda:
            run(f"{line} --max-steps {stop} --out {out}/{stop}")
        waits[stop] = cuda.waits
    for stop, later in zip(stops[::2], stops[1::2], strict=True):
        more = waits[later] - waits[stop]
        assert waits[stop] and not more, more
    before_each()
    run(f"{line} --max-steps {later} --out {out}/cpu")
    if common.rank() == 0:
        assert losses(out / str(later)) == pytest.approx(losses(out / "cpu"), rel=1e-4)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [line[name] for line in lines for name in line if isinstance(line[name], float) and "images" not in name]
    assert found
    return found


def test_the_pretended_gpu_refuses_mixtures_and_counts_waits():
    host = torch.arange(4.0)
    with PretendCuda() as cuda:
        x = host.to("cuda", non_blocking=True)
        y = x[1:] * 2 + torch.ones(3, device="cuda") + torch.tensor(1.0)
        y[x[1:].long() - 1] = y.sum()
        assert (x.device.type, y.is_cuda, host.is_cuda) == ("cuda", True, False) and not cuda.waits
        for mixture in (lambda: y + host[1:], lambda: torch.cat([x, host]), x.numpy):
            with pytest.raises(RuntimeError, match="pretended"):
                mixture()
        for wait in (y.cpu, y.tolist, y.sum().item, lambda: y[y > 1], lambda: x[host.long()], lambda: x[[0, 1]],
                     lambda: bool(y.any()), lambda: x.new_tensor([1.0]), lambda: x.copy_(host), lambda: host.cuda(),
                     lambda: torch.tensor([1.0], device="cuda"), lambda: y.to("cpu", torch.float64)):  # fmt: skip
            before = cuda.waits.total()
            wait()
            assert cuda.waits.total() == before + 1


@pytest.mark.parametrize("line", LINES)
def test_no_step_waits_for_the_gpu(line, files, tmp_path):
    check(line.format(**files), LINES[line], tmp_path)


def check_on_a_process(rank, ports, *args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    torch.set_num_threads(1)
    ports = iter(ports)
    check(*args, before_each=lambda: os.environ.update(MASTER_PORT=str(next(ports))))


def test_no_step_waits_for_the_gpu_on_two_processes(files, tmp_path):
    line = f"disco.py {SMALL} --teacher {files['teacher']} --student resnet8 --queue-size 64"
    ports = [free_port() for _ in range(3)]
    torch.multiprocessing.spawn(check_on_a_process, (ports, line, (2, 3), tmp_path), nprocs=2)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(("moco_v2", "linear_eval"))])
def test_files_hold_no_tensors_of_the_gpu(line, files, tmp_path, monkeypatch):
    """A machine without CUDA can load what a machine with it saved."""
    save, saved = torch.save, []

    def note(content, file):
        saved.extend(x for x in torch.utils._pytree.tree_leaves(content) if isinstance(x, torch.Tensor))
        save(content, file)

    monkeypatch.setattr(torch, "save", note)
    with PretendCuda():
        run(f"{line.format(**files)} --max-steps 2 --out {tmp_path}")
        assert saved and not any(x.is_cuda for x in saved)
