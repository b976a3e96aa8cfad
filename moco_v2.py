"""MoCo v2: Improved Baselines with Momentum Contrastive Learning (Chen et al., 2020, arXiv:2003.04297).

Two random views of an image get similar embeddings, different from those of the images in a queue. A moving average of
the encoder makes the queue's entries, so that they stay comparable.

    loss = InfoNCE(e(x1), m(x2), queue) = -log( exp(e(x1).m(x2) / T) / (exp(e(x1).m(x2) / T) + sum_k exp(e(x1).k / T)) )

    e encoder, m momentum encoder (moving average of e), T temperature, k queue entries; embeddings L2-normalised.

The baseline for the distilled students, and the way to a teacher:

    torchrun --nproc_per_node=8 moco_v2.py --arch resnet50
    python moco_v2.py --data shapes --arch resnet20 --queue-size 2048
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


# --------------------------------------------------------------------------------------------------------------- Method


class MoCo(nn.Module):
    """Encoder, its momentum encoder and the queue of keys (MoCo, algorithm 1).

    encoder: images (N, 3, H, W) -> embeddings (N, dim). momentum: of the moving average, per step.
    """

    def __init__(self, encoder, dim=128, queue_size=65536, momentum=0.999, temperature=0.2):
        super().__init__()
        self.encoder = encoder
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))
        self.momentum, self.temperature = momentum, temperature

    def forward(self, view1, view2):
        """Losses of two views (N, 3, H, W) of the same images, and the keys (B, dim) of all processes to enqueue."""
        query = F.normalize(self.encoder(view1), dim=1)
        with torch.no_grad():
            # Equation 2. Of the parameters alone: BatchNorm statistics are not averaged
            for mean, now in zip(self.momentum_encoder.parameters(), self.encoder.parameters(), strict=True):
                mean.lerp_(now, 1 - self.momentum)
            # Shuffled BatchNorm (section 3.3)
            shuffled = common.shuffle(view2)
            keys = F.normalize(self.momentum_encoder(shuffled), dim=1)
            keys = common.gather_unshuffled(keys)
        loss = info_nce(query, common.own_rows(keys), self.queue, self.temperature)
        return {"loss": loss}, keys

    @torch.no_grad()
    def enqueue(self, keys):
        """Replace the queue's oldest entries by keys (B, dim); after the backward pass, so that it needs no copy."""
        places = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        self.queue_ptr.add_(len(keys)).remainder_(len(self.queue))


def cosine_lr(lr, epoch, epochs):
    """Learning rate of an epoch: from lr to 0 along half a cosine, changed once per epoch as released."""
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


# ------------------------------------------------------------------------------------------------------------- Training


def main():
    args = parse_args()
    if args.queue_size < args.batch_size:
        raise common.UserError(f"--queue-size {args.queue_size} is smaller than --batch-size {args.batch_size}")
    device = common.init_device(args.seed)
    size = args.image_size or common.default_image_size(args.data)
    dataset = common.load_dataset(args.data, args.data_root, "pretrain", device, size)
    knn_sets = common.load_labelled(args.data, args.data_root, device, size) if args.knn_every else ()
    view = common.View(size, scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2,
                       blur=(0.1, 2.0), blur_p=0.5)  # fmt: skip
    loader = common.Loader(dataset, [view, view], args.batch_size, args.seed, args.workers, device)

    backbone = common.build_backbone(args.arch, size, args.init)
    head = common.mlp_head(backbone.feature_dim, args.hidden_dim or backbone.feature_dim, args.dim)
    encoder = common.Encoder(backbone, head)
    encoder.amp = common.AMP[args.amp]
    model = MoCo(encoder, args.dim, args.queue_size, args.momentum, args.temperature)
    model.to(device, memory_format=torch.channels_last)
    optimizer = common.sgd(encoder.parameters(), args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    run = common.Run(
        "moco_v2", args, dataset, *knn_sets, arch=args.arch, image_size=size, mean_std=common.mean_std_of(dataset)
    )
    run.start_or_resume(model, optimizer, scaler)
    if args.compile:
        model.encoder.compile()
        model.momentum_encoder.compile()
    ddp_model = common.distribute(model)
    evaluate = common.knn_probe(encoder, args, knn_sets, size, device)

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
    parser = common.common_parser("moco_v2", __doc__, epochs=200, batch_size=256, lr=0.03, weight_decay=1e-4)
    add = parser.add_argument
    add("--arch", required=True, help="network, any of torchvision's or of CIFAR's (common.CIFAR_NETWORKS)")
    add("--dim", type=common.positive_int, default=128, help="dimensions of the embedding (default %(default)s)")
    add("--hidden-dim", type=common.positive_int, help="hidden layer of the head (default: as wide as the features)")
    add("--queue-size", type=common.positive_int, default=65536, help="negatives (default %(default)s)")
    add("--momentum", type=common.fraction, default=0.999, help="of the moving average (default %(default)s)")
    add("--temperature", type=common.positive_float, default=0.2, help="of InfoNCE (default %(default)s)")
    add("--knn-every", type=common.positive_int, help="log k-NN accuracy every so many epochs (default: never)")
    return parser.parse_args()


if __name__ == "__main__":
    common.run_script(main)
