# SPDX-License-Identifier: MIT
"""Public sets as tiles to pretrain on: values, no data, what is left out, errors in one line, and the real images."""

import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from rasterio.errors import NotGeoreferencedWarning

from sarwmix.prepare.public_images import BAD_LABELS, PORTO_FOLDERS, label_of
from sarwmix.prepare.public_sets import enlarged, find_all, main
from sarwmix.registry import open_dataset
from tests.helpers.dataset_fixtures import needs_samples, sample_path, write_tif
from tests.helpers.runs import argv, digests, refusal

RNG = np.random.default_rng(1)
BURST, DATE = "T137-292318-IW1", "20211119T015854Z_20250830T120333Z_S1A_30_v1.0"
PORTO_RGBA = (51, 0, 204, 255)  # VV -24, VH -30 dB or less
SCENE = "northal_20190302t234651"


def write_png(path, values):
    """values: (bands, H, W), uint8 or uint16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="PNG", count=count, height=height, width=width, dtype=values.dtype
        ) as file:
            file.write(values)
    return path


def write_porto(root, side=512, bands=PORTO_RGBA):
    for (place, _), folder in PORTO_FOLDERS.items():
        stem = "porto_alegre_images_0_3" if place == "porto_alegre" else "tile_0_3"
        write_png(
            root / folder / f"{stem}.png", np.full((len(bands), side, side), np.reshape(bands, (-1, 1, 1)), np.uint8)
        )
    return root


def write_opera(root, side=100, name=f"OPERA_L2_RTC-S1_{BURST}_{DATE}", power=(0.01, 0.1)):
    for channel, value in zip(("VH", "VV"), power):
        write_tif(root / "10SGD" / f"{name}_{channel}.tif", np.full((side, side), value, np.float32), nodata=np.nan)
    return root


def write_etci(root, scene=SCENE, tiles=2, bands=3):
    """Random numbers. The left half of the first tile is 0 in VV, the last is 0 everywhere. Returns {name: (VH, VV)}."""
    made = {}
    for k in range(tiles + 1):
        values = RNG.integers(1, 256, (2, 256, 256), dtype=np.uint8)
        if k == 0:
            values[1, :, :128] = 0
        name, values = f"{scene}_x-1_y-{k}", values * (k < tiles)
        for channel, band in zip(("vh", "vv"), values):
            write_png(root / scene / "tiles" / channel / f"{name}_{channel}.png", np.stack([band] * bands))
        label = np.zeros((bands, 256, 256), np.uint8)
        label[:, :64] = 255
        write_png(root / scene / "tiles" / "flood_label" / f"{name}.png", label)
        made[name] = values
    return made


def write_chips(root, **chips):
    for name, values in chips.items():
        write_tif(
            root / "S1Hand" / f"{name}_S1Hand.tif",
            np.full((2, 512, 512), np.reshape(values, (2, 1, 1)), np.float32),
            ("VV", "VH"),
        )
    return root


def run(tmp_path, *flags):
    main(argv("--workers 1 --out", tmp_path / "out", flags))
    return pd.read_csv(tmp_path / "out" / "metadata.csv")


def opened(folder, name="chips"):
    data = open_dataset(name, folder, "all", None, max_nonfinite=0.5)
    return data, dict(zip(data.ids.tolist(), range(len(data))))


# ---- Values --------------------------------------------------------------------------------------


def test_digital_numbers_of_porto_alegre_are_exact_decibels(tmp_path):
    rows = run(tmp_path, "--porto_alegre", write_porto(tmp_path / "p"))
    assert len(rows) == 4 * 16 and set(rows.group) == {"porto_alegre"} and set(rows["values"]) == {"dB"}
    assert rows.id[0] == "porto_alegre_0_3_before_r0000_c0000" and "canoas_0_3_after_r0384_c0384" in set(rows.id)
    data, _ = opened(tmp_path / "out")
    assert len(data) == 64 and data.size == 128
    image = data.read_image(5)
    assert (image[0] == -30).all() and (image[1] == -24).all()


def test_opera_is_linear_and_is_enlarged(tmp_path):
    write_opera(tmp_path / "o")
    rows = run(tmp_path, "--opera_rtc", tmp_path / "o")
    assert rows.id.tolist() == [f"OPERA_L2_RTC-S1_{BURST}_{DATE}_r0000_c0000"] and rows.group.tolist() == [BURST]
    image = opened(tmp_path / "out")[0].read_image(0)
    assert image.shape == (2, 128, 128)
    np.testing.assert_allclose(image[:, ::9, ::9], np.broadcast_to([[[-20]], [[-10]]], (2, 15, 15)), atol=1e-5)


def test_enlarging_is_bilinear_in_power_and_knows_no_data():
    power = RNG.gamma(4, 0.25, (2, 40, 40))
    power[:, 10:20, 10:20] = np.nan
    result = enlarged((10 * np.log10(power)).astype(np.float32), 2)
    assert result.shape == (2, 80, 80) and result.dtype == np.float32
    assert np.isnan(result[:, 20:40, 20:40]).mean() > 0.85 and np.isfinite(result[:, 42:]).all()
    # half a pixel: a quarter of the neighbour
    expected = 0.75 * power[:, 30, 30] + 0.25 * power[:, 30, 31]
    expected = 0.75 * expected + 0.25 * (0.75 * power[:, 31, 30] + 0.25 * power[:, 31, 31])
    np.testing.assert_allclose(10 ** (result[:, 61, 61] / 10), expected, rtol=1e-5)


def test_small_tiles_are_cut_from_opera_as_it_is(tmp_path):
    rows = run(tmp_path, "--size 48 --opera_rtc", write_opera(tmp_path / "o"))
    assert [name[-12:] for name in rows.id] == ["_r0000_c0000", "_r0000_c0048", "_r0048_c0000", "_r0048_c0048"]


def test_etci_has_the_mean_and_std_that_are_stated_in_each_scene(tmp_path):
    made = write_etci(tmp_path / "e") | write_etci(tmp_path / "e", "other_20200101t000000", tiles=1, bands=1)
    flags = "--etci_mean -19 -12 --etci_std 5 6 --max_nodata 0.5 --etci2021"
    rows = run(tmp_path, flags, tmp_path / "e", "--masks", tmp_path / "masks")
    assert set(rows["values"]) == {"relative"} and set(rows.source) == {"etci2021"}
    assert Counter(rows.group) == {SCENE: 6, "other_20200101t000000": 2}  # without halves and tiles without data
    data, place = opened(tmp_path / "masks", "masks")
    for scene, count in ((SCENE, 2), ("other_20200101t000000", 1)):
        names = [name for name in made if name.startswith(scene)][:count]
        values = np.stack([data.read_image(place[name]) for name in names]).astype(np.float64)
        np.testing.assert_allclose(np.nanmean(values, (0, 2, 3)), [-19, -12], atol=1e-4)
        np.testing.assert_allclose(np.nanstd(values, (0, 2, 3)), [5, 6], atol=1e-4)
        for k, name in enumerate(names):
            assert (np.isnan(values[k]) == (made[name] == 0)).all()
            low, high = (values[k][made[name] == number].mean() for number in (20, 220))
            assert low < high
    tiles, where = opened(tmp_path / "out")
    whole = data.read_image(place[f"{SCENE}_x-1_y-1"])
    np.testing.assert_array_equal(tiles.read_image(where[f"{SCENE}_x-1_y-1_r0128_c0000"]), whole[:, 128:, :128])


def test_etci_takes_the_statistics_of_the_other_sets(tmp_path, caplog):
    write_etci(tmp_path / "e")
    chips = write_chips(tmp_path / "s", Ghana_1=(-10, -16), India_2=(-14, -22), India_3=(-1, -2))
    with caplog.at_level("INFO"):
        run(tmp_path, "--exclude India_3 --sen1floods11", chips, "--etci2021", tmp_path / "e")
    assert "get the mean -19.00, -12.00 and std 3.00, 2.00 dB" in caplog.text
    assert "--weight_mode none" in caplog.text and "--exclude: 1 of 6" in caplog.text


# ---- What is left out ----------------------------------------------------------------------------


def test_excluded_images_and_groups_are_not_written(tmp_path):
    chips = write_chips(tmp_path / "s", Ghana_1=(-10, -16), India_2=(-14, -22), India_3=(-9, -18), Spain_4=(-9, -18))
    rows = run(tmp_path, "--sen1floods11", chips, "--exclude Ghana_1 India")
    assert set(rows.group) == {"Spain"} and len(rows) == 16
    assert {path.name[:5] for path in (tmp_path / "out").rglob("*.tif")} == {"Spain"}


def test_masks_hold_excluded_scenes_and_no_wrong_labels(tmp_path):
    write_etci(tmp_path / "e")
    nebraska = tmp_path / "e" / "nebraska_20170213t002121" / "tiles"
    for name in (*BAD_LABELS, "nebraska_20170213t002121_x-1_y-1", "nebraska_20170213t002121_x-1_y-2"):
        for channel in ("vh", "vv"):
            write_png(nebraska / channel / f"{name}_{channel}.png", RNG.integers(1, 256, (1, 256, 256), dtype=np.uint8))
        if not name.endswith("x-1_y-2"):
            write_png(nebraska / "flood_label" / f"{name}.png", np.ones((1, 256, 256), np.uint8))
    flags = ("--etci_mean -19 -12 --etci_std 5 6 --etci2021", tmp_path / "e", "--masks", tmp_path / "masks")
    rows = run(tmp_path, *flags, "--exclude", SCENE)
    assert len(rows) == 4 * 8 and set(rows.group) == {"nebraska_20170213t002121"}
    data = open_dataset("masks", tmp_path / "masks", "all", None, supervised=True)
    assert data.CLASSES == ("no water", "water")
    assert Counter(data.groups.tolist()) == {SCENE: 2, "nebraska_20170213t002121": 1}
    image, mask = data[data.ids.tolist().index(f"{SCENE}_x-1_y-0")]
    assert mask.dtype == torch.uint8 and (mask[:64, 128:] == 1).all() and (mask[64:, 128:] == 0).all()
    assert (mask[:, :128] == 255).all() and image.shape == (2, 256, 256)
    before = digests(tmp_path / "masks")
    run(tmp_path, *flags, "--exclude", SCENE)
    assert digests(tmp_path / "masks") == before


def test_images_without_data_are_counted(tmp_path, caplog):
    chips = write_chips(tmp_path / "s", Ghana_1=(-10, -16), Paraguay_2=(np.nan, np.nan))
    with caplog.at_level("INFO"):
        rows = run(tmp_path, "--sen1floods11", chips)
    assert set(rows.group) == {"Ghana"}
    assert (
        "sen1floods11: 2 images, 16 tiles; left out: 1 images without any data, 0 tiles with too little" in caplog.text
    )


@pytest.mark.slow
def test_processes_do_not_change_a_byte(tmp_path):
    porto = write_porto(tmp_path / "p")
    for count in (1, 2):
        main(argv("--workers", count, "--porto_alegre", porto, "--out", tmp_path / f"out{count}"))
    assert digests(tmp_path / "out1") == digests(tmp_path / "out2")


# ---- Errors --------------------------------------------------------------------------------------


def broken(path):
    path.write_bytes(path.read_bytes()[:-30])


def damaged(path):
    content = path.read_bytes()
    path.write_bytes(content[:60] + bytes(20) + content[80:])


MEANS = "--etci_mean -19 -12 --etci_std 5 6"
CASES = {
    "nothing": (lambda p: None, "--size 64", "no set is given"),
    "no folder": (lambda p: None, "--porto_alegre P/p", "p: there is no such folder"),
    "another folder": (lambda p: (p / "p").mkdir(), "--opera_rtc P/p", "holds none of the crops of OPERA"),
    "part of it": (lambda p: (write_porto(p / "p"), (p / "p/canoas/s1/tile_0_3.png").unlink()), "--porto_alegre P/p", "s1: holds no PNG"),
    "size": (lambda p: write_porto(p / "p", 256), "--porto_alegre P/p", "is 256x256 pixels, but images of this set are 512x512"),
    "size of a chip": (lambda p: write_tif(p / "s/S1Hand/Ghana_1_S1Hand.tif", np.full((2, 100, 100), -9, np.float32), ("VV", "VH")), "--sen1floods11 P/s", "but images of this set are 512x512"),
    "mode": (lambda p: write_porto(p / "p", bands=(9, 9)), "--porto_alegre P/p", "has 2 bands of uint8, but 3 or 4 of uint8"),
    "16 bits": (lambda p: write_png(p / "e/s/tiles/vh/a_vh.png", np.ones((1, 256, 256), np.uint16)) and write_png(p / "e/s/tiles/vv/a_vv.png", np.ones((1, 256, 256), np.uint16)), f"{MEANS} --etci2021 P/e", "has 1 bands of uint16"),
    "truncated": (lambda p: (write_porto(p / "p"), broken(p / "p/canoas/s1/tile_0_3.png")), "--porto_alegre P/p", "tile_0_3.png: is truncated"),
    "damaged": (lambda p: (write_porto(p / "p"), damaged(p / "p/canoas/s1/tile_0_3.png")), "--porto_alegre P/p", "tile_0_3.png: cannot be read"),
    "VV alone": (lambda p: (write_etci(p / "e"), (p / "e" / SCENE / f"tiles/vh/{SCENE}_x-1_y-1_vh.png").unlink()), f"{MEANS} --etci2021 P/e", "1 images have VH or VV alone"),
    "VH alone": (lambda p: (write_opera(p / "o"), next((p / "o").rglob("*_VV.tif")).unlink()), "--opera_rtc P/o", "1 images have VH or VV alone"),
    "dB for power": (lambda p: write_opera(p / "o", power=(-20, -10)), "--opera_rtc P/o", "is mostly negative"),
    "unequal bands": (lambda p: write_etci(p / "e") and write_png(p / "e" / SCENE / f"tiles/vh/{SCENE}_x-1_y-1_vh.png", RNG.integers(1, 9, (3, 256, 256), dtype=np.uint8)), f"{MEANS} --etci2021 P/e", "its bands differ"),
    "one value": (lambda p: [write_png(p / f"e/s/tiles/{c}/a_{c}.png", np.ones((1, 256, 256), np.uint8)) for c in ("vh", "vv")], f"{MEANS} --etci2021 P/e", "fewer than two values"),
    "no scale": (lambda p: write_etci(p / "e"), "--etci2021 P/e", "no absolute scale; give the mean"),
    "half a scale": (lambda p: write_etci(p / "e"), "--etci_mean -19 -12 --etci2021 P/e", "--etci_mean and --etci_std must be given together"),
    "masks of others": (lambda p: write_opera(p / "o"), "--masks P/m --opera_rtc P/o", "--masks: is only for ETCI 2021"),
    "no labels": (lambda p: write_etci(p / "e") and [path.unlink() for path in p.rglob("flood_label/*")], f"{MEANS} --masks P/m --etci2021 P/e", "no image of --etci2021 has a label"),
    "masks in the tiles": (lambda p: write_etci(p / "e"), f"{MEANS} --masks P/out/m --etci2021 P/e", "one lies in the other"),
    "a name of nothing": (lambda p: write_opera(p / "o"), "--opera_rtc P/o --exclude Ghana", "'Ghana'; correct them; groups are T137"),
    "all excluded": (lambda p: write_opera(p / "o"), f"--opera_rtc P/o --exclude {BURST}", "leaves no image"),
    "a large size": (lambda p: write_porto(p / "p"), "--porto_alegre P/p --size 600", "--size 600: is more than the 512 pixels"),
    "tiny crops": (lambda p: write_opera(p / "o", 50), "--opera_rtc P/o", "50x50 pixels, too few for tiles of --size 128"),
    "no data": (lambda p: write_opera(p / "o", power=(0, 0)), "--opera_rtc P/o", "no tile has enough data"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_used_is_one_line(tmp_path, capsys, case):
    make, flags, said = CASES[case]
    make(tmp_path)
    flags = flags.replace("P/", f"{tmp_path}/")
    assert said in refusal(main, argv(flags, "--workers 1 --out", tmp_path / "out"), capsys)
    assert not (tmp_path / "out" / "metadata.csv").exists() or case == "no labels"


# ---- Real images ---------------------------------------------------------------------------------


FOLDERS = {"porto_alegre": "porto_alegre_2024", "opera_rtc": "opera_rtc_s1", "etci2021": "etci2021", "sen1floods11": "sen1floods11_chips"}  # fmt: skip


@needs_samples
def test_all_real_images_are_found():
    found = find_all({name: sample_path(folder) for name, folder in FOLDERS.items()})
    assert Counter(image.source for image in found) == {
        "porto_alegre": 74,
        "opera_rtc": 315,
        "sen1floods11": 13,
        "etci2021": 554,
    }
    assert len({image.group for image in found if image.source == "opera_rtc"}) == 15
    assert Counter(image.group for image in found if image.source == "etci2021") == {
        "nebraska_20170213t002121": 198,
        SCENE: 356,
    }
    assert len([image for image in found if label_of(image).exists() and image.name not in BAD_LABELS]) == 548
    assert BAD_LABELS < {image.name for image in found}


@needs_samples
def test_some_real_images_are_written(tmp_path, caplog):
    found = find_all({name: sample_path(folder) for name, folder in FOLDERS.items() if name != "etci2021"})
    kept = {"Paraguay_34417", "Bolivia_312675", "canoas_1_1_before", "porto_alegre_0_0_after"}
    left = [image.name for image in found if image.name not in kept and image.group != BURST]
    flags = [
        word for name, folder in FOLDERS.items() if name != "etci2021" for word in (f"--{name}", sample_path(folder))
    ]
    with caplog.at_level("INFO"):
        rows = run(tmp_path, flags, "--exclude", left)
    assert Counter(rows.source) == {"porto_alegre": 32, "opera_rtc": 21, "sen1floods11": 16}
    assert "sen1floods11: 2 images, 16 tiles; left out: 1 images without any data" in caplog.text
    data, _ = opened(tmp_path / "out")
    means = np.stack([np.nanmean(data.read_image(i), (1, 2)) for i in range(len(data))])
    assert (means[:, 0] < means[:, 1]).all() and -32 < means.min() < means.max() < 0
