# SPDX-License-Identifier: MIT
"""Simulated floods: what the images show, the layout of the files, and running again."""

import csv
import json
from itertools import combinations

import numpy as np
import pytest
from scipy import ndimage

from common.errors import DataError
from sarwmix.sen12flood_loader import FloodDataset
from sarwmix.simulate import flood, flood_archive
from sarwmix.simulate.flood import Parameters, main, plan_places, simulate_floods, simulate_place, under_water
from sarwmix.simulate.landcover import LandCover, draw_geography
from tests.helpers.runs import argv, check_processes_change_nothing, digests, refusal

pytestmark = pytest.mark.slow

SMALL = Parameters(folders=5, seed=3, size=128, test_fraction=0.4)
FLAGS = ["--folders", "5", "--seed", "3", "--size", "128", "--test_fraction", "0.4"]


@pytest.fixture(scope="module")
def places():
    """Flooded places at four dates: [(sigma0_db, water)]."""
    return [
        (10 * np.log10(sigma0), water) for sigma0, water in (simulate_place((8, k), 128, 4, True) for k in range(4))
    ]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "floods"
    simulate_floods(out, SMALL)
    return out


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# ---- Images --------------------------------------------------------------------------------------


def test_place_has_the_promised_form_and_is_reproducible():
    sigma0, water = simulate_place((1, 2), 128, 3, True)
    again, water_again = simulate_place((1, 2), 128, 3, True)
    assert sigma0.shape == (3, 2, 128, 128) and sigma0.dtype == np.float32 and (sigma0 > 0).all()
    assert water.shape == (3, 128, 128) and water.dtype == bool
    assert (sigma0 == again).all() and (water == water_again).all()
    assert (sigma0 != simulate_place((1, 3), 128, 3, True)[0]).mean() > 0.99
    assert (sigma0[0] != sigma0[1]).mean() > 0.99  # fresh speckle
    assert [mask.any() for mask in water] == [False, False, True]  # the larger half is dry
    assert not simulate_place((1, 2), 128, 3, False)[1].any()


def test_a_flood_covers_a_share_of_the_land_in_few_pieces_and_recedes(places):
    for _, water in places:
        dry, dry_too, peak, later = water
        assert not dry.any() and not dry_too.any()
        assert 0.02 < peak.mean() < 0.4 and (later <= peak).all() and later.any()
        assert (peak[1:] == peak[:-1]).mean() > 0.9
        assert np.bincount(ndimage.label(peak)[0].ravel())[1:].max() > 100


def test_floods_are_dark_and_smooth_and_only_there(places):
    for sigma0_db, water in places:
        before, after, mask = sigma0_db[0], sigma0_db[2], water[2]
        assert np.median(after[1, mask]) < np.median(before[1, mask]) - 2.5
        assert np.median(after[0, mask]) < np.median(before[0, mask]) - 2.5
        assert -27 < np.median(after[1, mask]) < -14
        assert abs(np.median(after[1, ~mask]) - np.median(before[1, ~mask])) < 6  # season alone
        assert np.percentile(after[1, ndimage.binary_erosion(mask, iterations=4)], 99.5) < -8  # nothing stands out


def test_drowned_things_give_no_echo():
    geography = draw_geography(np.random.default_rng(0), (136, 136), "farmland")
    water = np.zeros((136, 136), bool)
    water[:, :68] = True
    flooded = under_water(geography, water)
    assert (flooded.land_cover[water] == LandCover.INLAND_WATER).all() and (flooded.target_cols >= 68).all()
    assert not flooded.hedge[water].any() and not flooded.paved[water].any() and not flooded.building[water].any()
    for name in ("land_cover", "hedge", "paved", "building", "alignment", "elevation"):
        assert (getattr(flooded, name)[~water] == getattr(geography, name)[~water]).all()
    assert (geography.land_cover[water] != LandCover.INLAND_WATER).any()  # the place itself is as it was


def test_level_changes_of_dry_places_are_as_large_as_a_small_flood():
    """What a mean over all pixels tells is not enough to be right every time."""
    dry = [10 * np.log10(simulate_place((9, k), 128, 2, False)[0][:, 1]).mean((1, 2)) for k in range(8)]
    assert np.std([first - second for first, second in dry]) > 0.5


# ---- Files ---------------------------------------------------------------------------------------


def test_lists_hold_the_pairs_in_order_of_acquisition(dataset):
    listed = {part: rows_of(dataset / f"pairs_{part}.csv") for part in ("train", "test")}
    assert all(rows[0] == ["folder", "first", "second", "label"] for rows in listed.values())
    assert {row[0] for row in listed["train"][1:]} == {"0001", "0002", "0003"}
    assert {row[0] for row in listed["test"][1:]} == {"1", "2"}
    for folder in ("0001", "0002", "0003", "1", "2"):
        names = sorted(path.stem for path in (dataset / "images" / folder).iterdir())
        assert len(names) == 4 and names[0].startswith("S1A_IW_GRDH_1SDV_20000101T0")
        rows = [tuple(row[1:]) for row in listed["train"] + listed["test"] if row[0] == folder]
        if folder == "0003":  # never flooded
            assert rows == [(a, b, "0") for a, b in combinations(names, 2)]
        else:
            a, b, c, d = names
            assert rows == [(a, b, "0"), (a, c, "1"), (a, d, "1"), (b, c, "1"), (b, d, "1")]


def test_the_dataset_reads_it(dataset):
    data = FloodDataset(dataset, "all")
    data.check_files()
    report = data.check_units()
    assert len(data) == 26 and data.size == 128 and data.describe()["class_counts"] == {"no flood": 10, "flood": 16}
    assert -26 < report["mean"][0] < report["mean"][1] - 4 < -8 and report["nonfinite"] == 0
    first, second, label = data[1]
    assert label == 1 and data.ids[1].startswith("0001__")
    sigma0, water = simulate_place((3, 2, 1, 0), 128, 4, True)
    np.testing.assert_allclose(first, 10 * np.log10(sigma0[0]), atol=1e-4)
    assert second[1][water[2]].mean() < first[1][water[2]].mean() - 2.5
    assert len(FloodDataset(dataset, "val", val_fraction=0.3)) in (5, 6)


def test_the_record_says_that_it_is_simulated(dataset):
    record = json.loads((dataset / "simulation.json").read_text())
    assert record["SIMULATED"] == "yes" and record["parameters"]["folders"] == 5 and record["units"] == "linear"


def test_files_do_not_depend_on_the_number_of_processes(dataset, tmp_path):
    check_processes_change_nothing("sarwmix.simulate.flood", FLAGS, dataset, tmp_path / "two")


def test_an_interrupted_run_is_completed_identically(dataset, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sarwmix.prepare.sen12_index.Table.write", stop)
        simulate_floods(out, SMALL)
    assert not list(out.glob("pairs_*"))
    next(out.rglob("*.npy")).write_bytes(b"broken")
    (out / "images" / "2").rename(out / "images" / ".2")  # not written yet
    for path in (out / "images" / ".2").iterdir():
        path.unlink()
    (out / "images" / ".2").rmdir()
    simulate_floods(out, SMALL)
    assert digests(out) == digests(dataset)


# ---- Folders, running again, and wrong flags -----------------------------------------------------


@pytest.mark.parametrize("folders, fraction, tests", ((24, 0.25, 6), (2, 0.01, 1), (7, 0, 0), (396, 0.25, 99)))
def test_folders_are_named_after_their_split(folders, fraction, tests):
    places = plan_places(Parameters(folders, test_fraction=fraction))
    names = [place.name for place in places]
    assert len(set(names)) == folders and [place.index for place in places] == list(range(folders))
    assert [len(name) == 4 for name in names] == [place.split == "train" for place in places]
    assert sum(place.split == "test" for place in places) == tests and all(len(name) in (1, 2, 4) for name in names)
    never = sum(not place.floods for place in places)
    assert abs(never - folders / 3) < 2


def test_a_finished_dataset_is_left_alone(dataset, caplog):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    with caplog.at_level("INFO"):
        main(argv("--out", dataset, FLAGS))
    assert "nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before


def test_other_content_is_refused_and_left_alone(dataset, tmp_path, capsys):
    before = digests(dataset)
    with pytest.raises(DataError, match="--out .*other parameters.*choose another"):
        simulate_floods(dataset, Parameters(folders=5, seed=4, size=128, test_fraction=0.4))
    assert digests(dataset) == before
    (tmp_path / "mine.txt").write_text("keep")
    message = refusal(main, ("--out", tmp_path, FLAGS), capsys)
    assert "--out" in message and "not empty" in message
    assert digests(tmp_path).keys() == {"mine.txt"}


@pytest.mark.parametrize("program", (flood, flood_archive))
@pytest.mark.parametrize(
    "flags, words",
    (
        ("--folders 0", "--folders 0"),
        ("", "--folders"),
        ("--folders 1", "too few"),
        ("--folders 9 --size 200", "multiple of 128"),
        ("--folders 9 --size 64", "--size 64"),
        ("--folders 9 --images 1", "--images 1"),
        ("--folders 9 --seed -1", "--seed -1"),
        ("--folders 9 --test_fraction 1", "--test_fraction 1"),
        ("--folders 900", "225 test folders"),
        ("--folders 9 --workers 0", "--workers 0"),
        ("--folders 9 --colour red", "--colour"),
    ),
)
def test_wrong_flags_are_one_line_and_status_2(program, flags, words, tmp_path, capsys):
    message = refusal(program.main, ("--out", tmp_path / "out", flags), capsys)
    assert words in message
    assert not (tmp_path / "out").exists()
