# SPDX-License-Identifier: MIT
"""Warping Sentinel-1 onto the Sentinel-2 grid: where pixels land, what becomes of missing ones, and of images that fail.

Also small raw data sets, and programs that are killed midway, for the tests of the steps that follow.
"""

import subprocess
import sys

import numpy as np
import pytest
import rasterio
from rasterio.warp import Resampling, reproject, transform
from scipy.ndimage import map_coordinates

from common.errors import DataError
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import fails_with, one_line, write_tif
from tests.helpers.runs import Argv, digests, launch, mpirun, refusal
from tests.helpers.sen12 import (
    LATLON,
    NORTH,
    SOUTH,
    TEN_METRES,
    S,
    align,
    image_name,
    kill_midway,
    latlon_grid,
    needs_gdal,
    read,
    rows_of,
    speckle,
    truncate,
    utm_grid,
    write_channel,
    write_image,
    write_list,
    write_raw,
    write_reference,
)
from tests.helpers.sen12 import align_main as main

pytestmark = [pytest.mark.slow, *([needs_gdal] if needs_gdal else [])]


# ---- Small raw data sets -------------------------------------------------------------------------


def one_image(root, kind="D"):
    """A data set of one image without its files: its name."""
    write_list(root, {"0001": [(image_name(0, kind), False), (image_name(9), False)]})
    write_reference(root, "0001")
    write_image(root, "0001", image_name(9))  # so that there is always one that can be aligned
    return image_name(0, kind)


def row_of(out, name):
    return next(row for row in rows_of(out / "align.csv") if row["image"] == name)


# ---- Programs that are stopped -------------------------------------------------------------------


def run(module, *flags):
    return launch([sys.executable, "-m", module, *flags])


# ---- Where pixels land ---------------------------------------------------------------------------


def place(grid, columns, rows):
    """Coordinates of pixels of a north-up grid, counted from the corner of the first."""
    return grid.c + grid.a * columns, grid.f + grid.e * rows


def pixel(grid, x, y):
    """The inverse of `place`: (columns, rows)."""
    return (x - grid.c) / grid.a, (y - grid.f) / grid.e


@pytest.mark.parametrize("where", (SOUTH, NORTH), ids=("south", "north"))
@pytest.mark.parametrize("degrees", (TEN_METRES, 2.3 * TEN_METRES), ids=("10 m", "23 m"))
@pytest.mark.parametrize("resampling", ("bilinear", "nearest", "average"))
def test_a_landmark_lands_in_its_pixel(where, degrees, resampling, tmp_path):
    """A bright cross whose centre has the longitude and latitude of the centre of pixel (row 40, column 77)."""
    crs, pixels = utm_grid(where)
    (lon,), (lat,) = transform(crs, LATLON, *([value] for value in place(pixels, 77.5, 40.5)))
    _, shape = latlon_grid(where, degrees, margin=20)
    row, column = shape[0] // 3, shape[1] // 2
    image = np.full(shape, 0.05)
    image[row, column - 3 : column + 4] = image[row - 3 : row + 4, column] = 3
    image[row, column] = 9
    grid = rasterio.Affine(degrees, 0, lon - (column + 0.5) * degrees, 0, -degrees, lat + (row + 0.5) * degrees)
    name = one_image(tmp_path)
    write_reference(tmp_path, "0001", where)
    for channel in ("VH", "VV"):
        write_channel(tmp_path, "0001", name, channel, image, grid)
    align(tmp_path, tmp_path / "out", resampling=resampling)
    with rasterio.open(tmp_path / "out" / "0001" / f"{name}.tif") as file:
        assert (file.crs, file.transform, file.shape) == (crs, pixels, (S, S))
        warped = file.read(1)
    # As large as a source pixel is the patch that `nearest` makes of it; its middle is what is asked for.
    brightest = np.argwhere(warped > 0.99 * warped.max())
    np.testing.assert_allclose(brightest.mean(0), (40, 77), atol=0.51 if resampling == "nearest" else 1e-9)
    assert warped[40, 77] > 4

    def at(rows, columns):
        """The warped value where a pixel of the source lies, so many rows and columns from the centre of the cross."""
        x, y = transform(LATLON, crs, *([value] for value in place(grid, column + columns + 0.5, row + rows + 0.5)))
        column_there, row_there = pixel(pixels, x[0], y[0])
        return warped[int(row_there), int(column_there)]

    for rows, columns in ((0, 2), (0, -2), (2, 0), (-2, 0)):
        assert at(rows, columns) > 1 > at(2, 2)


def source_pixels(where, grid):
    """(rows, columns) in a grid in degrees of the centres of all pixels of the reference, as fractions; each (S, S)."""
    crs, pixels = utm_grid(where)
    columns, rows = np.meshgrid(np.arange(S) + 0.5, np.arange(S) + 0.5)
    x, y = place(pixels, columns.ravel(), rows.ravel())
    lon, lat = transform(crs, LATLON, x, y)
    columns, rows = pixel(grid, np.array(lon), np.array(lat))
    return rows.reshape(S, S), columns.reshape(S, S)


GRIDS = pytest.mark.parametrize(
    "where, degrees",
    [(where, scale * TEN_METRES) for where in (SOUTH, NORTH) for scale in (1, 2, 0.4)],
    ids=[f"{where}-{scale}" for where in ("south", "north") for scale in ("10m", "20m", "4m")],
)


def aligned_speckle(root, where, degrees, resampling):
    """(grid, the two images on it, the two as they were aligned)."""
    grid, shape = latlon_grid(where, degrees)
    name = one_image(root)
    write_reference(root, "0001", where)
    images = [speckle(1, shape, 0.02), speckle(2, shape, 0.1)]
    for channel, image in zip(("VH", "VV"), images):
        write_channel(root, "0001", name, channel, image, grid)
    align(root, root / "out", resampling=resampling)
    return grid, images, read(root / "out" / "0001" / f"{name}.tif")


@GRIDS
@pytest.mark.parametrize("resampling", ("bilinear", "nearest", "average"))
def test_images_are_those_of_another_program(where, degrees, resampling, tmp_path):
    """rasterio interpolates its coordinates, with errors up to an eighth of a source pixel, so that it cannot be equal."""
    grid, images, warped = aligned_speckle(tmp_path, where, degrees, resampling)
    crs, pixels = utm_grid(where)
    for image, found in zip(images, warped, strict=True):
        expected = np.zeros((S, S), np.float32)
        reproject(
            image,
            expected,
            src_crs=LATLON,
            src_transform=grid,
            dst_crs=crs,
            dst_transform=pixels,
            src_nodata=0,
            dst_nodata=0,
            resampling=Resampling[resampling],
        )
        assert (expected > 0).all()
        if resampling == "nearest":
            assert (found == expected).mean() > (0.999 if degrees >= TEN_METRES else 0.99)
        else:
            difference = np.abs(found - expected) / image.mean()
            assert np.median(difference) < 2e-3 and difference.max() < 0.03


@GRIDS
def test_nearest_is_the_source_pixel_that_each_centre_falls_on(where, degrees, tmp_path):
    grid, images, warped = aligned_speckle(tmp_path, where, degrees, "nearest")
    rows, columns = source_pixels(where, grid)
    for image, found in zip(images, warped, strict=True):
        assert (found == image[rows.astype(int), columns.astype(int)]).mean() > 0.9999


@pytest.mark.parametrize("where, degrees", ((SOUTH, TEN_METRES), (SOUTH, 2 * TEN_METRES), (NORTH, 2 * TEN_METRES)))
def test_bilinear_is_the_interpolation_at_each_centre(where, degrees, tmp_path):
    """For sources that are not finer than the reference; of those GDAL takes in more neighbours."""
    grid, images, warped = aligned_speckle(tmp_path, where, degrees, "bilinear")
    rows, columns = source_pixels(where, grid)
    for image, found in zip(images, warped, strict=True):
        expected = map_coordinates(image.astype(float), [rows - 0.5, columns - 0.5], order=1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * image.max())


# ---- Missing pixels ------------------------------------------------------------------------------


@pytest.mark.parametrize("resampling", ("bilinear", "nearest", "average"))
def test_missing_pixels_are_exactly_zero_and_do_not_bleed(resampling, tmp_path):
    """Constant channels that end within the reference, with a hole in VH alone: each pixel is the constant, or 0."""
    grid, shape = latlon_grid()
    high, wide = shape[0], shape[1] * 2 // 3
    vh, vv = np.full((high, wide), 0.02, np.float32), np.full((high, wide), 0.1, np.float32)
    hole = (slice(50, 71), slice(30, 44))
    vh[hole] = 0
    name = one_image(tmp_path)
    write_channel(tmp_path, "0001", name, "VH", vh, grid)
    write_channel(tmp_path, "0001", name, "VV", vv, grid)
    align(tmp_path, tmp_path / "out", resampling=resampling)
    rows, columns = source_pixels(SOUTH, grid)
    covered = columns < wide
    in_hole = (rows >= 50) & (rows < 71) & (columns >= 30) & (columns < 44)
    unclear = np.abs(columns - wide) < 1e-3
    for edge, where in ((50, rows), (71, rows), (30, columns), (44, columns)):
        unclear |= np.abs(where - edge) < 1e-3
    warped = read(tmp_path / "out" / "0001" / f"{name}.tif")
    for values, constant, there in ((warped[0], 0.02, covered & ~in_hole), (warped[1], 0.1, covered)):
        assert 0.3 < there.mean() < 0.8
        if resampling == "average":  # a pixel that touches data has some
            assert 0.95 < there.sum() / np.count_nonzero(values) <= 1 and (values != 0)[there].all()
        else:
            assert ((values != 0) == there)[~unclear].all()
        np.testing.assert_allclose(values[values != 0], constant, rtol=1e-6)


def test_nan_and_infinite_pixels_become_zero_and_are_counted(tmp_path):
    grid, shape = latlon_grid()
    vh, vv = np.full(shape, 0.02, np.float32), np.full(shape, 0.1, np.float32)
    vh[60, 60], vh[0, 0], vv[61, 90] = np.nan, -np.inf, np.inf
    name = one_image(tmp_path)
    write_image(tmp_path, "0001", name, vh, vv)
    align(tmp_path, tmp_path / "out")
    assert row_of(tmp_path / "out", name)["nonfinite"] == "3"
    assert row_of(tmp_path / "out", image_name(9))["nonfinite"] == "0"
    warped = read(tmp_path / "out" / "0001" / f"{name}.tif")
    rows, columns = source_pixels(SOUTH, grid)
    for values, constant, (row, column) in ((warped[0], 0.02, (60, 60)), (warped[1], 0.1, (61, 90))):
        assert ((values == 0) == ((np.floor(rows) == row) & (np.floor(columns) == column))).all()
        assert (values == 0).any()
        np.testing.assert_allclose(values[values != 0], constant, rtol=1e-6)


def test_a_declared_no_data_value_is_no_data(tmp_path):
    grid, shape = latlon_grid()
    image = np.full(shape, 0.1, np.float32)
    image[50:60] = -9999
    name = one_image(tmp_path)
    for channel in ("VH", "VV"):
        write_channel(tmp_path, "0001", name, channel, image, grid, nodata=-9999)
    align(tmp_path, tmp_path / "out")
    warped = read(tmp_path / "out" / "0001" / f"{name}.tif")
    assert 0.05 < (warped == 0).mean() < 0.1 and row_of(tmp_path / "out", name)["nonfinite"] == "0"
    np.testing.assert_allclose(warped[warped != 0], 0.1, rtol=1e-6)


# ---- Channels and units --------------------------------------------------------------------------


def test_channels_are_in_order_described_and_on_the_reference_grid(tmp_path):
    _, shape = latlon_grid()
    name = one_image(tmp_path)
    write_image(tmp_path, "0001", name, np.full(shape, 0.02), np.full(shape, 0.1))
    align(tmp_path, tmp_path / "out")
    with rasterio.open(tmp_path / "out" / "0001" / f"{name}.tif") as file:
        assert file.descriptions == ("VH", "VV") and file.dtypes == ("float32", "float32") and file.nodatavals == (0, 0)
        assert (file.crs, file.transform, file.shape) == (*utm_grid(), (S, S))
        np.testing.assert_allclose(file.read(1), 0.02, rtol=1e-6)
        np.testing.assert_allclose(file.read(2), 0.1, rtol=1e-6)


def test_described_bands_are_taken_by_name(tmp_path):
    grid, shape = latlon_grid()
    vh, vv = np.full(shape, 0.02, np.float32), np.full(shape, 0.1, np.float32)
    name = one_image(tmp_path)
    for channel in ("VH", "VV"):
        write_channel(tmp_path, "0001", name, channel, np.stack([vv, vh]), grid, descriptions=["VV", "VH"])
    align(tmp_path, tmp_path / "out")
    np.testing.assert_allclose(read(tmp_path / "out" / "0001" / f"{name}.tif").mean((1, 2)), (0.02, 0.1), rtol=1e-6)


def test_a_file_that_is_described_as_the_other_channel_is_dropped(tmp_path):
    grid, shape = latlon_grid()
    name = one_image(tmp_path)
    for channel in ("VH", "VV"):
        write_channel(tmp_path, "0001", name, channel, np.full(shape, 0.1), grid, descriptions=["VV"])
    align(tmp_path, tmp_path / "out")
    row = row_of(tmp_path / "out", name)
    assert row["reason"] == "wrong channel" and f"0001/{name}_corrected_VH.tif" in row["detail"]
    assert "VV" in row["detail"]


def test_db_is_converted_before_it_is_resampled(tmp_path):
    """The mean of -20 and 0 dB in linear terms is 0.505; their mean in dB would be 0.1."""
    grid, shape = latlon_grid()
    image = np.where(np.arange(shape[1]) % 2, -20.0, -1e-6) + np.zeros(shape)
    image[:, 100:] = 0  # no data, also among dB
    name = one_image(tmp_path)
    for target in (name, image_name(9)):
        write_image(tmp_path, "0001", target, image, image)
    align(tmp_path, tmp_path / "out", units="dB")
    warped = read(tmp_path / "out" / "0001" / f"{name}.tif")
    assert warped[warped != 0].mean() == pytest.approx(0.505, abs=0.02) and (warped == 0).mean() > 0.2
    assert warped[warped != 0].min() > 0.0099 and warped.max() < 1.001


@pytest.mark.parametrize("mean, units, remedy", ((-15, "linear", "--units dB"), (0.1, "dB", "--units linear")))
def test_other_units_stop_the_program_and_name_the_flag(mean, units, remedy, tmp_path, capsys):
    _, shape = latlon_grid()
    name = one_image(tmp_path)
    write_image(tmp_path, "0001", name, np.full(shape, mean), np.full(shape, mean))
    message = refusal(
        main, ("--raw_root", tmp_path, "--out", tmp_path / "out", "--units", units, "--size", S, "--workers 1"), capsys
    )
    assert f"{name}_corrected_VH.tif" in message
    assert remedy in message
    assert not (tmp_path / "out" / "align.csv").exists()


def test_a_no_data_value_without_its_tag_is_named(tmp_path):
    _, shape = latlon_grid()
    image = np.full(shape, 0.1, np.float32)
    image[:5] = -9999
    name = one_image(tmp_path)
    write_image(tmp_path, "0001", name, np.full(shape, 0.1, np.float32), image)
    with pytest.raises(DataError) as error:
        align(tmp_path, tmp_path / "out", size=S)
    one_line(error, f"{name}_corrected_VV.tif: ", "of the VV pixels are below -1", "gdal_edit.py -a_nodata -9999")
    assert not list((tmp_path / "out").rglob("*.tif"))


def test_a_few_negative_values_are_linear_still(tmp_path):
    _, shape = latlon_grid()
    image = np.full(shape, 0.1, np.float32)
    image[:40] = -0.001  # noise that was subtracted
    name = one_image(tmp_path)
    write_image(tmp_path, "0001", name, image, image)
    align(tmp_path, tmp_path / "out")
    assert read(tmp_path / "out" / "0001" / f"{name}.tif").min() == pytest.approx(-0.001)


# ---- Images that cannot be aligned ---------------------------------------------------------------


def remove(root, name):
    (root / "0001" / f"{name}_corrected_VV.tif").unlink()


def remove_folder_of_another(root, name):
    write_list(root, {"0001": [(image_name(9), False)], "0002": [(name, False)]})


def empty(root, name):
    truncate(root, name, 0)


def no_tiff(root, name):
    (root / "0001" / f"{name}_corrected_VV.tif").write_text("<VRTDataset/>")


def complex_values(root, name):
    grid, shape = latlon_grid()
    write_tif(root / "0001" / f"{name}_corrected_VV.tif", np.ones(shape, np.complex64), crs=LATLON, transform=grid)


def elsewhere(root, name):
    grid, shape = latlon_grid(NORTH)
    for channel in ("VH", "VV"):
        write_channel(root, "0001", name, channel, np.ones(shape), grid)


def zeros(root, name):
    _, shape = latlon_grid()
    write_image(root, "0001", name, np.zeros(shape), np.full(shape, np.nan))


def zeros_within(root, name):
    grid, shape = latlon_grid(margin=40)
    image = np.ones(shape)
    image[20:-20, 20:-20] = 0
    for channel in ("VH", "VV"):
        write_channel(root, "0001", name, channel, image, grid)


def nowhere(root, name):
    write_tif(root / "0001" / f"{name}_corrected_VV.tif", np.ones((150, 150), np.float32))


@pytest.mark.parametrize(
    "spoil, reason, words",
    (
        (remove, "missing file", "_corrected_VV.tif does not exist"),
        (remove_folder_of_another, "missing file", "0002/"),
        (truncate, "corrupt", "_corrected_VV.tif cannot be read"),
        (empty, "corrupt", "_corrected_VV.tif cannot be read"),
        (no_tiff, "corrupt", "_corrected_VV.tif cannot be read"),
        (complex_values, "corrupt", "complex"),
        (elsewhere, "no overlap", "outside the reference"),
        (zeros, "all zero", "NaN or infinite"),
        (zeros_within, "all zero", "within the reference"),
        (nowhere, "no position", "_corrected_VV.tif does not say where it lies"),
    ),
)
def test_an_image_that_cannot_be_aligned_is_recorded(spoil, reason, words, tmp_path, capfd):
    raw, out = tmp_path / "raw", tmp_path / "out"
    name = one_image(raw)
    write_image(raw, "0001", name)
    spoil(raw, name)
    align(raw, out)
    row = row_of(out, name)
    assert (row["status"], row["reason"], row["nonfinite"]) == ("dropped", reason, "")
    assert words in row["detail"] and name in row["detail"] and str(tmp_path) not in row["detail"]
    assert row_of(out, image_name(9))["status"] == "aligned"
    assert digests(out).keys() == {"S1list.json", "align.csv", "step.json", f"0001/{image_name(9)}.tif"}
    assert capfd.readouterr().err == ""  # GDAL prints nothing of its own


def test_an_image_of_one_polarisation_is_recorded(tmp_path):
    name = one_image(tmp_path, "S")
    align(tmp_path, tmp_path / "out")
    row = row_of(tmp_path / "out", name)
    assert (row["status"], row["reason"]) == ("dropped", "single polarisation") and "VV only" in row["detail"]


def test_the_reference_is_the_first_that_can_be_read(tmp_path, caplog):
    name = one_image(tmp_path)
    write_image(tmp_path, "0001", name)
    (tmp_path / "0001" / "S2_2019-01-01_B04.tif").write_text("broken")
    write_reference(tmp_path, "0001", (SOUTH[0], SOUTH[1] + 10, SOUTH[2]), date="2019-01-09")
    align(tmp_path, tmp_path / "out", size=S)
    assert row_of(tmp_path / "out", name)["reference"] == "S2_2019-01-05_B04.tif"
    assert "2 remarks on references" in caplog.text and "0001/S2_2019-01-01_B04.tif cannot be read" in caplog.text
    assert "0001/S2_2019-01-09_B04.tif has another grid than S2_2019-01-05_B04.tif" in caplog.text


def test_without_a_reference_the_images_of_the_folder_are_dropped(tmp_path):
    write_raw(tmp_path, {"0001": (False, True), "0002": (False,)})
    next((tmp_path / "0001").glob("S2_*")).write_text("broken")
    align(tmp_path, tmp_path / "out")
    assert [(row["status"], row["reason"], row["reference"]) for row in rows_of(tmp_path / "out" / "align.csv")] == [
        ("dropped", "no reference", ""),
        ("dropped", "no reference", ""),
        ("aligned", "", "S2_2019-01-05_B04.tif"),
    ]


def test_a_reference_of_another_size_is_used_and_named(tmp_path, caplog):
    name = one_image(tmp_path)
    write_image(tmp_path, "0001", name)
    write_reference(tmp_path, "0001", size=100)
    align(tmp_path, tmp_path / "out", size=S)
    assert read(tmp_path / "out" / "0001" / f"{name}.tif").shape == (2, 100, 100)
    assert "1 other sizes than --size: 0001 is 100x100" in caplog.text


def test_if_nothing_can_be_aligned_that_is_an_error_and_nothing_is_complete(tmp_path):
    write_raw(tmp_path, {"0001": (False,)})
    for path in (tmp_path / "0001").glob("S1*"):
        path.write_text("")
    with pytest.raises(DataError) as error:
        align(tmp_path, tmp_path / "out")
    one_line(error, "none of the 1 images can be aligned", "corrupt", "--raw_root")
    assert not (tmp_path / "out" / "align.csv").exists()


# ---- Running again -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Six folders of five images, with a corrupt one, one of one polarisation, and one with NaN: (raw, its alignment)."""
    folder = tmp_path_factory.mktemp("align")
    names = write_raw(
        folder / "raw", {f: (False, False, True, False, True) for f in ("0001", "0002", "0003", "0010", "1", "12")}
    )
    truncate(folder / "raw", names["0001"][2])
    _, shape = latlon_grid()
    vh = speckle(3, shape, 0.02)
    vh[70:72, 40:42] = np.nan
    write_image(folder / "raw", "0003", names["0003"][0], vh=vh)
    align(folder / "raw", folder / "out", size=S)
    return folder / "raw", folder / "out"


def flags(raw, out, workers=1):
    return ["--raw_root", raw, "--out", out, "--size", S, "--workers", workers]


def test_the_list_is_copied_and_the_rows_are_in_its_order(raw):
    source, out = raw
    assert (out / "S1list.json").read_bytes() == (source / "S1list.json").read_bytes()
    rows = rows_of(out / "align.csv")
    assert [(row["folder"], row["image"]) for row in rows] == [
        (folder, image_name(k)) for folder in ("0001", "0002", "0003", "0010", "1", "12") for k in range(5)
    ]
    assert [row["status"] for row in rows].count("dropped") == 1 and rows[2]["reason"] == "corrupt"
    assert rows[10]["nonfinite"] == "4"


@pytest.mark.parametrize("workers", (1, 2))
def test_killed_midway_and_run_again_it_leaves_the_same(workers, raw, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sarwmix.sen12_align_s1_to_s2", *flags(raw[0], out, workers)]
    kill_midway(command, lambda: len(list(out.rglob("*.tif"))) >= 3)
    assert not (out / "align.csv").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.tif")}
    launch(command)
    assert digests(out) == digests(raw[1])
    assert kept and all(
        path.stat().st_mtime_ns == when for path, when in kept.items()
    )  # what was there is not done again


def test_ranks_and_processes_leave_the_same(raw, tmp_path):
    launch(mpirun(sys.executable, "-m", "sarwmix.sen12_align_s1_to_s2", *flags(raw[0], tmp_path / "out", 2)))
    assert digests(tmp_path / "out") == digests(raw[1])


def test_an_error_on_one_of_two_ranks_is_one_line(raw, tmp_path):
    result = subprocess.run(
        mpirun(sys.executable, "-m", "sarwmix.sen12_align_s1_to_s2", *flags(raw[0], tmp_path / "out"), "--units", "dB"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2 and result.stderr.count("error:") == 1 and "--units linear" in result.stderr


def test_a_complete_alignment_is_left_alone_until_its_table_is_removed(raw, tmp_path, capsys, caplog):
    source, out = tmp_path / "raw", tmp_path / "out"
    names = write_raw(source, {"0001": (False, True)})
    truncate(source, names["0001"][1])
    align(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    write_image(source, "0001", names["0001"][1])
    with caplog.at_level("INFO"):
        main([str(word) for word in flags(source, out)])
    assert "nothing to do" in caplog.text and "1 dropped: 1 corrupt" in caplog.text
    assert "remove it and run again" in caplog.text
    said = "1 of 2 images aligned; the list: 2 of 3,957 images (less than 0.1 % of the complete dataset)"
    assert f"{out}: {said}" in caplog.messages
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (out / "align.csv").unlink()
    align(source, out)
    assert [row["status"] for row in rows_of(out / "align.csv")] == ["aligned", "aligned"]


@pytest.mark.parametrize("change", ({"resampling": "nearest"}, {"units": "dB"}))
def test_other_parameters_are_refused(change, raw):
    before = digests(raw[1])
    fails_with(lambda: align(raw[0], raw[1], size=S, **change), "--out", "other parameters")
    assert digests(raw[1]) == before


def test_a_damaged_aligned_image_is_made_again(raw, tmp_path):
    source, out = tmp_path / "raw", tmp_path / "out"
    names = write_raw(source, {"0001": (False, True)})["0001"]
    align(source, out)
    before = digests(out)
    (out / "align.csv").unlink()
    (out / "0001" / f"{names[0]}.tif").write_bytes(b"broken")
    write_tif(out / "0001" / f"{names[1]}.tif", np.ones((2, S, S), np.float32), descriptions=["VV", "VH"])
    align(source, out)
    assert digests(out) == before


def test_a_file_that_cannot_be_written_leaves_nothing_under_its_name(raw, tmp_path):
    """A limit on the size of files, as a full disk would be, and then room."""
    out = tmp_path / "out"
    command = " ".join(["exec", sys.executable, "-m", "sarwmix.sen12_align_s1_to_s2", *map(str, flags(raw[0], out))])
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 50; {command}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "error:" in result.stderr
    assert not list(out.rglob("*.tif"))
    launch(Argv(["bash", "-c", command]))
    assert digests(out) == digests(raw[1])


@pytest.mark.parametrize(
    "extra, words",
    (
        (["--resampling", "cubic"], "cubic"),
        (["--units", "power"], "power"),
        (["--size", "0"], "--size 0"),
        (["--workers", "0"], "--workers 0"),
        (["--raw_root", "/no/such"], "/no/such"),
        (["--s1_list", "/no/list.json"], "/no/list.json"),
        (["--colour", "red"], "--colour"),
    ),
)
def test_wrong_flags_are_one_line_and_status_2(extra, words, raw, tmp_path, capsys):
    message = refusal(main, (flags(raw[0], tmp_path / "out"), extra), capsys)
    assert words in message
    assert not (tmp_path / "out").exists()
