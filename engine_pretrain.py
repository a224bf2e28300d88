# SPDX-License-Identifier: MIT
"""Pretraining: one epoch of steps, and reconstructions to look at. Tensors only; no file, no dataset."""

import torch
import torch.nn.functional as F

from util.optimization import autocast
from util.sampling import MASK_STREAM


def train_one_epoch(run, epoch):
    """Trains for one epoch, or what is left of it. Returns `Run.statistics`.

    run: Run of a MixMIM; its loader yields (ids, dB images) micro-batches.
    """
    run.model.train()
    for place, batch in run.batches(epoch):  # sets the learning rate, seeds drop path
        loss = reconstruction_loss(run, batch, place)
        # Backward pass; with a step's last micro-batch also the optimizer, the log, saving and stopping.
        run.step(loss, place)
    return run.statistics()


def reconstruction_loss(run, batch, place):
    """The weighted loss of one micro-batch under the mask of its place: a scalar on the device."""
    ids, sar_db = (t.to(run.ranks.device, non_blocking=True) for t in batch)  # (B,), (B, 2, h, w)
    # (B, 2, H, W); weights alike, or None; target (B, 2, H/looks, W/looks), or None for x
    x, weights, target = run.training.prepare(sar_db, ids, place.epoch)
    mask = draw_micro_batch_mask(run.training.model, run.config, place)  # (1, L, 1)
    with autocast(run.ranks.device, run.config.amp):
        return run.model(x, weights, mask=mask, target=target)[0]


def draw_micro_batch_mask(model, config, place):
    """The mask of one micro-batch, (1, L, 1): a function of the run's seed and the place."""
    generator = torch.Generator().manual_seed(place.seed(config.seed, MASK_STREAM))
    return model.draw_mask(config.mask_ratio, generator)


def warm_up_loss(model, images, config):
    """The loss of random images (B, 2, H, W), the same at each call. model: a MixMIM, maybe under DDP."""
    generator = torch.Generator().manual_seed(config.seed)
    own = getattr(model, "module", model)
    mask = own.draw_mask(config.mask_ratio, generator)
    with autocast(images.device, config.amp):
        return model(images, torch.ones_like(images), mask=mask, target=F.avg_pool2d(images, own.looks))[0]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # a few images are not worth compiling for
def reconstruct(model, prepare, sar_db, mask, amp="off"):
    """What a model sees and predicts of some images: a dict of tensors on the CPU, in dB.

    sar_db: (B, 2, h, w), B even. mask: (1, L, 1). With norm_pix_loss the prediction is of standardised tokens, and
    their own mean and standard deviation are put back. The result, all (B, 2, H, W) but "visible":
      original   resized images
      target     with looks above 1: averaged backscatter, what the model is to predict
      visible    1 where a pixel was shown, (1, 1, H, W)
      predicted  every cell, each from the other half of its own image
      completed  hidden cells predicted, the others original
    """
    was_training = model.training
    model.eval()
    x, _, target = prepare(sar_db.to(prepare.mean.device))
    with autocast(x.device, amp):
        _, pred, _ = model(x, None, mask=mask, target=target)
    _, mean, std = model.standardised(x if target is None else target)
    predicted = enlarged(model.unpatchify(pred.float() * std + mean), model.looks)
    # Zeros mixed with ones: 1 where a cell was replaced.
    hidden = model.mix(torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])]), mask)[:1, :1]
    model.train(was_training)
    averaged = {} if target is None else {"target": prepare.to_db(enlarged(target, model.looks)).cpu()}
    return {
        "original": prepare.to_db(x).cpu(),
        **averaged,
        "visible": 1 - hidden.cpu(),
        "predicted": prepare.to_db(predicted).cpu(),
        "completed": prepare.to_db(torch.where(hidden.bool(), predicted, x)).cpu(),
    }


def enlarged(images, times):
    """Repeats each pixel times × times: (B, C, h, w) → (B, C, h·times, w·times)."""
    return images.repeat_interleave(times, -1).repeat_interleave(times, -2)


# ---- Health of a model ---------------------------------------------------------------------------

COLLAPSED = 0.01  # variance of features between images, as a share of their mean square, that is taken for a collapse
NO_BETTER = 0.995  # loss, as a share of that of the best constant, above which a prediction is taken for constant


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def check_health(model, prepare, sar_db, mask, amp="off"):
    """What a model has learned, measured on some images: a dict of floats.

    sar_db: (B, 2, h, w), B even. mask: (1, L, 1).
      check_loss      of these images, under this mask, without drop path
      check_constant  the loss of the best constant prediction, one value for each channel
      check_variance  variance of the encoder's tokens, of whole images, as a share of their mean square; 0 where all
                      tokens are the same vector
      check_between   share of this variance that lies between the means of images; 0 where all images have the same
                      features
    """
    was_training = model.training
    model.eval()
    x, weights, target = prepare(sar_db.to(prepare.mean.device))
    with autocast(x.device, amp):
        loss, pred, _ = model(x, weights, mask=mask, target=target)
        tokens = model.encode(x).double()  # (B, L, C₄)
    constant = best_constant_loss(model, x if target is None else target, weights, pred)
    model.train(was_training)
    variance = tokens.flatten(0, 1).var(0, correction=0).sum()
    between = tokens.mean(1).var(0, correction=0).sum()
    return {
        "check_loss": loss.item(),
        "check_constant": constant,
        "check_variance": (variance / tokens.square().sum(-1).mean()).item(),
        "check_between": (between / variance.clamp(min=1e-12)).item(),
    }


def best_constant_loss(model, target, weights, like):
    """The loss of the constant per channel with the lowest loss. like: a prediction, (B, L, P).

    The loss is a quadratic function a·c² + b·c + d of the constant c of a channel, and one channel does not change what
    another adds, so that three losses tell its minimum d − b²/(4a).
    """

    def loss(channel, c):
        pred = torch.zeros_like(like, dtype=torch.float32)
        pred[..., channel::2] = c
        return model.forward_loss(target, pred, weights).item()

    least = zero = loss(0, 0.0)
    for channel in (0, 1):
        above, below = loss(channel, 1.0), loss(channel, -1.0)
        least -= ((above - below) / 2) ** 2 / (2 * (above + below - 2 * zero))
    return least


def complaints(health):
    """Lines about a model that has not learned, of the dict of `check_health`, each with what to try."""
    lines = []
    varying = health["check_variance"] * health["check_between"]
    if varying < COLLAPSED:
        lines.append(
            f"the encoder has collapsed: images differ in {varying:.2%} of the mean square of its features; try a "
            "lower --lr, more --warmup_epochs or --clip_grad 1, or training without --norm_pix_loss"
        )
    if health["check_loss"] > NO_BETTER * health["check_constant"]:
        lines.append(
            f"the prediction is no better than a constant: loss {health['check_loss']:.4f}, of the best constant "
            f"{health['check_constant']:.4f}; try another --lr, more epochs or --clip_grad 1"
        )
    return lines
