# SPDX-License-Identifier: MIT
"""The benchmark of maps of scenes: what its measure of seams says, and its rows."""

import numpy as np
import pytest

from benchmarks.scene_map import average_vv, measure, measure_seams, write_random_scene
from util.sliding import Windows


def test_seams_are_steps_across_edges_of_windows_relative_to_others():
    ramp = np.add.outer(np.arange(40), np.arange(40))[None].astype(np.float32)
    assert measure_seams(ramp, Windows(16, 0)) == pytest.approx(1)
    ramp[:, :, 16:] += 3
    ramp[:, 5, 5] = np.nan
    steps = 3 * 40 / (3 * 2 * 40)  # three edges in each direction, at 16, 24 and 32
    assert measure_seams(ramp, Windows(16, 0)) == pytest.approx(1 + steps)


def test_blending_removes_the_seams_of_a_scene_and_changes_no_other_figure(tmp_path):
    image = write_random_scene(tmp_path / "scene.tif", 200)
    apart, blended = (measure(image, average_vv, Windows(64, overlap, 4), tmp_path) for overlap in (0, 0.25))
    assert apart["seams"] > 3 * blended["seams"] and apart.keys() == blended.keys()
    assert apart["peak_gb"] >= apart["before_gb"] > 0 and apart["seconds"] > 0 and apart["file_mb"] > 0
