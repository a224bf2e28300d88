# SPDX-License-Identifier: MIT
"""Images of any origin as VH and VV in dB: which band is which, units, no data, names, and what is refused."""

import numpy as np
import pytest
import rasterio

from common.errors import DataError
from sarwmix.raster import Image, Reading, find_images
from tests.helpers.dataset_fixtures import fails_with, write_tif

NOISE = np.random.default_rng(0).normal(0, 1.5, (2, 40, 60)).astype(np.float32)
DB = NOISE + np.array([-12, -19], np.float32)[:, None, None]  # VV, VH
GRID = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 300000, 0, -10, 5400000)}


def read(paths, **reading):
    paths = paths if isinstance(paths, list) else [paths]
    return Image.find("scene", paths, Reading(**reading)).read()


def two_band(path, values=DB, descriptions=("VV", "VH"), **options):
    return write_tif(path, values, descriptions, **{**GRID, **options})


@pytest.mark.parametrize("names", [("VV", "VH"), ("Gamma0_VV", "Gamma0_VH_db"), ("sigma0 vv", "vh ")])
def test_bands_are_known_by_their_descriptions(tmp_path, names):
    np.testing.assert_array_equal(read(two_band(tmp_path / "a.tif", descriptions=names)), DB[::-1])


def test_bands_are_known_by_the_flag(tmp_path):
    path = two_band(tmp_path / "a.tif", descriptions=None)
    np.testing.assert_array_equal(read(path, bands=("VV", "VH")), DB[::-1])
    np.testing.assert_array_equal(read(path, bands=("VH", "VV")), DB)
    three = write_tif(tmp_path / "b.tif", np.concatenate([DB[::-1], NOISE[:1]]), **GRID)
    np.testing.assert_array_equal(read(three, bands=("VH", "VV", "MASK")), DB[::-1])


@pytest.mark.parametrize("names", [("s_VV.tif", "s_VH.tif"), ("iw-vv.tiff", "iw-vh.tiff"), ("VV.tif", "VH.tif")])
def test_files_of_one_band_are_one_image_by_their_names(tmp_path, names):
    for name, values in zip(names, DB):
        write_tif(tmp_path / name, values, **GRID)
    ((name, paths),) = find_images([tmp_path])
    assert len(paths) == 2 and name == {"s": "s", "i": "iw", "V": tmp_path.name}[names[0][0]]
    np.testing.assert_array_equal(read(list(paths)), DB[::-1])
    assert find_images([f"{tmp_path / names[1]},{tmp_path / names[0]}"])[0][1] == (
        str(tmp_path / names[1]),
        str(tmp_path / names[0]),
    )


def test_images_have_different_names(tmp_path):
    for folder in ("x/1", "y/1", "z"):
        (tmp_path / folder).mkdir(parents=True)
        two_band(tmp_path / folder / "a.tif")
    two_band(tmp_path / "S1_VV-VH_b.tif")
    assert [name for name, _ in find_images([tmp_path / "x", tmp_path / "y"])] == ["x_1_a", "y_1_a"]
    assert len({name for name, _ in find_images([tmp_path])}) == 4
    fails_with(lambda: find_images([tmp_path / "none.tif"]), "none.tif", "no such file")
    (tmp_path / "empty").mkdir()
    fails_with(lambda: find_images([tmp_path / "empty"]), "holds no GeoTIFF")


def test_units(tmp_path):
    linear = two_band(tmp_path / "linear.tif", 10 ** (DB / 10))
    np.testing.assert_allclose(read(linear, units="linear"), DB[::-1], atol=1e-5)
    amplitude = two_band(tmp_path / "amplitude.tif", 10 ** (DB / 20))
    np.testing.assert_allclose(read(amplitude, units="amplitude"), DB[::-1], atol=1e-5)
    tenfold = two_band(tmp_path / "tenfold.tif", np.rint(DB * 10).astype(np.int16))
    np.testing.assert_allclose(read(tenfold, scale=0.1), DB[::-1], atol=0.051)
    with rasterio.open(tenfold, "r+") as file:
        file.scales, file.offsets = (0.1, 0.1), (1.0, 1.0)
    np.testing.assert_allclose(read(tenfold), DB[::-1] + 1, atol=0.051)  # as GDAL's tags say
    double = two_band(tmp_path / "double.tif", DB.astype(np.float64))
    assert read(double).dtype == np.float32
    fails_with(lambda: read(linear), "linear.tif", "looks linear", "--units linear")
    fails_with(lambda: read(two_band(tmp_path / "dB.tif"), units="linear"), "is in dB", "--units dB")


def test_no_data(tmp_path):
    values, expected = DB.copy(), DB[::-1].copy()
    values[:, 0, 0], values[:, 1, 1], values[0, 2, 2], values[:, 3, 3] = -99, np.nan, -77, np.inf
    for channel, row in ((0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (0, 3), (1, 3)):
        expected[channel, row, row] = np.nan
    path = two_band(tmp_path / "a.tif", values, nodata=-99)
    np.testing.assert_array_equal(read(path, nodata=-77), expected)
    with rasterio.open(path, "r+") as file:
        mask = np.full(DB.shape[1:], 255, np.uint8)
        mask[5] = 0
        file.nodata = None
        file.write_mask(mask)
    with_mask = read(path, nodata=-99, scale=None, bands=None)
    assert np.isnan(with_mask[:, 5]).all() and np.isnan(with_mask[:, 0, 0]).all()
    alpha = np.concatenate([DB, np.zeros_like(DB[:1])])
    path = two_band(tmp_path / "alpha.tif", alpha, descriptions=("VV", "VH", ""))
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [rasterio.enums.ColorInterp[name] for name in ("gray", "undefined", "alpha")]
    assert np.isnan(read(path)).all()
    linear = 10 ** (DB / 10)
    linear[0, 0, :3] = 0, -0.001, np.nan
    assert np.isnan(read(two_band(tmp_path / "linear.tif", linear), units="linear")[1, 0, :3]).all()
    fails_with(lambda: read(two_band(tmp_path / "b.tif", values), max_nonfinite=0.0001, nodata=-99), "--max_nonfinite")


def test_windows_extend_beyond_the_image(tmp_path):
    image = Image.find("scene", [two_band(tmp_path / "a.tif")], Reading())
    with image.opened() as window:
        values = window(30, 50, 20, 20)
    np.testing.assert_array_equal(values[:, :10, :10], DB[::-1, 30:, 50:])
    assert np.isnan(values[:, 10:]).all() and np.isnan(values[:, :, 10:]).all()
    assert image.crs == "EPSG:32633" and image.grid_row("s", 30, 50) == (
        "s", 30, 50, "EPSG:32633", 10, 0, 300500, 0, -10, 5399700,
    )  # fmt: skip


def gcps(path):
    points = [rasterio.control.GroundControlPoint(r, c, 10 + c, 50 - r) for r in (0, 30) for c in (0, 30)]
    with rasterio.open(path, "r+") as file:
        file.gcps = points, rasterio.CRS.from_epsg(4326)
    return path


def test_digital_numbers_need_insistence(tmp_path):
    numbers = np.full((2, 40, 60), [[[200]], [[100]]], np.uint16)
    numbers[:, 0] = 0
    path = gcps(write_tif(tmp_path / "dn.tif", numbers, ("VV", "VH")))
    for units in ("dB", "linear", "amplitude"):
        fails_with(lambda: read(path, units=units), "dn.tif", "uncalibrated GRD", "calibrate it", "--uncalibrated")
    values = read(path, units="amplitude", uncalibrated=True)
    assert np.isnan(values[:, 0]).all()
    np.testing.assert_allclose(values[:, 1, 1], 20 * np.log10([0.2, 0.4]), atol=1e-5)
    np.testing.assert_allclose(
        read(path, units="amplitude", uncalibrated=True, scale=0.001)[:, 1, 1], [-20, 20 * np.log10(0.2)], atol=1e-5
    )


CASES = {
    "one polarisation": (lambda p: write_tif(p / "a_VV.tif", DB[0]), "holds only VV", "VH is needed"),
    "an unknown band": (lambda p: write_tif(p / "a.tif", DB[0]), "unknown kind", "VV.tif,VH.tif"),
    "bands without names": (lambda p: two_band(p / "a.tif", descriptions=None), "has 2 bands", "--bands VV VH"),
    "HH and HV": (lambda p: two_band(p / "a.tif", descriptions=("HH", "HV")), "holds HH, HV", "VV and VH are needed"),
    "a band twice": (
        lambda p: write_tif(p / "a.tif", np.concatenate([DB, DB]), ("VV", "VH", "VV", "VH")),
        "2 bands are described as VH",
        "gdal_translate -b",
    ),
    "integers": (lambda p: two_band(p / "a.tif", DB.astype(np.int32)), "holds int32", "--scale 0.1"),
    "complex values": (lambda p: two_band(p / "a.tif", DB.astype(np.complex64)), "complex", "SLC"),
    "a PNG": (lambda p: put(p / "a.tif", b"\x89PNG\r\n"), "is a PNG file", "gdal_translate"),
    "a NetCDF": (lambda p: put(p / "a.nc", b"\x89HDF\r\n"), "HDF5 or NetCDF", "gdal_translate"),
    "a ZIP": (lambda p: put(p / "a.zip", b"PK\x03\x04"), "is a ZIP file"),
    "rubbish": (lambda p: put(p / "a.tif", b"hello"), "corrupt, truncated or not a GeoTIFF"),
}


def put(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_an_image_is_one_line(tmp_path, case):
    make, *said = CASES[case]
    path = make(tmp_path)
    fails_with(lambda: read(path), path.name, *said)


def test_the_flag_must_not_contradict(tmp_path):
    path = two_band(tmp_path / "a.tif")
    fails_with(lambda: read(path, bands=("VH", "VV")), "band 1 is VV", "not VH", "--bands")
    fails_with(lambda: read(path, bands=("VV", "VH", "X")), "has 2 bands", "--bands names 3")


@pytest.mark.parametrize("change", [{"crs": "EPSG:32634"}, {"transform": rasterio.Affine(10, 0, 5, 0, -10, 0)}])
def test_files_of_an_image_have_one_grid(tmp_path, change):
    paths = [
        write_tif(tmp_path / "a_VV.tif", DB[0], **GRID),
        write_tif(tmp_path / "a_VH.tif", DB[1], **(GRID | change)),
    ]
    fails_with(lambda: read(paths), "a_VH.tif", "a_VV.tif", "differ in size or georeference", "gdalwarp")
    with pytest.raises(DataError):
        Image.find("a", [paths[0], tmp_path / "none_VH.tif"], Reading())


def test_files_of_an_image_may_differ_by_rounding(tmp_path):
    paths = [tmp_path / "a_VV.tif", tmp_path / "a_VH.tif"]
    for path, values, shift in zip(paths, DB, (0, 1e-6)):
        write_tif(path, values, **{**GRID, "transform": rasterio.Affine(10, 0, 300000 + shift, 0, -10, 5400000)})
    np.testing.assert_array_equal(read(paths), DB[::-1])
    write_tif(paths[0], DB[0], **{**GRID, "transform": rasterio.Affine(10, 0, 300001, 0, -10, 5400000)})
    fails_with(lambda: read(paths), "differ in size or georeference")


def test_files_of_one_name_are_named(tmp_path):
    for name in ("a.tif", "._a.tif"):  # macOS leaves the second
        two_band(tmp_path / name)
    fails_with(lambda: find_images([tmp_path]), f"{tmp_path / '._a.tif'} and {tmp_path / 'a.tif'}; give each file once")
