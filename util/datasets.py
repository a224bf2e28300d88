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
from util.errors import UsageError
from util.sampling import MicroBatchSampler

log = logging.getLogger(__name__)

DATASETS = {"benv1": BigEarthNetv1, "benv2": BigEarthNetv2}
SPLITS = ("train", "val", "test", "train_val", "all")


def add_data_flags(parser, *, split):
    """Flags of the data: where it lies, which part, and its statistics."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=tuple(DATASETS), default="benv2", help="BigEarthNet v1 or v2")
    group.add_argument("--data_path", metavar="DIR", help="benv2: the folder that holds BigEarthNet-S1; benv1: the folder of "
                                                          "patch folders, or a Zarr store")
    group.add_argument("--metadata", nargs="+", metavar="FILE",
                       help="benv2: metadata.parquet or CSV dumps of it; benv1: split lists (default: those in data_path)")
    group.add_argument("--split", choices=SPLITS, default=split, help="part of the data to use")
    group.add_argument("--id_col", type=int, metavar="N", help="0-based column of the S1 id in a CSV without a header for it")
    group.add_argument("--mean", type=float, nargs=2, metavar=("VH", "VV"), help="mean in dB (default: the dataset's)")
    group.add_argument("--std", type=float, nargs=2, metavar=("VH", "VV"),
                       help="standard deviation in dB (default: the dataset's; for benv1 those of the released checkpoints)")
    group.add_argument("--max_nonfinite", type=float, default=0.01, metavar="SHARE",
                       help="share of NaN, infinite or no-data pixels above which a patch is an error")
    group.add_argument("--check_files", choices=("all", "none"), default="all",
                       help="look for every file before training starts")
    return group


def build_dataset(args):
    """The dataset of `--dataset`, with `--mean` and `--std` filled in from it where they were not given.

    Raises DataError for data that cannot be used.
    """
    kind = DATASETS[args.dataset]
    args.mean = list(args.mean or kind.MEAN)
    args.std = list(args.std or kind.STD)
    return kind(args.data_path, split=args.split, metadata=args.metadata, id_col=args.id_col, max_nonfinite=args.max_nonfinite)


class ImagesWithIds(Dataset):
    """(id, image) of a dataset: flips are drawn from the id, and labels are not read."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return i, self.dataset.image(i)


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


def build_loader(dataset, args, ranks):
    """A loader of (ids (B,), dB images (B, 2, h, w)) micro-batches for this rank.

    Raises UsageError if the dataset does not fill one global batch.
    """
    sampler = MicroBatchSampler(len(dataset), args.batch_size, args.accum_iter, ranks.rank, ranks.world_size, args.seed)
    if sampler.steps == 0:
        raise UsageError(f"--batch_size {args.batch_size}: the {len(dataset)} samples of split '{args.split}' do not fill one "
                         f"global batch of {args.batch_size} × {args.accum_iter} micro-batches × {ranks.world_size} ranks")
    workers = args.num_workers
    if workers is None:
        workers = min(10, len(os.sched_getaffinity(0)) // ranks.launch.local_size)
    return DataLoader(ImagesWithIds(dataset), batch_sampler=sampler, num_workers=workers,
                      pin_memory=args.pin_mem and ranks.device.type == "cuda",
                      persistent_workers=workers > 0, worker_init_fn=_start_worker)


def _start_worker(_):
    """One thread, and no say in how the program ends: signals are the main process's to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
