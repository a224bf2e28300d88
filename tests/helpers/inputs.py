# SPDX-License-Identifier: MIT
"""Whole inputs of every kind, and what is run on them: the programs and their flags."""

import functools
import shutil

import numpy as np

import main_finetune
import main_pretrain
from sarwmix import sen12_data_prep, sen12_prune_partial_pairs
from sarwmix.prepare import benv1_to_zarr, benv2_csv, pack, sen12_unzip, statistics
from sarwmix.sen12_data_prep import prepare
from tests.helpers.dataset_fixtures import (
    s1_name,
    s2_name,
    v2_frame,
    write_csv,
    write_v1,
    write_v1_zarr,
    write_v2,
    write_v2_lmdb,
)
from tests.helpers.floods import write_floods
from tests.helpers.runs import argv
from tests.helpers.sen12 import S, align, image_name, write_raw
from tests.helpers.zips import make

TINY = (
    "--model mixmim_tiny --batch_size 2 --num_workers 0 --warmup_epochs 0 --lr 1e-3 --epochs 1 "
    "--device cpu --output_dir {out}"
)
SMALL = (TINY, "--input_size 64")
PRETRAIN = (main_pretrain, SMALL, "--data_path {data} --split all --save_epochs")
FINETUNE = (main_finetune, SMALL, "--data_path {data} --finetune ''")
STEP = "--workers 1 --out {out}"

# What is run on an input: program and flags.
USES = {
    "pretrain v2": (*PRETRAIN, "--dataset benv2"),
    "finetune v2": (*FINETUNE, "--dataset benv2"),
    "pretrain v1": (*PRETRAIN, "--dataset benv1 --split train_val"),
    "finetune floods": (main_finetune, TINY, "--data_path {data} --finetune '' --dataset sen12flood"),
    "verify store": (pack, "--verify {data} --workers 1"),
    "statistics": (statistics, "--dataset benv2 --data_path {data} --split all --out {out}.json --workers 1"),
    "csv": (benv2_csv, "--metadata {data}/metadata.parquet --out {out}"),
    "zarr": (benv1_to_zarr, "--root {data} --train {data}/benv1_train.csv --val {data}/benv1_val.csv", STEP),
    "list": (sen12_data_prep, "--list_only --s1_list {data}/S1list.json", STEP),
    "prepare": (sen12_data_prep, "--aligned {data}/aligned", STEP),
    "prune": (sen12_prune_partial_pairs, "--aligned {data}/aligned --pairs {data}/pairs --size", S, STEP),
    "verify floods": (sen12_prune_partial_pairs, "--verify --out {data}/final --workers 1"),
    "unzip": (sen12_unzip, "--zip {data}/data.zip", STEP),
}

LOOK = "--inference {checkpoint}"
WITH_DATA = "--data_path {data} --device cpu --num_workers 0"
CHECKPOINT_USES = {
    "pretrain --finetune": (*PRETRAIN, "--epochs 2 --finetune {checkpoint}"),
    "pretrain --resume": (*PRETRAIN, "--epochs 2 --resume {checkpoint}"),
    "pretrain --inference": (main_pretrain, WITH_DATA, "--output_dir {out} --inference_samples 2", LOOK),
    "finetune --finetune": (main_finetune, SMALL, WITH_DATA, "--dataset benv2 --finetune {checkpoint}"),
    "finetune --resume": (*FINETUNE, "--dataset benv2 --epochs 2 --resume {checkpoint}"),
    "finetune --eval": (main_finetune, WITH_DATA, "--output_dir {out} --eval --finetune {checkpoint}"),
    "finetune --embed": (main_finetune, WITH_DATA, "--embed {out}.npz --finetune {checkpoint}"),
    "finetune --export": (main_finetune, "--export {out} --finetune {checkpoint}"),
}


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
    pack.main(argv("--dataset benv2 --data_path", root.with_name("source"), "--out", root, "--workers 1"))


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


def cases_of(broken):
    """(input, case, use) of all cases of {input: {case: …}}, each with every use of its input."""
    return [(name, case, use) for name, cases in broken.items() for case in cases for use in BASES[name][1]]
