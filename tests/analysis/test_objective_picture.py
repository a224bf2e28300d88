# SPDX-License-Identifier: MIT
"""The figure of the study of objectives: rows, and the lines that join the same seed."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from analysis.objective_arms import ARMS, Arm
from analysis.objective_picture import DEFAULT, draw_study, rows_of

OWN = Arm("mine", "mine", ("--mask_ratio", "0.75"))
NAMES = ("norm_pix", "norm_pix_looks4", "norm_pix_none", "statistics", "statistics_looks4")
STUDY = SimpleNamespace(args=SimpleNamespace(arms=[*(ARMS[name] for name in NAMES), OWN]))


def results():
    """Two tasks; seed 2 of statistics is missing in floods."""
    rows = []
    for shift, (task, metric) in enumerate((("land_cover", "AP macro"), ("floods", "AUC"))):
        for place, arm in enumerate((*NAMES, "mine", "random")):
            for seed in (0, 1, 2):
                value = 0.1 * place + 0.01 * seed + 0.001 * shift
                missing = (task, arm, seed) == ("floods", "statistics", 2)
                rows += [(task, arm, seed, metric, np.nan if missing else value), (task, arm, seed, "other", 0.9)]
    rows.append(("floods", "mean change of VV", None, "AUC", 0.9))
    return pd.DataFrame(rows, columns=["task", "arm", "seed", "metric", "value"]).astype({"seed": "Int64"})


def test_both_targets_of_a_variation_are_in_one_row():
    rows = rows_of([*NAMES, "mine", "random", "Otsu, VH"], STUDY)
    assert [row.label for row in rows] == [
        DEFAULT,
        "4 looks",
        "no weights",
        "mine",
        "random initialisation",
        "Otsu, VH",
    ]
    assert [list(row.arms) for row in rows[:3]] == [
        ["norm_pix", "statistics"],
        ["norm_pix_looks4", "statistics_looks4"],
        ["norm_pix_none"],
    ]


def test_the_same_seed_is_joined():
    figure = draw_study(results(), STUDY)
    for axis, label, seeds in zip(figure.axes, ("land cover: AP macro", "floods: AUC"), ((0, 1, 2), (0, 1))):
        assert axis.get_xlabel() == label
        shift = 0.001 * (axis is figure.axes[1])
        joined = [line for line in axis.lines if line.get_color() == "0.6"]
        expected = [(0.01 * seed + shift, 0.3 + 0.01 * seed + shift) for seed in seeds]
        expected += [(0.1 + 0.01 * seed + shift, 0.4 + 0.01 * seed + shift) for seed in (0, 1, 2)]
        np.testing.assert_allclose([line.get_xdata() for line in joined], expected)
        assert all(line.get_ydata()[0] < line.get_ydata()[1] for line in joined)
    dots = [line for line in figure.axes[1].lines if line.get_marker() == "D"]
    assert [list(line.get_xdata()) for line in dots] == [[0.9]]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[-2:] == ["mean over seeds", "the same seed"] and words[0].startswith("norm_pix: ")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()][-1] == "mean change of VV"


def test_one_task_of_one_target_is_drawn():
    kept = results().query("task == 'floods' and arm == 'norm_pix'")
    figure = draw_study(kept, STUDY)
    assert len(figure.axes) == 1 and "the same seed" not in [text.get_text() for text in figure.legends[0].get_texts()]
