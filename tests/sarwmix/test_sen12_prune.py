# SPDX-License-Identifier: MIT
"""Curation of SEN12-FLOOD pairs at its limits, both layouts as the loader reads them, checksums, and running again."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from common.errors import DataError
from sarwmix.sen12_data_prep import prepare
from sarwmix.sen12_prune_partial_pairs import curate, is_complete, judge, main, prune, verify
from sarwmix.sen12flood_loader import FloodDataset
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import fails_with, one_line
from tests.helpers.runs import argv, digests, launch, mpirun, refusal
from tests.helpers.sen12 import (
    S,
    align,
    folder_list,
    image_name,
    kill_midway,
    overwrite,
    read,
    rows_of,
    write_raw,
    write_reference,
)

pytestmark = pytest.mark.slow

PROGRAM = "sarwmix.sen12_prune_partial_pairs"
QUARTER = S * S // 4
A, B, C, D = (image_name(k) for k in range(4))
# 0001: everything is fine. 0002: image B is corrupt, C a quarter empty in VV, D one pixel less. 0003: of another size.
# 0004: only flooded images. 5: image A is empty in VH, so that no pair is left.
FOLDERS = {
    "0001": (False, True, False, True),
    "0002": (False, False, True, True),
    "0003": (False, False),
    "0004": (True, True),
    "5": (False, True),
    "6": (False, True),
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """(folder of aligned images, folder of pairs) of FOLDERS."""
    root = tmp_path_factory.mktemp("prune")
    write_raw(root / "raw", FOLDERS)
    (root / "raw" / "0002" / f"{B}_corrected_VH.tif").write_bytes(b"broken")
    write_reference(root / "raw", "0003", size=S - 1)
    align(root / "raw", root / "aligned", size=S)
    overwrite(root / "aligned" / "0002" / f"{C}.tif", QUARTER, (2,))
    overwrite(root / "aligned" / "0002" / f"{D}.tif", QUARTER - 1)
    overwrite(root / "aligned" / "5" / f"{A}.tif", S * S, (1,))
    prepare(root / "pairs", root / "aligned")
    return root / "aligned", root / "pairs"


@pytest.fixture(scope="module", params=("images", "npy"))
def made(request, steps):
    out = steps[0].parent / request.param
    prune(*steps, out, size=S, layout=request.param)
    return request.param, out


KEPT = {
    "train": [
        ("0001", A, B, 1),
        ("0001", A, C, 0),
        ("0001", A, D, 1),
        ("0001", C, B, 1),
        ("0001", C, D, 1),
        ("0002", A, D, 1),
    ],
    "test": [("6", A, B, 1)],
}


# ---- The rules -----------------------------------------------------------------------------------


def measured(image="a", height=S, width=S, vh=0.0, vv=0.0, folder="1"):
    return {
        "folder": folder,
        "image": image,
        "flooded": "0",
        "height": str(height),
        "width": str(width),
        "zeros_vh": repr(vh),
        "zeros_vv": repr(vv),
        "nonfinite": "0",
    }


@pytest.mark.parametrize(
    "row, expected",
    (
        (measured(), None),
        (measured(vh=0.25 - 1 / 512**2, vv=0.25 - 1 / 512**2), None),
        (measured(vh=0.25), ("too many zeros", "VH of a 25.0 % zeros")),
        (measured(vv=0.431), ("too many zeros", "VV of a 43.1 % zeros")),
        (measured(vh=1.0, vv=0.5), ("too many zeros", "VH of a 100.0 % zeros and VV of a 50.0 % zeros")),
        (measured(width=S - 1), ("wrong size", f"a is {S - 1}x{S} pixels, not {S}x{S}")),
        (measured(height=S + 1, vh=1.0), ("wrong size", f"a is {S}x{S + 1} pixels, not {S}x{S}")),
    ),
)
def test_each_rule_at_its_limit(row, expected):
    assert judge(row, S, 0.25) == expected


def test_a_share_that_is_no_binary_fraction_is_met_exactly():
    assert judge(measured(vh=round(0.1 * 640**2) / 640**2), S, 0.1) is not None
    assert judge(measured(vh=(round(0.1 * 640**2) - 1) / 640**2), S, 0.1) is None


def test_a_pair_is_dropped_for_either_image_and_named_once():
    def pair(first, second):
        return {"split": "test", "folder": "1", "first": first, "second": second, "label": "0"}

    rows = [pair("a", "b"), pair("a", "c"), pair("b", "c"), pair("c", "x"), pair("a", "x")]
    before = [
        {"kind": "image", "folder": "1", "first": "x", "second": "", "reason": "corrupt", "detail": "1/x"},
        *(
            {"kind": "pair", "folder": "1", "first": name, "second": "x", "reason": "corrupt", "detail": "x (corrupt)"}
            for name in "ca"
        ),
    ]
    kept, dropped = curate(rows, [measured("a"), measured("b"), measured("c", vh=0.3)], before, S, 0.25)
    assert kept == [pair("a", "b")]
    assert dropped == [
        ("image", "1", "x", "", "corrupt", "1/x"),
        ("image", "1", "c", "", "too many zeros", "VH of c 30.0 % zeros"),
        ("pair", "1", "c", "x", "corrupt", "x (corrupt)"),
        ("pair", "1", "a", "x", "corrupt", "x (corrupt)"),
        ("pair", "1", "a", "c", "too many zeros", "VH of c 30.0 % zeros"),
        ("pair", "1", "b", "c", "too many zeros", "VH of c 30.0 % zeros"),
    ]


def test_what_is_not_there_is_named_with_its_reason(made):
    rows = [tuple(row.values()) for row in rows_of(made[1] / "dropped.csv")]
    images = [(folder, first, reason) for kind, folder, first, _, reason, _ in rows if kind == "image"]
    assert images == [
        ("0002", B, "corrupt"),
        ("0002", C, "too many zeros"),
        ("0003", A, "wrong size"),
        ("0003", B, "wrong size"),
        ("5", A, "too many zeros"),
        ("0004", A, "in no pair"),
        ("0004", B, "in no pair"),
        ("5", B, "in no pair"),
    ]
    pairs = {
        (folder, first, second): (reason, detail)
        for kind, folder, first, second, reason, detail in rows
        if kind == "pair"
    }
    assert len(pairs) == sum(row[0] == "pair" for row in rows) == 13 - 7
    assert pairs["0002", A, B] == ("corrupt", f"{B} (corrupt)")
    assert pairs["0002", A, C] == ("too many zeros", f"VV of {C} 25.0 % zeros")
    assert pairs["0003", A, B][0] == "wrong size" and pairs["5", A, B] == ("too many zeros", f"VH of {A} 100.0 % zeros")
    # Whatever the list had is either here or in the data set.
    every = {(row["folder"], row["first"], row["second"]) for row in rows_of(made[1].parent / "pairs" / "pairs.csv")}
    assert every == pairs.keys() | {pair[:3] for part in KEPT.values() for pair in part}


# ---- What is written -----------------------------------------------------------------------------


def test_the_loader_reads_the_pairs_that_are_kept(made, steps):
    for split, expected in KEPT.items():
        data = FloodDataset(made[1], split)
        data.check_files()
        assert data.size == S and data.check_units()["nonfinite"] == 0
        assert [
            (*name.split("__"), int(label)) for name, label in zip(data.ids.tolist(), data.label_table()[:, 1])
        ] == sorted(expected)
        for i, (folder, *names, label) in enumerate(sorted(expected)):
            *images, found = data[i]
            assert found == label
            for name, image in zip(names, images, strict=True):
                sigma0 = read(steps[0] / folder / f"{name}.tif").astype(float)
                np.testing.assert_allclose(
                    image.numpy(), np.where(sigma0 > 0, 10 * np.log10(np.maximum(sigma0, 1e-30)), -60), atol=1e-4
                )


def test_both_layouts_hold_the_same_items(steps):
    for layout in ("images", "npy"):
        prune(*steps, steps[0].parent / layout, size=S, layout=layout)  # where `made` has not made them yet
    one, other = (FloodDataset(steps[0].parent / layout, "all") for layout in ("images", "npy"))
    where = {name: i for i, name in enumerate(other.ids.tolist())}
    assert len(one) == len(other) == 7 and where.keys() == set(one.ids.tolist())
    for i, name in enumerate(one.ids.tolist()):
        for mine, theirs in zip(one[i], other[where[name]], strict=True):
            assert (mine == theirs).all()


def test_only_images_of_kept_pairs_are_written_each_once(steps):
    out = steps[0].parent / "images"
    prune(*steps, out, size=S, layout="images")
    found = sorted(path.relative_to(out / "images").as_posix() for path in out.rglob("*.npy"))
    assert found == sorted(
        f"{folder}/{name}.npy"
        for folder, names in (("0001", (A, B, C, D)), ("0002", (A, D)), ("6", (A, B)))
        for name in names
    )
    array = np.load(out / "images" / "0001" / f"{A}.npy")
    assert array.dtype == np.float32 and array.shape == (2, S, S)
    assert (array == read(steps[0] / "0001" / f"{A}.tif")).all()


def test_non_finite_pixels_are_written_as_no_data(tmp_path):
    write_raw(tmp_path / "raw", {"0001": (False, True)})
    align(tmp_path / "raw", tmp_path / "aligned", size=S)
    overwrite(tmp_path / "aligned" / "0001" / f"{A}.tif", 9, (2,), np.nan)
    prepare(tmp_path / "pairs", tmp_path / "aligned")
    prune(tmp_path / "aligned", tmp_path / "pairs", tmp_path / "out", size=S)
    array = np.load(tmp_path / "out" / "images" / "0001" / f"{A}.npy")
    assert np.isfinite(array).all() and (array[1].ravel()[:9] == 0).all() and (array == 0).sum() == 9


def test_counts_and_parameters_are_recorded(made):
    said = json.loads((made[1] / "preparation.json").read_text())
    assert said["counts"] == {
        "train": {"candidates": 11, "kept": 6, "no flood": 1, "flood": 5},
        "test": {"candidates": 2, "kept": 1, "no flood": 0, "flood": 1},
    }
    assert said["dropped"] == {
        "images": {"corrupt": 1, "in no pair": 3, "too many zeros": 2, "wrong size": 2},
        "pairs": {"corrupt": 3, "too many zeros": 2, "wrong size": 1},
    }
    assert said["parameters"]["layout"] == made[0] and said["parameters"]["resampling"] == "bilinear"
    assert (said["parameters"]["size"], said["parameters"]["max_zeros"]) == (S, 0.25)
    assert str(made[1].parent) not in "".join(path.read_text() for path in made[1].iterdir() if path.is_file())


def test_the_table_of_classes_is_logged(made, steps, caplog):
    with caplog.at_level("INFO"):
        prune(*steps, made[1], size=S, layout=made[0])
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in caplog.text.splitlines() if line.startswith("| ")
    ]
    assert table == [
        ["split", "candidates", "kept", "no flood", "flood"],
        ["train", "11", "6", "1", "5"],
        ["test", "2", "1", "0", "1"],
        ["all", "13", "7", "1", "6"],
    ]
    assert "6 pairs dropped: 3 corrupt, 2 too many zeros, 1 wrong size" in caplog.text
    assert f"{made[1]}: kept 7 of 20,583 candidate pairs" in caplog.messages


def test_max_zeros_decides(steps, tmp_path):
    prune(*steps, tmp_path / "out", size=S, max_zeros=0.26)
    assert len(FloodDataset(tmp_path / "out", "train")) == 7 and len(FloodDataset(tmp_path / "out", "test")) == 1
    prune(*steps, tmp_path / "strict", size=S, max_zeros=0.2)
    assert len(FloodDataset(tmp_path / "strict", "train")) == 5


@pytest.mark.parametrize("layout", ("images", "npy"))
def test_a_split_without_pairs_is_there_and_named(layout, steps, tmp_path, caplog):
    lists = {
        "train_list": folder_list(tmp_path / "train.csv", "0001"),
        "test_list": folder_list(tmp_path / "test.csv", "5"),
    }
    prepare(tmp_path / "pairs", steps[0], **lists)
    prune(steps[0], tmp_path / "pairs", tmp_path / "out", size=S, layout=layout)
    assert "no pair of split test" in caplog.text and len(FloodDataset(tmp_path / "out", "all")) == 5


def test_if_no_pair_can_be_kept_nothing_is_written(steps, tmp_path):
    with pytest.raises(DataError) as error:
        prune(*steps, tmp_path / "out", size=2 * S)
    one_line(error, "none of the 13 pairs can be kept", "10 wrong size, 3 corrupt", "--size")
    assert not (tmp_path / "out").exists()


# ---- Checksums and state -------------------------------------------------------------------------


def copied(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "copy")
    return tmp_path / "copy"


def test_one_flipped_bit_is_found(made, tmp_path, capsys):
    out = copied(made, tmp_path)
    arrays = sorted(out.rglob("*.npy"))
    assert verify(out) == len(arrays) + 2 * (made[0] == "images")
    content = bytearray(arrays[2].read_bytes())
    content[len(content) // 2] ^= 1
    arrays[2].write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(argv("--out", out, "--verify --workers 2"))
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and f"1 of {len(rows_of(out / 'checksums.csv'))} files differ" in message
    assert f"{arrays[2].relative_to(out)} differs" in message
    assert sum("error:" in line for line in message.splitlines()) == 1


def test_missing_and_additional_files_are_found(made, tmp_path):
    out = copied(made, tmp_path)
    arrays = sorted(out.rglob("*.npy"))
    arrays[0].rename(arrays[0].with_name("other.npy"))
    fails_with(lambda: verify(out), "2 of", f"{arrays[0].relative_to(out)} cannot be read", "other.npy is not listed")


def test_changed_checksums_and_incomplete_data_are_refused(made, tmp_path):
    out = copied(made, tmp_path)
    rows = (out / "checksums.csv").read_text()
    (out / "checksums.csv").write_text(rows[:-2] + "0\n")
    fails_with(lambda: verify(out), "checksums.csv: is not as it was written")
    (out / "preparation.json").unlink()
    fails_with(lambda: verify(out), "preparation.json", "not complete")


def test_more_than_five_faults_are_counted(made, tmp_path):
    out = copied(made, tmp_path)
    for path in out.rglob("*.npy"):
        path.write_bytes(b"")
    fails_with(lambda: verify(out), f"{len(list(out.rglob('*.npy')))} of", "more; copy them again")


def test_state_compares_all_parameters(made, steps, tmp_path):
    there = json.loads((made[1] / "preparation.json").read_text())["parameters"]

    def complete(out, **changes):
        return is_complete(out, there | changes)

    assert complete(made[1])
    out = copied(made, tmp_path)
    (out / "preparation.json").unlink()
    assert not complete(out) and not complete(tmp_path / "new")
    for change, words in (
        ({"layout": "other"}, "layout"),
        ({"size": 256}, f"size {S}, not 256"),
        ({"max_zeros": 0.3}, "max_zeros 0.25, not 0.3"),
        ({"resampling": "nearest"}, "resampling bilinear, not nearest"),
        ({"s1_list_sha256": "0"}, "s1_list_sha256"),
        ({"train_list_sha256": "0"}, "train_list_sha256"),
    ):
        fails_with(lambda: complete(out, **change), "other parameters", words)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("keep")
    fails_with(lambda: complete(tmp_path / "mine"), "not empty", "choose another --out")


# ---- Running again -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Steps of four folders with ten images each, 180 pairs, and what is made of them: {layout: folder}."""
    root = tmp_path_factory.mktemp("many")
    write_raw(root / "raw", {folder: (False,) * 10 for folder in ("0001", "0002", "0003", "1")})
    align(root / "raw", root / "aligned", size=S)
    prepare(root / "pairs", root / "aligned")
    made = {layout: root / layout for layout in ("images", "npy")}
    for layout, out in made.items():
        prune(root / "aligned", root / "pairs", out, size=S, layout=layout)
    return (root / "aligned", root / "pairs"), made


def command(steps, out, layout, workers=1):
    flags = ("--aligned", steps[0], "--pairs", steps[1], "--out", out, "--size", S, "--layout", layout)
    return argv(sys.executable, "-m", PROGRAM, flags, "--workers", workers)


@pytest.mark.parametrize("layout, workers, count", (("images", 1, 2), ("npy", 1, 5), ("npy", 2, 5)))
def test_killed_midway_and_run_again_it_leaves_the_same(layout, workers, count, many, tmp_path):
    out = tmp_path / "out"
    kill_midway(command(many[0], out, layout, workers), lambda: len(list(out.rglob("*.npy"))) >= count)
    assert not (out / "preparation.json").exists() and not list(out.glob("t*"))

    def written():
        return {(path.parent.name.strip("."), path.name): path.stat().st_mtime_ns for path in out.rglob("*.npy")}

    before = written()
    launch(command(many[0], out, layout, workers))
    assert digests(out) == digests(many[1][layout])
    assert len(before) >= count and before.items() <= written().items()  # what was there is not written again


def test_stopped_between_the_last_renames_it_is_finished_the_same(many, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(many[1]["npy"], out)
    for name in ("preparation.json", "checksums.csv", "dropped.csv"):
        (out / name).unlink()
    (out / "test").rename(out / ".test")
    prune(*many[0], out, size=S, layout="npy")
    assert digests(out) == digests(many[1]["npy"])


@pytest.mark.parametrize("layout", ("images", "npy"))
def test_ranks_and_processes_leave_the_same(layout, many, tmp_path):
    launch(mpirun(*command(many[0], tmp_path / "out", layout, 2)))
    assert digests(tmp_path / "out") == digests(many[1][layout])


def test_an_error_under_two_ranks_is_one_line(many, tmp_path):
    result = subprocess.run(
        mpirun(*command(many[0], tmp_path / "out", "npy"), "--size", 256),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2 and result.stderr.count("error:") == 1 and "none of the 180 pairs" in result.stderr


def test_a_complete_data_set_is_left_alone(made, steps, caplog):
    before = {path: path.stat().st_mtime_ns for path in made[1].rglob("*")}
    with caplog.at_level("INFO"):
        main(command(steps, made[1], made[0])[3:])
    assert "nothing to do" in caplog.text and {path: path.stat().st_mtime_ns for path in made[1].rglob("*")} == before


def test_other_parameters_are_refused(made, steps):
    before = digests(made[1])
    for change in ({"max_zeros": 0.3}, {"layout": "npy" if made[0] == "images" else "images"}):
        with pytest.raises(DataError) as error:
            prune(*steps, made[1], **{"size": S, "layout": made[0], **change})
        one_line(error, "--out", "other parameters")
    assert digests(made[1]) == before


def test_pairs_of_another_alignment_or_of_the_list_alone_are_refused(steps, many, tmp_path):
    prepare(tmp_path / "list", s1_list=steps[0] / "S1list.json")
    for aligned, pairs, words in (
        (many[0][0], steps[1], "not made from --aligned"),
        (steps[0], tmp_path / "list", "dropped.csv: does not exist"),
        (steps[0], steps[0], "is not of sarwmix.sen12_data_prep"),
    ):
        fails_with(lambda: prune(aligned, pairs, tmp_path / "out", size=S), words, "sarwmix.sen12_data_prep")
    assert not (tmp_path / "out").exists()


def test_an_aligned_image_that_changed_its_size_since_is_refused(many, tmp_path):
    shutil.copytree(many[0][0], tmp_path / "aligned")
    shutil.copytree(many[0][1], tmp_path / "pairs")
    write_raw(tmp_path / "raw", {"0001": (False, True)})
    write_reference(tmp_path / "raw", "0001", size=100)
    align(tmp_path / "raw", tmp_path / "small", size=S)
    shutil.copy(tmp_path / "small" / "0001" / f"{A}.tif", tmp_path / "aligned" / "0001" / f"{A}.tif")
    with pytest.raises(DataError) as error:
        prune(tmp_path / "aligned", tmp_path / "pairs", tmp_path / "out", size=S)
    one_line(error, f"0001/{A}.tif", "not the image that was measured")
    assert not (tmp_path / "out" / "preparation.json").exists()


@pytest.mark.parametrize(
    "flags, words",
    (
        ([], "--aligned and --pairs"),
        (["--aligned", "x"], "--aligned and --pairs"),
        (["--size", "200"], "multiple of 128"),
        (["--max_zeros", "0"], "--max_zeros 0"),
        (["--max_zeros", "1.5"], "--max_zeros 1.5"),
        (["--max_zeros", "nan"], "--max_zeros nan"),
        (["--layout", "zarr"], "zarr"),
        (["--verify", "--aligned", "x"], "--verify"),
        (["--verify"], "preparation.json"),
        (["--aligned", "/no/such", "--pairs", "/no/such"], "/no/such"),
        (["--colour", "red"], "--colour"),
    ),
)
def test_wrong_flags_are_one_line_and_status_2(flags, words, tmp_path, capsys):
    assert words in refusal(main, [*flags, "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()
