"""What the scripts cost, as ratios measured in pairs on this machine: python tests/benchmark.py

    Input path   images a second on one core, two views an image, against the PIL path of the released codes: 500x375
                 JPEG files to 224 pixels, and a set in memory at 32 pixels. "workers" is what a worker does (decode,
                 crop, flip); colour follows on the training device, here the same core.
    Step         a whole DisCo step (losses, queue, moving average, optimiser) over the forward and backward passes that
                 it cannot do without.
    SEED         time and memory of its loss and gradients at 256 images and a queue of 65536, against the released way
                 (a copy of the queue, then the temperature over (N, 1 + K) similarities).
    SSKD         a whole training step with its data on two cores, images a second, against the same networks and losses
                 behind the released code's input: flip, turns and padded crops image by image in PIL, two workers.
    Verdict      a probe of eight learning rates against one of one, images behind a frozen network; time and memory of
                 k-NN votes beside the features they look at.
    Transformer  the forward pass of a frozen ViT-S/14 from a file of DINOv2's layout, at 224 pixels, over torchvision's
                 own VisionTransformer of the same size.
    Saving       the pause of a checkpoint of MoCo v2 with ResNet-50 and a queue of 65536, and what it adds to a run.
    Tracking     what counting a step costs: the log, the question whether to save or to stop.

Each pair runs in turn, so that a change of the machine's speed meets both; the median of the ratios is printed.
"""

import argparse
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
from disco import DisCo
from linear_eval import Probe, frozen_batches
from moco_v2 import MoCo
from seed import seed_loss
from sskd import SSKD

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
    loader = common.Loader(dataset, [common.View(size)] * 2, len(dataset), 0, 0, CPU)
    loader.step, loader.stop = 0, 1
    job = next(iter(loader))
    transform = pil_path(size)

    def released():
        for image in pil_images():
            transform(image), transform(image)

    rows = [("workers", lambda: dataset[job]), ("workers and colour", lambda: list(loader.batches(0, 1)))]
    for what, ours in rows:
        one, other, ratio = pairs(ours, released)
        rates = f"{len(dataset) / one:8.0f} images/s   PIL path {len(dataset) / other:6.0f} images/s"
        print(f"{name:24} {what:20} {rates}   {1 / ratio:5.1f} times as fast")


def step(arch, size, batch_size, queue_size):
    """Print the time of a whole step over that of its bare passes."""
    torch.set_num_threads(torch.get_num_interop_threads())
    torch.manual_seed(0)

    def encoder(name, hidden):
        backbone = common.build_backbone(name, size)
        return common.Encoder(backbone, common.mlp_head(backbone.feature_dim, hidden, 128))

    model = DisCo(encoder(arch, 2048), encoder("resnet18" if size > 32 else "resnet20", 512), queue_size=queue_size)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.student.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True)
    view1, view2 = torch.randn(2, batch_size, 3, size, size)

    def whole():
        losses, keys = model(view1, view2)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        model.enqueue(keys)

    def bare():
        model.student.zero_grad()
        out1, out2 = model.student(view1), model.student(view2)
        with torch.no_grad():
            model.mean_student(view2), model.teacher(view1), model.teacher(view2)
        (out1.sum() + out2.sum()).backward()

    one, other, ratio = pairs(whole, bare)
    print(f"DisCo step, {arch}, {size} pixels, batch {batch_size}, queue {queue_size}: {1e3 * one:.0f} ms, bare passes "
          f"{1e3 * other:.0f} ms, ratio {ratio:.3f}")  # fmt: skip


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
    drawn, _ = common.load_dataset(f"shapes:{steps * batch_size}", None, "train", CPU)
    networks = (common.build_classifier(name, 10, 32) for name in (student, teacher))
    weights = {"ce": 0.1, "kd": 0.9, "tf": 2.7, "ss": 10.0}
    model = SSKD(*networks, weights, kd_temperature=4.0).to(memory_format=torch.channels_last)
    model.teacher_head.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, 0.05, momentum=0.9, weight_decay=5e-4, fused=True)
    view = common.View(32, color=False, padding=4, rotations=4)
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
            lambda use=use: [use(images, labels) for (images,), labels in loader.batches(0, steps)],
            lambda use=use: [use(images.flatten(0, 1), labels) for images, labels in pil],
        )
        count = steps * batch_size
        print(f"SSKD, 32 pixels, batch {batch_size}, {what}: {count / one:.0f} images/s, behind PIL "
              f"{count / other:.0f}, {1 / ratio:.2f} times as fast")  # fmt: skip


def probe_rates(arch="resnet18", size=96, batch_size=64, steps=4, classes=1000):
    """Print the time of a linear probe of eight learning rates over that of one."""
    torch.set_num_threads(1)
    drawn, _ = common.load_dataset(f"shapes:{steps * batch_size}", None, "train", CPU, size)
    encoder = common.Encoder(common.build_backbone(arch, size), torch.nn.Identity()).eval()
    view = common.View(size, scale=(0.08, 1.0), color=False)
    loader = common.Loader(drawn, [view], batch_size, 0, 0, CPU)

    def probing(rates):
        probe = Probe(encoder.backbone.feature_dim, classes, rates)
        optimizer = torch.optim.SGD(probe.parameters(), 1.0, momentum=0.9, fused=True)

        def train():
            for features, labels in frozen_batches(encoder, loader, 0, steps):
                losses = [torch.nn.functional.cross_entropy(logits, labels) for logits in probe(features)]
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
                optimizer.step()

        return train

    eight, one, ratio = pairs(probing(8), probing(1))
    print(f"linear probe, {arch}, {size} pixels, {classes} classes: eight rates {1e3 * eight / steps:.0f} ms a step, "
          f"one {1e3 * one / steps:.0f} ms, ratio {ratio:.3f}")  # fmt: skip


def knn_memory(images, dim, queries):
    """Memory in MiB that votes of 200 neighbours add to the features, and seconds, in a fresh process."""
    train, labels = torch.randn(images, dim), torch.randint(1000, (images,))
    query, target = torch.randn(queries, dim), torch.randint(1000, (queries,))
    before, start = peak_memory(), time.perf_counter()
    common.knn_accuracy(train, labels, query, target, [10, 20, 200], 1000, 0.07)
    return peak_memory() - before, time.perf_counter() - start


def knn(images=640_000, dim=256, queries=1000):
    """Print memory and time of k-NN at half of ImageNet's number of images and an eighth of its dimensions."""
    with torch.multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory, seconds = pool.apply(knn_memory, (images, dim, queries))
    print(f"k-NN, {images} images of {dim} dimensions, {queries} queries: {memory:.0f} MiB beside the features' "
          f"{images * dim / 2**18:.0f} MiB, {seconds:.1f} s")  # fmt: skip


def transformer(folder, size=224, batch_size=4):
    """Print what LayerScale, registers and interpolated positions of a released file cost in the forward pass."""
    theirs = torchvision.models.VisionTransformer(size, 14, 12, 6, 384, 1536).requires_grad_(False).eval()
    theirs.heads = torch.nn.Identity()
    block = {"norm1.weight": [384], "norm1.bias": [384], "attn.qkv.weight": [1152, 384], "attn.qkv.bias": [1152],
             "attn.proj.weight": [384, 384], "attn.proj.bias": [384], "ls1.gamma": [384],
             "norm2.weight": [384], "norm2.bias": [384], "mlp.fc1.weight": [1536, 384], "mlp.fc1.bias": [1536],
             "mlp.fc2.weight": [384, 1536], "mlp.fc2.bias": [384], "ls2.gamma": [384]}  # fmt: skip
    shapes = {f"blocks.{layer}.{key}": shape for layer in range(12) for key, shape in block.items()}
    shapes |= {"cls_token": [1, 1, 384], "pos_embed": [1, 1 + 37**2, 384], "mask_token": [1, 384]}
    shapes |= {"patch_embed.proj.weight": [384, 3, 14, 14], "patch_embed.proj.bias": [384]}
    shapes |= {"norm.weight": [384], "norm.bias": [384]}
    images = torch.randn(batch_size, 3, size, size)
    for registers in (0, 4):
        shapes |= {"register_tokens": [1, registers, 384]} if registers else {}
        torch.save({key: 0.05 * torch.randn(shape) for key, shape in shapes.items()}, folder / "dinov2.pth")
        ours = common.load_teacher(folder / "dinov2.pth", image_size=size)
        with torch.no_grad():
            one, other, ratio = pairs(lambda: ours(images), lambda: theirs(images))  # noqa: B023
        print(f"ViT-S/14 of a file, {registers} registers: {1e3 * one / batch_size:.0f} ms an image, torchvision's own "
              f"{1e3 * other / batch_size:.0f} ms, ratio {ratio:.3f}")  # fmt: skip


def saving(folder):
    """Print the pause of a checkpoint on the disk of `folder`, and the cost of tracking a step."""
    backbone = common.build_backbone("resnet50")
    model = MoCo(common.Encoder(backbone, common.mlp_head(2048, 2048, 128)))
    optimizer = torch.optim.SGD(model.encoder.parameters(), 0.03, momentum=0.9, fused=True)
    for weight in model.encoder.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    args = argparse.Namespace(out=str(folder), tensorboard=False, checkpoint_minutes=10.0, max_bad_images=0)
    run = common.Run("moco_v2", args)
    run.resume(model, optimizer, torch.amp.GradScaler("cpu"), arch="resnet50", image_size=224)
    seconds = []
    for step in range(1, 8):
        start = time.perf_counter()
        run.save(step)
        seconds.append(time.perf_counter() - start)
    size = run.path.stat().st_size / 2**20
    pause, low, high = statistics.median(seconds), min(seconds), max(seconds)
    print(f"saving, ResNet-50, queue 65536: {size:.0f} MiB, pause {pause:.2f} s ({low:.2f} to {high:.2f}), "
          f"every 10 minutes {pause / 6:.2f} % of the run")  # fmt: skip
    run.start_bar(0, 1000, 256)
    start = time.perf_counter()
    for step in range(1, 1001):
        run.track(step, 0, {"loss": torch.tensor(1.0)}, 0.03, epoch_ends=False)
    run.bar.close()
    print(f"tracking: {1e3 * (time.perf_counter() - start):.0f} us a step")


def main():
    with tempfile.TemporaryDirectory() as folder:
        saving(Path(folder))
        transformer(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        files = jpeg_folder(Path(folder))
        paths = [path.decode() for path in files.paths]
        input_path("JPEG files, 224 pixels", files, 224, lambda: (Image.open(path).convert("RGB") for path in paths))
    drawn, _ = common.load_dataset("shapes:512", None, "train", CPU)
    arrays = [image.permute(1, 2, 0).numpy() for image in drawn.images]
    input_path("in memory, 32 pixels", drawn, 32, lambda: map(Image.fromarray, arrays))
    step("efficientnet_b0", 224, 16, 65536)
    step("resnet8", 32, 128, 4096)
    probe_rates()
    knn()
    sskd_step("resnet20", "resnet8")
    sskd_step("wrn_40_2", "wrn_16_2", steps=2)
    seed_queue()  # last: it changes how the processor treats very small numbers


if __name__ == "__main__":
    main()
