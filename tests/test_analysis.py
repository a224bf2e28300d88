# SPDX-License-Identifier: MIT
"""The analysis programs: what they read, what they refuse, and pictures by the values of their pixels."""
import importlib
import json
import sys

import numpy as np
import pytest
import torch

from analysis.compare_reconstructions import read_reconstructions
from analysis.logfile_reader import read_log
from models_mixmim import mixmim_tiny
from sarwmix.quicklook import HIDDEN, RANGES, draw_reconstructions, false_colour, grey, new_figure, pixels


def run(monkeypatch, capsys, module, *flags):
    monkeypatch.setattr(sys, "argv", [module, *map(str, flags)])
    try:
        importlib.import_module(f"analysis.{module}").main()
        return 0, ""
    except SystemExit as end:
        return end.code, capsys.readouterr().err


def one_line_about(outcome, *parts):
    status, error = outcome
    assert status == 2 and len(error.splitlines()) == 1 and all(part in error for part in parts), error


def test_log_is_read_by_epoch_and_a_repeated_epoch_counts_once(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('{"train_loss": 3.0, "train_lr": 0.1, "epoch": 0}\n{"train_loss": 9.0, "train_lr": 0.2, "epoch": 1}\n\n'
                    '{"train_loss": 2.0, "train_lr": 0.2, "epoch": 1}\n')
    assert read_log(path)["train_loss"].to_dict() == {0: 3.0, 1: 2.0}
    path.write_text('{"train_loss": 3.0, "epoch": 0}\n{"train_lo')
    with pytest.raises(ValueError, match="log.txt:2"):
        read_log(path)


def test_loss_curve_of_two_runs(tmp_path, monkeypatch, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text('{"train_loss": 3.0, "train_lr": 0.1, "epoch": 0}\n')
    logs = [tmp_path / name / "log.txt" for name in "ab"]
    assert run(monkeypatch, capsys, "logfile_reader", "--log", *logs, "--output", tmp_path / "loss.png")[0] == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    one_line_about(run(monkeypatch, capsys, "logfile_reader", "--log", tmp_path / "no.txt", "--output", "x.png"), "no.txt")


def test_weight_map_of_a_simulated_patch(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "weight_map", "--simulate", 1, "--output", tmp_path / "w.png")[0] == 0
    assert (tmp_path / "w.png").stat().st_size > 10_000
    one_line_about(run(monkeypatch, capsys, "weight_map", "--vh", "no.tif", "--vv", "no.tif", "--output", "x.png"), "no.tif")


def test_overview_needs_a_checkpoint_and_draws_it(tmp_path, monkeypatch, capsys):
    torch.save({"model": mixmim_tiny().state_dict(), "args": {"model": "mixmim_tiny"}}, tmp_path / "c.pth")
    assert run(monkeypatch, capsys, "overview_figure", "--checkpoint", tmp_path / "c.pth", "--output", tmp_path / "o.png")[0] == 0
    assert (tmp_path / "o.png").stat().st_size > 50_000
    one_line_about(run(monkeypatch, capsys, "overview_figure", "--checkpoint", "no.pth", "--output", "x.png"), "no.pth")


def saved(path, ids, title):
    images = np.full((len(ids), 2, 32, 32), -15.0, np.float32)
    np.savez(path, ids=ids, **{f"{title}/{part}": images for part in ("original", "predicted", "completed")},
             **{f"{title}/visible": np.ones((1, 1, 32, 32), np.float32)})
    return path


def test_reconstructions_of_the_same_samples_are_compared(tmp_path, monkeypatch, capsys):
    one, other = saved(tmp_path / "1.npz", ["p", "q"], "run/a"), saved(tmp_path / "2.npz", ["p", "q"], "run/b")
    names, results = read_reconstructions([one, other])
    assert names == ["p", "q"] and list(results) == ["run/a", "run/b"] and results["run/b"]["original"].shape == (2, 2, 32, 32)
    assert run(monkeypatch, capsys, "compare_reconstructions", "--input", one, other, "--samples", 1, "--output",
               tmp_path / "c.png")[0] == 0
    foreign = saved(tmp_path / "3.npz", ["p", "r"], "run/c")
    one_line_about(run(monkeypatch, capsys, "compare_reconstructions", "--input", one, foreign, "--output", "x"), "3.npz", "other samples")
    one_line_about(run(monkeypatch, capsys, "compare_reconstructions", "--input", one, "--samples", 2, "--output", "x"), "--samples")
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    one_line_about(run(monkeypatch, capsys, "compare_reconstructions", "--input", tmp_path / "bad.npz", "--output", "x"), "bad.npz")


def test_grey_runs_from_black_to_white_over_each_channels_range():
    for channel, (low, high) in RANGES.items():
        shades = grey(np.array([[low - 9, low, (low + high) / 2, high, high + 9]]), channel)
        assert np.allclose(shades[0, :, 0], [0, 0, 0.5, 1, 1]) and np.array_equal(shades[..., 0], shades[..., 2])
    hidden = grey(np.zeros((1, 2)), "VV", visible=np.array([[1, 0]]))
    assert np.allclose(hidden[0], [[1, 1, 1], HIDDEN])


def test_false_colour_is_vv_vh_and_their_ratio():
    patch = np.array([[[-28.0, -8.0]], [[0.0, -22.0]]])              # VH, VV of two pixels
    assert np.allclose(false_colour(patch), [[[1, 0, 1], [0, 1, 0]]])


def test_reconstruction_figure_has_a_panel_for_each_picture():
    result = {name: np.full((2, 2, 32, 32), -15.0) for name in ("original", "predicted", "completed")}
    result["visible"] = np.ones((1, 1, 32, 32))
    assert len(draw_reconstructions({"a": result}).axes) == 2 * 8
    several = draw_reconstructions({"a": result, "run/b": result, "c": result}, ["x", "y"])
    assert len(several.axes) == 2 * 10
    assert [axis.get_title() for axis in several.axes[:5]] == ["original", "visible", "a", "run\nb", "c"]
    shown = pixels(new_figure(1, 1)[0])
    assert shown.dtype == np.uint8 and shown.ndim == 3 and (shown == 255).all()


def finetuned(folder, score, seed=0, finetune="", split="test", **metrics):
    """What a run of main_finetune.py leaves, in short."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"flags": {"finetune": finetune, "seed": seed, "lr": 0.1, "output_dir": str(folder)},
                                                 "data": {"train": {"samples": 9}}}))
    metrics = metrics or {"ap_macro": score, "ap_micro": 0.5, "f1_macro": 0.25, "f1_micro": 0.125}
    (folder / f"eval_{split}.json").write_text(json.dumps({"epoch": 3, **metrics}))
    return folder


def test_finetuned_runs_are_compared_best_first_with_means_over_seeds(tmp_path, monkeypatch, capsys):
    folders = [finetuned(tmp_path / f"{name}{seed}", score, seed, start) for name, start, scores in
               (("random", "", (0.2, 0.4)), ("tuned", "pre.pth", (0.6, 0.5))) for seed, score in enumerate(scores)]
    monkeypatch.setattr(sys, "argv", ["compare_runs", "--runs", *map(str, folders), "--output", str(tmp_path / "t.csv")])
    importlib.import_module("analysis.compare_runs").main()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if line]
    assert [row[0] for row in rows[2:6]] == ["tuned0", "tuned1", "random1", "random0"]
    assert rows[0][:5] == ["run", "start", "training samples", "epoch", "AP macro"] and rows[2][1:5] == ["pre.pth", "9", "3", "0.6000"]
    assert rows[8][:4] == ["2 seeds", "pre.pth", "9", "0.5500 ± 0.0707"] and rows[9][1:4] == ["random", "9", "0.3000 ± 0.1414"]
    assert (tmp_path / "t.csv").read_text().splitlines()[1].startswith("tuned0,pre.pth,9,3,0.6")


def test_runs_that_cannot_be_compared_are_one_line(tmp_path, monkeypatch, capsys):
    one = finetuned(tmp_path / "one", 0.5)
    flood = finetuned(tmp_path / "flood", None, accuracy=0.5, precision=0.5, recall=None, f1=None)
    other = tmp_path / "other"
    other.mkdir()
    one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", one, flood), "apart")
    one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", one, other), "run.json: does not exist")
    one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", one, "--split", "val"), "eval_val.json: does not exist")
    (one / "eval_test.json").write_text("{")
    one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", one), "eval_test.json: not JSON")
    (one / "eval_test.json").write_text("{}")
    one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", one), "not a run of main_finetune.py")
    assert run(monkeypatch, capsys, "compare_runs", "--runs", flood)[0] == 0
