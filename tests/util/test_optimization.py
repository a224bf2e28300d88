# SPDX-License-Identifier: MIT
"""The record of the steps of an epoch: what is read, what stops a run, and what a checkpoint keeps of it; mixed precision."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch

from common.errors import TrainingError
from util.distributed import Launch, Ranks
from util.optimization import MOST_SKIPPED, StepRecord, emulates_16_bits, settle_amp
from util.sampling import MicroBatchSampler, epoch_order

ALONE = Ranks(Launch(), torch.device("cpu"))
INF, NAN = float("inf"), float("nan")


def record_of(steps, scaled=False, progress=None):
    """The record of epoch 4, whose steps have two samples each."""
    sampler = MicroBatchSampler(2 * steps, batch_size=2)
    sampler.epoch = 4
    return StepRecord(sampler, ALONE, scaled, progress)


def read(record, steps):
    """Adds (loss, gradient norm) of further steps to a record, and reads them."""
    for step, (loss, norm) in enumerate(steps, record.read):
        record.add(step, torch.tensor(loss), torch.tensor(norm))
    record.collect(record.read + len(steps))


def test_losses_are_read_once_and_in_order():
    record = record_of(5)
    read(record, [(3.0, 1.0), (2.0, 0.5)])
    read(record, [(1.0, 0.25)])
    assert record.losses == [3, 2, 1] and record.grad_norm == 0.25 and record.read == 3


def test_progress_goes_on_where_it_was():
    whole, first = record_of(4, scaled=True), record_of(4, scaled=True)
    steps = [(3.1, 1.0), (2.2, INF), (1.3, INF), (0.7, 0.5)]
    read(whole, steps)
    read(first, steps[:2])
    second = record_of(4, True, first.progress())
    assert (second.read, second.skipped) == (2, 1)
    read(second, steps[2:])
    assert second.losses == whole.losses and second.progress()["losses"].equal(whole.progress()["losses"])
    assert (
        (second.read, second.grad_norm, second.skipped) == (whole.read, whole.grad_norm, whole.skipped) == (4, 0.5, 0)
    )


@pytest.mark.parametrize(
    "loss, norm, said",
    [
        (NAN, 1.0, "loss nan"),
        (-INF, 1.0, "loss -inf"),
        (1.0, INF, "gradient norm inf"),
        (1.0, NAN, "gradient norm nan"),
    ],
)
def test_what_is_not_finite_stops_the_run_at_its_step(loss, norm, said):
    record = record_of(9)
    ids = ", ".join(map(str, epoch_order(18, 0, 4)[10:12]))
    read(record, [(1.0, 1.0)] * 3)
    with pytest.raises(
        TrainingError,
        match=f"epoch 4, step 5: {said}; sample ids {ids}; the last saved checkpoint precedes this step",
    ):
        read(record, [(1.0, 1.0), (1.0, 1.0), (loss, norm), (1.0, 1.0)])


def test_a_scaled_loss_may_overflow_but_not_for_ever():
    record = record_of(3 * MOST_SKIPPED, scaled=True)
    read(record, [(1.0, INF)] * (MOST_SKIPPED - 1) + [(1.0, 1.0)])
    read(record, [(1.0, NAN)] * (MOST_SKIPPED - 1))
    with pytest.raises(TrainingError, match=f"{MOST_SKIPPED} fp16 steps in a row overflowed; try --amp bf16"):
        read(record, [(1.0, INF)])
    with pytest.raises(TrainingError, match="loss nan"):
        read(record_of(1, scaled=True), [(NAN, INF)])


@pytest.mark.parametrize(
    "amp, device, capability, settled, said",
    [
        (None, "cuda", (9, 0), "bf16", None),
        (None, "cuda", (8, 0), "bf16", None),
        (None, "cuda", (7, 5), "fp16", "--amp fp16 is chosen"),
        ("bf16", "cuda", (7, 0), "bf16", "--amp bf16: this GPU has no instructions .* fp16; leave the flag out"),
        ("fp16", "cuda", (6, 0), "fp16", None),
        (None, "cpu", None, "off", None),
        ("off", "cuda", (7, 0), "off", None),
    ],
)
def test_precision_is_what_the_gpu_computes_in(monkeypatch, caplog, amp, device, capability, settled, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level(logging.INFO):
        assert settle_amp(amp, Ranks(Launch(), torch.device(device))) == settled
    assert len(caplog.records) == (said is not None)
    assert all(re.search(said, record.message) for record in caplog.records)


@pytest.mark.parametrize("slower", (1, 100))
def test_a_cpu_that_emulates_16_bits_is_warned_of(monkeypatch, caplog, slower):
    """What a product takes is made up here; the clock moves with it."""
    clock = [0.0]

    def product(one, other):
        clock[0] += 1e-3 if one.dtype == torch.float32 else 1e-3 * slower

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr("util.optimization.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    threads = torch.get_num_threads()
    assert emulates_16_bits(torch.device("cpu"), torch.bfloat16) == (slower == 100)
    assert torch.get_num_threads() == threads and clock[0] < 0.3
    assert settle_amp("bf16", ALONE) == "bf16"
    assert ("--amp bf16: this CPU has no instructions for it" in caplog.text) == (slower == 100)
