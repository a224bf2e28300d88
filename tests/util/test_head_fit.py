# SPDX-License-Identifier: MIT
"""A head fitted to features: what it minimises, and what it does not depend on."""

import pytest
import torch

from util.head_fit import RIDGE, fit_head


@pytest.fixture
def samples():
    """(features (60, 5), labels (60,)): three classes that the first two features separate in part."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.rand(60, 5, generator=generator)
    features[:, 0] += labels == 1
    features[:, 1] += labels == 2
    return features, labels


def logits(features, labels):
    weight, bias = fit_head(features, labels, 3)
    assert (weight.dtype, bias.dtype) == (torch.float32, torch.float32)
    assert (weight.shape, bias.shape) == ((3, features.shape[1]), (3,))
    return features @ weight.T + bias


def test_it_minimises_the_penalised_squares(samples):
    features, labels = samples
    x, y = features.double(), torch.eye(3, dtype=torch.float64)[labels]
    z = (x - x.mean(0)) / x.std(0, correction=0)
    rows = torch.cat([torch.cat([z, torch.ones(60, 1)], 1), (RIDGE * 60) ** 0.5 * torch.eye(5, 6)])
    solution = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(5, 3)])).solution
    expected = torch.cat([z, torch.ones(60, 1)], 1) @ solution
    torch.testing.assert_close(logits(features, labels), expected.float(), atol=1e-5, rtol=0)


def test_scales_and_offsets_of_features_do_not_matter(samples):
    features, labels = samples
    moved = features * torch.tensor([1e-3, 1, 10, 100, 1]) + torch.tensor([0, 5, -3, 1, 0])
    torch.testing.assert_close(logits(moved, labels), logits(features, labels), atol=1e-4, rtol=0)


def test_logits_tell_classes_and_have_their_shares_in_the_mean(samples):
    features, labels = samples
    found = logits(features, labels)
    assert (found.argmax(1) == labels).float().mean() > 0.8
    torch.testing.assert_close(logits(features[:50], labels[:50]).mean(0), labels[:50].bincount() / 50)


def test_a_constant_feature_has_no_weight(samples):
    features, labels = samples
    features[:, 3] = 7
    weight, _ = fit_head(features, labels, 3)
    assert weight[:, 3].tolist() == [0, 0, 0] and weight[:, 0].abs().min() > 0
    assert fit_head(torch.ones(4, 2), torch.tensor([0, 0, 0, 1]), 2)[1].tolist() == [0.75, 0.25]


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        fit_head(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2)
