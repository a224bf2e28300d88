# SPDX-License-Identifier: MIT
"""The learning-rate schedule: linear warm-up, then half a cosine."""

import math


def adjust_learning_rate(optimizer, epoch, args):
    """Set the learning rate for a point in training and return it (before any per-group `lr_scale`).

        t < warmup:  lr·t/warmup;   else  min + (lr − min)·½·(1 + cos(π·(t − warmup)/(epochs − warmup)))

    epoch: t in epochs, a float, set at every iteration. args: lr, min_lr, warmup_epochs, epochs. The learning rate of a
    parameter group is multiplied by its `lr_scale`, if it has one (layer decay). Source: MAE, arXiv 2111.06377,
    appendix A.1.
    """
    if epoch < args.warmup_epochs:
        lr = args.lr * epoch / args.warmup_epochs
    else:
        progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
        lr = args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
