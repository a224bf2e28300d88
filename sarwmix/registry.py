# SPDX-License-Identifier: MIT
"""The datasets by name, and from a name and a folder to a dataset, in whatever layout the folder has it."""

import logging
import re
from pathlib import Path

import numpy as np

from common.command_line import share
from common.errors import DataError
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.packed import PackedDataset, is_packed
from sarwmix.sen12flood_loader import FloodDataset

FIRST_YEAR = 2014  # of Sentinel-1; simulated acquisitions are dated before
ACQUIRED = re.compile(r"_([0-9]{4})[0-9]{4}T[0-9]{6}")

DATASETS = {"benv1": BigEarthNetv1, "benv2": BigEarthNetv2, "sen12flood": FloodDataset}
SPLITS = ("train", "val", "test", "train_val", "all")

log = logging.getLogger(__name__)


def add_source_flags(group):
    """Flags that say where the data lies, what is in it, and what makes an image unusable."""
    group.add_argument(
        "--data_path",
        metavar="DIR",
        help="a packed store of any dataset; benv2: the folder that holds BigEarthNet-S1, or that folder, or the authors' LMDB; "
        "benv1: the folder of patch folders, or a Zarr store; sen12flood: the folder of train/ and test/ with "
        "pair files, or of images/ and pairs_*.csv",
    )
    group.add_argument(
        "--metadata",
        nargs="+",
        metavar="FILE",
        help="benv2: metadata.parquet or CSV dumps of it; benv1: split lists; sen12flood: lists of folders "
        "(default: what lies in data_path)",
    )
    group.add_argument(
        "--id_col", type=int, metavar="N", help="0-based column of the S1 id in a CSV without a header for it"
    )
    group.add_argument(
        "--include_snow_cloud",
        action="store_true",
        help="benv2: add the patches with seasonal snow, cloud or shadow, which the official metadata leave out",
    )
    group.add_argument(
        "--max_nonfinite",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="share of NaN, infinite or no-data pixels above which an image is an error",
    )


def add_skip_missing_flag(group):
    """--skip_missing, for `leave_out`; None where it was not given, so that runs from before the flag are of the same kind."""
    group.add_argument(
        "--skip_missing",
        action="store_true",
        default=None,
        help="leave samples out whose images are missing, of a dataset that is there in part, instead of ending with an "
        "error; a packed store is made without them by sarwmix.prepare.pack --skip_bad",
    )


def leave_out(dataset, missing):
    """A dataset without the samples at these positions, whose images are missing, for --skip_missing.

    Logs how many they are, and has `describe` say it. Raises DataError if nothing is left.
    """
    if len(missing) == len(dataset):
        dataset.check_files()
    part = dataset.subset(np.setdiff1d(np.arange(len(dataset)), missing))
    part.left_out = len(missing)
    if missing:
        log.warning(
            "%d of %d samples of split '%s' are left out, as their images are missing, the first is %s; restore them to use them",
            len(missing),
            len(dataset),
            dataset.split,
            dataset.ids[missing[0]],
        )
    else:
        log.info("no sample of split '%s' is missing", dataset.split)
    return part


def open_dataset(
    dataset,
    root,
    split,
    metadata=None,
    id_col=None,
    include_snow_cloud=False,
    max_nonfinite=0.01,
    supervised=False,
    val_fraction=0.0,
    seed=0,
):
    """A split of the dataset of that name, from a packed store or any other layout it can have in the folder `root`.

    supervised: samples without a label are left out. val_fraction, seed: of SEN12-FLOOD, see FloodDataset. The other
    arguments are those of the datasets. Raises DataError for data, or a combination of arguments, that cannot be used.
    """
    kind = DATASETS[dataset]
    if include_snow_cloud and kind is not BigEarthNetv2:
        raise DataError(f"--include_snow_cloud: --dataset {dataset} has no such patches; leave the flag out")
    if is_packed(root):
        if metadata or include_snow_cloud or id_col is not None:
            raise DataError(
                f"{root}: a packed store knows its splits; leave --metadata, --id_col and --include_snow_cloud out, and give "
                "them to sarwmix.prepare.pack"
            )
        return PackedDataset(root, split, dataset, supervised=supervised, val_fraction=val_fraction, seed=seed)
    options = {"split": split, "metadata": metadata, "max_nonfinite": max_nonfinite}
    if kind is FloodDataset:
        return kind(root, val_fraction=val_fraction, seed=seed, **options)
    options["id_col"] = id_col
    options["keep_unlabelled"] = not supervised
    opened = (
        kind(root, **options) if kind is BigEarthNetv1 else kind(root, include_snow_cloud=include_snow_cloud, **options)
    )
    opened.require()
    return opened


def is_simulated(dataset):
    """Whether a dataset holds simulated images: by the record of its generator beside them, or the dates of its acquisitions.

    The dates outlast packing, conversion and split lists.
    """
    dates = (ACQUIRED.search(sample) for sample in dataset.ids.tolist())
    return (Path(dataset.root) / "simulation.json").is_file() or any(
        date and int(date[1]) < FIRST_YEAR for date in dates
    )
