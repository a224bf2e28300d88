# SPDX-License-Identifier: MIT
"""Pairs of images of one's own as FloodDataset reads them: values, alignment, splits, names, and running again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from matplotlib.image import imread

import main_finetune
from common.errors import DataError
from sarwmix.packed import PackedDataset
from sarwmix.prepare import pack
from sarwmix.prepare.pair_table import _plain
from sarwmix.prepare.pairs import main
from sarwmix.raster import Image, Reading, files_of
from sarwmix.sen12flood_loader import _NAME, FloodDataset
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import write_csv, write_tif
from tests.helpers.runs import argv, completed, digests, launch, mpirun, refusal
from tests.helpers.sen12 import rows_of

S = 128
SAMPLES = os.environ.get("SARWMIX_SAMPLE_DATA", "")
HEADER = ("before", "after", "label")
UTM, OTHER_ZONE = "EPSG:32633", "EPSG:32634"


def grid(place=0, shift=0.0, crs=UTM):
    """Georeference of the image of a place, moved to the east by pixels."""
    return {"crs": crs, "transform": rasterio.Affine(10, 0, 500000 + 10000 * place + 10 * shift, 0, -10, 5000000)}


def image(path, vh, vv, size=(S, S), georeference=None):
    """A file of VV, then VH, constants or arrays, as its descriptions say."""
    values = np.stack([np.broadcast_to(np.float32(value), size) for value in (vv, vh)])
    return write_tif(path, values, ("VV", "VH"), **(grid() if georeference is None else georeference))


def band(path, value, georeference=None, **options):
    return write_tif(path, np.full((S, S), value, np.float32), **(georeference or grid()), **options)


def table(folder, *rows, header=HEADER, name="pairs.csv"):
    write_csv(folder / name, [header, *rows])
    return folder / name


def run(path, out, *flags):
    main(argv("--table", path, "--out", out, "--units dB --workers 1", flags))
    return out


def values_of(store, split="all"):
    """{name of the image in the store: (2, S, S) dB} as FloodDataset reads them, and the labels of its pairs by id."""
    dataset = FloodDataset(store, split)
    images = {
        str(name): dataset.read_image(i, which)
        for i, names in enumerate(dataset.image_names)
        for which, name in enumerate(names)
    }
    return images, dict(zip(dataset.ids.tolist(), dataset.label_table()[:, 1].tolist()))


@pytest.fixture
def places(tmp_path):
    """Four places with three dates each; the last shows a flood. Returns the path of the table, of twelve pairs."""
    rows = []
    for place in range(4):
        for date in range(3):
            speckle = np.random.default_rng((place, date)).normal(0, 1.5, (2, S, S))
            image(
                tmp_path / f"p{place}" / f"{date}.tif",
                *(speckle + [[[-17]], [[-10 - 8 * (date == 2)]]]),
                georeference=grid(place),
            )
        rows += [(f"p{place}/{a}.tif", f"p{place}/{b}.tif", int(b == 2)) for a, b in ((0, 1), (0, 2), (1, 2))]
    return table(tmp_path, *rows)


# ---- Values --------------------------------------------------------------------------------------


def test_known_values_come_back_from_one_file_and_two_and_shared_images_are_stored_once(tmp_path):
    image(tmp_path / "a.tif", -21.5, -12.25)
    band(tmp_path / "VV" / "b_vv.tif", -11)
    band(tmp_path / "VH" / "b_vh.tif", -18.75)
    band(tmp_path / "c1.tif", -19, descriptions=["VH"])
    band(tmp_path / "c2.tif", -10, descriptions=["VV"])
    rows = (
        ("a.tif", "VV/b_vv.tif", 0),
        ("a.tif", "c2.tif,c1.tif", 1),
        (tmp_path / "VH" / "b_vh.tif", "c1.tif,c2.tif", 1),
    )
    store = run(table(tmp_path, *rows), tmp_path / "store", "--test_fraction 0")
    images, labels = values_of(store)
    constants = {"a/a": (-21.5, -12.25), "a/b": (-18.75, -11), "a/c2": (-19, -10)}
    stored = [str(path.relative_to(store / "images").with_suffix("")) for path in store.rglob("*.npy")]
    assert sorted(stored) == sorted(constants)
    for name, expected in constants.items():
        assert np.abs(images[name] - np.reshape(expected, (2, 1, 1))).max() < 1e-4, name
    assert labels == {"a__a__b": 0, "a__a__c2": 1, "a__b__c2": 1}
    files = {row["image"]: row["files"] for row in rows_of(store / "sources.csv")}
    assert files == {"a/a": "a.tif", "a/b": "VH/b_vh.tif,VV/b_vv.tif", "a/c2": "c2.tif,c1.tif"}
    source = rows_of(store / "sources.csv")[0]
    assert (source["crs"], source["c"], source["nodata"]) == (UTM, "500000.0", "0.000000")


@pytest.mark.parametrize(
    "units, flags, value",
    [("linear", (), 0.02), ("amplitude", (), 0.02**0.5), ("dB", "--scale 0.1 --bands VV VH", 10 * np.log10(0.02) * 10)],
)
def test_units_are_stored_linear(tmp_path, units, flags, value):
    for name, factor in (("a", 1), ("b", 1.1)):
        vv = value * factor * (1 if units == "dB" else 2)
        image(tmp_path / f"{name}.tif", value * factor, vv)
    path = table(tmp_path, ("a.tif", "b.tif", 1))
    main(argv("--table", path, "--out", tmp_path / "store", "--units", units, "--workers 1 --test_fraction 0", flags))
    stored = np.load(tmp_path / "store" / "images" / "a" / "a.npy")
    assert stored.dtype == np.float32
    np.testing.assert_allclose(stored[0], 0.02, rtol=1e-5)


def test_no_data_are_nan_and_limited(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    vh = np.full((S, S), -20, np.float32)
    vh[:10], vh[10] = np.nan, -9999
    image(tmp_path / "a.tif", vh, -10)
    image(tmp_path / "b.tif", -21, -11)
    path = table(tmp_path, ("a.tif", "b.tif", 1))
    flags = ("--table", path, "--units dB --nodata -9999 --test_fraction 0 --workers 1 --out", tmp_path / "store")
    line = refusal(main, flags, capsys)
    assert "a.tif: 4.30% of the values are no data, more than the 1.00% of --max_nodata" in line
    assert list((tmp_path / "store").iterdir()) == []
    main(argv(flags, "--max_nodata 0.05"))
    assert "--max_nonfinite 0.05 --finetune" in caplog.text
    dataset = FloodDataset(tmp_path / "store", "train", max_nonfinite=0.05)
    first = dataset.read_image(0, 0)
    assert np.isnan(first[0, :11]).all() and np.isfinite(first[0, 11:]).all() and np.isfinite(first[1]).all()


def test_files_of_one_cell(tmp_path):
    for name in ("x_VV.tif", "x_VH.tif", "y_vv_1.tif", "y_vh_1.tif", "z_VV.tif", "HH_VV.tif", "HH_VH.tif", "a,b.tif"):
        (tmp_path / name).touch()

    def names(text):
        return [os.path.relpath(path, tmp_path) for path in files_of(text, tmp_path)]

    assert names("x_VV.tif") == names("x_VH.tif") == ["x_VH.tif", "x_VV.tif"]
    assert names("y_vv_1.tif") == ["y_vh_1.tif", "y_vv_1.tif"]
    assert names("z_VV.tif") == ["z_VV.tif"] and names("HH_VV.tif") == ["HH_VV.tif"]
    assert names("a,b.tif") == ["a,b.tif"] and names("x_VV.tif, z_VV.tif") == ["x_VV.tif", "z_VV.tif"]


def test_a_nodata_value_that_integers_cannot_hold(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.full((2, S, S), 100, np.uint8), ("VV", "VH"), **grid())
    read = Image.find("a", [path], Reading("amplitude", nodata=-9999, scale=0.001)).read()
    np.testing.assert_allclose(read, -20, atol=1e-4)


# ---- Tables and splits ---------------------------------------------------------------------------


def test_splits_are_drawn_by_place_and_both_labels_are_counted(places, tmp_path, caplog):
    caplog.set_level("INFO")
    store = run(places, tmp_path / "store", "--test_fraction 0.5 --draw_seed 3")
    train, test = FloodDataset(store, "train"), FloodDataset(store, "test")
    assert (len(train), len(test)) == (6, 6) and not set(train.groups) & set(test.groups)
    line = caplog.messages[-1]
    assert "train 6 pairs of 2 places (2 without flood, 4 with), test 6 pairs of 2 places" in line
    assert f"--dataset sen12flood --data_path {store} --val_fraction 0.1 --finetune CHECKPOINT" in line
    other = run(places, tmp_path / "other", "--test_fraction 0.5 --draw_seed 4")
    assert set(FloodDataset(other, "test").groups) != set(test.groups)
    run(places, store, "--test_fraction 0.5 --draw_seed 3")
    assert "already complete" in caplog.text


def test_without_a_test_split_the_log_says_what_finetuning_needs(places, tmp_path, caplog):
    caplog.set_level("INFO")
    store = run(places, tmp_path / "store", "--test_fraction 0")
    assert len(FloodDataset(store, "train")) == 12
    assert "--val_fraction 0.1 --test_split none" in caplog.text
    with pytest.raises(DataError, match="no pair of split 'test'"):
        FloodDataset(store, "test")


def test_images_of_one_grid_are_one_place(tmp_path):
    for k in range(6):
        image(tmp_path / f"{k}.tif", -20, -11, georeference=grid(k // 4))
    store = run(table(tmp_path, *((f"{k}.tif", f"{k + 1}.tif", 1) for k in (0, 2, 4))), tmp_path / "store")
    assert set(FloodDataset(store, "all").groups.tolist()) == {"0", "4"}


def test_images_that_overlap_with_others_of_the_training_split_are_named(tmp_path, caplog):
    for k, shift in enumerate((0, 64, S, 3 * S)):
        for name in "ab":
            image(tmp_path / f"{name}{k}.tif", -20, -11, georeference=grid(shift=shift))

    def overlaps(*splits):
        caplog.clear()
        rows = [(f"a{k}.tif", f"b{k}.tif", 1, split) for k, split in splits]
        run(table(tmp_path, *rows, header=(*HEADER, "split")), tmp_path / str(splits[0]))
        return [line for line in caplog.messages if "show ground" in line]

    assert overlaps((0, "train"), (2, "test"), (3, "test")) == []
    (line,) = overlaps((1, "train"), (2, "test"), (3, "test"))
    assert line.startswith("2 of 4 images of split test show ground") and "the first is a2/a2" in line


def test_stated_splits_and_groups_as_parquet(places, tmp_path):
    frame = pd.read_csv(places).assign(group=lambda f: "Køge Bugt, " + f.before.str[:2])
    frame["split"] = np.where(frame.before.str.startswith("p1"), "test", "train")
    frame.assign(note=1.5).to_parquet(tmp_path / "pairs.parquet")
    store = run(tmp_path / "pairs.parquet", tmp_path / "store")
    assert set(FloodDataset(store, "test").groups.tolist()) == {"Kge-Bugt-p1"}
    assert len(FloodDataset(store, "train")) == 9


def test_names_suit_the_dataset():
    names = _plain(
        ["a b", "a  b", "A-B", "__x__y__", ".hidden", "é", "洪水", "", "x" * 300, "x" * 300, "S1A_1SDV_2024.05"]
    )
    assert len({name.lower() for name in names}) == len(names) == 11
    assert all(re.fullmatch(_NAME, name) and len(name) < 110 for name in names)
    assert names[:2] == ["a-b", "a-b-2"] and names[3:5] == ["x_y", "hidden"] and names[-1] == "S1A_1SDV_2024.05"


# ---- Errors --------------------------------------------------------------------------------------


def good(folder):
    image(folder / "a.tif", -20, -11)
    image(folder / "b.tif", -21, -12)
    for k in (1, 2):
        for name in "ab":
            image(folder / f"{name}{k}.tif", -20, -11, georeference=grid(k))
    return [("a.tif", "b.tif", 1), ("a1.tif", "b1.tif", 0), ("a2.tif", "b2.tif", 1)]


def uint8(path):
    write_tif(path, np.full((2, S, S), 9, np.uint8), ("VV", "VH"), **grid())


FILES = {
    "half a pixel": (lambda b: image(b, -21, -12, georeference=grid(shift=0.5)), "b.tif: do not lie on one grid (0.5 pixels apart); warp the second: gdalwarp -t_srs EPSG:32633 -te 500000 4998720 501280 5000000 -ts 128 128"),
    "crs": (lambda b: image(b, -21, -12, georeference=grid(crs=OTHER_ZONE)), "(EPSG:32633 and EPSG:32634); warp"),
    "size": (lambda b: image(b, -21, -12, (2 * S, 2 * S)), "128x128 and 256x256 pixels"),
    "not square": (lambda b: image(b, -21, -12, (300, 400)), "b.tif: is 300x400 pixels, but images must be square, with a side that is a multiple of 128; crop it (gdal_translate -srcwin 0 0 256 256"),
    "small": (lambda b: image(b, -21, -12, (100, 100)), "take a larger area"),
    "8 bit": (uint8, "b.tif: holds uint8, but dB are fractions: --scale 0.1"),
    "missing": (lambda b: b.unlink(), "b.tif: does not exist"),
    "VV alone": (lambda b: write_tif(b, np.full((S, S), -11, np.float32), ("VV",), **grid()), "b.tif: holds only VV, and VH is needed, too"),
    "bare": (lambda b: image(b, -21, -12, georeference={}), "b.tif: the second has no coordinate system, so that it cannot be seen whether"),
    "linear": (lambda b: image(b, 0.01, 0.1), "b.tif: VH is never negative, so it looks linear"),
    "torn": (lambda b: b.write_bytes(b.read_bytes()[:9000]), "b.tif: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_used_is_one_line_or_left_out(tmp_path, case, capsys, caplog):
    caplog.set_level("INFO")
    rows = good(tmp_path)
    spoil, said = FILES[case]
    spoil(tmp_path / "b.tif")
    flags = ("--table", table(tmp_path, *rows), "--units dB --workers 1 --out", tmp_path / "store")
    line = refusal(main, flags, capsys)
    assert "1 of 3 pairs cannot be used" in line and said in line and "--skip_bad" in line
    assert not (tmp_path / "store").exists() or list((tmp_path / "store").iterdir()) == []
    main(argv(flags, "--skip_bad --test_fraction 0.5"))
    assert "1 pairs cannot be used and are left out" in caplog.text
    (bad,) = rows_of(tmp_path / "store" / "bad.csv")
    assert (bad["row"], bad["before"], bad["after"]) == ("pairs.csv:2", "a.tif", "b.tif") and said in bad["reason"]
    assert sorted(path.stem for path in (tmp_path / "store").rglob("*.npy")) == ["a1", "a2", "b1", "b2"]
    assert len(FloodDataset(tmp_path / "store", "all")) == 2


TABLES = {
    "label": (lambda rows: [*rows, ("a.tif", "b1.tif", "flood")], HEADER, "column label is no label in 1 of 4 rows: 'flood' (pairs.csv:5); it must be 1 (flood in the second image) or 0"),
    "duplicate": (lambda rows: [*rows, ("./a.tif", "b.tif", 0)], HEADER, "1 rows repeat a pair: pairs.csv:2 and pairs.csv:5"),
    "same": (lambda rows: [*rows, ("a.tif", "a.tif", 0)], HEADER, "before and after are the same image in 1 rows: pairs.csv:5"),
    "column": (lambda rows: rows, ("before", "After", "label"), "has no column after (columns: 'before', 'After', 'label')"),
    "empty": (lambda rows: [], HEADER, "has no rows"),
    "cell": (lambda rows: [*rows, ("", "a.tif", 1)], HEADER, "column before is empty in 1 of 4 rows: '' (pairs.csv:5)"),
    "cells": (lambda rows: [*rows, ("a.tif", "b_VV.tif", "b_VH.tif", 1)], HEADER, 'pairs.csv:5; correct the rows; a cell with a comma in it is written in quotation marks, "VV.tif,VH.tif"'),
    "split": (lambda rows: [(*row, "val") for row in rows], (*HEADER, "split"), "it must be train or test; validation is drawn in training"),
    "splits": (lambda rows: [("a.tif", "b.tif", 1, "train"), ("b.tif", "a.tif", 0, "test")], (*HEADER, "split"), "1 places are in both splits: a; images of one place"),
    "groups": (lambda rows: [("a.tif", "b.tif", 1, "x"), ("b.tif", "a.tif", 0, "y")], (*HEADER, "group"), "images are in several groups"),
    "files": (
        lambda rows: [*rows, ("a.tif,b.tif", "b1.tif", 1)],
        HEADER,
        "2 files are named in several combinations",
    ),
    "one place": (lambda rows: rows[:1], HEADER, "--test_fraction 0.2 of 1 place leaves nothing to train on"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_a_wrong_table_is_one_line(tmp_path, case, capsys):
    change, header, said = TABLES[case]
    path = table(tmp_path, *change(good(tmp_path)), header=header)
    assert said in refusal(main, ("--table", path, "--units dB --workers 1 --out", tmp_path / "store"), capsys)
    assert not (tmp_path / "store").exists()


def test_images_of_another_size_than_most(tmp_path, capsys):
    rows = good(tmp_path)
    for name in "ab":
        image(tmp_path / f"{name}.tif", -20, -11, (2 * S, 2 * S))
    line = refusal(
        main, ("--table", table(tmp_path, *rows), "--units dB --workers 1 --out", tmp_path / "store"), capsys
    )
    assert (
        "a.tif and " in line and "are 256x256 pixels, but most images 128x128" in line and "-srcwin 0 0 128 128" in line
    )


def test_wrong_flags_are_one_line(tmp_path, capsys):
    path = table(tmp_path, *((*row, "train") for row in good(tmp_path)), header=(*HEADER, "split"))
    flags = ("--table", path, "--workers 1 --out", tmp_path / "store")
    assert "--units" in refusal(main, flags, capsys)
    assert "has a column split; leave the flag out" in refusal(main, (flags, "--units dB --test_fraction 0.5"), capsys)
    assert "none.csv" in refusal(main, ("--table none.csv --units dB --out", tmp_path / "store"), capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not empty" in refusal(main, ("--table", path, "--units dB --workers 1 --out", tmp_path / "full"), capsys)
    run(path, tmp_path / "store")
    assert "made with other parameters" in refusal(main, (flags, "--units dB --max_nodata 0.5"), capsys)


def test_grids_that_differ_by_less_than_a_hundredth_of_a_pixel_are_one(tmp_path):
    rows = good(tmp_path)
    image(tmp_path / "b.tif", -21, -12, georeference=grid(shift=0.009))
    assert len(FloodDataset(run(table(tmp_path, *rows), tmp_path / "store"), "all")) == 3


def test_images_without_a_coordinate_system_only_if_that_is_insisted_on(tmp_path, capsys):
    for name, size in (("a", S), ("b", S), ("c", 2 * S)):
        image(tmp_path / f"{name}.tif", -20, -11, (size, size), georeference={})
    flags = (
        "--table",
        table(tmp_path, ("a.tif", "b.tif", 1)),
        "--units dB --test_fraction 0 --workers 1 --out",
        tmp_path / "store",
    )
    assert "insist with --unreferenced" in refusal(main, flags, capsys)
    main(argv(flags, "--unreferenced"))
    assert rows_of(tmp_path / "store" / "sources.csv")[0]["crs"] == ""
    table(tmp_path, ("a.tif", "c.tif", 1))
    other = (*flags[:-1], tmp_path / "other", "--unreferenced")
    assert "128x128 and 256x256 pixels" in refusal(main, other, capsys)


# ---- Running again, processes and ranks ----------------------------------------------------------

KILLED = """
import os, signal, sys
import common.files as files
from sarwmix.prepare.pairs import main

written, replace = [0], os.replace

def killing(source, target):
    written[0] += str(target).endswith(sys.argv[1])
    if written[0] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

files.os.replace = killing
main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [".npy 1", ".npy 7", "pairs_test.csv 1"])
def test_a_killed_run_is_continued_to_the_same_bytes(places, tmp_path, at):
    whole = run(places, tmp_path / "whole")
    flags = argv("--table", places, "--units dB --workers 1 --out", tmp_path / "store")
    killed = subprocess.run([sys.executable, "-c", KILLED, *argv(at), *flags], cwd=ROOT, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert list((tmp_path / "store").rglob(".*.tmp")) and not (tmp_path / "store" / "pairs_test.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("[!.]*.npy")}
    main(flags)
    assert digests(tmp_path / "store") == digests(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_two_processes_and_two_ranks_write_what_one_writes(places, tmp_path):
    (places.parent / "p1" / "1.tif").unlink()
    flags = argv("--skip_bad --units dB --table", places)
    whole = run(places, tmp_path / "whole", "--skip_bad")
    assert len(rows_of(whole / "bad.csv")) == 2
    command = argv(sys.executable, "-m sarwmix.pairs", flags)
    launch([command, "--workers 2 --out", tmp_path / "processes"])
    assert digests(tmp_path / "processes") == digests(whole)
    launch(mpirun(command, "--workers 1 --out", tmp_path / "ranks"))
    assert digests(tmp_path / "ranks") == digests(whole)


# ---- Training and packing ------------------------------------------------------------------------


def test_the_store_can_be_packed(places, tmp_path):
    store = run(places, tmp_path / "store")
    pack.main(argv("--dataset sen12flood --dtype float32 --workers 1 --data_path", store, "--out", tmp_path / "packed"))
    for split in ("train", "test"):
        packed, unpacked = PackedDataset(tmp_path / "packed", split), FloodDataset(store, split)
        assert packed.ids.tolist() == unpacked.ids.tolist()
        for i in range(len(packed)):
            assert all(np.array_equal(*images) for images in zip(packed[i], unpacked[i]))


@pytest.mark.slow
@pytest.mark.parametrize("fraction, flags", [(0.25, ()), (0, "--val_fraction 0.3 --test_split none")])
def test_main_finetune_trains_on_the_store(places, tmp_path, program, fraction, flags):
    store = run(places, tmp_path / "store", "--test_fraction", fraction)
    common = "--model mixmim_tiny --batch_size 4 --num_workers 0 --warmup_epochs 1 --lr 1e-3 --device cpu --epochs 1 --finetune ''"
    out = ("--data_path", store, "--output_dir", tmp_path / "run")
    said = completed(program(main_finetune, "--dataset sen12flood", common, flags, out))
    assert "Best Results Summary" in said


# ---- Real images ---------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.isdir(os.path.join(SAMPLES, "porto_alegre_2024")), reason="no sample data")
def test_real_floods_of_porto_alegre(tmp_path):
    rows, known, dates = [], {}, ("porto_alegre_s1_preflood", "porto_alegre_s1")
    for tile in ("2_1", "3_2"):
        for date in dates:
            found = sorted((Path(SAMPLES) / "porto_alegre_2024" / date).glob(f"*_{tile}.png"))
            red, green = (np.round(imread(found[0]) * 255).astype(np.float32)[..., k] for k in (0, 1))
            known[tile, date] = green / 255 * 30 - 30, red / 255 * 30 - 30
            image(tmp_path / date / f"{tile}.tif", *known[tile, date], red.shape, {})
        rows.append((*(f"{date}/{tile}.tif" for date in dates), 1))
    store = run(table(tmp_path, *rows), tmp_path / "store", "--unreferenced --test_fraction 0.5")
    dataset = FloodDataset(store, "all")
    assert (len(dataset), dataset.size) == (2, 512)
    for i, name in enumerate(dataset.ids.tolist()):
        tile = name.split("__")[1][-3:]
        for which, date in enumerate(dates):
            np.testing.assert_allclose(dataset.read_image(i, which), known[tile, date], atol=1e-4)
            assert np.median(np.subtract(*known[tile, date])) < -4
