# SPDX-License-Identifier: MIT
"""From `--dataset` to a dataset and its loader. The one place of `util` that knows `sarwmix`."""

import ctypes
import logging
import os
import signal
import tempfile
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from common.errors import DataError, UsageError
from common.files import read_json
from sarwmix.packed import PackedDataset
from sarwmix.registry import DATASETS, add_skip_missing_flag, add_source_flags, is_simulated, leave_out, open_dataset
from sarwmix.sen12flood_loader import FloodDataset
from util.caching import fill_cache
from util.checkpoint_checks import are_statistics
from util.checkpoint_input import CHANNELS, STATISTICS, UNITS, agree, facts_of, shown
from util.sampling import InOrderSampler, MicroBatchSampler
from util.step_memory import step_bytes
from util.stopping import SIGNALS
from util.streaming import BatchStream, Watched

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent ends
# Of the 107 characters that a socket's path may have (unix(7)), multiprocessing takes "/pymp-xxxxxxxx/listener-xxxxxxxx".
LONGEST_TMPDIR = 107 - 32

log = logging.getLogger(__name__)


def add_data_flags(parser):
    """Flags of the data: where it lies and its statistics. A program adds --dataset and --split to the group returned."""
    group = parser.add_argument_group("data")
    add_source_flags(group)
    add_skip_missing_flag(group)
    group.add_argument(
        "--data_cache",
        choices=("auto", "none", "ram", "device"),
        default="auto",
        help="where a packed store's images are kept: read from disk (none), in memory, one copy for the ranks of a node (ram), "
        "or on each GPU (device); auto: on the GPU if they and a training step fit, else in memory, else read from disk",
    )
    group.add_argument(
        "--mean",
        type=float,
        nargs=2,
        metavar=("VH", "VV"),
        help="mean in dB (default: that of the checkpoint it starts from, else the dataset's)",
    )
    group.add_argument(
        "--std",
        type=float,
        nargs=2,
        metavar=("VH", "VV"),
        help="standard deviation in dB (default: as for --mean; for benv1 and sen12flood that of the released checkpoints)",
    )
    group.add_argument(
        "--statistics",
        metavar="FILE",
        help="take mean and standard deviation from what sarwmix.prepare.statistics --out wrote, or from the statistics.json of a "
        "packed store (its split train)",
    )
    group.add_argument(
        "--data_timeout",
        type=float,
        default=8,
        metavar="MIN",
        help="minutes after which a batch that loader processes or threads do not give is an error; below --dist_timeout, so "
        "that the rank that waits says so",
    )
    group.add_argument(
        "--check_files", choices=("all", "none"), default="all", help="look for every file before training starts"
    )
    return group


def take_statistics(args):
    """Put what the file of --statistics says into args.mean and args.std. Raises UsageError."""
    if not args.statistics:
        return
    if args.mean or args.std:
        raise UsageError("--statistics contradicts --mean and --std: both say how to standardise; leave one out")
    remedy = "give what python -m sarwmix.prepare.statistics --out FILE wrote"
    try:
        content = read_json(args.statistics, remedy)
    except DataError as error:
        raise UsageError(f"--statistics {error}") from None
    if (
        isinstance(content, dict) and "mean" not in content and isinstance(content.get("train"), dict)
    ):  # of a packed store
        content = {"units": UNITS, "channels": CHANNELS, **content["train"]}
    if (
        not isinstance(content, dict)
        or not are_statistics(content.get("mean"))
        or not are_statistics(content.get("std"), above=0)
    ):
        raise UsageError(f"--statistics {args.statistics}: has no mean and std of two channels; {remedy}")
    if content.get("units") != UNITS or content.get("channels") != CHANNELS:
        raise UsageError(
            f"--statistics {args.statistics}: is of channels {content.get('channels')} in {content.get('units')}, but "
            f"{', '.join(CHANNELS)} in {UNITS} are fed; {remedy}"
        )
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
        return (
            f"--dataset {args.dataset}" if agree(value, getattr(DATASETS[args.dataset], name.upper())) else f"--{name}"
        )

    log.info(
        "standardised with mean %s and std %s dB (VH, VV), of %s",
        shown(args.mean),
        shown(args.std),
        " and ".join(dict.fromkeys(map(source, STATISTICS))),
    )


def build_dataset(args, split=None, metadata=None, supervised=False):
    """A part of the dataset of `--dataset`: `--split` and `--metadata`, unless others are given.

    supervised: samples without a label are left out. Raises DataError for data that cannot be used.
    """
    flood = (
        {"val_fraction": args.val_fraction, "seed": args.draw_seed} if DATASETS[args.dataset] is FloodDataset else {}
    )
    dataset = open_dataset(
        args.dataset,
        args.data_path,
        split or args.split,
        metadata or args.metadata,
        args.id_col,
        args.include_snow_cloud,
        args.max_nonfinite,
        supervised,
        **flood,
    )
    if args.data_cache not in ("auto", "none") and not isinstance(dataset, PackedDataset):
        raise UsageError(
            f"--data_cache {args.data_cache}: --data_path {args.data_path} is no packed store; make one of it with "
            "python -m sarwmix.prepare.pack"
        )
    return dataset


def drop_missing(dataset, args, ranks=None):
    """--skip_missing: the dataset without the samples whose images are missing, the same ones on every rank.

    Each rank looks at a share, so all of them must call this; without `ranks` this process looks at everything. Raises
    UsageError for a packed store, which has none, and DataError if nothing is left.
    """
    if not args.skip_missing:
        return dataset
    if isinstance(dataset, PackedDataset):
        raise UsageError(
            f"--skip_missing: --data_path {args.data_path} is a packed store, which lacks no image of its samples; leave the "
            "flag out"
        )
    if ranks is None:
        return leave_out(dataset, dataset.missing())
    found = ranks.gather(ranks.together(lambda: dataset.missing(ranks.rank, ranks.world_size)))
    return ranks.together(lambda: leave_out(dataset, sorted(chain(*found))))


def check_data(dataset, args, ranks, read_once=False):
    """Look for every file, and at some values; fill the cache. Returns what a run records about the data.

    read_once: whether every image is read a single time, so that --data_cache auto does not keep them. Raises DataError, and
    UsageError for a cache that does not fit.
    """
    if args.check_files == "all":
        ranks.together(lambda: dataset.check_files(ranks.rank, ranks.world_size))
    if isinstance(dataset, PackedDataset) and not (read_once and args.data_cache == "auto"):
        fill_cache(dataset, args.data_cache, ranks, partial(step_bytes, args, args.dataset == "sen12flood"))
    return {
        **dataset.describe(),
        "simulated": is_simulated(dataset),
        "first_look": ranks.on_main(lambda: dataset.check_units((args.mean, args.std))),
    }


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
        raise UsageError(
            f"--batch_size {args.batch_size}: the {len(samples)} samples of split '{args.split}' do not fill one "
            f"global batch of {args.batch_size} × {args.accum_iter} micro-batches × {ranks.world_size} ranks; "
            f"{_batch_that_fits(len(samples), args.accum_iter, ranks.world_size)}, or give more data"
        )
    return _loader(samples, sampler, args, ranks, persistent=True)


def _batch_that_fits(samples, accum_iter, world_size):
    """For a message: flags of the largest global batch of no more samples than these. Batches are even, as images are mixed in pairs."""
    for micro_batches in (accum_iter, 1):
        size = samples // (micro_batches * world_size)
        if size >= 2:
            lower = f" and --accum_iter {micro_batches}" if micro_batches != accum_iter else ""
            return f"--batch_size {size - size % 2}{lower} is the largest that fits"
    return (
        f"start {samples // 2} ranks at most, with --batch_size 2 and --accum_iter 1"
        if samples >= 2
        else "two samples are the least"
    )


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
    timeout = 60 * args.data_timeout
    if isinstance(samples.dataset, PackedDataset):
        return Watched(_packed_loader(samples, sampler, workers, ranks, args.pin_mem, timeout))
    if workers:
        check_temporary_folder()
    return Watched(
        DataLoader(
            samples,
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=args.pin_mem and ranks.device.type == "cuda",
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_start_worker,
            timeout=timeout if workers else 0,
        )
    )


def check_temporary_folder():
    """Loader processes hand batches over through a socket in the folder for temporary files, whose path may not be long.

    Raises UsageError where that cannot be: the processes would die of it, and training would wait for them.
    """
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        raise UsageError(
            f"TMPDIR: there is no folder for temporary files ({error.strerror}); set it to one that can be written"
        ) from None
    if len(os.fsencode(folder)) > LONGEST_TMPDIR:
        raise UsageError(
            f"TMPDIR={folder}: its path has {len(os.fsencode(folder))} characters, and loader processes need one of at most "
            f"{LONGEST_TMPDIR}; set TMPDIR=/tmp, or load without processes: --num_workers 0"
        )


def _packed_loader(samples, sampler, workers, ranks, pin, timeout):
    """As `_loader` for a packed store: whole batches, coded until they are on the device that trains, and no processes."""
    dataset, labelled = samples.dataset, isinstance(samples, SamplesWithIds)
    if ranks.device.type == "cpu" or dataset.on_device:
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

    return BatchStream(sampler, fetch, finish, 0 if dataset.on_device else workers, timeout)


def _start_worker(_):
    """One thread, and no say in how the program ends: signals are the main process's to handle, and it is followed at once.

    Batch systems send theirs to every process of a job.
    """
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
