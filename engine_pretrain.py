# SPDX-License-Identifier: MIT
"""Pretraining loops: one epoch of steps, and reconstructions to look at. Knows tensors; no file, no dataset."""

import torch

from util.optimization import MASK_STREAM, autocast, run_steps
from util.sampling import stream_seed


def draw_micro_batch_mask(model, args, epoch, step, micro):
    """The mask of one micro-batch, (1, L, 1): a function of (seed, epoch, step, micro-batch)."""
    generator = torch.Generator().manual_seed(stream_seed(args.seed, MASK_STREAM, epoch, step, micro))
    return model.draw_mask(args.mask_ratio, generator)


def train_one_epoch(
    model, prepare, loader, optimizer, scaler, epoch, ranks, args, writer=None, progress=None, between=None
):
    """Train for one epoch; arguments, results and errors as in `run_steps`.

    model: a MixMIM, maybe under DDP. prepare: BatchPreparation. loader: yields (ids, dB images) micro-batches.
    """
    bare = getattr(model, "module", model)

    def micro_batch_loss(batch, step, micro):
        ids, sar_db = (t.to(ranks.device, non_blocking=True) for t in batch)
        x, weights = prepare(sar_db, ids, epoch)
        mask = draw_micro_batch_mask(bare, args, epoch, step, micro)
        with autocast(ranks.device, args.amp):
            return model(x, weights, mask=mask)[0]

    return run_steps(model, micro_batch_loss, loader, optimizer, scaler, epoch, ranks, args, writer, progress, between)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # for a few images nothing is compiled
def reconstruct(model, prepare, sar_db, mask, amp="off"):
    """What a model sees and predicts of some images, in dB, all (B, 2, H, W) on the CPU, and the mask.

    sar_db: (B, 2, h, w), B even; mask: (1, L, 1). Returns a dict: original (resized), visible (1 where a pixel was shown,
    (1, 1, H, W)), predicted (every cell, each from the other half of its own image), completed (the hidden cells
    predicted, the others as they are). With norm_pix_loss the prediction is of standardised tokens: their own mean and
    standard deviation are put back.
    """
    was_training = model.training
    model.eval()
    x, _ = prepare(sar_db.to(prepare.mean.device))
    with autocast(x.device, amp):
        _, pred, _ = model(x, None, mask=mask)
    _, mean, std = model.target(x)
    predicted = model.unpatchify(pred.float() * std + mean)
    hidden = model.mix(torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])]), mask)[:1, :1]
    model.train(was_training)
    return {
        "original": prepare.to_db(x).cpu(),
        "visible": 1 - hidden.cpu(),
        "predicted": prepare.to_db(predicted).cpu(),
        "completed": prepare.to_db(torch.where(hidden.bool(), predicted, x)).cpu(),
    }
