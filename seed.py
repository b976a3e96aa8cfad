"""SEED: Self-Supervised Distillation for Visual Representation (Fang et al., ICLR 2021, arXiv:2101.04731).

The similarities of an image to the teacher's embeddings of itself and of a queue of images form a distribution. A
small student learns the distribution of a frozen teacher. One view; no contrastive term.

    loss = cross-entropy(p_teacher, p_student),   p(k) = softmax_k(z.d_k / T),   D+ = (t(x), queue)

    z the embedding, s(x) of the student and t(x) of the teacher, each with a temperature T of its own; d_k rows of D+;
    all embeddings L2-normalised.

    torchrun --nproc_per_node=8 seed.py --teacher moco_v2_800ep_pretrain.pth.tar --student mobilenet_v3_large
    torchrun --nproc_per_node=8 seed.py --teacher swav_800ep_pretrain.pth.tar --student efficientnet_b0 --small-crops 6
    python seed.py --data shapes --teacher runs/teacher/checkpoint.pth --student resnet8 --queue-size 2048
"""

import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# --------------------------------------------------------------------------------------------------------------- Losses


def similarities(embedding, own, queue, temperature):
    """Similarities of unit rows (N, D) to the teacher's own of the images, then to the queue (K, D): (N, 1 + K)."""
    embedding = embedding / temperature  # (N, D), before anything of size K is made
    return torch.cat([(embedding * own).sum(dim=1, keepdim=True), embedding @ queue.T], dim=1)


def seed_loss(student, teacher, queue, student_temperature, teacher_temperature):
    """Cross-entropy of the student's distribution of similarities under the teacher's (SEED, equations 4 to 6)."""
    with torch.no_grad():
        target = similarities(teacher, teacher, queue, teacher_temperature).softmax(dim=1)
    return F.cross_entropy(similarities(student, teacher, queue, student_temperature), target)


def l2_loss(student, teacher, *_):
    """Squared distance of the embeddings, averaged over the batch (SEED, table of distillation strategies)."""
    return (student - teacher).square().sum(dim=1).mean()


def contrastive_loss(student, teacher, queue, student_temperature, _):
    """InfoNCE: the image's own teacher embedding is the positive, the queue the negatives (the same table)."""
    logits = similarities(student, teacher, queue, student_temperature)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


OBJECTIVES = {"seed": seed_loss, "l2": l2_loss, "contrastive": contrastive_loss}

# --------------------------------------------------------------------------------------------------------------- Method


class SEED(nn.Module):
    """Student, frozen teacher and the queue of the teacher's embeddings.

    student, teacher: images (N, 3, H, W) -> embeddings (N, dim). With small_crops a second queue holds the teacher's
    embeddings of small crops, which the student's are compared with among themselves.
    """

    def __init__(self, student, teacher, dim=128, queue_size=65536, student_temperature=0.2, teacher_temperature=0.01,
                 small_crops=False, objective="seed"):  # fmt: skip
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.temperatures = student_temperature, teacher_temperature
        self.objective = OBJECTIVES[objective]
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        if small_crops:
            self.register_buffer("small_queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))  # of both: they fill alike
        self.train()

    def train(self, mode=True):
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, view, small=None):
        """Losses of a view (N, 3, H, W), and the keys (B, dim) of all processes to enqueue.

        small: small crops (N, crops, 3, h, w) of the same images, at their own size; then keys is a pair, the second
        one of each image's first small crop.
        """
        loss, teacher = self.compare(view, self.queue)
        if small is None:
            return {"loss": loss}, common.gather(teacher)
        small_loss, small_teacher = self.compare(small.flatten(0, 1), self.small_queue)
        keys = common.gather(teacher), common.gather(small_teacher[:: small.shape[1]])
        return {"loss": loss + small_loss, "large": loss, "small": small_loss}, keys

    def compare(self, images, queue):
        """The objective of some images (N, 3, H, W), and the teacher's embeddings (N, dim)."""
        student = F.normalize(self.student(images), dim=1)
        with torch.no_grad():
            teacher = F.normalize(self.teacher(images), dim=1)
        return self.objective(student, teacher, queue, *self.temperatures), teacher

    @torch.no_grad()
    def enqueue(self, keys):
        """Replace the oldest entries by keys (B, dim); after the backward pass, so that it needs no copy."""
        keys, small_keys = keys if isinstance(keys, tuple) else (keys, None)
        places = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        if small_keys is not None:
            self.small_queue[places] = small_keys
        self.queue_ptr.add_(len(keys)).remainder_(len(self.queue))


def warmup_cosine_lr(lr, batch_size, epoch, epochs, warmup_epochs=5):
    """Learning rate of an epoch, as released: a linear warm-up from lr to the scaled one, then half a cosine to 0."""
    scaled = lr * batch_size / 256
    if epoch < warmup_epochs:
        return lr + (scaled - lr) * epoch / warmup_epochs
    return scaled * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


# ------------------------------------------------------------------------------------------------------------- Training


def main():
    args = parse_args()
    if args.queue_size < args.batch_size:
        raise common.UserError(f"--queue-size {args.queue_size} is smaller than --batch-size {args.batch_size}")
    device = common.init_device(args.seed)
    size = args.image_size or common.default_image_size(args.data)
    teacher = common.load_teacher(args.teacher, args.teacher_arch, size, args.trust_teacher, args.teacher_mean_std)
    args.teacher_mean_std = teacher.mean_std  # belongs to the run, also if a file beside the teacher's says it
    dataset = common.load_dataset(args.data, args.data_root, "pretrain", device, size)
    knn_sets = common.load_labelled(args.data, args.data_root, device, size) if args.knn_every else ()
    teacher.convert_from(common.mean_std_of(dataset))
    common.check_input_size(teacher.backbone, args.teacher, size)
    view = common.View(size, scale=(0.14 if args.small_crops else 0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1),
                       jitter_p=0.8, grey=0.2, blur=(0.1, 2.0), blur_p=0.5)  # fmt: skip
    small_size = args.small_size or round(size * 96 / 224)
    views = [view, *[replace(view, size=small_size, scale=(0.05, 0.14))] * args.small_crops]
    loader = common.Loader(dataset, views, args.batch_size, args.seed, args.workers, device)

    backbone = common.build_backbone(args.student, size, args.init)
    if args.small_crops:
        common.check_input_size(backbone, args.student, small_size, "--small-size")
        common.check_input_size(teacher.backbone, args.teacher, small_size, "--small-size")
    head = common.mlp_head(backbone.feature_dim, args.hidden_dim or backbone.feature_dim, teacher.dim)
    student = common.Encoder(backbone, head)
    student.amp = teacher.amp = common.AMP[args.amp]
    model = SEED(student, teacher, teacher.dim, args.queue_size, args.student_temperature, args.teacher_temperature,
                 args.small_crops > 0, args.objective)  # fmt: skip
    model.to(device, memory_format=torch.channels_last)
    optimizer = common.sgd(student.parameters(), args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    run = common.Run("seed", args, dataset, *knn_sets, arch=args.student, image_size=size,
                     mean_std=common.mean_std_of(dataset), loaded=[teacher.description])  # fmt: skip
    run.start_or_resume(model, optimizer, scaler, frozen=model.teacher)  # not saved
    if args.compile:
        for network in model.children():
            network.compile()
    ddp_model = common.distribute(model)
    evaluate = common.knn_probe(student, args, knn_sets, size, device)

    for epoch in run.epochs(args.epochs, len(loader), evaluate, args.knn_every):  # from where it stopped
        lr = warmup_cosine_lr(args.lr, args.batch_size, epoch, args.epochs, args.warmup_epochs)
        common.set_lr(optimizer, lr)
        for (view, *small), _ in run.batches(loader):
            losses, keys = ddp_model(view, torch.stack(small, dim=1) if small else None)
            optimizer.zero_grad()
            scaler.scale(losses["loss"]).backward()
            scaler.step(optimizer)
            scaler.update()
            model.enqueue(keys)
            run.end_step(losses, lr)  # logs, saves when it is time, stops when a signal asks for it
    run.finish(backbone)


def parse_args():
    parser = common.common_parser("seed", __doc__, epochs=200, batch_size=256, lr=0.03, weight_decay=1e-4)
    add = parser.add_argument
    add("--teacher", required=True, help="teacher's file or folder, or torchvision: labelled weights of --teacher-arch")
    add("--teacher-arch", help="the teacher's network (default: read from its file)")
    add("--trust-teacher", action="store_true", help="run a .pt2 teacher, which can hold any code")
    add("--teacher-mean-std", type=float, nargs="+", metavar="X", help="means, deviations of its images (its own)")
    add("--student", required=True, help="network, any of torchvision's or of CIFAR's (common.CIFAR_NETWORKS)")
    add("--hidden-dim", type=common.positive_int, help="of the student's head (default: as wide as the features)")
    add("--objective", choices=list(OBJECTIVES), default="seed", help="default %(default)s; others are ablations")
    add("--queue-size", type=common.positive_int, default=65536, help="embeddings compared (default %(default)s)")
    add("--student-temperature", type=common.positive_float, default=0.2, help="default %(default)s, the paper's")
    add("--teacher-temperature", type=common.positive_float, default=0.01, help="default %(default)s, the paper's")
    add("--small-crops", type=common.number(int, 0), default=0, help="per image (default %(default)s; 6 for SwAV)")
    add("--small-size", type=common.positive_int, help="pixels of the small crops (default: 96 of 224, in proportion)")
    add("--warmup-epochs", type=common.number(int, 0), default=5, help="default %(default)s, the paper's")
    add("--knn-every", type=common.positive_int, help="log k-NN accuracy every so many epochs (default: never)")
    return parser.parse_args()


if __name__ == "__main__":
    common.run_script(main)
