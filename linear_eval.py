"""What frozen features are worth: a linear classifier on them, and their nearest neighbours.

Linear probe: a linear layer is trained on the features of the frozen backbone and judged by top-1 and top-5 accuracy of
the validation images (MoCo, SEED and DisCo: 100 epochs, batch 256, no weight decay, rate cut by 10 at 60 % and 80 %).
The papers take a learning rate of 30 for ResNets and 3 for other networks; here several are probed at once, a layer
each on the same features. k-NN: a vote of the k nearest training images by cosine similarity (SEED: k = 10).

A folder's training images are cropped and flipped anew every epoch, as in the papers; features of the small sets are
computed once, without augmentation.

    torchrun --nproc_per_node=8 linear_eval.py --weights runs/disco/backbone.pth
    python linear_eval.py --data shapes --weights runs/disco/backbone.pth random --arch resnet8
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# -------------------------------------------------------------------------------------------------------------- Weights


def load_weights(name, arch, image_size, seed):
    """The Encoder to judge, frozen: a file of any layout, or `random` or `torchvision` (labelled weights) of `arch`."""
    if name not in ("random", "torchvision"):
        return common.load_teacher(name)
    if not arch:
        raise common.UserError(f"--weights {name} needs a network: pass --arch NAME")
    torch.manual_seed(seed)
    if name == "random":
        backbone = common.build_backbone(arch, image_size)
        return common.Encoder(backbone, nn.Identity()).requires_grad_(False).eval()
    return common.load_torchvision(arch)


# ---------------------------------------------------------------------------------------------------------------- Probe


class Probe(nn.Module):
    """One linear classifier for each learning rate: features (N, dim) -> logits (rates, N, num_classes)."""

    def __init__(self, dim, num_classes, rates):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(rates))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, features):
        return torch.stack([head(features) for head in self.heads])

    @torch.no_grad()
    def accuracy(self, features, labels):
        """Top-1 and top-5 accuracy in percent, a list each with a value a learning rate."""
        hits = [head(features).topk(min(5, head.out_features), dim=1).indices == labels[:, None] for head in self.heads]
        top1 = torch.stack([hit[:, 0].float().mean() for hit in hits])
        top5 = torch.stack([hit.any(dim=1).float().mean() for hit in hits])
        return (100 * top1).tolist(), (100 * top5).tolist()


def step_decay(epoch, epochs):
    """Factor on the learning rate: 1, then 0.1 from 60 % and 0.01 from 80 % of the epochs."""
    return 0.1 ** ((epoch >= 0.6 * epochs) + (epoch >= 0.8 * epochs))


def cached_batches(features, labels, batch_size, seed, step, stop):
    """This process's shares of shuffled batches from `step` to the end of its epoch: (features, labels)."""
    per_epoch = len(features) // batch_size
    epoch = step // per_epoch
    order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(features))).to(features.device)
    for batch in range(step, min(stop, (epoch + 1) * per_epoch)):
        rows = common.local_share(order[batch % per_epoch * batch_size :][:batch_size])
        yield features[rows], labels[rows]


def frozen_batches(encoder, loader, step, stop):
    """The same from augmented images, through the frozen backbone."""
    for (images,), labels in loader.batches(step, stop):
        yield encoder.features(images), labels


# ----------------------------------------------------------------------------------------------------------- Evaluation


def main():
    args = parse_args()
    device = common.init_device(args.seed)
    train, val, size = common.load_labelled(args.data, args.data_root, device, args.image_size)
    for name in args.weights:
        if args.weights.count(name) > 1:
            raise common.UserError(f"--weights names {name} twice")
    if max(args.knn) > len(train):
        raise common.UserError(f"--knn {max(args.knn)} is larger than the {len(train)} training images")
    crop = common.View(size, scale=(0.08, 1.0), color=False)
    loader = common.Loader(train, [crop], args.batch_size, args.seed, args.workers, device)
    encoders = [load_weights(name, args.arch, size, args.seed) for name in args.weights]

    files = [name for name in args.weights if name not in ("random", "torchvision")]
    run = common.Run("linear_eval", args, train, val, files=files)
    results = run.read("eval.json") or {}
    for name, encoder in zip(args.weights, encoders, strict=True):
        if name in results:
            continue
        encoder.amp = common.AMP[args.amp]
        encoder.to(device, memory_format=torch.channels_last)
        if args.compile:
            encoder.backbone.compile()
        train_set = common.extract_features(encoder, train, size, args.batch_size, args.workers, device)
        val_set = common.extract_features(encoder, val, size, args.batch_size, args.workers, device)
        neighbours = common.knn_accuracy(*train_set, *val_set, args.knn, train.num_classes, args.knn_temperature)
        results[name] = {
            "parameters": sum(p.numel() for p in encoder.backbone.parameters()),
            "feature_dim": encoder.backbone.feature_dim,
            "knn": {str(k): accuracy for k, accuracy in neighbours.items()},
            "linear": train_probe(args, run, name, encoder, train, loader, train_set, val_set, device),
        }
        run.log({"weights": name, "step": args.epochs * len(loader), **results[name]})
        run.write("eval.json", results)
    if common.rank() == 0:
        print_table(results, args.knn)


def train_probe(args, run, name, encoder, train, loader, train_set, val_set, device):
    """Train a linear layer for each learning rate; returns accuracies in percent of the best and of all."""
    torch.manual_seed(args.seed)
    probe = Probe(encoder.backbone.feature_dim, train.num_classes, len(args.lr)).to(device)
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(probe.heads, args.lr, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=False)  # the probe is small and stays in float32
    step = run.resume(probe, optimizer, scaler, of=name)
    parallel = common.distribute(probe)

    steps = args.epochs * len(loader)
    stop = min(steps, args.max_steps or steps)
    run.start_bar(step, stop, args.batch_size, name)
    while step < stop:
        epoch = step // len(loader)
        decay = step_decay(epoch, args.epochs)
        for group, lr in zip(optimizer.param_groups, args.lr, strict=True):
            group["lr"] = lr * decay
        if train.in_memory:
            batches = cached_batches(*train_set, args.batch_size, args.seed, step, stop)
        else:
            batches = frozen_batches(encoder, loader, step, stop)
        for features, labels in batches:
            losses = torch.stack([F.cross_entropy(logits, labels) for logits in parallel(features)])
            optimizer.zero_grad()
            losses.sum().backward()  # each layer's gradient is its own
            optimizer.step()
            step += 1
            epoch_ends = step % len(loader) == 0 or step == stop
            run.track(step, epoch, {"loss": losses.min()}, args.lr[0] * decay, epoch_ends)
        run.log({"weights": name, "step": step, "epoch": epoch, "top1": probe.accuracy(*val_set)[0]})
        run.save(step)
    run.bar.close()
    top1, top5 = probe.accuracy(*val_set)
    best = max(range(len(args.lr)), key=top1.__getitem__)
    by_lr = {f"{lr:g}": accuracy for lr, accuracy in zip(args.lr, top1, strict=True)}
    return {"top1": top1[best], "top5": top5[best], "lr": args.lr[best], "top1_by_lr": by_lr}


def print_table(results, ks):
    """Print a line for each judged network."""
    width = max(len("weights"), *map(len, results))
    columns = [f"{k}-NN" for k in ks] + ["linear", "top-5", "at lr"]
    print(f"{'weights':{width}}  parameters" + "".join(f"{column:>9}" for column in columns))
    for name, result in results.items():
        linear = result["linear"]
        values = [result["knn"][str(k)] for k in ks] + [linear["top1"], linear["top5"]]
        cells = "".join(f"{value:9.2f}" for value in values) + f"{linear['lr']:9g}"
        print(f"{name:{width}}  {result['parameters']:10,}" + cells)


def parse_args():
    parser = common.common_parser("linear_eval", __doc__, epochs=100, batch_size=256, lr=None, weight_decay=0.0)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, help="files (backbone.pth, checkpoint.pth, any teacher), or random or "
        "torchvision, the untrained or labelled network of --arch")  # fmt: skip
    add("--arch", help="network of random and torchvision (files tell theirs)")
    add("--lr", type=common.positive_float, nargs="+", default=[30.0, 10.0, 3.0, 1.0, 0.3, 0.1], help="learning "
        "rates to probe (default %(default)s; papers: 30 for ResNets, 3 for others)")  # fmt: skip
    add("--knn", type=common.positive_int, nargs="+", default=[10, 20, 200], help="neighbours (default %(default)s)")
    add("--knn-temperature", type=common.positive_float, help="weight a vote by exp(similarity / T), with T = 0.07 as "
        "is usual (default: every vote counts 1)")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    common.run_script(main)
