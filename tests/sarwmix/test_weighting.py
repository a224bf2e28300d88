# SPDX-License-Identifier: MIT
"""Polarization weights by value: known dB in, known weights out."""

import math

import pytest
import torch

from sarwmix.weighting import WEIGHT_MODES, compute_weights


def db(*linear):
    """A channel of known linear σ⁰, one row, in dB."""
    return 10 * torch.log10(torch.tensor([linear]))


def test_darkest_weighs_e_brightest_one_and_the_middle_by_linear_backscatter():
    # 0.1, 0.3, 0.5 is even in linear units; in dB (−10, −5.2, −3) it is not.
    image = torch.stack([db(0.1, 0.3, 0.5), db(1.0, 2.0, 5.0)])
    weights = compute_weights(image)
    expected = torch.tensor([[[math.e, math.exp(0.5), 1.0]], [[math.e, math.exp(0.75), 1.0]]])
    torch.testing.assert_close(weights, expected, atol=1e-4, rtol=0)
    assert weights.dtype == torch.float32 and weights.shape == image.shape


def test_exp_scale_sets_the_largest_weight():
    weights = compute_weights(torch.stack([db(0.1, 0.5), db(0.1, 0.5)]), exp_scale=2.0)
    torch.testing.assert_close(weights[0, 0], torch.tensor([math.exp(2.0), 1.0]), atol=1e-4, rtol=0)


def test_min_and_max_are_of_each_image_and_channel():
    one, other = torch.stack([db(0.1, 0.5), db(1, 2)]), torch.stack([db(3.0, 4.0), db(10, 50)])
    together = compute_weights(torch.stack([one, other]))
    torch.testing.assert_close(together, torch.stack([compute_weights(one), compute_weights(other)]))


def test_shared_average_is_the_mean_of_the_two_weights_not_the_weight_of_the_mean():
    image = torch.stack([db(0.1, 0.3, 0.5), db(5.0, 1.0, 2.0)])
    own, shared = compute_weights(image), compute_weights(image, mode="shared_avg")
    torch.testing.assert_close(shared, own.mean(0, keepdim=True).expand_as(own))


def test_shared_intensity_is_the_weight_of_the_mean_intensity_in_which_vv_decides():
    vh, vv = [0.01, 0.03, 0.05], [0.50, 0.10, 0.20]
    weights = compute_weights(torch.stack([db(*vh), db(*vv)]), mode="shared_intensity")
    mean = [(a + b) / 2 for a, b in zip(vh, vv)]  # 0.255, 0.065, 0.125
    expected = [math.exp(1 - (x - 0.065) / (0.255 - 0.065 + 1e-6)) for x in mean]
    torch.testing.assert_close(weights, torch.tensor([expected, expected]).view_as(weights))
    assert weights[0].argmin() == 0 and compute_weights(torch.stack([db(*vh), db(*vv)]))[0].argmin() == 2


def test_shared_intensity_is_clipped_after_the_mean_and_works_in_batches():
    image = 10 * torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)).log10()
    weights = compute_weights(image, "shared_intensity", clip=90.0)
    mean = (10 ** (image / 10)).mean(1).flatten(1)
    clipped = torch.minimum(mean, mean.quantile(0.9, dim=1, keepdim=True))
    low, high = clipped.amin(1, keepdim=True), clipped.amax(1, keepdim=True)
    expected = torch.exp(1 - (clipped - low) / (high - low + 1e-6)).view(3, 1, 16, 16).expand(-1, 2, -1, -1)
    torch.testing.assert_close(weights, expected)


def test_none_is_one():
    assert torch.equal(compute_weights(torch.randn(3, 2, 4, 4), mode="none"), torch.ones(3, 2, 4, 4))


def test_constant_image_weighs_e():
    torch.testing.assert_close(compute_weights(torch.full((2, 4, 4), -15.0)), torch.full((2, 4, 4), math.e))


def test_clip_keeps_one_bright_target_from_squeezing_the_rest():
    linear = torch.linspace(0.01, 0.1, 100).repeat(2, 1)
    linear[:, -1] = 100.0  # a corner reflector
    image = 10 * torch.log10(linear).view(2, 10, 10)
    squeezed, clipped = compute_weights(image).view(2, -1), compute_weights(image, clip=98.0).view(2, -1)
    assert squeezed[:, 98].min() > 2.7  # all but the target close to e
    assert clipped[:, 98].max() < 1.0001 and clipped[:, 0].min() > 2.7
    expected = torch.quantile(linear[0], 0.98)  # the same percentile as the library's
    x = (linear[0, 50] - linear[0, 0]) / (expected - linear[0, 0] + 1e-6)
    assert clipped[0, 50].item() == pytest.approx(math.exp(1 - x), abs=1e-4)


@pytest.mark.parametrize("flags", [dict(mode="vv"), dict(clip=0), dict(clip=101)])
def test_unknown_choices_are_refused(flags):
    with pytest.raises(ValueError, match="weight"):
        compute_weights(torch.zeros(2, 4, 4), **flags)


def test_every_mode_is_finite_on_extreme_backscatter():
    image = torch.tensor([-80.0, -30.0, 0.0, 35.0]).view(1, 2, 2).repeat(2, 1, 1)
    for mode in WEIGHT_MODES:
        weights = compute_weights(image, mode)
        assert weights.isfinite().all() and weights.min() >= 1 and weights.max() <= math.e + 1e-6
