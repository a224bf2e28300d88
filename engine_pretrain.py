# SPDX-License-Identifier: MIT
"""Pretraining: one epoch of steps, and reconstructions to look at. Tensors only; no file, no dataset."""

import torch

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
    x, weights = run.training.prepare(sar_db, ids, place.epoch)  # (B, 2, H, W); weights alike, or None
    mask = draw_micro_batch_mask(run.training.model, run.config, place)  # (1, L, 1)
    with autocast(run.ranks.device, run.config.amp):
        return run.model(x, weights, mask=mask)[0]


def draw_micro_batch_mask(model, config, place):
    """The mask of one micro-batch, (1, L, 1): a function of the run's seed and the place."""
    generator = torch.Generator().manual_seed(place.seed(config.seed, MASK_STREAM))
    return model.draw_mask(config.mask_ratio, generator)


def warm_up_loss(model, images, config):
    """The loss of random images (B, 2, H, W), the same at each call. model: a MixMIM, maybe under DDP."""
    generator = torch.Generator().manual_seed(config.seed)
    mask = getattr(model, "module", model).draw_mask(config.mask_ratio, generator)
    with autocast(images.device, config.amp):
        return model(images, torch.ones_like(images), mask=mask)[0]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # a few images are not worth compiling for
def reconstruct(model, prepare, sar_db, mask, amp="off"):
    """What a model sees and predicts of some images: a dict of tensors on the CPU, in dB.

    sar_db: (B, 2, h, w), B even. mask: (1, L, 1). With norm_pix_loss the prediction is of standardised tokens, and
    their own mean and standard deviation are put back. The result, all (B, 2, H, W) but "visible":
      original   resized images
      visible    1 where a pixel was shown, (1, 1, H, W)
      predicted  every cell, each from the other half of its own image
      completed  hidden cells predicted, the others original
    """
    was_training = model.training
    model.eval()
    x, _ = prepare(sar_db.to(prepare.mean.device))
    with autocast(x.device, amp):
        _, pred, _ = model(x, None, mask=mask)
    _, mean, std = model.target(x)
    predicted = model.unpatchify(pred.float() * std + mean)
    # Zeros mixed with ones: 1 where a cell was replaced.
    hidden = model.mix(torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])]), mask)[:1, :1]
    model.train(was_training)
    return {
        "original": prepare.to_db(x).cpu(),
        "visible": 1 - hidden.cpu(),
        "predicted": prepare.to_db(predicted).cpu(),
        "completed": prepare.to_db(torch.where(hidden.bool(), predicted, x)).cpu(),
    }
