# SPDX-License-Identifier: MIT
"""Reading one band: its values, which band it is, and what is said about files that cannot be read."""

import logging
import warnings

import numpy as np
import pytest
import rasterio

from common.errors import DataError
from sarwmix.geotiff import read_band
from tests.helpers.dataset_fixtures import fails_with, needs_samples, sample_path, write_tif

NOISE = np.random.default_rng(0).normal(-15, 3, (120, 120)).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"compress": "deflate"}, {"compress": "lzw", "predictor": 3}])
def test_values_are_those_written(tmp_path, options):
    values = read_band(write_tif(tmp_path / "a.tif", NOISE, **options))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, NOISE)


@needs_samples
def test_real_samples_equal_rasterio():
    paths = sorted(sample_path().rglob("*_V?.tif"))
    assert len(paths) >= 14
    for path in paths:
        with rasterio.open(path) as file:
            np.testing.assert_array_equal(read_band(path), file.read(1))


def test_no_warning_and_no_log_line_without_crs(tmp_path, caplog):
    path = write_tif(tmp_path / "a.tif", -12.0)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        assert (read_band(path) == -12).all()
    assert not caplog.records


@pytest.mark.parametrize("description", ["VH", "vh ", None, "Gamma0"])
def test_a_single_band_is_read_under_any_description_but_another_polarisation(tmp_path, description):
    path = write_tif(tmp_path / "a_VH.tif", -21.0, descriptions=[description] if description else None)
    assert (read_band(path, band="VH") == -21).all()


def test_among_several_bands_the_described_one_is_taken(tmp_path):
    bands = np.stack([np.full((120, 120), value, np.float32) for value in (-10, -20)])
    path = write_tif(tmp_path / "a.tif", bands, descriptions=["VV", "VH"])
    assert (read_band(path, band="VH") == -20).all()
    assert (read_band(path, band="VV") == -10).all()


@pytest.mark.parametrize(("descriptions", "band"), [(None, "VH"), (["VH", "VH"], "VH"), (["VV", "VH"], None)])
def test_several_bands_are_never_taken_by_position(tmp_path, descriptions, band):
    path = write_tif(tmp_path / "a.tif", np.zeros((2, 120, 120), np.float32), descriptions=descriptions)
    fails_with(lambda: read_band(path, band=band), str(path), "has 2 bands")


def test_a_missing_file_is_named(tmp_path):
    fails_with(lambda: read_band(tmp_path / "none.tif"), str(tmp_path / "none.tif"), "does not exist", "remove its row")


@pytest.mark.parametrize("options", [{}, {"compress": "deflate"}, {"tiled": True, "blockxsize": 64, "blockysize": 64}])
@pytest.mark.parametrize("kept", [0, 10, 600, 0.5, -1])
def test_truncated_files_are_named(tmp_path, options, kept):
    path = write_tif(tmp_path / "cut.tif", NOISE, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    fails_with(lambda: read_band(path), str(path), "truncated", "copy it again")


def test_corrupt_files_are_named(tmp_path):
    path = write_tif(tmp_path / "flipped.tif", NOISE, compress="deflate")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    fails_with(lambda: read_band(path), str(path), "corrupt")


@pytest.mark.parametrize("value", [np.nan, np.inf, -9999.0])
def test_few_nonfinite_pixels_stay_and_many_are_refused(tmp_path, value):
    values = NOISE.copy()
    values.flat[:144] = value  # exactly 1 %
    path = write_tif(tmp_path / "few.tif", values, nodata=-9999.0)
    read = read_band(path)
    assert not np.isfinite(read.flat[:144]).any()
    assert np.isnan(read.flat[:144]).all() or value == np.inf
    np.testing.assert_array_equal(read.flat[144:], NOISE.flat[144:])

    values.flat[144] = value
    path = write_tif(tmp_path / "many.tif", values, nodata=-9999.0)
    fails_with(lambda: read_band(path), str(path), "1.01%", "1.00%", "remove its row", "--max_nonfinite")
    assert np.isfinite(read_band(path, max_nonfinite=0.02)).sum() == 120 * 120 - 145


def test_a_band_description_that_is_no_utf8_is_a_damaged_file(tmp_path):
    path = write_tif(tmp_path / "a.tif", -12.0, ["backscatter"])
    path.write_bytes(path.read_bytes().replace(b"backscatter", b"b\xc8ckscatter"))
    with pytest.raises(DataError, match="a.tif: cannot be read, it is corrupt"):
        read_band(path)
