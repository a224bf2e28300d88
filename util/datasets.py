# SPDX-License-Identifier: MIT
"""From `--dataset` to a dataset and its loader. The one place of `util` that knows `sarwmix`."""
import logging
import os
import signal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.sen12flood_loader import FloodDataset
from util.errors import UsageError
from util.sampling import InOrderSampler, MicroBatchSampler

log = logging.getLogger(__name__)

DATASETS = {"benv1": BigEarthNetv1, "benv2": BigEarthNetv2, "sen12flood": FloodDataset}
SPLITS = ("train", "val", "test", "train_val", "all")


def add_data_flags(parser):
    """Flags of the data: where it lies and its statistics. A program adds --dataset and --split to the group returned."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", metavar="DIR",
                       help="benv2: the folder that holds BigEarthNet-S1; benv1: the folder of patch folders, or a Zarr store; "
                            "sen12flood: the folder of train/ and test/ with pair files, or of images/ and pairs_*.csv")
    group.add_argument("--metadata", nargs="+", metavar="FILE",
                       help="benv2: metadata.parquet or CSV dumps of it; benv1: split lists; sen12flood: lists of folders "
                            "(default: what lies in data_path)")
    group.add_argument("--id_col", type=int, metavar="N", help="0-based column of the S1 id in a CSV without a header for it")
    group.add_argument("--mean", type=float, nargs=2, metavar=("VH", "VV"), help="mean in dB (default: the dataset's)")
    group.add_argument("--std", type=float, nargs=2, metavar=("VH", "VV"),
                       help="standard deviation in dB (default: the dataset's; for benv1 those of the released checkpoints)")
    group.add_argument("--max_nonfinite", type=float, default=0.01, metavar="SHARE",
                       help="share of NaN, infinite or no-data pixels above which a patch is an error")
    group.add_argument("--check_files", choices=("all", "none"), default="all",
                       help="look for every file before training starts")
    return group


def fill_statistics(args):
    """Mean and standard deviation of `--dataset` where neither a flag nor a checkpoint gave them."""
    kind = DATASETS[args.dataset]
    args.mean = list(args.mean or kind.MEAN)
    args.std = list(args.std or kind.STD)


def build_dataset(args, split=None, metadata=None, supervised=False):
    """A part of the dataset of `--dataset`: `--split` and `--metadata`, unless others are given.

    supervised: samples without a label are left out. Raises DataError for data that cannot be used.
    """
    kind = DATASETS[args.dataset]
    options = {"split": split or args.split, "metadata": metadata or args.metadata, "max_nonfinite": args.max_nonfinite}
    if kind is FloodDataset:
        return kind(args.data_path, val_fraction=args.val_fraction, seed=args.draw_seed, **options)
    if kind is BigEarthNetv1:
        options["keep_unlabelled"] = not supervised
    return kind(args.data_path, id_col=args.id_col, **options)


def check_data(dataset, args, ranks):
    """Look for every file, and at some values. Returns what a run records about the data. Raises DataError."""
    if args.check_files == "all":
        ranks.together(lambda: dataset.check_files(ranks.rank, ranks.world_size))
    return {**dataset.describe(), "first_look": ranks.on_main(dataset.check_units)}


class ImagesWithIds(Dataset):
    """(id, image) of a dataset: flips are drawn from the id, and labels are not read."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return i, self.dataset.image(i)


class SamplesWithIds(Dataset):
    """(id, images, label) of a dataset, images being a tuple: one image, or the two of a pair."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        *images, label = self.dataset[i]
        return i, tuple(images), label


def telling_ids(dataset, count, among=64):
    """Ids of samples worth looking at: those with the most contrast between their parts.

    Of `among` samples spread evenly over the dataset, the `count` with the largest variance of 30×30-pixel means, in the
    dataset's order. Many patches are all forest or all sea, and a picture of them tells little. Always an even number,
    as the model takes pairs: if fewer than `count` are there and they are odd, the last one stands there twice.
    """
    spread = np.unique(np.linspace(0, len(dataset) - 1, max(among, count)).round().astype(int))
    contrast = [F.avg_pool2d(dataset.image(i).nan_to_num(), 30).var((1, 2)).sum().item() for i in spread]
    ids = sorted(spread[np.argsort(contrast)[::-1][:count]].tolist())
    return ids + ids[-1:] * (len(ids) % 2)


def build_loader(samples, args, ranks):
    """A loader of this rank's micro-batches in training. samples: ImagesWithIds or SamplesWithIds.

    Raises UsageError if the dataset does not fill one global batch.
    """
    sampler = MicroBatchSampler(len(samples), args.batch_size, args.accum_iter, ranks.rank, ranks.world_size, args.seed)
    if sampler.steps == 0:
        raise UsageError(f"--batch_size {args.batch_size}: the {len(samples)} samples of split '{args.split}' do not fill one "
                         f"global batch of {args.batch_size} × {args.accum_iter} micro-batches × {ranks.world_size} ranks")
    return _loader(samples, sampler, args, ranks, persistent=True)


def build_test_loader(dataset, args, ranks, spread=True):
    """A loader of (ids, images, labels) in the order of the dataset, every sample once; spread over ranks, or all on rank 0."""
    if spread:
        sampler = InOrderSampler(len(dataset), args.batch_size, ranks.rank, ranks.world_size)
    else:
        sampler = InOrderSampler(len(dataset) if ranks.is_main else 0, args.batch_size)
    return _loader(SamplesWithIds(dataset), sampler, args, ranks, persistent=False)


def _loader(samples, sampler, args, ranks, persistent):
    workers = args.num_workers
    if workers is None:
        workers = min(10, len(os.sched_getaffinity(0)) // ranks.launch.local_size)
    return DataLoader(samples, batch_sampler=sampler, num_workers=workers, pin_memory=args.pin_mem and ranks.device.type == "cuda",
                      persistent_workers=persistent and workers > 0, worker_init_fn=_start_worker)


def _start_worker(_):
    """One thread, and no say in how the program ends: signals are the main process's to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
