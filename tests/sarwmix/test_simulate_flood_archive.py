# SPDX-License-Identifier: MIT
"""The simulated SEN12-FLOOD as it is downloaded: that its images lie where they say, its faults, its lists, its zip."""

import hashlib
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import rasterio
from rasterio.warp import Resampling, reproject

from sarwmix.geotiff import read_band
from sarwmix.prepare.sen12_index import pairs, read_s1_list
from sarwmix.simulate.flood import Place, plan_places
from sarwmix.simulate.flood_archive import (
    KINDS,
    LATLON,
    MARGIN,
    RED,
    RawParameters,
    corner,
    grid,
    main,
    plan_faults,
    simulate_raw_floods,
    simulate_raw_place,
    to_latlon,
)
from sarwmix.simulate.landcover import LandCover
from sarwmix.simulate.radar import PSF_REACH
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import fails_with
from tests.helpers.runs import argv, digests

pytestmark = pytest.mark.slow

SMALL = RawParameters(folders=8, seed=5, size=128, keep_tree=True)
FLAGS = ["--folders", "8", "--seed", "5", "--size", "128"]
NAME = re.compile(r"S1A_IW_GRDH_1S[SD]V_2000\d{4}T\d{6}_2000\d{4}T\d{6}_\d{6}_[0-9A-F]{6}_[0-9A-F]{4}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "raw"
    simulate_raw_floods(out, SMALL)
    return out


@pytest.fixture(scope="module")
def place():
    """A flooded place: (Place, geography, sigma0, water)."""
    first = plan_places(SMALL)[0]
    return first, *simulate_raw_place(first, SMALL)


def faults_of(made):
    return json.loads((made / "faults.json").read_text())


def images_of(made, folder, band):
    return sorted((made / "SEN12FLOOD" / folder).glob(f"S1*_corrected_{band}.tif"))


def aligned(path, reference):
    """An image warped onto the grid of another by rasterio: (H, W), 0 where there is nothing."""
    with rasterio.open(reference) as wanted, rasterio.open(path) as image:
        onto = np.zeros(wanted.shape, np.float32)
        reproject(
            image.read(1),
            onto,
            src_crs=image.crs,
            src_transform=image.transform,
            dst_crs=wanted.crs,
            dst_transform=wanted.transform,
            src_nodata=0,
            dst_nodata=0,
            resampling=Resampling.bilinear,
            tolerance=0,
        )
        return onto


# ---- Images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("band", ("VH", "VV"))
def test_warped_back_an_image_is_what_was_simulated_and_not_shifted(made, place, band):
    _, _, sigma0, _ = place
    truth = 10 * np.log10(sigma0[:3, ("VH", "VV").index(band), MARGIN:-MARGIN, MARGIN:-MARGIN])
    reference = made / "SEN12FLOOD" / "0001" / "S2_2000-01-03_B04.tif"
    for path, expected in zip(images_of(made, "0001", band), truth):
        image = 10 * np.log10(aligned(path, reference))

        def apart(rows, cols):
            return np.median(np.abs(image - np.roll(expected, (rows, cols), (0, 1)))[2:-2, 2:-2])

        assert apart(0, 0) < 0.5 and abs(np.median(image - expected)) < 0.1
        shifted = [apart(*step) for step in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        assert min(shifted) > 2 * apart(0, 0)
        assert max(shifted) < 1.1 * min(shifted)  # nor by a part of a pixel to one side


def test_images_are_linear_float32_in_degrees_of_about_ten_metres(made):
    for folder in ("0002", "2"):
        with rasterio.open(images_of(made, folder, "VV")[0]) as image:
            assert image.crs.to_epsg() == 4326 and image.dtypes == ("float32",) and image.count == 1
            assert image.transform.a == -image.transform.e == 0.0000898 and image.transform.b == image.transform.d == 0
            assert image.tags()["SIMULATED"] == "yes"
            values = image.read(1)
        assert (values > 0).all() and -18 < np.median(10 * np.log10(values)) < -6


@pytest.mark.parametrize("index", (0, 19, 59, 60 * 39 + 59, 60 * 40))
def test_the_largest_images_cover_their_grid_everywhere(index):
    image, geotransform = to_latlon(np.ones((2, 1024 + 2 * MARGIN, 1024 + 2 * MARGIN), np.float32), index, 1024)
    assert (image == 1).all()
    crs, pixels, _ = grid(index, 1024)
    onto = np.zeros((1024, 1024), np.float32)
    reproject(
        image[0],
        onto,
        src_crs=LATLON,
        src_transform=geotransform,
        dst_crs=crs,
        dst_transform=pixels,
        src_nodata=0,
        dst_nodata=0,
    )
    assert (onto == 1).all()


def test_folders_lie_apart():
    corners = [corner(index) for index in range(2400)]
    assert len(set(corners)) == 2400 and len({zone for zone, *_ in corners}) == 3
    assert all(200000 < west < 800000 and 7.5e6 < north < 9e6 for _, west, north in corners)


def test_the_red_band_shows_land_cover_and_flood_on_the_utm_grid(made, place):
    first, geography, _, water = place
    dry, wet = (made / "SEN12FLOOD" / "0001" / f"S2_{date}_B04.tif" for date in ("2000-01-03", "2000-02-02"))
    with rasterio.open(dry) as image:
        _, west, north = corner(first.index)
        assert image.crs.to_epsg() == 32735 and image.shape == (128, 128) and image.dtypes == ("uint16",)
        assert image.transform == rasterio.Affine(10, 0, west, 0, -10, north)
        before = image.read(1).astype(int)
    with rasterio.open(wet) as image:
        after = image.read(1).astype(int)
    inner = slice(PSF_REACH + MARGIN, -PSF_REACH - MARGIN)
    cover, flooded = geography.land_cover[inner, inner], water[2, MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert flooded.mean() > 0.02 and len(np.unique(cover)) > 3
    for kind in np.unique(cover):
        assert abs(np.median(before[cover == kind]) - RED[LandCover(kind)]) < 0.3 * RED[LandCover(kind)]
    assert abs(np.median(after[flooded]) - 950) < 20 and abs(np.median((after - before)[~flooded])) < 5


# ---- Faults --------------------------------------------------------------------------------------


def test_each_fault_is_there_once_in_a_training_folder_of_its_own(made):
    faults = faults_of(made)
    assert tuple(faults) == KINDS and [fault["folder"] for fault in faults.values()] == [f"000{n}" for n in range(1, 7)]
    lists = read_s1_list(made / "SEN12FLOOD" / "S1list.json")
    for kind, fault in faults.items():
        folder, name = made / "SEN12FLOOD" / fault["folder"], fault["filename"]
        assert name in [image.name for image in lists[fault["folder"]]]
        there = [band for band in ("VH", "VV") if (folder / f"{name}_corrected_{band}.tif").exists()]
        assert there == {"single_polarisation": ["VV"], "missing": []}.get(kind, ["VH", "VV"])
        assert ("1SSV" in name) == (kind == "single_polarisation")
        reference = next(folder.glob("*_B04.tif"))
        if kind in ("partial_cover", "small_gap", "nonfinite"):
            images = [aligned(folder / f"{name}_corrected_{band}.tif", reference) for band in there]
            shares = [(image == 0).mean() for image in images]
            least, most = {"partial_cover": (0.4, 0.5), "small_gap": (0.05, 0.2), "nonfinite": (0, 0)}[kind]
            assert all(least <= share <= most for share in shares)
            assert [0 < np.isnan(image).mean() < 0.005 for image in images] == [kind == "nonfinite"] * 2
    cut = made / "SEN12FLOOD" / "0003" / f"{faults['corrupt']['filename']}_corrected_VV.tif"
    fails_with(lambda: read_band(cut), str(cut), "corrupt, truncated")
    assert (read_band(str(cut).replace("_VV", "_VH")) > 0).all()


def test_all_other_images_are_sound(made):
    wrong = {fault["filename"] for fault in faults_of(made).values()}
    sound = [
        path for path in (made / "SEN12FLOOD").rglob("S1*.tif") if path.name[: -len("_corrected_VH.tif")] not in wrong
    ]
    assert len(sound) == 2 * (8 * 4 - 6)
    assert all((read_band(path) > 0).all() for path in sound)


@pytest.mark.parametrize(
    "trains, images, taken",
    (
        (6, 4, [("0001", 3), ("0002", 3), ("0003", 3), ("0004", 3), ("0005", 3), ("0006", 3)]),
        (4, 4, [("0001", 3), ("0002", 3), ("0003", 3), ("0004", 3), ("0001", 2), ("0002", 2)]),
        (1, 12, [("0001", image) for image in (11, 10, 9, 8, 7, 6)]),
        (2, 3, [("0001", 2), ("0002", 2)]),
        (9, 2, []),
    ),
)
def test_faults_go_to_different_images_and_spare_half(trains, images, taken):
    places = [Place(n, f"{n + 1:04d}", "train", True) for n in range(trains)] + [Place(trains, "1", "test", True)]
    assert plan_faults(places, images) == dict(zip(KINDS, taken))


def test_faults_without_a_place_are_told(tmp_path, caplog):
    simulate_raw_floods(tmp_path / "out", RawParameters(folders=2, size=128, images=3, test_fraction=0.5))
    assert list(faults_of(tmp_path / "out")) == ["single_polarisation"] and "5 of 6 kinds" in caplog.text


# ---- Lists ---------------------------------------------------------------------------------------


def test_the_list_is_like_the_real_one(made):
    path = made / "SEN12FLOOD" / "S1list.json"
    content, lists = json.loads(path.read_text()), read_s1_list(path)
    assert list(content) == ["0001", "0002", "0003", "0004", "0005", "0006", "1", "2"]
    in_order = []
    for folder, entry in content.items():
        assert list(entry) == ["count", "4", "3", "2", "1", "folder", "geo", "urls"]
        assert (entry["count"], entry["folder"], entry["urls"]) == (4, folder, [])
        assert all(
            set(entry[n]) == {"date", "FLOODING", "orbit", "filename"} and NAME.fullmatch(entry[n]["filename"])
            for n in "1234"
        )
        assert all(
            entry[n]["date"]
            == f"{entry[n]['filename'][17:21]}-{entry[n]['filename'][21:23]}-{entry[n]['filename'][23:25]}"
            for n in "1234"
        )
        numbered = [entry[n]["filename"] for n in "1234"]
        in_order.append(numbered == [image.name for image in lists[folder]])
        flooded = [image.flooded for image in lists[folder]]
        assert flooded == ([False] * 4 if folder in ("0003", "0006") else [False, False, True, True])
        with rasterio.open(next((made / "SEN12FLOOD" / folder).glob("*_B04.tif"))) as grid_of:
            west, south, east, north = rasterio.warp.transform_bounds(grid_of.crs, LATLON, *grid_of.bounds)
        longitudes, latitudes = zip(*entry["geo"]["coordinates"][0])
        assert entry["geo"]["type"] == "Polygon"
        assert entry["geo"]["coordinates"][0][0] == entry["geo"]["coordinates"][0][-1]
        around = [min(longitudes), min(latitudes), max(longitudes), max(latitudes)]
        np.testing.assert_allclose(around, [west, south, east, north], atol=2e-6)
    assert in_order == [True, False] * 4
    names = [image.name for images in lists.values() for image in images]
    assert len(set(names)) == 32 and len({name[-4:] for name in names}) > 28


def test_most_pairs_remain(made):
    """What is left of the pairs when the images that cannot be used are out."""
    faults, lists = faults_of(made), read_s1_list(made / "SEN12FLOOD" / "S1list.json")
    lost = {faults[kind]["filename"] for kind in ("single_polarisation", "partial_cover", "corrupt", "missing")}
    left = [[image.flooded for image in images if image.name not in lost] for images in lists.values()]
    whole = [[image.flooded for image in images] for images in lists.values()]
    assert sum(len(pairs(flooded)) for flooded in whole) == 6 * 5 + 2 * 6
    assert sum(len(pairs(flooded)) for flooded in left) == 4 * 3 + 3 * 5 + 6


# ---- Files ---------------------------------------------------------------------------------------


def test_the_zip_holds_the_tree_and_more_than_is_needed(made):
    with zipfile.ZipFile(made / "SEN12FLOOD.zip") as archive:
        assert archive.testzip() is None
        infos = archive.infolist()
        files = {info.filename: hashlib.sha256(archive.read(info)).hexdigest() for info in infos if not info.is_dir()}
    assert files == {f"SEN12FLOOD/{name}": digest for name, digest in digests(made / "SEN12FLOOD").items()}
    assert {info.date_time for info in infos} == {(2000, 1, 1, 0, 0, 0)}
    assert {"SEN12FLOOD/", "SEN12FLOOD/0001/"} <= {info.filename for info in infos if info.is_dir()}
    assert "SEN12FLOOD/S2list.json" in files and "SEN12FLOOD/0001/S2_2000-01-03_B08.tif" in files


def test_the_zip_depends_neither_on_the_processes_nor_on_the_tree_being_kept(made, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sarwmix.simulate.flood_archive",
        "--out",
        str(tmp_path / "two"),
        *FLAGS,
        "--workers",
        "2",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "", result.stderr
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "SEN12FLOOD.zip",
        "faults.json",
        "simulation.json",
    ]
    for name in ("SEN12FLOOD.zip", "faults.json"):
        assert (tmp_path / "two" / name).read_bytes() == (made / name).read_bytes()


def test_an_interrupted_run_is_completed_identically(made, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sarwmix.simulate.flood_archive.write_zip", stop)
        simulate_raw_floods(out, SMALL)
    assert not (out / "SEN12FLOOD.zip").exists()
    images_of(out, "0002", "VV")[0].write_bytes(b"broken")
    (out / "SEN12FLOOD" / "0001" / ".S2_2000-01-03_B04.tif.4711.tmp").write_bytes(b"half")
    simulate_raw_floods(out, SMALL)
    assert digests(out) == digests(made)


def test_a_tree_that_was_left_beside_the_finished_zip_is_removed(tmp_path):
    few = RawParameters(folders=1, size=128, images=2, test_fraction=0)
    simulate_raw_floods(tmp_path / "out", few)
    (tmp_path / "out" / "SEN12FLOOD" / "0001").mkdir(parents=True)
    before = (tmp_path / "out" / "SEN12FLOOD.zip").stat().st_mtime_ns
    simulate_raw_floods(tmp_path / "out", few)
    assert not (tmp_path / "out" / "SEN12FLOOD").exists()
    assert (tmp_path / "out" / "SEN12FLOOD.zip").stat().st_mtime_ns == before


def test_a_finished_dataset_is_left_alone(made, caplog):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    with caplog.at_level("INFO"):
        main(argv("--out", made, FLAGS, "--keep_tree"))
    assert "nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
