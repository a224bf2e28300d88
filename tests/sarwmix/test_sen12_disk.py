# SPDX-License-Identifier: MIT
"""The room that the preparation of SEN12-FLOOD is said to need, against figures calculated by hand."""

import json
import shutil
from collections import namedtuple

import pytest

from sarwmix.prepare.sen12_disk import estimate, main, present
from sarwmix.sen12_index import read_s1_list
from tests.helpers.dataset_fixtures import needs_samples, sample_path
from tests.helpers.zips import make

FREE = namedtuple("FREE", "total used free")
RESERVE = 2**28
NAME = "S1A_IW_GRDH_1S{}V_200001{:02}T000000_200001{:02}T000025_000001_000001_ABCD"
# Folder 0001: dry, dry, flood, flood (one polarisation): 3 usable images, 5 pairs. Folder 2: dry, dry: 2 images, 1 pair.
FLOODED = {"0001": (False, False, True, True), "2": (False, False)}
IMAGES, PAIRS = 5, 6
ALIGNED = IMAGES * 2 * 64**2 * 4  # at --size 64
PAIR_FILES = PAIRS * 4 * 64**2 * 4


def s1_list():
    return {
        folder: {
            "count": len(flooded),
            **{
                str(n): {"FLOODING": flood, "filename": NAME.format("S" if n == 4 else "D", n, n)}
                for n, flood in enumerate(flooded, start=1)
            },
        }
        for folder, flooded in FLOODED.items()
    }


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "S1list.json").write_text(json.dumps(s1_list()))
    return tmp_path / "raw"


@pytest.fixture
def packed(tmp_path):
    """A zip with 3,000 wanted bytes besides the list, and 5,000 others."""
    return make(
        tmp_path / "data.zip",
        {
            "SEN12FLOOD/S1list.json": json.dumps(s1_list()).encode(),
            f"SEN12FLOOD/0001/{NAME.format('D', 1, 1)}_corrected_VV.tif": bytes(2000),
            "SEN12FLOOD/0001/S2_2000-01-03_B04.tif": bytes(1000),
            "SEN12FLOOD/0001/S2_2000-01-03_B08.tif": bytes(5000),
        },
    )


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, caplog):
    """run(free bytes, *flags) → (exit status, log or the one line of the error)."""

    def run(free, *flags):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: FREE(0, 0, free))
        caplog.clear()
        try:
            with caplog.at_level("INFO"):
                main(
                    ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--size", "64", *map(str, flags)]
                )
        except SystemExit as stopped:
            line = capsys.readouterr().err
            assert line.count("\n") == 1
            return stopped.code, line
        return 0, caplog.text

    return run


def exactly(run, need, *flags):
    """Whether the run takes `need` bytes of room and not one less."""
    enough, short = run(RESERVE + need, *flags), run(RESERVE + need - 1, *flags)
    return enough[0] == 0 and short[0] == 2 and "are free" in short[1]


def test_the_figures_of_each_layout(raw, packed, run, tmp_path):
    assert (ALIGNED, PAIR_FILES) == (163_840, 393_216)
    listed = len(json.dumps(s1_list()))
    assert exactly(run, ALIGNED + ALIGNED, "--raw_root", raw)
    assert exactly(run, ALIGNED + PAIR_FILES, "--raw_root", raw, "--layout", "npy")
    assert exactly(run, 3000 + listed + ALIGNED + ALIGNED, "--zip", packed)
    assert exactly(run, 3000 + listed + ALIGNED + PAIR_FILES, "--zip", packed, "--layout", "npy", "--keep_intermediate")
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


def test_what_is_there_already_is_not_needed_again_but_never_pays_for_the_other_folder(raw, run, tmp_path):
    (tmp_path / "work" / "aligned" / "0001").mkdir(parents=True)
    (tmp_path / "work" / "aligned" / "0001" / "a.tif").write_bytes(bytes(10_000))
    assert exactly(run, 2 * ALIGNED - 10_000, "--raw_root", raw)
    (tmp_path / "work" / "aligned" / "b.tif").write_bytes(bytes(ALIGNED))  # more than will be needed
    assert exactly(run, ALIGNED, "--raw_root", raw)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c.npy").write_bytes(bytes(1000))
    assert exactly(run, ALIGNED - 1000, "--raw_root", raw)


def test_sources_and_folders_within_each_other_are_told_apart(tmp_path):
    for name, count in (("work/raw/a", 1), ("work/out/b", 10), ("work/data.zip", 100), ("work/aligned/c", 1000)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(count))
    work = tmp_path / "work"
    assert present(work) == 1111 and present(tmp_path / "none") == 0
    assert present(work, [work / "raw", work / "out", work / "data.zip"]) == 1000
    assert present(work / "out", [work]) == 10 and present(work, [work]) == 0


def test_folders_on_two_file_systems_are_held_against_the_room_of_each(raw, run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sarwmix.prepare.sen12_disk.check_room", seen.append)
    assert run(0, "--raw_root", raw, "--layout", "npy")[0] == 0
    assert seen == [[("--work", tmp_path / "work", ALIGNED), ("--out", tmp_path / "out", PAIR_FILES)]]


def test_the_table_says_what_goes_where(packed, run, tmp_path):
    status, log = run(10**12, "--zip", packed, "--layout", "npy", "--size", 512)
    lines = [" ".join(line.split("sen12_disk.py")[-1].split(" ")[1:]).split() for line in log.splitlines()]
    table = [" ".join(line) for line in lines]
    assert status == 0
    for line in (
        f"5 aligned images --work {tmp_path}/work 0.010",
        f"6 pairs at most --out {tmp_path}/out 0.025",
        f"free --work {tmp_path}/work 1000.000",
        f"there already --out {tmp_path}/out 0.000",
    ):
        assert line in table
    assert "pairs that the curation drops" in log and "can go when the last step has ended" in log
    kept = run(10**12, "--zip", packed, "--keep_intermediate")[1]
    assert (
        "stays afterwards" in kept and "can go" not in kept and "curation" not in kept and "5 images, each once" in kept
    )


def test_a_list_of_ones_own_goes_before_that_of_the_zip_or_folder(packed, raw, run, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"2": s1_list()["2"]}))
    two = 2 * 2 * 64**2 * 4
    listed = len(json.dumps(s1_list()))
    assert exactly(run, 2 * two, "--raw_root", raw, "--s1_list", tmp_path / "mine.json")
    assert exactly(run, 3000 + listed + 2 * two, "--zip", packed, "--s1_list", tmp_path / "mine.json")


def test_bad_input_is_one_line(raw, packed, run, tmp_path):
    (raw / "S1list.json").unlink()
    make(tmp_path / "bare.zip", {f"0001/{NAME.format('D', 1, 1)}_corrected_VV.tif": b""})
    broken = s1_list()
    broken["2"]["count"] = 7
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    for flags, words in (
        (("--raw_root", raw), (str(raw), "--s1_list")),
        (("--zip", tmp_path / "bare.zip"), ("bare.zip", "--s1_list")),
        (("--raw_root", tmp_path / "none"), ("--raw_root", "no such folder")),
        (("--zip", tmp_path / "none.zip"), ("none.zip", "no such file")),
        (("--raw_root", raw, "--s1_list", tmp_path / "broken.json"), ("broken.json", "count 7")),
        (("--raw_root", raw, "--s1_list", tmp_path / "none.json"), ("none.json", "--s1_list")),
        (("--raw_root", raw, "--zip", packed), ("--zip",)),
        ((), ("--zip", "--raw_root")),
        (("--zip", packed, "--layout", "tar"), ("--layout",)),
        (("--zip", packed, "--size", 0), ("--size 0",)),
    ):
        status, line = run(10**12, *flags)
        assert status == 2 and all(word in line for word in words), line
    assert not (tmp_path / "work").exists()


@needs_samples
def test_the_real_list(tmp_path):
    lists = read_s1_list(sample_path("sen12flood", "S1list.json"))
    for layout, out in (("images", 3942 * 2**21), ("npy", 20583 * 2**22)):
        needs = estimate(lists, 0, tmp_path / "work", tmp_path / "out", layout)
        assert [need.bytes for need in needs] == [3942 * 2**21, out]
