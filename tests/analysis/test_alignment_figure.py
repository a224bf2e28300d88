# SPDX-License-Identifier: MIT
"""The figure by which people check an alignment: what is in its panels, and what it says of a folder that is not there."""

import json
import shutil

import numpy as np
import pytest

from analysis import alignment_figure
from analysis.alignment_figure import draw_alignment, read_folder, stretch, to_grey
from common.errors import DataError
from sarwmix.simulate.flood_archive import RawParameters, simulate_raw_floods
from tests.helpers.runs import refusal
from tests.helpers.sen12 import align
from util.quicklook import HIDDEN


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with raw/ and aligned/ of two simulated places of 128 pixels."""
    work = tmp_path_factory.mktemp("alignment")
    simulate_raw_floods(work / "made", RawParameters(folders=2, size=128, images=3, test_fraction=0.5, keep_tree=True))
    (work / "made" / "SEN12FLOOD").rename(work / "raw")
    align(work / "raw", work / "aligned", size=128)
    return work


def test_panels_are_the_reference_and_both_channels_of_each_date(work):
    reference, images = read_folder(work / "raw", work / "aligned", "1")
    assert reference.shape == (128, 128)
    assert [title.split("\n")[:2] for title, _ in images] == [
        ["2000-01-01", "not flooded"],
        ["2000-01-13", "not flooded"],
        ["2000-01-25", "flooded"],
    ]
    figure = draw_alignment(reference, images)
    assert len(figure.axes) == 2 * 4
    for k, (_, values) in enumerate(images):
        for row, channel, c in ((0, "VH", 0), (1, "VV", 1)):
            (shown,) = figure.axes[row * 4 + 1 + k].images
            np.testing.assert_allclose(np.asarray(shown.get_array()), to_grey(values[c], channel))


def test_pixels_without_data_are_not_dark_ones():
    image = to_grey(np.array([[0.0, 1e-9, 0.1]]), "VV")
    assert image[0, 0].tolist() == pytest.approx(HIDDEN) and image[0, 1].tolist() == [0, 0, 0]
    assert image[0, 2, 0] == pytest.approx(12 / 22)


def test_reference_is_stretched_over_what_it_has_data_of():
    band = np.arange(100.0).reshape(10, 10)
    band[0, 0] = np.nan
    image = stretch(band)
    assert image[0, 0].tolist() == pytest.approx(HIDDEN) and image[0, 1].tolist() == [0, 0, 0]
    assert image[9, 9].tolist() == [1, 1, 1]
    assert image[5, 0, 0] == pytest.approx((50 - 2.96) / (97.04 - 2.96))
    assert stretch(np.full((2, 2), np.nan)) == pytest.approx(np.broadcast_to(HIDDEN, (2, 2, 3)))


def test_an_image_that_the_list_lacks_is_named(work, tmp_path):
    shutil.copytree(work / "aligned", tmp_path / "aligned")
    path = tmp_path / "aligned" / "S1list.json"
    path.write_text(
        json.dumps({folder: images for folder, images in json.loads(path.read_text()).items() if folder != "1"})
    )
    with pytest.raises(DataError, match="lacks 1/S1"):
        read_folder(work / "raw", tmp_path / "aligned", "1")


@pytest.mark.parametrize(
    "folder, output, words",
    (
        ("0001", "a.png", None),
        ("77", "a.png", "--folder 77: has no aligned image"),
        ("raw", "a.png", "has no aligned image"),
        ("1", "a.tif", "a.tif: its name must end in"),
        ("1", "no/a.png", "--output"),
    ),
)
def test_the_program_writes_a_figure_or_one_line(work, tmp_path, capsys, folder, output, words):
    flags = ["--raw_root", work / "raw", "--aligned", work / "aligned"]
    flags += ["--folder", folder, "--output", tmp_path / output]
    if words is None:
        alignment_figure.main([str(flag) for flag in flags])
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / "a.svg").read_text()
    else:
        assert words in refusal(alignment_figure.main, flags, capsys)
        assert not list(tmp_path.iterdir())
