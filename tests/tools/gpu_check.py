"""Check the scripts on a GPU and measure them there: python tests/tools/gpu_check.py

    golden      the authors' trajectories and losses, on the device in full float32
    views       the same batch of random views on the device and on the CPU
    scripts     each script from end to end on drawn images; their files read on the CPU
    precision   --amp bf16 against float32; --amp fp16 with a first scale that overflows
    resume      a run that is killed and started again, against an undisturbed one
    waits       synchronizations in ten training steps, none of which writes to the log
    losses      loss and queue against the authors' form: values, time, memory
    evaluation  k-NN at ImageNet's size: 1,281,167 x 2048 synthetic features, 50,000 queries
    files       JPEG files decoded by as many workers as cores, colour on the device, and a DisCo step that they feed
    compiled    --compile against the run without it
    speed       whole steps against their bare forward and backward passes, 224 pixels, batch 256 in memory: disco.py
                and seed.py from ResNet-50 to EfficientNet-B0, moco_v2.py with ResNet-50

It needs tests/requirements.txt besides the scripts' packages, and no data. It is made for eight minutes on one H100 or
H200; what would start after `--minutes` is left out, and is then not ok. It prints one table and writes a JSON file;
the exit status is 1 if a row is not ok.
Without a GPU, `--device cpu --small` tries the program: everything is tiny, limits of time and memory are printed and
not judged, and --compile traces the networks without generating code.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import math
import operator
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial, partialmethod
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import test_disco
import test_moco_v2
import test_seed
import test_sskd
from conftest import COLOR, GOLDEN, golden_state, golden_training

import common
import disco
import moco_v2
import seed
import sskd

ROOT = Path(common.__file__).parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
OPERATORS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


class Row(NamedTuple):
    """A line of the table. limit: as "<= 1.03"; one that is a `cost` is not judged with --small."""

    what: str
    value: float
    limit: str = ""
    cost: bool = False

    def ok(self, small):
        sign, _, number = self.limit.partition(" ")
        return not sign or (self.cost and small) or OPERATORS[sign](self.value, float(number))


class Bench:
    """What the checks share: the device, sizes, a folder, clocks, and ways to run a script."""

    def __init__(self, device, small, folder, minutes):
        self.device, self.small, self.folder = torch.device(device), small, Path(folder)
        self.end = time.monotonic() + 60 * minutes

    def size(self, full, small):
        return small if self.small else full

    def seconds(self, function, *args):
        """Seconds of a call, including what it started on the GPU."""
        start = self.synchronized()
        function(*args)
        return self.synchronized() - start

    def synchronized(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def pairs(self, one, other, rounds=5, calls=2):
        """Median seconds of two functions that take turns, and the median of their ratios."""

        def repeat(function):
            for _ in range(calls):
                function()

        repeat(one), repeat(other)  # chooses algorithms, compiles
        times = [(self.seconds(repeat, one), self.seconds(repeat, other)) for _ in range(self.size(rounds, 1))]
        medians = [statistics.median(column) / calls for column in zip(*times, strict=True)]
        return *medians, statistics.median(a / b for a, b in times)

    def peak(self, function):
        """GiB that a call holds at most at once: on a GPU, or else of the whole process since it began."""
        if self.device.type == "cpu":
            function()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 2**30

    def line(self, script, data=None, epochs=2):
        """The command line of a short run on drawn images or a folder; a teacher that it needs is trained."""
        needed = {"disco": "teacher", "seed": "teacher", "linear_eval": "teacher", "sskd": "labelled"}.get(script, "")
        file = self.folder / needed / "checkpoint.pth"
        if needed and not file.exists():
            self.run(self.line(needed, epochs=1), needed)
        data = data or f"shapes:{self.size(2048, 192)}"
        options = f"--data {data} --image-size {self.size(32, 16)} --batch-size {self.size(128, 16)} --epochs {epochs}"
        queue = f"--queue-size {self.size(1024, 64)}"
        return {
            "teacher": f"moco_v2.py {options} {queue} --arch resnet20",
            "labelled": f"sskd.py {options} --train-teacher resnet20",
            "moco_v2": f"moco_v2.py {options} {queue} --arch resnet8",
            "disco": f"disco.py {options} {queue} --student resnet8 --teacher {file}",
            "seed": f"seed.py {options} {queue} --student resnet8 --teacher {file} --small-crops 2",
            "sskd": f"sskd.py {options} --student resnet8 --teacher {file} --head-epochs 1",
            "linear_eval": f"linear_eval.py {options} --weights {file} --lr 1 0.1 --knn 5",
        }[script]

    def run(self, line, out, **patches):
        """Run a script's main() here, with names replaced; returns its folder and the losses of its log."""
        script, *arguments = line.split()
        sys.stdout.flush()
        replaced = {"sys.argv": [script, *arguments, "--out", str(self.folder / out)],
                    "sys.stdout": io.StringIO(), "sys.stderr": io.StringIO(), **patches}  # fmt: skip
        with contextlib.ExitStack() as stack:
            for number in common.STOP_SIGNALS:  # the script replaces their handlers
                stack.callback(signal.signal, number, signal.getsignal(number))
            for name, replacement in replaced.items():
                stack.enter_context(mock.patch(name, replacement))
            importlib.import_module(script.removesuffix(".py")).main()
        return self.folder / out, losses_of(self.folder / out)


def losses_of(folder):
    """Losses in a run's log, as an array."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


def load(path):
    return torch.load(path, weights_only=True)


def relative(values, expected):
    """Largest difference, over the largest value expected."""
    values, expected = (torch.as_tensor(x).detach().double().cpu() for x in (values, expected))
    return ((values - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


# --------------------------------------------------------------------------------------------------------- Correctness


def golden(bench):
    """Ten steps of each method as the authors' code takes them; SSKD's losses and gradients."""
    methods = {"moco_v2": (test_moco_v2, {"encoder": "final", "momentum_encoder": "final_key"})}
    for bn in ("running", "batch"):
        parts = {"student": "final_student", "mean_student": "final_mean_student"}
        methods[f"disco_teacher_bn_{bn}"] = test_disco, parts
    methods |= {name: (test_seed, {"student": "final_student"}) for name in ("seed", "seed_small_crops")}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for name, (tests, parts) in methods.items():
            vectors = dict(np.load(GOLDEN / f"{name}.npz"))
            model = tests.golden_model(vectors).to(bench.device, memory_format=torch.channels_last)
            model.register_forward_pre_hook(lambda _, views: tuple(view.to(bench.device) for view in views))
            history = golden_training(model, getattr(model, next(iter(parts))), vectors, 10)
            values = [step.get("contrastive", step["loss"]) for step in history]
            expected = vectors["contrastive_loss" if "disco" in name else "loss"] + vectors.get("small_loss", 0)
            yield Row(f"{name}, losses", relative(values, expected), "<= 1e-3")
            errors = [relative(model.queue, vectors["final_queue"])]
            for part, prefix in parts.items():
                state = getattr(model, part).state_dict()
                errors += [relative(state[key], value) for key, value in golden_state(vectors, prefix).items()]
            yield Row(f"{name}, weights and queue after ten steps", max(errors), "<= 1e-3")
        for name in ("sskd", "sskd_selective_tf"):
            vectors = np.load(GOLDEN / f"{name}.npz")
            vectors = {key: torch.from_numpy(value).to(bench.device) for key, value in vectors.items()}
            test_sskd.test_golden_losses_kept_rows_and_gradients(vectors)  # raises where they differ
            yield Row(f"{name}, losses, kept rows and gradients differ", 0, "== 0")


def views(bench):
    """Random views and SSKD's rotations of the same images, made on the device and on the CPU."""
    size, made = bench.size(64, 16), []
    rotate = partial(sskd.rotate_and_crop, rotations=4, padding=4)
    both = [common.View(size, scale=(0.2, 1.0), flip=0.5, **COLOR), common.View(size, flip=0.5, augment=rotate)]
    for device in (torch.device("cpu"), bench.device):
        dataset = common.load_dataset("shapes:64", None, "pretrain", device, size)
        made.append(next(iter(common.Loader(dataset, both, 64, 0, 0, device).batches(range(1))))[0])
    for name, expected, found in zip(("random views", "rotations"), *made, strict=True):
        levels = 255 * 0.225 * (found.cpu() - expected).abs().max().item()
        yield Row(f"{name}, largest difference in grey levels", levels, "<= 1")


def scripts(bench):
    """Each script from end to end; what it wrote loads on a machine without a GPU."""
    for script in ("moco_v2", "disco", "seed", "labelled", "sskd", "linear_eval"):
        out, losses = bench.run(bench.line(script), f"scripts/{script}")
        yield Row(f"{script}, last loss", losses[-1], "<= 100")
        files = [load(out / name) for name in ("checkpoint.pth", "backbone.pth") if (out / name).exists()]
        devices = [x.device.type for x in tree_leaves(files) if isinstance(x, torch.Tensor)]
        elsewhere = len(devices) - devices.count("cpu")
        yield Row(f"{script}, tensors in its files that are not on the CPU", elsewhere, "== 0")
    backbone = common.build_backbone("resnet8", 32)
    backbone.load_state_dict(load(bench.folder / "scripts/disco/backbone.pth"))
    found = backbone.eval()(torch.randn(2, 3, 32, 32)).isfinite().float().mean().item()
    yield Row("disco, finite features of backbone.pth on the CPU", found, "== 1")


def precision(bench):
    """bf16 against float32; in fp16, the first steps overflow and are left out, and later ones learn."""
    start = 2.0**24
    overflow = {"torch.amp.GradScaler": partial(torch.amp.GradScaler, init_scale=start)}
    for script in bench.size(("moco_v2", "disco", "seed", "sskd"), ("disco",)):
        line = bench.line(script)
        _, plain = bench.run(line, f"precision/{script}")
        _, losses = bench.run(f"{line} --amp bf16", f"precision/{script} bf16")
        yield Row(f"{script} --amp bf16, losses against float32", relative(losses, plain), "<= 0.05")
        out, _ = bench.run(f"{line} --amp fp16", f"precision/{script} fp16", **overflow)
        checkpoint = load(out / "checkpoint.pth")
        yield Row(f"{script} --amp fp16, steps that overflow", math.log2(start / checkpoint["scaler"]["scale"]), ">= 1")
        buffers = [state["momentum_buffer"].any().item() for state in checkpoint["optimizer"]["state"].values()]
        yield Row(f"{script} --amp fp16, share of weights that learn after it", np.mean(buffers), ">= 0.9")


def compiled(bench):
    """A run with --compile against one without."""
    for script in bench.size(("disco", "sskd"), ("disco",)):
        line = bench.line(script)
        _, plain = bench.run(line, f"compiled/{script} plain")
        _, losses = bench.run(f"{line} --compile", f"compiled/{script}")
        yield Row(f"{script} --compile, losses against the run without", relative(losses, plain), "<= 0.02")


def resume(bench):
    """A run that is killed, and continued by the same command, ends as an undisturbed one."""
    line = bench.line("disco", epochs=6) + " --checkpoint-minutes 1e-9"
    whole, losses = bench.run(line, "undisturbed")
    out, last = bench.folder / "killed", load(whole / "checkpoint.pth")
    command = [sys.executable, *line.split(), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while (
        process.poll() is None
        and time.monotonic() < bench.end
        and not ((out / "log.jsonl").exists() and losses_of(out).size)
    ):
        time.sleep(0.01)
    process.kill()
    yield Row("exit status of the killed run", process.wait(), f"== {-signal.SIGKILL}")
    yield Row("part of the steps that it took", load(out / "checkpoint.pth")["step"] / last["step"], "<= 0.99")
    _, again = bench.run(line, "killed")
    yield Row("lines of the log that are missing", len(losses) - len(again), "== 0")
    yield Row("losses against the undisturbed run", relative(again, losses), "<= 0.02")
    models = [load(folder / "checkpoint.pth")["model"] for folder in (out, whole)]
    one, other = (torch.cat([x.flatten().double() for x in model.values()]) for model in models)
    yield Row("weights and queue against the undisturbed run", ((one - other).norm() / other.norm()).item(), "<= 0.05")


# --------------------------------------------------------------------------------------------------------------- Waits


WAITS = r"cuda\w*Synchronize|cudaMemcpy$|Memcpy DtoH"


class Window:
    """Stands in for `common.Run.end_step`, and profiles the ten steps after step `first`."""

    def __init__(self, first):
        self.first, self.step, self.end_step, self.stack = first, 0, common.Run.end_step, contextlib.ExitStack()

    def __call__(self, run, losses, lr):
        self.end_step(run, losses, lr)
        self.step += 1
        if self.step == self.first:
            self.profiler = self.stack.enter_context(torch.profiler.profile())
            self.warnings = self.stack.enter_context(warnings.catch_warnings(record=True))
            if torch.cuda.is_available():  # PyTorch then warns of each wait that it causes, and names the line
                warnings.simplefilter("always")
                self.stack.callback(torch.cuda.set_sync_debug_mode, "default")
                torch.cuda.set_sync_debug_mode("warn")
            self.stack.enter_context(torch.profiler.record_function("ten steps"))
        elif self.step == self.first + 10:
            self.stack.close()
            named = {f"{Path(w.filename).name}:{w.lineno}" for w in self.warnings if "synchroniz" in str(w.message)}
            self.waits, self.where = waits_among(self.profiler.events()), " ".join(sorted(named))


def waits_among(events):
    """Those of a profiler's events during "ten steps" in which the CPU waits for the GPU, by name."""
    on_cpu = torch.autograd.DeviceType.CPU  # the GPU has a range of this name, too
    steps = next(event.time_range for event in events if event.name == "ten steps" and event.device_type == on_cpu)
    inside = [event.name for event in events if steps.start <= event.time_range.start <= steps.end]
    return [name for name in inside if re.match(WAITS, name)]


def waits(bench):
    """Ten steps of each script, with images in memory and in files (--workers), and of SSKD's student."""
    control, on_gpu = Window(1), bench.device.type == "cuda"  # a CPU has no waits to count
    control.end_step = lambda *_: torch.ones(1, device=bench.device).item()
    for _ in range(11):
        control(None, None, None)
    yield Row("control: ten values read", len(control.waits), ">= 10" if on_gpu else "")
    epoch = bench.size(2048, 192) // bench.size(128, 16)
    folder = jpeg_folder(bench, bench.size(2048, 192))
    runs = [(script, "", 1) for script in ("moco_v2", "disco", "seed", "sskd", "linear_eval")]
    runs += [("moco_v2", "--workers 2", 1), ("disco", "--amp bf16", 1), ("sskd", "", epoch + 1)]
    for script, flags, first in runs:
        window, data = Window(first), folder if "workers" in flags else None
        what = f"{script} {flags} from step {first + 1}"
        line = f"{bench.line(script, data, epochs=1)} {flags}"
        bench.run(line, f"waits/{what}", **{"common.Run.end_step": lambda *args: window(*args)})  # noqa: B023
        yield Row(f"{what}, waits in ten steps {window.where}".strip(), len(window.waits), "== 0" if on_gpu else "")


# --------------------------------------------------------------------------------------------------------------- Speed


def build(bench, method, amp=None):
    """A method as its script builds it: a function that takes a step on two views, its bare passes, the networks."""
    size, queue_size = bench.size(224, 32), bench.size(65536, 64)

    def encoder(arch, hidden=None):
        backbone = common.build_backbone(arch, size)
        network = common.Encoder(backbone, common.mlp_head(backbone.feature_dim, hidden or backbone.feature_dim, 128))
        network.amp = amp
        return network

    teacher = encoder(bench.size("resnet50", "resnet20"))
    if method == "moco_v2":
        model = moco_v2.MoCo(teacher, queue_size=queue_size)
        learns, uses = model.encoder, [(model.encoder, 1), (model.momentum_encoder, 2)]
    else:
        student = encoder(bench.size("efficientnet_b0", "resnet8"), 2048 if method == "disco" else None)
        model = {"disco": disco.DisCo, "seed": seed.SEED}[method](student, teacher, queue_size=queue_size)
        learns, uses = student, [(student, 1), (teacher, 1)]
        uses += [(student, 2), (teacher, 2), (model.mean_student, 2)] if method == "disco" else []
    model.to(bench.device, memory_format=torch.channels_last)
    optimizer = common.sgd(learns.parameters(), 0.03, 1e-4)

    def step(*views):
        losses, keys = model(*views[: 1 if method == "seed" else 2])
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        model.enqueue(keys)

    def bare(*views):
        learns.zero_grad()
        outputs = []
        for network, number in uses:
            with torch.set_grad_enabled(network is learns):
                outputs.append(network(views[number - 1]))
        sum(output.sum() for output in outputs if output.requires_grad).backward()

    return step, bare, list(model.children())


def speed(bench):
    """Whole steps against their bare passes."""
    modes = {"float32 (TF32)": None, "bf16": torch.bfloat16, "bf16 --compile": torch.bfloat16}
    for mode, amp in modes.items():
        for method in ("disco", "seed", "moco_v2"):
            if time.monotonic() > bench.end:
                yield Row(f"{method}, {mode}, left out: no time; measured", 0, "== 1")
                continue
            images, ratio, peak = measure_step(bench, method, amp, "--compile" in mode)
            yield Row(f"{method}, {mode}, images/s", images)
            yield Row(f"{method}, {mode}, time over bare passes", ratio, "<= 1.03", cost=True)
            yield Row(f"{method}, {mode}, peak memory in GiB", peak)
            torch._dynamo.reset()
            gc.collect()


def measure_step(bench, method, amp, compiled):
    """Images/s of whole steps, their time over that of the bare passes, and their peak memory in GiB."""
    batch, size = bench.size(256, 8), bench.size(224, 32)
    views = torch.randn(2, batch, 3, size, size, device=bench.device)
    step, bare, networks = build(bench, method, amp)
    for network in networks if compiled else []:
        network.compile()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):  # as in the scripts
        seconds, _, ratio = bench.pairs(lambda: step(*views), lambda: bare(*views))
        return batch / seconds, ratio, bench.peak(lambda: step(*views))


def released_moco(query, key, queue):
    """MoCo's loss and queue as released: logits of a copy of the queue, divided by the temperature."""
    positive, negatives = torch.einsum("nc,nc->n", query, key)[:, None], torch.einsum("nc,kc->nk", query, queue.clone())
    logits = torch.cat([positive, negatives], dim=1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def released_seed(student, teacher, queue):
    """SEED's loss and queue as released."""
    queue, logits = queue.T.clone(), []
    for embedding, temperature in ((student, 0.2), (teacher, 0.01)):
        own, others = torch.einsum("nc,nc->n", embedding, teacher)[:, None], torch.einsum("nc,ck->nk", embedding, queue)
        logits.append(torch.cat([own, others], dim=1) / temperature)
    student_logits, teacher_logits = logits
    return -(teacher_logits.softmax(dim=1).detach() * student_logits.log_softmax(dim=1)).sum() / len(student)


def losses(bench):
    """Loss, gradient and queue beside the authors' form."""
    yield from beside("moco_v2", partial(moco_v2.info_nce, temperature=0.2), released_moco, bench)
    ours = partial(seed.seed_loss, student_temperature=0.2, teacher_temperature=0.01)
    yield from beside("seed", ours, released_seed, bench)


def beside(method, ours, theirs, bench):
    """Rows of `losses` for one method; ours, theirs: functions of the student's or query's, the keys, the queue."""
    rows, queue_size = bench.size(256, 8), bench.size(65536, 64)
    model = moco_v2.MoCo(torch.nn.Linear(1, 1), 128, queue_size).to(bench.device)  # for its queue
    released, start = model.queue.clone(), torch.zeros(1, dtype=torch.long, device=bench.device)
    query, key = F.normalize(torch.randn(2, rows, 128, device=bench.device), dim=2)
    first, second = (query.clone().requires_grad_() for _ in range(2))

    def here():
        ours(first, key, model.queue).backward()
        model.enqueue(key)

    def there():
        theirs(second, key, released).backward()
        place = int(start)
        released[place : place + len(key)] = key
        start[0] = (place + len(key)) % len(released)

    values = ours(query, key, model.queue), theirs(query, key, released)
    yield Row(f"{method}, loss against the authors' form", relative(*values), "<= 1e-4")
    memory = bench.peak(here) / bench.peak(there)
    yield Row(f"{method}, gradient against the authors' form", relative(first.grad, second.grad), "<= 1e-3")
    yield Row(f"{method}, queue against the authors' form", relative(model.queue, released), "<= 0")
    seconds, _, ratio = bench.pairs(here, there, rounds=20, calls=5)
    yield Row(f"{method}, loss and queue in ms", 1e3 * seconds)
    yield Row(f"{method}, time over the authors' form", ratio, "<= 1.05", cost=True)
    yield Row(f"{method}, peak memory over the authors' form", memory, "<= 1", cost=True)


def jpeg_folder(bench, count):
    """A folder of so many JPEG files of 500x375, with 64 contents."""
    root = bench.folder / f"images{count}"
    folder = root / "train/class"
    if not root.exists():
        folder.mkdir(parents=True)
    for number in range(count):
        path = folder / f"{number}.jpg"
        if number < 64:
            image = F.interpolate(255 * torch.rand(1, 3, 24, 32), (375, 500), mode="bicubic")
            image += 8 * torch.randn(375, 500)
            torchvision.io.write_jpeg(image[0].clamp(0, 255).byte(), str(path), 90)
        elif not path.exists():
            os.link(folder / f"{number % 64}.jpg", path)
    return root


def files(bench):
    """Views of JPEG files as they reach the device; a DisCo step in bf16 alone and fed by them."""
    workers = min(CORES, 32)
    batch, size, steps = bench.size(256, 8), bench.size(224, 32), 6 * workers
    dataset = common.load_dataset(str(jpeg_folder(bench, batch * steps)), None, "pretrain", bench.device)
    view = common.View(size, scale=(0.2, 1.0), flip=0.5, **COLOR)
    loader = common.Loader(dataset, [view, view], batch, 0, workers, bench.device)
    ((views, _),) = loader.batches(range(1))  # starts the workers

    def feed(use, count):
        """Seconds a step, from the end of the first one."""
        start = None
        for views, _ in loader.batches(range(count)):
            use(*views)
            start = start or bench.synchronized()
        return (bench.synchronized() - start) / (count - 1)

    rate = batch * steps / bench.seconds(feed, lambda *_: None, steps)
    step, _, _ = build(bench, "disco", torch.bfloat16)
    alone, _, _ = bench.pairs(lambda: step(*views), lambda: None)
    yield Row(f"two views of JPEG files, {workers} workers, images/s", rate)
    yield Row("DisCo step in bf16, views in memory, images/s", batch / alone)
    yield Row("images/s of files over those of the step", rate * alone / batch, ">= 1.05", cost=True)
    lost = 1 - alone / feed(step, min(steps, 30))
    yield Row("part of the step's time lost to input and colour", lost, "<= 0.1", cost=True)


def evaluation(bench):
    """k-NN of features around the centres of their classes."""
    count, dim, queries = bench.size((1_281_167, 2048, 50_000), (5000, 64, 200))
    classes, sets = bench.size(1000, 10), []
    centres = torch.randn(classes, dim, device=bench.device)
    for rows in (count, queries):
        features = torch.randn(rows, dim, device=bench.device)
        labels = torch.arange(rows, device=bench.device) % classes
        for part, numbers in zip(features.split(8192), labels.split(8192), strict=True):
            part += centres[numbers]
        sets.append((features, labels))
    result, start = {}, bench.synchronized()
    peak = bench.peak(lambda: result.update(common.knn_accuracy(*sets, [10, 20, 200], classes)))
    yield Row(f"{count:,} x {dim}, {queries:,} queries, seconds", bench.synchronized() - start, "<= 120", cost=True)
    yield Row("20-NN accuracy in percent", result["knn"][20], ">= 99")
    held = sum(features.nbytes for features, _ in sets) / 2**30
    yield Row("features in GiB", held)
    yield Row("peak memory over the features", peak / held, "<= 1.5", cost=True)


# --------------------------------------------------------------------------------------------------------------- Table

CHECKS = (golden, views, scripts, precision, resume, waits, losses, evaluation, files, compiled, speed)
CHECKS = {check.__name__: check for check in CHECKS}


def rows_of(name, bench):
    """Rows of a check; an exception ends it with a row of its own."""
    try:
        if time.monotonic() > bench.end:
            raise TimeoutError("left out, no time")
        yield from CHECKS[name](bench)
    except Exception as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        yield Row(f"{type(error).__name__}: {last}", math.nan, "== 0")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default %(default)s")
    parser.add_argument("--small", action="store_true", help="everything tiny; costs are not judged")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME", help="default: all")
    parser.add_argument("--minutes", type=float, default=7, help="nothing starts later (default %(default)s)")
    parser.add_argument("--out", default="runs/gpu_check.json", help="JSON file (default %(default)s)")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the scripts would take a GPU
    elif not torch.cuda.is_available():
        sys.exit("no GPU: pass --device cpu --small to try the program without one")
    torch.set_num_threads(1 if args.small else CORES)
    about = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU", "small": args.small,
             "torch": torch.__version__, "cuda": torch.version.cuda, "cores": CORES}  # fmt: skip
    rows, seconds, out = [], {}, Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'check':90} {'value':>10}  {'limit':8}  ok")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bench = Bench(args.device, args.small, folder, args.minutes)
        if args.small:
            traced = partialmethod(torch.nn.Module.compile, backend="eager")
            stack.enter_context(mock.patch("torch.nn.Module.compile", traced))
        for name in args.only:
            start = time.monotonic()
            for row in rows_of(name, bench):
                ok = bool(row.ok(args.small))
                word = "no" if not ok else "-" if not row.limit or (row.cost and args.small) else "yes"
                print(f"{f'{name}: {row.what}':90} {row.value:>10.4g}  {row.limit:8}  {word}", flush=True)
                value = row.value if math.isfinite(row.value) else None  # JSON has no NaN
                rows.append({"check": name, **row._asdict(), "value": value, "ok": ok})
            seconds[name] = round(time.monotonic() - start, 1)
            out.write_text(json.dumps({**about, "seconds": seconds, "rows": rows}, indent=1))
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} rows, {failed} not ok; seconds: {seconds}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
