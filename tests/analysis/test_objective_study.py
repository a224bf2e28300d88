# SPDX-License-Identifier: MIT
"""The study of objectives: arms and contrasts, what is started and what is not again, and tables of what is left."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import main_pretrain
from analysis import objective_study, objective_tasks
from analysis.objective_arms import ARMS, Contrast, arm, contrasts
from analysis.objective_bootstrap import draws_of_tiles, draws_of_water
from analysis.objective_results import compare, contrast_table, health_table, tally
from tests.helpers.encoders import masked_images, tiny_checkpoint
from tests.helpers.result_logs import written
from tests.helpers.runs import argv, refusal

SHORT = "-- --input_size 32 --epochs 2 --batch_size 2 --warmup_epochs 0"


# ---- Arms and contrasts --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_flags_of_pretraining(name):
    flags = main_pretrain.parse_flags(["--data_path", "d", "--model", "mixmim_tiny", *ARMS[name].flags])
    assert bool(flags.norm_pix_loss) == name.startswith("norm_pix")


def test_arms_are_named_and_differ_in_one_thing():
    assert list(ARMS)[:3] == ["norm_pix", "norm_pix_looks4", "norm_pix_looks8"] and len(ARMS) == 16
    assert ARMS["statistics"].flags == () and ARMS["statistics_clip95"].flags == ("--weight_clip", "95")
    assert arm("mine=--mask_ratio 0.75").flags == ("--mask_ratio", "0.75") and arm("none=").flags == ()


def test_contrasts_are_planned_for_the_arms_that_are_there():
    found = contrasts(["norm_pix", "statistics", "statistics_none", "mine"])
    assert [c.label for c in found] == [
        "statistics − norm_pix",
        "statistics − statistics_none",
        "norm_pix − random",
        "statistics − random",
        "statistics_none − random",
        "mine − random",
    ]
    assert [c.label for c in found if c.main] == ["statistics − norm_pix", "statistics − random"]
    labels = [c.label for c in contrasts(list(ARMS))]
    assert len(labels) == len(set(labels)) == 8 + 2 + 2 * (2 + 4 + 1) + 16
    assert labels[8:10] == ["statistics − norm_pix, mean over variations", "statistics − norm_pix, variations pooled"]


def results_frame(values):
    """values: {arm: value of each seed}."""
    rows = [("water", name, k, "IoU", v) for name, found in values.items() for k, v in enumerate(found)]
    frame = pd.DataFrame(rows, columns=["task", "arm", "seed", "metric", "value"])
    return frame.astype({"seed": "Int64"})


def test_an_arm_without_an_encoder_does_not_take_others_out_of_the_means():
    frame = results_frame(dict.fromkeys(["norm_pix", "norm_pix_looks8", "statistics", "statistics_looks8"], [0.1, 0.2]))
    (mean,) = [c for c in objective_study.planned_for(list(ARMS.values()), frame) if "mean over" in c.label]
    assert mean.pairs == (("statistics", "norm_pix"), ("statistics_looks8", "norm_pix_looks8"))


def test_differences_are_paired_by_seed_with_intervals_of_students_t():
    values = {"a": [0.51, 0.62, 0.73], "b": [0.5, 0.6, 0.7], "c": [0.4, 0.5, 0.7], "d": [0.4, 0.4, 0.7]}
    both = (("a", "b"), ("c", "d"))
    planned = [
        Contrast("a − b", (("a", "b"),)),
        Contrast("mean", both),
        Contrast("pooled", both, pooled=True),
        Contrast("d − a", (("d", "a"),)),
        Contrast("with what is not there", (("a", "e"),)),
    ]
    table = compare(results_frame(values), planned)
    assert table["n"].tolist() == [3, 3, 6, 3]
    # a − b: 0.01, 0.02, 0.03; c − d: 0, 0.1, 0. Means by seed: 0.005, 0.06, 0.015, with a deviation of 0.02930.
    assert table["mean"].tolist() == pytest.approx([0.02, 0.08 / 3, 0.16 / 6, -0.12])
    t2, t5 = 4.302653, 2.570582
    pooled = np.std([0.01, 0.02, 0.03, 0, 0.1, 0], ddof=1) / np.sqrt(6)
    assert table["half"].tolist()[:3] == pytest.approx(
        [t2 * 0.01 / 3**0.5, t2 * 0.0292973 / 3**0.5, t5 * pooled], abs=1e-5
    )
    assert table["seen"].tolist() == [False, False, False, False]
    text = contrast_table(table)
    assert text["difference"][0] == "+0.020" and text["smallest visible"][0] == "0.025"
    table = compare(results_frame({"a": [0.5, 0.61, 0.7], "b": [0.1, 0.2, 0.3]}), planned[:1])
    assert contrast_table(table)["distinguishable"].tolist() == ["yes"]
    assert tally(table).startswith("1 of 1 intervals exclude 0") and "0.1, would" in tally(table)
    alone = compare(results_frame({"a": [0.5], "b": [0.1]}), planned[:1])
    assert contrast_table(alone)["distinguishable"].tolist() == ["–"] and tally(alone).startswith("0 of 0")


def test_places_are_drawn_again():
    def water(hits):
        keys = ("hits", "taken", "has", "pixels")
        return {"groups": {name: dict(zip(keys, (h, 10, 10, 50))) for name, h in zip("xyz", hits)}}

    same = draws_of_water([(water([5, 6, 7]), water([5, 6, 7]))])
    assert len(same) == 1000 and (same == 0).all()
    better = draws_of_water([(water([8, 9, 10]), water([1, 2, 3]))] * 2)
    # Whole groups are drawn: the smallest difference is 8/12 − 1/19 three times.
    assert better.min() == pytest.approx(8 / 12 - 1 / 19) and better.max() == pytest.approx(1 - 3 / 17)

    def tiles(scores):
        return {"groups": {"x": {"scores": scores, "labels": [0, 1] * 5}, "dry": {"scores": [0.1], "labels": [0]}}}

    draws = draws_of_tiles([(tiles([0.1, 0.9] * 5), tiles([0.9, 0.1] * 5))])
    assert np.nanmin(draws) == np.nanmax(draws) == 1


# ---- Plan ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def water(tmp_path_factory):
    wet = {"a": (0, 32, 16), "b": (32, 0, 16), "c": (0, 8, 32)}
    return masked_images(tmp_path_factory.mktemp("water") / "places", wet)


def flags_of(water, tmp_path, *more):
    data = ("--dataset masks --data_path", water, "--model mixmim_tiny --water", water, "--water_dataset masks")
    return argv("--output", tmp_path / "out", *data, "--arms statistics norm_pix --seeds 4 5", *more)


def commands(words, capsys):
    objective_study.main(words)
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def after(flag, words, count=1):
    return words[words.index(flag) + 1 :][:count]


def test_a_dry_run_prints_what_is_left(water, tmp_path, capsys):
    words = flags_of(water, tmp_path, "--dry_run", SHORT)
    lines = commands(words, capsys)
    # The baselines; for each seed two trainings with an evaluation each, and random after the first.
    assert len(lines) == 1 + 2 * 5 and "--baselines" in lines[0]
    training, evaluation, random = lines[1:4]
    folder = tmp_path / "out" / "runs" / "statistics_seed4"
    assert after("--output_dir", training) == [str(folder)] and after("--resume", training) == ["auto"]
    assert "--norm_pix_loss" not in training and "--norm_pix_loss" in lines[4] and after("--seed", training) == ["4"]
    assert after("--checkpoint", evaluation) == after("--checkpoint", random) == [str(folder / "checkpoint_2.pth")]
    assert after("--arm", random) == ["random"] and evaluation[-8:] == SHORT.split()[1:]
    assert not (tmp_path / "out").exists()
    tiny_checkpoint(folder / "checkpoint_2.pth")
    assert len(commands(words, capsys)) == len(lines) - 1
    # What is not finished is not evaluated alone.
    tiny_checkpoint(tmp_path / "out" / "runs" / "norm_pix_seed4" / "checkpoint_1.pth")
    only = commands(flags_of(water, tmp_path, "--tasks_only --dry_run"), capsys)
    assert [after("--arm", line) for line in only[1:]] == [["statistics"], ["random"]]
    real = argv(
        "--output", tmp_path / "out", "--water", water, "--water_dataset masks --tasks_only --dry_run --seeds 4"
    )
    lines = commands([*real, "--arms", "statistics"], capsys)
    assert len(lines) == 3 and "--data_path" not in lines[1]


def test_without_data_scenes_and_floods_are_simulated(tmp_path, capsys):
    lines = commands(
        argv("--output", tmp_path / "out", "--arms norm_pix --seeds 0 --dry_run -- --mask_ratio 0.6"), capsys
    )
    assert [after("-m", line)[0] for line in lines[:3]] == [
        "sarwmix.simulate",
        "sarwmix.simulate.flood",
        "analysis.objective_tasks",
    ]
    training = lines[3]
    assert after("--model", training) == ["mixmim_tiny"] and after("--epochs", training) == ["11"]
    assert after("--mask_ratio", training) == ["0.6"] and after("--data_path", training) == [
        f"{tmp_path}/out/simulated"
    ]
    assert after("--flood_path", lines[4]) == [f"{tmp_path}/out/simulated_floods"]


@pytest.mark.parametrize(
    "more, words",
    [
        (("--arms norm_pics",), ("none of norm_pix", "NAME=FLAGS")),
        (("--arms random=--x",), ("neither random",)),
        (("--arms a=--lr --dry_run", SHORT), ("--lr",)),
        (("--arms norm_pix norm_pix",), ("--arms", "twice")),
        (("--seeds 1 1",), ("--seeds", "twice")),
        (("--dry_run -- --seed 3",), ("--seed", "the study or its arms set it")),
        (("--dry_run -- --weight_mode=none",), ("--weight_mode=none", "NAME=FLAGS")),
        (("--dry_run -- --save_epochs 1 --epochs 2 --warmup_epochs 0",), ("--save_epochs", "2, must be among them")),
        (("--tasks_only",), ("--tasks_only", "no checkpoint")),
        (("--positive ice --dry_run", SHORT), ("--positive ice", "land, water")),
        ((SHORT,), ("is not empty", "holds no study")),
    ],
)
def test_wrong_flags_are_one_line(water, tmp_path, capsys, more, words):
    written(tmp_path, "out/x", "")
    line = refusal(objective_study.main, flags_of(water, tmp_path, *more), capsys)
    assert all(word in line for word in words), line


# ---- From trainings to tables --------------------------------------------------------------------


def in_this_process(jobs, *_):
    """Runs the steps; a pretraining leaves the weights that it would start with."""
    for step in (step for job in jobs for step in job):
        words = step.command
        if "main_pretrain.py" in words[1]:
            tiny_checkpoint(tiny := Path(step.unless), seed=int(after("--seed", words)[0]))
            health = (
                {"epoch": 1, "check_loss": 0.5, "check_constant": 1.0} if "--norm_pix_loss" in words else {"epoch": 1}
            )
            written(tiny.parent, "log.txt", json.dumps(health) + "\n")
        else:
            objective_tasks.main(words[3:])


def test_the_study_from_trainings_to_tables(water, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(objective_study, "run_study", in_this_process)
    table, figure = tmp_path / "t.csv", tmp_path / "t.png"
    words = flags_of(water, tmp_path, "--table", table, "--picture", figure, SHORT)
    objective_study.main(words)
    text = capsys.readouterr().out
    frame = pd.read_csv(table)
    ours = frame[frame["metric"] == "IoU"].dropna(subset=["seed"])
    assert (
        ours["arm"].tolist() == ["statistics", "random", "norm_pix"] * 2 and ours["seed"].tolist() == [4] * 3 + [5] * 3
    )
    # All have the same weights, those that training starts with.
    assert ours.groupby("seed")["value"].nunique().tolist() == [1, 1]
    assert "| statistics − norm_pix | IoU" in text and "| +0.000" in text and "| random " in text
    assert "| Otsu, VV " in text and "chance in training alone" in text and "drawn again 1000 times" in text
    assert "| norm_pix   | 2       | 0.500 ± 0.000" in text and "| statistics | 2       | – " in text
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.with_suffix(".svg").exists()
    # Nothing is left; other flags are another study; a damaged result is one line.
    assert commands([*words[: words.index("--")], "--dry_run", *words[words.index("--") :]], capsys) == []
    line = refusal(objective_study.main, [*words, "--lr", "0.1"], capsys)
    assert "holds a study with other flags" in line
    (tmp_path / "out" / "results" / "water" / "norm_pix_seed5.json").write_text("{")
    line = refusal(objective_study.main, words, capsys)
    assert "norm_pix_seed5.json" in line and "remove it" in line


def test_health_is_of_the_last_line_that_can_be_read():
    study = SimpleNamespace(args=SimpleNamespace(arms=[ARMS["norm_pix"], ARMS["statistics"]]))
    health = pd.DataFrame(
        [("norm_pix", 0, 0.2, 0.4, 0.1), ("norm_pix", 1, 0.3, 0.4, np.nan), ("statistics", 0, np.nan, 1, np.nan)],
        columns=["arm", "seed", "check_loss", "check_constant", "check_between"],
    )
    table = health_table(health, study)
    assert table["loss ÷ that of a constant"].tolist() == ["0.625 ± 0.177", "–"]
    assert table["variance between images"].tolist() == ["0.100", "–"]
