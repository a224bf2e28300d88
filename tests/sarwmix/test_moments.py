# SPDX-License-Identifier: MIT
"""Statistics: equal to those of all pixels at once, however they were joined; and the program that reports them."""

import json
import sys

import numpy as np
import pytest

from common.workers import Workers
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.moments import Moments
from sarwmix.prepare import statistics
from sarwmix.sen12flood_loader import FloodDataset
from tests.helpers.dataset_fixtures import fails_with, s1_name, write_v2
from tests.helpers.runs import argv, launch, mpirun, refusal


def images(count=24, size=15, seed=0):
    return np.random.default_rng(seed).normal([[[-19.0]], [[-12.0]]], 6, (count, 2, size, size)).astype(np.float32)


def tally_of(batch, floor_db=None):
    total = Moments(floor_db)
    for image in batch:
        total.add(image)
    return total


def test_figures_are_those_of_all_pixels_at_once():
    batch = images()
    found, pixels = tally_of(batch).summary(), batch.astype(np.float64).transpose(1, 0, 2, 3).reshape(2, -1)
    assert found["mean"] == pytest.approx(pixels.mean(1), rel=1e-13)
    assert found["std"] == pytest.approx(pixels.std(1), rel=1e-12)
    assert found["min"] == pixels.min(1).tolist() and found["max"] == pixels.max(1).tolist()
    assert found["pixels"] == [24 * 225] * 2 and found["nodata"] == found["infinite"] == [0, 0]


def test_it_is_not_a_mean_of_means():
    small, large = np.full((2, 1, 1), -30, np.float32), np.full((2, 3, 3), -10, np.float32)
    total = Moments()
    total.add(small)
    total.add(large)
    assert total.summary()["mean"] == pytest.approx([-12, -12])


@pytest.mark.parametrize("cuts", ([12], [1, 2, 23], [0, 24]))
def test_joined_parts_equal_the_whole(cuts):
    batch, total = images(), Moments()
    for part in np.split(batch, cuts):
        total.merge(Moments.from_dict(json.loads(json.dumps(tally_of(part).to_dict()))))
    whole = tally_of(batch).summary()
    for name, values in total.summary().items():
        assert values == pytest.approx(whole[name], rel=1e-12), name
    assert (total.histogram == tally_of(batch).histogram).all()


def test_what_has_no_value_is_counted_and_nothing_else():
    image = np.full((2, 4, 5), -10, np.float32)
    image[0, 0, :3], image[1, 0, 0], image[1, 1, :2] = np.nan, np.inf, -np.inf
    image[0, 2, 0] = -60
    found = tally_of([image]).summary()
    assert found["nodata"] == [3, 0] and found["infinite"] == [0, 3] and found["pixels"] == [17, 17]
    assert found["min"] == [-60, -10] and found["mean"][1] == -10
    found = tally_of([image], floor_db=-60.0).summary()
    assert found["nodata"] == [4, 0] and found["pixels"] == [16, 17] and found["min"] == [-10, -10]
    nothing = tally_of([np.full((2, 3, 3), np.nan, np.float32)]).summary()
    assert nothing["mean"] == [None, None] and nothing["pixels"] == [0, 0] and nothing["nodata"] == [9, 9]


def test_histogram_bins_are_where_they_say():
    image = np.array([[-80.0, -79.95, 39.99, 40.0, -80.5], [0.0, 0.05, 0.1001, 100, -200]], np.float32)[:, :, None]
    found = tally_of([image]).histogram_dict()
    assert found["lowest"] == -80 and found["width"] == 0.1 and len(found["counts"][0]) == 1200
    assert found["counts"][0][0] == 2 and found["counts"][0][-1] == 1 and found["above"] == [1, 1]
    assert found["below"] == [1, 1]
    assert found["counts"][1][800] == 2 and found["counts"][1][801] == 1 and sum(found["counts"][1]) == 3


def measure(dataset):
    return statistics.measure(statistics.chunks_of(dataset), dataset.FLOOR_DB, Workers())


# ---- Datasets ------------------------------------------------------------------------------------


def test_a_dataset_is_measured_over_its_images(tmp_path):
    write_v2(tmp_path)
    total = measure(BigEarthNetv2(tmp_path, "all"))
    assert total.summary()["mean"] == [-21.5, -11.5] and total.summary()["std"] == pytest.approx([1.25**0.5] * 2)
    assert total.summary()["pixels"] == [4 * 14400] * 2


def test_an_image_of_many_pairs_counts_once(tmp_path):
    names, rows = ("a", "b", "c"), []
    (tmp_path / "images" / "7").mkdir(parents=True)
    for name, sigma0 in zip(names, (0.1, 0.01, 0.001)):
        np.save(tmp_path / "images" / "7" / f"{name}.npy", np.full((2, 128, 128), sigma0, np.float32))
    rows = ["folder,first,second,label", "7,a,b,0", "7,a,c,1", "7,b,c,1"]
    (tmp_path / "pairs_test.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "images" / "7" / "c.npy").unlink()
    holed = np.full((2, 128, 128), 0.001, np.float32)
    holed[0, 0, :2], holed[1, 0, 0] = 0, np.nan
    np.save(tmp_path / "images" / "7" / "c.npy", holed)
    found = measure(FloodDataset(tmp_path, "test")).summary()
    assert found["pixels"] == [3 * 16384 - 2, 3 * 16384 - 1] and found["nodata"] == [2, 1]
    assert found["mean"] == pytest.approx([-20, -20], abs=1e-3) and found["min"] == pytest.approx([-30, -30])


def test_images_that_cannot_be_read_are_named(tmp_path):
    write_v2(tmp_path)
    broken = next(tmp_path.rglob(f"{s1_name(2)}_VV.tif"))
    broken.write_bytes(broken.read_bytes()[:300])
    fails_with(lambda: measure(BigEarthNetv2(tmp_path, "all")), "1 of 4 images cannot be read", f"{s1_name(2)}_VV.tif")


def test_the_program_reports_the_same_for_any_number_of_workers(simulated, tmp_path, caplog):
    flags = ["--dataset", "benv2", "--data_path", simulated, "--split", "train_val"]
    with caplog.at_level("INFO"):
        statistics.main(argv(flags, "--workers 1 --out", tmp_path / "one.json"))
    assert "nodata" in caplog.text and "VH" in caplog.text
    launch(
        mpirun(
            sys.executable, "-m", "sarwmix.prepare.statistics", *flags, "--workers", "1", "--out", tmp_path / "two.json"
        )
    )
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    report = json.loads((tmp_path / "one.json").read_text())
    assert report["samples"] == 48 and report["units"] == "dB" and report["pixels"] == [48 * 14400] * 2


@pytest.mark.parametrize(
    "flags, words",
    (
        (["--dataset", "benv2"], "--data_path is missing"),
        (["--data_path", "."], "--dataset"),
        (["--dataset", "benv2", "--data_path", "nowhere"], "nowhere: no such folder"),
        (["--dataset", "benv1", "--data_path", ".", "--include_snow_cloud"], "--include_snow_cloud"),
    ),
)
def test_wrong_flags_are_one_line(flags, words, capsys):
    assert words in refusal(statistics.main, flags, capsys)
