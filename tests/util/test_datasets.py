# SPDX-License-Identifier: MIT
"""From flags to a dataset and its loader."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch

from common.errors import UsageError
from sarwmix.registry import DATASETS
from tests.helpers.dataset_fixtures import write_v2
from tests.helpers.stores import loader_flags
from util.datasets import (
    ImagesWithIds,
    SamplesWithIds,
    build_dataset,
    build_loader,
    build_test_loader,
    high_contrast_ids,
    log_resizing,
)
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


def flags(**changes):
    return loader_flags(**{"split": "all", "batch_size": 2, "seed": 0, **changes})


def test_a_dataset_is_opened_by_its_name(tmp_path):
    assert type(build_dataset(flags(data_path=write_v2(tmp_path)))) is DATASETS["benv2"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_each_image_with_its_own_id(workers):
    loader = build_loader(
        ImagesWithIds(Steps(0, 0, 0, 0, 0)), flags(num_workers=workers), Ranks(Launch(), torch.device("cpu"))
    )
    batches = list(loader)
    assert len(batches) == 2
    for ids, images in batches:
        assert ids.dtype == torch.int64 and torch.equal(images[:, 0, 0, 0], ids.float())
    assert [ids.tolist() for ids, _ in batches] == list(loader.batch_sampler)


@pytest.mark.parametrize(
    "samples, accum_iter, world_size, remedy",
    [
        (47, 2, 1, "--batch_size 22 is the largest that fits"),
        (47, 32, 1, "--batch_size 46 and --accum_iter 1 is the largest that fits"),
        (47, 1, 8, "--batch_size 4 is the largest that fits"),
        (5, 1, 8, "start at most 2 ranks, with --batch_size 2 and --accum_iter 1"),
        (1, 1, 1, "at least two samples are needed"),
    ],
)
def test_a_batch_larger_than_the_data_names_what_fits(samples, accum_iter, world_size, remedy):
    ranks = Ranks(Launch("torchrun", 0, world_size, 0, world_size), torch.device("cpu"))
    with pytest.raises(UsageError) as error:
        build_loader(ImagesWithIds(Steps(*[0] * samples)), flags(batch_size=64, accum_iter=accum_iter), ranks)
    assert str(error.value).startswith(f"--batch_size 64: the {samples} samples of split 'all'")
    assert f"; {remedy}, or give" in str(error.value)
    fitting = re.match("--batch_size (\\d+)(?: and --accum_iter (\\d+))? is", remedy)
    if fitting:
        args = flags(batch_size=int(fitting[1]), accum_iter=int(fitting[2] or accum_iter))
        assert build_loader(ImagesWithIds(Steps(*[0] * samples)), args, ranks).batch_sampler.steps == 1


class Pairs(Steps):
    """Two images per sample, and its number as label."""

    def __getitem__(self, i):
        return self.image(i), -self.image(i), torch.tensor(i)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_test_loader_gives_each_sample_once_in_the_same_batches(world_size):
    seen = {}
    for rank in range(world_size):
        ranks = Ranks(Launch("torchrun", rank, world_size, rank, world_size), torch.device("cpu"))
        for ids, images, labels in build_test_loader(Pairs(0, 0, 0, 0, 0, 0, 0), flags(batch_size=3), ranks):
            assert torch.equal(ids, labels) and torch.equal(images[0], -images[1])
            seen[tuple(ids.tolist())] = rank
    assert sorted(seen) == [(0, 1, 2), (3, 4, 5), (6,)] and set(seen.values()) == set(range(world_size))
    alone = [
        len(
            build_test_loader(
                Pairs(0, 0), flags(), Ranks(Launch("torchrun", rank, 2, rank, 2), torch.device("cpu")), spread=False
            )
        )
        for rank in (0, 1)
    ]
    assert alone == [1, 0]


def test_samples_of_one_image_and_of_two_have_one_form(tmp_path):
    number, images, label = SamplesWithIds(Pairs(0, 0))[1]
    assert number == 1 and len(images) == 2 and label == 1
    number, images, label = SamplesWithIds(build_dataset(flags(data_path=write_v2(tmp_path))))[2]
    assert number == 2 and len(images) == 1 and images[0].shape == (2, 120, 120) and label.shape == (19,)


def test_pictures_show_samples_of_high_contrast_and_an_even_number_of_them():
    assert high_contrast_ids(Steps(0, 5, 1, 9, 2), 2) == [1, 3]
    assert high_contrast_ids(Steps(0, 5, 1), 4) == [0, 1, 2, 2]
    assert high_contrast_ids(Steps(7), 4) == [0, 0]


@pytest.mark.parametrize(
    "side, task, level",
    [
        (96, "multiclass", "INFO"),
        (512, "multilabel", "INFO"),
        (513, "multiclass", "WARNING"),
        (128, "multiclass", None),
        (None, "multiclass", None),
        (512, "segmentation", None),
        (512, "flood", None),
    ],
)
def test_images_that_are_resized_are_reported(caplog, side, task, level):
    caplog.set_level(logging.INFO)
    log_resizing(SimpleNamespace(size=side, task=task), 128)
    if level is None:
        assert not caplog.records
        return
    (record,) = caplog.records
    text = f"images of {side}×{side} pixels are resized to the input of 128×128"
    assert record.levelname == level and record.getMessage().startswith(text)
    assert ("sarwmix.tile" in record.getMessage()) == (level == "WARNING")
