# SPDX-License-Identifier: MIT
"""Segmentation: one epoch of steps, and the comparison with the masks of a split. Tensors only; no file, no dataset."""

from functools import partial

import torch
import torch.nn.functional as F

from common.errors import TrainingError
from engine_finetune import each_batch, in_order
from util.optimization import autocast
from util.sliding import blended


def train_one_epoch(run, epoch):
    """Trains for one epoch, or what is left of it. Returns `Run.statistics`.

    run: Run of a segmentation model. Its loader yields (ids, images, masks): images a list of one dB tensor
    (B, 2, h, w), masks (B, h, w) uint8.
    """
    run.model.train()
    for place, batch in run.batches(epoch):  # sets the learning rate, seeds drop path
        loss = segmentation_loss(run, batch, place)
        # Backward pass; with a step's last micro-batch also the optimizer, the log, saving and stopping.
        run.step(loss, place)
    return run.statistics()


def segmentation_loss(run, batch, place):
    """The loss of one micro-batch: a scalar on the device."""
    config, device = run.config, run.ranks.device
    ids, (images,), masks = batch
    ids, images, masks = (part.to(device, non_blocking=True) for part in (ids, images, masks))
    x, masks = run.training.prepare(images, masks, ids, place.epoch)  # (B, 2, S, S), (B, S, S)
    with autocast(device, config.amp):
        logits = run.model(x)  # (B, K, S, S)
    return pixel_loss(logits.float(), masks, config.dice, run.training.prepare.IGNORED)


def pixel_loss(logits, masks, dice, ignored):
    """Cross-entropy, plus `dice` times the Dice loss, of all pixels that count: a scalar.

    logits: (B, K, H, W) float32. masks: (B, H, W), class numbers or `ignored`. Without any pixel that counts it is 0.
    Dice loss: 1 − 2·Σpy/(Σp + Σy) of the probabilities p and labels y of all pixels of the batch, its mean over the
    classes that occur (Milletari et al., V-Net, arXiv 1606.04797, for each class and without squares).
    """
    masks, counts = masks.long(), masks != ignored
    loss = F.cross_entropy(logits, masks, ignore_index=ignored, reduction="sum") / counts.sum().clamp(min=1)
    if not dice:
        return loss
    p = logits.softmax(1) * counts[:, None]
    y = F.one_hot(masks.where(counts, 0), logits.shape[1]).permute(0, 3, 1, 2) * counts[:, None]
    overlap, size, occurs = (p * y).sum((0, 2, 3)), (p + y).sum((0, 2, 3)), y.sum((0, 2, 3)) > 0
    lost = (1 - 2 * overlap / size.clamp(min=1e-6)).where(occurs, 0)
    return loss + dice * lost.sum() / occurs.sum().clamp(min=1)


@torch.no_grad()
def score(model, prepare, loader, ranks, amp, windows, between=None):
    """Compares the model's classes with the masks of a split: (confusion, ignored, losses), on the CPU of every rank.

    loader: with an InOrderSampler, of (ids, [images], masks); results are in the order of the dataset. windows:
    `util.sliding.Windows`, in which images are predicted. between: as in `each_batch`. confusion: (N, K, K) int64, the
    pixels of class i of an image that are taken for class k; ignored: (N,) int64, its pixels that do not count; losses:
    (N,) float64, the sum of −log p of those that count. Raises TrainingError if an output is not finite.
    """
    was_training, parts = model.training, []
    model.eval()
    predict = partial(probabilities, model, prepare, amp=amp)
    for ids, (images,), masks in each_batch(loader, ranks, between):
        images, masks = images.to(ranks.device, non_blocking=True), masks.to(ranks.device, non_blocking=True)
        results = [
            _compare(blended(image, predict, windows), mask.long(), prepare.IGNORED)
            for image, mask in zip(images, masks)
        ]
        parts.append((ids, *map(torch.stack, zip(*results))))
    model.train(was_training)
    return in_order(parts, ranks)


def _compare(p, mask, ignored):
    """(confusion (K, K), pixels that do not count, sum of −log p) of one image. p: (K, H, W). mask: (H, W)."""
    classes, counts = len(p), mask != ignored
    labels, p = mask[counts], p[:, counts]  # (n,), (K, n)
    confusion = torch.bincount(labels * classes + p.argmax(0), minlength=classes**2).view(classes, classes)
    losses = -p.gather(0, labels[None]).double().clamp(min=1e-30).log()
    return confusion, (~counts).sum(), losses.sum()


@torch.no_grad()
def probabilities(model, prepare, images, amp):
    """The model's probabilities (B, K, S, S) float32 for dB images (B, 2, S, S), NaN for no data.

    Raises TrainingError if an output is not finite.
    """
    x, _ = prepare(images)
    with autocast(images.device, amp), torch.compiler.set_stance("force_eager"):  # batches differ in size
        logits = model(x)
    if not bool(logits.isfinite().all()):
        raise TrainingError("the model's outputs are not finite; its weights or the statistics of its input are wrong")
    return logits.float().softmax(1)
