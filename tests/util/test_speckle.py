# SPDX-License-Identifier: MIT
"""Speckle: its distribution, what it is a function of, and averaging in linear power."""

import math

import pytest
import torch
from scipy import stats

from util.speckle import add_speckle, gamma_speckle, multilook


@pytest.mark.parametrize("looks", [1, 3, 4])
def test_speckle_has_the_gamma_distribution_of_its_looks(looks):
    values = gamma_speckle(torch.arange(8), (2, 64, 64), looks, seed=0, epoch=0).double().flatten()
    n = len(values)
    assert values.mean() == pytest.approx(1, abs=4 / math.sqrt(looks * n))
    assert values.var() == pytest.approx(1 / looks, rel=0.03)
    # 1.95/sqrt(n) is exceeded by one sample in a thousand.
    assert stats.kstest(values.numpy(), stats.gamma(looks, scale=1 / looks).cdf).statistic < 1.95 / math.sqrt(n)


def test_speckle_is_independent_from_pixel_to_pixel_channel_to_channel_and_image_to_image():
    values = gamma_speckle(torch.arange(16), (2, 64, 64), 2, seed=0, epoch=0) - 1
    for a, b in (
        (values[..., :-1], values[..., 1:]),
        (values[..., :-1, :], values[..., 1:, :]),
        (values[:, 0], values[:, 1]),
        (values[:-1], values[1:]),
    ):
        assert abs((a * b).mean() / values.var()) < 0.015


def test_speckle_is_a_function_of_seed_epoch_and_sample():
    ids = torch.tensor([5, 9, 2**40])
    values = gamma_speckle(ids, (2, 8, 8), 4, seed=3, epoch=7)
    assert torch.equal(gamma_speckle(ids.flip(0), (2, 8, 8), 4, 3, 7), values.flip(0))
    assert torch.equal(gamma_speckle(ids[1:2], (2, 8, 8), 4, 3, 7), values[1:2])
    for other in (gamma_speckle(ids, (2, 8, 8), 4, 4, 7), gamma_speckle(ids, (2, 8, 8), 4, 3, 8), values.roll(1, 0)):
        assert (other != values).float().mean() > 0.99
    assert values.isfinite().all() and values.min() > 0


def test_speckle_multiplies_backscatter():
    sar_db, ids = torch.full((2, 2, 16, 16), -12.0), torch.arange(2)
    power = 10 ** (add_speckle(sar_db, 4, 0, 0, ids) / 10)
    torch.testing.assert_close(power, 10**-1.2 * gamma_speckle(ids, (2, 16, 16), 4, 0, 0))


def test_multilook_averages_power_and_not_decibels():
    sar_db = torch.tensor([[0.0, 10.0], [20.0, -10.0]]).view(1, 1, 2, 2).repeat(1, 2, 4, 4)
    expected = 10 * math.log10((1 + 10 + 100 + 0.1) / 4)
    for looks in (2, 4, 8):
        torch.testing.assert_close(multilook(sar_db, looks), torch.full((1, 2, 8 // looks, 8 // looks), expected))


def test_averaging_speckle_makes_the_spread_in_db_smaller():
    ids = torch.arange(4)
    sar_db = add_speckle(torch.full((4, 2, 128, 128), -12.0), 4, 0, 0, ids)
    assert 2.2 < sar_db.std() < 2.5  # dB: sqrt(trigamma(4))·10/ln 10 = 2.31
    assert multilook(sar_db, 8).std() < 0.35 and abs(multilook(sar_db, 8).mean() + 12) < 0.02
