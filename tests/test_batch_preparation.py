# SPDX-License-Identifier: MIT
"""Batch preparation: order of the steps, values, augmentation by sample id, no-data pixels."""

import pytest
import torch
import torch.nn.functional as F

from batch_preparation import BatchPreparation, PixelPreparation, PretrainingPreparation, Weighting, random_flips
from sarwmix.weighting import compute_weights
from util.crop import random_resized_crop
from util.sampling import random_bits
from util.speckle import add_speckle, multilook

MEAN, STD = (-19.0, -12.0), (5.0, 4.0)


def images(batch=4, side=120, seed=0):
    return -15 + 5 * torch.randn(batch, 2, side, side, generator=torch.Generator().manual_seed(seed))


def prepare(**kwargs):
    return BatchPreparation(**{**dict(input_size=128, mean=MEAN, std=STD), **kwargs})


def test_resize_then_standardise_and_weights_from_the_resized_db():
    sar_db = images()
    x, weights = prepare()(sar_db)
    resized = F.interpolate(sar_db, size=(128, 128), mode="bilinear", align_corners=False)
    torch.testing.assert_close(x[:, 0], (resized[:, 0] + 19) / 5)
    torch.testing.assert_close(x[:, 1], (resized[:, 1] + 12) / 4)
    torch.testing.assert_close(weights, compute_weights(resized))


def test_equal_size_is_left_alone_and_shrinking_is_antialiased():
    sar_db = images(side=128)
    assert torch.equal(prepare().resize(sar_db), sar_db)
    checkerboard = torch.tensor([[0.0, 10.0], [10.0, 0.0]]).repeat(128, 128).expand(1, 2, -1, -1)
    assert prepare(input_size=64).resize(checkerboard)[..., 8:-8, 8:-8].std() < 1e-4
    assert F.interpolate(checkerboard, size=(66, 66), mode="bilinear").std() > 1  # what it would be without


def test_standardised_weight_domain_takes_standardised_values_for_db():
    sar_db = images(side=128)
    x, weights = prepare(weighting=Weighting(domain="standardized"))(sar_db)
    torch.testing.assert_close(weights, compute_weights(x))


def test_weight_options_are_passed_on_and_none_gives_none():
    sar_db = images(side=128)
    _, weights = prepare(weighting=Weighting("shared_avg", exp_scale=0.5, clip=90.0))(sar_db)
    torch.testing.assert_close(weights, compute_weights(sar_db, "shared_avg", 0.5, 90.0))
    assert prepare(weighting=Weighting("none"))(sar_db)[1] is None


def test_to_db_is_the_inverse_of_standardising():
    module, sar_db = prepare(), images(side=128)
    torch.testing.assert_close(module.to_db(module(sar_db)[0]), sar_db)


def test_no_data_becomes_the_mean_before_resizing_and_is_counted():
    sar_db = images()
    sar_db[1, 0, 10, 10], sar_db[2, 1, 5, 5], sar_db[2, 1, 5, 6] = float("nan"), float("inf"), float("-inf")
    filled = sar_db.clone()
    filled[1, 0, 10, 10], filled[2, 1, 5, 5:7] = MEAN[0], MEAN[1]
    module = prepare()
    torch.testing.assert_close(module(sar_db)[0], prepare()(filled)[0])
    assert module.filled == 3


def test_padding_of_windows_is_not_counted_as_no_data():
    module, sar_db = PixelPreparation(32, MEAN, STD), images(2, 32)
    sar_db[0, 1, 3, 4:6] = float("nan")
    assert torch.equal(module(sar_db)[0][0, 1, 3, 4:6], torch.zeros(2)) and module.filled == 0
    module(sar_db, torch.zeros(2, 32, 32, dtype=torch.uint8), torch.arange(2), epoch=0)
    assert module.filled == 2


def test_flips_depend_on_seed_epoch_and_id_alone():
    sar_db, ids = images(8, 128), torch.arange(100, 108)
    module = prepare(seed=3)
    x, weights = module(sar_db, ids, epoch=2)
    order = torch.tensor([5, 2, 7])
    torch.testing.assert_close(module(sar_db[order], ids[order], epoch=2)[0], x[order])
    torch.testing.assert_close(module.to_db(x), random_flips(sar_db, 3, 2, ids))
    torch.testing.assert_close(weights, compute_weights(random_flips(sar_db, 3, 2, ids)))  # weights are flipped along
    assert not torch.equal(module(sar_db, ids, epoch=3)[0], x)
    assert not torch.equal(prepare(seed=4)(sar_db, ids, epoch=2)[0], x)
    assert torch.equal(module(sar_db)[0], prepare()(sar_db)[0])  # no ids, no flips


def test_crops_come_first_and_in_training_only():
    sar_db, ids = images(), torch.arange(4)
    module = prepare(seed=3, crop_scale=(0.2, 0.5))
    x, weights = module(sar_db, ids, epoch=2)
    cropped = random_flips(random_resized_crop(sar_db, 128, 3, 2, ids, (0.2, 0.5)), 3, 2, ids)
    torch.testing.assert_close(module.to_db(x), cropped)
    torch.testing.assert_close(weights, compute_weights(cropped))
    assert torch.equal(module(sar_db)[0], prepare()(sar_db)[0])


def test_flips_are_fair_independent_and_of_the_right_axes():
    ids = torch.arange(40_000)
    bits = random_bits(0, 0, ids)
    pairs = torch.stack([bits & 1, bits >> 1 & 1]).float()
    assert (pairs.mean(1) - 0.5).abs().max() < 0.01
    for other in (random_bits(0, 1, ids), random_bits(1, 0, ids), random_bits(0, 0, ids + 1)):
        agree = torch.stack([bits & 1 == other & 1, bits >> 1 & 1 == other >> 1 & 1]).float().mean(1)
        assert (agree - 0.5).abs().max() < 0.01
    assert ((pairs[0] == pairs[1]).float().mean() - 0.5).abs() < 0.01
    image = torch.arange(4.0).view(1, 1, 2, 2).expand(64, 2, 2, 2)
    seen = {tuple(flipped[0].flatten().tolist()) for flipped in random_flips(image, 0, 0, torch.arange(64))}
    assert seen == {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}


def test_description_is_plain_and_complete():
    assert prepare().describe() == {
        "channels": ["VH", "VV"],
        "units": "dB",
        "input_size": 128,
        "mean": [-19.0, -12.0],
        "std": [5.0, 4.0],
    }


@pytest.mark.parametrize(
    "kwargs", [dict(std=(0, 1)), dict(mean=(1, 2, 3)), dict(crop_scale=(0.5, 0.2)), dict(crop_scale=(0, 1))]
)
def test_impossible_settings_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        prepare(**kwargs)


@pytest.mark.parametrize("name", ["mode", "domain"])
def test_unknown_weightings_are_refused(name):
    with pytest.raises(ValueError, match=f"weight {name} 'x'"):
        Weighting(**{name: "x"})


def test_wrong_channel_count_is_refused():
    with pytest.raises(ValueError, match="VH, VV"):
        prepare()(torch.zeros(2, 3, 120, 120))


# ---- The target of pretraining -------------------------------------------------------------------


def pretraining(**kwargs):
    return PretrainingPreparation(128, MEAN, STD, **kwargs)


def test_without_options_the_target_is_the_input():
    sar_db, ids = images(), torch.arange(4)
    x, weights, target = pretraining()(sar_db, ids, epoch=1)
    expected = prepare()(sar_db, ids, epoch=1)
    assert target is None and torch.equal(x, expected[0]) and torch.equal(weights, expected[1])


def test_the_target_is_averaged_in_linear_power_after_flips_and_standardised():
    sar_db, ids = images(side=128), torch.arange(4)
    x, weights, target = pretraining(looks=8)(sar_db, ids, epoch=1)
    module = prepare()
    assert torch.equal(x, module(sar_db, ids, epoch=1)[0])
    power = (10 ** (random_flips(sar_db, 0, 1, ids) / 10)).view(4, 2, 16, 8, 16, 8).mean((3, 5))
    torch.testing.assert_close(target, module.standardize(10 * power.log10()))
    assert weights.shape == x.shape  # the model averages them


def test_speckle_is_in_the_input_of_training_alone():
    sar_db, ids = images(), torch.arange(4)
    clean = pretraining()(sar_db, ids, epoch=1)
    x, weights, target = pretraining(speckle_looks=4)(sar_db, ids, epoch=1)
    assert torch.equal(target, clean[0]) and torch.equal(weights, clean[1])
    module = prepare()
    torch.testing.assert_close(module.to_db(x), add_speckle(module.to_db(target), 4, 0, 1, ids))
    both = pretraining(speckle_looks=4, looks=4)(sar_db, ids, epoch=1)
    assert torch.equal(both[0], x)
    torch.testing.assert_close(module.to_db(both[2]), multilook(module.to_db(clean[0]), 4))
    assert pretraining(speckle_looks=4)(sar_db)[2] is None  # evaluation
    assert torch.equal(pretraining(speckle_looks=4)(sar_db)[0], prepare()(sar_db)[0])


def test_only_training_counts_what_pretraining_fills():
    sar_db, module = images(), pretraining()
    sar_db[0, 0, 5, 5:7] = float("nan")
    module(sar_db)
    assert module.filled == 0
    module(sar_db, torch.arange(4), epoch=0)
    assert module.filled == 2
