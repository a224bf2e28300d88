# SPDX-License-Identifier: MIT
"""Broken metadata, lists and labels of BigEarthNet: each is answered with one line that names it."""

import gzip
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.damage import (
    DEEP,
    JUNK,
    as_folder,
    cell,
    change,
    cut,
    cut_at,
    damage,
    edit,
    kept,
    linked,
    put,
    recode,
)
from tests.helpers.dataset_fixtures import s1_name, s2_name, v2_frame
from tests.helpers.inputs import USES, cases_of
from tests.helpers.runs import is_refused

pytestmark = pytest.mark.slow

# ---- metadata.parquet ----------------------------------------------------------------------------

METADATA = "metadata.parquet"


@damage
def rewrite(root, **columns):
    """Other values of columns of metadata.parquet, a list for all rows; ... removes one."""
    table = pq.read_table(root / METADATA)
    for name, values in columns.items():
        table = (
            table.drop_columns(name)
            if values is ...
            else table.set_column(table.column_names.index(name), name, pa.array(values))
        )
    pq.write_table(table, root / METADATA)


@damage
def rename(root, number, name):
    names = [s1_name(k) for k in range(4)]
    names[number] = name
    rewrite(s1_name=names)(root)


@damage
def relabel(root, number, names):
    labels = v2_frame()["labels"].tolist()
    labels[number] = names
    rewrite(labels=labels)(root)


@damage
def twice(root, column):
    table = pq.read_table(root / METADATA)
    pq.write_table(table.append_column(column, table[column]), root / METADATA)


def without_rows(path):
    pq.write_table(pq.read_table(path).slice(0, 0), path)


NOT_UTF8 = pa.ListArray.from_arrays([0, 1, 2, 3, 4], pa.array([b"\xffastures"] * 4).view(pa.string()))
ROW = f"{METADATA}: row 1"
PARQUET = {
    "truncated": (METADATA, cut, METADATA, "cannot be read as a parquet"),
    "empty": (METADATA, put(b""), METADATA, "cannot be read as a parquet"),
    "text": (METADATA, put("s1_name,labels\n"), METADATA, "cannot be read as a parquet"),
    "nothing but its signs": (METADATA, put(b"PAR1" * 3), METADATA, "cannot be read as a parquet"),
    "encrypted": (METADATA, put(lambda old: old[:-4] + b"PARE"), METADATA, "cannot be read as a parquet"),
    "a folder": (METADATA, as_folder, METADATA, "cannot be read as a parquet"),
    "a link to itself": (METADATA, linked(), METADATA),
    "text that is not UTF-8": (".", rewrite(labels=NOT_UTF8), METADATA, "utf-8"),
    "no column s1_name": (".", rewrite(s1_name=...), METADATA, "no column s1_name"),
    "two columns labels": (".", twice("labels"), METADATA, "2 columns labels"),
    "two columns s1_name": (".", twice("s1_name"), METADATA, "2 columns s1_name"),
    "labels that are numbers": (".", rewrite(labels=[1, 2, 3, 4]), ROW, "labels that cannot be read"),
    "labels that are lists of numbers": (".", rewrite(labels=[[1], [2], [3], [4]]), ROW, "unknown label '2'"),
    "labels that are lists of lists": (".", rewrite(labels=[[["Pastures"]]] * 4), ROW, "unknown label"),
    "labels that are records": (".", rewrite(labels=[[{"a": "Pastures"}]] * 4), ROW, "unknown label"),
    "labels that are text": (".", rewrite(labels=["Pastures"] * 4), ROW, "not a printed list"),
    "an unknown label": (".", relabel(1, ["Pastures", "Sea"]), ROW, "unknown label 'Sea'"),
    "a label of version 1": (".", relabel(1, ["Sea and ocean"]), ROW, "unknown label"),
    "a null within labels": (".", relabel(1, ["Pastures", None]), ROW, "unknown label 'None'"),
    "an unknown split": (".", rewrite(split=["train", "dev", "test", "train"]), ROW, "unknown split"),
    "a null split": (".", rewrite(split=["train", None, "test", "train"]), ROW, "unknown split"),
    "splits that are numbers": (".", rewrite(split=[0, 1, 2, 0]), ROW, "unknown split"),
    "a null id": (".", rename(1, None), ROW, "no S1 patch name"),
    "ids that are numbers": (".", rewrite(s1_name=[0, 1, 2, 3]), ROW, "no S1 patch name"),
    "the same id twice": (".", rename(3, s1_name(0)), "metadata.parquet: row 3", "repeat an id", s1_name(0)),
    "an id that leads elsewhere": (".", rename(1, "../../etc/passwd"), ROW, "'../../etc/passwd'"),
    "an id within that leads elsewhere": (".", rename(1, f"{s1_name(1)}/../../{s1_name(1)}"), ROW, "no S1 patch name"),
    "an absolute id": (".", rename(1, "/etc/passwd"), ROW, "'/etc/passwd'"),
    "an id with NUL": (".", rename(1, f"{s1_name(1)}\0.tif"), ROW, r"no S1 patch name"),
    "an id with a line break": (".", rename(1, f"{s1_name(1)}\nx"), ROW, r"no S1 patch name"),
    "an id with the name of a terminal": (".", rename(1, "S1A_\x1b[2J_a_b_c"), ROW, r"\x1b"),
    "an endless id": (".", rename(1, "S1A_a_b_c_" + "x" * 100_000), ROW, "no S1 patch name", "..."),
    "an empty id": (".", rename(1, ""), ROW, "no S1 patch name"),
    "an id of Sentinel-2": (".", rename(1, s2_name(1)), ROW, "no S1 patch name"),
    "no rows": (METADATA, without_rows, METADATA, "no row of split"),
    "not there": (METADATA, Path.unlink, METADATA, "copy the dataset's metadata"),
}

# ---- CSV -----------------------------------------------------------------------------------------


def copied_to_test(path):
    """The rows of one list also stand in another."""
    put(path.read_text().replace(",train,", ",test,"))(path.with_name("benv2_test.csv"))


UNQUOTED = "s1_name,labels,note\n" + "".join(
    f"{s1_name(k)},['Pastures'],{note}\n" for k, note in ((0, '"good'), (3, "good"))
)
TRAIN, ROW_2 = "benv2_train.csv", "benv2_train.csv:2"
CSV = {
    "empty": (TRAIN, put(""), TRAIN, "is empty"),
    "nothing but a header": (TRAIN, put(lambda old: old.splitlines(keepends=True)[0]), TRAIN),
    "no header": (TRAIN, put(lambda old: old.partition(b"\n")[2]), TRAIN, "no column s1_name"),
    "cut off in a row": (TRAIN, cut_at(0.8), TRAIN),
    "a row too short": (TRAIN, edit(",Austria", ""), TRAIN, ROW_2, "6 cells"),
    "a row too long": (TRAIN, edit(",Austria", ",Austria,,"), ROW_2, "6 cells"),
    "binary": (TRAIN, put(JUNK), TRAIN, "cannot be read as a CSV"),
    "blocks of zeros": (TRAIN, edit("Austria", "\0" * 512), TRAIN, "NUL"),
    "Latin-1": (TRAIN, recode("latin-1"), TRAIN, "utf-8"),
    "UTF-16": (TRAIN, recode("utf-16"), TRAIN, "utf-8"),
    "a gzip": (TRAIN, put(gzip.compress), TRAIN, "cannot be read as a CSV"),
    "an unclosed quotation mark": (TRAIN, edit("False", '"False'), TRAIN, "cannot be read as a CSV"),
    "one that swallows the rest": (TRAIN, put(UNQUOTED), TRAIN, "unexpected end of data"),
    "an unclosed bracket": (TRAIN, edit("]", ""), ROW_2, "not a printed list"),
    "a label without its quotation mark": (TRAIN, edit("['Arable", "[Arable"), ROW_2, "not a printed list"),
    "an unknown label": (TRAIN, cell("labels", "['Sea']"), ROW_2, "unknown label 'Sea'"),
    "an endless cell": (TRAIN, edit("Austria", "A" * 200_000), TRAIN, "field limit"),
    "the same row twice": (
        TRAIN,
        put(lambda old: old + old.splitlines(keepends=True)[-1]),
        f"{TRAIN}:3",
        f"{TRAIN}:4",
        "repeat an id",
    ),
    "a row of another list": (TRAIN, copied_to_test, s1_name(0)),
    "an unknown split": (TRAIN, cell("split", "dev"), "unknown split: 'dev' (benv2_train.csv:2)"),
    "two columns s1_name": (TRAIN, edit("country", "s1_name"), TRAIN, "2 columns s1_name"),
    "an id that leads elsewhere": (TRAIN, cell("s1_name", "../../etc/passwd"), ROW_2, "no S1 patch name"),
    "an id in another column": (TRAIN, edit("s1_name", "name"), TRAIN, "no column s1_name", "--id_col"),
    "a folder": (TRAIN, as_folder, TRAIN, "cannot be read as a CSV"),
    "not there": ("benv2_val.csv", Path.unlink, "benv2_val.csv"),
}

# ---- Version 1 -----------------------------------------------------------------------------------


def emptied(root):
    for path in root.iterdir():
        shutil.rmtree(path)


LABELS_NAME = f"{s1_name(1)}_labels_metadata.json"
LABELS, VV_TIF = f"{s1_name(1)}/{LABELS_NAME}", f"{s1_name(1)}/{s1_name(1)}_VV.tif"
V1_TRAIN, V1_ROW_2 = "benv1_train.csv", "benv1_train.csv:2"
V1 = {
    "a truncated JSON file": (LABELS, cut, LABELS_NAME, "cannot be read as JSON"),
    "an empty JSON file": (LABELS, put(""), LABELS_NAME, "cannot be read as JSON"),
    "a folder for a JSON file": (LABELS, as_folder, LABELS_NAME, "Is a directory"),
    "brackets without end": (LABELS, put(DEEP), LABELS_NAME, "cannot be read as JSON"),
    "UTF-16": (LABELS, recode("utf-16"), LABELS_NAME, "utf-8"),
    "no object": (LABELS, put("[1]"), LABELS_NAME, "no JSON object"),
    "labels that are text": (LABELS, change(labels="Pastures"), LABELS_NAME, "no list of labels"),
    "labels within labels": (LABELS, change(labels=[["Pastures"]]), LABELS_NAME, "no list of labels"),
    "an unknown label": (LABELS, change(labels=["Sea\n"]), LABELS_NAME, r"unknown label 'Sea\n'"),
    "a truncated image": (VV_TIF, cut, f"{s1_name(1)}_VV.tif", "truncated"),
    "a missing image": (VV_TIF, Path.unlink, s1_name(1), "VV"),
    "a folder that is no patch": ("S1A_.._..", Path.mkdir, "'S1A_.._..'", "no S1 patch name"),
    "no patches": (".", emptied, "data", "no patch folders"),
}
V1_LISTS = {
    "a list without rows": (V1_TRAIN, put("\n\n"), V1_TRAIN, "lists no patch"),
    "a binary list": (V1_TRAIN, put(JUNK), V1_TRAIN, "cannot be read as a CSV"),
    "an HTML page for a list": (V1_TRAIN, put("<html>\n<body>404, not found</body>\n"), V1_TRAIN, "--id_col"),
    "a ragged list": (V1_TRAIN, edit(f",{s1_name(1)}", ""), V1_ROW_2, "no column 1"),
    "a name that leads elsewhere": (V1_TRAIN, edit(s1_name(1), "S1A_../../../etc/passwd"), V1_ROW_2),
    "a name twice": (V1_TRAIN, edit(s1_name(1), s1_name(0)), f"{V1_TRAIN}:1", V1_ROW_2, "repeat an id"),
    "an unclosed quotation mark": (V1_TRAIN, edit(s2_name(0), f'"{s2_name(0)}'), V1_TRAIN, "unexpected end"),
    "a list that is a folder": (V1_TRAIN, as_folder, V1_TRAIN),
}
V1_S2_LISTS = {
    "a patch that is not there": (V1_TRAIN, edit(s2_name(1), s2_name(7)), s2_name(7)),
    "no Sentinel-2 name": (LABELS, change(corresponding_s2_patch=...), LABELS_NAME, "corresponding_s2_patch"),
    "a Sentinel-2 name that is a number": (LABELS, change(corresponding_s2_patch=7), LABELS_NAME),
    "a name that leads elsewhere": (V1_TRAIN, edit(s2_name(1), "S2A_../../x"), V1_ROW_2, "no S2 patch name"),
}

OFFICIAL = (
    "truncated",
    "empty",
    "text",
    "an unknown label",
    "an unknown split",
    "the same id twice",
    "an id that leads elsewhere",
    "labels that are lists of lists",
)
BROKEN = {
    "v2": PARQUET,
    "official": {name: PARQUET[name] for name in OFFICIAL},
    "v2 csv": CSV,
    "v1": V1,
    "v1 lists": V1_LISTS,
    "v1 s2 lists": V1_S2_LISTS,
}


def needs(name, case, use):
    """Whether what is run needs what is broken: pretraining on all of version 2 does without labels and metadata."""
    said = " ".join(BROKEN[name][case][2:])
    unneeded = (
        "label" in said and "columns" not in said or "printed list" in said or (name, case) == ("v2", "not there")
    )
    return not (use == "pretrain v2" and unneeded)


@pytest.mark.parametrize("name, case, use", [row for row in cases_of(BROKEN) if needs(*row)])
def test_broken_input_is_one_line_and_leaves_nothing(name, case, use, check_refused):
    check_refused(name, use, BROKEN[name][case])


@pytest.mark.parametrize(
    "name, use, column, said",
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
def test_a_wrong_column_is_one_line(name, use, column, said, base, start, tmp_path, count):
    result = start((*USES[use], "--id_col", column), data=base(name), out=tmp_path / "run")
    assert count("corrupted inputs answered with one line", is_refused(result, *said) and not kept(tmp_path)), result
