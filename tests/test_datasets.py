# SPDX-License-Identifier: MIT
"""From flags to a dataset and its loader."""
from types import SimpleNamespace

import pytest
import torch

from dataset_fixtures import write_v2
from util.datasets import DATASETS, build_dataset, build_loader, telling_ids
from util.distributed import Launch, Ranks


class Steps:
    """Images with a step whose height is given, and their number as value."""

    def __init__(self, *heights):
        self.heights = heights

    def __len__(self):
        return len(self.heights)

    def image(self, i):
        image = torch.full((2, 120, 120), float(i))
        image[:, :, 60:] += self.heights[i]
        return image


def flags(**kwargs):
    return SimpleNamespace(**{**dict(dataset="benv2", data_path=None, split="all", metadata=None, id_col=None, max_nonfinite=0.01,
                                     mean=None, std=None, batch_size=2, accum_iter=1, seed=0, num_workers=0, pin_mem=True), **kwargs})


def test_statistics_come_from_the_dataset_unless_given(tmp_path):
    root = write_v2(tmp_path)
    args = flags(data_path=root)
    assert type(build_dataset(args)) is DATASETS["benv2"] and args.std == [5.4501, 5.0019]
    args = flags(data_path=root, mean=[-1.0, -2.0])
    build_dataset(args)
    assert args.mean == [-1.0, -2.0] and args.std == [5.4501, 5.0019]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_each_image_with_its_own_id(workers):
    loader = build_loader(Steps(0, 0, 0, 0, 0), flags(num_workers=workers), Ranks(Launch(), torch.device("cpu")))
    batches = list(loader)
    assert len(batches) == 2
    for ids, images in batches:
        assert ids.dtype == torch.int64 and torch.equal(images[:, 0, 0, 0], ids.float())
    assert [ids.tolist() for ids, _ in batches] == list(loader.batch_sampler)


def test_telling_samples_are_those_with_contrast_and_even_in_number():
    assert telling_ids(Steps(0, 5, 1, 9, 2), 2) == [1, 3]
    assert telling_ids(Steps(0, 5, 1), 4) == [0, 1, 2, 2]
    assert telling_ids(Steps(7), 4) == [0, 0]
