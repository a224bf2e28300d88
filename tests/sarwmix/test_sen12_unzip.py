# SPDX-License-Identifier: MIT
"""What is taken out of the zip of SEN12-FLOOD, and what happens when that is hostile, damaged, or stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections import namedtuple

import pytest

from common.safe_zip import open_archive
from sarwmix.prepare.sen12_index import read_s1_list
from sarwmix.prepare.sen12_unzip import main, plan, unzip
from sarwmix.simulate.flood_archive import RawParameters, simulate_raw_floods
from tests.helpers import ROOT
from tests.helpers.runs import argv, launch, mpirun, refusal
from tests.helpers.zips import HOSTILE, make, patch

pytestmark = pytest.mark.slow

IMAGE = "S1A_IW_GRDH_1SDV_20000101T000000_20000101T000025_000001_000001_AB{:02X}_corrected_{}.tif"
FREE = namedtuple("FREE", "total used free")
MODULE = (sys.executable, "-m", "sarwmix.prepare.sen12_unzip")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder with a simulated SEN12FLOOD.zip and the same as a tree."""
    out = tmp_path_factory.mktemp("simulated") / "raw"
    simulate_raw_floods(out, RawParameters(folders=3, size=128, images=3, keep_tree=True))
    return out


@pytest.fixture
def small(tmp_path):
    """A zip of two folders with two images each: (path, {name: content})."""
    members = {
        f"{folder}/{IMAGE.format(n, band)}": f"{folder} {n} {band}".encode()
        for folder in ("0001", "1")
        for n in range(2)
        for band in ("VH", "VV")
    }
    members |= {f"{folder}/S2_2000-01-03_B04.tif": f"{folder} red".encode() for folder in ("0001", "1")}
    members["S1list.json"] = json.dumps({"0001": {}, "1": {}}).encode()
    return tmp_path / "small.zip", members


def content_of(folder, apart=("step.json", "unzipped.json")):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in apart
    }


def refused(capsys, *flags):
    """The one line that the program leaves with status 2."""
    return refusal(main, flags, capsys)


# ---- What is wanted ------------------------------------------------------------------------------


def test_what_the_preparation_reads_is_extracted_and_nothing_else(raw, tmp_path, caplog):
    caplog.set_level("INFO")
    unzip(raw / "SEN12FLOOD.zip", tmp_path / "out")
    assert caplog.messages[-1].startswith(f"{tmp_path / 'out'}: extracted 3 folders, ")
    tree = content_of(raw / "SEN12FLOOD")
    wanted = {
        name: content
        for name, content in tree.items()
        if name.endswith(("_VH.tif", "_VV.tif", "_B04.tif")) or name == "S1list.json"
    }
    assert content_of(tmp_path / "out") == wanted and 20 < len(wanted) < len(tree)
    assert json.loads((tmp_path / "out" / "unzipped.json").read_text()) == {
        "folders": 3,
        "files": len(wanted),
        "bytes": sum(map(len, wanted.values())),
        "left_out": len(tree) - len(wanted),
        "s1_list": True,
    }
    step = json.loads((tmp_path / "out" / "step.json").read_text())
    assert step["program"] == "sarwmix.prepare.sen12_unzip"
    assert step["zip_bytes"] == (raw / "SEN12FLOOD.zip").stat().st_size
    assert set(step) == {"program", "zip_bytes", "zip_directory_sha256"}
    assert len(read_s1_list(tmp_path / "out" / "S1list.json")) == 3


def test_what_is_extracted_is_compared(tmp_path, caplog):
    caplog.set_level("INFO")
    name = IMAGE.replace("2000", "2019")
    images = [name.format(0, "VH"), name.format(0, "VV"), name.format(1, "VV"), "S2_2019-01-03_B04.tif"]
    members = {f"0001/{image}": b"image" for image in images} | {"S1list.json": b"{}"}
    unzip(make(tmp_path / "data.zip", members), tmp_path / "out")
    assert caplog.messages[-1].endswith(
        ": extracted 1 of 335 folders, 2 of 3,957 images, 1 of 15 images of one polarisation"
    )


@pytest.mark.parametrize("root", ("", "SEN12FLOOD/", "a b/c/SEN12FLOOD/"))
@pytest.mark.parametrize("with_list", (True, False))
def test_the_root_is_found_under_leading_folders(root, with_list, small, tmp_path, caplog):
    path, members = small
    if not with_list:
        del members["S1list.json"]
    deeper = {f"{root}0001/old/S1list.json": b"{}"} if with_list else {}
    others = {**deeper, "README.md": b"", f"{root}0001/S2_2000-01-03_B8A.tif": b""}
    make(path, {**{root + name: content for name, content in members.items()}, **others})
    with open_archive(path) as archive:
        planned = plan(archive)
    assert planned.root == root and planned.wanted == {name: root + name for name in members}
    assert planned.bytes == sum(map(len, members.values())) and planned.left_out == len(others)
    assert planned.s1_list == ({"0001": {}, "1": {}} if with_list else None)
    assert ("--s1_list" in caplog.text) != with_list
    unzip(path, tmp_path / "out")
    assert content_of(tmp_path / "out") == members


def test_images_that_lie_elsewhere_are_told(small, caplog):
    path, members = small
    make(path, {**members, f"0001/more/{IMAGE.format(9, 'VV')}": b"", f"{IMAGE.format(9, 'VV')}": b""})
    with open_archive(path) as archive:
        assert set(plan(archive).wanted) == set(members)
    assert "1 Sentinel-1 images lie elsewhere" in caplog.text and "0001/more/" in caplog.text


@pytest.mark.parametrize(
    "change, words",
    (
        (lambda members: {"notes.txt": b""}, "holds neither S1list.json nor any"),
        (lambda members: {"S1list.json": b"{}"}, "give the zip of SEN12-FLOOD"),
        (
            lambda members: {f"{root}/{name}": content for root in "ab" for name, content in members.items()},
            "more than one data set ('a/', 'b/')",
        ),
        (
            lambda members: {f"{root}/{name}": b"" for root in "ab" for name in members if name != "S1list.json"},
            "more than one data set",
        ),
        (lambda members: {**members, "S1list.json": b"{"}, "S1list.json cannot be read as JSON"),
        (lambda members: {**members, "S1list.json": b"[" * 10**6}, "S1list.json cannot be read as JSON"),
    ),
)
def test_other_zips_are_refused(change, words, small, tmp_path, capsys):
    path, members = small
    make(path, change(members))
    line = refused(capsys, "--zip", path, "--out", tmp_path / "out")
    assert str(path) in line and words in line and not (tmp_path / "out").exists()


# ---- Harm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_zips_leave_nothing_at_all(case, tmp_path, capsys):
    maker, words = HOSTILE[case]
    path = maker(tmp_path / "in" / "data.zip")
    before = content_of(tmp_path)
    line = refused(capsys, "--zip", path, "--out", tmp_path / "new" / "out")
    assert str(path) in line and words in line
    assert content_of(tmp_path) == before and not (tmp_path / "new").exists()


def test_a_bomb_with_a_lying_size_ends_the_program(small, tmp_path, capsys):
    path, members = small
    name = f"0001/{IMAGE.format(0, 'VV')}"
    patch(make(path, {name: bytes(64 * 2**20)}), name, size=1000, crc=zlib.crc32(bytes(1000)))
    line = refused(capsys, "--zip", path, "--out", tmp_path / "out", "--workers", 1)
    assert name in line and "holds more than the 1000 bytes" in line
    assert content_of(tmp_path / "out") == {}


def test_bit_rot_is_told_and_a_whole_zip_goes_on_from_there(small, tmp_path, capsys):
    path, members = small
    whole = make(path, members, zipfile.ZIP_STORED).read_bytes()
    path.write_bytes(whole.replace(b"1 0 VH", b"1 0 VX"))
    line = refused(capsys, "--zip", path, "--out", tmp_path / "out", "--workers", 1)
    assert str(path) in line and IMAGE.format(0, "VH") in line and "download it again" in line
    assert not (tmp_path / "out" / "unzipped.json").exists()
    assert content_of(tmp_path / "out").items() < members.items()  # what is there is right, and nothing half-written
    path.write_bytes(whole)
    unzip(path, tmp_path / "out")
    assert content_of(tmp_path / "out") == members


def test_without_room_nothing_is_written(small, tmp_path, capsys, monkeypatch):
    path, members = small
    make(path, members)
    need = sum(map(len, members.values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: FREE(0, 0, 2**28 + need - 1))
    line = refused(capsys, "--zip", path, "--out", tmp_path / "out")
    assert f"--out {tmp_path / 'out'}" in line and "are free" in line and not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: FREE(0, 0, 2**28 + need))
    unzip(path, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: FREE(0, 0, 0))
    unzip(path, tmp_path / "out")  # nothing is to be written any more


# ---- Running again -------------------------------------------------------------------------------


def test_a_finished_folder_is_left_alone_and_another_zip_refused(small, tmp_path, caplog, capsys):
    path, members = small
    make(path, members)
    unzip(path, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with caplog.at_level("INFO"):
        main(argv("--zip", path, "--out", tmp_path / "out"))
    assert "nothing to do" in caplog.text
    make(path, {**members, "0001/more.txt": b""})
    line = refused(capsys, "--zip", path, "--out", tmp_path / "out")
    assert "made with other parameters" in line
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_killed_midway_it_goes_on_to_the_same_tree(tmp_path):
    content = os.urandom(100_000)
    path = make(
        tmp_path / "data.zip",
        {
            f"{folder:04}/{IMAGE.format(n, band)}": content[folder:]
            for folder in range(20)
            for n in range(30)
            for band in ("VH", "VV")
        },
        zipfile.ZIP_STORED,
    )
    flags = ["--zip", str(path), "--workers", "2", "--out"]
    launch([*MODULE, *flags, tmp_path / "whole"])
    run = subprocess.Popen(
        [*MODULE, *flags, str(tmp_path / "out")], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL
    )
    while run.poll() is None and len(list(tmp_path.glob("out/*/*.tif"))) < 3:
        time.sleep(0.002)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    there = content_of(tmp_path / "out", apart=("step.json", ".lock"))
    assert "unzipped.json" not in there and 3 <= len(there) < 1200
    assert all(value == content[int(name[:4]) :] for name, value in there.items() if not name.endswith(".tmp"))
    launch([*MODULE, *flags, tmp_path / "out"])
    assert content_of(tmp_path / "out", ()) == content_of(tmp_path / "whole", ())


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_two_ranks_write_the_same_tree_and_report_once(raw, tmp_path):
    flags = ["--zip", raw / "SEN12FLOOD.zip", "--workers", 1, "--out"]
    launch([*MODULE, *flags, tmp_path / "one"])
    launch(mpirun(*MODULE, *flags, tmp_path / "two"))
    assert content_of(tmp_path / "two", ()) == content_of(tmp_path / "one", ())
    path = HOSTILE["parent"][0](tmp_path / "data.zip")
    result = subprocess.run(
        mpirun(*MODULE, "--zip", path, "--workers", 1, "--out", tmp_path / "three"),
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 2 and result.stderr.count("leads out of its folder") == 1
    assert not (tmp_path / "three").exists()
