# SPDX-License-Identifier: MIT
"""BigEarthNet v1 to Zarr: equal values, lists, restart, patches that cannot be read, bit rot, and wrong flags."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr

from common.errors import DataError
from common.workers import Workers
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.prepare.benv1_to_zarr import DISK_BYTES, convert, main, verify
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import (
    V1_CLASSES,
    V1_LABELS,
    classes_of,
    needs_samples,
    one_line,
    s1_name,
    s2_name,
    sample_path,
    write_csv,
    write_tif,
    write_v1_patch,
    write_v1_zarr,
)
from tests.helpers.runs import Argv, argv, launch, mpirun

pytestmark = pytest.mark.slow

LISTS = {"train": (2, 0), "val": (3,), "test": (1,)}  # patches of each official list, in its order
WRITTEN = {f"benv1_{split}.csv" for split in LISTS}


@pytest.fixture
def root(tmp_path):
    """Four patches with values of their own, a few of them not finite, and official lists of S2 names beside them."""
    folder = tmp_path / "data" / "BigEarthNet-S1-v1.0"
    for k in range(4):
        values = np.random.default_rng(k).normal(-20, 3, (120, 120)).astype(np.float32)
        values[k, :3] = np.nan, np.inf, -np.inf
        write_v1_patch(folder, k, labels=V1_LABELS[k % 3], vh=values)
    for split, patches in LISTS.items():
        write_csv(tmp_path / f"{split}.csv", [[s2_name(k)] for k in patches])
    return tmp_path


def flags(root, out="out", lists=LISTS):
    named = [word for split in lists for word in (f"--{split}", str(root / f"{split}.csv"))]
    return ["--root", str(root / "data"), "--out", str(root / out), *named]


def fails(capsys, arguments, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stopped.value.code == 2 and len(lines) == 1
    for word in words:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"


def tree(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def patch_folder(out, k):
    return out / "benv1.zarr" / "sentinel1" / s1_name(k)


def tif(root, k, channel="VH"):
    return root / "data" / "BigEarthNet-S1-v1.0" / s1_name(k) / f"{s1_name(k)}_{channel}.tif"


# ---- Content -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [lambda k: [s2_name(k)], lambda k: [s2_name(k), s1_name(k)], lambda k: [s1_name(k)]])
def test_it_reads_like_the_folders(root, rows):
    for split, patches in LISTS.items():
        write_csv(root / f"{split}.csv", [rows(k) for k in patches])
    main(flags(root))
    for split, patches in LISTS.items():
        stored = BigEarthNetv1(root / "out" / "benv1.zarr", split)
        original = BigEarthNetv1(root / "data", split, metadata=root / f"{split}.csv")
        stored.check_files()
        assert stored.ids.tolist() == original.ids.tolist() == [s1_name(k) for k in patches]
        for k, (image, labels), (expected, _) in zip(patches, stored, original):
            np.testing.assert_array_equal(image, expected)
            assert image.isfinite().sum() == 2 * 14400 - 3 and classes_of(labels) == V1_CLASSES[k % 3]
        assert table(root / "out" / f"benv1_{split}.csv") == [[s2_name(k), s1_name(k)] for k in patches]
    assert len(BigEarthNetv1(root / "out" / "benv1.zarr", id_col=1)) == 3  # train and val


def test_the_layout_is_what_the_package_reads(root):
    main(flags(root))
    group = zarr.open_group(root / "out" / "benv1.zarr", mode="r")
    assert group.metadata.zarr_format == 3 and list(group) == ["sentinel1"]
    assert sorted(group["sentinel1"]) == sorted(s1_name(k) for k in range(4))
    patch = group["sentinel1"][s1_name(1)]
    assert dict(patch.attrs) == {"labels": V1_LABELS[1], "corresponding_s2_patch": s2_name(1)}
    assert sorted(patch) == ["VH", "VV"]
    for channel in ("VH", "VV"):
        array = patch[channel]
        assert array.shape == array.chunks == (120, 120) and array.dtype == np.float32
        assert [codec["name"] for codec in array.metadata.to_dict()["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert (patch["VV"][:] == -11).all() and np.isnan(array.fill_value)


def test_records(root):
    main(flags(root))
    out, folder = root / "out", root / "data" / "BigEarthNet-S1-v1.0"
    assert {path.name for path in out.iterdir()} == {
        "benv1.zarr",
        "bad.csv",
        "manifest.csv",
        "conversion.json",
        *WRITTEN,
    }
    assert table(out / "bad.csv") == [["patch", "reason"]]
    header, *rows = table(out / "manifest.csv")
    assert header == ["patch", "sha256"] and [row[0] for row in rows] == sorted(s1_name(k) for k in range(4))
    image = BigEarthNetv1(folder, "all").image(1).numpy()
    assert dict(rows)[s1_name(1)] == hashlib.sha256(image.tobytes() + json.dumps(V1_LABELS[1]).encode()).hexdigest()
    everything = "".join(path.read_text("latin-1") for path in out.rglob("*") if path.is_file())
    assert str(root) not in everything


def test_a_constant_image_has_a_chunk(root):
    """The package leaves chunks of the fill value out."""
    write_tif(tif(root, 0), np.nan)
    write_tif(tif(root, 1), 0.0)
    main(argv(*flags(root), "--max_nonfinite 1"))
    data = BigEarthNetv1(root / "out" / "benv1.zarr", "all", max_nonfinite=1)
    data.check_files()
    images = {name: data.image(i)[0] for i, name in enumerate(data.ids.tolist())}
    assert images[s1_name(0)].isnan().all() and (images[s1_name(1)] == 0).all()


@needs_samples
def test_real_samples(tmp_path):
    main(argv("--root", sample_path("benv1"), "--out", tmp_path / "out"))
    original, stored = BigEarthNetv1(sample_path("benv1"), "all"), BigEarthNetv1(tmp_path / "out" / "benv1.zarr", "all")
    assert len(stored) == 6 and stored.ids.tolist() == original.ids.tolist()
    for (image, labels), (expected, classes) in zip(stored, original):
        assert torch.equal(image, expected) and torch.equal(labels, classes) and labels.any() and image.std() > 1
    assert verify(tmp_path / "out", Workers()) == 6


def test_some_lists_or_none(root, caplog):
    with caplog.at_level("INFO"):
        main(flags(root, "val", ("val",)))
        assert {path.name for path in (root / "val").glob("benv1_*")} == {"benv1_val.csv"}
        assert "no split lists" not in caplog.text
        main(flags(root, "all", ()))
    assert not list((root / "all").glob("benv1_*"))
    assert "no split lists were given: all 4 patches are converted" in caplog.text
    assert [row[0] for row in table(root / "val" / "manifest.csv")[1:]] == [s1_name(3)]
    assert BigEarthNetv1(root / "all" / "benv1.zarr", "all").ids.tolist() == sorted(s1_name(k) for k in range(4))


# ---- Running again -------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from sarwmix.prepare import benv1_to_zarr
from common import files
def killing(real, at):
    count = 0
    def work(*args, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return work
holder, name, at = {"write": (Path, "write_bytes", 15), "rename": (os, "rename", 3), "sync": (os, "sync", 1),
                    "place": (os, "replace", int(sys.argv[2]))}[sys.argv[1]]
setattr(holder, name, killing(getattr(holder, name), at))
benv1_to_zarr.main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    "blow, at, whole",
    (("write", 0, 2), ("rename", 0, 2), ("place", 4, 4), ("sync", 0, 4), ("place", 6, 4), ("place", 8, 4)),
)
def test_a_killed_run_is_completed_identically(root, blow, at, whole):
    main(flags(root, "whole"))
    command = [sys.executable, "-c", KILLED, blow, str(at), *flags(root), "--workers", "1"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -9
    out = root / "out"
    assert not (out / "manifest.csv").exists()
    assert len(list((out / "benv1.zarr" / "sentinel1").glob("S1A*"))) == whole
    before = {path: path.stat().st_mtime_ns for path in patch_folder(out, 0).rglob("*")}
    main(flags(root))
    assert tree(out) == tree(root / "whole")
    assert before == {path: path.stat().st_mtime_ns for path in before}  # what was whole was left alone


def test_what_a_crash_of_the_machine_left_is_done_again(root):
    main(flags(root, "whole"))
    main(flags(root))
    out = root / "out"
    for name in ("manifest.csv", "benv1_val.csv"):
        (out / name).unlink()
    (patch_folder(out, 0) / "VH" / "c.0.0").write_bytes(b"")
    (patch_folder(out, 1) / "zarr.json").write_bytes(b"")
    (patch_folder(out, 2) / "VV" / "c.0.0").unlink()
    (out / "benv1.zarr" / "sentinel1" / "zarr.json").write_bytes(b"")
    main(flags(root))
    assert tree(out) == tree(root / "whole")


def test_a_finished_conversion_is_left_alone(root, caplog):
    main(flags(root))
    before = {path: path.stat().st_mtime_ns for path in (root / "out").rglob("*")}
    with caplog.at_level("INFO"):
        main(flags(root))
    assert "nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (root / "out").rglob("*")} == before


def test_other_lists_are_another_conversion(root, capsys):
    main(flags(root))
    before = tree(root / "out")
    fails(capsys, flags(root, lists=("train",)), "--out", "other parameters")
    write_csv(root / "val.csv", [[s2_name(0)]])
    fails(capsys, flags(root), "--out", "other parameters")
    assert tree(root / "out") == before


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_two_ranks_write_what_one_process_writes(root):
    for k in range(4, 9):
        write_v1_patch(root / "data" / "BigEarthNet-S1-v1.0", k, labels=V1_LABELS[0])
    parts = "import sys; from sarwmix.prepare import benv1_to_zarr as z; z.CHUNK = 2; z.main(sys.argv[1:])"  # five for two ranks
    launch(mpirun(sys.executable, "-c", Argv([parts]), *flags(root, "two", ()), "--workers", 1))
    main(flags(root, "one", ()))
    assert tree(root / "two") == tree(root / "one") and len(table(root / "one" / "manifest.csv")) == 10
    result = subprocess.run(
        mpirun(sys.executable, "-m", "sarwmix.prepare.benv1_to_zarr", "--out", root / "none", "--verify"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 and result.stderr.count("error: ") == 1 and "manifest.csv" in result.stderr


def test_two_processes_write_what_one_writes(root, monkeypatch):
    monkeypatch.setattr("sarwmix.prepare.benv1_to_zarr.CHUNK", 1)
    main(argv(*flags(root, "two"), "--workers 2"))
    main(argv(*flags(root, "one"), "--workers 1"))
    assert tree(root / "two") == tree(root / "one")


# ---- Patches that cannot be read -----------------------------------------------------------------


def spoil(root):
    """Patch 0 is truncated, 3 is not there."""
    path = tif(root, 0)
    path.write_bytes(path.read_bytes()[:20000])
    shutil.move(tif(root, 3).parent, root / "kept")
    return path


@pytest.mark.parametrize("pairs", [True, False])
def test_bad_patches_end_the_run_when_all_others_are_converted(root, capsys, pairs):
    if pairs:
        for split, patches in LISTS.items():
            write_csv(root / f"{split}.csv", [[s2_name(k), s1_name(k)] for k in patches])
    main(flags(root, "whole"))
    good = tif(root, 0).read_bytes()
    spoil(root)
    out, lost = root / "out", s1_name(3) if pairs else s2_name(3)
    for _ in range(2):
        fails(
            capsys,
            flags(root),
            "2 of 4 patches could not be converted",
            f"{s1_name(0)} ({s1_name(0)}/{s1_name(0)}_VH.tif: cannot be read",
            lost,
            "--skip_bad",
            "bad.csv",
        )
        assert sorted(path.name for path in out.iterdir()) == ["bad.csv", "benv1.zarr", "conversion.json"]
        assert [row[0] for row in table(out / "bad.csv")] == ["patch", *sorted([s1_name(0), lost])]
        assert str(root) not in (out / "bad.csv").read_text()
        assert {path.name for path in (out / "benv1.zarr" / "sentinel1").glob("S1*")} == {s1_name(1), s1_name(2)}
    before = {path: path.stat().st_mtime_ns for path in patch_folder(out, 1).rglob("*")}
    tif(root, 0).write_bytes(good)
    shutil.move(root / "kept", tif(root, 3).parent)
    main(flags(root))
    assert tree(out) == tree(root / "whole")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_skip_bad_leaves_them_out_of_the_lists(root, capsys):
    spoil(root)
    fails(capsys, flags(root), "2 of 4 patches")
    main(argv(*flags(root), "--skip_bad"))
    out = root / "out"
    assert table(out / "benv1_train.csv") == [[s2_name(2), s1_name(2)]] and table(out / "benv1_val.csv") == []
    assert [row[0] for row in table(out / "manifest.csv")[1:]] == [s1_name(1), s1_name(2)]
    assert len(table(out / "bad.csv")) == 3
    assert verify(out, Workers()) == 2
    main(argv(*flags(root), "--skip_bad"))
    fails(capsys, flags(root), "complete except for 2 patches", "bad.csv", "manifest.csv", "--skip_bad")
    main(argv(*flags(root, "at_once"), "--skip_bad"))
    assert tree(root / "at_once") == tree(out)


def test_nothing_but_bad_patches_is_no_store(root, capsys):
    for k in range(4):
        tif(root, k).unlink()
    fails(capsys, [*flags(root), "--skip_bad"], "4 of 4 patches could not be converted", "does not exist")
    assert not (root / "out" / "manifest.csv").exists()


@pytest.mark.parametrize(
    "content, reason",
    (
        ({"labels": ["Pastures", "Sea"], "corresponding_s2_patch": s2_name(1)}, "unknown label 'Sea'"),
        ({"labels": "Pastures", "corresponding_s2_patch": s2_name(1)}, "no list of labels"),
        ({"labels": ["Pastures"]}, "no corresponding_s2_patch"),
        ("{", "cannot be read as JSON"),
    ),
)
def test_faulty_metadata_are_bad(root, capsys, content, reason):
    path = root / "data" / "BigEarthNet-S1-v1.0" / s1_name(1) / f"{s1_name(1)}_labels_metadata.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    fails(capsys, flags(root), "1 of 4 patches could not be converted", f"{s1_name(1)}_labels_metadata.json", reason)
    fails(capsys, flags(root, "every", ()), "1 of 4 patches could not be converted", reason)


def test_faulty_images_are_bad(root, capsys):
    write_tif(tif(root, 0), np.zeros((119, 120), np.float32))
    values = np.full((120, 120), -20, np.float32)
    values[:2] = np.nan
    write_tif(tif(root, 1, "VV"), values)
    fails(capsys, flags(root), "2 of 4", "119x120 pixels", "1.67%")
    main(argv(*flags(root, "more"), "--max_nonfinite 0.02 --skip_bad"))
    assert len(table(root / "more" / "bad.csv")) == 2


def test_repeated_ids(root, capsys):
    write_csv(root / "test.csv", [[s2_name(1)], [s2_name(0)]])
    fails(capsys, flags(root), "1 of 5 rows repeat an id", f"{s1_name(0)} (", "train.csv:2 and ", "test.csv:2")
    write_csv(root / "train.csv", [[s2_name(2), s1_name(2)], [s2_name(1), s1_name(1)]])  # the other lists have S2 names
    fails(capsys, flags(root), "1 of 5 rows repeat an id", s1_name(1))
    assert not (root / "out").exists()
    write_csv(root / "test.csv", [[s2_name(0)]])
    main(flags(root))


# ---- Bit rot -------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_chunk_is_noticed(root, capsys):
    main(flags(root))
    path = patch_folder(root / "out", 2) / "VV" / "c.0.0"
    whole = path.read_bytes()
    data = BigEarthNetv1(root / "out" / "benv1.zarr", "train")
    assert data.ids[0] == s1_name(2) and len(whole) > 20
    for place in {*range(0, len(whole), 7), *range(12), *range(len(whole) - 8, len(whole))}:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError) as error:
            data[0]
        one_line(error, str(path.parent), "copy it again")
    fails(
        capsys, ["--out", str(root / "out"), "--verify"], "1 of 4 patches differ from manifest.csv", f"{s1_name(2)}/VV"
    )
    path.write_bytes(whole)
    assert verify(root / "out", Workers()) == 4


def test_verify_finds_what_is_changed_lost_or_added(root, capsys):
    out = root / "out"
    main(flags(root))
    shutil.copytree(patch_folder(out, 0), patch_folder(out, 7))
    attributes = patch_folder(out, 1) / "zarr.json"
    attributes.write_text(attributes.read_text().replace("Bare rock", "Pastures"))
    shutil.copy(
        patch_folder(out, 0) / "VH" / "c.0.0", patch_folder(out, 2) / "VH" / "c.0.0"
    )  # whole, but another patch's
    shutil.rmtree(patch_folder(out, 3))
    fails(
        capsys,
        ["--out", str(out), "--verify"],
        "4 of 4",
        f"{s1_name(1)}: has other values or labels",
        f"{s1_name(2)}: has other values",
        f"{s1_name(3)}/VH: cannot be read",
        f"{s1_name(7)}: is not in manifest.csv",
    )
    (out / "manifest.csv").write_text("patch\n")
    fails(capsys, ["--out", str(out), "--verify"], "manifest.csv", "is not a list")
    (out / "manifest.csv").unlink()
    fails(capsys, ["--out", str(out), "--verify"], "manifest.csv", "not complete")


# ---- Flags ---------------------------------------------------------------------------------------


def test_wrong_flags(root, capsys):
    out = ["--out", str(root / "out")]
    for arguments, words in (
        (out, ("--root is missing",)),
        ([*out, "--root", str(root / "none")], ("none: no such folder",)),
        ([*flags(root), "--verify"], ("--verify can be used only with --out",)),
        ([*flags(root), "--max_nonfinite", "2"], ("--max_nonfinite 2",)),
        ([*flags(root), "--id_col", "-1"], ("--id_col counts from 0",)),
        ([*flags(root, lists=("val",)), "--test", str(root / "no.csv")], ("no.csv", "no such list")),
        ([*out, "--root", str(write_v1_zarr(root / "v1.zarr", 2))], ("is a Zarr store already",)),
    ):
        fails(capsys, arguments, *words)
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("keep")
    fails(capsys, flags(root, "mine"), "--out", "not empty")
    assert os.listdir(root / "mine") == ["thesis.txt"]


def test_room_is_looked_for_first(root, monkeypatch):
    needs = []
    monkeypatch.setattr("sarwmix.prepare.benv1_to_zarr.check_room", needs.extend)
    convert(root / "data", root / "out", {}, None, 0.01, False, Workers())
    assert needs == [("--out", root / "out", 4 * DISK_BYTES)]
    size = sum(path.stat().st_blocks * 512 for path in patch_folder(root / "out", 0).rglob("*"))
    assert size < DISK_BYTES
    (root / "out" / "manifest.csv").unlink()
    convert(root / "data", root / "out", {}, None, 0.01, False, Workers())
    assert needs[1] == ("--out", root / "out", 0)
