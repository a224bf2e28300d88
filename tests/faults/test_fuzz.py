# SPDX-License-Identifier: MIT
"""Readers and parsers on random and on mutated input: they return something valid, or say in one line what is wrong.

Every run draws the same examples; `--campaign` draws forty times as many.
"""

import contextlib
import csv
import io
import json
import math
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import main_finetune
import main_pretrain
from common.errors import DataError, UsageError
from common.launchers import LAUNCHERS
from common.safe_zip import open_archive
from sarwmix.bigearthnet import CLASSES, LmdbStore, parse_labels
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.bigearthnetv2 import read_metadata
from sarwmix.geotiff import read_band
from sarwmix.listing import read_csv_rows
from sarwmix.packed import PackedDataset
from sarwmix.packed_store import manifest_checksum, read_manifest
from sarwmix.prepare import pack
from sarwmix.prepare.sen12_index import CANDIDATES, Image, read_s1_list
from sarwmix.sen12flood_loader import FloodDataset
from tests.helpers.dataset_fixtures import s1_name, v2_frame, write_csv, write_tif, write_v1_zarr, write_v2
from tests.helpers.floods import write_floods
from tests.helpers.sen12 import image_name
from tests.helpers.zips import make
from util.checkpoint import load_checkpoint
from util.distributed import Launch, detect_launch

pytestmark = pytest.mark.slow


@pytest.fixture
def examples(campaign):
    """The settings of a test: how many examples, and that they are the same in every run."""
    return settings(
        max_examples=2000 if campaign else 50,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


def outcome(kind, read, *arguments):
    """What a reader returns, or None where it raised exactly this kind of error, with a message of one line."""
    try:
        return read(*arguments)
    except kind as error:
        assert type(error) is kind and len(str(error).splitlines()) == 1, repr(error)
        return None


EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "set", "insert", "delete", "cut", "repeat")),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content, edits):
    """Some bytes flipped, overwritten, inserted, deleted or repeated, or the end cut off; places are shares of the length."""
    content = bytearray(content)
    for kind, place, junk in edits:
        at = int(place * len(content))
        if kind == "flip" and content:
            content[at] ^= 1 << junk[0] % 8
        elif kind == "set":
            content[at : at + len(junk)] = junk
        elif kind == "insert":
            content[at:at] = junk
        elif kind == "delete":
            del content[at : at + junk[0]]
        elif kind == "repeat":
            content[at:at] = content[at : at + junk[0]]
        elif kind == "cut":
            del content[at:]
    return bytes(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


# ---- Lists and tables ----------------------------------------------------------------------------


def test_printed_lists(examples):
    words = st.sampled_from(CLASSES) | st.text(max_size=6)
    pieces = st.lists(
        st.sampled_from(["[", "]", "'", '"', ",", " ", "\n", "\r\n", "\0", "\u2028", "[]", "['", "']"]) | words,
        max_size=12,
    )

    @examples
    @given(
        pieces.map("".join)
        | st.lists(words, max_size=4).map(str)
        | st.lists(words, max_size=4).map(lambda names: str(np.array(names)))
    )
    def run(text):
        names = outcome(DataError, parse_labels, text)
        assert (
            names is None or isinstance(names, list) and all(isinstance(name, str) and name in text for name in names)
        )

    @examples
    @given(st.lists(st.sampled_from(CLASSES), max_size=5))
    def run_whole(names):
        assert parse_labels(str(names)) == names == parse_labels(str(np.array(names, dtype=object)))

    run()
    run_whole()


def test_csv_files(examples, tmp_path):
    path = write_csv(tmp_path / "a.csv", [["s1_name", "labels"], [s1_name(0), "['a',\n'b']"], ["x", 'a "b" c']])
    whole = path.read_bytes()

    @examples
    @given(st.binary(max_size=60) | EDITS.map(lambda edits: mutated(whole, edits)))
    def run(content):
        path.write_bytes(content)
        rows = outcome(DataError, lambda: list(read_csv_rows(path)))
        if rows is not None:
            lines = [line for line, _ in rows]
            assert lines == sorted(set(lines))
            assert all(row and all(isinstance(cell, str) for cell in row) for _, row in rows)

    run()


def is_listing(listing, splits):
    """Whether read metadata can be what training needs."""
    count = len(listing.ids)
    assert listing.labels.shape == (count, 19) and np.isin(listing.labels, (0, 1)).all()
    assert all("/" not in name and name.startswith("S1") for name in listing.ids) and len(listing.line) == count
    assert len(splits) in (0, count) and set(splits) <= {"train", "val", "test"}


@pytest.mark.parametrize("name", ("metadata.csv", "metadata.parquet"))
def test_metadata(name, examples, tmp_path):
    path = tmp_path / name
    if path.suffix == ".csv":
        v2_frame().assign(labels=v2_frame()["labels"].map(str)).to_csv(path, index=False)
    else:
        v2_frame().to_parquet(path, compression=None)
    whole = path.read_bytes()

    @examples
    @given(EDITS, st.none() | st.integers(-2, 9))
    def run(edits, id_col):
        path.write_bytes(mutated(whole, edits))
        read = outcome(DataError, read_metadata, path, name, id_col)
        if read is not None:
            is_listing(*read)

    run()


def test_metadata_of_other_types(examples, tmp_path):
    names = st.sampled_from([s1_name(0), s1_name(1), "../x", ""]) | st.text(max_size=5)
    labels = st.lists(st.sampled_from(CLASSES[:3]) | st.text(max_size=3), max_size=3)
    kinds = [
        st.lists(kind, min_size=2, max_size=2)
        for kind in (
            names,
            labels,
            st.sampled_from(("train", "validation", "dev")),
            st.integers(0, 9),
            st.floats(),
            st.binary(max_size=3),
            st.lists(labels, max_size=2),
            st.booleans(),
            st.none(),
            st.dates(),
        )
    ]

    @examples
    @given(st.dictionaries(st.sampled_from(("s1_name", "labels", "split", "country")), st.one_of(kinds), min_size=1))
    def run(columns):
        pd.DataFrame(columns).to_parquet(tmp_path / "metadata.parquet")
        read = outcome(DataError, read_metadata, tmp_path / "metadata.parquet", "metadata.parquet", None)
        if read is not None:
            is_listing(*read)

    run()


def test_tables_between_steps(examples, tmp_path):
    rows = [("train", "0001", image_name(0), image_name(1), 1), ("test", "7", image_name(0), image_name(2), 0)]
    CANDIDATES.write(tmp_path, rows)
    whole = (tmp_path / "pairs.csv").read_bytes()
    cells = st.sampled_from(("train", "0001", image_name(0), "1", "../../x", "", '"')) | st.text(max_size=5)

    def written(cells):
        file = io.StringIO()
        csv.writer(file).writerows([CANDIDATES.columns, cells])
        return file.getvalue().encode("utf-8", "replace")

    @examples
    @given(EDITS.map(lambda edits: mutated(whole, edits)) | st.lists(cells, min_size=4, max_size=6).map(written))
    def run(content):
        (tmp_path / "pairs.csv").write_bytes(content)
        for row in outcome(DataError, CANDIDATES.read, tmp_path) or ():
            assert row["split"] in ("train", "test") and row["label"] in ("0", "1") and tuple(row) == CANDIDATES.columns
            assert all(Path(row[name]).name == row[name] or not row[name] for name in ("folder", "first", "second"))

    run()


def test_the_list_of_images(examples, tmp_path):
    path = tmp_path / "S1list.json"
    entry = {"filename": image_name(0), "FLOODING": False}
    whole = json.dumps({"0001": {"1": entry, "2": {"filename": image_name(1), "FLOODING": True}, "count": 2}}).encode()
    entries = st.dictionaries(st.sampled_from(("1", "2", "²", "count", "geo")), JSON | st.just(entry), max_size=3)
    lists = st.dictionaries(
        st.sampled_from(("0001", "7", "../x", "")) | st.text(max_size=4), JSON | entries, max_size=3
    )

    @examples
    @given(
        st.binary(max_size=40)
        | EDITS.map(lambda edits: mutated(whole, edits))
        | (lists | JSON).map(lambda value: json.dumps(value).encode())
    )
    def run(content):
        path.write_bytes(content)
        for folder, images in (outcome(DataError, read_s1_list, path) or {}).items():
            assert Path(folder).name == folder
            assert all(isinstance(image, Image) and image.folder == folder for image in images)
            assert images == sorted(images, key=lambda image: image.start)

    run()


# ---- Images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ({}, {"compress": "deflate"}, {"tiled": True, "blockxsize": 64, "blockysize": 64}))
def test_geotiffs(options, examples, tmp_path):
    noise = np.random.default_rng(0).normal(-15, 5, (120, 120)).astype(np.float32)
    whole = write_tif(tmp_path / "a.tif", noise, ["VH"], **options).read_bytes()
    (directory,) = struct.unpack_from("<I", whole, 4)
    start = min(directory, len(whole) - 600)  # changes among the pixels go unseen, and would be most of them
    path = tmp_path / "b.tif"

    @examples
    @given(EDITS)
    def run(edits):
        path.write_bytes(
            mutated(whole[:16], edits) + whole[16:] if len(edits) % 2 else whole[:start] + mutated(whole[start:], edits)
        )
        values = outcome(DataError, read_band, path, 0.01, "VH", False)
        assert values is None or values.dtype == np.float32 and values.ndim == 2 and np.isfinite(values).mean() >= 0.99

    run()


def test_values_of_an_lmdb(examples, tmp_path):
    band = np.full((120, 120), -15, np.float32)
    whole = save({"VH": band, "VV": band})
    store = LmdbStore(tmp_path)

    @examples
    @given(st.binary(max_size=40) | EDITS.map(lambda edits: mutated(whole[:300], edits) + whole[300:]))
    def run(value):
        store._get = lambda patch, take: take(memoryview(value))
        image = outcome(DataError, store.image, s1_name(0), 0.01)
        assert image is None or image.shape == (2, 120, 120) and image.dtype == np.float32

    run()


@pytest.mark.parametrize(
    "zarr_format, file", ((3, "VH/zarr.json"), (3, "zarr.json"), (2, "VH/.zarray"), (2, ".zattrs"), (3, "VH/c/0/0"))
)
def test_zarr_stores(zarr_format, file, examples, tmp_path):
    path = write_v1_zarr(tmp_path / "v1.zarr", zarr_format) / "sentinel1" / s1_name(0) / file
    data, whole = BigEarthNetv1(tmp_path / "v1.zarr", "all"), path.read_bytes()

    @examples
    @given(EDITS.map(lambda edits: mutated(whole, edits)) | JSON.map(lambda value: json.dumps(value).encode()))
    def run(content):
        path.write_bytes(content)
        item = outcome(DataError, data.__getitem__, 0)
        assert (
            item is None or item[0].shape == (2, 120, 120) and item[0].dtype == torch.float32 and item[1].shape == (19,)
        )

    run()


def test_npy_files(examples, tmp_path):
    path = write_floods(tmp_path / "floods") / "images" / "7" / "d0.npy"
    data, whole = FloodDataset(tmp_path / "floods", "test"), path.read_bytes()

    @examples
    @given(st.binary(max_size=40) | EDITS.map(lambda edits: mutated(whole[:128], edits) + whole[128:]))
    def run(content):
        path.write_bytes(content)
        with np.errstate(all="ignore"):
            item = outcome(DataError, data.__getitem__, 0)
        assert item is None or all(image.shape == (2, 128, 128) and image.isfinite().all() for image in item[:2])

    run()


# ---- Containers ----------------------------------------------------------------------------------


def test_zips(examples, tmp_path):
    contents = {"a/S1list.json": b"some text, some text" * 9, "a/b/c.tif": bytes(300), "d": b""}
    path = make(tmp_path / "a.zip", contents)
    whole = path.read_bytes()
    stored = make(tmp_path / "b.zip", contents, zipfile.ZIP_STORED).read_bytes()

    def read():
        with open_archive(path) as archive:
            return {name: archive.read(name) for name in archive.members}

    @examples
    @given(
        st.binary(max_size=60) | st.tuples(st.sampled_from((whole, stored)), EDITS).map(lambda drawn: mutated(*drawn))
    )
    def run(content):
        path.write_bytes(content)
        for name, found in (outcome(DataError, read) or {}).items():
            assert found in contents.values() and ".." not in name.split("/") and not name.startswith("/")

    run()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    write_v2(folder / "v2")
    pack.main(
        ["--dataset", "benv2", "--data_path", str(folder / "v2"), "--out", str(folder / "store"), "--workers", "1"]
    )
    return folder / "store"


def test_manifests(examples, store, tmp_path):
    whole = (store / "manifest.json").read_bytes()

    @examples
    @given(
        st.binary(max_size=40)
        | EDITS.map(lambda edits: mutated(whole, edits))
        | JSON.map(lambda value: json.dumps(value).encode())
    )
    def run(content):
        (tmp_path / "manifest.json").write_bytes(content)
        manifest = outcome(DataError, read_manifest, tmp_path)
        assert manifest is None or manifest == json.loads(whole)  # another layout of the same text, at most

    run()


def places_in(value, path=()):
    """The paths of all values in a nest of dicts and lists."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_in(inner, (*path, key))


def test_manifests_with_a_right_checksum(examples, store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    whole = json.loads((store / "manifest.json").read_text())
    places = sorted(
        (path for path in places_in(whole) if path and path[0] != "sha256" and path[0] != "statistics"), key=str
    )

    def read():
        data = PackedDataset(tmp_path / "store", "all")
        data.check_files()
        return [data[i] for i in range(len(data))]

    @examples
    @given(
        st.sampled_from(places),
        JSON | st.integers(0, 9) | st.sampled_from(("../part_00000.bin", "float16", [2, 120, 120], ...)),
    )
    def run(path, value):
        manifest = json.loads(json.dumps(whole))
        part = manifest
        for key in path[:-1]:
            part = part[key]
        if value is ...:
            del part[path[-1]]
        else:
            part[path[-1]] = value
        manifest["sha256"] = manifest_checksum(manifest)
        (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
        for image, labels in outcome(DataError, read) or ():
            assert image.shape == (2, 120, 120) and len(labels) == len(manifest["classes"])

    run()


# ---- The training side ---------------------------------------------------------------------------


@pytest.mark.parametrize("new", (True, False))
def test_checkpoints(new, examples, tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = {
        "model": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(7)},
        "epoch": 3,
        "args": {"lr": 0.1, "model": "mixmim_tiny"},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    torch.save(state, path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()

    @examples
    @given(st.binary(max_size=60) | EDITS.map(lambda edits: mutated(whole, edits)))
    def run(content):
        path.write_bytes(content)
        read = outcome(UsageError, load_checkpoint, path)
        if read is not None:
            assert all(
                isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in read["model"].items()
            )
            assert isinstance(read.get("args", {}), dict) and isinstance(read.get("epoch", 0), int)

    run()


NUMBERS = (
    st.integers(-2, 9).map(str)
    | st.text(max_size=3)
    | st.sampled_from(("", " 1", "x", "4(x2)", "4(x2),2", "(", "1e3", "-0", "٣", "9" * 5000))
)


def test_variables_of_launchers(examples):
    slurm = (
        "SLURM_STEP_ID",
        "SLURM_NODEID",
        "SLURM_NNODES",
        "SLURM_SUBMIT_DIR",
        "SLURM_TASKS_PER_NODE",
        "SLURM_NTASKS_PER_NODE",
    )
    one = st.sampled_from(list(LAUNCHERS.values())).flatmap(
        lambda names: st.fixed_dictionaries(
            dict.fromkeys(names[0] + names[1][-1:], NUMBERS),
            optional=dict.fromkeys((*names[1][:-1], *names[2], *names[3], *slurm), NUMBERS),
        )
    )

    @examples
    @given(one | st.tuples(one, one).map(lambda both: both[0] | both[1]))
    @example({"SLURM_PROCID": "x", "SLURM_NTASKS": "2"})
    @example({"SLURM_PROCID": "x", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "4(x2)"})
    @example({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "x"})
    @example({"PMIX_RANK": "0", "SLURM_NTASKS_PER_NODE": "\r"})
    @example({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_TASKS_PER_NODE": "x\r"})
    def run(env):
        launch = outcome(UsageError, detect_launch, env)
        assert launch is None or isinstance(launch, Launch) and 0 <= launch.rank < launch.world_size

    run()


def options_of(module):
    """The flags of a program, without those that end it with help."""
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        module.parse_flags(["--help"])
    return sorted(
        {word.strip("[],") for word in text.getvalue().split() if word.strip("[],").startswith("--")} - {"--help"}
    )


@pytest.mark.parametrize("module", (main_pretrain, main_finetune))
def test_flags(module, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = st.text(max_size=6) | st.sampled_from(
        (
            "0",
            "1",
            "2",
            "64",
            "0.5",
            "-1",
            "1e400",
            "nan",
            "inf",
            "-inf",
            "1e-9",
            "auto",
            "none",
            "benv2",
            "sen12flood",
            "train",
            "mixmim_tiny",
            "",
            " ",
            ".",
            "a/b",
            "a\0b",
            "--",
            "é",
            "9" * 40,
        )
    )
    options = st.sampled_from(options_of(module))
    parts = st.tuples(options, values).map(list) | (options | values).map(lambda word: [word])
    sensible = ["--data_path", ".", "--dataset", "benv2", "--model", "mixmim_tiny"]

    @examples
    @given(st.booleans(), st.lists(parts, max_size=5))
    def run(begins_sensibly, drawn):
        argv = [*(sensible if begins_sensibly else ()), *(word for part in drawn for word in part)]
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            try:
                args = module.parse_flags(argv)
            except SystemExit as end:
                assert end.code == 2 and len(err.getvalue().splitlines()) == 1 or {"-h", "--help"} & set(argv)
                return
        assert err.getvalue() == "" and args.batch_size >= 1 and (args.lr is None or args.lr > 0)
        assert not math.isnan(args.weight_decay)

    run()
    assert not list(tmp_path.iterdir())
