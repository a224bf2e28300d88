# SPDX-License-Identifier: MIT
"""From `--dataset` to a dataset and its loader. The one place of `util` that knows `sarwmix`."""
import ctypes
import logging
import os
import signal
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from sarwmix.catalogue import DATASETS, add_source_flags, is_simulated, open_dataset
from sarwmix.errors import DataError
from sarwmix.files import read_json
from sarwmix.packed import PackedDataset
from sarwmix.sen12flood_loader import FloodDataset
from util.errors import UsageError
from util.feeding import CHANNELS, STATISTICS, UNITS, agree, facts_of, shown
from util.sampling import InOrderSampler, MicroBatchSampler
from util.soundness import are_statistics
from util.streaming import BatchStream

PR_SET_PDEATHSIG = 1      # prctl(2): the signal that a process gets when its parent ends

log = logging.getLogger(__name__)


def add_data_flags(parser):
    """Flags of the data: where it lies and its statistics. A program adds --dataset and --split to the group returned."""
    group = parser.add_argument_group("data")
    add_source_flags(group)
    group.add_argument("--data_cache", choices=("none", "ram", "device"), default="none",
                       help="keep a packed store's images in the memory of each rank, or on its GPU, instead of reading them from disk")
    group.add_argument("--mean", type=float, nargs=2, metavar=("VH", "VV"),
                       help="mean in dB (default: that of the checkpoint it starts from, else the dataset's)")
    group.add_argument("--std", type=float, nargs=2, metavar=("VH", "VV"),
                       help="standard deviation in dB (default: as for --mean; for benv1 and sen12flood that of the released checkpoints)")
    group.add_argument("--statistics", metavar="FILE",
                       help="take mean and standard deviation from what sarwmix.statistics --out wrote, or from the statistics.json of a "
                            "packed store (its split train)")
    group.add_argument("--check_files", choices=("all", "none"), default="all",
                       help="look for every file before training starts")
    return group


def take_statistics(args):
    """Put what the file of --statistics says into args.mean and args.std. Raises UsageError."""
    if not args.statistics:
        return
    if args.mean or args.std:
        raise UsageError("--statistics contradicts --mean and --std: both say how to standardise; leave one out")
    remedy = "give what python -m sarwmix.statistics --out FILE wrote"
    try:
        content = read_json(args.statistics, remedy)
    except DataError as error:
        raise UsageError(f"--statistics {error}") from None
    if isinstance(content, dict) and "mean" not in content and isinstance(content.get("train"), dict):      # of a packed store
        content = {"units": UNITS, "channels": CHANNELS, **content["train"]}
    if not isinstance(content, dict) or not are_statistics(content.get("mean")) or not are_statistics(content.get("std"), above=0):
        raise UsageError(f"--statistics {args.statistics}: has no mean and std of two channels; {remedy}")
    if content.get("units") != UNITS or content.get("channels") != CHANNELS:
        raise UsageError(f"--statistics {args.statistics}: is of channels {content.get('channels')} in {content.get('units')}, but "
                         f"{', '.join(CHANNELS)} in {UNITS} are fed; {remedy}")
    args.mean, args.std = ([round(float(value), 4) for value in content[name]] for name in STATISTICS)


def fill_statistics(args):
    """Mean and standard deviation of `--dataset` where neither a flag nor a checkpoint gave them."""
    kind = DATASETS[args.dataset]
    args.mean = list(args.mean or kind.MEAN)
    args.std = list(args.std or kind.STD)


def log_statistics(args, checkpoint=None):
    """One line that says with which mean and standard deviation images are standardised, and where these are from.

    checkpoint: (path, state) of the one that may have said them.
    """
    path, facts = (None, {}) if checkpoint is None else (checkpoint[0], facts_of(checkpoint[1]))

    def source(name):
        value = getattr(args, name)
        if args.statistics:
            return f"--statistics {args.statistics}"
        if name in facts and agree(value, facts[name]):
            return str(path)
        return f"--dataset {args.dataset}" if agree(value, getattr(DATASETS[args.dataset], name.upper())) else f"--{name}"

    log.info("standardised with mean %s and std %s dB (VH, VV), of %s", shown(args.mean), shown(args.std),
             " and ".join(dict.fromkeys(map(source, STATISTICS))))


def build_dataset(args, split=None, metadata=None, supervised=False):
    """A part of the dataset of `--dataset`: `--split` and `--metadata`, unless others are given.

    supervised: samples without a label are left out. Raises DataError for data that cannot be used.
    """
    flood = {"val_fraction": args.val_fraction, "seed": args.draw_seed} if DATASETS[args.dataset] is FloodDataset else {}
    dataset = open_dataset(args.dataset, args.data_path, split or args.split, metadata or args.metadata, args.id_col,
                           args.include_snow_cloud, args.max_nonfinite, supervised, **flood)
    if args.data_cache != "none" and not isinstance(dataset, PackedDataset):
        raise UsageError(f"--data_cache {args.data_cache}: --data_path {args.data_path} is no packed store; make one of it with "
                         "python -m sarwmix.pack")
    return dataset


def check_data(dataset, args, ranks):
    """Look for every file, and at some values; fill the cache. Returns what a run records about the data.

    Raises DataError, and UsageError for a cache that does not fit.
    """
    if args.check_files == "all":
        ranks.together(lambda: dataset.check_files(ranks.rank, ranks.world_size))
    if args.data_cache != "none":
        ranks.together(lambda: fill_cache(dataset, args.data_cache, ranks))
    return {**dataset.describe(), "simulated": is_simulated(dataset), "first_look": ranks.on_main(dataset.check_units)}


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
    if isinstance(samples.dataset, PackedDataset):
        return _packed_loader(samples, sampler, args.data_cache, workers, ranks, args.pin_mem)
    return DataLoader(samples, batch_sampler=sampler, num_workers=workers, pin_memory=args.pin_mem and ranks.device.type == "cuda",
                      persistent_workers=persistent and workers > 0, worker_init_fn=_start_worker)


def _packed_loader(samples, sampler, cache, workers, ranks, pin):
    """As `_loader` for a packed store: whole batches, coded until they are on the device that trains, and no processes."""
    dataset, labelled = samples.dataset, isinstance(samples, SamplesWithIds)
    if ranks.device.type == "cpu" or cache == "device":
        fetch = dataset.images

        def to_device(images, ids):
            return images
    else:
        fetch = partial(dataset.codes, empty=partial(torch.empty, pin_memory=pin))

        def to_device(codes, ids):
            return dataset.decode([code.to(ranks.device, non_blocking=True) for code in codes], ids)

    def finish(ids, fetched):
        images = to_device(fetched, ids)
        return (torch.tensor(ids), images, dataset.labels(ids)) if labelled else (torch.tensor(ids), images[0])

    return BatchStream(sampler, fetch, finish, 0 if cache == "device" else workers)


def fill_cache(dataset, cache, ranks):
    """--data_cache: put a packed split into this process's memory ("ram"), or the device's ("device").

    Raises UsageError if there is not enough of it.
    """
    need = dataset.cache_bytes()
    device = ranks.device if cache == "device" else torch.device("cpu")
    if device.type == "cuda":
        free, sharing = torch.cuda.mem_get_info(device)[0], 1
    else:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        sharing = ranks.launch.local_size
    if need * sharing > free:
        raise UsageError(f"--data_cache {cache}: split '{dataset.split}' takes {need / 1e9:.1f} GB for each of {sharing} ranks, and "
                         f"{free / 1e9:.1f} GB are free; choose another --data_cache, which 'none' always is")
    started = time.monotonic()
    dataset.cache(device if cache == "device" else None)
    log.info("split %s is in the memory of %s: %.2f GB, %.1f s", dataset.split, device, need / 1e9, time.monotonic() - started)


def _start_worker(_):
    """One thread, and no say in how the program ends: signals are the main process's to handle, and it is followed at once.

    Batch systems send theirs to every process of a job.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
