# SPDX-License-Identifier: MIT
"""Input that is broken, or made to do harm: each is answered with one line that names it, and nothing is lost or half-written."""

import argparse
import codecs
import copyreg
import csv
import functools
import gzip
import hashlib
import importlib
import io
import json
import logging
import marshal
import operator
import os
import pathlib
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import timeit
import traceback
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import main_finetune
import main_pretrain
from common.errors import UsageError
from models_mixmim import mixmim_tiny
from models_mixmim_ft import SIZES
from sarwmix import sen12_data_prep, sen12_prune_partial_pairs
from sarwmix.packed_store import manifest_checksum
from sarwmix.prepare import benv1_to_zarr, benv2_csv, pack, sen12_unzip, statistics
from sarwmix.selection import RULES
from sarwmix.sen12_data_prep import prepare
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import (
    s1_name,
    s2_name,
    v2_frame,
    write_csv,
    write_tif,
    write_v1,
    write_v1_zarr,
    write_v2,
    write_v2_lmdb,
)
from tests.helpers.floods import write_floods
from tests.helpers.runs import digests
from tests.helpers.sen12 import S, align, image_name, write_raw
from tests.helpers.zips import GOOD, HOSTILE, make, patch
from util.checkpoint import load_checkpoint

TINY = (
    "--model",
    "mixmim_tiny",
    "--batch_size",
    2,
    "--num_workers",
    0,
    "--warmup_epochs",
    0,
    "--lr",
    1e-3,
    "--epochs",
    1,
    "--device",
    "cpu",
    "--output_dir",
    "{out}",
)
SMALL = (*TINY, "--input_size", 64)
PRETRAIN = (main_pretrain, *SMALL, "--data_path", "{data}", "--split", "all", "--save_epochs")
FINETUNE = (main_finetune, *SMALL, "--data_path", "{data}", "--finetune", "")
STEP = ("--workers", 1, "--out", "{out}")

# What is run on an input: program and flags.
USES = {
    "pretrain v2": (*PRETRAIN, "--dataset", "benv2"),
    "finetune v2": (*FINETUNE, "--dataset", "benv2"),
    "pretrain v1": (*PRETRAIN, "--dataset", "benv1", "--split", "train_val"),
    "pretrain v1, id_col": (*PRETRAIN, "--dataset", "benv1", "--split", "train_val", "--id_col", 9),
    "pretrain v2, id_col": (*PRETRAIN, "--dataset", "benv2", "--id_col", 0),
    "finetune floods": (main_finetune, *TINY, "--data_path", "{data}", "--finetune", "", "--dataset", "sen12flood"),
    "verify store": (pack, "--verify", "{data}", "--workers", 1),
    "statistics": (
        statistics,
        "--dataset",
        "benv2",
        "--data_path",
        "{data}",
        "--split",
        "all",
        "--out",
        "{out}.json",
        "--workers",
        1,
    ),
    "csv": (benv2_csv, "--metadata", "{data}/metadata.parquet", "--out", "{out}"),
    "zarr": (
        benv1_to_zarr,
        "--root",
        "{data}",
        "--train",
        "{data}/benv1_train.csv",
        "--val",
        "{data}/benv1_val.csv",
        *STEP,
    ),
    "list": (sen12_data_prep, "--list_only", "--s1_list", "{data}/S1list.json", *STEP),
    "prepare": (sen12_data_prep, "--aligned", "{data}/aligned", *STEP),
    "prune": (sen12_prune_partial_pairs, "--aligned", "{data}/aligned", "--pairs", "{data}/pairs", "--size", S, *STEP),
    "verify floods": (sen12_prune_partial_pairs, "--verify", "--out", "{data}/final", "--workers", 1),
    "unzip": (sen12_unzip, "--zip", "{data}/data.zip", *STEP),
}


@pytest.fixture
def start(program, capsys):
    """start((program, *flags), **places) → (exit status, stdout, stderr); what a program lets through is a traceback there."""

    def run(use, **places):
        module, *flags = use
        flags = [str(flag).format(**places) for flag in flags]
        try:
            if module in (main_pretrain, main_finetune):
                return program(module, *flags)
            capsys.readouterr()
            status = 0
            try:
                module.main(flags)
            except SystemExit as end:
                status = end.code
            return status, *capsys.readouterr()
        except Exception:
            return None, "", traceback.format_exc()

    return run


def is_one_line(result, *words):
    """Whether a run ended with status 2 and one line that holds all these words."""
    status, _, err = result
    return status == 2 and len(err.splitlines()) == 1 and "Traceback" not in err and all(word in err for word in words)


def kept(folder):
    """{path: checksum} of all that may not change; a lock may be there, and then empty."""
    return {name: digest for name, digest in digests(folder).items() if Path(name).name != ".lock"}


# ---- Whole inputs --------------------------------------------------------------------------------


def write_official(root):
    """Metadata with all official columns, and no image."""
    root.mkdir()
    v2_frame().assign(s2v1_name="S2A", contains_cloud_or_shadow=False).to_parquet(root / "metadata.parquet")


def write_split_csv(root):
    """The metadata as a CSV dump for each split instead of the parquet file."""
    write_v2(root)
    (root / "metadata.parquet").unlink()
    frame = v2_frame()
    frame["labels"] = frame["labels"].map(str)
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        frame[frame["split"] == split].to_csv(root / f"benv2_{name}.csv", index=False)


def write_lists(root, columns=2):
    """Version 1 with split lists of S2 and S1 names, or of S2 names alone."""
    write_v1(root)
    for split, numbers in (("train", (0, 1)), ("val", (2,))):
        write_csv(root / f"benv1_{split}.csv", [[s2_name(k), s1_name(k)][:columns] for k in numbers])


def write_store(root):
    write_v2(root.with_name("source"))
    pack.main(
        ["--dataset", "benv2", "--data_path", str(root.with_name("source")), "--out", str(root), "--workers", "1"]
    )


def write_pairs(root):
    """Floods with a file for each pair."""
    for part, folder in (("train", "0001"), ("train", "0002"), ("test", "7")):
        for label in (0, 1):
            images = np.random.default_rng(int(folder) + label).gamma(4, 0.02, (2, 2, 128, 128)).astype(np.float32)
            (root / part).mkdir(parents=True, exist_ok=True)
            np.save(root / part / f"{folder}__a__b{label}__{label}.npy", images)


def write_steps(root):
    """What every step of the preparation of floods leaves, and the list that they begin with."""
    write_raw(root / "raw", {"0001": (False, True, False), "5": (False, True)})
    align(root / "raw", root / "aligned", size=S)
    prepare(root / "pairs", root / "aligned")
    sen12_prune_partial_pairs.prune(root / "aligned", root / "pairs", root / "final", size=S)
    shutil.copy(root / "raw" / "S1list.json", root)


def write_zip(root):
    make(root / "data.zip", {"S1list.json": b"{}", f"0001/{image_name(0)}_corrected_VV.tif": b"VV" * 100})


# name → (what writes it, what is run on it)
BASES = {
    "v2": (write_v2, ("pretrain v2", "finetune v2")),
    "v2 to measure": (write_v2, ("statistics",)),
    "official": (write_official, ("csv",)),
    "v2 csv": (write_split_csv, ("pretrain v2", "finetune v2")),
    "v1": (write_v1, ("pretrain v1",)),
    "v1 lists": (write_lists, ("pretrain v1", "zarr")),
    "v1 s2 lists": (functools.partial(write_lists, columns=1), ("pretrain v1",)),
    "zarr 2": (functools.partial(write_v1_zarr, zarr_format=2), ("pretrain v1",)),
    "zarr 3": (functools.partial(write_v1_zarr, zarr_format=3), ("pretrain v1",)),
    "lmdb": (write_v2_lmdb, ("pretrain v2", "finetune v2")),
    "store": (write_store, ("pretrain v2", "finetune v2")),
    "store to verify": (write_store, ("verify store",)),
    "floods": (write_floods, ("finetune floods",)),
    "pairs": (write_pairs, ("finetune floods",)),
    "list": (write_steps, ("list",)),
    "aligned": (write_steps, ("prepare",)),
    "candidates": (write_steps, ("prune",)),
    "final": (write_steps, ("verify floods",)),
    "zip": (write_zip, ("unzip",)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(name): the folder of a whole input, written when it is first asked for."""
    made = {}

    def written(name):
        writer = BASES[name][0]
        key = (writer.func, *writer.keywords.items()) if isinstance(writer, functools.partial) else writer
        if key not in made:
            folder = tmp_path_factory.mktemp("whole") / "data"
            writer(folder)  # may skip the test
            made[key] = folder
        return made[key]

    return written


@pytest.mark.parametrize("name, use", [(name, use) for name, (_, uses) in BASES.items() for use in uses])
def test_a_whole_input_is_accepted(name, use, base, start, tmp_path):
    shutil.copytree(base(name), tmp_path / "data")
    status, out, err = start(USES[use], data=tmp_path / "data", out=tmp_path / "run")
    assert (status, err) == (0, "")
    assert (tmp_path / "run").exists() or (tmp_path / "run.json").exists() or "verify" in use


# ---- Breaking them -------------------------------------------------------------------------------

DEEP = "[" * 100_000  # JSON that takes more recursion than Python has
JUNK = bytes(range(128, 256)) * 8


def put(path, content):
    """Replace whatever has this name."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def cut(path, share=0.5):
    put(path, path.read_bytes()[: int(path.stat().st_size * share)])


def edit(path, old, new):
    """Replace the first occurrence of a text."""
    content = path.read_text(encoding="utf-8")
    assert old in content
    put(path, content.replace(old, new, 1))


def recode(path, encoding, old="Austria", new="Österreich"):
    put(path, path.read_text(encoding="utf-8").replace(old, new).encode(encoding))


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_link(path, target):
    path.unlink()
    path.symlink_to(target)


def change(path, **values):
    """Other values of a JSON object; ... removes one."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    put(path, json.dumps({key: value for key, value in content.items() if value is not ...}))


def cell(path, column, value, row=1):
    """Another cell of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[row][rows[0].index(column)] = value
    write_csv(path, rows)


# GeoTIFF ------------------------------------------------------------------------------------------------------------


def tif(root, channel="VH"):
    name = s1_name(2)
    return root / "BigEarthNet-S1" / name.rsplit("_", 3)[0] / name / f"{name}_{channel}.tif"


def tag(path, number, value):
    """Overwrite the value of a TIFF tag: 256 width, 257 height, 273 where the pixels are."""
    content = bytearray(path.read_bytes())
    (directory,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, directory)
    (at,) = (
        at
        for at in range(directory + 2, directory + 2 + 12 * entries, 12)
        if struct.unpack_from("<H", content, at) == (number,)
    )
    struct.pack_into("<HIII", content, at + 2, 4, 1, value, *struct.unpack_from("<I", content, at + 12))
    put(path, content)


def band(value, dtype=np.float32, shape=(120, 120)):
    return np.full(shape, value, dtype)


def every_tif(root, value):
    for path in root.rglob("*_VH.tif"):
        write_tif(path, value)


def spotted(image, value):
    """The image (..., H, W) with its upper tenth at one value."""
    image = image.copy()
    image[..., : -(-image.shape[-2] // 10), :] = value
    return image


def swap(root):
    """Exchange VH and VV of every patch."""
    for vh in root.rglob("*_VH.tif"):
        vv, aside = vh.with_name(vh.name.replace("_VH", "_VV")), vh.with_suffix(".aside")
        vh.rename(aside)
        vv.rename(vh)
        aside.rename(vv)


VRT = (
    '<VRTDataset rasterXSize="120" rasterYSize="120"><VRTRasterBand dataType="Float32" band="1"><SimpleSource>'
    "<SourceFilename>/etc/passwd</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
)
NAMED, LACKS = (f"{s1_name(2)}_VH.tif", "metadata.parquet: row 2"), ("1 of", s1_name(2), "metadata.parquet: row 2")
GEOTIFF = {
    "truncated": (lambda r: cut(tif(r)), (*NAMED, "truncated")),
    "a byte short": (lambda r: put(tif(r), tif(r).read_bytes()[:-1]), (*NAMED, "truncated")),
    "nothing but a header": (lambda r: put(tif(r), tif(r).read_bytes()[:8]), NAMED),
    "empty": (lambda r: put(tif(r), b""), (*LACKS, "VH")),
    "junk for a header": (lambda r: put(tif(r), JUNK[:16] + tif(r).read_bytes()[16:]), NAMED),
    "text": (lambda r: put(tif(r), "no image"), (*NAMED, "not a GeoTIFF")),
    "the page of an expired link": (lambda r: put(tif(r), "<html>404</html>" * 99), (*NAMED, "not a GeoTIFF")),
    "a VRT that names another file": (lambda r: put(tif(r), VRT), (*NAMED, "not a GeoTIFF")),
    "60 by 60": (lambda r: write_tif(tif(r), band(-20, shape=(60, 60))), (*NAMED, "60x60 pixels")),
    "119 by 120": (lambda r: write_tif(tif(r), band(-20, shape=(119, 120))), (*NAMED, "119x120 pixels")),
    "two bands": (lambda r: write_tif(tif(r), band(-20, shape=(2, 120, 120))), (*NAMED, "has 2 bands")),
    "described as VV": (lambda r: write_tif(tif(r), -20, ["VV"]), (*NAMED, "holds VV")),
    "int16": (lambda r: write_tif(tif(r), band(-2000, np.int16)), (*NAMED, "holds int16")),
    "uint8": (lambda r: write_tif(tif(r), band(20, np.uint8)), (*NAMED, "holds uint8")),
    "complex": (lambda r: write_tif(tif(r), band(-20 + 1j, np.complex64)), (*NAMED, "complex")),
    "NaN": (lambda r: write_tif(tif(r), np.nan), (*NAMED, "100.00%", "--max_nonfinite")),
    "infinite": (lambda r: write_tif(tif(r), -np.inf), (*NAMED, "100.00%")),
    "no data": (lambda r: write_tif(tif(r), -9999.0, nodata=-9999.0), (*NAMED, "100.00%")),
    "no data without a tag": (
        lambda r: write_tif(tif(r), spotted(band(-20.0), -9999)),
        (*NAMED, "10.00% of the VH pixels are below -100 dB", "gdal_edit.py -a_nodata -9999"),
    ),
    "dB times 100": (lambda r: write_tif(tif(r), -2000.0), (*NAMED, "100.00% of the VH pixels", "dB times 10 or 100")),
    "VH and VV swapped": (swap, ("data", "VH is brighter than VV", "swapped")),
    "linear in one file": (lambda r: write_tif(tif(r), 0.05), (f"{s1_name(2)}_VH.tif", "looks linear", "--dataset")),
    "linear in all files": (lambda r: every_tif(r, 0.05), ("_VH.tif", "looks linear")),
    "missing VH": (lambda r: tif(r).unlink(), (*LACKS, "VH")),
    "missing VV": (lambda r: tif(r, "VV").unlink(), (*LACKS, "VV")),
    "a patch without its folder": (lambda r: shutil.rmtree(tif(r).parent), (*LACKS, "VH and VV")),
    "a folder": (lambda r: as_folder(tif(r)), (*LACKS, "VH")),
    "a pipe": (lambda r: (tif(r).unlink(), os.mkfifo(tif(r))), (*LACKS, "VH")),
    "a link to itself": (lambda r: as_link(tif(r), tif(r)), (*LACKS, "VH")),
    "a link to nowhere": (lambda r: as_link(tif(r), r / "nowhere.tif"), (*LACKS, "VH")),
    "a directory beyond the end": (
        lambda r: put(tif(r), tif(r).read_bytes()[:4] + b"\xf0\xff\xff\x7f" + tif(r).read_bytes()[8:]),
        NAMED,
    ),
    "pixels beyond the end": (lambda r: tag(tif(r), 273, 2**31), NAMED),
    "wider than memory": (lambda r: tag(tif(r), 256, 2**30), (*NAMED, "claims to have 120x1073741824 pixels")),
    "without a width": (lambda r: tag(tif(r), 256, 0), NAMED),
}

# metadata.parquet ---------------------------------------------------------------------------------------------------


def rewrite(root, **columns):
    """Other values of columns of metadata.parquet, a list for all rows; ... removes one."""
    table = pq.read_table(metadata(root))
    for name, values in columns.items():
        table = (
            table.drop_columns(name)
            if values is ...
            else table.set_column(table.column_names.index(name), name, pa.array(values))
        )
    pq.write_table(table, root / "metadata.parquet")


def rename(root, number, name):
    names = [s1_name(k) for k in range(4)]
    names[number] = name
    rewrite(root, s1_name=names)


def relabel(root, number, names):
    labels = v2_frame()["labels"].tolist()
    labels[number] = names
    rewrite(root, labels=labels)


def twice(root, column):
    table = pq.read_table(metadata(root))
    pq.write_table(table.append_column(column, table[column]), root / "metadata.parquet")


def metadata(root):
    return root / "metadata.parquet"


NOT_UTF8 = pa.ListArray.from_arrays([0, 1, 2, 3, 4], pa.array([b"\xffastures"] * 4).view(pa.string()))
HERE, ROW = "metadata.parquet", "metadata.parquet: row 1"
PARQUET = {
    "truncated": (lambda r: cut(metadata(r)), (HERE, "cannot be read as a parquet")),
    "empty": (lambda r: put(metadata(r), b""), (HERE, "cannot be read as a parquet")),
    "text": (lambda r: put(metadata(r), "s1_name,labels\n"), (HERE, "cannot be read as a parquet")),
    "nothing but its signs": (lambda r: put(metadata(r), b"PAR1" * 3), (HERE, "cannot be read as a parquet")),
    "encrypted": (
        lambda r: put(metadata(r), metadata(r).read_bytes()[:-4] + b"PARE"),
        (HERE, "cannot be read as a parquet"),
    ),
    "a folder": (lambda r: as_folder(metadata(r)), (HERE, "cannot be read as a parquet")),
    "a link to itself": (lambda r: as_link(metadata(r), metadata(r)), (HERE,)),
    "text that is not UTF-8": (lambda r: rewrite(r, labels=NOT_UTF8), (HERE, "utf-8")),
    "no column s1_name": (lambda r: rewrite(r, s1_name=...), (HERE, "no column s1_name")),
    "two columns labels": (lambda r: twice(r, "labels"), (HERE, "2 columns labels")),
    "two columns s1_name": (lambda r: twice(r, "s1_name"), (HERE, "2 columns s1_name")),
    "labels that are numbers": (lambda r: rewrite(r, labels=[1, 2, 3, 4]), (ROW, "labels that cannot be read")),
    "labels that are lists of numbers": (lambda r: rewrite(r, labels=[[1], [2], [3], [4]]), (ROW, "unknown label '2'")),
    "labels that are lists of lists": (lambda r: rewrite(r, labels=[[["Pastures"]]] * 4), (ROW, "unknown label")),
    "labels that are records": (lambda r: rewrite(r, labels=[[{"a": "Pastures"}]] * 4), (ROW, "unknown label")),
    "labels that are text": (lambda r: rewrite(r, labels=["Pastures"] * 4), (ROW, "not a printed list")),
    "an unknown label": (lambda r: relabel(r, 1, ["Pastures", "Sea"]), (ROW, "unknown label 'Sea'")),
    "a label of version 1": (lambda r: relabel(r, 1, ["Sea and ocean"]), (ROW, "unknown label")),
    "a null within labels": (lambda r: relabel(r, 1, ["Pastures", None]), (ROW, "unknown label 'None'")),
    "an unknown split": (lambda r: rewrite(r, split=["train", "dev", "test", "train"]), (ROW, "unknown split")),
    "a null split": (lambda r: rewrite(r, split=["train", None, "test", "train"]), (ROW, "unknown split")),
    "splits that are numbers": (lambda r: rewrite(r, split=[0, 1, 2, 0]), (ROW, "unknown split")),
    "a null id": (lambda r: rename(r, 1, None), (ROW, "no S1 patch name")),
    "ids that are numbers": (lambda r: rewrite(r, s1_name=[0, 1, 2, 3]), (ROW, "no S1 patch name")),
    "the same id twice": (lambda r: rename(r, 3, s1_name(0)), ("metadata.parquet: row 3", "repeat an id", s1_name(0))),
    "an id that leads elsewhere": (lambda r: rename(r, 1, "../../etc/passwd"), (ROW, "'../../etc/passwd'")),
    "an id within that leads elsewhere": (
        lambda r: rename(r, 1, f"{s1_name(1)}/../../{s1_name(1)}"),
        (ROW, "no S1 patch name"),
    ),
    "an absolute id": (lambda r: rename(r, 1, "/etc/passwd"), (ROW, "'/etc/passwd'")),
    "an id with NUL": (lambda r: rename(r, 1, f"{s1_name(1)}\0.tif"), (ROW, r"no S1 patch name")),
    "an id with a line break": (lambda r: rename(r, 1, f"{s1_name(1)}\nx"), (ROW, r"no S1 patch name")),
    "an id with the name of a terminal": (lambda r: rename(r, 1, "S1A_\x1b[2J_a_b_c"), (ROW, r"\x1b")),
    "an endless id": (lambda r: rename(r, 1, "S1A_a_b_c_" + "x" * 100_000), (ROW, "no S1 patch name", "...")),
    "an empty id": (lambda r: rename(r, 1, ""), (ROW, "no S1 patch name")),
    "an id of Sentinel-2": (lambda r: rename(r, 1, s2_name(1)), (ROW, "no S1 patch name")),
    "no rows": (
        lambda r: pq.write_table(pq.read_table(metadata(r)).slice(0, 0), metadata(r)),
        (HERE, "no row of split"),
    ),
    "not there": (lambda r: metadata(r).unlink(), (HERE, "copy the dataset's metadata")),
}

# CSV ----------------------------------------------------------------------------------------------------------------


def train_csv(root):
    return root / "benv2_train.csv"


def header_of(path):
    return path.read_text(encoding="utf-8").splitlines()[0] + "\n"


UNQUOTED = "s1_name,labels,note\n" + "".join(
    f"{s1_name(k)},['Pastures'],{note}\n" for k, note in ((0, '"good'), (3, "good"))
)
TRAIN = ("benv2_train.csv",)
CSV = {
    "empty": (lambda r: put(train_csv(r), ""), (*TRAIN, "is empty")),
    "nothing but a header": (lambda r: put(train_csv(r), header_of(train_csv(r))), TRAIN),
    "no header": (
        lambda r: put(train_csv(r), train_csv(r).read_text().partition("\n")[2]),
        (*TRAIN, "no column s1_name"),
    ),
    "cut off in a row": (lambda r: cut(train_csv(r), 0.8), TRAIN),
    "a row too short": (lambda r: edit(train_csv(r), ",Austria", ""), (*TRAIN, "benv2_train.csv:2", "6 cells")),
    "a row too long": (lambda r: edit(train_csv(r), ",Austria", ",Austria,,"), ("benv2_train.csv:2", "6 cells")),
    "binary": (lambda r: put(train_csv(r), JUNK), (*TRAIN, "cannot be read as a CSV")),
    "blocks of zeros": (lambda r: edit(train_csv(r), "Austria", "\0" * 512), (*TRAIN, "NUL")),
    "Latin-1": (lambda r: recode(train_csv(r), "latin-1"), (*TRAIN, "utf-8")),
    "UTF-16": (lambda r: recode(train_csv(r), "utf-16"), (*TRAIN, "utf-8")),
    "a gzip": (
        lambda r: put(train_csv(r), gzip.compress(train_csv(r).read_bytes())),
        (*TRAIN, "cannot be read as a CSV"),
    ),
    "an unclosed quotation mark": (
        lambda r: edit(train_csv(r), "False", '"False'),
        (*TRAIN, "cannot be read as a CSV"),
    ),
    "one that swallows the rest": (lambda r: put(train_csv(r), UNQUOTED), (*TRAIN, "unexpected end of data")),
    "an unclosed bracket": (lambda r: edit(train_csv(r), "]", ""), ("benv2_train.csv:2", "not a printed list")),
    "a label without its quotation mark": (
        lambda r: edit(train_csv(r), "['Arable", "[Arable"),
        ("benv2_train.csv:2", "not a printed list"),
    ),
    "an unknown label": (
        lambda r: cell(train_csv(r), "labels", "['Sea']"),
        ("benv2_train.csv:2", "unknown label 'Sea'"),
    ),
    "an endless cell": (lambda r: edit(train_csv(r), "Austria", "A" * 200_000), (*TRAIN, "field limit")),
    "the same row twice": (
        lambda r: put(train_csv(r), train_csv(r).read_text() + train_csv(r).read_text().splitlines()[-1] + "\n"),
        ("benv2_train.csv:3", "benv2_train.csv:4", "repeat an id"),
    ),
    "a row of another list": (
        lambda r: put(r / "benv2_test.csv", train_csv(r).read_text().replace(",train,", ",test,")),
        (s1_name(0),),
    ),
    "an unknown split": (lambda r: cell(train_csv(r), "split", "dev"), ("unknown split: 'dev' (benv2_train.csv:2)",)),
    "two columns s1_name": (lambda r: edit(train_csv(r), "country", "s1_name"), (*TRAIN, "2 columns s1_name")),
    "an id that leads elsewhere": (
        lambda r: cell(train_csv(r), "s1_name", "../../etc/passwd"),
        ("benv2_train.csv:2", "no S1 patch name"),
    ),
    "an id in another column": (
        lambda r: edit(train_csv(r), "s1_name", "name"),
        (*TRAIN, "no column s1_name", "--id_col"),
    ),
    "a folder": (lambda r: as_folder(train_csv(r)), (*TRAIN, "cannot be read as a CSV")),
    "not there": (lambda r: (r / "benv2_val.csv").unlink(), ("benv2_val.csv",)),
}

# version 1 ----------------------------------------------------------------------------------------------------------


def labels_of(root):
    return root / s1_name(1) / f"{s1_name(1)}_labels_metadata.json"


V1_NAMED = (f"{s1_name(1)}_labels_metadata.json",)
V1 = {
    "a truncated JSON file": (lambda r: cut(labels_of(r)), (*V1_NAMED, "cannot be read as JSON")),
    "an empty JSON file": (lambda r: put(labels_of(r), ""), (*V1_NAMED, "cannot be read as JSON")),
    "a folder for a JSON file": (lambda r: as_folder(labels_of(r)), (*V1_NAMED, "Is a directory")),
    "brackets without end": (lambda r: put(labels_of(r), DEEP), (*V1_NAMED, "cannot be read as JSON")),
    "UTF-16": (lambda r: recode(labels_of(r), "utf-16"), (*V1_NAMED, "utf-8")),
    "no object": (lambda r: put(labels_of(r), "[1]"), (*V1_NAMED, "no JSON object")),
    "labels that are text": (lambda r: change(labels_of(r), labels="Pastures"), (*V1_NAMED, "no list of labels")),
    "labels within labels": (lambda r: change(labels_of(r), labels=[["Pastures"]]), (*V1_NAMED, "no list of labels")),
    "an unknown label": (lambda r: change(labels_of(r), labels=["Sea\n"]), (*V1_NAMED, r"unknown label 'Sea\n'")),
    "a truncated image": (
        lambda r: cut(r / s1_name(1) / f"{s1_name(1)}_VV.tif"),
        (f"{s1_name(1)}_VV.tif", "truncated"),
    ),
    "a missing image": (lambda r: (r / s1_name(1) / f"{s1_name(1)}_VV.tif").unlink(), (s1_name(1), "VV")),
    "a folder that is no patch": (lambda r: (r / "S1A_.._..").mkdir(), ("'S1A_.._..'", "no S1 patch name")),
    "no patches": (lambda r: [shutil.rmtree(path) for path in r.iterdir()], ("data", "no patch folders")),
}


def v1_train(root):
    return root / "benv1_train.csv"


V1_LISTS = {
    "a list without rows": (lambda r: put(v1_train(r), "\n\n"), ("benv1_train.csv", "lists no patch")),
    "a binary list": (lambda r: put(v1_train(r), JUNK), ("benv1_train.csv", "cannot be read as a CSV")),
    "an HTML page for a list": (
        lambda r: put(v1_train(r), "<html>\n<body>404, not found</body>\n"),
        ("benv1_train.csv", "--id_col"),
    ),
    "a ragged list": (lambda r: edit(v1_train(r), f",{s1_name(1)}", ""), ("benv1_train.csv:2", "no column 1")),
    "a name that leads elsewhere": (
        lambda r: edit(v1_train(r), s1_name(1), "S1A_../../../etc/passwd"),
        ("benv1_train.csv:2",),
    ),
    "a name twice": (
        lambda r: edit(v1_train(r), s1_name(1), s1_name(0)),
        ("benv1_train.csv:1", "benv1_train.csv:2", "repeat an id"),
    ),
    "an unclosed quotation mark": (
        lambda r: edit(v1_train(r), s2_name(0), f'"{s2_name(0)}'),
        ("benv1_train.csv", "unexpected end"),
    ),
    "a list that is a folder": (lambda r: as_folder(v1_train(r)), ("benv1_train.csv",)),
}
V1_S2_LISTS = {
    "a patch that is not there": (lambda r: edit(v1_train(r), s2_name(1), s2_name(7)), (s2_name(7),)),
    "no Sentinel-2 name": (
        lambda r: change(labels_of(r), corresponding_s2_patch=...),
        (*V1_NAMED, "corresponding_s2_patch"),
    ),
    "a Sentinel-2 name that is a number": (lambda r: change(labels_of(r), corresponding_s2_patch=7), (*V1_NAMED,)),
    "a name that leads elsewhere": (
        lambda r: edit(v1_train(r), s2_name(1), "S2A_../../x"),
        ("benv1_train.csv:2", "no S2 patch name"),
    ),
}

# Zarr ---------------------------------------------------------------------------------------------------------------


def patch_of(root):
    return root / "sentinel1" / s1_name(1)


def chunk_of(root):
    return next(
        path
        for path in sorted((patch_of(root) / "VH").rglob("*"))
        if path.is_file() and not path.name.startswith((".z", "zarr"))
    )


def resize(root, **values):
    change(patch_of(root) / "VH" / "zarr.json", **values)


VH_OF = f"{s1_name(1)}/VH"
GRID = {"name": "regular", "configuration": {"chunk_shape": [0, 0]}}
ZARR = {
    "an array is missing": (lambda r: shutil.rmtree(patch_of(r) / "VH"), (s1_name(1), "VH")),
    "no chunk": (lambda r: chunk_of(r).unlink(), (s1_name(1), "VH")),
    "a chunk cut off": (lambda r: cut(chunk_of(r)), (VH_OF, "copy it again")),
    "an empty chunk": (lambda r: put(chunk_of(r), b""), (VH_OF, "copy it again")),
    "a chunk of junk": (lambda r: put(chunk_of(r), JUNK), (VH_OF, "copy it again")),
}
ZARR_3 = {
    "attributes that are a list": (
        lambda r: change(patch_of(r) / "zarr.json", attributes=["Pastures"]),
        ("zarr.json", "no JSON object"),
    ),
    "attributes that are null": (
        lambda r: change(patch_of(r) / "zarr.json", attributes=None),
        ("zarr.json", "no JSON object"),
    ),
    "a group without its metadata": (
        lambda r: (patch_of(r) / "zarr.json").unlink(),
        (s1_name(1), "cannot be read as JSON"),
    ),
    "metadata cut off": (lambda r: cut(patch_of(r) / "zarr.json"), (s1_name(1), "cannot be read as JSON")),
    "metadata without end": (lambda r: put(patch_of(r) / "zarr.json", DEEP), (s1_name(1), "cannot be read as JSON")),
    "an array's metadata without end": (
        lambda r: put(patch_of(r) / "VH" / "zarr.json", DEEP),
        (VH_OF, "copy it again"),
    ),
    "an array's metadata a list": (lambda r: put(patch_of(r) / "VH" / "zarr.json", "[]"), (VH_OF, "copy it again")),
    "a shape beyond memory": (lambda r: resize(r, shape=[2**40, 2**20]), (VH_OF, "holds float32 of shape")),
    "an empty shape": (lambda r: resize(r, shape=[0, 0]), (VH_OF, "0x0 pixels")),
    "a negative shape": (lambda r: resize(r, shape=[-1, 120]), (VH_OF,)),
    "another shape": (lambda r: resize(r, shape=[60, 120]), (VH_OF,)),
    "chunks of no size": (lambda r: resize(r, chunk_grid=GRID), (VH_OF,)),
    "an unknown codec": (lambda r: resize(r, codecs=[{"name": "none such"}]), (VH_OF, "none such")),
    "whole numbers": (lambda r: resize(r, data_type="int32", fill_value=0), (VH_OF, "holds int32")),
    "complex numbers": (lambda r: resize(r, data_type="complex64", fill_value=[0, 0]), (VH_OF, "holds complex64")),
}
ZARR_2 = {
    "objects that would be unpickled": (
        lambda r: change(patch_of(r) / "VH" / ".zarray", dtype="|O", filters=[{"id": "pickle"}]),
        (VH_OF,),
    ),
    "an unknown compressor": (
        lambda r: change(patch_of(r) / "VH" / ".zarray", compressor={"id": "none such"}),
        (VH_OF, "none such"),
    ),
}

# LMDB ---------------------------------------------------------------------------------------------------------------


def data_of(root):
    return root / "lmdb" / "data.mdb"


def store_value(root, value):
    """Another value of patch 1, or none."""
    environment = lmdb.open(str(root / "lmdb"), map_size=2**28)
    with environment.begin(write=True) as transaction:
        transaction.delete(s1_name(1).encode())
        if value is not None:
            transaction.put(s1_name(1).encode(), value)
    environment.close()
    (root / "lmdb" / "lock.mdb").unlink()


def value_of(root):
    environment = lmdb.open(str(root / "lmdb"), readonly=True, lock=False)
    with environment.begin() as transaction:
        value = bytes(transaction.get(s1_name(1).encode()))
    environment.close()
    return value


def spoil_tree(root):
    """Overwrite the page of keys that a look-up begins with: a page that holds names, and not images."""
    content = bytearray(data_of(root).read_bytes())
    for at in range(8192, len(content), 4096):
        if content[at : at + 4096].count(b"S1A_IW") > 2:
            content[at : at + 4096] = b"\xff" * 4096
    put(data_of(root), content)


KEY = (s1_name(1), "lmdb")
LMDB = {
    "truncated": (lambda r: cut(data_of(r)), ("data.mdb", "is truncated")),
    "empty": (lambda r: put(data_of(r), b""), ("data.mdb", "cannot be read as an LMDB")),
    "text": (lambda r: put(data_of(r), "no LMDB " * 4096), ("data.mdb", "cannot be read as an LMDB")),
    "its first pages junk": (lambda r: put(data_of(r), JUNK * 8 + data_of(r).read_bytes()[8192:]), ("data.mdb",)),
    "its tree junk": (spoil_tree, ("data.mdb", "is damaged")),
    "a folder": (lambda r: as_folder(data_of(r)), ("no LMDB",)),
    "a key is missing": (lambda r: store_value(r, None), (s1_name(1), "lack data")),
    "an empty value": (lambda r: store_value(r, b""), (*KEY, "safetensors")),
    "a pickle for a value": (lambda r: store_value(r, pickle.dumps({"VH": 1})), (*KEY, "safetensors")),
    "a value cut off": (lambda r: store_value(r, value_of(r)[:-100]), (*KEY, "safetensors")),
    "a value with a lying header": (lambda r: store_value(r, b"\xff" * 8 + value_of(r)[8:]), (*KEY, "safetensors")),
    "a value too large": (lambda r: store_value(r, bytes(2**23)), (s1_name(1), "is damaged")),
}

# the packed store ---------------------------------------------------------------------------------------------------


def sign(root, **values):
    """Other values of a manifest with the right checksum, as no accident makes them."""
    manifest = json.loads((root / "manifest.json").read_text())
    manifest = {key: value for key, value in {**manifest, **values}.items() if value is not ...}
    put(root / "manifest.json", json.dumps({**manifest, "sha256": manifest_checksum(manifest)}))


def first_part(root, **values):
    parts = json.loads((root / "manifest.json").read_text())["parts"]
    sign(root, parts=[{**parts[0], **values}, *parts[1:]])


def swap(root, one, other):
    contents = [(root / name).read_bytes() for name in (one, other)]
    put(root / one, contents[1])
    put(root / other, contents[0])


MANIFEST, CONTRADICTS = ("manifest.json", "copy it again"), ("manifest.json", "contradicts itself")
STORE = {
    "a part cut off": (lambda r: cut(r / "part_00001.bin"), ("part_00001.bin has", "copy the store again")),
    "a part too long": (
        lambda r: put(r / "part_00001.bin", (r / "part_00001.bin").read_bytes() + b"x"),
        ("part_00001.bin has",),
    ),
    "a part is missing": (lambda r: (r / "part_00001.bin").unlink(), ("part_00001.bin",)),
    "no manifest": (lambda r: (r / "manifest.json").unlink(), ("manifest.json", "not finished")),
    "a manifest cut off": (lambda r: cut(r / "manifest.json"), (*MANIFEST, "cannot be read as JSON")),
    "a manifest that is a list": (lambda r: put(r / "manifest.json", "[]"), (*MANIFEST, "is damaged")),
    "a manifest without end": (lambda r: put(r / "manifest.json", DEEP), (*MANIFEST, "cannot be read as JSON")),
    "a manifest that was edited": (lambda r: edit(r / "manifest.json", "benv2", "benv1"), (*MANIFEST, "is damaged")),
    "a manifest of another program": (
        lambda r: sign(r, format="another"),
        ("manifest.json", "no packed store of version"),
    ),
    "a manifest of another version": (lambda r: sign(r, version=99), ("manifest.json", "no packed store of version")),
    "statistics are missing": (lambda r: sign(r, statistics=...), CONTRADICTS),
    "parts are missing": (lambda r: sign(r, parts=[]), CONTRADICTS),
    "checksums are missing": (lambda r: sign(r, files={}), CONTRADICTS),
    "a part that lies elsewhere": (lambda r: first_part(r, file="../part_00000.bin"), CONTRADICTS),
    "a part of more images": (lambda r: first_part(r, images=10**9), CONTRADICTS),
    "a part without a scale": (lambda r: first_part(r, scale=[]), CONTRADICTS),
    "a scale that is text": (lambda r: first_part(r, scale="ab"), CONTRADICTS),
    "images beyond memory": (lambda r: sign(r, shape=[2, 10**6, 10**6]), CONTRADICTS),
    "smaller images": (lambda r: sign(r, shape=[2, 60, 60]), CONTRADICTS),
    "an unknown coding": (lambda r: sign(r, dtype="object"), CONTRADICTS),
    "another floor": (lambda r: sign(r, floor_db="low"), CONTRADICTS),
    "other classes": (lambda r: sign(r, classes=["Sea"]), ("samples.parquet", "no column Sea")),
    "two images a sample": (lambda r: sign(r, images_per_sample=2), ("samples.parquet", "no column image_1")),
    "tables swapped": (lambda r: swap(r, "samples.parquet", "images.parquet"), ("images.parquet", "is damaged")),
    "samples are missing": (lambda r: (r / "samples.parquet").unlink(), ("samples.parquet",)),
    "a table cut off": (lambda r: cut(r / "images.parquet"), ("images.parquet", "is damaged")),
    "another dataset": (lambda r: sign(r, dataset="benv1"), ("data", "packed store of benv1")),
}
STORE_TO_VERIFY = {
    "no statistics": (lambda r: (r / "statistics.json").unlink(), ("statistics.json", "1 of 7 files")),
    "other statistics": (lambda r: edit(r / "statistics.json", "mean", "main"), ("statistics.json", "1 of 7 files")),
    "another list of bad images": (lambda r: put(r / "bad.csv", "image,reason\nx,y\n"), ("bad.csv", "1 of 7 files")),
    "a bit of a part": (
        lambda r: put(r / "part_00000.bin", b"\1" + (r / "part_00000.bin").read_bytes()[1:]),
        ("part_00000.bin",),
    ),
}

# floods -------------------------------------------------------------------------------------------------------------


def flood(root):
    return root / "images" / "0002" / "d1.npy"


def pair(root):
    return root / "train" / "0002__a__b1__1.npy"


def header(shape, descr="'<f4'"):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


def as_archive(path):
    np.savez(path.with_suffix(".npz"), images=np.load(path))
    path.with_suffix(".npz").rename(path)


def with_objects(path):
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


FLOOD, PAIRS_CSV = ("0002/d1.npy", "pairs_train.csv:5"), ("pairs_train.csv",)
FLOODS = {
    "truncated": (lambda r: cut(flood(r)), (*FLOOD, "truncated")),
    "empty": (lambda r: put(flood(r), b""), (*FLOOD, "is empty")),
    "text": (lambda r: put(flood(r), "no image"), (*FLOOD, "no .npy file")),
    "objects": (lambda r: with_objects(flood(r)), FLOOD),
    "a pickle": (lambda r: put(flood(r), pickle.dumps([1])), FLOOD),
    "an archive": (lambda r: as_archive(flood(r)), (*FLOOD, ".npz archive")),
    "beyond memory": (lambda r: put(flood(r), header((2, 128 * 10**9, 128 * 10**9))), FLOOD),
    "a type that is code": (lambda r: put(flood(r), header((2, 128, 128), "__import__('os').mkdir('ran')")), FLOOD),
    "one channel": (lambda r: np.save(flood(r), np.load(flood(r))[:1]), (*FLOOD, "of shape (1, 128, 128)")),
    "float64": (lambda r: np.save(flood(r), np.load(flood(r)).astype(np.float64)), (*FLOOD, "holds float64")),
    "another size": (lambda r: np.save(flood(r), np.ones((2, 256, 256), np.float32)), (*FLOOD, "256x256")),
    "NaN": (lambda r: np.save(flood(r), np.load(flood(r)) * np.float32("nan")), ("d1.npy", "100.00%")),
    "infinite": (lambda r: np.save(flood(r), np.load(flood(r)) + np.float32("inf")), ("d1.npy", "100.00%")),
    "dB": (
        lambda r: np.save(flood(r), 10 * np.log10(np.load(flood(r)) + np.float32(1e-6))),
        ("d1.npy", "looks like dB"),
    ),
    "no data without a tag": (
        lambda r: np.save(flood(r), spotted(np.load(flood(r)), -9999)),
        ("d1.npy: 10.16% of the VH pixels are below -1",),
    ),
    "times 10,000": (
        lambda r: [np.save(path, np.load(path) * 10000) for path in r.rglob("*.npy")],
        ("data", "on average, but images are between"),
    ),
    "missing": (lambda r: flood(r).unlink(), (*FLOOD, "does not exist")),
    "a folder": (lambda r: as_folder(flood(r)), (*FLOOD, "Is a directory")),
    "a link to itself": (lambda r: as_link(flood(r), flood(r)), FLOOD),
    "a list without its header": (
        lambda r: put(r / "pairs_train.csv", "0001,d0,d1,0\n"),
        (*PAIRS_CSV, "no column folder"),
    ),
    "an empty list": (lambda r: put(r / "pairs_train.csv", ""), (*PAIRS_CSV, "no column folder")),
    "a list with nothing but a header": (
        lambda r: put(r / "pairs_train.csv", "folder,first,second,label\n"),
        (*PAIRS_CSV, "no pair"),
    ),
    "a ragged list": (lambda r: edit(r / "pairs_train.csv", "d1,0\n", "d1\n"), ("pairs_train.csv:2",)),
    "a label of 2": (lambda r: cell(r / "pairs_train.csv", "label", "2"), ("pairs_train.csv:2", "label 0 or 1")),
    "a folder that leads elsewhere": (
        lambda r: cell(r / "pairs_train.csv", "folder", "../../etc"),
        ("pairs_train.csv:2", "../../etc"),
    ),
    "an unclosed quotation mark": (
        lambda r: edit(r / "pairs_train.csv", "d1,0", 'd1,"0'),
        (*PAIRS_CSV, "unexpected end of data"),
    ),
    "a pair twice": (
        lambda r: edit(r / "pairs_train.csv", "d0,d2,1", "d0,d1,0"),
        ("pairs_train.csv:2", "pairs_train.csv:3", "repeated"),
    ),
    "a binary list": (lambda r: put(r / "pairs_train.csv", JUNK), (*PAIRS_CSV, "cannot be read as a CSV")),
}
PAIRS = {
    "truncated": (lambda r: cut(pair(r)), (pair(Path()).name, "truncated")),
    "of another shape": (
        lambda r: np.save(pair(r), np.load(pair(r))[0]),
        (pair(Path()).name, "of shape (2, 128, 128)"),
    ),
    "objects": (lambda r: with_objects(pair(r)), (pair(Path()).name,)),
    "dB": (lambda r: np.save(pair(r), np.load(pair(r)) - 30), (pair(Path()).name, "looks like dB")),
    "a name without a label": (
        lambda r: pair(r).rename(r / "train" / "0002__a__b1.npy"),
        ("'0002__a__b1.npy'", "not named"),
    ),
    "a name with a line break": (
        lambda r: pair(r).rename(r / "train" / "0002__a__b\n1__1.npy"),
        (r"b\n1__1.npy", "not named"),
    ),
    "both layouts": (lambda r: (r / "images").mkdir(), ("data", "both images and train, test")),
    "neither layout": (lambda r: [shutil.rmtree(path) for path in r.iterdir()], ("data", "neither of the layouts")),
}

# the preparation of floods ------------------------------------------------------------------------------------------


def s1_list(root):
    return root / "S1list.json"


def entries(root, **values):
    """Other entries of folder 0001 of the list."""
    content = json.loads(s1_list(root).read_text())
    content["0001"] = {key: value for key, value in {**content["0001"], **values}.items() if value is not ...}
    put(s1_list(root), json.dumps(content))


def image(**values):
    return {"1": {"filename": image_name(0), "FLOODING": False, **values}}


LISTED = ("S1list.json",)
S1_LIST = {
    "truncated": (lambda r: cut(s1_list(r)), (*LISTED, "cannot be read as JSON")),
    "empty": (lambda r: put(s1_list(r), ""), (*LISTED, "cannot be read as JSON")),
    "a list": (lambda r: put(s1_list(r), "[]"), (*LISTED, "holds no folders")),
    "null": (lambda r: put(s1_list(r), "null"), (*LISTED, "holds no folders")),
    "brackets without end": (lambda r: put(s1_list(r), DEEP), (*LISTED, "cannot be read as JSON")),
    "objects without end": (lambda r: put(s1_list(r), '{"1":' * 100_000), (*LISTED, "cannot be read as JSON")),
    "an endless number": (
        lambda r: put(s1_list(r), '{"1": ' + "9" * 10_000 + "}"),
        (*LISTED, "cannot be read as JSON"),
    ),
    "UTF-16": (lambda r: recode(s1_list(r), "utf-16"), (*LISTED, "utf-8")),
    "a folder": (lambda r: as_folder(s1_list(r)), (*LISTED, "Is a directory")),
    "not there": (lambda r: s1_list(r).unlink(), (*LISTED, "cannot be read as JSON")),
    "a folder that leads elsewhere": (
        lambda r: edit(s1_list(r), '"0001"', '"../../etc"'),
        (*LISTED, "folder '../../etc'"),
    ),
    "a folder with a line break": (lambda r: edit(s1_list(r), '"0001"', r'"00\n01"'), (*LISTED, r"folder '00\n01'")),
    "a folder of half a character": (lambda r: edit(s1_list(r), '"0001"', r'"\ud800"'), (*LISTED, r"\ud800")),
    "entries that are a list": (lambda r: put(s1_list(r), '{"0001": [1]}'), (*LISTED, "folder '0001'")),
    "an image that leads elsewhere": (
        lambda r: entries(r, **image(filename="../../etc/passwd")),
        (*LISTED, "'../../etc/passwd'"),
    ),
    "an image that is null": (lambda r: entries(r, **image(filename=None)), (*LISTED, "0001 entry 1")),
    "an image that is a list": (lambda r: entries(r, **image(filename=[1])), (*LISTED, "0001 entry 1")),
    "an image of the 13th month": (
        lambda r: entries(r, **image(filename=image_name(0).replace("20190101T", "20191301T"))),
        (*LISTED, "20191301T"),
    ),
    "FLOODING that is a number": (lambda r: entries(r, **image(FLOODING=1)), (*LISTED, "0001 entry 1")),
    "no FLOODING": (lambda r: entries(r, **{"1": {"filename": image_name(0)}}), (*LISTED, "0001 entry 1")),
    "an image twice": (lambda r: entries(r, **image(filename=image_name(1))), (*LISTED, "twice")),
    "another count": (lambda r: entries(r, count=7), (*LISTED, "but count 7")),
    "a count that is a list": (lambda r: entries(r, count=[3]), (*LISTED, "but count [3]")),
}


def cells(folder, name, column, value):
    return lambda r: cell(r / folder / name, column, value)


ALIGNED = {
    "a table cut off": (lambda r: cut(r / "aligned" / "align.csv", 0.9), ("align.csv", "run python -m")),
    "a binary table": (lambda r: put(r / "aligned" / "align.csv", JUNK), ("align.csv", "cannot be read as a CSV")),
    "no table": (lambda r: (r / "aligned" / "align.csv").unlink(), ("align.csv", "does not exist")),
    "an unclosed quotation mark": (
        lambda r: edit(r / "aligned" / "align.csv", ",aligned", ',"aligned'),
        ("align.csv", "unexpected end"),
    ),
    "a count that is text": (cells("aligned", "align.csv", "nonfinite", "many"), ("align.csv", "nonfinite 'many'")),
    "a count is missing": (cells("aligned", "align.csv", "nonfinite", ""), ("align.csv", "do not say whether")),
    "another status": (cells("aligned", "align.csv", "status", "perhaps"), ("align.csv", "status 'perhaps'")),
    "an image that leads elsewhere": (
        cells("aligned", "align.csv", "image", "../../etc/passwd"),
        ("align.csv", "image '../../etc/passwd'"),
    ),
    "a record without end": (lambda r: put(r / "aligned" / "step.json", DEEP), ("step.json", "cannot be read as JSON")),
    "an image cut off": (
        lambda r: cut(next((r / "aligned" / "0001").glob("*.tif"))),
        (".tif", "truncated", "run python -m"),
    ),
    "a record of another program": (
        lambda r: change(r / "aligned" / "step.json", program="other"),
        ("step.json", "is not of"),
    ),
}
CANDIDATES = {
    "a height that is text": (cells("pairs", "images.csv", "height", "tall"), ("images.csv", "height 'tall'")),
    "a negative height": (cells("pairs", "images.csv", "height", "-128"), ("images.csv", "height '-128'")),
    "a share that is no number": (cells("pairs", "images.csv", "zeros_vh", "nan"), ("images.csv", "zeros_vh 'nan'")),
    "a folder that leads elsewhere": (
        cells("pairs", "pairs.csv", "folder", "../../../etc"),
        ("pairs.csv", "folder '../../../etc'"),
    ),
    "an image that leads elsewhere": (
        cells("pairs", "pairs.csv", "first", "../../../etc/passwd"),
        ("pairs.csv", "first '../../../etc/passwd'"),
    ),
    "a split that leads elsewhere": (
        cells("pairs", "pairs.csv", "split", "../../evil"),
        ("pairs.csv", "split '../../evil'"),
    ),
    "another label": (cells("pairs", "pairs.csv", "label", "7"), ("pairs.csv", "label '7'")),
    "a record without its past": (
        lambda r: change(r / "pairs" / "step.json", aligned=...),
        ("--pairs", "was not made from"),
    ),
    "a record with another past": (
        lambda r: change(r / "pairs" / "step.json", aligned=[1]),
        ("--pairs", "was not made from"),
    ),
    "a record that lacks a list": (
        lambda r: change(r / "pairs" / "step.json", s1_list_sha256=...),
        ("step.json", "does not say"),
    ),
}
FINAL = {
    "a record without end": (
        lambda r: put(r / "final" / "preparation.json", DEEP),
        ("preparation.json", "cannot be read as JSON"),
    ),
    "a record that is a list": (
        lambda r: put(r / "final" / "preparation.json", "[]"),
        ("preparation.json", "does not say"),
    ),
    "a record without checksums": (
        lambda r: change(r / "final" / "preparation.json", checksums_sha256=...),
        ("preparation.json",),
    ),
    "other checksums": (
        cells("final", "checksums.csv", "sha256", "0" * 64),
        ("checksums.csv", "not as it was written"),
    ),
    "an image cut off": (lambda r: cut(next((r / "final").rglob("*.npy"))), (".npy differs",)),
    "an image too many": (
        lambda r: shutil.copy(next((r / "final").rglob("*.npy")), r / "final" / "x.npy"),
        ("x.npy is not listed",),
    ),
}

# base → {name: (how it is broken, words of the line)}
BROKEN = {
    "v2": {
        **{f"GeoTIFF: {name}": case for name, case in GEOTIFF.items()},
        **{f"parquet: {name}": case for name, case in PARQUET.items()},
    },
    "v2 to measure": {
        name: GEOTIFF[name]
        for name in ("truncated", "text", "60 by 60", "int16", "complex", "NaN", "wider than memory")
    },
    "official": {
        name: PARQUET[name]
        for name in (
            "truncated",
            "empty",
            "text",
            "an unknown label",
            "an unknown split",
            "the same id twice",
            "an id that leads elsewhere",
            "labels that are lists of lists",
        )
    },
    "v2 csv": CSV,
    "v1": V1,
    "v1 lists": V1_LISTS,
    "v1 s2 lists": V1_S2_LISTS,
    "zarr 2": {**ZARR, **ZARR_2},
    "zarr 3": {**ZARR, **ZARR_3},
    "lmdb": LMDB,
    "store": STORE,
    "store to verify": STORE_TO_VERIFY,
    "floods": FLOODS,
    "pairs": PAIRS,
    "list": S1_LIST,
    "aligned": ALIGNED,
    "candidates": CANDIDATES,
    "final": FINAL,
}
RECORDS = {"step.json", "pairs.csv"}  # of a step that was begun; it is continued when its input is mended


@pytest.mark.parametrize(
    "name, case, use", [(name, case, use) for name, cases in BROKEN.items() for case in cases for use in BASES[name][1]]
)
def test_broken_input_is_one_line_and_leaves_nothing(name, case, use, base, start, tmp_path, count, recwarn):
    damage, words = BROKEN[name][case]
    shutil.copytree(base(name), tmp_path / "data")
    damage(tmp_path / "data")
    broken = kept(tmp_path)
    result = start(USES[use], data=tmp_path / "data", out=tmp_path / "run")
    left = {
        path for path, digest in kept(tmp_path).items() if broken.get(path) != digest and Path(path).name not in RECORDS
    }
    good = is_one_line(result, *words) and not left and broken.keys() <= kept(tmp_path).keys()
    good = good and not recwarn.list  # warnings would be lines of stderr, too
    assert count("corrupted inputs answered with one line", good), (
        result,
        left,
        [str(warning.message) for warning in recwarn],
    )


@pytest.mark.parametrize(
    "name, use, column, words",
    [
        ("v2 csv", "pretrain v2", 0, ("benv2_train.csv:2", "no S1 patch name", "--id_col")),
        ("v2 csv", "pretrain v2", 99, ("benv2_train.csv", "no column 99")),
        ("v2 csv", "pretrain v2", -1, ("benv2_train.csv", "no column -1")),
        ("v2", "finetune v2", 1, ("metadata.parquet: row 0", "no S1 patch name")),
        ("v1 lists", "pretrain v1", 9, ("benv1_train.csv", "no column 9")),
        ("v1 lists", "pretrain v1", -1, ("benv1_train.csv", "counts from 0")),
        ("store", "pretrain v2", 1, ("data", "leave --metadata, --id_col")),
    ],
)
def test_a_wrong_column_is_one_line(name, use, column, words, base, start, tmp_path, count):
    result = start((*USES[use], "--id_col", column), data=base(name), out=tmp_path / "run")
    assert count("corrupted inputs answered with one line", is_one_line(result, *words) and not kept(tmp_path)), result


# ---- Zips ----------------------------------------------------------------------------------------

VICTIM = f"0001/{image_name(0)}_corrected_VV.tif"


def zipped(path, method=zipfile.ZIP_DEFLATED):
    return make(path, {"S1list.json": b"{}", VICTIM: b"evil" * 100, GOOD: b"good"}, method)


def spoilt(old, new, times=1):
    """A zip in which some bytes are others; those of the directory come last."""

    def maker(path):
        content = zipped(path).read_bytes()
        assert content.count(old) >= times
        path.write_bytes(content.replace(old, new, times))
        return path

    return maker


def end_record(offset, form, value):
    """A zip whose last record, which says where the directory is, lies."""

    def maker(path):
        content = bytearray(zipped(path).read_bytes())
        struct.pack_into(form, content, content.rindex(b"PK\5\6") + offset, value)
        path.write_bytes(content)
        return path

    return maker


ZIPS = {
    **HOSTILE,
    "bzip2": (lambda path: zipped(path, zipfile.ZIP_BZIP2), "is packed by a method"),
    "lzma": (lambda path: zipped(path, zipfile.ZIP_LZMA), "is packed by a method"),
    "another name before the data": (spoilt(VICTIM.encode(), b"../" + VICTIM.encode()[3:]), "is damaged"),
    "a directory elsewhere": (end_record(16, "<I", 2**31), "lies outside the zip"),
    "a directory of no size": (end_record(12, "<I", 0), "holds neither"),
    "a directory of another size": (end_record(12, "<I", 2**30), "is not a zip"),
    "a list that is a bomb": (lambda path: make(path, {"S1list.json": bytes(2**26), VICTIM: b"VV"}), "unpacks"),
    "a list without end": (
        lambda path: make(path, {"S1list.json": DEEP.encode(), VICTIM: b"VV"}),
        "cannot be read as JSON",
    ),
    "a list that states less": (lambda path: patch(zipped(path), "S1list.json", size=1), "holds more than the 1 bytes"),
    "an image that states less": (lambda path: patch(zipped(path), VICTIM, size=7), "holds more than the 7 bytes"),
    "an image that states more": (lambda path: patch(zipped(path), VICTIM, size=401), "holds fewer than the 401 bytes"),
    "an image with another checksum": (lambda path: patch(zipped(path), VICTIM, crc=0), "is damaged"),
    "a pickle": (lambda path: (path.parent.mkdir(), path.write_bytes(pickle.dumps([1])), path)[-1], "is not a zip"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_hostile_zips_are_one_line_and_leave_nothing(case, start, tmp_path, count):
    maker, words = ZIPS[case]
    maker(tmp_path / "data" / "data.zip")
    before = kept(tmp_path)
    result = start(USES["unzip"], data=tmp_path / "data", out=tmp_path / "run")
    left = [path for path in kept(tmp_path).keys() - before.keys() if Path(path).name not in (*RECORDS, "S1list.json")]
    assert count("hostile zips refused", is_one_line(result, "data.zip", words) and not left), (result, left)


# ---- Checkpoints ---------------------------------------------------------------------------------

WITH_DATA = ("--data_path", "{data}", "--device", "cpu", "--num_workers", 0)
CHECKPOINT_USES = {
    "pretrain --finetune": (*PRETRAIN, "--epochs", 2, "--finetune", "{checkpoint}"),
    "pretrain --resume": (*PRETRAIN, "--epochs", 2, "--resume", "{checkpoint}"),
    "pretrain --inference": (
        main_pretrain,
        *WITH_DATA,
        "--output_dir",
        "{out}",
        "--inference_samples",
        2,
        "--inference",
        "{checkpoint}",
    ),
    "finetune --finetune": (main_finetune, *SMALL, *WITH_DATA, "--dataset", "benv2", "--finetune", "{checkpoint}"),
    "finetune --resume": (*FINETUNE, "--dataset", "benv2", "--epochs", 2, "--resume", "{checkpoint}"),
    "finetune --eval": (main_finetune, *WITH_DATA, "--output_dir", "{out}", "--eval", "--finetune", "{checkpoint}"),
    "finetune --embed": (main_finetune, *WITH_DATA, "--embed", "{out}.npz", "--finetune", "{checkpoint}"),
    "finetune --export": (main_finetune, "--export", "{out}", "--finetune", "{checkpoint}"),
}
# Those that need a classifier, or go on with a run of one; the others take a checkpoint of pretraining.
OF_CLASSIFIER = ("finetune --resume", "finetune --eval", "finetune --embed", "finetune --export")


def run_here(module, *flags):
    """A run in this process to its good end, for what several tests need."""
    handlers, on_sigterm = logging.getLogger().handlers[:], signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as change:
        change.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        try:
            module.main()
        finally:
            logging.getLogger().handlers[:] = handlers
            signal.signal(signal.SIGTERM, on_sigterm)


@pytest.fixture(scope="module")
def begun(base, tmp_path_factory):
    """{program: folder of a run that was stopped after the first of two epochs}."""
    folders = {name: tmp_path_factory.mktemp("begun") / name for name in ("pretrain", "finetune")}
    for name, flags in (("pretrain", PRETRAIN), ("finetune", (*FINETUNE, "--dataset", "benv2"))):
        module, *flags = flags
        run_here(
            module,
            *(str(flag).format(data=base("v2"), out=folders[name]) for flag in flags),
            "--epochs",
            2,
            "--stop_epoch",
            1,
        )
        shutil.copy(folders[name] / "checkpoint.pth", folders[name].with_suffix(".pth"))
        resaved(folders[name].with_suffix(".pth"), optimizer=...)
    return folders


@pytest.fixture
def given(begun, tmp_path):
    """given(use) → a checkpoint that this use accepts, no larger than it must be, without a checksum beside it."""

    def copied(use):
        folder = begun["finetune" if use in OF_CLASSIFIER else "pretrain"]
        return Path(
            shutil.copy(
                folder / "checkpoint.pth" if "--resume" in use else folder.with_suffix(".pth"), tmp_path / "given.pth"
            )
        )

    return copied


@pytest.mark.parametrize("use", CHECKPOINT_USES)
def test_a_whole_checkpoint_is_accepted(use, given, begun, base, start, tmp_path):
    if "--resume" in use:
        shutil.copytree(begun[use.split()[0]], tmp_path / "run")
    status, _, err = start(CHECKPOINT_USES[use], data=base("v2"), out=tmp_path / "run", checkpoint=given(use))
    assert (status, err) == (0, "") and ((tmp_path / "run").exists() or (tmp_path / "run.npz").exists())


def resaved(path, **parts):
    """Other parts of a checkpoint; ... removes one."""
    state = {**load_checkpoint(path), **parts}
    torch.save({name: value for name, value in state.items() if value is not ...}, path)


def reweighted(path, change):
    resaved(path, model=change(load_checkpoint(path)["model"]))


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


def wider(weights):
    """Weights of a model of twice the width."""
    options = {"img_size": 64, "embed_dim": 64, "num_heads": (2, 4, 8, 16)}
    return (
        SIZES["mixmim_tiny"](num_classes=19, **options) if "head.weight" in weights else mixmim_tiny(**options)
    ).state_dict()


def as_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)


def repacked(path):
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    as_zip(path, members, zipfile.ZIP_DEFLATED)


def exported(path, config="{}", weights=b""):
    put(path, b"")
    as_folder(path)
    put(path / "config.json", config)
    put(path / "model.safetensors", weights)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    Path(f"{path}.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    put(path, content)


def scripted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


CONFIG = json.dumps({"args": {}, "input": {}, "epoch": 0})
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4242\n"
DAMAGED = {
    "empty": lambda path: put(path, b""),
    "text": lambda path: put(path, "no checkpoint"),
    "the page of an expired link": lambda path: put(path, "<html>\n<body>404</body>\n</html>\n" * 99),
    "the stand-in of Git LFS": lambda path: put(path, LFS),
    "random bytes": lambda path: put(path, np.random.default_rng(0).bytes(5000)),
    "truncated": cut,
    "a byte short": lambda path: put(path, path.read_bytes()[:-1]),
    "nothing but its first bytes": lambda path: put(path, path.read_bytes()[:4]),
    "a hole": lambda path: put(path, path.read_bytes()[:900] + bytes(4096) + path.read_bytes()[4996:]),
    "a bit, where there is a checksum": flipped,
    "gzipped": lambda path: put(path, gzip.compress(path.read_bytes(), 1)),
    "a zip of something else": lambda path: as_zip(path, {"notes.txt": "hello"}),
    "an empty zip": lambda path: as_zip(path, {}),
    "a zip that was packed": repacked,
    "a bomb": lambda path: as_zip(
        path, {"archive/data.pkl": b"N.", "archive/data/0": bytes(2**24)}, zipfile.ZIP_DEFLATED
    ),
    "a model of TorchScript": scripted,
    "safetensors": lambda path: save_file({"w": torch.ones(3)}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "weights of another model alone": lambda path: torch.save({"conv1.weight": torch.ones(3)}, path),
    "a dict without a model": lambda path: resaved(path, model=...),
    "a model that is a list": lambda path: resaved(path, model=[1]),
    "weights that are text": lambda path: reweighted(path, lambda weights: {**weights, "norm.bias": "none"}),
    "weights that are lists": lambda path: reweighted(path, lambda weights: {**weights, "norm.bias": [0.0]}),
    "names that are numbers": lambda path: reweighted(path, lambda weights: {**weights, 7: torch.ones(1)}),
    "args that are a list": lambda path: resaved(path, args=["--model"]),
    "input that is text": lambda path: resaved(path, input="dB"),
    "an optimizer that is a list": lambda path: resaved(path, optimizer=[1]),
    "an epoch that is text": lambda path: resaved(path, epoch="last"),
    "a folder without config.json": as_folder,
    "a folder with damaged weights": lambda path: exported(path, CONFIG, JUNK),
    "a folder with a damaged config.json": lambda path: exported(path, "{"),
    "a folder with another config.json": lambda path: exported(path, "[]", path.read_bytes()),
}
# What only matters to those who build the model.
OTHER_MODEL = {
    "a weight is missing": lambda path: reweighted(path, lambda weights: without(weights, "norm.bias")),
    "no weights": lambda path: resaved(path, model={}),
    "a weight too many": lambda path: reweighted(path, lambda weights: {**weights, "norm.gain": torch.ones(1)}),
    "another size of model": lambda path: reweighted(path, wider),
    "a weight larger than memory": lambda path: reweighted(
        path, lambda weights: {**weights, "norm.bias": torch.ones(1).expand(2**50)}
    ),
}
BUILDERS = [use for use in CHECKPOINT_USES if use != "finetune --export"]


def in_turn(cases, uses, each=2):
    """Pairs of a case and a use: every case with some of the uses, and every use with its share of the cases."""
    return [(case, uses[(number + 3 * k) % len(uses)]) for number, case in enumerate(cases) for k in range(each)]


@pytest.mark.parametrize("case, use", in_turn(DAMAGED, list(CHECKPOINT_USES)) + in_turn(OTHER_MODEL, BUILDERS))
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(case, use, given, base, start, tmp_path, count):
    path = given(use)
    (DAMAGED | OTHER_MODEL)[case](path)
    before = kept(tmp_path)
    result = start(CHECKPOINT_USES[use], data=base("v2"), out=tmp_path / "run", checkpoint=path)
    good = is_one_line(result, "given.pth") and kept(tmp_path) == before
    assert count("corrupted inputs answered with one line", good), (result, kept(tmp_path).keys() - before.keys())


def told(path, part, **values):
    """Other values in a part of a checkpoint."""
    resaved(path, **{part: {**load_checkpoint(path)[part], **values}})


def moments(path, change):
    """Other moments of the optimizer."""
    optimizer = load_checkpoint(path)["optimizer"]
    resaved(path, optimizer={**optimizer, "state": {key: change(value) for key, value in optimizer["state"].items()}})


PROGRESS = {"step": 1, "losses": torch.zeros(1, dtype=torch.float64), "grad_norm": 0.0, "skipped": 0}
HELD = {rule: {"epoch": 0, "metrics": {}} for rule in RULES["multilabel"]}
TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
INFERENCE, PRETRAINED, EVAL, EMBED, EXPORT, RESUME, RESUME_FT = (
    "pretrain --inference",
    "pretrain --finetune",
    "finetune --eval",
    "finetune --embed",
    "finetune --export",
    "pretrain --resume",
    "finetune --resume",
)
# Whole files whose parts contradict what they are for: (how, uses).
LIES = {
    "an unknown model": (lambda path: told(path, "args", model="mixmim_giant"), (INFERENCE, EVAL)),
    "a model that is a list": (lambda path: told(path, "args", model=["mixmim_tiny"]), (INFERENCE, EVAL)),
    "a dataset that is a list": (lambda path: told(path, "args", dataset=["benv2"]), (EVAL, EXPORT)),
    "a number of classes that is text": (lambda path: told(path, "args", nb_classes="19"), (EVAL,)),
    "an input size that is text": (lambda path: told(path, "input", input_size="64"), (INFERENCE, EVAL)),
    "an input size that is no size": (lambda path: told(path, "input", input_size=100), (INFERENCE, EVAL)),
    "an input size of no whole number": (lambda path: told(path, "input", input_size=64.0), (INFERENCE, EVAL)),
    "an input size beyond memory": (lambda path: told(path, "input", input_size=2**40), (INFERENCE, EVAL)),
    "a mean that is text": (lambda path: told(path, "input", mean="ab"), (INFERENCE, EVAL, EXPORT)),
    "a mean of three": (lambda path: told(path, "input", mean=[1.0, 2.0, 3.0]), (INFERENCE, EVAL)),
    "a mean of nothing": (lambda path: told(path, "input", mean=[None, None]), (INFERENCE, EVAL, EXPORT)),
    "a deviation of zero": (lambda path: told(path, "input", std=[0.0, 0.0]), (INFERENCE, EVAL)),
    "a deviation of NaN": (lambda path: told(path, "input", std=[float("nan")] * 2), (INFERENCE, EVAL)),
    "channels of nothing": (lambda path: told(path, "input", channels=None), (INFERENCE, EVAL, EXPORT)),
    "units of another kind": (lambda path: told(path, "input", channels=[1], units=5), (INFERENCE, EVAL, EXPORT)),
    "classes that are numbers": (lambda path: told(path, "input", classes=list(range(19))), (EVAL,)),
    "an embedding without dimensions": (
        lambda path: reweighted(path, lambda w: {**w, "absolute_pos_embed": torch.tensor(1.0)}),
        (PRETRAINED, EVAL),
    ),
    "an empty embedding": (
        lambda path: reweighted(path, lambda w: {**w, "absolute_pos_embed": torch.ones(1, 0, 32)}),
        (PRETRAINED, EVAL),
    ),
    "two embeddings in one": (
        lambda path: reweighted(path, lambda w: {**w, "absolute_pos_embed": torch.ones(2, 256, 32)}),
        (PRETRAINED, EVAL),
    ),
    "a table without dimensions": (
        lambda path: reweighted(path, lambda w: {**w, TABLE: torch.tensor(1.0)}),
        (PRETRAINED, EVAL),
    ),
    "a sparse weight": (
        lambda path: reweighted(path, lambda w: {**w, "norm.bias": w["norm.bias"].to_sparse()}),
        (PRETRAINED, EVAL, EXPORT),
    ),
    "a weight without data": (
        lambda path: reweighted(path, lambda w: {**w, "norm.bias": w["norm.bias"].to("meta")}),
        (PRETRAINED, EVAL, EXPORT),
    ),
    "a weight that is NaN": (
        lambda path: reweighted(path, lambda w: {**w, "norm.bias": w["norm.bias"] * float("nan")}),
        (INFERENCE, EXPORT),
    ),
    "a weight beyond memory": (
        lambda path: reweighted(path, lambda w: {**w, "norm.bias": torch.ones(1).expand(2**50)}),
        (EXPORT,),
    ),
    "a negative epoch": (lambda path: resaved(path, epoch=-5), (RESUME, RESUME_FT)),
    "progress without losses": (lambda path: resaved(path, progress={"step": 1}), (RESUME, RESUME_FT)),
    "progress before its beginning": (
        lambda path: resaved(path, progress={**PROGRESS, "step": -1}),
        (RESUME, RESUME_FT),
    ),
    "progress that is text": (lambda path: resaved(path, progress={**PROGRESS, "step": "1"}), (RESUME, RESUME_FT)),
    "losses that are text": (lambda path: resaved(path, progress={**PROGRESS, "losses": "abc"}), (RESUME, RESUME_FT)),
    "another machine's bits": (lambda path: resaved(path, bits={1: 2}), (RESUME, RESUME_FT)),
    "a selection by another rule": (lambda path: resaved(path, selection={"luck": {}}), (RESUME_FT,)),
    "a selection of numbers": (lambda path: resaved(path, selection=dict.fromkeys(HELD, 1)), (RESUME_FT,)),
    "a selection without metrics": (lambda path: resaved(path, selection=HELD), (RESUME_FT,)),
    "an optimizer of nothing": (lambda path: resaved(path, optimizer={}), (RESUME, RESUME_FT)),
    "an optimizer without groups": (
        lambda path: resaved(path, optimizer={"state": {}, "param_groups": []}),
        (RESUME, RESUME_FT),
    ),
    "moments of another shape": (
        lambda path: moments(path, lambda old: {**old, "exp_avg": torch.ones(3)}),
        (RESUME, RESUME_FT),
    ),
    "moments that are text": (lambda path: moments(path, lambda old: {**old, "exp_avg": "abc"}), (RESUME, RESUME_FT)),
    "moments that are missing": (lambda path: moments(path, lambda old: {"step": old["step"]}), (RESUME, RESUME_FT)),
}


@pytest.mark.parametrize("case, use", [(case, use) for case, (_, uses) in LIES.items() for use in uses])
def test_a_checkpoint_that_lies_is_one_line_and_leaves_nothing(case, use, given, base, start, tmp_path, count):
    path = given(use)
    LIES[case][0](path)
    before = kept(tmp_path)
    result = start(CHECKPOINT_USES[use], data=base("v2"), out=tmp_path / "run", checkpoint=path)
    good = is_one_line(result, "given.pth") and kept(tmp_path) == before
    assert count("corrupted inputs answered with one line", good), (result, kept(tmp_path).keys() - before.keys())


@pytest.mark.parametrize("program_name", ("pretrain", "finetune"))
@pytest.mark.parametrize(
    "case", ("empty", "text", "truncated", "a bit, where there is a checksum", "a bomb", "a model of TorchScript")
)
def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(
    case, program_name, begun, base, start, tmp_path, count
):
    shutil.copytree(begun[program_name], tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint*.pth"):
        DAMAGED[case](path)
    before = kept(tmp_path)
    result = start(
        CHECKPOINT_USES[f"{program_name} --resume"], data=base("v2"), out=tmp_path / "run", checkpoint="auto"
    )
    good = (
        is_one_line(result, "none of its checkpoints can be loaded", "another --output_dir")
        and kept(tmp_path) == before
    )
    assert count("corrupted inputs answered with one line", good), (result, kept(tmp_path).keys() ^ before.keys())


# ---- Hostile pickles -----------------------------------------------------------------------------


class Call:
    """Is pickled as a call, which is made where it is unpickled. more: further parts of what __reduce__ returns."""

    def __init__(self, function, *args, more=()):
        self.parts = function, args, *more

    def __reduce__(self):
        return self.parts

    def __call__(self):
        """Only so that pickle takes what a call gives for something that can be called."""


class Woken:
    """Acts when its state comes back."""

    def __init__(self, mark):
        self.mark = mark

    def __setstate__(self, state):
        os.mkdir(state["mark"])


class HostileTensor(torch.Tensor):
    def __setstate__(self, state):
        os.mkdir(state["mark"])


def hostile_tensor(mark):
    tensor = torch.ones(1).as_subclass(HostileTensor)
    tensor.mark = mark
    return tensor


def make_folder(mark):
    os.mkdir(mark)


def set_state(_, mark):
    os.mkdir(mark)


def python(mark):
    return f"__import__('os').mkdir({mark!r})"


def in_state(mark):
    namespace = argparse.Namespace()
    namespace.model = Call(os.mkdir, mark)
    return namespace


# name → mark → an object that makes the folder `mark` when it is unpickled
CALLS = {
    "os.mkdir": lambda mark: Call(os.mkdir, mark),
    "os.system": lambda mark: Call(os.system, f"mkdir '{mark}'"),
    "os.spawnvp": lambda mark: Call(os.spawnvp, os.P_WAIT, "mkdir", ["mkdir", mark]),
    "subprocess.call": lambda mark: Call(subprocess.call, ["mkdir", mark]),
    "subprocess.check_output": lambda mark: Call(subprocess.check_output, ["mkdir", mark]),
    "builtins.eval": lambda mark: Call(eval, python(mark)),
    "builtins.exec": lambda mark: Call(exec, python(mark)),
    "builtins.open": lambda mark: Call(open, mark, "w"),
    "builtins.getattr": lambda mark: Call(Call(getattr, Call(importlib.import_module, "os"), "mkdir"), mark),
    "functools.partial": lambda mark: Call(functools.partial(os.mkdir, mark)),
    "functools.reduce": lambda mark: Call(functools.reduce, os.makedirs, [mark, 0o777]),
    "operator.methodcaller": lambda mark: Call(operator.methodcaller("mkdir"), pathlib.PosixPath(mark)),
    "operator.attrgetter": lambda mark: Call(Call(operator.attrgetter("mkdir"), pathlib.PosixPath(mark))),
    "marshal.loads": lambda mark: Call(exec, Call(marshal.loads, marshal.dumps(compile(python(mark), "", "exec")))),
    "codecs.decode": lambda mark: Call(eval, Call(codecs.decode, codecs.encode(python(mark), "rot13"), "rot13")),
    "timeit.timeit": lambda mark: Call(timeit.timeit, python(mark), "pass", timeit.default_timer, 1),
    "shutil.copytree": lambda mark: Call(shutil.copytree, str(ROOT / "LICENSES"), mark),
    "pickle.loads": lambda mark: Call(pickle.loads, pickle.dumps(Call(os.mkdir, mark))),
    "torch.storage._load_from_bytes": lambda mark: Call(torch.storage._load_from_bytes, in_bytes(Call(os.mkdir, mark))),
    "torch._utils._rebuild_parameter": lambda mark: Call(
        torch._utils._rebuild_parameter, torch.ones(1), False, OrderedDict(a=Call(os.mkdir, mark))
    ),
    "torch._tensor._rebuild_from_type_v2": lambda mark: Call(
        torch._tensor._rebuild_from_type_v2, os.mkdir, torch.Tensor, (mark,), None
    ),
    "a subclass of Tensor": hostile_tensor,
    "a class with __setstate__": Woken,
    "a class without __reduce__ of its own": lambda mark: Call(
        copyreg._reconstructor, Woken, object, None, more=({"mark": mark},)
    ),
    "the state of a Namespace": in_state,
    "the items of a list": lambda mark: Call(list, more=(None, iter([Call(os.mkdir, mark)]))),
    "the items of a dict": lambda mark: Call(OrderedDict, more=(None, None, iter([("model", Call(os.mkdir, mark))]))),
    "a setter of state": lambda mark: Call(OrderedDict, more=(mark, None, None, set_state)),
    "an array of objects": lambda mark: np.array([Call(os.mkdir, mark)], object),
    "a function of this module": lambda mark: Call(make_folder, mark),
}


def in_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# name → (call) → the object that is saved
PLACES = {
    "top": lambda call: call,
    "model": lambda call: {"model": {"w": torch.ones(1), "evil": call}},
    "args": lambda call: {"model": {"w": torch.ones(1)}, "args": argparse.Namespace(model=call)},
    "optimizer": lambda call: {
        "model": {"w": torch.ones(1)},
        "optimizer": {"state": {0: {"step": call}}, "param_groups": []},
    },
    "input": lambda call: {"model": {"w": torch.ones(1)}, "input": {"mean": [call]}},
    "a key": lambda call: {"model": {"w": torch.ones(1)}, "run": {call: 1}},
}


def torch_zip(path, pickled):
    """A file as torch.save makes it, with this pickle."""
    as_zip(path, {"archive/data.pkl": pickled, "archive/byteorder": b"little", "archive/version": b"3\n"})


def legacy(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def text_of(mark):
    return b"V" + mark.encode("raw-unicode-escape") + b"\n"


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module, name, mark):
    """A pickle of protocol 4 that calls a function by names that need not exist here."""
    return b"\x80\x04" + short(module) + short(name) + b"\x93" + short(mark) + b"\x85R."


def with_extension(mark):
    """A pickle that names a function by a number of the registry of extensions."""
    copyreg.add_extension("posix", "mkdir", 0x7E)
    try:
        return pickle.dumps(Call(os.mkdir, mark), 2)
    finally:
        copyreg.remove_extension("posix", "mkdir", 0x7E)


class WithPersistentId(pickle.Pickler):
    """Puts a call where PyTorch has the type and the place of a storage."""

    def persistent_id(self, value):
        return ("storage", value.call, "0", "cpu", 1) if isinstance(value, Persistent) else None


class Persistent:
    def __init__(self, call):
        self.call = call


def with_persistent_id(mark):
    file = io.BytesIO()
    WithPersistentId(file, 2).dump(Persistent(Call(os.mkdir, mark)))
    return file.getvalue()


def as_tar(path, pickled):
    """The oldest format of PyTorch."""
    with tarfile.open(path, "w") as file:
        for name in ("pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            file.addfile(info, io.BytesIO(pickled))


def npz(path, mark):
    np.savez(path.with_suffix(".npz"), model=np.array([Call(os.mkdir, mark)], object))
    path.with_suffix(".npz").rename(path)


def npy(path, mark):
    with open(path, "wb") as file:
        np.save(file, np.array([Call(os.mkdir, mark)], object), allow_pickle=True)


# name → (path, mark) → None, writes a file that would make the folder `mark`
PICKLES = {
    **{
        f"{name}, zip": lambda path, mark, call=call: torch.save({"model": {}, "args": call(mark)}, path)
        for name, call in CALLS.items()
    },
    **{f"{name}, legacy": lambda path, mark, call=call: legacy(path, call(mark)) for name, call in CALLS.items()},
    **{
        f"in {name}, zip": lambda path, mark, place=place: torch.save(place(Call(os.mkdir, mark)), path)
        for name, place in PLACES.items()
    },
    **{
        f"in {name}, legacy": lambda path, mark, place=place: legacy(path, place(Call(os.mkdir, mark)))
        for name, place in PLACES.items()
    },
    **{
        f"protocol {n}": lambda path, mark, n=n: put(path, pickle.dumps({"model": Call(os.mkdir, mark)}, n))
        for n in range(6)
    },
    **{
        f"protocol {n} within a zip": lambda path, mark, n=n: torch_zip(
            path, pickle.dumps({"model": Call(os.mkdir, mark)}, n)
        )
        for n in range(6)
    },
    "INST": lambda path, mark: put(path, b"(" + text_of(mark) + b"iposix\nmkdir\n."),
    "OBJ": lambda path, mark: put(path, b"(cposix\nmkdir\n" + text_of(mark) + b"o."),
    "INST within a zip": lambda path, mark: torch_zip(path, b"(" + text_of(mark) + b"iposix\nmkdir\n."),
    "an extension": lambda path, mark: put(path, with_extension(mark)),
    "an extension within a zip": lambda path, mark: torch_zip(path, with_extension(mark)),
    "a persistent id": lambda path, mark: torch_zip(path, with_persistent_id(mark)),
    "a persistent id, plain": lambda path, mark: put(path, with_persistent_id(mark)),
    "a tar": lambda path, mark: as_tar(path, pickle.dumps(Call(os.mkdir, mark), 2)),
    "an .npz": npz,
    "an .npy": npy,
    "an exported folder": lambda path, mark: exported(path, CONFIG, pickle.dumps(Call(os.mkdir, mark))),
    "an exported folder with its config": lambda path, mark: exported(path, pickle.dumps(Call(os.mkdir, mark)), b""),
}
# By names that another system, another version, or a downloaded repository would have.
NAMES = [
    ("nt", "system"),
    ("posix", "system"),
    ("os", "popen"),
    ("__builtin__", "eval"),
    ("builtins", "__import__"),
    ("subprocess", "Popen"),
    ("torch.hub", "load"),
    ("torch", "load"),
    ("torch.jit", "load"),
    ("torch.package", "PackageImporter"),
    ("numpy", "load"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "fromfile"),
    ("argparse", "_os.mkdir"),
    ("argparse", "Namespace.__init__.__globals__"),
    ("collections", "OrderedDict.__class__"),
    ("runpy", "run_path"),
    ("types", "FunctionType"),
    ("pty", "spawn"),
    ("ctypes", "CDLL"),
    ("webbrowser", "open"),
    ("pdb", "run"),
    ("code", "interact"),
    ("logging.config", "fileConfig"),
    ("_codecs", "decode"),
    ("torch._utils", "_import_dotted_name"),
]
PICKLES |= {
    f"{module}.{name}": lambda path, mark, names=(module, name): torch_zip(path, named(*names, mark))
    for module, name in NAMES
}


def unpickled(path):
    """What PyTorch, pickle or NumPy makes of a file when nobody is careful: the control, without which a payload that never acts
    would count as refused. Only for files of this module, whose payload makes an empty folder.
    """
    for load in (
        lambda: torch.load(path, weights_only=False),
        lambda: pickle.loads(path.read_bytes()),
        lambda: np.load(path, allow_pickle=True)["model"],
        lambda: np.load(path, allow_pickle=True),
    ):
        try:
            load()
        except Exception:  # not of this kind, or it fails after the call was made
            continue


SURE = [
    name
    for name in PICKLES
    if name.endswith((", zip", ", legacy", "protocol 0", "protocol 5")) or name in ("INST", "OBJ", "an .npz", "an .npy")
]


@pytest.mark.parametrize("case", SURE)
def test_a_hostile_pickle_is_one(case, tmp_path):
    PICKLES[case](tmp_path / "bad.pth", str(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()
    unpickled(tmp_path / "bad.pth")
    assert (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickles_are_refused_unrun(case, tmp_path, count):
    path, mark = tmp_path / "bad.pth", tmp_path / "ran"
    PICKLES[case](path, str(mark))
    try:
        outcome = load_checkpoint(path)
    except UsageError as error:
        outcome = str(error)
    except Exception:
        outcome = traceback.format_exc()
    good = isinstance(outcome, str) and len(outcome.splitlines()) == 1 and "bad.pth" in outcome and not mark.exists()
    assert count("hostile pickles refused", good), outcome


@pytest.mark.parametrize("use", CHECKPOINT_USES)
@pytest.mark.parametrize("case", ("os.mkdir, zip", "builtins.eval, legacy", "protocol 2", "an exported folder"))
def test_programs_refuse_hostile_pickles_unrun(case, use, base, start, tmp_path, count):
    path, mark = tmp_path / "bad.pth", tmp_path / "ran"
    PICKLES[case](path, str(mark))
    before = kept(tmp_path)
    result = start(CHECKPOINT_USES[use], data=base("v2"), out=tmp_path / "run", checkpoint=path)
    good = is_one_line(result, "bad.pth") and kept(tmp_path) == before and not mark.exists()
    assert count("hostile pickles refused", good), result


@pytest.mark.parametrize("how", (npy, npz))
def test_images_of_objects_are_refused_unrun(how, base, start, tmp_path, count):
    shutil.copytree(base("floods"), tmp_path / "data")
    how(flood(tmp_path / "data"), str(tmp_path / "ran"))
    result = start(USES["finetune floods"], data=tmp_path / "data", out=tmp_path / "run")
    assert count("hostile pickles refused", is_one_line(result, *FLOOD) and not (tmp_path / "ran").exists()), result
