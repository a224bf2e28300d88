# SPDX-License-Identifier: MIT
"""The engine of segmentation, by value: crops and flips of images and masks, the loss, and the comparison."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from batch_preparation import PixelPreparation
from common.errors import TrainingError
from engine_segment import pixel_loss, score
from util.distributed import Launch, Ranks
from util.sliding import Windows

ALONE, IGNORED = Ranks(Launch(), torch.device("cpu")), PixelPreparation.IGNORED
STATISTICS = (-20.0, -10.0), (2.0, 4.0)


@pytest.mark.parametrize("crop_scale", [None, (0.3, 0.6)])
def test_images_and_masks_are_cropped_and_flipped_alike(crop_scale):
    prepare = PixelPreparation(32, *STATISTICS, crop_scale=crop_scale)
    masks = (torch.arange(64) // 8 % 2).repeat(16, 64, 1).to(torch.uint8)  # vertical stripes of 8 pixels
    masks = masks ^ (torch.arange(64) // 16 % 2).view(1, 64, 1).to(torch.uint8)
    images = torch.stack([masks * 2.0 - 20, masks * 4.0 - 10], 1)
    x, cropped = prepare(images, masks, torch.arange(16), epoch=3)
    assert x.shape == (16, 2, 32, 32) and cropped.shape == (16, 32, 32) and cropped.dtype == torch.uint8
    assert ((x[:, 0] > 0.5) == (cropped == 1)).float().mean() > (0.999 if crop_scale is None else 0.93)
    assert len({tuple(mask.flatten().tolist()) for mask in cropped}) > 8
    again, _ = prepare(images[5:7], masks[5:7], torch.arange(5, 7), epoch=3)
    assert torch.equal(again, x[5:7])


def test_small_images_are_padded_and_whole_ones_keep_their_size():
    prepare = PixelPreparation(64, *STATISTICS)
    images = torch.full((2, 2, 40, 48), -18.0)
    images[0, 0, 0, 0] = torch.nan
    x, masks = prepare(images, torch.ones(2, 40, 48, dtype=torch.uint8), torch.arange(2), epoch=0)
    assert x.shape == (2, 2, 64, 64) and int((masks == 1).sum()) == 2 * 40 * 48 and int((masks == IGNORED).sum()) > 0
    assert x[:, 0][masks == IGNORED].abs().max() == 0  # the mean
    plain, none = prepare(images)
    assert plain.shape == images.shape and none is None and plain[0, 0, 0, 0] == 0 and plain[1, 0, 0, 0] == 1
    assert int(prepare.filled) == 1  # in training, and without the padding


def test_the_loss_counts_only_labelled_pixels():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.randint(0, 3, (2, 4, 4)).to(torch.uint8)
    masks[0, :2] = IGNORED
    expected = [
        -logits.log_softmax(1)[b, int(masks[b, r, c]), r, c]
        for b in range(2)
        for r in range(4)
        for c in range(4)
        if masks[b, r, c] != IGNORED
    ]
    torch.testing.assert_close(pixel_loss(logits, masks, None, IGNORED), torch.stack(expected).mean())
    nothing = pixel_loss(logits, torch.full_like(masks, IGNORED), 1.0, IGNORED)
    nothing.backward()
    assert nothing == 0 and logits.grad.abs().max() == 0


def test_the_dice_loss_by_hand():
    logits = torch.log(torch.tensor([[0.8, 0.4], [0.2, 0.6]])).view(1, 2, 1, 2)
    masks = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    dice = 1 - (2 * 0.8 / (1.2 + 1) + 2 * 0.6 / (0.8 + 1)) / 2
    cross_entropy = -(math.log(0.8) + math.log(0.6)) / 2
    assert pixel_loss(logits, masks, 2.0, IGNORED).item() == pytest.approx(cross_entropy + 2 * dice, rel=1e-5)
    one_class = pixel_loss(logits, torch.zeros_like(masks), 1.0, IGNORED) - pixel_loss(logits, masks * 0, None, IGNORED)
    assert one_class.item() == pytest.approx(1 - 2 * 1.2 / (1.2 + 2), rel=1e-5)  # classes without a pixel are left out


class Threshold(nn.Module):
    """Water where standardised VV is below 0; stateless, so that windows do not matter."""

    def forward(self, x):
        return torch.stack([x[:, 1], -x[:, 1]], 1)


def split(count=5, side=40):
    generator = np.random.default_rng(1)
    images = torch.from_numpy(generator.normal(-10, 4, (count, 2, side, side)).astype(np.float32))
    masks = torch.from_numpy(generator.choice([0, 1, IGNORED], (count, side, side), p=[0.5, 0.3, 0.2]).astype(np.uint8))
    batches = [torch.arange(count)[i : i + 2] for i in range(0, count, 2)]
    return images, masks, [(ids, [images[ids]], masks[ids]) for ids in batches]


def test_the_comparison_counts_every_pixel_once():
    images, masks, loader = split()
    model, prepare = Threshold().train(), PixelPreparation(32, *STATISTICS)
    confusion, ignored, losses = score(model, prepare, loader, ALONE, "off", Windows(32, 0.25, 4))
    assert model.training and confusion.shape == (5, 2, 2) and losses.dtype == torch.float64
    water = images[:, 1] < -10
    for k in range(5):
        expected = [[int(((masks[k] == i) & (water[k] == j)).sum()) for j in (0, 1)] for i in (0, 1)]
        assert confusion[k].tolist() == expected and int(ignored[k]) == int((masks[k] == IGNORED).sum())
    x = (images[:, 1].double() + 10) / 4
    right = torch.where(masks == 1, -x, x)
    nll = torch.log1p(torch.exp(-2 * right))[masks != IGNORED].sum()
    assert losses.sum().item() == pytest.approx(nll.item(), rel=1e-5)


def test_outputs_that_are_not_finite_are_an_error():
    _, _, loader = split()
    prepare = PixelPreparation(32, (-20.0, -10.0), (2.0, 1e-38))
    with pytest.raises(TrainingError, match="not finite"):
        score(Threshold(), prepare, loader, ALONE, "off", Windows(32))
