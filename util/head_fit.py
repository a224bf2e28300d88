# SPDX-License-Identifier: MIT
"""A linear head fitted to features in closed form."""

import torch

RIDGE = 4.0  # penalty, as a share of the number of samples: of the order of the shares of standardised features


def fit_head(features, labels, num_classes):
    """Ridge regression of one-hot labels on standardised features: (weight (K, C), bias (K,)), both float32.

        minimise  Σₙ ‖W′·zₙ + b − yₙ‖² + RIDGE·N·‖W′‖²,    z = (x − mean) / std,    y one-hot

    so that logits = weight·x + bias take x as it is. The bias is not penalised: a mean feature gives the shares of the
    classes. Differences of the logits stay below about 1, so that training is not saturated where it starts. A feature
    that is the same for all samples gets the weight 0. features: (N, C), finite. labels: (N,) int64, below
    num_classes. Computed in float64 on the CPU, so that all ranks find the same. Raises ValueError for no samples.
    """
    if not len(features):
        raise ValueError("no samples to fit a head to")
    x = features.double().cpu()
    y = torch.nn.functional.one_hot(labels.cpu(), num_classes).double()
    mean, std = x.mean(0), x.std(0, correction=0)
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0.0)
    z = (x - mean) * scale
    penalty = RIDGE * len(x) * torch.eye(z.shape[1], dtype=z.dtype)
    weight = torch.linalg.solve(z.T @ z + penalty, z.T @ (y - y.mean(0))).T * scale  # (K, C)
    return weight.float(), (y.mean(0) - weight @ mean).float()
