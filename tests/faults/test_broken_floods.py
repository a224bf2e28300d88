# SPDX-License-Identifier: MIT
"""Broken flood pairs and steps of their preparation: each is answered with one line that names the file."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.damage import (
    DEEP,
    JUNK,
    array,
    as_folder,
    cell,
    change,
    cut,
    cut_at,
    damage,
    edit,
    linked,
    put,
    recode,
    spotted,
)
from tests.helpers.inputs import cases_of
from tests.helpers.sen12 import image_name

pytestmark = pytest.mark.slow

# ---- Pairs ---------------------------------------------------------------------------------------


def header(shape, descr="'<f4'"):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


def as_archive(path):
    np.savez(path.with_suffix(".npz"), images=np.load(path))
    path.with_suffix(".npz").rename(path)


def with_objects(path):
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


def times_10_000(root):
    for path in root.rglob("*.npy"):
        array(lambda old: old * 10000)(path)


@damage
def renamed(path, name):
    path.rename(path.with_name(name))


def emptied(root):
    for path in root.iterdir():
        shutil.rmtree(path)


IMAGE, FLOOD = "images/0002/d1.npy", ("0002/d1.npy", "pairs_train.csv:5")
PAIRS_CSV, ROW_2 = "pairs_train.csv", "pairs_train.csv:2"
FLOODS = {
    "truncated": (IMAGE, cut, *FLOOD, "truncated"),
    "empty": (IMAGE, put(b""), *FLOOD, "is empty"),
    "text": (IMAGE, put("no image"), *FLOOD, "no .npy file"),
    "objects": (IMAGE, with_objects, *FLOOD),
    "a pickle": (IMAGE, put(pickle.dumps([1])), *FLOOD),
    "an archive": (IMAGE, as_archive, *FLOOD, ".npz archive"),
    "beyond memory": (IMAGE, put(header((2, 128 * 10**9, 128 * 10**9))), *FLOOD),
    "a type that is code": (IMAGE, put(header((2, 128, 128), "__import__('os').mkdir('ran')")), *FLOOD),
    "one channel": (IMAGE, array(lambda old: old[:1]), *FLOOD, "of shape (1, 128, 128)"),
    "float64": (IMAGE, array(lambda old: old.astype(np.float64)), *FLOOD, "holds float64"),
    "another size": (IMAGE, array(lambda old: np.ones((2, 256, 256), np.float32)), *FLOOD, "256x256"),
    "NaN": (IMAGE, array(lambda old: old * np.float32("nan")), "d1.npy", "100.00%"),
    "infinite": (IMAGE, array(lambda old: old + np.float32("inf")), "d1.npy", "100.00%"),
    "dB": (IMAGE, array(lambda old: 10 * np.log10(old + np.float32(1e-6))), "d1.npy", "looks like dB"),
    "no data without a tag": (
        IMAGE,
        array(lambda old: spotted(old, -9999)),
        "d1.npy: 10.16% of the VH pixels are below -1",
    ),
    "times 10,000": (".", times_10_000, "data", "on average, but images are between"),
    "missing": (IMAGE, Path.unlink, *FLOOD, "does not exist"),
    "a folder": (IMAGE, as_folder, *FLOOD, "Is a directory"),
    "a link to itself": (IMAGE, linked(), *FLOOD),
    "a list without its header": (PAIRS_CSV, put("0001,d0,d1,0\n"), PAIRS_CSV, "no column folder"),
    "an empty list": (PAIRS_CSV, put(""), PAIRS_CSV, "no column folder"),
    "a list with nothing but a header": (PAIRS_CSV, put("folder,first,second,label\n"), PAIRS_CSV, "no pair"),
    "a ragged list": (PAIRS_CSV, edit("d1,0\n", "d1\n"), ROW_2),
    "a label of 2": (PAIRS_CSV, cell("label", "2"), ROW_2, "label 0 or 1"),
    "a folder that leads elsewhere": (PAIRS_CSV, cell("folder", "../../etc"), ROW_2, "../../etc"),
    "an unclosed quotation mark": (PAIRS_CSV, edit("d1,0", 'd1,"0'), PAIRS_CSV, "unexpected end of data"),
    "a pair twice": (PAIRS_CSV, edit("d0,d2,1", "d0,d1,0"), ROW_2, f"{PAIRS_CSV}:3", "repeated"),
    "a binary list": (PAIRS_CSV, put(JUNK), PAIRS_CSV, "cannot be read as a CSV"),
}

PAIR_NAME = "0002__a__b1__1.npy"
PAIR = f"train/{PAIR_NAME}"
PAIRS = {
    "truncated": (PAIR, cut, PAIR_NAME, "truncated"),
    "of another shape": (PAIR, array(lambda old: old[0]), PAIR_NAME, "of shape (2, 128, 128)"),
    "objects": (PAIR, with_objects, PAIR_NAME),
    "dB": (PAIR, array(lambda old: old - 30), PAIR_NAME, "looks like dB"),
    "a name without a label": (PAIR, renamed("0002__a__b1.npy"), "'0002__a__b1.npy'", "not named"),
    "a name with a line break": (PAIR, renamed("0002__a__b\n1__1.npy"), r"b\n1__1.npy", "not named"),
    "both layouts": ("images", Path.mkdir, "data", "both images and train, test"),
    "neither layout": (".", emptied, "data", "neither of the layouts"),
}

# ---- Their preparation ---------------------------------------------------------------------------

LIST = "S1list.json"


@damage
def entries(path, **values):
    """Other entries of folder 0001 of the list; ... removes one."""
    content = json.loads(path.read_text())
    content["0001"] = {key: value for key, value in {**content["0001"], **values}.items() if value is not ...}
    put(json.dumps(content))(path)


def image(filename=image_name(0), **values):
    """The first entry of the folder, with another file name or other values."""
    return entries(**{"1": {"filename": filename, "FLOODING": False, **values}})


def first(pattern):
    """The first file of a pattern in the input."""
    return lambda root: next(root.glob(pattern))


def doubled(folder):
    shutil.copy(next(folder.rglob("*.npy")), folder / "x.npy")


NO_MONTH = image_name(0).replace("20190101T", "20191301T")
S1_LIST = {
    "truncated": (LIST, cut, LIST, "cannot be read as JSON"),
    "empty": (LIST, put(""), LIST, "cannot be read as JSON"),
    "a list": (LIST, put("[]"), LIST, "holds no folders"),
    "null": (LIST, put("null"), LIST, "holds no folders"),
    "brackets without end": (LIST, put(DEEP), LIST, "cannot be read as JSON"),
    "objects without end": (LIST, put('{"1":' * 100_000), LIST, "cannot be read as JSON"),
    "an endless number": (LIST, put('{"1": ' + "9" * 10_000 + "}"), LIST, "cannot be read as JSON"),
    "UTF-16": (LIST, recode("utf-16"), LIST, "utf-8"),
    "a folder": (LIST, as_folder, LIST, "Is a directory"),
    "not there": (LIST, Path.unlink, LIST, "cannot be read as JSON"),
    "a folder that leads elsewhere": (LIST, edit('"0001"', '"../../etc"'), LIST, "folder '../../etc'"),
    "a folder with a line break": (LIST, edit('"0001"', r'"00\n01"'), LIST, r"folder '00\n01'"),
    "a folder of half a character": (LIST, edit('"0001"', r'"\ud800"'), LIST, r"\ud800"),
    "entries that are a list": (LIST, put('{"0001": [1]}'), LIST, "folder '0001'"),
    "an image that leads elsewhere": (LIST, image(filename="../../etc/passwd"), LIST, "'../../etc/passwd'"),
    "an image that is null": (LIST, image(filename=None), LIST, "0001 entry 1"),
    "an image that is a list": (LIST, image(filename=[1]), LIST, "0001 entry 1"),
    "an image of the 13th month": (LIST, image(filename=NO_MONTH), LIST, "20191301T"),
    "FLOODING that is a number": (LIST, image(FLOODING=1), LIST, "0001 entry 1"),
    "no FLOODING": (LIST, entries(**{"1": {"filename": image_name(0)}}), LIST, "0001 entry 1"),
    "an image twice": (LIST, image(filename=image_name(1)), LIST, "twice"),
    "another count": (LIST, entries(count=7), LIST, "but count 7"),
    "a count that is a list": (LIST, entries(count=[3]), LIST, "but count [3]"),
}

TABLE = "aligned/align.csv"
ALIGNED = {
    "a table cut off": (TABLE, cut_at(0.9), "align.csv", "run python -m"),
    "a binary table": (TABLE, put(JUNK), "align.csv", "cannot be read as a CSV"),
    "no table": (TABLE, Path.unlink, "align.csv", "does not exist"),
    "an unclosed quotation mark": (TABLE, edit(",aligned", ',"aligned'), "align.csv", "unexpected end"),
    "a count that is text": (TABLE, cell("nonfinite", "many"), "align.csv", "nonfinite 'many'"),
    "a count is missing": (TABLE, cell("nonfinite", ""), "align.csv", "do not say whether"),
    "another status": (TABLE, cell("status", "perhaps"), "align.csv", "status 'perhaps'"),
    "an image that leads elsewhere": (
        TABLE,
        cell("image", "../../etc/passwd"),
        "align.csv",
        "image '../../etc/passwd'",
    ),
    "a record without end": ("aligned/step.json", put(DEEP), "step.json", "cannot be read as JSON"),
    "an image cut off": (first("aligned/0001/*.tif"), cut, ".tif", "truncated", "run python -m"),
    "a record of another program": ("aligned/step.json", change(program="other"), "step.json", "is not of"),
}

IMAGES, PAIRS_OF, STEP = "pairs/images.csv", "pairs/pairs.csv", "pairs/step.json"
CANDIDATES = {
    "a height that is text": (IMAGES, cell("height", "tall"), "images.csv", "height 'tall'"),
    "a negative height": (IMAGES, cell("height", "-128"), "images.csv", "height '-128'"),
    "a share that is no number": (IMAGES, cell("zeros_vh", "nan"), "images.csv", "zeros_vh 'nan'"),
    "a folder that leads elsewhere": (PAIRS_OF, cell("folder", "../../../etc"), "pairs.csv", "folder '../../../etc'"),
    "an image that leads elsewhere": (
        PAIRS_OF,
        cell("first", "../../../etc/passwd"),
        "pairs.csv",
        "first '../../../etc/passwd'",
    ),
    "a split that leads elsewhere": (PAIRS_OF, cell("split", "../../evil"), "pairs.csv", "split '../../evil'"),
    "another label": (PAIRS_OF, cell("label", "7"), "pairs.csv", "label '7'"),
    "a record without its past": (STEP, change(aligned=...), "--pairs", "was not made from"),
    "a record with another past": (STEP, change(aligned=[1]), "--pairs", "was not made from"),
    "a record that lacks a list": (STEP, change(s1_list_sha256=...), "step.json", "does not say"),
}

RECORD = "final/preparation.json"
FINAL = {
    "a record without end": (RECORD, put(DEEP), "preparation.json", "cannot be read as JSON"),
    "a record that is a list": (RECORD, put("[]"), "preparation.json", "does not say"),
    "a record without checksums": (RECORD, change(checksums_sha256=...), "preparation.json"),
    "other checksums": ("final/checksums.csv", cell("sha256", "0" * 64), "checksums.csv", "not as it was written"),
    "an image cut off": (first("final/**/*.npy"), cut, ".npy differs"),
    "an image too many": ("final", doubled, "x.npy is not listed"),
}

BROKEN = {
    "floods": FLOODS,
    "pairs": PAIRS,
    "list": S1_LIST,
    "aligned": ALIGNED,
    "candidates": CANDIDATES,
    "final": FINAL,
}


@pytest.mark.parametrize("name, case, use", cases_of(BROKEN))
def test_broken_input_is_one_line_and_leaves_nothing(name, case, use, check_refused):
    check_refused(name, use, BROKEN[name][case])
