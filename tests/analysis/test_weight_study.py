# SPDX-License-Identifier: MIT
"""The study of the weights: what its script starts, and its table and figure from what runs leave."""

import json

import pandas as pd
import pytest

from analysis import weight_study
from analysis.weight_study import difference, groups_of, read_study, tables
from tests.helpers.result_logs import written
from tests.helpers.runs import argv, refusal

SETTINGS = {
    "dataset": "benv2",
    "data_path": "d",
    "split": "train_val",
    "model": "mixmim_tiny",
    "input_size": 128,
    "epochs": 11,
    "stop_epoch": 11,
    "batch_size": 8,
    "lr": 1e-3,
    "mask_ratio": 0.5,
    "norm_pix_loss": True,
    "weight_domain": "linear",
    "weight_clip": 100.0,
    "exp_scale": 1.0,
}


def add_run(folder, mode, level, seed, score, accuracy, **changed):
    """A pretraining run with its probe, and a flood classifier from it, in short; mode "random": the classifier alone."""
    flags = {**SETTINGS, "weight_mode": mode, "weight_level": level, "seed": seed, **changed}
    origin, files = None, {}
    if mode != "random":
        origin = {"checkpoint": "c", "epochs": 11, "flags": flags}
        probed = {"method": "linear", "ap_macro": score, "ap_micro": 0.5, "f1_macro": 0.25}
        files = {"pretrain/run.json": {"flags": flags}, "pretrain/probe.json": {"results": [probed]}}
    files["finetune/run.json"] = {"flags": {"dataset": "sen12flood", "seed": seed}, "initialised_from": origin}
    files["finetune/eval_test.json"] = {"accuracy": accuracy, "f1": None if mode == "random" else 0.75}
    for name, content in files.items():
        written(folder, name.replace("/", f"_{mode}_{level}_{seed}/"), json.dumps(content))


@pytest.fixture
def study(tmp_path):
    for seed, shift in enumerate((0.0, 0.1, 0.2)):
        add_run(tmp_path, "per_channel", "token", seed, 0.5 + shift + 0.01 * (seed + 1), 0.9)
        add_run(tmp_path, "none", "token", seed, 0.5 + shift, 0.8)
    add_run(tmp_path, "random", "", 0, None, 0.6)
    unfinished = {"flags": {**SETTINGS, "weight_mode": "none", "weight_level": "pixel", "seed": 7}}
    written(tmp_path, "unfinished/run.json", json.dumps(unfinished))
    return tmp_path


def test_runs_become_rows_by_what_their_flags_say(study):
    frame = read_study(study)
    assert [label for label, _ in groups_of(frame)] == [
        "none: plain MixMAE",
        "per_channel, token",
        "random initialisation",
    ]
    assert frame["seed"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert frame["probe: AP macro"].tolist()[:6] == pytest.approx([0.5, 0.6, 0.7, 0.51, 0.62, 0.73])
    assert frame["flood: accuracy"].tolist() == [0.8] * 3 + [0.9] * 3 + [0.6]
    assert pd.isna(frame["probe: AP macro"].iloc[-1])


def test_means_and_differences_seed_by_seed(study):
    means, differences = tables(read_study(study))
    assert means["probe: AP macro"].tolist() == ["0.600 ± 0.100", "0.620 ± 0.110", "–"]
    assert means["seeds"].tolist() == [
        3,
        3,
        1,
    ]
    # Differences 0.01, 0.02, 0.03: mean 0.02, and 4.303 standard errors of 0.01/√3.
    assert differences["probe: AP macro"].tolist() == ["+0.020 ± 0.025", "–"]
    assert differences["flood: accuracy"].tolist() == ["+0.100 ± 0.000", "-0.200"]
    assert differences["flood: F1"].tolist() == ["+0.000 ± 0.000", "–"]
    one = pd.DataFrame({"seed": [5], "m": [0.5]})
    assert difference(one, pd.DataFrame({"seed": [4], "m": [0.1]}), "m") == "–"


def test_the_program_writes_both_figures_and_the_table(study, tmp_path, capsys):
    figure, table = tmp_path / "s.png", tmp_path / "s.csv"
    weight_study.main(argv(study, "--output", figure, "--table", table, "--note tiny"))
    assert "+0.020 ± 0.025" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "random initialisation" in figure.with_suffix(".svg").read_text()
    assert len(pd.read_csv(table)) == 7


PROBE = "pretrain_none_token_0/probe.json"


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda at: add_run(at, "shared_avg", "token", 0, 0.5, 0.5, mask_ratio=0.75),
            ("of two studies", "mask_ratio 0.75 and 0.5"),
        ),
        (lambda at: written(at, PROBE, "{"), (f"{PROBE}: not a JSON object", "scripts/weight_study.sh")),
        (lambda at: written(at, PROBE, '{"results": []}'), ("pretrain_none_token_0", "no linear probe")),
        (lambda at: [path.unlink() for path in at.glob("*/run.json")], ("no run of a study",)),
    ],
)
def test_what_is_no_study_is_one_line(study, tmp_path, capsys, spoil, words):
    spoil(study)
    figure, table = tmp_path / "s.png", tmp_path / "s.csv"
    line = refusal(weight_study.main, [study, "--output", figure, "--table", table], capsys)
    assert all(word in line for word in words), line
    assert not figure.exists() and not table.exists()
