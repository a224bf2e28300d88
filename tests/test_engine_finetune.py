# SPDX-License-Identifier: MIT
"""What the finetuning engine does to a batch, by value."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data import Mixup

from batch_preparation import BatchPreparation, Weighting
from common.errors import TrainingError
from engine_finetune import mix, predict, prepare_images, smooth
from util.distributed import Launch, Ranks

ALONE = Ranks(Launch(), torch.device("cpu"))


def test_the_images_of_a_pair_are_prepared_and_flipped_alike():
    prepare = BatchPreparation(64, (-20.0, -10.0), (2.0, 4.0), weighting=Weighting("none"))
    first = -15 + torch.randn(16, 2, 64, 64)
    one, other = prepare_images(prepare, [first, first + 1], ALONE.device, torch.arange(16), epoch=3)
    step = torch.tensor([1 / 2, 1 / 4]).view(2, 1, 1)
    torch.testing.assert_close(other - one, step.expand_as(one), atol=1e-5, rtol=0)
    (plain,) = prepare_images(prepare, [first], ALONE.device)
    torch.testing.assert_close(plain[:, 0], (first[:, 0] + 20) / 2)
    assert 0 < sum(not torch.equal(a, b) for a, b in zip(plain, one)) < 16


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("images", [1, 2])
def test_mixup_mixes_labels_in_the_shares_of_the_pixels(mode, images):
    mixup = Mixup(mixup_alpha=0.8, mode=mode, label_smoothing=0.0, num_classes=6)
    numbers = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 8, 8)
    targets = torch.eye(6)[:, :4] + torch.eye(6)[:, 2:]  # some have two labels, some one
    mixed, labels = mix(mixup, [numbers.clone() + 10 * k for k in range(images)], targets, seed=5)
    assert len(mixed) == images
    for i in range(6):
        values = mixed[0][i].unique()
        assert len(values) == 1
        share = (values - (5 - i)) / (2 * i - 5)  # value = share·i + (1 − share)·(5 − i)
        assert 0 < share < 1
        torch.testing.assert_close(labels[i], share * targets[i] + (1 - share) * targets[5 - i])
        assert all(torch.allclose(other[i], mixed[0][i] + 10 * k) for k, other in enumerate(mixed))


def test_cutmix_pastes_the_same_box_into_both_images_of_a_pair():
    mixup = Mixup(mixup_alpha=0.0, cutmix_minmax=(0.3, 0.6), label_smoothing=0.0, num_classes=2)
    numbers = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 2, 32, 32)
    mixed, labels = mix(mixup, [numbers.clone(), numbers.clone() + 10], torch.eye(2), seed=1)
    assert torch.equal(mixed[1], mixed[0] + 10) and mixed[0][0].unique().tolist() == [0, 1]
    torch.testing.assert_close(labels[0, 1], mixed[0][0].mean())


def test_mixing_is_a_function_of_its_seed_and_leaves_numpys_generator_alone():
    mixup = Mixup(mixup_alpha=0.8, label_smoothing=0.0, num_classes=4)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    results = [
        mix(mixup, [torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))], torch.eye(4), seed)[1]
        for seed in (7, 7, 2**62 + 8)
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert np.array_equal(before, np.random.get_state()[1])


def test_smoothing():
    assert smooth(torch.tensor([0.0, 1.0]), 0.2).tolist() == pytest.approx([0.1, 0.9])


class Constant(torch.nn.Module):
    """Logits that are the mean of the image."""

    def forward(self, x):
        return x.mean((2, 3))


def test_predictions_are_in_order_and_what_is_not_finite_is_named():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 32, 32) - 20
    prepare = BatchPreparation(32, (-20.0, -20.0), (1.0, 1.0), weighting=Weighting("none"))
    batches = [(torch.tensor(ids), [images[ids]], torch.tensor(ids)) for ids in ([3, 1], [4], [0, 2])]
    model = Constant().train()
    outputs, labels = predict(model, prepare, batches, ALONE, "off")
    assert outputs[:, 0].tolist() == labels.tolist() == [0, 1, 2, 3, 4] and model.training
    with pytest.raises(RuntimeError, match="twice or not at all"):
        predict(model, prepare, batches + batches[:1], ALONE, "off")
    model.forward = lambda x: x.mean((2, 3)) / (x.mean((1, 2, 3)) - 3)[:, None]
    with pytest.raises(TrainingError, match="1 of 5 samples; sample ids 3$"):
        predict(model, prepare, batches, ALONE, "off")


def test_one_rank_without_a_batch_is_no_obstacle():
    ranks = SimpleNamespace(device=torch.device("cpu"), gather=lambda here: [here, type(here)()])
    images = torch.full((1, 2, 32, 32), -20.0)
    prepare = BatchPreparation(32, (-20, -20), (1, 1), weighting=Weighting("none"))
    outputs, _ = predict(Constant(), prepare, [(torch.tensor([0]), [images], torch.tensor([1]))], ranks, "off")
    assert outputs.tolist() == [[0, 0]]
