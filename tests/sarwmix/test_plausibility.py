# SPDX-License-Identifier: MIT
"""Values that cannot be Sentinel-1 backscatter are refused, and doubtful ones named, wherever images are read."""

import logging

import numpy as np
import pytest
import rasterio
import torch

from batch_preparation import BatchPreparation, Weighting
from common.errors import DataError
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.moments import Moments
from sarwmix.packed import PackedDataset
from sarwmix.plausibility import check_batch, check_decibels, check_linear, find_doubts, find_fault, judge
from sarwmix.prepare import pack, statistics
from sarwmix.sen12flood_loader import FloodDataset
from tests.helpers.dataset_fixtures import (
    fails_with,
    needs_samples,
    one_line,
    s1_name,
    sample_path,
    write_lmdb,
    write_tif,
    write_v1_zarr,
    write_v2,
    write_v2_lmdb,
    write_v2_patch,
)
from tests.helpers.runs import argv, refusal
from tests.helpers.stores import packed

V2, V1 = ((kind.MEAN, kind.STD) for kind in (BigEarthNetv2, BigEarthNetv1))


def scene(seed=0, side=120, mean=(-19.0, -12.5), std=4.5):
    """(2, side, side) float32: dB of a scene with land and water in it."""
    noise = np.random.default_rng(seed).normal(0, std, (2, side, side))
    return (noise + np.array(mean)[:, None, None]).astype(np.float32)


def spot(image, value, share):
    """The image with a share of the pixels of each channel at one value."""
    image = image.copy()
    image.reshape(2, -1)[:, : round(share * image[0].size)] = value
    return image


def linear(image):
    return 10 ** (image / 10)


def tally(images, floor_db=None):
    total = Moments(floor_db)
    for image in images:
        total.add(np.asarray(image, np.float32))
    return total


def doubts(images, expected=V2):
    total = tally(images)
    assert find_fault(total.summary(), expected) is None
    return list(find_doubts(total.summary(), expected, total.histogram_dict()))


# ---- Pixels --------------------------------------------------------------------------------------

PIXELS = {
    "dB times 100": (
        lambda a: a * 100,
        "100.00% of the VH pixels are below -100 dB (as far as -",
        "dB times 10 or 100: divide them",
    ),
    "dB times 10": (lambda a: a * 10, "VH pixels are below -100 dB", "dB times 10 or 100: divide them"),
    "-9999": (
        lambda a: spot(a, -9999, 0.1),
        "10.00% of the VH pixels are below -100 dB (as far as -9999)",
        "gdal_edit.py -a_nodata -9999 FILE",
    ),
    "one pixel of -3.4e38": (
        lambda a: spot(a, -3.4028235e38, 1 / 14400),
        "0.01% of the VH pixels",
        "-a_nodata -3.4028235e+38 FILE",
    ),
    "-120 here and there": (
        lambda a: spot(a, -120, 0.002),
        "0.20% of the VH pixels are below -100 dB (as far as -120)",
        "-a_nodata -120",
    ),
    "9999": (
        lambda a: spot(a, 9999, 0.1),
        "10.00% of the VH pixels are above 60 dB (as far as 9999)",
        "-a_nodata 9999",
    ),
    "3.4e38": (lambda a: spot(a, 3.4028235e38, 0.1), "above 60 dB", "-a_nodata 3.4028235e+38"),
    "of VV alone": (
        lambda a: np.stack([a[0], spot(a, -9999, 0.1)[1]]),
        "the file of VV: 10.00% of the VV pixels",
        "-9999",
    ),
    "8 bit": (lambda a: np.clip((a + 40) * 4, 0, 255), "VH is never negative, so it looks linear", "10*log10"),
    "linear": (linear, "VH is never negative, so it looks linear", "10*log10"),
    "digital numbers": (lambda a: 500 * linear(a / 2), "VH is never negative", "10*log10"),
    "beside NaN": (lambda a: spot(spot(a, -9999, 0.1), np.nan, 0.05), "5.26% of the VH pixels", "-9999"),
}


@pytest.mark.parametrize("kind", PIXELS)
def test_values_that_no_pixel_has_are_refused(kind):
    change, *words = PIXELS[kind]
    fails_with(lambda: check_decibels(change(scene()), "the file of {}".format), "the file of V", *words)


@pytest.mark.parametrize(
    "image",
    (
        scene(),
        scene(mean=(-31.0, -31.0), std=3),
        spot(scene(), -103.5, 1 / 14400),
        spot(scene(), 45, 0.001),
        spot(scene(), np.nan, 1),
        spot(scene(), -np.inf, 0.5),
        spot(scene(), np.inf, 0.5),
        spot(spot(scene(), np.nan, 1), 5, 0.01),
        spot(scene(), 0, 1),
    ),
)
def test_what_was_measured_and_what_is_lost_is_not_refused(image):
    check_decibels(image, str)


LINEAR = {
    "dB": (lambda a: a, "VH is mostly negative, so it looks like dB", "10**(dB/10)"),
    "-9999": (
        lambda a: spot(linear(a), -9999, 0.1),
        "10.00% of the VH pixels are below -1 (as far as -9999)",
        "-a_nodata -9999",
    ),
    "1e9": (lambda a: spot(linear(a), 1e9, 0.1), "10.00% of the VH pixels are above 1,000,000", "-a_nodata 1e+09"),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_values_that_no_linear_pixel_has_are_refused(kind):
    change, *words = LINEAR[kind]
    fails_with(lambda: check_linear(change(scene()), "a.npy".format), "a.npy: ", *words)


@pytest.mark.parametrize(
    "image",
    (
        linear(scene()),
        spot(linear(scene()), 0, 0.9),
        spot(linear(scene()), -0.001, 0.4),
        spot(linear(scene()), np.nan, 1),
        spot(linear(scene()), 1e-11, 0.01),
    ),
)
def test_linear_noise_and_no_data_are_not_refused(image):
    check_linear(image, str)


# ---- Samples -------------------------------------------------------------------------------------

SCENES = [scene(seed) for seed in range(4)]
FAULTS = {
    "dB divided by 100": (lambda a: a / 100, "VH is -0.19 dB on average", "dB divided by 100; multiply"),
    "dB divided by 10": (lambda a: a / 10, "VH is -1.9 dB on average", "dB divided by 10; multiply"),
    "standardised": (lambda a: (a + 19) / 5, "VH is 0", "standardised already; store dB"),
    "swapped": (
        lambda a: a[::-1],
        "VH is brighter than VV (VH -12.5, VV -19.0 dB on average), so they are swapped",
        "which file is which",
    ),
    "times 10,000": (lambda a: a + 40, "VH is 21.0 dB on average", "linear values times 10,000; divide"),
    "times 100": (lambda a: a * 100, "VH has a value of -3", "dB times 100; divide"),
    "far too dark": (lambda a: a - 30, "VH is -49.0 dB on average", "check the units"),
    "one lost tag": (lambda a: spot(a, -9999, 0.0001), "VH has a value of -9999 dB", "store NaN"),
    "no data": (lambda a: spot(a, np.nan, 0.6), "VH has no data", "restore the images"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_figures_that_no_sample_has_are_refused(kind):
    change, *words = FAULTS[kind]
    total = tally(map(change, SCENES))
    for expected in (V2, None):
        fails_with(lambda: judge("data", total.summary(), expected), "data: ", *words)


DOUBTS = {
    "amplitude": (
        lambda a: a / 2,
        "mean VH -9.5, VV -6.2, std VH 2.2, VV 2.2 dB is far from the mean VH -19.2, VV -12.5",
        "square the amplitude",
    ),
    "other statistics": (
        lambda a: a - 7,
        "is far from the mean VH -19.2, VV -12.5",
        "sarwmix.prepare.statistics",
        "--statistics FILE",
    ),
    "edges of 0": (
        lambda a: spot(a, 0, 0.1),
        "10.0% of the VH pixels are at one value from 0.0 to 0.1 dB and 10.0% of the VV",
        "-a_nodata",
    ),
    "few edges of 0": (
        lambda a: spot(a, 0, 0.02),
        "2.0% of the VH pixels are at one value from 0.0 to 0.1 dB",
        "-a_nodata",
    ),
    "-99": (lambda a: spot(a, -99, 0.02), "2.0% of the VH pixels are below -80 dB, down to -99", "-a_nodata"),
    "a filler": (lambda a: spot(a, -25, 0.1), "VH pixels are at one value from -25.0 to -24.9 dB", "NaN"),
    "in [0, 1]": (
        lambda a: np.minimum(a - a.max((1, 2), keepdims=True), 0),
        "exactly 0 dB, or 1, as if scaled or clipped to [0, 1]",
    ),
    "VH a little brighter": (
        lambda a: np.stack([a[0], a[0] - 1]),
        "VH is brighter than VV (VH -19.0, VV -20.0 dB on average)",
        "which file",
    ),
}


@pytest.mark.parametrize("kind", DOUBTS)
def test_what_may_be_wrong_is_a_warning_with_its_remedy(kind):
    change, *words = DOUBTS[kind]
    found = doubts(map(change, SCENES))
    assert any(all(word in doubt for word in words) for doubt in found), found
    assert not any("\n" in doubt for doubt in found)


@pytest.mark.parametrize("expected", (V1, V2, None))
def test_nothing_is_said_of_what_is_usual(expected, simulated):
    data = BigEarthNetv2(simulated, "train")
    assert doubts([data.image(i) for i in range(len(data))], expected) == doubts(SCENES, expected) == []
    assert (
        doubts([np.round(image) for image in SCENES]) == doubts([np.round(image * 8.5) / 8.5 for image in SCENES]) == []
    )  # codes of 8 bits
    assert doubts([spot(scene(1), 0, 0.0034)]) == []  # clipped at 0 dB


def test_a_sample_without_a_pixel_is_no_fault_of_the_units():
    empty = Moments().summary()
    assert find_fault(empty) is None and list(find_doubts(empty, V2, Moments().histogram_dict())) == []


# ---- Where images are read -----------------------------------------------------------------------


@pytest.fixture
def v2(tmp_path):
    return write_v2(tmp_path / "v2")


def test_one_bad_file_is_named_when_it_is_read(v2, tmp_path):
    write_v2_patch(v2, 2, vv=spot(scene(), -9999, 0.1)[1])
    data = BigEarthNetv2(v2, "all")
    data[0], data[1], data[3]
    for read in (lambda: data[2], lambda: data.image(2), lambda: data.read_image(2)):
        fails_with(read, f"{s1_name(2)}_VV.tif: 10.00% of the VV pixels", "metadata.parquet: row 2")


def test_zarr_and_lmdb_are_looked_at_alike(tmp_path):
    write_v2_lmdb(tmp_path)
    write_lmdb(tmp_path / "lmdb", {s1_name(2): {"VH": spot(scene(), -9999, 0.1)[0], "VV": -10.0}})
    fails_with(lambda: BigEarthNetv2(tmp_path, "all").image(2), f"lmdb:{s1_name(2)}/VH: 10.00% of the VH pixels")
    write_v1_zarr(tmp_path / "v1.zarr", 3)
    import zarr

    zarr.open_group(tmp_path / "v1.zarr", mode="a")[f"sentinel1/{s1_name(1)}/VV"][:5] = -32768
    fails_with(
        lambda: BigEarthNetv1(tmp_path / "v1.zarr", "all").image(1),
        f"{s1_name(1)}/VV: 4.17% of the VV pixels",
        "-a_nodata -32768",
    )


def test_a_tag_that_is_restored_makes_no_data_of_them(v2):
    image = spot(scene(), -9999, 0.005)
    path = next(v2.rglob(f"{s1_name(2)}_VH.tif"))
    write_tif(path, image[0])
    with pytest.raises(DataError):
        BigEarthNetv2(v2, "all").image(2)
    with rasterio.open(path, "r+") as file:
        file.nodata = -9999  # as gdal_edit.py does
    assert BigEarthNetv2(v2, "all").image(2).isnan().sum() == 72


@pytest.mark.parametrize(
    "change, words", ((lambda a: (a + 19) / 5, "standardised already"), (lambda a: a[::-1], "swapped"))
)
def test_the_first_look_at_folders(change, words, v2):
    for k in range(4):
        write_v2_patch(v2, k, *change(scene(k)))
    fails_with(lambda: BigEarthNetv2(v2, "all").check_units(V2), f"{v2}: 4 images of split 'all': VH", words)


def test_the_first_look_warns(v2, caplog):
    for k in range(4):
        write_v2_patch(v2, k, *spot(scene(k), 0, 0.1))
    report = BigEarthNetv2(v2, "all").check_units(V1)
    assert report["max"] == [pytest.approx(0, abs=2), pytest.approx(6, abs=3)] and report["nonfinite"] == 0
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"{v2}: 4 images of split 'all': 10.0% of the VH pixels are at one value from 0.0 to 0.1 dB")


@pytest.mark.parametrize(
    "flags", (["sarwmix.prepare.pack", "--splits", "train", "--out"], ["sarwmix.prepare.statistics", "--out"])
)
def test_packing_and_statistics_refuse_alike(flags, v2, tmp_path, capsys):
    program, *flags = [
        {"sarwmix.prepare.pack": pack, "sarwmix.prepare.statistics": statistics}.get(flag, flag) for flag in flags
    ]
    flags = ["--workers", "1", "--dataset", "benv2", "--data_path", v2, *flags, tmp_path / "out"]
    write_v2_patch(v2, 3, vh=spot(scene(), -9999, 0.1)[0])
    message = refusal(program.main, flags, capsys)
    assert "1 of 2 images cannot be" in message
    assert f"{s1_name(3)}_VH.tif: 10.00% of the VH pixels are below -100 dB" in message
    for k in (0, 3):
        write_v2_patch(v2, k, *(scene(k) / 100))
    assert "VH is -0.19 dB on average" in refusal(program.main, flags, capsys)
    assert not (tmp_path / "out").is_file() and not (tmp_path / "out" / "manifest.json").exists()


def test_packing_and_statistics_warn_and_go_on(v2, tmp_path, capsys, caplog):
    source = ["--workers", "1", "--dataset", "benv2", "--data_path", str(v2), "--out"]
    for k in range(4):
        write_v2_patch(v2, k, *spot(scene(k), 0, 0.1))
    store = tmp_path / "store"
    pack.main(argv(source, store, "--splits train"))
    statistics.main(argv(source, tmp_path / "statistics.json"))
    PackedDataset(store, "train").check_units(V2)
    words = "split 'train': 10.0% of the VH pixels are at one value from 0.0 to 0.1 dB"
    assert [record.getMessage().split(": ", 1)[0] for record in caplog.records if words in record.getMessage()] == [
        str(store),
        str(v2),
        str(store),
    ]


def test_a_store_with_nothing_but_bad_images_is_not_made(v2, tmp_path, capsys):
    for k in (0, 3):
        write_v2_patch(v2, k, vh=0.05)
    flags = argv("--workers 1 --dataset benv2 --splits train --skip_bad --data_path", v2, "--out", tmp_path / "out")
    message = refusal(pack.main, flags, capsys)
    assert "2 of 2 images cannot be used" in message and "looks linear" in message


def test_a_store_that_was_packed_without_looking_is_refused_by_its_statistics(v2, tmp_path):
    data = PackedDataset(packed(tmp_path / "store", "benv2", v2, "--splits train"), "train")
    (tmp_path / "store" / "statistics.json").unlink()  # which training can do without
    assert data.check_units(V2)["train"]["mean"] == [-21.5, -11.5]
    data.manifest["statistics"]["train"]["min"][0] = -9999.0
    fails_with(lambda: data.check_units(V2), f"{tmp_path / 'store'}: split 'train': VH has a value of -9999 dB")


# ---- Floods --------------------------------------------------------------------------------------


def floods(root, change):
    """Two pairs of 128×128 images, σ⁰ changed as a user's may be, with pixels without data."""
    (root / "train").mkdir(parents=True)
    for k in range(2):
        pair = np.stack([spot(change(linear(scene(2 * k + date, 128))), 0, 0.1) for date in (0, 1)])
        np.save(root / "train" / f"000{k}__a__b__{k}.npy", pair.astype(np.float32))
    return FloodDataset(root)


@pytest.mark.parametrize(
    "change, words",
    (
        (
            lambda a: a * 10000,
            "VH is 21.0 dB on average, but images are between -45 and -5 dB; they look like linear values times 10,000",
        ),
        (lambda a: a[::-1], "they are swapped"),
        (lambda a: np.clip((10 * np.log10(a) + 30) / 30, 0.01, 1), "VH is -"),  # dB, scaled to [0, 1]
    ),
)
def test_floods_that_cannot_be_are_refused(change, words, tmp_path):
    fails_with(lambda: floods(tmp_path, change).check_units(V1), f"{tmp_path}: 2 pairs of split 'train': ", words)


@pytest.mark.parametrize(
    "change, words",
    (
        (np.sqrt, "they look like amplitude taken for power; square the amplitude"),
        (lambda a: a / a.max((1, 2), keepdims=True), "exactly 0 dB, or 1, as if scaled or clipped to [0, 1]"),
        (lambda a: a / 10, "is far from the mean VH -19.2, VV -12.6"),
        (lambda a: spot(a, 0.01, 0.3), "VH pixels are at one value from -20.0 to -19.9 dB"),
    ),
)
def test_floods_that_may_be_wrong_are_a_warning(change, words, tmp_path, caplog):
    floods(tmp_path, change).check_units(V1)
    assert any(words in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING), (
        caplog.text
    )


def test_pixels_without_backscatter_are_left_out_of_the_first_look(tmp_path, caplog):
    report = floods(tmp_path, lambda a: a).check_units(V1)
    assert report["mean"] == pytest.approx([-19, -12.5], abs=0.2) and report["min"][0] > -50
    assert report["nonfinite"] == 0
    assert not caplog.records


@pytest.mark.parametrize(
    "read", (lambda data: data[1], lambda data: data.read_image(1, 1), lambda data: data.check_units())
)
def test_a_bad_flood_image_is_named_when_it_is_read(read, tmp_path):
    data = floods(tmp_path, lambda a: a)
    pair = np.load(tmp_path / "train" / "0001__a__b__1.npy")
    pair[1, 1, :5] = -9999
    np.save(tmp_path / "train" / "0001__a__b__1.npy", pair)
    data.read_image(1, 0)
    fails_with(lambda: read(data), "0001__a__b__1.npy image 2: 3.91% of the VV pixels are below -1", "-9999")


# ---- Batches in Python ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    (
        (linear, "VH is never negative, so it looks linear, but is read as dB; give 10*log10(value)"),
        (lambda a: (a + 19) / 5, "standardised already; store dB"),
        (lambda a: spot(a, -9999, 0.1), "below -100 dB"),
        (lambda a: a[::-1], "swapped"),
        (lambda a: a / 100, "dB divided by 100"),
        (lambda a: a * 100, "dB times 10 or 100"),
    ),
)
def test_prepare_refuses_what_is_not_db(change, words):
    prepare = BatchPreparation(128, *V2, weighting=Weighting("none"))
    good = torch.from_numpy(np.stack(SCENES))
    prepare(good)
    bad = torch.from_numpy(np.stack([change(image) for image in SCENES]))
    with pytest.raises(ValueError) as error:
        prepare(bad)
    one_line(error, "batch", words)
    prepare(bad, torch.arange(4), 0)  # in training, where the dataset has looked already


def test_prepare_takes_floods_with_large_parts_without_data():
    image = scene()
    image[1, :50] = -60
    check_batch(image[:, None], V1)


# ---- Real images ---------------------------------------------------------------------------------


def bands(path, *numbers):
    with rasterio.open(path) as file:
        return np.stack([file.read(number) for number in numbers]).astype(np.float32)


@needs_samples
def test_real_images_in_db_pass():
    v1 = BigEarthNetv1(sample_path("benv1"), "all")
    patches = [v1.read_image(i) for i in range(len(v1))]
    chips = [
        bands(path, 2, 1)
        for path in sorted(sample_path("sen1floods11_chips").glob("S1Hand/*.tif"))
        if "Paraguay" not in path.name
    ]
    others = [
        bands(path, 2, 1)
        for folder in ("terramind_S1RTC", "sen12ms")
        for path in sample_path("s1_float_misc", folder).glob("*.tif")
    ]
    assert len(patches) == 6 and len(chips) == 12 and len(others) == 7
    for image in patches + chips + others:
        check_decibels(image, str)
        assert find_fault(tally([image]).summary(), V2) is None
        check_batch(np.nan_to_num(image, nan=-15)[:, None], V2)
    for expected in (V1, V2):
        assert doubts(patches, expected) == doubts(chips, expected) == doubts(patches + chips + others, expected) == []


@needs_samples
def test_real_linear_images_pass():
    paths = sorted(sample_path("opera_rtc_s1").glob("dist_s1_cropped/**/*_VH.tif"))[::6]
    total = Moments(-60.0)
    for path in paths:
        image = np.concatenate([bands(path, 1), bands(path.with_name(path.name.replace("_VH", "_VV")), 1)])
        check_linear(image, str)
        with np.errstate(divide="ignore", invalid="ignore"):
            db = np.where(image > 0, 10 * np.log10(image), -60)
        assert find_fault(tally([db], -60.0).summary(), V1) is None
        total.add(db)
    assert len(paths) > 50 and list(find_doubts(total.summary(), V2, total.histogram_dict())) == []
