# SPDX-License-Identifier: MIT
"""Random resized crops: what they show, what they depend on, how they are distributed."""

import pytest
import torch
import torch.nn.functional as F

from util.crop import RATIO, draw_crops, random_crop, random_resized_crop

IDS = torch.arange(100, 108)


def images(side=120):
    return torch.randn(len(IDS), 2, side, side, generator=torch.Generator().manual_seed(0))


def test_a_crop_of_everything_is_the_bilinear_resizing():
    whole = F.interpolate(images(), size=(128, 128), mode="bilinear", align_corners=False)
    torch.testing.assert_close(random_resized_crop(images(), 128, 0, 0, IDS, (1, 1)), whole, rtol=1e-4, atol=1e-4)


def test_a_crop_shows_the_part_that_was_drawn():
    """Of images whose channels are the column and the row; unequal, so that exchanged axes are found."""
    row, column = torch.meshgrid(torch.arange(120.0), torch.arange(120.0), indexing="ij")
    crops = random_resized_crop(torch.stack([column, row]).expand(len(IDS), -1, -1, -1), 128, 3, 2, IDS)
    for crop, left, top, width, height in zip(crops, *draw_crops(3, 2, IDS)):
        place = (torch.arange(128) + 0.5) / 128
        for line, start, share in ((crop[0, 7], left, width), (crop[1, :, 9], top, height)):
            expected = (120 * (start + share * place) - 0.5).clamp(0, 119)
            torch.testing.assert_close(line, expected, rtol=0, atol=1e-3)


def test_a_crop_depends_on_seed_epoch_and_id_alone():
    crops, order = random_resized_crop(images(), 128, 3, 2, IDS), torch.tensor([5, 2, 7])
    assert torch.equal(random_resized_crop(images()[order], 128, 3, 2, IDS[order]), crops[order])
    for seed, epoch, ids in ((4, 2, IDS), (3, 3, IDS), (3, 2, IDS + 1)):
        assert not torch.equal(random_resized_crop(images(), 128, seed, epoch, ids), crops)


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.9, 1.0), (0.3, 0.3)])
def test_areas_are_uniform_and_crops_lie_within_the_image(scale):
    left, top, width, height = draw_crops(0, 0, torch.arange(40_000), scale)
    area, ratio = width * height, width / height
    assert scale[0] - 1e-5 <= area.min() and area.max() <= scale[1] + 1e-5
    assert area.mean() == pytest.approx(sum(scale) / 2, abs=0.005)
    assert area.std() == pytest.approx((scale[1] - scale[0]) / 12**0.5, abs=0.005)
    assert RATIO[0] - 1e-5 <= ratio.min() and ratio.max() <= RATIO[1] + 1e-5
    assert ratio.log().mean() == pytest.approx(0, abs=0.005)
    for start, share in ((left, width), (top, height)):
        assert start.min() >= 0 and (start + share).max() <= 1 + 1e-6
        assert (start - (1 - share) / 2).mean() == pytest.approx(0, abs=0.005)  # as often left as right of the middle
    assert (
        torch.corrcoef(torch.stack([area, ratio, left - (1 - width) / 2, top - (1 - height) / 2])).triu(1).abs().max()
        < 0.03
    )


def test_shrinking_averages():
    checkerboard = torch.tensor([[0.0, 10.0], [10.0, 0.0]]).repeat(128, 128).expand(len(IDS), 2, -1, -1)
    assert random_resized_crop(checkerboard, 32, 0, 0, IDS, (1, 1)).std() < 0.01


def test_pixels_are_cropped_as_they_are_and_masks_with_them():
    coded = torch.arange(120 * 90.0).view(1, 1, 120, 90).expand(len(IDS), -1, -1, -1)  # row · 90 + column
    crops = random_crop(coded, 64, 3, 2, IDS)
    assert crops.shape == (len(IDS), 1, 64, 64)
    corner = crops[:, :, :1, :1]
    expected = corner + 90 * torch.arange(64.0).view(1, 1, 64, 1) + torch.arange(64.0).view(1, 1, 1, 64)
    assert torch.equal(crops, expected) and len(corner.unique()) == len(IDS)
    assert torch.equal(random_crop(coded.int(), 64, 3, 2, IDS), crops.int())
    order = torch.tensor([5, 2, 7])
    assert torch.equal(random_crop(coded[order], 64, 3, 2, IDS[order]), crops[order])
    assert torch.equal(random_crop(coded, 90, 0, 0, IDS)[:, :, :, 0] % 90, torch.zeros(len(IDS), 1, 90))


def test_places_of_crops_are_uniform():
    corners = random_crop(torch.arange(9.0).view(1, 1, 3, 3).expand(9000, -1, -1, -1), 1, 0, 0, torch.arange(9000))
    assert (corners.long().flatten().bincount() - 1000).abs().max() < 150


def test_masks_are_cropped_as_images_and_keep_their_values():
    """The image says to which column and row a pixel of the mask belongs."""
    row, column = torch.meshgrid(torch.arange(120.0), torch.arange(120.0), indexing="ij")
    how = 64, 3, 2, IDS, (0.2, 0.4)
    image = random_resized_crop(torch.stack([column, row]).expand(len(IDS), -1, -1, -1), *how)
    code = (row * 120 + column).expand(len(IDS), 1, -1, -1)
    mask = random_resized_crop(code, *how, mode="nearest")[:, 0]
    assert torch.equal(mask, mask.round())
    assert (image[:, 0] - mask % 120).abs().max() <= 0.51 and (image[:, 1] - mask // 120).abs().max() <= 0.51
