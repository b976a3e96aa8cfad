"""What features are worth: a linear classifier on them, their nearest neighbours, the whole network fine-tuned.

Linear probe: a linear layer is trained on the features of the frozen backbone, on crops and flips made anew every
epoch, and judged by the validation images (MoCo, SEED, DisCo: 100 epochs, batch 256, no weight decay). The papers take
a learning rate of 30 for ResNets and 3 for other networks; here several are probed at once, a layer each on the same
features. With --cached the features of centre crops are computed once and all epochs are trained on them.
k-NN: a vote of the k nearest training images by cosine similarity (SEED: k = 10), plain and weighted.
Fine-tuning (--finetune): the network itself is trained, at a rate of its own. A part of the labels makes either of them
the papers' semi-supervised test; another data set makes it their transfer test. Without --image-size, images come at
the size that a checkpoint tells, at 32 pixels for networks made for those, at 224 for others.

    torchrun --nproc_per_node=8 linear_eval.py --weights runs/disco/backbone.pth
    torchrun --nproc_per_node=8 linear_eval.py --weights runs/disco/backbone.pth --label-fraction 0.01 --finetune
    python linear_eval.py --data shapes --cached --weights runs/disco/backbone.pth random --arch resnet8
"""

import hashlib
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import common

# ---------------------------------------------------------------------------------------------------------- Classifiers


class Probe(nn.Module):
    """One linear classifier for each learning rate: features (N, dim) -> logits (rates, N, num_classes)."""

    def __init__(self, dim, num_classes, rates):
        super().__init__()
        self.heads = nn.ModuleList(linear_classifier(dim, num_classes) for _ in range(rates))

    def forward(self, features):
        return torch.stack([head(features) for head in self.heads])


def linear_classifier(dim, num_classes):
    """A linear layer that starts as in the papers: weights of deviation 0.01, biases of 0."""
    head = nn.Linear(dim, num_classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def evaluate(head, features, labels):
    """Accuracies in percent of a linear layer on validation features, and its confusion matrix.

    Returns {"top1", "top5", "per_class": a value a class (None where it has no image), "confusion": [true][predicted]}.
    """
    classes = head.out_features
    best = torch.cat([head(rows).topk(min(5, classes), dim=1).indices for rows in features.split(2**14)])
    hits = best == labels[:, None]
    confusion = torch.bincount(labels * classes + best[:, 0], minlength=classes**2).view(classes, classes)
    right, count = confusion.diagonal().tolist(), confusion.sum(dim=1).tolist()
    return {
        "top1": 100 * hits[:, 0].sum().item() / len(labels),
        "top5": 100 * hits.any(dim=1).sum().item() / len(labels),
        "per_class": [100 * r / n if n else None for r, n in zip(right, count, strict=True)],
        "confusion": confusion.tolist(),
    }


STEPS = (0.1, (0.6, 0.8))  # MoCo, SEED: cut by 10 at 60 and 80 of 100 epochs
HALVINGS = (0.5, (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.6, 0.8))  # DisCo's released code
SCHEDULES = {"steps": STEPS, "halvings": HALVINGS}


def lr_factor(schedule, epoch, epochs):
    """Factor on the learning rate in an epoch."""
    factor, milestones = SCHEDULES[schedule]
    return factor ** sum(epoch >= round(milestone * epochs, 6) for milestone in milestones)


def cached_batches(features, labels, batch_size, seed, step, stop):
    """Shuffled batches from `step` to the end of its epoch, the same on every process: (features, labels)."""
    per_epoch = len(features) // batch_size
    epoch = step // per_epoch
    order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(features))).to(features.device)
    for batch in range(step, min(stop, (epoch + 1) * per_epoch)):
        rows = order[batch % per_epoch * batch_size :][:batch_size]
        yield features[rows], labels[rows]


def frozen_batches(encoder, loader, step, stop):
    """The same from augmented images through the frozen backbone, which the processes share out."""
    for (images,), labels in loader.batches(step, stop):
        yield common.gather(encoder.features(images)), common.gather(labels)


# ----------------------------------------------------------------------------------------------------------- Evaluation


def main():
    args = parse_args()
    device = common.init_device(args.seed)
    for name in args.weights:
        if args.weights.count(name) > 1:
            raise common.UserError(f"--weights names {name} twice")
    files = {name: load_weights(args, name, args.image_size) for name in args.weights if name != "random"}
    sizes = [encoder.backbone.image_size for encoder in files.values()]
    size = args.image_size or max(sizes, default=None)
    train, val, size = common.load_labelled(args.data, args.data_root, device, size)
    if args.label_list:
        train = common.subset_from_list(train, args.label_list)
    train = common.subsample_per_class(train, args.label_fraction, args.seed)
    if max(args.knn) > len(train):
        raise common.UserError(f"--knn {max(args.knn)} is larger than the {len(train)} training images")
    crop = common.View(size, scale=(0.08, 1.0), color=False)
    loader = common.Loader(train, [crop], args.batch_size, args.seed, args.workers, device)
    encoders = {name: files.get(name) or untrained(args.arch, size, args.seed) for name in args.weights}
    for name, encoder in encoders.items():
        if name in files and encoder.backbone.image_size != size:  # a transformer's positions are made for one size
            encoder = encoders[name] = load_weights(args, name, size)
        common.check_input_size(encoder.backbone, name, size)
        encoder.eval()

    lists = [args.label_list] if args.label_list else []
    run = common.Run("linear_eval", args, train, val, files=[*files, *lists])
    results = run.read("eval.json") or {}
    for number, (name, encoder) in enumerate(encoders.items(), start=1):
        if name in results:
            continue
        encoder.amp = common.AMP[args.amp]
        encoder.to(device, memory_format=torch.channels_last)
        if args.compile:
            encoder.backbone.compile()
        clock = [time.perf_counter()]
        train_set, val_set = features_of(args, run, name, encoder, (train, val), size, device)
        clock.append(time.perf_counter())
        votes = k_nearest(args, train_set, val_set, train.num_classes)
        draw_neighbours(run, f"neighbors{number if number > 1 else ''}.png", train, val, train_set, val_set, size)
        clock.append(time.perf_counter())
        result = {
            "parameters": sum(p.numel() for p in encoder.backbone.parameters()),
            "feature_dim": encoder.backbone.feature_dim,
            **votes,
        }
        if args.finetune:
            result["finetune"] = fine_tune(args, run, name, encoder, train, val, loader, size, device)
        else:
            result["linear"] = probe(args, run, name, encoder, train, loader, train_set, val_set, device)
        clock.append(time.perf_counter())
        seconds = dict(zip(("features", "knn", "training"), np.diff(clock).round(1).tolist(), strict=True))
        results[name] = result
        run.log({"weights": name, "step": args.epochs * len(loader), **votes, "seconds": seconds})
        run.write("eval.json", results)
    if common.rank() == 0:
        print_table(results, args.knn)


def load_weights(args, name, image_size):
    """The Encoder of a file, or of `torchvision`'s labelled weights of --arch, frozen."""
    arch = args.arch if name == "torchvision" else None
    return common.load_teacher(name, arch, image_size, args.trust_teacher)


def untrained(arch, image_size, seed):
    """The Encoder of `random` weights, frozen."""
    if not arch:
        raise common.UserError("--weights random needs a network: pass --arch NAME")
    torch.manual_seed(seed)
    return common.Encoder(common.build_backbone(arch, image_size), nn.Identity()).requires_grad_(False).eval()


def features_of(args, run, name, encoder, datasets, size, device):
    """Features and labels of the centre crops of both data sets; with --cached from the run's folder, if there.

    Every image counts once, whatever the number of processes and the size of a batch.
    """
    path = run.folder / f"features.{hashlib.sha256(name.encode()).hexdigest()[:8]}.pth"
    if args.cached and common.gather(torch.tensor([path.exists()])).all():
        return [[part.to(device) for part in features] for features in common.load_file(path, whole=True)]
    features = [
        common.extract_features(encoder, dataset, size, args.batch_size, args.workers, device) for dataset in datasets
    ]
    if args.cached and common.rank() == 0:
        common.atomic_write(path, lambda file: torch.save(features, file))
    return features


def k_nearest(args, train_set, val_set, num_classes):
    """Accuracies in percent of plain and of weighted votes, for every k of --knn; the processes share the queries."""
    features, labels = (part[common.rank() :: common.world_size()] for part in val_set)
    similarity, nearest = common.nearest_neighbours(train_set[0], features, max(args.knn))
    neighbours = train_set[1][nearest]
    accuracies = {}
    for name, temperature in (("knn", None), ("knn_weighted", args.knn_temperature)):
        by_k = common.knn_vote_accuracy(similarity, neighbours, labels, args.knn, num_classes, temperature)
        accuracies[name] = {str(k): accuracy for k, accuracy in by_k.items()}
    return accuracies


def probe(args, run, name, encoder, train, loader, train_set, val_set, device):
    """Train a linear layer for each learning rate; returns the verdict on the best, and the accuracy of all."""
    torch.manual_seed(args.seed)
    heads = Probe(encoder.backbone.feature_dim, train.num_classes, len(args.lr)).to(device)
    if args.cached:
        per_epoch = len(train_set[0]) // args.batch_size

        def batches(step, stop):
            return cached_batches(*train_set, args.batch_size, args.seed, step, stop)
    else:
        per_epoch = len(loader)

        def batches(step, stop):
            return frozen_batches(encoder, loader, step, stop)

    def judged():
        return [evaluate(head, *val_set) for head in heads.heads]

    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads.heads, args.lr, strict=True)]
    train_classifier(args, run, name, heads, groups, batches, per_epoch, judged, device)
    verdicts = judged()
    best = max(range(len(verdicts)), key=lambda rate: verdicts[rate]["top1"])
    by_lr = {f"{lr:g}": verdict["top1"] for lr, verdict in zip(args.lr, verdicts, strict=True)}
    return {"lr": args.lr[best], "top1_by_lr": by_lr, **verdicts[best]}


def fine_tune(args, run, name, encoder, train, val, loader, size, device):
    """Train the network and a linear layer on it, each at its rate; returns the verdict."""
    torch.manual_seed(args.seed)
    head = linear_classifier(encoder.backbone.feature_dim, train.num_classes)
    network = common.Classifier(encoder.backbone.requires_grad_(True), head).to(device)
    network.amp = encoder.amp
    groups = [{"params": network.backbone.parameters(), "lr": args.backbone_lr},
              {"params": head.parameters(), "lr": args.lr[0]}]  # fmt: skip

    def batches(step, stop):
        for (images,), labels in loader.batches(step, stop):
            yield images, labels

    def judged():
        features = common.extract_features(network, val, size, args.batch_size, args.workers, device)
        return [evaluate(head, *features)]

    train_classifier(args, run, name, network.train(), groups, batches, len(loader), judged, device)
    return {"lr": args.lr[0], "backbone_lr": args.backbone_lr, **judged()[0]}


def train_classifier(args, run, name, model, groups, batches, per_epoch, judged, device):
    """Train `model` for all epochs on `batches(step, stop)`, or go on with it; each group of weights has its rate."""
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.finetune and args.amp == "fp16")
    step = run.resume(model, optimizer, scaler, of=name)
    # A probe is trained on the whole batch by every process alike: cheaper than to exchange its gradients
    ddp_model = common.distribute(model) if args.finetune else model

    steps = args.epochs * per_epoch
    stop = min(steps, args.max_steps or steps)
    run.start_bar(step, stop, args.batch_size, name)
    while step < stop:
        epoch = step // per_epoch
        factor = lr_factor(args.schedule, epoch, args.epochs)
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * factor
        for inputs, labels in batches(step, stop):
            logits = ddp_model(inputs)
            losses = torch.stack([F.cross_entropy(x, labels) for x in logits.view(-1, *logits.shape[-2:])])
            optimizer.zero_grad()
            scaler.scale(losses.sum()).backward()  # each layer's gradient is its own
            scaler.step(optimizer)
            scaler.update()
            step += 1
            epoch_ends = step % per_epoch == 0 or step == stop
            run.track(step, epoch, {"loss": losses.min()}, args.lr[0] * factor, epoch_ends)
        run.log({"weights": name, "step": step, "epoch": epoch, "top1": [verdict["top1"] for verdict in judged()]})
        run.save(step)
    run.bar.close()


@torch.no_grad()
def draw_neighbours(run, file_name, train, val, train_set, val_set, size, queries=8, neighbours=10):
    """Write a picture with a row for each query: a validation image and its nearest training images, nearest first.

    A frame is blue where the neighbour's class is the query's, and red where it is another.
    """
    run.name_unreadable(0)
    if common.rank() > 0:
        return
    rows = torch.linspace(0, len(val_set[0]) - 1, queries).long().unique()
    _, nearest = common.nearest_neighbours(train_set[0], val_set[0][rows], min(neighbours, len(train_set[0])))
    right = train_set[1][nearest] == val_set[1][rows, None]
    view = common.View(size, scale=None, color=False)
    tiles = []
    for row, found, same in zip(rows, nearest, right, strict=True):
        for dataset, numbers, frames in ((val, row[None], [None]), (train, found, same.tolist())):
            numbers = common.readable(dataset)[numbers.cpu().numpy()]
            images = dataset[common.BatchRequest(numbers, [view], None, None)][0][0]
            images = common.TF.to_dtype(images.cpu(), torch.float32, scale=True)
            images = F.interpolate(images, max(64, size), mode="nearest")
            for image, frame in zip(images, frames, strict=True):
                color = {None: (0.5, 0.5, 0.5), True: (0.1, 0.4, 0.9), False: (0.9, 0.2, 0.1)}[frame]
                tile = torch.tensor(color)[:, None, None].repeat(1, image.shape[1] + 8, image.shape[2] + 8)
                tile[:, 4:-4, 4:-4] = image
                tiles.append(tile)
    save = torchvision.utils.save_image
    common.atomic_write(
        run.folder / file_name, lambda file: save(tiles, file, nrow=len(tiles) // len(rows), format="png")
    )


def print_table(results, ks):
    """Print a line for each judged network, the best first."""
    protocol = "finetune" if any("finetune" in result for result in results.values()) else "linear"
    width = max(len("weights"), *map(len, results))
    columns = [f"{k}-NN" for k in ks] + [protocol, "top-5", "at lr"]
    print(f"{'weights':{width}}  parameters" + "".join(f"{column:>9}" for column in columns))
    for name, result in sorted(results.items(), key=lambda item: -item[1][protocol]["top1"]):
        verdict = result[protocol]
        values = [result["knn"][str(k)] for k in ks] + [verdict["top1"], verdict["top5"]]
        cells = "".join(f"{value:9.2f}" for value in values) + f"{verdict['lr']:9g}"
        print(f"{name:{width}}  {result['parameters']:10,}" + cells)


def parse_args():
    parser = common.common_parser("linear_eval", __doc__, epochs=100, batch_size=256, lr=None, weight_decay=0.0)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, help="files (backbone.pth, checkpoint.pth, any teacher), or random or "
        "torchvision, the untrained or labelled network of --arch")  # fmt: skip
    add("--trust-teacher", action="store_true", help="run .pt2 programs, which can hold any code")
    add("--arch", help="network of random and torchvision (files tell theirs)")
    add("--lr", type=common.positive_float, nargs="+", default=[30.0, 10.0, 3.0, 1.0, 0.3, 0.1], help="learning "
        "rates to probe (default %(default)s; papers: 30 for ResNets, 3 for others; 0.2 with --finetune)")  # fmt: skip
    add("--schedule", choices=list(SCHEDULES), default="steps", help="of the learning rate: cut by 10 at 60 and 80 %% "
        "of the epochs (MoCo, SEED), or DisCo's halvings (default %(default)s)")  # fmt: skip
    add("--cached", action="store_true", help="train on the features of centre crops, computed once")
    add("--finetune", action="store_true", help="train the network, too (default then 20 epochs)")
    add("--backbone-lr", type=common.positive_float, default=0.01, help="its learning rate (default %(default)s)")
    add("--label-fraction", type=common.number(float, 0, 1, open_below=True), default=1.0, help="train on this part "
        "of each class's images, picked by --seed (default all)")  # fmt: skip
    add("--label-list", metavar="FILE", help="train on the images that a text file names, as SimCLR's 1 and 10 %% of "
        "ImageNet, a name a line")  # fmt: skip
    add("--knn", type=common.positive_int, nargs="+", default=[10, 20, 200], help="neighbours (default %(default)s)")
    add("--knn-temperature", type=common.positive_float, default=0.07, help="a weighted vote counts "
        "exp(similarity / T) (default %(default)s)")  # fmt: skip
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
