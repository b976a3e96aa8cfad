"""DisCo: Distilled Contrastive Learning (Gao et al., ECCV 2022, arXiv:2104.09124).

A small student learns from a frozen self-supervised teacher. For each of two views its embedding moves to the
teacher's; the loss of MoCo v2, with a mean student as key encoder, separates the images.

    loss = InfoNCE(s(x1), m(x2), queue) + w * (|s(x1) - t(x1)|^2 + |s(x2) - t(x2)|^2)

    s student, m mean student (moving average of s), t teacher; all embeddings L2-normalised.

    torchrun --nproc_per_node=8 disco.py --teacher moco_v2_800ep_pretrain.pth.tar --student efficientnet_b0
    python disco.py --data shapes --teacher runs/teacher/checkpoint.pth --student resnet8 --queue-size 2048
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# --------------------------------------------------------------------------------------------------------------- Losses


def info_nce(query, key, queue, temperature):
    """InfoNCE (MoCo, equation 1), averaged, of unit rows: query, key (N, D), two views of N images; queue (K, D)."""
    query = query / temperature  # (N, D), before anything of size K is made
    positive = (query * key).sum(dim=1, keepdim=True)
    negatives = query @ queue.T
    logits = torch.cat([positive, negatives], dim=1)  # (N, 1 + K), the right class is 0
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def distill_loss(student, teacher):
    """Squared L2 distance of unit embeddings (N, D), averaged over the batch (DisCo, distilling loss). In [0, 4]."""
    return (student - teacher).square().sum(dim=1).mean()


# --------------------------------------------------------------------------------------------------------------- Method


class DisCo(nn.Module):
    """Student, mean student, frozen teacher and the queue of the mean student's keys.

    student, teacher: images (N, 3, H, W) -> embeddings (N, dim). momentum: of the moving average, per step.
    teacher_bn: "running" normalises with the teacher's running statistics, "batch" with those of the batch, as the
    released code does; neither changes the teacher.
    """

    def __init__(self, student, teacher, dim=128, queue_size=65536, momentum=0.999, temperature=0.2,
                 distill_weight=32.0, teacher_bn="running"):  # fmt: skip
        super().__init__()
        self.student = student
        self.mean_student = copy.deepcopy(student).requires_grad_(False)
        self.teacher = teacher.requires_grad_(False)
        self.momentum = momentum
        self.temperature = temperature
        self.distill_weight = distill_weight
        self.teacher_bn = teacher_bn
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))
        self.train()

    def train(self, mode=True):
        """Set the student's mode; the teacher stays in eval mode, its BatchNorm aside where teacher_bn is "batch"."""
        super().train(mode)
        self.teacher.eval()
        for module in self.teacher.modules():
            if self.teacher_bn == "batch" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode).track_running_stats = False  # batch statistics in, its own left as they are
        return self

    def forward(self, view1, view2):
        """Losses of two views (N, 3, H, W) of the same images, and the keys (B, dim) of all processes to enqueue."""
        student1 = F.normalize(self.student(view1), dim=1)
        student2 = F.normalize(self.student(view2), dim=1)
        with torch.no_grad():
            teacher1 = F.normalize(self.teacher(view1), dim=1)
            teacher2 = F.normalize(self.teacher(view2), dim=1)

            # Moving average, of the parameters alone: BatchNorm statistics are not averaged
            for mean, now in zip(self.mean_student.parameters(), self.student.parameters(), strict=True):
                mean.lerp_(now, 1 - self.momentum)

            # Shuffled BatchNorm (MoCo, section 3.3)
            shuffled = common.shuffle(view2)
            keys = F.normalize(self.mean_student(shuffled), dim=1)
            keys = common.gather_unshuffled(keys)

        distill = distill_loss(student1, teacher1) + distill_loss(student2, teacher2)
        contrastive = info_nce(student1, common.own_rows(keys), self.queue, self.temperature)
        loss = contrastive + self.distill_weight * distill
        return {"loss": loss, "contrastive": contrastive, "distill": distill}, keys

    @torch.no_grad()
    def enqueue(self, keys):
        """Replace the queue's oldest entries by keys (B, dim); after the backward pass, so that it needs no copy."""
        places = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        self.queue_ptr.add_(len(keys)).remainder_(len(self.queue))


class DistillationAlone(DisCo):
    """The paper's ablation: no InfoNCE, hence no mean student and no queue."""

    def __init__(self, student, teacher, distill_weight=32.0, teacher_bn="running"):
        super().__init__(student, teacher, queue_size=1, distill_weight=distill_weight, teacher_bn=teacher_bn)
        del self.mean_student, self.queue, self.queue_ptr

    def forward(self, view1, view2):
        distill = 0
        for view in (view1, view2):
            with torch.no_grad():
                teacher = F.normalize(self.teacher(view), dim=1)
            distill += distill_loss(F.normalize(self.student(view), dim=1), teacher)
        return {"loss": self.distill_weight * distill, "distill": distill}, None

    def enqueue(self, keys):
        pass


def cosine_lr(lr, epoch, epochs):
    """Learning rate of an epoch: from lr to 0 along half a cosine, changed once per epoch as released."""
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


# ------------------------------------------------------------------------------------------------------------- Training


def main():
    args = parse_args()
    if args.queue_size < args.batch_size and not args.no_contrastive:
        raise common.UserError(f"--queue-size {args.queue_size} is smaller than --batch-size {args.batch_size}")
    device = common.init_device(args.seed)
    size = args.image_size or common.default_image_size(args.data)
    teacher = common.load_teacher(args.teacher, args.teacher_arch, size, args.trust_teacher, args.teacher_mean_std)
    args.teacher_mean_std = teacher.mean_std  # belongs to the run, also if a file beside the teacher's says it
    dataset = common.load_dataset(args.data, args.data_root, "pretrain", device, size)
    knn_sets = common.load_labelled(args.data, args.data_root, device, size) if args.knn_every else ()
    teacher.convert_from(common.mean_std_of(dataset))
    common.check_input_size(teacher.backbone, args.teacher, size)
    view = common.View(size, scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2,
                       blur=(0.1, 2.0), blur_p=0.5)  # fmt: skip
    loader = common.Loader(dataset, [view, view], args.batch_size, args.seed, args.workers, device)

    backbone = common.build_backbone(args.student, size, args.init)
    student = common.Encoder(backbone, common.mlp_head(backbone.feature_dim, args.hidden_dim, teacher.dim))
    student.amp = teacher.amp = common.AMP[args.amp]
    if args.no_contrastive:
        model = DistillationAlone(student, teacher, args.distill_weight, args.teacher_bn)
    else:
        model = DisCo(student, teacher, teacher.dim, args.queue_size, args.momentum, args.temperature,
                      args.distill_weight, args.teacher_bn)  # fmt: skip
    model.to(device, memory_format=torch.channels_last)
    optimizer = common.sgd(student.parameters(), args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    run = common.Run("disco", args, dataset, *knn_sets, arch=args.student, image_size=size,
                     mean_std=common.mean_std_of(dataset), loaded=[teacher.description])  # fmt: skip
    run.start_or_resume(model, optimizer, scaler, frozen=model.teacher)  # not saved
    if args.compile:
        for network in model.children():
            network.compile()
    ddp_model = common.distribute(model)
    evaluate = common.knn_probe(student, args, knn_sets, size, device)

    for epoch in run.epochs(args.epochs, len(loader), evaluate, args.knn_every):  # from where it stopped
        lr = cosine_lr(args.lr, epoch, args.epochs)
        common.set_lr(optimizer, lr)
        for (view1, view2), _ in run.batches(loader):
            losses, keys = ddp_model(view1, view2)
            optimizer.zero_grad()
            scaler.scale(losses["loss"]).backward()
            scaler.step(optimizer)
            scaler.update()
            model.enqueue(keys)
            run.end_step(losses, lr)  # logs, saves when it is time, stops when a signal asks for it
    run.finish(backbone)


def parse_args():
    parser = common.common_parser("disco", __doc__, epochs=200, batch_size=256, lr=0.03, weight_decay=1e-4)
    add = parser.add_argument
    add("--teacher", required=True, help="teacher's file or folder, or torchvision: labelled weights of --teacher-arch")
    add("--teacher-arch", help="the teacher's network (default: read from its file)")
    add("--trust-teacher", action="store_true", help="run a .pt2 teacher, which can hold any code")
    add("--teacher-mean-std", type=float, nargs="+", metavar="X", help="means, deviations of its images (its own)")
    add("--student", required=True, help="network, any of torchvision's or of CIFAR's (common.CIFAR_NETWORKS)")
    add("--hidden-dim", type=common.positive_int, default=2048, help="of the student's head (default %(default)s)")
    add("--distill-weight", type=common.number(float, 0), default=32.0, help="released: %(default)s; paper: 1")
    add("--teacher-bn", choices=["running", "batch"], default="running", help="default %(default)s; batch as released")
    add("--no-contrastive", action="store_true", help="distillation alone, without InfoNCE, mean student and queue")
    add("--queue-size", type=common.positive_int, default=65536, help="negatives (default %(default)s)")
    add("--momentum", type=common.fraction, default=0.999, help="of the moving average (default %(default)s)")
    add("--temperature", type=common.positive_float, default=0.2, help="of InfoNCE (default %(default)s)")
    add("--knn-every", type=common.positive_int, help="log k-NN accuracy every so many epochs (default: never)")
    return parser.parse_args()


if __name__ == "__main__":
    common.run_script(main)
