"""Kill a short DisCo run at many points, start it again, compare what comes out bit by bit: tests/tools/faults.py

    --points 25      how many kills, of five kinds in turn: before an optimiser step; with half of a piece of a
                     checkpoint written; with half of a line of the log written; before a flush to disk; before a file
                     moves into its place
    --seed 0         which step, piece, line, flush and move
    --processes 1    2 for a run under torchrun, of which rank 0 is killed

The run saves a checkpoint at every step. "Bit by bit" compares the last checkpoint (weights, BatchNorm's statistics,
queue, optimiser, log position), backbone.pth and every line of the log, the speeds aside.
"""

import argparse
import collections
import importlib
import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import torch

sys.path.extend(map(str, Path(__file__).parents[1:3]))  # conftest.py, and the scripts

from conftest import run_script

import common

SMALL = "--data shapes:64 --image-size 16 --batch-size 16 --queue-size 50 --checkpoint-minutes 1e-9 --knn-every 1"
KINDS = ("step", "checkpoint", "log", "flush", "move")


class Fault:
    """Counts what a run does, and kills it before number `number` of `kind`."""

    def __init__(self, kind, number):
        self.kind, self.number, self.counts = kind, number, collections.Counter()

    def count(self, kind, last_words=lambda: None):
        self.counts[kind] += 1
        if (kind, self.counts[kind]) == (self.kind, self.number):
            last_words()
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, function, kind):
        """The function, counted as `kind`."""

        def counted(*args, **options):
            self.count(kind)
            return function(*args, **options)

        return counted

    def open(self, path, mode="r", *options):
        """The builtin, with writing counted."""
        file = open(path, mode, *options)
        kind = {".checkpoint.pth.tmp": "checkpoint", "log.jsonl": "log"}.get(Path(path).name)
        return CountedFile(file, self, kind) if kind else file


class CountedFile:
    """A file; the kill leaves half of what is being written."""

    def __init__(self, file, fault, kind):
        self.file, self.fault, self.kind = file, fault, kind

    def write(self, data):
        self.fault.count(self.kind, lambda: (self.file.write(data[: len(data) // 2]), self.file.flush()))
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def child(kind, number, counts, script, *arguments):
    """Run a script with a fault in rank 0; leave what was counted in the file `counts`."""
    sys.argv = [script, *arguments]
    main = importlib.import_module(script.removesuffix(".py")).main
    if os.environ.get("RANK", "0") == "0":
        fault = Fault(kind, int(number))
        common.open = fault.open
        os.fsync, os.replace = fault.before(os.fsync, "flush"), fault.before(os.replace, "move")
        torch.optim.SGD.step = fault.before(torch.optim.SGD.step, "step")
    common.run_script(main)
    if os.environ.get("RANK", "0") == "0":
        Path(counts).write_text(json.dumps(fault.counts))


def outcome(folder):
    """All that a run leaves and that must not depend on its interruptions."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in log:
        line.pop("images_per_second", None)
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    del checkpoint["log_bytes"]  # a speed has more or fewer digits
    return {"log": log, "checkpoint": checkpoint, "backbone": torch.load(folder / "backbone.pth", weights_only=True)}


def differences(one, other, where=""):
    """Names of what differs between two nested outcomes, bit by bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if type(one) is not type(other) or (isinstance(one, (dict, list)) and len(one) != len(other)):
        return [where]
    if isinstance(one, dict):
        return [name for key in one for name in differences(one[key], other.get(key), f"{where}.{key}")]
    if isinstance(one, list):
        return [
            name for i, pair in enumerate(zip(one, other, strict=True)) for name in differences(*pair, f"{where}.{i}")
        ]
    return [] if one == other else [where]


def survived(folder, points, seed, processes):
    """Kill and restart at `points` points; yields (kind, number, of how many, names that differ in the end)."""
    run_script(f"moco_v2.py {SMALL} --arch resnet8 --dim 16 --epochs 1 --out {folder}/teacher")
    line = f"disco.py {SMALL} --teacher {folder}/teacher/checkpoint.pth --student resnet8 --epochs 2 --out"
    counts = folder / "counts.json"
    run_script(f"{__file__} child none 0 {counts} {line} {folder}/whole", processes)
    counts, whole = json.loads(counts.read_text()), outcome(folder / "whole")
    rng = random.Random(seed)
    for point in range(points):
        kind = KINDS[point % len(KINDS)]
        number = rng.randint(1, counts[kind])
        out = folder / f"killed{point}"
        killed = run_script(f"{__file__} child {kind} {number} none {line} {out}", processes, check=False)
        assert killed.returncode == -signal.SIGKILL or (processes > 1 and "SIGKILL" in killed.stderr), killed.stderr
        run_script(f"{line} {out}", processes)
        yield kind, number, counts[kind], differences(whole, outcome(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, number, count, differ in survived(Path(folder), args.points, args.seed, args.processes):
            good += not differ
            print(
                f"killed at {kind} {number} of {count}: {'differs in ' + str(differ) if differ else 'same bits'}",
                flush=True,
            )
    print(f"{good} of {args.points}")
    sys.exit(good < args.points)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
