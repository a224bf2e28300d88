# SPDX-License-Identifier: MIT
"""The samples of each step, and all random streams: functions of (seed, epoch, step, micro-batch, sample id) only.

An epoch is one permutation, cut into global batches, each cut into world_size · accum_iter micro-batches; rank r takes
the micro-batches r, r + world_size, … One process that accumulates two micro-batches and two processes that take one
each therefore see the same micro-batches, and a run can be continued from any step.
"""

from dataclasses import dataclass

import numpy as np
import torch

# Random streams of a micro-batch, besides the sample order and the flips.
MASK_STREAM, DROP_PATH_STREAM, MIXUP_STREAM = 1, 2, 3


def stream_seed(seed, *place):
    """A 63-bit seed of the random stream at a place (non-negative integers: number of the stream, epoch, step, …)."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _int64(value):
    """An unsigned 64-bit constant as the int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value


def _scramble(z):
    """The finalizer of SplitMix64 on int64 tensors (Steele, Lea, Flood: Fast splittable PRNGs, OOPSLA 2014)."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _int64(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _int64(0x94D049BB133111EB)
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def random_bits(seed, epoch, ids, *stream):
    """64 random bits per sample, int64, on the device of `ids`, computed without synchronising.

    A sample has the same bits in every batch, on every rank and in a continued run. ids: int64, any shape. stream:
    integers that distinguish uses of the same (seed, epoch, id).
    """
    step = _int64(0x9E3779B97F4A7C15)
    state = torch.full((), seed, dtype=torch.int64, device=ids.device)
    for value in (epoch, ids, *stream):
        state = _scramble(state * step + value)
    return _scramble(state + step)


@dataclass(frozen=True)
class Place:
    """A place in a run: epoch, step of the epoch, and micro-batch of the step, counted over all ranks.

    All are 0-based.
    """

    epoch: int
    step: int = 0
    micro: int = 0

    def seed(self, seed, stream):
        """The seed of a random stream at this place, for a run with this seed."""
        return stream_seed(seed, stream, self.epoch, self.step, self.micro)


def epoch_order(num_samples, seed, epoch):
    """The order of an epoch: a permutation of range(num_samples), int64."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


class MicroBatchSampler(torch.utils.data.Sampler):
    """Yields the ids of this rank's micro-batches of an epoch; drops the last, incomplete global batch.

    epoch, first_step: set before each pass; a run that continues within an epoch starts at a later step.
    """

    def __init__(self, num_samples, batch_size, accum_iter=1, rank=0, world_size=1, seed=0):
        self.num_samples, self.batch_size, self.accum_iter = num_samples, batch_size, accum_iter
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = self.first_step = 0
        self.steps = num_samples // (batch_size * accum_iter * world_size)

    def __len__(self):
        return (self.steps - self.first_step) * self.accum_iter

    def global_batch(self, epoch, step):
        """The ids of one step, all ranks together: (world_size · accum_iter, batch_size)."""
        size = self.batch_size * self.accum_iter * self.world_size
        order = epoch_order(self.num_samples, self.seed, epoch)
        return order[step * size : (step + 1) * size].reshape(-1, self.batch_size)

    def __iter__(self):
        size = self.batch_size * self.accum_iter * self.world_size
        order = epoch_order(self.num_samples, self.seed, self.epoch)[self.first_step * size : self.steps * size]
        for ids in order.reshape(-1, self.world_size, self.batch_size)[:, self.rank]:
            yield ids.tolist()


class InOrderSampler(torch.utils.data.Sampler):
    """Batches of range(num_samples) in order; the last one may be shorter.

    Rank r takes the batches r, r + world_size, …

    Every sample occurs exactly once, and in the same batch for any number of ranks.
    """

    def __init__(self, num_samples, batch_size, rank=0, world_size=1):
        self.num_samples, self.batch_size, self.rank, self.world_size = num_samples, batch_size, rank, world_size

    def __len__(self):
        return len(self._starts())

    def _starts(self):
        return range(self.rank * self.batch_size, self.num_samples, self.world_size * self.batch_size)

    def __iter__(self):
        for start in self._starts():
            yield list(range(start, min(start + self.batch_size, self.num_samples)))
