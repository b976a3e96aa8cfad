"""Evaluate features: a linear classifier on them, their nearest neighbours, fine-tuning of the whole network.

Linear probe: a linear layer is trained on the features of the frozen backbone, on new crops and flips in every epoch
(MoCo, SEED, DisCo: 100 epochs, batch 256, no weight decay). The papers take a learning rate of 30 for ResNets and 3
for other networks; here several rates are tried at once, with a layer each on the same features. With --cached the
features of centre crops are computed once and all epochs are trained on them.
k-NN: a vote of the k nearest training images by cosine similarity (SEED: k = 10), plain and weighted.
Fine-tuning (--finetune): the network itself is trained, at a learning rate of its own. With a part of the labels,
linear probe and fine-tuning are the papers' semi-supervised tests; with another data set, their transfer tests. Without
--image-size, images have the size that a checkpoint stores, 32 pixels for networks made for those, 224 for others.

    torchrun --nproc_per_node=8 linear_eval.py --weights runs/disco/backbone.pth
    torchrun --nproc_per_node=8 linear_eval.py --weights runs/disco/backbone.pth --label-fraction 0.01 --finetune
    python linear_eval.py --data shapes --cached --weights runs/disco/backbone.pth random --arch resnet8
"""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.transforms.v2 import functional as TF

import common

# ---------------------------------------------------------------------------------------------------------- Classifiers


class Probe(nn.Module):
    """A linear classifier for each learning rate: features (N, dim) -> logits (rates, N, num_classes)."""

    def __init__(self, dim, num_classes, rates):
        super().__init__()
        self.heads = nn.ModuleList()
        for _ in range(rates):
            head = nn.Linear(dim, num_classes)
            nn.init.normal_(head.weight, std=0.01)  # as in the papers
            nn.init.zeros_(head.bias)
            self.heads.append(head)

    def forward(self, features):
        return torch.stack([head(features) for head in self.heads])


@torch.no_grad()
def evaluate(head, features, labels):
    """Accuracies in percent of a linear layer on validation features, and its confusion matrix.

    features, labels: from `common.extract_features`. Returns {"top1", "top5", "per_class": one value each (None
    without an image), "confusion": [true][predicted]}.
    """
    labels = common.own_rows(labels)
    features, labels = features[labels >= 0], labels[labels >= 0]
    classes = head.out_features
    best = head(features).topk(min(5, classes), dim=1).indices
    confusion = torch.bincount(labels * classes + best[:, 0], minlength=classes**2).view(classes, classes)
    confusion = common.all_reduce(confusion)
    top5 = common.all_reduce((best == labels[:, None]).sum()).item()
    right, count = confusion.diagonal().tolist(), confusion.sum(dim=1).tolist()
    return {
        "top1": 100 * sum(right) / sum(count),
        "top5": 100 * top5 / sum(count),
        "per_class": [100 * r / n if n else None for r, n in zip(right, count, strict=True)],
        "confusion": confusion.tolist(),
    }


SCHEDULES = {  # factor, and the parts of all epochs after which it applies
    "steps": (0.1, (0.6, 0.8)),  # MoCo, SEED
    "halvings": (0.5, (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.6, 0.8)),  # DisCo's released code
}


def lr_factor(schedule, epoch, epochs):
    """Factor on the learning rate in an epoch, from 0."""
    factor, milestones = SCHEDULES[schedule]
    return factor ** sum(epoch >= round(milestone * epochs, 6) for milestone in milestones)


class CachedBatches:
    """Shuffled batches of features that are extracted once, the same on every process; used like `common.Loader`."""

    def __init__(self, features, labels, batch_size, seed):
        self.features, self.labels, self.batch_size, self.seed = features, labels, batch_size, seed
        self.numbers = (labels >= 0).nonzero()[:, 0]  # of images that can be read
        if len(self.numbers) < batch_size:
            raise common.UserError(f"--batch-size {batch_size} is larger than the {len(self.numbers)} readable images")

    def __len__(self):
        return len(self.numbers) // self.batch_size

    def batches(self, steps):
        """Yield ([features (B, dim)], labels (B,)) of a range of the run's steps, all in one epoch."""
        epoch = steps.start // len(self)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.numbers))
        order = self.numbers[torch.from_numpy(order).to(self.numbers.device)]
        for step in steps:
            numbers = order[step % len(self) * self.batch_size :][: self.batch_size]
            yield [gather_rows(self.features, numbers)], self.labels[numbers]


def gather_rows(features, numbers):
    """Features (n, dim) of the images with these numbers, on every process. features: this process's share."""
    rows = numbers - common.rank() * len(features)
    own = (rows >= 0) & (rows < len(features))
    return common.all_reduce(features[rows.clamp(0, len(features) - 1)].where(own[:, None], 0))


# ----------------------------------------------------------------------------------------------------------- Evaluation


def main():
    args = parse_args()
    device = common.init_device(args.seed)
    if len(set(args.weights)) < len(args.weights):
        raise common.UserError(f"--weights {' '.join(args.weights)}: one is named twice")
    size = args.image_size
    if not size:
        files = [load_weights(args, name) for name in args.weights if name != "random"]
        size = max((file.backbone.image_size for file in files), default=common.default_image_size(args.data))
    encoders = {name: load_weights(args, name, size) for name in args.weights}
    args.image_size = size  # these belong to the run, also if a file beside the weights says them
    args.teacher_mean_std = [encoder.mean_std for encoder in encoders.values()]
    for name, encoder in encoders.items():
        common.check_input_size(encoder.backbone, name, size)
        encoder.eval()
    train, val = common.load_labelled(args.data, args.data_root, device, size)
    if args.label_list:
        train = subset_from_list(train, args.label_list)
    train = common.subsample_per_class(train, args.label_fraction, args.seed)
    if args.knn and max(args.knn) > len(train):
        raise common.UserError(f"--knn {max(args.knn)} is larger than the {len(train)} training images")
    args.knn = args.knn or sorted({min(k, len(train)) for k in (10, 20, 200)})
    crop = common.View(size, scale=(0.08, 1.0), flip=0.5)
    loader = common.Loader(train, [crop], args.batch_size, args.seed, args.workers, device)

    loaded = [encoder.description for encoder in encoders.values() if encoder.description]
    run = common.Run("linear_eval", args, train, val, loaded=loaded)
    options = size, args.batch_size, args.workers, device
    protocol = "finetune" if args.finetune else "linear"
    path = run.folder / "eval.json"
    results = common.broadcast(load_results(path, args) if common.rank() == 0 and path.exists() else {})
    for number, (name, encoder) in enumerate(encoders.items(), start=1):
        if name in results:
            continue
        encoder.amp = common.AMP[args.amp]
        encoder.convert_from(common.mean_std_of(train))
        encoder.to(device, memory_format=torch.channels_last)
        if args.compile:
            encoder.backbone.compile()
        train_features, val_features = load_or_extract(run, number, encoder, (train, val), options)
        votes = common.knn_accuracy(train_features, val_features, args.knn, len(train.classes), args.knn_temperature)
        picture = run.folder / f"neighbors{number if number > 1 else ''}.png"
        draw_neighbours(picture, (train, val), (train_features, val_features), size)
        batches = CachedBatches(*train_features, args.batch_size, args.seed) if args.cached else loader
        del train_features  # frees its memory, except with --cached
        results[name] = {
            "parameters": sum(p.numel() for p in encoder.backbone.parameters()),
            "feature_dim": encoder.backbone.feature_dim,
            "max_steps": args.max_steps,
            **votes,
            protocol: train_classifiers(run, (number, name), encoder, batches, val, val_features, options),
        }
        run.log(votes)
        run.write("eval.json", results)
    if common.rank() == 0:
        print_table(results, protocol)


def load_results(path, args):
    """What eval.json holds of as many steps, by today's names: the files may have moved since, not changed."""
    try:
        results = json.loads(path.read_text())
        if not results.keys() <= set(args.weights):
            results = dict(zip(args.weights, results.values(), strict=False))
        return {name: result for name, result in results.items() if result.get("max_steps") == args.max_steps}
    except (OSError, ValueError, AttributeError) as error:
        raise common.UserError(f"{path} is damaged ({error}): pass another --out") from None


def subset_from_list(dataset, path):
    """The part of a folder that a text file names, a line per image: NAME, as in SimCLR's lists, or CLASS/NAME.

    Raises UserError for a set in memory, for a file that cannot be read and for a name that the folder does not have.
    """
    if not isinstance(dataset, common.FolderDataset):
        raise common.UserError(f"--label-list {path} needs a folder as --data; without one, pass --label-fraction")
    try:
        names = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise common.UserError(f"cannot read --label-list {path} ({error})") from None
    places = {}
    for number in range(len(dataset)):
        file = Path(dataset.path(number))
        for name in (file.name, f"{file.parent.name}/{file.name}"):
            places.setdefault(name, []).append(number)
    numbers = []
    for name in [name.strip() for name in names if name.strip()] or ["no image"]:
        found = places.get(name, [])
        if len(found) != 1:
            raise common.UserError(f"--label-list {path} names {name}, and {len(found)} training images have this name")
        numbers += found
    return common.subset(dataset, np.unique(numbers))


def load_weights(args, name, image_size=None):
    """The Encoder of a file, or of `torchvision` or `random` weights of --arch, frozen."""
    if name != "random":
        arch = args.arch if name == "torchvision" else None
        return common.load_teacher(name, arch, image_size, args.trust_teacher, args.teacher_mean_std)
    if not args.arch:
        raise common.UserError("--weights random needs a network: pass --arch NAME")
    torch.manual_seed(args.seed)
    return common.Encoder(common.build_backbone(args.arch, image_size), nn.Identity()).requires_grad_(False).eval()


def load_or_extract(run, number, encoder, datasets, options):
    """What `common.extract_features` returns for each data set; with --cached from the run's folder, if it is there.

    Each process has a file of its share; with another number of processes the features are extracted anew.
    """
    path = run.folder / f"features.{number}.{common.rank()}of{common.world_size()}.pth"
    identity = common.broadcast(run.identity)  # a machine that does not share the folder may have another run's there
    cached = {}
    if run.args.cached and path.exists():
        with contextlib.suppress(common.UserError):  # a damaged file is written again
            cached = common.load_file(path, whole=True)
    if common.gather(torch.tensor([isinstance(cached, dict) and cached.get("identity") == identity])).all():
        return [[part.to(options[-1]) for part in features] for features in cached["features"]]
    features = [common.extract_features(encoder, dataset, *options) for dataset in datasets]
    if run.args.cached:
        run.folder.mkdir(parents=True, exist_ok=True)  # also on a machine that does not share it
        content = {"identity": identity, "features": features}
        common.atomic_write(path, lambda file: common.save_from_cpu(content, file))
    return features


def train_classifiers(run, of, encoder, batches, val, val_features, options):
    """Train a linear layer for each learning rate on frozen features; with --finetune, one layer and the network.

    of: number and name of the weights. batches: a `common.Loader` or `CachedBatches`. val, val_features: validation
    images, and their features and labels.
    Returns the metrics of the best layer, and the accuracies of all.
    """
    args, metrics, device = run.args, [], options[-1]
    torch.manual_seed(args.seed)
    model = probe = Probe(encoder.backbone.feature_dim, len(val.classes), len(args.lr)).to(device)
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(probe.heads, args.lr, strict=True)]
    if args.finetune:
        model = common.Encoder(encoder.backbone.requires_grad_(True), probe, mean_std=encoder.mean_std).train()
        model.convert_from(common.mean_std_of(val))
        model.amp = encoder.amp
        groups += [{"params": model.backbone.parameters(), "lr": args.backbone_lr}]
    rates = [group["lr"] for group in groups]
    optimizer = common.sgd(groups, args.lr[0], args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.finetune and args.amp == "fp16")
    run.metadata = {"image_size": options[0], "mean_std": encoder.mean_std}
    run.start_or_resume(model, optimizer, scaler, of=of)
    run.name_unreadable()
    # Every process trains a probe on the whole batch: cheaper than to exchange its gradients
    ddp_model = common.distribute(model) if args.finetune else model

    def evaluate_heads():
        nonlocal metrics
        features = common.extract_features(model, val, *options) if args.finetune else val_features
        metrics = [evaluate(head, *features) for head in probe.heads]
        return {"top1": [values["top1"] for values in metrics]}

    for epoch in run.epochs(args.epochs, len(batches), evaluate_heads):
        factor = lr_factor(args.schedule, epoch, args.epochs)
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * factor
        for (inputs,), labels in run.batches(batches):
            if not args.finetune and not args.cached:
                inputs, labels = common.gather(encoder.features(inputs)), common.gather(labels)
            losses = torch.stack([F.cross_entropy(logits, labels) for logits in ddp_model(inputs)])
            optimizer.zero_grad()
            scaler.scale(losses.sum()).backward()  # each layer's gradient is its own
            scaler.step(optimizer)
            scaler.update()
            run.end_step({"loss": losses.min()}, args.lr[0] * factor)

    top1 = run.metrics["top1"]
    best = top1.index(max(top1))
    by_lr = {f"{lr:g}": value for lr, value in zip(args.lr, top1, strict=True)}
    backbone_lr = {"backbone_lr": args.backbone_lr} if args.finetune else {}
    names = common.class_names(val)
    return {"lr": args.lr[best], **backbone_lr, "top1_by_lr": by_lr, "classes": names, **metrics[best]}


def draw_neighbours(path, datasets, features, size, queries=8, neighbours=10):
    """Write a picture with a row for each query: a validation image and its nearest training images, nearest first.

    A blue frame means the query's class, a red one another. datasets: training and validation images; features: what
    `common.extract_features` returns for each.
    """
    (train, val), (train_features, (val_features, val_labels)) = datasets, features
    rows = (val_labels >= 0).nonzero()[:, 0]
    rows = rows[torch.linspace(0, len(rows) - 1, queries).long().unique()]
    _, nearest = common.nearest_neighbours(train_features, gather_rows(val_features, rows), neighbours)
    nearest = nearest[:, : (train_features[1] >= 0).sum()]
    if common.rank() > 0:
        return

    def pixels(dataset, numbers):
        (images,), _, _ = common.CenterCrops(common.separate(dataset), size)[numbers.flatten().tolist()]
        images = TF.to_dtype(images.cpu(), torch.float32, scale=True)
        return F.interpolate(images, max(64, size), mode="nearest").unflatten(0, numbers.shape)

    same = (train_features[1][nearest] == val_labels[rows, None]).cpu()
    grey, blue, red = torch.tensor([[0.5, 0.5, 0.5], [0.1, 0.4, 0.9], [0.9, 0.2, 0.1]])
    colors = torch.cat([grey.expand(len(rows), 1, 3), blue.where(same[:, :, None], red)], dim=1)
    images = torch.cat([pixels(val, rows[:, None]), pixels(train, nearest)], dim=1)
    tiles = colors[..., None, None].repeat(1, 1, 1, images.shape[3] + 8, images.shape[4] + 8)
    tiles[..., 4:-4, 4:-4] = images
    save = torchvision.utils.save_image
    common.atomic_write(path, lambda file: save(tiles.flatten(0, 1), file, nrow=tiles.shape[1], format="png"))


def print_table(results, protocol):
    """Print a line for each network, the best first."""
    width = max(len("weights"), *map(len, results))
    columns = [f"{k}-NN" for k in next(iter(results.values()))["knn"]] + [protocol, "top-5", "at lr"]
    print(f"{'weights':{width}}  parameters" + "".join(f"{column:>9}" for column in columns))
    for name, result in sorted(results.items(), key=lambda item: -item[1][protocol]["top1"]):
        metrics = result[protocol]
        values = [*result["knn"].values(), metrics["top1"], metrics["top5"]]
        cells = "".join(f"{value:9.2f}" for value in values) + f"{metrics['lr']:9g}"
        print(f"{name:{width}}  {result['parameters']:10,}" + cells)


def parse_args():
    parser = common.common_parser("linear_eval", __doc__, epochs=100, batch_size=256, lr=None, weight_decay=0.0)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, help="files; random or torchvision: --arch untrained or with labels")
    add("--trust-teacher", action="store_true", help="run .pt2 programs, which can hold any code")
    add("--teacher-mean-std", type=float, nargs="+", metavar="X", help="means, deviations of its images (its own)")
    add("--arch", help="network of random and torchvision (files store theirs)")
    add("--lr", type=common.positive_float, nargs="+", default=[30.0, 10.0, 3.0, 1.0, 0.3, 0.1], help="learning "
        "rates to probe (default %(default)s; papers: 30 for ResNets, 3 for others; 0.2 with --finetune)")  # fmt: skip
    add("--schedule", choices=list(SCHEDULES), default="steps", help="of the learning rate: cut by 10 at 60 and 80 %% "
        "of the epochs (MoCo, SEED), or DisCo's halvings (default %(default)s)")  # fmt: skip
    add("--cached", action="store_true", help="train on the features of centre crops, computed once")
    add("--finetune", action="store_true", help="train the network, too (default then 20 epochs)")
    add("--backbone-lr", type=common.positive_float, default=0.01, help="with --finetune (default %(default)s)")
    add("--label-fraction", type=common.number(float, 0, 1, open_below=True), default=1.0, help="train on this part "
        "of each class's images, picked by --seed (default all)")  # fmt: skip
    add("--label-list", metavar="FILE", help="train on the images that a text file names, as SimCLR's 1 %% of ImageNet")
    add("--knn", type=common.positive_int, nargs="+", help="neighbours (default 10 20 200, as far as there are images)")
    add("--knn-temperature", type=common.positive_float, default=0.07, help="of weighted votes (default %(default)s)")
    args = parser.parse_args()
    if args.finetune:
        parser.set_defaults(epochs=20, lr=[0.2])
        args = parser.parse_args()
        if len(args.lr) > 1:
            raise common.UserError("--finetune takes one --lr: the network learns at one rate")
        if any(name.endswith(".pt2") for name in args.weights):
            raise common.UserError("--finetune trains a network, and a .pt2 program stays as it is: leave it out")
        if args.cached:
            raise common.UserError("--finetune changes the features: leave out --cached")
    return args


if __name__ == "__main__":
    common.run_script(main)
