# SPDX-License-Identifier: MIT
"""Tiny BigEarthNet folders for tests: constant images, written by code."""

import csv
import json
import os
import warnings
from pathlib import Path

import lmdb
import numpy as np
import pandas as pd
import pytest
import rasterio
import zarr
from rasterio.errors import NotGeoreferencedWarning
from safetensors.numpy import save

from common.errors import DataError

SAMPLE_DATA = os.environ.get("SARWMIX_SAMPLE_DATA")
needs_samples = pytest.mark.skipif(not SAMPLE_DATA, reason="set SARWMIX_SAMPLE_DATA to a folder of real samples")

ARABLE, MIXED, INLAND = 2, 10, 17
AGRICULTURE = "Land principally occupied by agriculture, with significant areas of natural vegetation"


def sample_path(*parts):
    """Where real samples lie; only in tests marked needs_samples."""
    return Path(SAMPLE_DATA, *parts)


def s1_name(k):
    return f"S1A_IW_GRDH_1SDV_2017061{k}T165043_33UUP_7{k}_48"


def s2_name(k):
    """Not derivable from s1_name(k): another date and tile, as in the dataset."""
    return f"S2B_MSIL2A_2018020{9 - k}T94161_{k}_{57 - k}"


def write_tif(path, values, descriptions=None, **options):
    """values: (H, W) or (bands, H, W), or a number for a constant 120x120 band. No CRS, as plain TIFFs."""
    values = np.full((120, 120), values, np.float32) if np.isscalar(values) else np.asarray(values)
    values = values[None] if values.ndim == 2 else values
    bands, height, width = values.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=values.dtype, **options
        ) as file:
            file.write(values)
            for number, description in enumerate(descriptions or (), start=1):
                file.set_band_description(number, description)
    return path


def one_line(error, *parts):
    """Checks that the message of a caught error is one line and holds these parts."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} not in {message!r}"


def fails_with(work, *parts):
    """Checks that work() raises a DataError whose message is one line and holds these parts."""
    with pytest.raises(DataError) as error:
        work()
    one_line(error, *parts)


# ---- V2 ------------------------------------------------------------------------------------------

V2_ROWS = [  # labels, split of samples 0..3
    (["Arable land", AGRICULTURE], "train"),
    (["Mixed forest"], "validation"),
    (["Transitional woodland, shrub", "Inland waters"], "test"),
    (["Moors, heathland and sclerophyllous vegetation"], "train"),
]
V2_CLASSES = [(2, 6), (10,), (13, 17), (12,)]


def write_v2_patch(root, k, vh=None, vv=None):
    """Patch k: VH is the constant -20-k, VV -10-k, unless given."""
    name = s1_name(k)
    folder = Path(root, "BigEarthNet-S1", "_".join(name.split("_")[:-3]), name)
    write_tif(folder / f"{name}_VH.tif", -20.0 - k if vh is None else vh)
    write_tif(folder / f"{name}_VV.tif", -10.0 - k if vv is None else vv)
    return folder


def v2_frame():
    """The official columns (those that matter, and some that do not) of samples 0..3."""
    return pd.DataFrame(
        {
            "patch_id": [f"S2A_MSIL2A_{k}" for k in range(4)],
            "labels": [labels for labels, _ in V2_ROWS],
            "split": [split for _, split in V2_ROWS],
            "country": "Austria",
            "s1_name": [s1_name(k) for k in range(4)],
            "contains_seasonal_snow": False,
        }
    )


def write_v2(root):
    """A v2 dataset of 4 samples with metadata.parquet."""
    for k in range(4):
        write_v2_patch(root, k)
    v2_frame().to_parquet(root / "metadata.parquet")
    return root


def write_lmdb(path, patches):
    """An LMDB as the dataset's authors give it, without a lock file; patches: {key: value}.

    A value is {"VH": array, "VV": array, …}, numbers standing for constant 120x120 bands, or bytes as they are.
    """
    path.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(path), map_size=2**28)
    with environment.begin(write=True) as transaction:
        for key, value in patches.items():
            if not isinstance(value, bytes):
                value = save({
                    band: np.full((120, 120), image, np.float32) if np.isscalar(image) else np.ascontiguousarray(image)
                    for band, image in value.items()
                })  # fmt: skip
            transaction.put(key.encode(), value)
    environment.close()
    (path / "lock.mdb").unlink()
    return path


def write_v2_lmdb(root, folder="lmdb"):
    """The v2 dataset of 4 samples as an LMDB, root/<folder>, and metadata.parquet in root."""
    patches = {s1_name(k): {"VH": -20.0 - k, "VV": -10.0 - k} for k in range(4)}
    write_lmdb(root / folder, patches | {s2_name(k): {"B02": np.zeros((120, 120), np.uint16)} for k in range(2)})
    v2_frame().to_parquet(root / "metadata.parquet")
    return root


# ---- V1 ------------------------------------------------------------------------------------------

V1_LABELS = [
    ["Non-irrigated arable land", "Mixed forest"],
    ["Water bodies", "Bare rock"],
    ["Airports"],  # no class in the 19-class nomenclature
]
V1_CLASSES = [(ARABLE, MIXED), (INLAND,), ()]


def write_v1_patch(root, k, labels=None, vh=None):
    name = s1_name(k)
    write_tif(root / name / f"{name}_VH.tif", -20.0 - k if vh is None else vh)
    write_tif(root / name / f"{name}_VV.tif", -10.0 - k)
    metadata = {"labels": V1_LABELS[k] if labels is None else labels, "corresponding_s2_patch": s2_name(k)}
    (root / name / f"{name}_labels_metadata.json").write_text(json.dumps(metadata))
    return root / name


def write_v1(root):
    """A v1 dataset of 3 samples, without split lists."""
    for k in range(3):
        write_v1_patch(root, k)
    return root


def write_v1_zarr(path, zarr_format, fill=np.nan):
    """The same samples as a Zarr store."""
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format).create_group("sentinel1")
    for k in range(3):
        patch = group.create_group(s1_name(k), attributes={"labels": V1_LABELS[k]})
        for channel, value in (("VH", -20.0 - k), ("VV", -10.0 - k)):
            array = patch.create_array(channel, shape=(120, 120), chunks=(120, 120), dtype="float32", fill_value=fill)
            array[:] = value
    return path


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def classes_of(labels):
    """Indices of the classes that are on in a multi-hot vector."""
    return tuple(np.flatnonzero(np.asarray(labels)).tolist())
