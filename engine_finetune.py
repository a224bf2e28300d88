# SPDX-License-Identifier: MIT
"""Finetuning: one epoch of steps, and the outputs for a whole split. Tensors only; no file, no dataset."""

import logging
import time
from itertools import chain, repeat

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import TrainingError
from util.optimization import MOST_IDS, autocast
from util.sampling import MIXUP_STREAM

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30


def train_one_epoch(run, epoch):
    """Trains for one epoch, or what is left of it. Returns `Run.statistics`.

    run: Run of a classifier of one image or of two. Its loader yields (ids, images, labels): images a list of dB
    tensors (B, 2, h, w), labels (B, K) float or (B,) int64. run.criterion(logits (B, K) float32, targets) → scalar;
    run.mixup: timm Mixup or None.
    """
    run.model.train()
    for place, batch in run.batches(epoch):  # sets the learning rate, seeds drop path
        loss = classification_loss(run, batch, place)
        # Backward pass; with a step's last micro-batch also the optimizer, the log, saving and stopping.
        run.step(loss, place)
    return run.statistics()


def classification_loss(run, batch, place):
    """The loss of one micro-batch: a scalar on the device."""
    config, device = run.config, run.ranks.device
    ids, images, targets = batch
    images = prepare_images(run.training.prepare, images, device, ids, place.epoch)  # each (B, 2, H, W)
    targets = targets.to(device, non_blocking=True)
    if run.mixup is not None or config.smoothing:
        targets = targets if targets.ndim == 2 else F.one_hot(targets, config.nb_classes).float()
        targets = smooth(targets, config.smoothing)
    if run.mixup is not None:
        images, targets = mix(run.mixup, images, targets, place.seed(config.seed, MIXUP_STREAM))
    with autocast(device, config.amp):
        logits = run.model(*images)  # (B, K)
    return run.criterion(logits.float(), targets)


def warm_up_loss(model, images, config, images_per_sample):
    """The loss of random images (B, 2, H, W), the same at each call. model: a classifier, maybe under DDP."""
    with autocast(images.device, config.amp):
        return model(*[images] * images_per_sample).sum()


def prepare_images(prepare, images, device, ids=None, epoch=None):
    """dB images of one batch, each (B, 2, h, w) → as many model inputs. Images of a sample are flipped alike."""
    stacked = torch.cat([image.to(device, non_blocking=True) for image in images])
    x, _ = prepare(stacked, None if ids is None else ids.to(device, non_blocking=True).repeat(len(images)), epoch)
    return x.chunk(len(images))


def mix(mixup, images, targets, seed):
    """Mixup and cutmix (1710.09412, 1905.04899) by timm, for any targets.

    images: list of (B, 2, H, W); those of a sample are mixed alike. targets: (B, K) float. timm mixes class numbers
    only: it is given the number of each sample as its class, and so returns the shares (B, B) in which samples were
    mixed. mixup: timm Mixup for B classes without smoothing. seed: of its random numbers, which it draws from NumPy's.
    """
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        mixed, shares = mixup(torch.cat(images, 1), torch.arange(len(targets), device=targets.device))
    finally:
        np.random.set_state(before)
    return mixed.chunk(len(images), 1), shares @ targets


def smooth(targets, smoothing):
    """Label smoothing towards ½: of each of many labels, or of two classes. targets (B, K) float."""
    return targets * (1 - smoothing) + smoothing / 2


@torch.no_grad()
def predict(model, prepare, loader, ranks, amp, features=False, between=None):
    """Logits, or features, of every sample of a split: (outputs (N, K) float32, labels (N, …)), on the CPU of every
    rank.

    loader: with an InOrderSampler, so that every sample comes exactly once; results are in the order of the dataset.
    between: as in `each_batch`. Raises TrainingError if an output is not finite.
    """
    was_training = model.training
    model.eval()
    forward = model.forward_features if features else model
    parts, size = [], None
    for ids, images, labels in each_batch(loader, ranks, between):
        size = size or len(ids)  # another one, of a split's last batch, is not worth compiling for
        with (
            autocast(ranks.device, amp),
            torch.compiler.set_stance("default" if len(ids) == size else "force_eager"),
        ):
            outputs = forward(*prepare_images(prepare, images, ranks.device))
        parts.append((ids, outputs.float(), labels))
    model.train(was_training)
    outputs, labels = in_order(parts, ranks)
    bad = (~outputs.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise TrainingError(
            f"the model's outputs are not finite for {len(bad)} of {len(outputs)} samples; sample ids "
            f"{', '.join(map(str, bad[:MOST_IDS]))}"
        )
    return outputs, labels


def each_batch(loader, ranks, between=None):
    """Yields the batches of a loader, and logs progress.

    between() is called after every batch, and equally often on all ranks.
    """
    started = logged = time.monotonic()
    idle = max(ranks.gather(len(loader))) - len(loader)  # batches that another rank has and this one has not
    for number, batch in enumerate(chain(loader, repeat(None, idle)), 1):
        if batch is not None:
            yield batch
        if between is not None:
            between()
        if time.monotonic() - logged > SECONDS_BETWEEN_LINES:
            logged = time.monotonic()
            log.info(
                "batch %d/%d, ETA %.0f s", number, len(loader), (logged - started) / number * (len(loader) - number)
            )


def in_order(parts, ranks):
    """Joins results of all ranks in the order of the dataset: a list of tensors (N, …) on the CPU of every rank.

    parts: of this rank, (ids (B,), result (B, …), …) of each batch.
    """
    here = [torch.cat(part).cpu() for part in zip(*parts)]
    ids, *results = (torch.cat(part) for part in zip(*filter(None, ranks.gather(here))))
    order = ids.argsort()
    if not torch.equal(ids[order], torch.arange(len(ids))):
        raise RuntimeError("a sample of the split was evaluated twice or not at all")
    return [result[order] for result in results]
