# SPDX-License-Identifier: MIT
"""Simulated scenes: the statistics of the radar image, the layout of the files, and running again."""

import re

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import rasterio
from scipy import ndimage, stats

from common.errors import DataError
from sarwmix.bigearthnet import CLASSES
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.simulate import radar as simulate_radar
from sarwmix.simulate.landcover import LANDSCAPES, LandCover, draw_geography, fractal, hashed
from sarwmix.simulate.patches import METADATA_SCHEMA, Parameters, main, plan_scenes, simulate_dataset, simulate_scene
from tests.helpers.runs import argv, check_processes_change_nothing, digests, refusal

SMALL = Parameters(patches=13, seed=3, size=32)


@pytest.fixture(scope="module")
def uniform():
    """Detected intensity of ground of σ⁰ = 0.1, 600 × 600."""
    return simulate_radar.detect(np.random.default_rng(0), np.full((608, 608), 0.1))


@pytest.fixture(scope="module")
def scenes():
    """One scene of each landscape: [(sigma0_db, land_cover)]."""
    return [simulate_scene((11, i), 4, 4, landscape=name) for i, name in enumerate(LANDSCAPES)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "dataset"
    simulate_dataset(out, SMALL)
    return out


# ---- Speckle -------------------------------------------------------------------------------------


def test_speckle_keeps_the_mean_and_has_the_equivalent_looks(uniform):
    assert uniform.shape == (600, 600)
    assert uniform.mean() == pytest.approx(0.1, rel=0.01)
    assert uniform.mean() ** 2 / uniform.var() == pytest.approx(4.5, rel=0.03)


def test_speckle_is_gamma_distributed(uniform):
    independent = uniform[::8, ::8].ravel() / 0.1  # far enough apart not to be correlated
    assert stats.kstest(independent, stats.gamma(4.5, scale=1 / 4.5).cdf).pvalue > 0.01
    assert stats.skew(uniform.ravel()) == pytest.approx(2 / np.sqrt(4.5), rel=0.05)


def test_speckle_is_correlated_as_in_grd_products(uniform):
    deviation = uniform - uniform.mean()
    for axis in (0, 1):
        image = np.moveaxis(deviation, axis, 0)
        measured = [(image[:-lag] * image[lag:]).mean() / deviation.var() for lag in (1, 2, 3, 6)]
        assert measured == pytest.approx([0.71, 0.26, 0.05, 0.0], abs=0.03)


def test_a_reflector_is_as_bright_as_its_amplitude_says():
    targets = np.zeros((29, 29))
    targets[14, 14] = -3
    image = simulate_radar.detect(np.random.default_rng(0), np.zeros((29, 29)), targets)
    assert np.unravel_index(image.argmax(), image.shape) == (10, 10)
    assert image.sum() == pytest.approx(9, rel=1e-3)
    assert image.max() == pytest.approx(9 * simulate_radar._psf().max() ** 4, rel=1e-3)


def test_vh_and_vv_speckle_are_independent():
    image = simulate_radar.observe(np.random.default_rng(1), draw_geography(np.random.default_rng(1), (128, 128)))
    rough = image - np.roll(image, 4, axis=-1)
    assert abs(np.corrcoef(rough[0].ravel(), rough[1].ravel())[0, 1]) < 0.5
    rng = np.random.default_rng(2)
    vh, vv = (simulate_radar.detect(rng, np.ones((208, 208))) for _ in range(2))
    assert abs(np.corrcoef(vh.ravel(), vv.ravel())[0, 1]) < 0.04


# ---- Scenes --------------------------------------------------------------------------------------


def test_land_cover_numbers_are_the_official_class_indices():
    assert len(LandCover) == len(CLASSES) == len(simulate_radar.BACKSCATTER)
    assert list(simulate_radar.BACKSCATTER) == list(range(19))
    for cover, words in (
        (LandCover.URBAN, "Urban"),
        (LandCover.AGROFOREST, "Agro-forestry"),
        (LandCover.CONIFEROUS, "Coniferous"),
        (LandCover.BEACH, "Beaches"),
        (LandCover.INLAND_WATER, "Inland waters"),
        (LandCover.SEA, "Marine"),
    ):
        assert CLASSES[cover].startswith(words)


def test_scene_has_the_promised_form_and_is_reproducible():
    image, cover = simulate_scene(5, 1, 2, size=64)
    again, cover_again = simulate_scene(5, 1, 2, size=64)
    other, _ = simulate_scene(6, 1, 2, size=64)
    assert image.shape == (2, 64, 128) and image.dtype == np.float32
    assert cover.shape == (64, 128) and cover.dtype == np.uint8 and cover.max() < 19
    assert np.isfinite(image).all()
    assert (image == again).all() and (cover == cover_again).all() and (image != other).mean() > 0.99


def test_backscatter_of_classes_is_near_the_table_and_in_order(scenes):
    means = {}
    for cover in LandCover:
        inside = [image[:, ndimage.binary_erosion(land == cover)] for image, land in scenes]
        pixels = np.concatenate(inside, axis=1)
        if pixels.shape[1] > 500:
            means[cover] = np.median(pixels, axis=1)
            assert means[cover][1] == pytest.approx(simulate_radar.BACKSCATTER[cover][1], abs=4), cover.name
    assert len(means) >= 15
    for channel in (0, 1):
        water, arable, forest, city = (
            means[c][channel] for c in (LandCover.INLAND_WATER, LandCover.ARABLE, LandCover.CONIFEROUS, LandCover.URBAN)
        )
        assert water < arable - 4 and arable < forest < city - 1
    assert all(vh < vv - 3 for vh, vv in means.values())


def test_city_has_bright_targets_and_water_has_not(scenes):
    city = np.concatenate([image[1, cover == LandCover.URBAN] for image, cover in scenes])
    water = np.concatenate([image[1, cover == LandCover.INLAND_WATER] for image, cover in scenes])
    assert np.percentile(city, 99.5) > 5 and np.percentile(water, 99) < -5
    assert city.std() > water.std()


def test_scenes_are_varied_and_the_common_classes_occur(scenes):
    shares = np.array([np.bincount(cover.ravel(), minlength=19) for _, cover in scenes]) / scenes[0][1].size
    assert ((shares > 0.005).sum(axis=1) >= 6).all()
    assert (shares.max(axis=0) > 0.002).sum() >= 17
    assert shares[list(LANDSCAPES).index("coast"), LandCover.SEA] > 0.3


def test_forest_and_water_have_spatial_structure(scenes):
    for _, cover in scenes:
        assert (cover[1:] == cover[:-1]).mean() > 0.85  # regions, not single pixels


def test_fractal_is_standardised_and_smooth_and_hash_is_uniform():
    for step in (1, 2, 4):
        field = fractal(np.random.default_rng(0), (130, 97), largest=40, slope=3.5, step=step)
        assert field.shape == (130, 97) and field.dtype == np.float32
        assert field.mean() == pytest.approx(0, abs=1e-3) and field.std() == pytest.approx(1, abs=1e-3)
        assert np.abs(np.diff(field, axis=0)).mean() < 0.3
    numbers = hashed(7, np.arange(100)[:, None], np.arange(100))
    assert stats.kstest(numbers.ravel(), "uniform").statistic < 0.02
    assert abs(np.corrcoef(numbers[:, 1:].ravel(), numbers[:, :-1].ravel())[0, 1]) < 0.03
    assert hashed(1, 2) != hashed(2, 1)


# ---- Files ---------------------------------------------------------------------------------------


def test_metadata_has_the_official_columns(dataset):
    assert pq.read_schema(dataset / "metadata.parquet").equals(METADATA_SCHEMA, check_metadata=False)
    table = pd.read_parquet(dataset / "metadata.parquet")
    assert list(table.columns) == [
        "patch_id",
        "labels",
        "split",
        "country",
        "s1_name",
        "s2v1_name",
        "contains_seasonal_snow",
        "contains_cloud_or_shadow",
    ]
    assert len(table) == 13 and table.s1_name.is_unique and table.patch_id.is_unique
    assert set(table.split) == {"train", "validation", "test"} and set(table.country) == {"Simulated"}
    assert all(len(labels) and set(labels) <= set(CLASSES) for labels in table.labels)


def test_files_are_georeferenced_db_images_named_after_their_band(dataset):
    table = pd.read_parquet(dataset / "metadata.parquet")
    parts = table.s1_name.str.split("_", expand=True)
    assert table.s1_name.str.fullmatch(r"S1A_IW_GRDH_1SDV_\d{8}T\d{6}_\d\d[A-Z]{3}_\d+_\d+").all()
    for row, name in enumerate(table.s1_name):
        images = {}
        for band in ("VH", "VV"):
            path = dataset / "BigEarthNet-S1" / "_".join(parts.iloc[row, :5]) / name / f"{name}_{band}.tif"
            with rasterio.open(path) as file:
                assert (file.count, file.dtypes, file.shape) == (1, ("float32",), (32, 32))
                assert file.descriptions == (band,) and file.tags()["SIMULATED"] == "yes"
                assert file.crs.to_epsg() in (32629, 32633, 32635) and file.crs.is_projected
                assert file.res == (10, 10) and file.transform.e == -10
                images[band] = file.read(1)
        assert -45 < images["VH"].mean() < images["VV"].mean() - 3 < 0


def test_files_hold_the_scene_and_its_patches_tile_it(tmp_path):
    parameters = Parameters(patches=40, seed=1, size=24, val_fraction=0.2, test_fraction=0.2)
    simulate_dataset(tmp_path / "out", parameters)
    image, _ = simulate_scene((1, 0), 2, 2, size=24, landscape=plan_scenes(parameters)[0].landscape)
    folder = min((tmp_path / "out" / "BigEarthNet-S1").iterdir())
    corners = {}
    for path in folder.rglob("*_VH.tif"):
        with rasterio.open(path) as file:
            corners[file.transform.c, file.transform.f] = file.read(1)
    west, north = min(x for x, _ in corners), max(y for _, y in corners)
    assert sorted(corners) == sorted((west + 240 * i, north - 240 * j) for i in (0, 1) for j in (0, 1))
    mosaic = np.block([[corners[west + 240 * i, north - 240 * j] for i in (0, 1)] for j in (0, 1)])
    assert (mosaic == image[0]).all()


def test_files_do_not_depend_on_the_number_of_processes(dataset, tmp_path):
    flags = "--patches 13 --seed 3 --size 32"
    check_processes_change_nothing("sarwmix.simulate", flags, dataset, tmp_path / "two")


def test_an_interrupted_run_is_completed_identically(dataset, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sarwmix.simulate.patches._write_metadata", stop)
        simulate_dataset(out, SMALL)
    broken = next(out.rglob("*_VV.tif"))
    broken.write_bytes(broken.read_bytes()[:100])
    simulate_dataset(out, SMALL)
    assert digests(out) == digests(dataset)


# ---- Splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches, size", ((13, 120), (700, 120), (60000, 120), (900, 1024)))
def test_splits_are_disjoint_in_space_and_have_their_shares(patches, size):
    scenes = plan_scenes(Parameters(patches, size=size, val_fraction=0.2, test_fraction=0.1))
    assert sum(scene.patches for scene in scenes) == patches
    owner = {}
    for scene in scenes:
        for row in range(scene.row, scene.row + scene.side):
            for col in range(scene.col, scene.col + scene.side):
                assert owner.setdefault((scene.tile, row, col), scene.split) == scene.split
                assert max(row, col) < 10980 // size
    number = {split: sum(scene.patches for scene in scenes if scene.split == split) for split in set(owner.values())}
    assert number["validation"] / patches == pytest.approx(0.2, abs=0.1)
    assert number["test"] / patches == pytest.approx(0.1, abs=0.1)


def test_every_split_has_its_share_of_every_landscape():
    scenes = plan_scenes(Parameters(6400, val_fraction=0.25, test_fraction=0.25))
    for split in ("train", "validation", "test"):
        members = [scene.landscape for scene in scenes if scene.split == split]
        for landscape, (frequency, _) in LANDSCAPES.items():
            assert members.count(landscape) / len(members) == pytest.approx(frequency, abs=0.05)


def test_no_held_out_patches_on_request():
    assert {scene.split for scene in plan_scenes(Parameters(1, val_fraction=0, test_fraction=0))} == {"train"}


# ---- Running again, and wrong flags --------------------------------------------------------------


def test_a_finished_dataset_is_left_alone(dataset, caplog):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    with caplog.at_level("INFO"):
        main(argv("--out", dataset, "--patches 13 --seed 3 --size 32"))
    assert "nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before


def test_other_content_is_refused_and_left_alone(dataset, tmp_path, capsys):
    before = digests(dataset)
    message = refusal(main, ("--out", dataset, "--patches 13 --seed 4 --size 32"), capsys)
    assert re.search("--out .*other parameters.*choose another", message)
    assert digests(dataset) == before
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="--out .*not empty"):
        simulate_dataset(tmp_path, SMALL)
    assert digests(tmp_path).keys() == {"mine.txt"}


@pytest.mark.parametrize(
    "flags, words",
    (
        ("--patches 0", "--patches 0"),
        ("--patches ten", "--patches"),
        ("", "--patches"),
        ("--patches 2", "too few"),
        ("--patches 20 --size -1", "--size -1"),
        ("--patches 20 --seed -1", "--seed -1"),
        ("--patches 20 --val_fraction 1.2", "--val_fraction 1.2"),
        ("--patches 20 --test_fraction nan", "--test_fraction"),
        ("--patches 20 --val_fraction 0.5 --test_fraction 0.5", "sum"),
        ("--patches 20 --workers 0", "--workers 0"),
        ("--patches 20 --colour red", "--colour"),
    ),
)
def test_wrong_flags_are_one_line_and_status_2(flags, words, tmp_path, capsys):
    message = refusal(main, ("--out", tmp_path / "out", flags), capsys)
    assert words in message
    assert not (tmp_path / "out").exists()


def test_patches_know_where_they_lie(tmp_path):
    """BigEarthNet in GeoTIFFs gives the georeference of each patch; without a coordinate system, none."""
    simulate_dataset(tmp_path, Parameters(10, scene_side=2, val_fraction=0, test_fraction=0))
    data = BigEarthNetv2(tmp_path, "all")
    grid = data.georeference()
    for i in (0, 7):
        with rasterio.open(data.files(i)[0]) as file:
            assert tuple(grid.loc[i, list("abcdef")]) == tuple(file.transform)[:6] and grid.crs[i] == str(file.crs)
        assert data.ids[i].startswith(grid.scene[i])
