# SPDX-License-Identifier: MIT
"""Sample order, micro-batches, and the schedule."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from util.lr_sched import adjust_learning_rate
from util.sampling import MicroBatchSampler, epoch_order, stream_seed


def batches(rank, world_size, accum_iter, epoch=1, num_samples=53):
    sampler = MicroBatchSampler(num_samples, 4, accum_iter, rank, world_size, seed=7)
    sampler.epoch = epoch
    assert len(list(sampler)) == len(sampler) == sampler.steps * accum_iter
    return list(sampler)


def test_ranks_and_accumulation_cut_an_epoch_into_the_same_micro_batches():
    alone = batches(0, 1, 4)
    for world_size, accum_iter in ((2, 2), (4, 1)):
        ranks = [batches(rank, world_size, accum_iter) for rank in range(world_size)]
        together = [ranks[i % world_size][i // world_size] for i in range(len(alone))]
        assert together == alone
    assert np.concatenate(alone).tolist() == epoch_order(53, 7, 1)[:48].tolist()  # 53 = 3 steps of 16, and 5 left out


def test_an_epoch_is_a_permutation_that_changes_with_epoch_and_seed():
    assert sorted(epoch_order(100, 0, 0)) == list(range(100))
    assert epoch_order(100, 0, 0).tolist() == epoch_order(100, 0, 0).tolist()
    assert len({tuple(epoch_order(100, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_global_batch_names_the_samples_of_a_step():
    sampler = MicroBatchSampler(53, 4, 2, rank=1, world_size=2, seed=7)
    sampler.epoch = 1
    assert sampler.global_batch(1, 1)[[1, 3]].tolist() == list(sampler)[2:4]


def test_stream_seeds_differ_by_place():
    places = [
        (stream, epoch, step, micro)
        for stream in (1, 2)
        for epoch in range(4)
        for step in range(4)
        for micro in range(4)
    ]
    seeds = {stream_seed(0, *place) for place in places}
    assert len(seeds) == len(places) and 0 <= min(seeds) and max(seeds) < 2**63


ARGS = SimpleNamespace(lr=1.0, min_lr=0.1, warmup_epochs=4, epochs=12)


@pytest.mark.parametrize(
    "t, lr",
    [(0, 0), (1, 0.25), (3.5, 0.875), (4, 1), (8, 0.55), (10, 0.1 + 0.45 * (1 + math.cos(0.75 * math.pi))), (12, 0.1)],
)
def test_schedule_by_value(t, lr):
    plain, scaled = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [plain]}, {"params": [scaled], "lr_scale": 0.5}], lr=9.0)
    assert adjust_learning_rate(optimizer, t, ARGS) == pytest.approx(lr)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr / 2])


def test_schedule_without_warmup():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0)
    assert adjust_learning_rate(optimizer, 0, SimpleNamespace(lr=1.0, min_lr=0.0, warmup_epochs=0, epochs=5)) == 1.0
