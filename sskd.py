"""SSKD: Knowledge Distillation Meets Self-Supervision (Xu et al., ECCV 2020, arXiv:2006.07114).

A labelled teacher knows more than classes: also how similar an image is to rotated versions of others. Both networks
get a head for a contrastive task, "which upright image is this rotated one?". The student learns the teacher's answers,
mistakes included, in addition to its predictions on upright and on rotated images.

    loss = 0.1 CE + 0.9 KD + 2.7 TF + 10 SS        each of KD, TF, SS is T^2 KL(softmax(teacher/T), softmax(student/T))

    CE on labels; KD on logits of upright images; TF on logits of rotated ones; SS on the cosine similarities of each
    rotated image to all upright ones. TF and SS keep all rows that the teacher gets right and, of the others, those
    with the smallest error level, the rank of the true answer among the teacher's (selective transfer).

Three stages: a labelled teacher (trained here, or any labelled file); its self-supervision head, the teacher frozen;
the student. As in the released code, an image's four rotations, counter-clockwise, share one flip, and each is cropped
at random from its padded image after the rotation.
The defaults are the released code's for CIFAR-100, and for a folder of images those of torchdistill's run on ImageNet.

    python sskd.py --data cifar100 --train-teacher wrn_40_2
    python sskd.py --data cifar100 --teacher runs/sskd_teacher/checkpoint.pth --student wrn_16_2
    torchrun --nproc_per_node=8 sskd.py --teacher torchvision --teacher-arch resnet34 --student resnet18
"""

import copy
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# --------------------------------------------------------------------------------------------------------------- Losses
#
# Rows 4i to 4i + 3 of a tensor over a batch of B images are image i, rotated by 0, 90, 180 and 270 degrees;
# rows[::4] are the upright ones.


def rotated(rows):
    """The rotated images: (4B, ...) -> (3B, ...)."""
    return rows.unflatten(0, (-1, 4))[:, 1:].flatten(0, 1)


def similarities(embedding):
    """Cosine similarities of each rotated image to all upright ones: (4B, D) -> (3B, B)."""
    embedding = F.normalize(embedding, dim=1)
    return rotated(embedding) @ embedding[::4].T


def positive_targets(similarity):
    """The column that is right in each row of `similarities`: (3B, B) -> (3B,)."""
    return torch.arange(similarity.shape[1], device=similarity.device).repeat_interleave(3)


def ss_head_loss(embedding):
    """Loss of the self-supervision head: which upright image was rotated? embedding: (4B, D)."""
    similarity = similarities(embedding)
    return F.cross_entropy(similarity, positive_targets(similarity))


def selective_transfer_mask(scores, target, ratio):
    """Selective transfer: which rows of the teacher's scores to learn from, (N, C) -> (N,) of 0 and 1.

    A row's error level is the rank of its target, (N,), among its scores; equal scores rank in the order of columns.
    Kept are all rows of level 0 and, of the others, the part `ratio` of the lowest level, earlier rows first.
    """
    own = scores.gather(1, target[:, None])
    columns = torch.arange(scores.shape[1], device=scores.device)
    level = ((scores > own) | (scores == own) & (columns < target[:, None])).sum(dim=1)
    wrong = (level > 0).sum()
    place = level.argsort(stable=True).argsort()  # of each row, counted from the lowest level
    return (place < len(scores) - wrong + (wrong.double() * ratio).floor()).float()


def kd_loss(student, teacher, temperature, kept=None):
    """T^2 KL(teacher, student) of softened scores (N, C), averaged over the rows, or over the `kept` ones."""
    teacher, student = (teacher / temperature).log_softmax(dim=1), (student / temperature).log_softmax(dim=1)
    rows = temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return rows.mean() if kept is None else (rows * kept).sum() / kept.sum().clamp(min=1)


def sskd_losses(student_logits, student_ss, teacher_logits, teacher_ss, labels, *, kd_temperature=4.0,
                tf_temperature=4.0, ss_temperature=0.5, tf_ratio=1.0, ss_ratio=0.75):  # fmt: skip
    """The four terms, unweighted: {"ce", "kd", "tf", "ss"}.

    logits: (4B, classes); ss: embeddings of the self-supervision heads, (4B, D), a D each; labels: (B,).
    """
    student_similarity, teacher_similarity = similarities(student_ss), similarities(teacher_ss)
    tf_kept = selective_transfer_mask(rotated(teacher_logits), labels.repeat_interleave(3), tf_ratio)
    ss_kept = selective_transfer_mask(teacher_similarity, positive_targets(teacher_similarity), ss_ratio)
    return {
        "ce": F.cross_entropy(student_logits[::4], labels),
        "kd": kd_loss(student_logits[::4], teacher_logits[::4], kd_temperature),
        "tf": kd_loss(rotated(student_logits), rotated(teacher_logits), tf_temperature, tf_kept),
        "ss": kd_loss(student_similarity, teacher_similarity, ss_temperature, ss_kept),
    }


# --------------------------------------------------------------------------------------------------------- Augmentation


def rotate_and_crop(images, rng, rotations, padding):
    """Augmentation of a `common.View`: rotate each image, then crop each row at random from the padded row.

    (n, 3, S, S) -> (rotations * n, 3, S, S), image by image, rotated counter-clockwise by multiples of 90 degrees.
    padding: black pixels on each side; 0 for no crop.
    """
    images = torch.stack([images.rot90(k, dims=(2, 3)) for k in range(rotations)], dim=1).flatten(0, 1)
    if not padding:
        return images
    offsets = common.own_rows(rng.integers(0, 2 * padding + 1, (len(images) * common.world_size(), 2)))
    top, left = torch.from_numpy(offsets).to(images.device, non_blocking=True).unbind(dim=1)
    height, width = images.shape[2:]
    crops = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view of all possible crops
    return crops[torch.arange(len(images), device=images.device), :, top, left]


# --------------------------------------------------------------------------------------------------- Labelled networks


class Classifier(common.Encoder):
    """A labelled network, an Encoder whose head is the linear layer `classifier`: images -> logits (N, classes)."""

    def __init__(self, backbone, classifier, **options):
        super().__init__(backbone, classifier, "classifier", **options)

    def plain(self):
        """A copy with the classifier back in its place, so that its keys are torchvision's."""
        network = copy.deepcopy(self.backbone)
        network.set_submodule(network.classifier_name, self.classifier)
        return network


def build_classifier(arch, num_classes, image_size=224, init=None):
    """A labelled network, its classifier random; other arguments and errors as in `common.build_backbone`."""
    if arch.startswith("squeezenet"):
        raise common.UserError(f"{arch} ends in a convolution, not in a linear classifier: take another network")
    backbone = common.build_backbone(arch, image_size, init)
    return Classifier(backbone, nn.Linear(backbone.feature_dim, num_classes))


def load_classifier(path, arch=None, num_classes=None, image_size=None, mean_std=None):
    """Read a labelled network, a frozen Classifier in eval mode; arguments and errors as in `common.load_teacher`."""
    needed = "a network trained with labels is needed"
    if str(path).endswith(".pt2"):
        raise common.UserError(f"{path} is a program and has no linear classifier: {needed}")
    backbone, _, state, about = common.load_backbone(path, arch, image_size, mean_std)
    if state.keys() != {"weight", "bias"} or state["weight"].shape[1:] != (backbone.feature_dim,):
        raise common.UserError(f"{path} holds no linear classifier of its features: {needed}")
    classifier = common.build_head(path, state)
    if num_classes not in (None, classifier.out_features):
        raise common.UserError(f"{path} has {classifier.out_features} classes, --data has {num_classes}")
    return Classifier(backbone, classifier, **about).requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------------------- Method


def gather_with_gradient(x):
    """As `common.gather`, with a gradient for this process's rows, for a loss that every process computes.

    The gradient is multiplied by the number of processes, because DistributedDataParallel takes their mean.
    """
    if common.world_size() == 1:
        return x
    own = x.view_as(x)
    own.register_hook(lambda gradient: gradient * common.world_size())
    rows = list(common.gather(x.detach()).split(len(x)))
    rows[common.rank()] = own
    return torch.cat(rows)


class SSKD(nn.Module):
    """Student, frozen teacher and the self-supervision heads of both.

    student, teacher: Classifier. weights: {"ce", "kd", "tf", "ss"}. If tf and ss are 0, images are not rotated
    and there are no heads: knowledge distillation. If kd is 0 too, no teacher is needed: plain training.
    options: keyword arguments of `sskd_losses`.
    """

    def __init__(self, student, teacher, weights, **options):
        super().__init__()
        self.weights, self.options = {"ce": 0.0, "kd": 0.0, "tf": 0.0, "ss": 0.0, **weights}, options
        self.rotations = 4 if self.weights["tf"] or self.weights["ss"] else 1
        self.student = student
        self.teacher = teacher.requires_grad_(False) if self.rotations > 1 or self.weights["kd"] else None
        if self.rotations > 1:
            student_dim, teacher_dim = student.backbone.feature_dim, teacher.backbone.feature_dim
            self.student_head = common.mlp_head(student_dim, student_dim, student_dim)
            self.teacher_head = common.mlp_head(teacher_dim, teacher_dim, teacher_dim)
        self.train()

    def train(self, mode=True):
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self

    def forward(self, images, labels):
        """Losses over the batch of all processes. images: (rotations * N, 3, H, W) of this one; labels: (N,)."""
        labels = common.gather(labels)
        student_features, student_logits = self.student.features_and_output(images)
        student_logits = gather_with_gradient(student_logits)
        if self.teacher:
            teacher_features, teacher_logits = self.teacher.features_and_output(images)
            teacher_logits = common.gather(teacher_logits)
        if self.rotations > 1:
            student_ss = gather_with_gradient(self.student_head(student_features))
            teacher_ss = common.gather(self.teacher_head(teacher_features).detach())
            losses = sskd_losses(student_logits, student_ss, teacher_logits, teacher_ss, labels, **self.options)
        else:
            losses = {"ce": F.cross_entropy(student_logits, labels)}
            if self.teacher:
                losses["kd"] = kd_loss(student_logits, teacher_logits, self.options["kd_temperature"])
        return {"loss": sum(self.weights[name] * loss for name, loss in losses.items()), **losses}


def step_lr(lr, epoch, epochs, milestones):
    """Learning rate of an epoch: cut by 10 at each milestone, a part of all epochs."""
    return lr * 0.1 ** sum(epoch >= milestone * epochs for milestone in milestones)


def noisy_labels(labels, num_classes, noise, seed):
    """Symmetric noise: the part `noise` of the labels, picked by the seed, become another class, each as likely."""
    rng = np.random.default_rng([seed, 7114])
    rows = torch.from_numpy(rng.permutation(len(labels))[: round(noise * len(labels))]).to(labels.device)
    shift = torch.from_numpy(rng.integers(1, num_classes, len(rows))).to(labels.device)
    return labels.index_put((rows,), (labels[rows] + shift) % num_classes)


# ------------------------------------------------------------------------------------------------------------- Training


def main():
    args = parse_args()
    device = common.init_device(args.seed)
    size = args.image_size or common.default_image_size(args.data)
    train, val = common.load_labelled(args.data, args.data_root, device, size)
    train = common.subsample_per_class(train, args.label_fraction, args.seed)
    if args.label_noise:
        if len(train.classes) < 2:
            raise common.UserError("--label-noise needs two classes")
        train = common.subset(train, np.arange(len(train)))
        train.labels = noisy_labels(common.labels_of(train), len(train.classes), args.label_noise, args.seed)

    student, teacher = build_classifier(args.student, len(train.classes), size, args.init), None
    networks = [student]
    if args.teacher:
        classes = len(train.classes)
        teacher = load_classifier(args.teacher, args.teacher_arch, classes, size, args.teacher_mean_std)
        args.teacher_mean_std = teacher.mean_std  # belongs to the run, also if a file beside the teacher's says it
        teacher.convert_from(common.mean_std_of(train))
        common.check_input_size(teacher.backbone, args.teacher, size)
        networks.append(teacher)
    for network in networks:
        network.amp = common.AMP[args.amp]
        if args.compile:
            network.backbone.compile()
    weights = {"ce": args.ce_weight, "kd": args.kd_weight, "tf": args.tf_weight, "ss": args.ss_weight}
    model = SSKD(student, teacher, weights, kd_temperature=args.kd_temperature,
                 tf_temperature=args.tf_temperature, ss_temperature=args.ss_temperature, tf_ratio=args.tf_ratio,
                 ss_ratio=args.ss_ratio)  # fmt: skip
    model.to(device, memory_format=torch.channels_last)
    # Small images are padded and cropped, as CIFAR's in the released code, files as ImageNet's
    padding, scale = (round(size / 8), None) if common.in_memory(train) else (0, (0.08, 1.0))
    rotate = partial(rotate_and_crop, rotations=model.rotations, padding=padding)
    view = common.View(size, scale=scale, flip=0.5, augment=rotate)
    loader = common.Loader(train, [view], args.batch_size, args.seed, args.workers, device)

    head_epochs = args.head_epochs if args.ss_weight else 0
    groups = [{"params": list(student.parameters())}]
    if model.rotations > 1:
        groups[0]["params"] += model.student_head.parameters()
    if head_epochs:
        groups.append({"params": list(model.teacher_head.parameters())})
    optimizer = common.sgd(groups, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    def top1(network):
        """Top-1 accuracy in percent; every image counts once, on any number of processes."""
        features, labels = common.extract_features(network, val, size, args.batch_size, args.workers, device)
        right = network.classifier(features).argmax(dim=1) == common.own_rows(labels)
        return 100 * common.all_reduce(right.sum()).item() / (labels >= 0).sum().item()

    run = common.Run("sskd", args, train, val, arch=args.student, image_size=size, mean_std=common.mean_std_of(train),
                     loaded=[network.description for network in networks[1:]])  # fmt: skip
    run.start_or_resume(model, optimizer, scaler, frozen=model.teacher)  # not saved
    if model.teacher and run.step == 0:
        report_teacher(run, top1(teacher), train.classes)
    train_teacher_head(run, model, loader, optimizer, scaler, head_epochs)
    if run.step < head_epochs * len(loader):
        return common.say("--max-steps ends the run before the student's first step")
    train_student(run, model, loader, optimizer, scaler, head_epochs, lambda: {"top1": top1(student)})
    run.finish(student.plain())
    if common.rank() == 0:
        print(f"{args.student}: top-1 accuracy {run.metrics['top1']:.2f} % on the validation images")


def report_teacher(run, top1, classes):
    """Log and print a teacher's accuracy in percent; warn if it is so low that the classes must be others."""
    run.log({"teacher_top1": top1})
    common.say(f"{run.args.teacher}: top-1 accuracy {top1:.2f} % on the validation images")
    chance = 100 / len(classes)
    if top1 < chance + min(chance, (100 - chance) / 2):
        common.say(f"warning: the teacher is hardly better than chance ({chance:.2f} %), perhaps because its class "
                   f"order is not that of --data, where class 0 is {classes[0]}")  # fmt: skip


def train_teacher_head(run, model, loader, optimizer, scaler, epochs):
    """Train the self-supervision head of the frozen teacher on the contrastive task, for the run's first epochs."""
    if not epochs:
        return
    ddp_model = common.distribute(model.teacher_head)
    for epoch in run.epochs(epochs, len(loader)):
        lr = step_lr(run.args.head_lr, epoch, epochs, run.args.head_milestones)
        optimizer.param_groups[1]["lr"] = lr
        for (images,), _ in run.batches(loader):
            embedding = ddp_model(model.teacher.features(images))
            loss = ss_head_loss(gather_with_gradient(embedding))
            take_step(loss, optimizer, scaler)
            run.end_step({"loss": loss}, lr)


def train_student(run, model, loader, optimizer, scaler, head_epochs, evaluate):
    """Train the student on labels, the teacher's predictions and its head's answers, after the head's epochs."""
    args = run.args
    if model.rotations > 1:
        model.teacher_head.requires_grad_(False)
    ddp_model = common.distribute(model)
    for epoch in run.epochs(head_epochs + args.epochs, len(loader), evaluate):
        lr = step_lr(args.lr, epoch - head_epochs, args.epochs, args.milestones)
        optimizer.param_groups[0]["lr"] = lr
        for (images,), labels in run.batches(loader):
            losses = ddp_model(images, labels)
            take_step(losses["loss"], optimizer, scaler)
            run.end_step(losses, lr)


def take_step(loss, optimizer, scaler):
    """Backward pass and the optimiser's step."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


# Defaults for the small sets and for folders. Milestones are parts of all epochs.
CIFAR = {"epochs": 240, "batch_size": 64, "lr": 0.05, "milestones": (150 / 240, 180 / 240, 210 / 240),
         "head_epochs": 60, "head_lr": 0.05, "head_milestones": (30 / 60, 45 / 60)}  # fmt: skip
IMAGENET = {"epochs": 100, "batch_size": 256, "lr": 0.1, "milestones": (0.3, 0.6, 0.9),
            "head_epochs": 30, "head_lr": 0.1, "head_milestones": (1 / 3, 2 / 3)}  # fmt: skip
SLOW = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # CIFAR's networks that need a learning rate of 0.01


def parse_args():
    parser = common.common_parser("sskd", __doc__, epochs=CIFAR["epochs"], batch_size=CIFAR["batch_size"],
                                  lr=CIFAR["lr"], weight_decay=5e-4)  # fmt: skip
    add, weight = parser.add_argument, common.number(float, 0)
    add("--train-teacher", metavar="NAME", help="train a teacher on labels alone, by default in runs/sskd_teacher")
    add("--teacher", help="file of a labelled network, or torchvision, its labelled weights of --teacher-arch")
    add("--teacher-arch", help="the teacher's network (default: read from its file)")
    add("--teacher-mean-std", type=float, nargs="+", metavar="X", help="means, deviations of its images (its own)")
    add("--student", help="network, any of torchvision's or of CIFAR's (common.CIFAR_NETWORKS)")
    add("--ce-weight", type=weight, default=0.1, help="of the labels (default %(default)s; 1 with --train-teacher)")
    add("--kd-weight", type=weight, default=0.9, help="of distillation (default %(default)s)")
    add("--tf-weight", type=weight, default=2.7, help="of the same on rotated images (default %(default)s)")
    add("--ss-weight", type=weight, default=10.0, help="of self-supervision (default %(default)s)")
    add("--kd-temperature", type=common.positive_float, default=4.0, help="default %(default)s")
    add("--tf-temperature", type=common.positive_float, default=4.0, help="default %(default)s")
    add("--ss-temperature", type=common.positive_float, default=0.5, help="default %(default)s")
    add("--tf-ratio", type=common.fraction, default=1.0, help="part of the wrong rows to keep (default %(default)s)")
    add("--ss-ratio", type=common.fraction, default=0.75, help="part of the wrong rows to keep (default %(default)s)")
    add("--head-epochs", type=common.positive_int, default=CIFAR["head_epochs"], help="for the self-supervision head "
        "of the teacher, before the student's (default %(default)s)")  # fmt: skip
    add("--head-lr", type=common.positive_float, default=CIFAR["head_lr"], help="default %(default)s")
    add("--label-fraction", type=common.number(float, 0, 1, open_below=True), default=1.0, help="train on this part "
        "of each class's images, picked by --seed (default all)")  # fmt: skip
    add("--label-noise", type=common.fraction, default=0.0, help="make this part of the labels wrong (default none)")
    args = parser.parse_args()
    if bool(args.train_teacher) == bool(args.teacher) or bool(args.teacher) != bool(args.student):
        raise common.UserError("pass either --train-teacher NAME, or --teacher FILE and --student NAME")
    folder = (args.data or "").partition(":")[0] not in common.SMALL_SETS
    network = args.train_teacher or args.student
    parser.set_defaults(**(IMAGENET if folder else CIFAR))
    if network in SLOW and not folder:
        parser.set_defaults(lr=0.01)
    if args.train_teacher:
        parser.set_defaults(student=network, ce_weight=1.0, kd_weight=0.0, tf_weight=0.0, ss_weight=0.0,
                            out="runs/sskd_teacher")  # fmt: skip
    args = parser.parse_args()
    if args.train_teacher and args.kd_weight + args.tf_weight + args.ss_weight:
        raise common.UserError("--train-teacher learns from labels: leave out --kd-weight, --tf-weight, --ss-weight")
    if not args.ce_weight + args.kd_weight + args.tf_weight + args.ss_weight:
        raise common.UserError("--ce-weight, --kd-weight, --tf-weight and --ss-weight are all 0: nothing to learn")
    return args


if __name__ == "__main__":
    common.run_script(main)
