# SPDX-License-Identifier: MIT
"""Builds datasets and their loaders from the flags of a program. The only module of `util` that imports `sarwmix`."""

import ctypes
import logging
import os
import signal
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from common.command_line import positive
from common.errors import UsageError
from sarwmix.listing import SPLITS
from sarwmix.registry import (
    add_chips_flags,
    add_skip_missing_flag,
    add_source_flags,
    is_simulated,
    leave_out,
    log_amount,
    open_dataset,
    source_options,
)
from util.caching import fill_cache, hold_in_memory
from util.sampling import InOrderSampler, MicroBatchSampler
from util.step_memory import step_bytes
from util.stopping import SIGNALS, Stopping

PR_SET_PDEATHSIG = 1  # option of prctl(2): the signal that a process receives when its parent ends
# The path of a socket has at most 107 characters (unix(7)); multiprocessing appends "/pymp-xxxxxxxx/listener-xxxxxxxx".
LONGEST_TMPDIR = 107 - 32

log = logging.getLogger(__name__)


def add_data_flags(parser, dataset, split):
    """Adds the flags of the data. dataset, split: choices, default and help of these flags of a program."""
    group = parser.add_argument_group("data")
    add_source_flags(group, dataset, {"choices": SPLITS, **split})
    add_skip_missing_flag(group)
    group.add_argument(
        "--check_files",
        choices=("all", "none"),
        default="all",
        help="all: check before training that every file exists; none: do not check",
    )
    group.add_argument(
        "--data_cache",
        choices=("auto", "none", "ram", "device"),
        default="auto",
        help="where the images of a packed store are kept: none: on the disk; ram: in memory, one copy for the ranks "
        "of a node; device: on each GPU; auto: on the GPU if they and a training step fit, else in memory, else on the "
        "disk. Images with masks: none, or ram, a copy for each rank (auto: ram if they fit)",
    )
    group.add_argument(
        "--data_timeout",
        type=positive,
        default=8,
        metavar="MIN",
        help="minutes without a batch from the loader after which the run ends with an error; keep it below "
        "--dist_timeout, so that the rank that waits reports the error",
    )
    group.add_argument(
        "--mean",
        type=float,
        nargs=2,
        metavar=("VH", "VV"),
        help="mean in dB that standardises the input (default: the mean of the checkpoint that the run starts from, "
        "else the dataset's)",
    )
    group.add_argument(
        "--std",
        type=positive,
        nargs=2,
        metavar=("VH", "VV"),
        help="standard deviation in dB that standardises the input (default: as for --mean; for benv1 and sen12flood "
        "that of the released checkpoints)",
    )
    group.add_argument(
        "--statistics",
        metavar="FILE",
        help="read mean and standard deviation from this JSON file of sarwmix.prepare.statistics --out, or from the "
        "statistics.json of a packed store (its split train, or every)",
    )
    add_chips_flags(parser)


def build_dataset(args, split=None, metadata=None, supervised=False, classes=None):
    """Opens a split of the dataset of --dataset. split, metadata: instead of those of the flags.

    supervised: leaves out samples without a label. classes: of chips, instead of those of their table. Raises DataError
    for data that cannot be used.
    """
    options = source_options(args) | {"classes": classes}
    dataset = open_dataset(
        args.dataset, args.data_path, split or args.split, metadata or args.metadata, supervised, **options
    )
    kept = ("auto", "none", "ram") if dataset.task == "segmentation" else ("auto", "none")
    if args.data_cache not in kept and not dataset.is_packed:
        remedy = "use ram" if "ram" in kept else "pack it with python -m sarwmix.prepare.pack"
        raise UsageError(
            f"--data_cache {args.data_cache}: --data_path {args.data_path} is not a packed store; {remedy}"
        )
    return dataset


def drop_missing(dataset, args, ranks=None):
    """The dataset without the samples whose images are missing, if --skip_missing is given; the same on every rank.

    All ranks must call this, because each checks a share of the files; without `ranks`, this process checks all files.
    Raises UsageError for a packed store, which is always complete, and DataError if no sample is left.
    """
    if not args.skip_missing:
        return dataset
    if dataset.is_packed:
        raise UsageError(
            f"--skip_missing: --data_path {args.data_path} is a packed store, which has the images of all its "
            "samples; leave the flag out"
        )
    if ranks is None:
        return leave_out(dataset, dataset.missing())
    with ranks.together():
        found = dataset.missing(ranks.rank, ranks.world_size)
    found = ranks.gather(found)
    with ranks.together():
        return leave_out(dataset, sorted(chain(*found)))


SCENE_RATIO = 4  # images that are so many times as large as the input a side may be scenes


def log_resizing(dataset, input_size):
    """Logs that batch preparation resizes the images. Images with masks are cropped, those of floods cut instead."""
    side = dataset.size
    if side in (None, input_size) or dataset.task in ("segmentation", "flood"):
        return
    text = f"images of {side}×{side} pixels are resized to the input of {input_size}×{input_size}"
    if side > SCENE_RATIO * input_size:
        log.warning("%s; cut scenes into tiles of that size with python -m sarwmix.tile", text)
    else:
        log.info("%s", text)


def check_data(dataset, args, ranks, read_once=False):
    """Checks all files and some values, and fills the cache. Returns the record of the data for run.json.

    Logs also how much of the complete split there is. read_once: every image is read only once, so that --data_cache
    auto keeps none. Raises DataError, and UsageError for a cache that does not fit.
    """
    if args.check_files == "all":
        with ranks.together():
            dataset.check_files(ranks.rank, ranks.world_size)
    if dataset.is_packed and not (read_once and args.data_cache == "auto"):
        fill_cache(dataset, args.data_cache, ranks, partial(step_bytes, args, dataset.images_per_sample))
    elif dataset.task == "segmentation" and dataset.supervised and not read_once:
        hold_in_memory(dataset, args.data_cache, ranks)
    log_resizing(dataset, args.input_size)
    simulated = is_simulated(dataset)
    complete = log_amount(args.dataset, dataset, simulated, args.include_snow_cloud)
    return {
        **dataset.describe(),
        "simulated": simulated,
        **({} if complete is None else {"complete": complete}),
        "first_look": ranks.on_main(dataset.check_units, (args.mean, args.std)),
    }


class ImagesWithIds(Dataset):
    """Samples (id, image) of a dataset, without labels.

    Here and in all batches an id is an index, which seeds flips and crops; `dataset.ids` has the names.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return i, self.dataset.image(i)


class SamplesWithIds(ImagesWithIds):
    """Samples (id, images, label) of a dataset. images: a tuple of one image, or of the two images of a pair.

    repeats: how often an epoch takes each sample, every time with an id, and so a crop, of its own.
    """

    def __init__(self, dataset, repeats=1):
        super().__init__(dataset)
        self.repeats = repeats

    def __len__(self):
        return len(self.dataset) * self.repeats

    def __getitem__(self, i):
        *images, label = self.dataset[i % len(self.dataset)]
        return i, tuple(images), label


def high_contrast_ids(dataset, count, among=64):
    """Ids of samples for pictures: the `count` samples with the highest contrast, in the order of the dataset.

    Contrast is the variance of the means of 30×30 pixels, or fewer of small images; many patches are uniform forest or
    sea. Compares only `among` samples, evenly spread over the dataset. The number of ids is even, because the model
    mixes images in pairs: if fewer than `count` samples give an odd number, the last id is repeated.
    """
    spread = np.unique(np.linspace(0, len(dataset) - 1, max(among, count)).round().astype(int))
    images = (dataset.image(i).nan_to_num() for i in spread)
    contrast = [F.avg_pool2d(image, min(30, image.shape[-1] // 2)).var((1, 2)).sum().item() for image in images]
    ids = sorted(spread[np.argsort(contrast)[::-1][:count]].tolist())
    return ids + ids[-1:] * (len(ids) % 2)


def build_loader(samples, args, ranks):
    """The loader of this rank's micro-batches for training. samples: ImagesWithIds or SamplesWithIds.

    Raises UsageError if the dataset is smaller than one global batch.
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
    """Advice for a message: flags of the largest even global batch that `samples` fill."""
    for micro_batches in (accum_iter, 1):
        size = samples // (micro_batches * world_size)
        if size >= 2:
            lower = f" and --accum_iter {micro_batches}" if micro_batches != accum_iter else ""
            return f"--batch_size {size - size % 2}{lower} is the largest that fits"
    if samples >= 2:
        return f"start at most {samples // 2} ranks, with --batch_size 2 and --accum_iter 1"
    return "at least two samples are needed"


def build_test_loader(dataset, args, ranks, spread=True):
    """A loader of (ids, images, labels), each sample once and in order. spread: over all ranks, else rank 0."""
    if spread:
        sampler = InOrderSampler(len(dataset), args.batch_size, ranks.rank, ranks.world_size)
    else:
        sampler = InOrderSampler(len(dataset) if ranks.is_main else 0, args.batch_size)
    return _loader(SamplesWithIds(dataset), sampler, args, ranks, persistent=False)


def _loader(samples, sampler, args, ranks, persistent):
    workers, timeout = args.num_workers, 60 * args.data_timeout
    if getattr(samples.dataset, "is_packed", False):  # any map-style dataset of PyTorch can be loaded
        return Watched(PackedLoader(samples, sampler, ranks.device, workers, timeout, args.pin_mem))
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


class PackedLoader:
    """A loader of a packed store with threads instead of processes, because reading is copying with little computation.

    samples: ImagesWithIds or SamplesWithIds of a PackedDataset. batch_sampler: yields lists of ids. threads: each reads
    up to two batches ahead; 0 reads in the caller's thread. timeout: seconds to wait for a batch, as in a DataLoader.
    pin_memory: for copies to a GPU. Images are decoded on `device`.
    """

    def __init__(self, samples, batch_sampler, device, threads=0, timeout=None, pin_memory=False):
        self.dataset, self.labelled = samples.dataset, isinstance(samples, SamplesWithIds)
        self.batch_sampler, self.device, self.timeout = batch_sampler, device, timeout
        self.decode_in_threads, self.pin_memory = device.type == "cpu", pin_memory
        self.threads = 0 if self.dataset.source.on_device else threads

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        if self.threads == 0:
            for ids in self.batch_sampler:
                yield self._batch(ids, self._read(ids))
            return
        pool, ahead = ThreadPoolExecutor(self.threads, "batches"), deque()
        try:
            for ids in self.batch_sampler:
                ahead.append((ids, pool.submit(self._read, ids)))
                if len(ahead) > 2 * self.threads:
                    yield self._next(ahead)
            while ahead:
                yield self._next(ahead)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a thread may be blocked by a file system

    def _next(self, ahead):
        ids, future = ahead.popleft()
        try:
            read = future.result(self.timeout)
        except TimeoutError:
            raise RuntimeError(f"DataLoader timed out after {self.timeout:g} seconds") from None
        return self._batch(ids, read)

    def _read(self, ids):
        """The work of a thread: reads images for a CPU, or the codes of images for a GPU."""
        return self.dataset.images(ids) if self.decode_in_threads else self.dataset.codes(ids, self.pin_memory)

    def _batch(self, ids, read):
        images = read if self.decode_in_threads else self.dataset.images(ids, self.device, read)
        ids_tensor = torch.tensor(ids)
        return (ids_tensor, images, self.dataset.labels(ids)) if self.labelled else (ids_tensor, images[0])


class Watched:
    """Wraps a loader, and handles signals while it waits for a batch (`Stopping.waiting_for_data`)."""

    def __init__(self, loader):
        self.loader, self.batch_sampler = loader, loader.batch_sampler

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        batches, end = iter(self.loader), object()
        while True:
            with Stopping.waiting_for_data():
                batch = next(batches, end)
            if batch is end:
                return
            yield batch


def check_temporary_folder():
    """Raises UsageError if the path of the folder for temporary files is too long for a socket.

    Loader processes send batches through a socket there. They would fail, and training would wait for them.
    """
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        raise UsageError(
            f"TMPDIR: there is no folder for temporary files ({error.strerror}); set it to one that can be written"
        ) from None
    if len(os.fsencode(folder)) > LONGEST_TMPDIR:
        raise UsageError(
            f"TMPDIR={folder}: its path has {len(os.fsencode(folder))} characters, and loader processes need one of "
            f"at most {LONGEST_TMPDIR}; set TMPDIR=/tmp, or load without processes: --num_workers 0"
        )


def _start_worker(_):
    """Sets up a loader process: it has one thread, ignores signals, and ends with the main process.

    Batch systems send signals to every process of a job, but only the main process handles them.
    """
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
