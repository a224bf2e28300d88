# SPDX-License-Identifier: MIT
"""The preparation of SEN12-FLOOD from its archive: the room it needs, what it makes, running it again, flags that are refused."""

import json
import os
import shutil
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest

import main_finetune
from common.errors import DataError, UsageError
from sarwmix.prepare import pack, sen12_unzip, sen12flood
from sarwmix.prepare.sen12_index import read_s1_list
from sarwmix.prepare.sen12flood import check_disk, check_paths, estimate, main, present
from sarwmix.sen12flood_loader import FloodDataset
from sarwmix.simulate import flood_archive
from tests.helpers.dataset_fixtures import needs_samples, sample_path
from tests.helpers.runs import argv, digests, refusal
from tests.helpers.sen12 import kill_midway
from tests.helpers.zips import make

pytestmark = pytest.mark.slow

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


def settings(folder, **changes):
    """Settings of WORK and OUT in a folder, with the defaults of the flags."""
    defaults = {"layout": "images", "size": 64, "max_zeros": 0.25, "resampling": "bilinear", "units": "linear"}
    paths = dict.fromkeys(sen12flood.SOURCES) | {"work": folder / "work", "out": folder / "out"}
    return SimpleNamespace(**paths | defaults | {"keep_intermediate": False} | changes)


@pytest.fixture
def needs(tmp_path, monkeypatch):
    """needs(bytes, **settings): whether it takes exactly so many free bytes: with one less it is refused."""

    def exactly(count, **changes):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: FREE(0, 0, RESERVE + count))
        check_disk(settings(tmp_path, **changes))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: FREE(0, 0, RESERVE + count - 1))
        with pytest.raises(DataError, match="are free; make room"):
            check_disk(settings(tmp_path, **changes))
        return True

    return exactly


def test_the_figures_of_each_layout(raw, packed, needs, tmp_path):
    assert (ALIGNED, PAIR_FILES) == (163_840, 393_216)
    listed = len(json.dumps(s1_list()))
    assert needs(ALIGNED + ALIGNED, raw_root=raw)
    assert needs(ALIGNED + PAIR_FILES, raw_root=raw, layout="npy")
    assert needs(3000 + listed + ALIGNED + ALIGNED, zip=packed)
    assert needs(3000 + listed + ALIGNED + PAIR_FILES, zip=packed, layout="npy", keep_intermediate=True)
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


def test_a_list_of_ones_own_goes_before_that_of_the_zip_or_folder(packed, raw, needs, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"2": s1_list()["2"]}))
    two, listed = 2 * 2 * 64**2 * 4, len(json.dumps(s1_list()))
    assert needs(2 * two, raw_root=raw, s1_list=mine)
    assert needs(3000 + listed + 2 * two, zip=packed, s1_list=mine)


def test_what_is_there_already_is_not_needed_again_but_never_pays_for_the_other_folder(raw, needs, tmp_path):
    (tmp_path / "work" / "aligned" / "0001").mkdir(parents=True)
    (tmp_path / "work" / "aligned" / "0001" / "a.tif").write_bytes(bytes(10_000))
    assert needs(2 * ALIGNED - 10_000, raw_root=raw)
    (tmp_path / "work" / "aligned" / "b.tif").write_bytes(bytes(ALIGNED))  # more than will be needed
    assert needs(ALIGNED, raw_root=raw)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c.npy").write_bytes(bytes(1000))
    assert needs(ALIGNED - 1000, raw_root=raw)


def test_sources_and_folders_within_each_other_are_told_apart(tmp_path):
    for name, count in (("work/raw/a", 1), ("work/out/b", 10), ("work/data.zip", 100), ("work/aligned/c", 1000)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(count))
    work = tmp_path / "work"
    assert present(work) == 1111 and present(tmp_path / "none") == 0
    assert present(work, [work / "raw", work / "out", work / "data.zip"]) == 1000
    assert present(work / "out", [work]) == 10 and present(work, [work]) == 0


def test_folders_on_two_file_systems_are_held_against_the_room_of_each(raw, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sen12flood, "check_room", seen.append)
    check_disk(settings(tmp_path, raw_root=raw, layout="npy"))
    assert seen == [[("--work", tmp_path / "work", ALIGNED), ("--out", tmp_path / "out", PAIR_FILES)]]


def test_the_table_says_what_goes_where(packed, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: FREE(0, 0, 10**12))
    caplog.set_level("INFO")
    check_disk(settings(tmp_path, zip=packed, layout="npy", size=512))
    assert caplog.messages[0] == (
        "S1list.json: 6 images, 2 flooded images, 1 images of one polarisation, 1 folders for train, 1 folders for test, "
        "5 candidate pairs for train, 1 candidate pairs for test"
    )
    table = [" ".join(record.getMessage().split()) for record in caplog.records]
    for line in (
        f"5 aligned images --work {tmp_path}/work 0.010",
        f"6 pairs at most --out {tmp_path}/out 0.025",
        f"free --work {tmp_path}/work 1000.000",
        f"there already --out {tmp_path}/out 0.000",
    ):
        assert line in table
    assert "pairs that the curation drops" in caplog.text and "is removed after the last step" in caplog.text
    caplog.clear()
    check_disk(settings(tmp_path, zip=packed, keep_intermediate=True))
    assert "is kept" in caplog.text and "5 images, each once" in caplog.text
    assert "is removed" not in caplog.text and "curation" not in caplog.text


def test_a_measured_list_is_compared_before_anything_is_written(raw, tmp_path, caplog):
    caplog.set_level("INFO")
    measured = raw / "measured.json"
    measured.write_text((raw / "S1list.json").read_text().replace("_2000", "_2019"))
    check_disk(settings(tmp_path, raw_root=raw, s1_list=measured))
    assert caplog.messages[0] == (
        f"{measured}: 6 of 3,957 images, 2 of 1,374 flooded images, 1 of 15 images of one polarisation, 1 of 267 folders "
        "for train, 1 of 68 folders for test, 5 of 16,816 candidate pairs for train, 1 of 3,767 candidate pairs for test"
    )
    caplog.clear()
    check_disk(settings(tmp_path, raw_root=raw, s1_list=measured, train_list=raw, test_list=raw))
    assert caplog.messages[0].endswith("2 of 335 folders, 6 of 20,583 candidate pairs")
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


def test_lists_that_cannot_be_used_are_named(raw, tmp_path):
    bare = make(tmp_path / "bare.zip", {f"0001/{NAME.format('D', 1, 1)}_corrected_VV.tif": b""})
    broken = s1_list()
    broken["2"]["count"] = 7
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    for source, words in (
        ({"zip": bare}, "bare.zip: holds no S1list.json; give it with --s1_list"),
        ({"raw_root": raw, "s1_list": tmp_path / "broken.json"}, "broken.json.*count 7"),
        ({"zip": tmp_path / "none.zip"}, "none.zip: there is no such file"),
    ):
        with pytest.raises(DataError, match=words):
            check_disk(settings(tmp_path, **source))
    assert not (tmp_path / "work").exists()


@needs_samples
def test_the_real_list(tmp_path):
    lists = read_s1_list(sample_path("sen12flood", "S1list.json"))
    for layout, out in (("images", 3942 * 2**21), ("npy", 20583 * 2**22)):
        needs = estimate(lists, 0, settings(tmp_path, layout=layout, size=512))
        assert [count for _, _, count in needs] == [3942 * 2**21, out]


# ---- The whole way -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A folder with "my flood.zip" and the same files unzipped in SEN12FLOOD; images of 128 pixels, faults in them."""
    pytest.importorskip("osgeo.gdal", reason="GDAL's Python binding is not installed")
    folder = tmp_path_factory.mktemp("prepare") / "my data"
    flags = ["--out", str(folder), "--folders", "4", "--size", "128", "--keep_tree", "--workers", "1"]
    flood_archive.main(flags)
    (folder / "SEN12FLOOD.zip").rename(folder / "my flood.zip")
    return folder


def prepare(folder, *flags):
    """Run the program on one process, with paths relative to a folder."""
    main(argv("--relative_to", folder, "--size 128 --workers 1", flags))


MINE = "--zip 'my flood.zip' --work 'my work' --out 'my out'"


@pytest.fixture(scope="module")
def made(archive):
    prepare(archive, MINE)
    return archive / "my out"


def test_from_the_zip_to_the_loader(made, archive):
    faults = json.loads((archive / "faults.json").read_text())
    dropped = (made / "dropped.csv").read_text()
    for kind, reason in (
        ("single_polarisation", "single polarisation"),
        ("partial_cover", "too many zeros"),
        ("corrupt", "corrupt"),
        ("missing", "missing file"),
    ):
        assert f"image,{faults[kind]['folder']},{faults[kind]['filename']},,{reason}," in dropped
    for kind in ("small_gap", "nonfinite"):
        assert f"image,{faults[kind]['folder']},{faults[kind]['filename']}," not in dropped
    said = json.loads((made / "preparation.json").read_text())
    for split in ("train", "test"):
        data = FloodDataset(made, split)
        data.check_files()
        data.check_units()
        assert data.size == 128 and len(data) == said["counts"][split]["kept"] > 0
    assert (said["counts"]["train"]["candidates"], said["counts"]["test"]["candidates"]) == (16, 5)


def test_only_the_work_is_removed(made, archive):
    assert (archive / "my flood.zip").exists() and (archive / "SEN12FLOOD" / "S1list.json").exists()
    assert list((archive / "my work").iterdir()) == []


def test_a_classifier_is_trained_on_it_and_on_a_packed_store_of_it(made, tmp_path, program):
    store = ("--dataset sen12flood --data_path", made, "--dtype float32 --out", tmp_path / "store")
    pack.main(argv(store, "--workers 1"))
    flags = "--dataset sen12flood --model mixmim_tiny --batch_size 2 --epochs 1 --warmup_epochs 0 --num_workers 0"
    logs = []
    for name, data in (("files", made), ("packed", tmp_path / "store")):
        own = ("--finetune", "", "--data_path", data, "--output_dir", tmp_path / name)
        status, _, err = program(main_finetune, flags, own)
        assert status == 0, err
        logs.append(json.loads((tmp_path / name / "log.txt").read_text()))
    assert logs[0]["train_loss"] == logs[1]["train_loss"] and logs[0]["test_accuracy"] == logs[1]["test_accuracy"]
    assert (tmp_path / "files" / "checkpoint_best.pth").exists()


def test_again_there_is_nothing_to_do(made, archive, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    prepare(archive, MINE)
    assert capsys.readouterr() == (f"[prepare] {made} is already complete, nothing to do\n", "")
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert list((archive / "my work").iterdir()) == []


@pytest.mark.parametrize(
    "change, words",
    (
        ("--max_zeros 0.3", "max_zeros"),
        ("--layout npy", "layout"),
        ("--resampling nearest", "resampling"),
        ("--size 256", "size"),
        ("--units dB", "units"),
        ("--s1_list other.json", "s1_list"),
        ("--train_list faults.json --test_list faults.json", "train_list"),
    ),
)
def test_again_with_other_parameters_is_refused(change, words, made, archive, capsys):
    before = digests(made)
    (archive / "other.json").write_text("{}")
    message = refusal(prepare_in(archive), (MINE, change), capsys)
    assert "other parameters" in message and words in message
    assert digests(made) == before and not list((archive / "my work").iterdir())


def prepare_in(folder):
    return lambda flags: prepare(folder, flags)


def test_lists_and_layout_are_handed_on(archive, tmp_path):
    (tmp_path / "train.csv").write_text("0003\n1\n")
    (tmp_path / "test.csv").write_text("0002\n")
    flags = ["--layout", "npy", "--train_list", "train.csv", "--test_list", "test.csv", "--keep_intermediate"]
    flags += ["--raw_root", archive / "SEN12FLOOD", "--work", "work", "--out", "out"]
    raw = digests(archive / "SEN12FLOOD")
    prepare(tmp_path, *flags)
    assert {*FloodDataset(tmp_path / "out", "train").groups} == {"0003", "1"}
    assert {*FloodDataset(tmp_path / "out", "test").groups} == {"0002"}
    assert not (tmp_path / "out" / "images").exists()
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"aligned", "pairs"}
    flags.remove("--keep_intermediate")
    prepare(tmp_path, *flags)
    assert not list((tmp_path / "work").iterdir()) and digests(archive / "SEN12FLOOD") == raw


def test_a_raw_root_in_the_work_folder_stays(made, archive, tmp_path):
    """As --zip would have left it: then it is the user's."""
    raw = tmp_path / "work" / "raw"
    sen12_unzip.main(argv("--zip", archive / "my flood.zip", "--out", raw, "--workers 1"))
    before = digests(raw)
    prepare(tmp_path, "--raw_root", "work/raw", "--work", "work", "--out", "out")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["raw"] and digests(raw) == before
    assert digests(tmp_path / "out") == digests(made)


def test_killed_midway_and_run_again_it_leaves_the_same(made, archive, tmp_path):
    flags = ["--zip", archive / "my flood.zip", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    command = [sys.executable, "-m", sen12flood.PROGRAM, *flags, "--size", 128, "--workers", 2]
    kill_midway(command, lambda: len(list(tmp_path.glob("work/aligned/*/*.tif"))) >= 2)
    assert not (tmp_path / "out").exists()
    prepare(tmp_path, *flags)
    assert digests(tmp_path / "out") == digests(made) and not list((tmp_path / "work").iterdir())


def test_stopped_while_removing_it_removes_the_rest(made, archive, tmp_path, capsys):
    for name in (".removing-raw", "aligned", "mine"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "file").write_text("")
    (tmp_path / "work" / "aligned" / "step.json").write_text("{}")
    prepare(archive, ZIP, "--work", tmp_path / "work", "--out 'my out'")
    assert "nothing to do" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["mine"]


def test_too_little_room_is_found_before_anything_is_written(archive, tmp_path, capsys):
    flags = (ZIP, "--work", tmp_path / "work", "--out", tmp_path / "out", "--size 128000")
    assert "make room" in refusal(prepare_in(archive), flags, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, launch, words",
    [
        (["--ranks", "2"], "", ["mpirun", "-np", "2", "--bind-to", "none"]),
        (["--ranks", "2"], "starter -n 3", ["starter", "-n", "3"]),
        ([], "starter", ["starter"]),
    ],
)
def test_ranks_are_started_with_the_same_flags(flags, launch, words, monkeypatch):
    started = []
    monkeypatch.setenv("LAUNCH", launch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(os, "execvp", lambda name, words: started.append((name, words)))
    monkeypatch.setattr(shutil, "which", lambda _: "there")
    sen12flood.start_ranks(2 if flags else 1, [*flags, "--zip", "a b"])
    ((name, command),) = started
    place = command.index(sys.executable)
    assert name == words[0] and command[: len(words)] == words
    own = ["-m", sen12flood.PROGRAM, *flags, "--zip", "a b", "--as_rank"]
    assert command[place + 1 :] == own + (["--workers", "4"] if not launch else [])


def test_one_process_goes_on_and_without_mpirun_ranks_are_refused(monkeypatch):
    monkeypatch.delenv("LAUNCH", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    sen12flood.start_ranks(1, [])
    with pytest.raises(DataError, match="--ranks 2: there is no mpirun"):
        sen12flood.start_ranks(2, [])


ZIP, WORK = "--zip 'my flood.zip'", "--work w --out o"


@pytest.mark.parametrize(
    "flags, words",
    (
        ([], "--zip, or --raw_root"),
        ((ZIP, WORK, "--raw_root SEN12FLOOD"), "give one of them"),
        ((ZIP, "--work w"), "--out is needed"),
        ((ZIP, "--out o"), "--work is needed"),
        ((WORK, "--zip"), "--zip"),
        ((WORK, "--zip="), "--zip : a value is needed"),
        ((WORK, "--zip none.zip"), "none.zip: there is no such file"),
        ((WORK, "--raw_root none"), "none: there is no such folder"),
        ((ZIP, WORK, "--s1_list none.json"), "none.json"),
        ((ZIP, WORK, "--colour red"), "--colour"),
        ((ZIP, WORK, "red"), "red"),
        ((ZIP, WORK, "--layout zarr"), "zarr"),
        ((ZIP, WORK, "--resampling cubic"), "cubic"),
        ((ZIP, WORK, "--units power"), "power"),
        ((ZIP, WORK, "--size big"), "--size big"),
        ((ZIP, WORK, "--ranks 0"), "--ranks 0"),
        ((ZIP, WORK, "--workers -1"), "--workers -1"),
        ((ZIP, WORK, "--max_zeros 2"), "--max_zeros 2"),
        ((ZIP, WORK, "--size 200"), "multiple of 128"),
        ((ZIP, WORK, "--train_list faults.json"), "must be given together"),
        ((ZIP, WORK, "--test_list faults.json"), "must be given together"),
        ((ZIP, "--work o/w --out o"), "lies in --out"),
        ((ZIP, "--work w --out w/pairs/o"), "which is filled and removed; choose another --out"),
        ((ZIP, "--work w --out SEN12FLOOD"), "not empty"),
        ("--raw_root SEN12FLOOD --work SEN12FLOOD/w --out o", "lies in --raw_root"),
        ("--raw_root SEN12FLOOD --work w --out SEN12FLOOD/o", "lies in --raw_root"),
        (("--raw_root SEN12FLOOD/0001", WORK), "--s1_list"),
    ),
)
def test_wrong_flags_are_one_line_and_status_2(flags, words, archive, capsys):
    assert words in refusal(prepare_in(archive), flags, capsys)
    assert not (archive / "w").exists() and not (archive / "o").exists()


@pytest.mark.parametrize("name", ("zip", "s1_list", "train_list", "test_list"))
def test_a_source_in_a_folder_that_is_removed_is_refused(tmp_path, name):
    source = tmp_path / "work" / "raw" / "source"
    source.parent.mkdir(parents=True)
    source.touch()
    with pytest.raises(UsageError, match=f"--{name} .*, which is filled and removed; choose another --work"):
        check_paths(settings(tmp_path, **{name: source}))
