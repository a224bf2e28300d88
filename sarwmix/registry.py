# SPDX-License-Identifier: MIT
"""The datasets by name, the flags that say where their data lies, and `open_dataset`."""

import logging
from inspect import signature
from pathlib import Path

import numpy as np

from common.command_line import rate, seed, share
from common.errors import DataError, listed
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.chips import Chips
from sarwmix.listing import EVERY
from sarwmix.masks import Masks, Sen1Floods11
from sarwmix.packed import PackedDataset
from sarwmix.packed_store import is_packed
from sarwmix.prepare.completeness import are_simulated, complete_count, log_completeness
from sarwmix.raster import add_reading_flags, reading_of
from sarwmix.sen12flood_loader import FloodDataset

DATASETS = {
    "benv1": BigEarthNetv1,
    "benv2": BigEarthNetv2,
    "sen12flood": FloodDataset,
    "chips": Chips,
    "masks": Masks,
    "sen1floods11": Sen1Floods11,
}
# GeoTIFFs of any origin: read as the flags of `Reading` say, divided by draws, and with statistics of their own.
OWN = tuple(name for name, kind in DATASETS.items() if issubclass(kind, Chips))

log = logging.getLogger(__name__)


def add_source_flags(group, dataset=None, split=None):
    """Adds the flags that say where the data lie and which images are used. dataset, split: of these flags, if any."""
    group.add_argument(
        "--data_path",
        metavar="DIR",
        help="folder of the data. Any dataset: a packed store. benv2: BigEarthNet-S1, the folder that holds it, or the "
        "authors' LMDB. benv1: the folder of the patch folders, or a Zarr store. sen12flood: the folder of train/ and "
        "test/ with pair files, or of images/ and pairs_*.csv. chips: GeoTIFFs of VV and VH, square and of one size. "
        "masks: images/, masks/ and classes.csv. sen1floods11: the folder v1.1, or that of S1Hand/ and LabelHand/",
    )
    if dataset is not None:
        group.add_argument("--dataset", **dataset)
    if split is not None:
        group.add_argument("--split", **split)
    group.add_argument(
        "--metadata",
        nargs="+",
        metavar="FILE",
        help="tables or lists of the samples. benv2: metadata.parquet or CSV files of the same columns. benv1: split "
        "lists. sen12flood: lists of folders. chips, masks: CSV or parquet with the column id and, where known, label, "
        "labels or mask, split and group. sen1floods11: lists as flood_train_data.csv or flood_bolivia_data.csv "
        "(default: the files in data_path)",
    )
    group.add_argument(
        "--id_col",
        type=int,
        metavar="N",
        help="column of the S1 ids, counted from 0, in a CSV whose header does not name it",
    )
    group.add_argument(
        "--include_snow_cloud",
        action="store_true",
        help="benv2: also use the patches with seasonal snow, cloud or shadow, which the official metadata leave out",
    )
    group.add_argument(
        "--max_nonfinite",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="share of NaN, infinite or no-data pixels above which an image is an error; masks and sen1floods11 ignore "
        "such pixels instead",
    )


def add_chips_flags(parser, draws=True):
    """Adds the flags of images of one's own: how their values are read and, with `draws`, how they are divided."""
    about = f"for --dataset {listed(OWN)}"
    group = parser.add_argument_group(
        "your own images", f"{about}; --val_fraction and --draw_seed also for sen12flood" if draws else about
    )
    add_reading_flags(group, units="dB")
    if not draws:
        return
    group.add_argument(
        "--val_fraction",
        type=rate,
        default=0.0,
        metavar="SHARE",
        help="draw this share of the groups of images as the split val, for images without splits; sen12flood: this "
        "share of the training folders",
    )
    group.add_argument(
        "--test_fraction",
        type=rate,
        default=0.0,
        metavar="SHARE",
        help="draw this share of the groups as the split test, for images without splits; not for sen12flood",
    )
    group.add_argument(
        "--draw_seed",
        type=seed,
        metavar="N",
        help="seed of the draws of splits and of training samples (default: --seed)",
    )


def add_skip_missing_flag(group):
    """Adds --skip_missing, for `leave_out`. Its default is None, so that runs from before the flag can be continued."""
    group.add_argument(
        "--skip_missing",
        action="store_true",
        default=None,
        help="leave out samples whose images are missing, instead of ending with an error; for a packed store, use "
        "sarwmix.prepare.pack --skip_bad",
    )


def leave_out(dataset, missing):
    """A dataset without the samples of these indices, whose images are missing, for --skip_missing.

    Logs their number, which `describe` also gives. Raises DataError if no sample is left.
    """
    if len(missing) == len(dataset):
        dataset.check_files()
    part = dataset.subset(np.setdiff1d(np.arange(len(dataset)), missing))
    part.left_out = len(missing)
    if missing:
        log.warning(
            "%d of %d samples of split '%s' are left out, as their images are missing, the first is %s; restore them "
            "to use them",
            len(missing),
            len(dataset),
            dataset.split,
            dataset.ids[missing[0]],
        )
    else:
        log.info("no sample of split '%s' is missing", dataset.split)
    return part


def source_options(args):
    """Options for `open_dataset` from the flags of `add_source_flags` and `add_chips_flags`. Raises DataError."""
    val, test, draw_seed = (getattr(args, name, 0) or 0 for name in ("val_fraction", "test_fraction", "draw_seed"))
    usual = {"bands": None, "nodata": None, "scale": None, "uncalibrated": False, "units": "dB"}
    given = [name for name, value in usual.items() if getattr(args, name, value) != value]
    if given and args.dataset not in OWN:
        raise DataError(f"--{given[0]}: is for --dataset {listed(OWN)}; leave it out")
    if given and is_packed(args.data_path):
        raise DataError(f"--{given[0]}: {args.data_path} is a packed store, which holds VH and VV in dB; leave it out")
    if test and args.dataset not in OWN or val and args.dataset not in (*OWN, "sen12flood"):
        raise DataError(
            f"--{'test' if test else 'val'}_fraction: --dataset {args.dataset} has splits of its own; leave it out"
        )
    options = {name: getattr(args, name) for name in ("id_col", "include_snow_cloud", "max_nonfinite")}
    if args.dataset in OWN:
        options["reading"] = reading_of(args)
    return options | {"draw": (val, test, draw_seed), "val_fraction": val, "seed": draw_seed}


def open_dataset(dataset, root, split, metadata=None, supervised=False, **options):
    """Opens a split of the dataset of that name, from a packed store or any other layout in the folder `root`.

    supervised: samples without a label are left out. options: other arguments of the datasets, such as max_nonfinite
    or, for SEN12-FLOOD, val_fraction and seed; each class gets those that it takes. Raises DataError for data, or a
    combination of arguments, that cannot be used.
    """
    snow, takes = options.get("include_snow_cloud"), signature(DATASETS[dataset]).parameters
    if snow and "include_snow_cloud" not in takes:
        raise DataError(f"--include_snow_cloud: --dataset {dataset} has no such patches; leave the flag out")
    if metadata and "metadata" not in takes:
        raise DataError(f"--metadata: --dataset {dataset} has no lists of samples; leave the flag out")
    options |= {"split": split, "metadata": metadata, "supervised": supervised, "keep_unlabelled": not supervised}
    kind = DATASETS[dataset]
    if is_packed(root):
        if metadata or snow or options.get("id_col") is not None:
            raise DataError(
                f"{root}: a packed store has fixed splits; leave --metadata, --id_col and --include_snow_cloud out, "
                "and give them to sarwmix.prepare.pack"
            )
        kind, options["dataset"] = PackedDataset, dataset
    opened = kind(root, **{name: options[name] for name in signature(kind).parameters if name in options})
    if opened.MEAN is None:  # of a packed store
        opened.MEAN, opened.STD = DATASETS[dataset].MEAN, DATASETS[dataset].STD
    opened.require()
    return opened


def is_simulated(dataset):
    """Whether a dataset holds simulated images: its folder has the record of the generator, or its dates are simulated.

    The dates are in the names of samples, which packing, conversion and split lists keep.
    """
    return (Path(dataset.root) / "simulation.json").is_file() or are_simulated(dataset.ids.tolist())


def log_amount(name, dataset, simulated, include_snow_cloud=False):
    """Logs how much of the complete split a dataset of that name holds. Returns the number that a complete split has.

    Returns None, and logs nothing, where it is not known, and for simulated images.
    """
    without_lists = not dataset.metadata or EVERY in getattr(dataset, "manifest", {}).get("splits", ())
    split = EVERY if without_lists else dataset.split
    count = None if simulated else complete_count(name, split, len(dataset))
    if count is not None:
        added = include_snow_cloud or dataset.is_packed  # a packed store does not say whether it has them
        log_completeness(log, f"data: {name} {dataset.split}", name, split, len(dataset), added)
    return count
