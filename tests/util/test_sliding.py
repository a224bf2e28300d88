# SPDX-License-Identifier: MIT
"""Windows over large images: that the blend of a pixel-wise model is the model, seams, batches, and no data."""

import numpy as np
import pytest
import torch

from common.errors import UsageError
from util.sliding import Windows, blended, blended_rows


def pixelwise(images):
    """Two classes that depend on the pixel alone; 0.5 where it has no data."""
    water = torch.sigmoid(torch.nan_to_num(images[:, 1] + 12, nan=0.0))
    return torch.stack([water, 1 - water], 1)


def off_at_the_edges(images):
    """A pixel-wise model that is wrong towards the edges of its window."""
    size = images.shape[-1]
    near = torch.minimum(torch.arange(size), torch.arange(size).flip(0)).float()
    fault = 0.5 * torch.exp(-torch.minimum(near[:, None], near) / 4)
    water = pixelwise(images)[:, 0] * (1 - fault)
    return torch.stack([water, 1 - water], 1)


def scene(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(-12, 3, (2, height, width)).astype(np.float32))


@pytest.mark.parametrize("overlap", (0, 0.25, 0.5, 0.75))
@pytest.mark.parametrize("shape", ((16, 16), (5, 7), (40, 9), (9, 40), (48, 64), (37, 61), (17, 16)))
def test_a_pixelwise_model_gives_itself(shape, overlap):
    image, windows = scene(*shape), Windows(16, overlap, batch=3)
    found = blended(image, pixelwise, windows)
    torch.testing.assert_close(found, pixelwise(image[None])[0], atol=1e-6, rtol=0)


def test_each_row_is_read_once_and_each_batch_is_full_but_the_last_of_a_strip():
    image, read_rows, batches = scene(50, 70), [], []

    def read(row, column, height, width):
        read_rows.extend(range(row, row + height))
        return image[:, row : row + height, column : column + width].numpy()

    def predict(images):
        assert images.dtype == torch.float32 and images.shape[1:] == (2, 16, 16)
        batches.append(len(images))
        return pixelwise(images)

    windows = Windows(16, 0.25, batch=4)
    strips = list(blended_rows(read, 50, 70, predict, windows))
    assert windows.starts(70) == [0, 12, 24, 36, 48, 54] and windows.starts(50) == [0, 12, 24, 34]
    assert read_rows == list(range(50)) and batches == [4, 2] * 4
    assert [row for row, _ in strips] == [0, 12, 24, 34]
    assert [part.shape for _, part in strips] == [(2, 12, 70), (2, 12, 70), (2, 10, 70), (2, 16, 70)]


def test_windows_without_data_are_not_predicted_and_are_nan():
    image, predicted = scene(48, 48), []
    image[:, :20] = torch.nan
    image[0, 20:, :16] = torch.nan  # VV alone
    image[:, 32:, 32:] = torch.nan

    def predict(images):
        predicted.extend(torch.isfinite(images).flatten(1).any(1).tolist())
        return pixelwise(images)

    found = blended(image, predict, Windows(16, 0, batch=2))
    assert predicted.count(True) == 6  # one of them asks how many classes there are
    expected = pixelwise(image[None])[0]
    expected[:, :16] = expected[:, 32:, 32:] = torch.nan
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, equal_nan=True)
    assert torch.isnan(blended(torch.full((2, 5, 40), torch.nan), predict, Windows(16))).all()


def jump(result, places):
    """The mean step across these columns, relative to that between other neighbours."""
    steps = result[0].diff(dim=1).abs().mean(0)
    at = torch.zeros(len(steps), dtype=torch.bool)
    at[[place - 1 for place in places]] = True
    return (steps[at].mean() / steps[~at].mean()).item()


def test_blending_removes_seams():
    image = torch.full((2, 128, 128), -12.0)
    seams = {}
    for overlap in (0, 0.5):
        windows = Windows(32, overlap)
        starts = windows.starts(128)
        edges = sorted({*starts[1:], *(start + 32 for start in starts[:-1])})
        inner = [edge for edge in edges if 8 < edge < 120]
        result = blended(image, off_at_the_edges, windows)
        seams[overlap] = (result[0, 32:96, 32:96].amax() - result[0, 32:96, 32:96].amin()).item(), jump(result, inner)
    assert seams[0.5][0] < seams[0][0] / 2 and seams[0.5][1] < 2, seams
    # Where it matters, in the middle between two edges, the model that is right there has most of the weight.
    assert blended(image, off_at_the_edges, Windows(32, 0.5))[0, 64, 64] > 0.45


def test_weights_of_neighbours_add_up_to_one():
    for overlap in (0, 0.25, 0.5):
        windows = Windows(16, overlap)
        weights = windows.weights()
        assert weights.min() > 0 and weights.max() <= 1 and weights.tolist() == weights.flip(0).tolist()
        shared = 16 - windows.step
        torch.testing.assert_close(weights[:shared] + weights[16 - shared :], torch.ones(shared))


def test_windows_that_cannot_be_meant_are_refused():
    for values, said in (((16, 0.8), "overlap 0.8"), ((16, -0.1), "overlap -0.1"), ((0,), "size 0"), ((8, 0, 0), "0")):
        with pytest.raises(UsageError, match=said):
            Windows(*values)
