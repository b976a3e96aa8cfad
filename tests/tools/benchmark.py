"""What the scripts cost, as ratios measured in pairs on this machine: python tests/tools/benchmark.py

    Input path   images a second on one core, two views an image, against the PIL path of the released codes: 500x375
                 JPEG files to 224 pixels, and a set in memory at 32 pixels. "workers" is what a worker does (decode,
                 crop, flip); colour follows on the training device, here the same core.
    Folder       time and memory of opening a folder of 200,000 tiny files, for training and again for --knn-every.
    Step         a whole DisCo step (losses, queue, moving average, optimiser) over the forward and backward passes that
                 it cannot do without. With --depthwise and ONEDNN_MAX_CPU_ISA=AVX2 in the environment, this alone: a
                 step of MobileNetV3 on 24 pixels with depthwise convolutions as matrix products, over torch's own.
    SEED         time and memory of its loss and gradients at 256 images and a queue of 65536, against the released way
                 (a copy of the queue, then the temperature over (N, 1 + K) similarities).
    SSKD         a whole training step with its data on two cores, images a second, against the same networks and losses
                 behind the released code's input: flip, turns and padded crops image by image in PIL, two workers.
    Evaluation   a probe of eight learning rates against one of one, images behind a frozen network; memory and time of
                 features, k-NN and a cached probe on one and on two processes. With --imagenet this alone, at
                 ImageNet's size with 2048 dimensions on two processes: about 6 GiB each, and an hour.
    Transformer  the forward pass of a frozen ViT-S/14 from a file of DINOv2's layout, at 224 pixels, over torchvision's
                 own VisionTransformer of the same size.
    LightlyTrain a whole step of seed.py with its input, frozen ViT-S/14 to ResNet-18 at 224 pixels, images a second of
                 one core's time, against LightlyTrain's method distillationv1 (pip install lightly-train): a step of
                 each in turn, with the same files, batch and queue.
    Saving       the pause of a checkpoint of MoCo v2 with ResNet-50 and a queue of 65536, and what it adds to a run.
    Tracking     what counting a step costs: the log, the question whether to save or to stop.

Each pair runs in turn, so that a change of the machine's speed meets both; the median of the ratios is printed.
"""

import argparse
import importlib.util
import os
import random
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision import transforms

sys.path.extend(map(str, Path(__file__).parents[1:3]))  # conftest.py, and the scripts

from conftest import COLOR

import common
import sskd
from disco import DisCo
from linear_eval import CachedBatches, Probe
from moco_v2 import MoCo
from seed import main as run_seed
from seed import seed_loss
from sskd import SSKD, rotate_and_crop

CPU = torch.device("cpu")


def pairs(ours, theirs, rounds=7):
    """Seconds of both calls and their ratio ours / theirs: medians over `rounds`, one call of each in turn."""
    seconds = []
    ours(), theirs()
    for _ in range(rounds):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        theirs()
        seconds.append((middle - start, time.perf_counter() - middle))
    one, other = (statistics.median(column) for column in zip(*seconds, strict=True))
    return one, other, statistics.median(a / b for a, b in seconds)


class PilBlur:
    """The released codes' blur."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def pil_path(size):
    """The transform of the released codes (MoCo v2's main_moco.py), from a PIL image to a normalised tensor."""
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([PilBlur()], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*common.IMAGENET_MEAN_STD),
    ])  # fmt: skip


def jpeg_folder(root, count=64):
    """Images of natural smoothness and size, as JPEG files."""
    rng = np.random.default_rng(0)
    (root / "train" / "class").mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        grain = rng.normal(0, 8, (375, 500, 3))
        image = np.asarray(Image.fromarray(pixels).resize((500, 375), Image.BICUBIC)) + grain
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "train" / "class" / f"{i}.jpg", quality=90)
    return common.FolderDataset(root / "train")


def input_path(name, dataset, size, pil_images):
    """Print images a second of both paths."""
    torch.set_num_threads(1)
    view = common.View(size, (0.2, 1.0), 0.5, **COLOR)
    loader = common.Loader(dataset, [view, view], len(dataset), 0, 0, CPU)
    batches = common.TrainingBatches(dataset, [view, view], len(dataset), 0)
    transform = pil_path(size)

    def released():
        for image in pil_images():
            transform(image), transform(image)

    rows = [("workers", lambda: batches[0]), ("workers and colour", lambda: list(loader.batches(range(1))))]
    for what, ours in rows:
        one, other, ratio = pairs(ours, released)
        rates = f"{len(dataset) / one:8.0f} images/s   PIL path {len(dataset) / other:6.0f} images/s"
        print(f"{name:24} {what:20} {rates}   {1 / ratio:5.1f} times as fast")


def open_folder(rank, processes, folder, results):
    """Open a folder for training and again for k-NN; seconds, MiB that this process alone holds, MiB for a worker."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    store = f"file://{folder}/store{processes}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    peak, before, start = peak_memory(), private_memory(), time.perf_counter()
    opened = [common.FolderDataset(folder / "train") for _ in range(2)]
    seconds, memory = time.perf_counter() - start, private_memory() - before
    torch.distributed.barrier()
    peak = peak_memory() - peak
    pickled = len(ForkingPickler.dumps(opened[0])) / 2**20
    results.put((seconds, memory, peak, pickled))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def private_memory():
    """MiB that this process shares with no other (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"Private_\w+:\s*(\d+) kB", lines))) / 2**10


def listing(count=200_000, classes=200):
    """Print time and memory of opening a folder of tiny files, on one process and on four."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(classes):
            root = Path(folder) / "train" / f"n{i:08}"
            root.mkdir(parents=True)
            for n in range(count // classes):
                (root / f"n{i:08}_{n}.JPEG").touch()
        common.torchvision.datasets.ImageFolder(f"{folder}/train")  # the system remembers the folder from here on
        for processes in (1, 4):
            results = torch.multiprocessing.get_context("spawn").SimpleQueue()
            torch.multiprocessing.spawn(open_folder, (processes, Path(folder), results), processes)
            seconds, memory, peak, pickled = zip(*(results.get() for _ in range(processes)), strict=True)
            print(f"a folder of {count} files, opened twice, {processes} processes: {max(seconds):.1f} s, "
                  f"{min(memory):.1f} to {max(memory):.1f} MiB a process (at its peak {min(peak):.0f} to "
                  f"{max(peak):.0f}), {max(pickled):.2f} MiB sent to a spawned worker")  # fmt: skip


def disco_step(student, teacher, size, batch_size, queue_size):
    """A DisCo model, two views, and a function that trains a step on them."""
    torch.manual_seed(0)

    def encoder(name, hidden):
        backbone = common.build_backbone(name, size)
        return common.Encoder(backbone, common.mlp_head(backbone.feature_dim, hidden, 128))

    model = DisCo(encoder(student, 2048), encoder(teacher, 512), queue_size=queue_size)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.student.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True)
    views = torch.randn(2, batch_size, 3, size, size)

    def whole():
        losses, keys = model(*views)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        model.enqueue(keys)

    return model, views, whole


def step(arch, size, batch_size, queue_size):
    """Print the time of a whole step over that of its bare passes."""
    torch.set_num_threads(torch.get_num_interop_threads())
    teacher = "resnet18" if size > 32 else "resnet20"
    model, (view1, view2), whole = disco_step(arch, teacher, size, batch_size, queue_size)

    def bare():
        model.student.zero_grad()
        out1, out2 = model.student(view1), model.student(view2)
        with torch.no_grad():
            model.mean_student(view2), model.teacher(view1), model.teacher(view2)
        (out1.sum() + out2.sum()).backward()

    one, other, ratio = pairs(whole, bare)
    print(f"DisCo step, {arch}, {size} pixels, batch {batch_size}, queue {queue_size}: {1e3 * one:.0f} ms, bare passes "
          f"{1e3 * other:.0f} ms, ratio {ratio:.3f}")  # fmt: skip


def depthwise(size=24, batch_size=64):
    """Print the time of a step with depthwise convolutions as matrix products over that with torch's.

    It means something without AVX-512 alone, on such a CPU or with ONEDNN_MAX_CPU_ISA=AVX2.
    """
    torch.set_num_threads(1)
    ours, _, with_products = disco_step("mobilenet_v3_small", "resnet8", size, batch_size, 1024)
    theirs, _, with_torch = disco_step("mobilenet_v3_small", "resnet8", size, batch_size, 1024)
    common.speed_up_depthwise(ours)
    for module in theirs.modules():
        if isinstance(module, common.Depthwise):
            module.__class__ = torch.nn.Conv2d
    one, other, ratio = pairs(with_products, with_torch)
    print(f"DisCo step, MobileNetV3-Small, {size} pixels, batch {batch_size}: {1e3 * one:.0f} ms, with torch's "
          f"depthwise convolutions {1e3 * other:.0f} ms, ratio {ratio:.2f}")  # fmt: skip


def released_seed_loss(student, teacher, queue, student_temperature, teacher_temperature):
    """What the released code's forward and criterion compute, in their order."""
    queue = queue.T.clone()
    pairs = torch.einsum("nc,nc->n", student, teacher)[:, None], torch.einsum("nc,ck->nk", student, queue)
    logits = torch.cat(pairs, dim=1) / student_temperature
    with torch.no_grad():
        pairs = torch.einsum("nc,nc->n", teacher, teacher)[:, None], torch.einsum("nc,ck->nk", teacher, queue)
        target = (torch.cat(pairs, dim=1) / teacher_temperature).softmax(dim=1)
    return -(target * logits.log_softmax(dim=1)).sum() / len(logits)


def seed_memory(loss):
    """Peak memory in MiB that one call and its backward pass add to a fresh process."""
    queue, (student, teacher) = seed_inputs()
    before = peak_memory()
    loss(student.requires_grad_(), teacher, queue, 0.2, 0.01).backward()
    return peak_memory() - before


def peak_memory():
    """MiB that this process ever held at once (Linux)."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 2**10


def seed_inputs():
    """A queue of 65536 and embeddings of 256 images by student and teacher; numbers too small for a float are 0."""
    torch.set_flush_denormal(True)  # a CPU takes much longer over them, a GPU does not
    queue = torch.nn.functional.normalize(torch.randn(65536, 128), dim=1)
    return queue, torch.nn.functional.normalize(torch.randn(2, 256, 128), dim=2)


def seed_queue():
    """Print time and memory of SEED's loss against the released way."""
    queue, (student, teacher) = seed_inputs()

    def call(loss):
        loss(student.clone().requires_grad_(), teacher, queue, 0.2, 0.01).backward()

    one, other, ratio = pairs(lambda: call(seed_loss), lambda: call(released_seed_loss))
    with torch.multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        ours, theirs = pool.map(seed_memory, [seed_loss, released_seed_loss], chunksize=1)
    print(f"SEED's loss, 256 images, queue 65536: {1e3 * one:.0f} ms, {ours:.0f} MiB; the released way "
          f"{1e3 * other:.0f} ms, {theirs:.0f} MiB; ratios {ratio:.2f}, {ours / theirs:.2f}")  # fmt: skip


class PilRotations(torch.utils.data.Dataset):
    """The released SSKD code's input: four turns of an image, each cropped from the padded image."""

    def __init__(self, dataset):
        self.arrays, self.labels = dataset.images.permute(0, 2, 3, 1).numpy(), dataset.labels
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4),
            transforms.ToTensor(),
            transforms.Normalize(*dataset.mean_std),
        ])  # fmt: skip

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        image = self.arrays[index][:, ::-1] if random.random() < 0.5 else self.arrays[index]
        turns = [self.transform(Image.fromarray(np.rot90(image, k).copy())) for k in range(4)]
        return torch.stack(turns), self.labels[index]


def sskd_step(teacher, student, steps=20, batch_size=64):
    """Print images a second of SSKD's steps, and of its input alone, against the PIL input around the same networks."""
    torch.set_num_threads(2)
    drawn = common.load_dataset(f"shapes:{steps * batch_size}", None, "train", CPU)
    networks = (sskd.build_classifier(name, 10, 32) for name in (student, teacher))
    weights = {"ce": 0.1, "kd": 0.9, "tf": 2.7, "ss": 10.0}
    model = SSKD(*networks, weights, kd_temperature=4.0).to(memory_format=torch.channels_last)
    model.teacher_head.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, 0.05, momentum=0.9, weight_decay=5e-4, fused=True)
    view = common.View(32, flip=0.5, augment=partial(rotate_and_crop, rotations=4, padding=4))
    loader = common.Loader(drawn, [view], batch_size, 0, 0, CPU)
    pil = torch.utils.data.DataLoader(PilRotations(drawn), batch_size, shuffle=True, num_workers=2,
                                      persistent_workers=True)  # fmt: skip

    def train(images, labels):
        optimizer.zero_grad()
        model(images, labels)["loss"].backward()
        optimizer.step()

    def skip(images, labels):
        pass

    for what, use in (("input alone", skip), (f"whole step, {teacher} to {student}", train)):
        one, other, ratio = pairs(
            lambda use=use: [use(images, labels) for (images,), labels in loader.batches(range(steps))],
            lambda use=use: [use(images.flatten(0, 1), labels) for images, labels in pil],
        )
        count = steps * batch_size
        print(f"SSKD, 32 pixels, batch {batch_size}, {what}: {count / one:.0f} images/s, behind PIL "
              f"{count / other:.0f}, {1 / ratio:.2f} times as fast")  # fmt: skip


def probe_rates(arch="resnet18", size=96, batch_size=64, steps=4, classes=1000):
    """Print the time of a linear probe of eight learning rates over that of one."""
    torch.set_num_threads(1)
    drawn = common.load_dataset(f"shapes:{steps * batch_size}", None, "train", CPU, size)
    encoder = common.Encoder(common.build_backbone(arch, size), torch.nn.Identity()).eval()
    view = common.View(size, scale=(0.08, 1.0), flip=0.5)
    loader = common.Loader(drawn, [view], batch_size, 0, 0, CPU)

    def probing(rates):
        probe = Probe(encoder.backbone.feature_dim, classes, rates)
        optimizer = torch.optim.SGD(probe.parameters(), 1.0, momentum=0.9, fused=True)

        def train():
            for (images,), labels in loader.batches(range(steps)):
                logits = probe(encoder.features(images))
                losses = [torch.nn.functional.cross_entropy(of_rate, labels) for of_rate in logits]
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
                optimizer.step()

        return train

    eight, one, ratio = pairs(probing(8), probing(1))
    print(f"linear probe, {arch}, {size} pixels, {classes} classes: eight rates {1e3 * eight / steps:.0f} ms a step, "
          f"one {1e3 * one / steps:.0f} ms, ratio {ratio:.3f}")  # fmt: skip


class Noise:
    """A stand-in for a data set and for an encoder: labels by number, random features of `dim` dimensions."""

    in_memory, mean_std = True, common.IMAGENET_MEAN_STD

    def __init__(self, images, dim):
        self.images, self.feature_dim, self.backbone, self.training = images, dim, self, False

    def __len__(self):
        return self.images

    def __getitem__(self, request):
        return [torch.zeros(len(request.indices), 3, 1, 1)], torch.from_numpy(request.indices % 1000), {}

    def features(self, images):
        return torch.randn(len(images), self.feature_dim)

    def buffers(self):
        return []

    def eval(self):
        pass

    def train(self, training):
        pass


def evaluate_noise(rank, processes, folder, images, dim, queries, steps):
    """Extract features, vote, and train a cached probe; saves seconds and peak memory in MiB after each stage."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    torch.manual_seed(rank)
    stages = []

    def stage(function, *args):
        start = time.perf_counter()
        result = function(*args)
        stages.append((time.perf_counter() - start, peak_memory()))
        return result

    def extract(*counts):
        return [common.extract_features(Noise(n, dim), Noise(n, dim), 1, 256, 0, CPU) for n in counts]

    def draw(batches):
        for _ in batches.batches(range(steps)):
            pass

    def train_probe(batches):
        probe = Probe(dim, 1000, 6)
        optimizer = torch.optim.SGD(probe.parameters(), 1.0, momentum=0.9, fused=True)
        for (features,), labels in batches.batches(range(steps)):
            losses = [torch.nn.functional.cross_entropy(logits, labels) for logits in probe(features)]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()

    for counts in ((1000, 1000), (images, queries)):  # the first time for code that is loaded when it is needed
        train, val = stage(extract, *counts)
        stage(common.knn_accuracy, train, val, [10, 20, 200], 1000)
        stage(draw, CachedBatches(*train, 256, 0))
        stage(train_probe, CachedBatches(*train, 256, 0))
    base = stages[3][1]
    torch.save([(seconds, peak - base) for seconds, peak in stages[4:]], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def evaluation(images=196_000, dim=1280, queries=1000, processes=(1, 2), steps=20):
    """Print memory a process, and seconds, of features, k-NN and a cached probe of six rates and 1000 classes."""
    whole = images * dim / 2**18
    print(f"evaluation, {images} images of {dim} dimensions ({whole:.0f} MiB), {queries} queries:")
    for count in processes:
        with tempfile.TemporaryDirectory() as folder:
            options = count, folder, images, dim, queries, steps
            torch.multiprocessing.spawn(evaluate_noise, options, nprocs=count)
            by_process = [torch.load(f"{folder}/{rank}") for rank in range(count)]
        stages = [tuple(map(max, zip(*stage, strict=True))) for stage in zip(*by_process, strict=True)]
        (extraction, _), (knn, _), (batches, _), (training, memory) = stages
        peaks = ", ".join(f"{peak:.0f}" for _, peak in stages)
        print(f"    {count} processes: peak MiB a process {peaks} ({memory / whole:.2f} of all features); features "
              f"{extraction:.0f} s, k-NN {knn:.0f} s, a batch {1e3 * batches / steps:.1f} ms, a step "
              f"{1e3 * training / steps:.0f} ms")  # fmt: skip


def dinov2_file(path, registers=0):
    """Write random weights in the layout of a released DINOv2 ViT-S/14."""
    block = {"norm1.weight": [384], "norm1.bias": [384], "attn.qkv.weight": [1152, 384], "attn.qkv.bias": [1152],
             "attn.proj.weight": [384, 384], "attn.proj.bias": [384], "ls1.gamma": [384],
             "norm2.weight": [384], "norm2.bias": [384], "mlp.fc1.weight": [1536, 384], "mlp.fc1.bias": [1536],
             "mlp.fc2.weight": [384, 1536], "mlp.fc2.bias": [384], "ls2.gamma": [384]}  # fmt: skip
    shapes = {f"blocks.{layer}.{key}": shape for layer in range(12) for key, shape in block.items()}
    shapes |= {"cls_token": [1, 1, 384], "pos_embed": [1, 1 + 37**2, 384], "mask_token": [1, 384]}
    shapes |= {"patch_embed.proj.weight": [384, 3, 14, 14], "patch_embed.proj.bias": [384]}
    shapes |= {"norm.weight": [384], "norm.bias": [384]}
    shapes |= {"register_tokens": [1, registers, 384]} if registers else {}
    torch.save({key: 0.05 * torch.randn(shape) for key, shape in shapes.items()}, path)


def transformer(folder, size=224, batch_size=4):
    """Print what LayerScale, registers and interpolated positions of a released file cost in the forward pass."""
    theirs = torchvision.models.VisionTransformer(size, 14, 12, 6, 384, 1536).requires_grad_(False).eval()
    theirs.heads = torch.nn.Identity()
    images = torch.randn(batch_size, 3, size, size)
    for registers in (0, 4):
        dinov2_file(folder / "dinov2.pth", registers)
        ours = common.load_teacher(folder / "dinov2.pth", image_size=size)
        with torch.no_grad():
            one, other, ratio = pairs(lambda: ours(images), lambda: theirs(images))  # noqa: B023
        print(f"ViT-S/14 of a file, {registers} registers: {1e3 * one / batch_size:.0f} ms an image, torchvision's own "
              f"{1e3 * other / batch_size:.0f} ms, ratio {ratio:.3f}")  # fmt: skip


def train_in_turns(rank, turns, results, folder, batch_size, queue_size, steps):
    """Train with seed.py (rank 0) or LightlyTrain (rank 1); each waits while the other takes a step.

    Puts (rank, CPU seconds of each step, data included) in `results`: other programs of a shared machine stretch the
    wall-clock time of a step far more.
    """
    torch.set_num_threads(1)
    seconds, start = [], time.process_time()

    def hand_over(*_):
        nonlocal start
        seconds.append(time.process_time() - start)
        turns[1 - rank].release()
        turns[rank].acquire()
        start = time.process_time()

    register_optimizer_step_post_hook(hand_over)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    turns[rank].acquire()
    if rank == 0:
        options = f"--data {folder} --teacher {folder}/dinov2_vits14_pretrain.pth --student resnet18 --workers 0"
        options += f" --batch-size {batch_size} --queue-size {queue_size} --max-steps {steps} --out {folder}/seed"
        sys.argv = ["seed.py", *options.split()]
        run_seed()
    else:
        os.environ.update(LIGHTLY_TRAIN_MODEL_CACHE_DIR=folder, LIGHTLY_TRAIN_EVENTS_DISABLED="1")
        import lightly_train

        lightly_train.pretrain(
            out=f"{folder}/lightly", data=f"{folder}/train", model="torchvision/resnet18", method="distillationv1",
            method_args={"teacher": "dinov2/vits14-noreg", "queue_size": queue_size}, batch_size=batch_size, epochs=1,
            num_workers=0, accelerator="cpu", devices=1, precision="32-true", trainer_args={"max_steps": steps},
        )  # fmt: skip
    turns[1 - rank].release()
    results.put((rank, seconds))


def against_lightly(batch_size=16, queue_size=8192, steps=12):
    """Print images a second of one core's time for both programs, without their first two steps."""
    if importlib.util.find_spec("lightly_train") is None:
        return print("LightlyTrain is not installed: pip install lightly-train")
    context = torch.multiprocessing.get_context("spawn")
    turns, results = [context.Semaphore(1), context.Semaphore(0)], context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        files = jpeg_folder(Path(folder))
        for i in range(len(files), queue_size + batch_size):  # LightlyTrain wants more images than its queue holds
            os.link(files.path(i % len(files)), f"{folder}/train/class/{i}.jpg")
        dinov2_file(f"{folder}/dinov2_vits14_pretrain.pth")  # the name under which LightlyTrain looks for it
        options = turns, results, folder, batch_size, queue_size, steps
        torch.multiprocessing.spawn(train_in_turns, options, nprocs=2)
    ours, theirs = np.array([seconds[2:] for _, seconds in sorted(results.get() for _ in range(2))])
    print(f"seed.py, ViT-S/14 to ResNet-18, 224 pixels, batch {batch_size}, queue {queue_size}, one core: "
          f"{batch_size / np.median(ours):.2f} images/s, LightlyTrain {batch_size / np.median(theirs):.2f}, "
          f"{np.median(theirs / ours):.2f} times as fast")  # fmt: skip


def saving(folder):
    """Print the pause of a checkpoint on the disk of `folder`, and the cost of tracking a step."""
    backbone = common.build_backbone("resnet50")
    model = MoCo(common.Encoder(backbone, common.mlp_head(2048, 2048, 128)))
    optimizer = common.sgd(model.encoder.parameters(), 0.03, 1e-4)
    args = argparse.Namespace(out=str(folder), checkpoint_minutes=10.0, max_bad_images=0,
                              max_steps=None, batch_size=256)  # fmt: skip
    run = common.Run("moco_v2", args, arch="resnet50", image_size=224)
    run.start_or_resume(model, optimizer, torch.amp.GradScaler("cpu"))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        run.save()
        seconds.append(time.perf_counter() - start)
    size = (run.folder / "checkpoint.pth").stat().st_size / 2**20
    pause, low, high = statistics.median(seconds), min(seconds), max(seconds)
    print(f"saving, ResNet-50, queue 65536: {size:.0f} MiB, pause {pause:.2f} s ({low:.2f} to {high:.2f}), "
          f"every 10 minutes {pause / 6:.2f} % of the run")  # fmt: skip
    epochs = run.epochs(1, 1001)
    next(epochs)
    run.clock = 0, time.perf_counter()
    start = time.perf_counter()
    for _ in range(1000):
        run.end_step({"loss": torch.tensor(1.0)}, 0.03)
    print(f"tracking: {1e3 * (time.perf_counter() - start):.0f} us a step")


def main():
    if "--depthwise" in sys.argv:
        return depthwise()
    if "--imagenet" in sys.argv:
        return evaluation(1_281_167, 2048, 50_000, processes=(2,))
    with tempfile.TemporaryDirectory() as folder:
        saving(Path(folder))
        transformer(Path(folder))
    against_lightly()
    with tempfile.TemporaryDirectory() as folder:
        files = jpeg_folder(Path(folder))
        paths = [files.path(i) for i in range(len(files))]
        input_path("JPEG files, 224 pixels", files, 224, lambda: (Image.open(path).convert("RGB") for path in paths))
    drawn = common.load_dataset("shapes:512", None, "train", CPU)
    arrays = [image.permute(1, 2, 0).numpy() for image in drawn.images]
    input_path("in memory, 32 pixels", drawn, 32, lambda: map(Image.fromarray, arrays))
    listing()
    step("efficientnet_b0", 224, 16, 65536)
    step("resnet8", 32, 128, 4096)
    probe_rates()
    evaluation()
    sskd_step("resnet20", "resnet8")
    sskd_step("wrn_40_2", "wrn_16_2", steps=2)
    seed_queue()  # last: it changes how the processor treats very small numbers


if __name__ == "__main__":
    main()
