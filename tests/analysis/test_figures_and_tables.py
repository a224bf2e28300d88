# SPDX-License-Identifier: MIT
"""The analysis programs: what they read, what they refuse, and pictures by the values of their pixels."""

import importlib
import json
import sys
import warnings

import numpy as np
import pytest
import rasterio
import torch
from rasterio.errors import NotGeoreferencedWarning

from analysis.compare_reconstructions import read_reconstructions
from analysis.compare_runs import FREE, describe_kinds, draw_runs, group_by_kind, read_run
from analysis.weight_map import draw_weights, read_patch
from main_finetune import SAME_RUN, build_parser
from models_mixmim import mixmim_tiny
from sarwmix.bigearthnetv2 import BigEarthNetv2
from tests.helpers.analysis_programs import one_line_about, run
from util.quicklook import HIDDEN, RANGES, draw_reconstructions, false_colour, grey, new_figure, pixels
from util.training import SAME_TRAINING


def both(path):
    """Whether a figure is there as PNG and as SVG, neither of them empty."""
    png, svg = path.with_suffix(".png").read_bytes(), path.with_suffix(".svg").read_bytes()
    return png.startswith(b"\x89PNG") and len(png) > 10_000 and b"<svg" in svg and svg.rstrip().endswith(b"</svg>")


def write_band(path, values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=1, dtype="float32"
        ) as file:
            file.write(values.astype(np.float32), 1)
    return path


def test_weight_map_of_a_simulated_patch(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "weight_map", "--simulate", 1, "--output", tmp_path / "w.svg")[0] == 0
    assert both(tmp_path / "w.svg")


def test_weight_map_shows_both_channels_and_takes_no_data_for_the_mean(tmp_path):
    rng = np.random.default_rng(0)
    vh, vv = rng.normal(-20, 1, (128, 128)), rng.normal(-12, 1, (128, 128))
    vv[3, 4] = np.nan
    sar_db = read_patch(write_band(tmp_path / "vh.tif", vh), write_band(tmp_path / "vv.tif", vv))
    figure = draw_weights(sar_db)
    vv[3, 4] = BigEarthNetv2.MEAN[1]
    for row, channel, values in ((0, "VV", vv), (1, "VH", vh)):
        (shown,) = figure.axes[4 * row].images
        np.testing.assert_allclose(shown.get_array(), grey(values, channel), atol=1e-6)
        weight = figure.axes[4 * row + 1].images[0].get_array()
        assert (
            weight.argmin() == values.argmax()
            and weight.max() == pytest.approx(np.e)
            and weight.min() == pytest.approx(1, abs=1e-3)
        )


def test_weight_map_of_what_it_cannot_draw_is_one_line(tmp_path, monkeypatch, capsys):
    small, large = (write_band(tmp_path / f"{side}.tif", np.full((side, side), -15.0)) for side in (8, 9))
    output = ("--output", tmp_path / "x.png")
    for flags, words in (
        (("--vh", "no.tif", "--vv", "no.tif"), ("no.tif",)),
        (("--vh", small, "--vv", large), (str(large), "9×9", "8×8")),
        (("--vh", small), ("--vv",)),
        (("--simulate", 1, "--vh", small), ("either",)),
        (("--simulate", -1), ("--simulate -1",)),
        (("--simulate", "x"), ("--simulate",)),
    ):
        one_line_about(run(monkeypatch, capsys, "weight_map", *flags, *output), *words)
    one_line_about(
        run(monkeypatch, capsys, "weight_map", "--simulate", 1, "--output", tmp_path / "x.pdf"), "x.pdf", ".png or .svg"
    )
    assert not list(tmp_path.glob("*x.*"))


def test_overview_needs_a_checkpoint_and_draws_it(tmp_path, monkeypatch, capsys):
    model = mixmim_tiny().state_dict()
    torch.save({"model": model, "args": {"model": "mixmim_tiny"}}, tmp_path / "c.pth")
    assert (
        run(monkeypatch, capsys, "overview_figure", "--checkpoint", tmp_path / "c.pth", "--output", tmp_path / "o.png")[
            0
        ]
        == 0
    )
    assert both(tmp_path / "o.png")
    torch.save({"model": model, "args": {"model": "mixmim_giant"}}, tmp_path / "giant.pth")
    torch.save({"model": model, "args": {"model": "mixmim_tiny", "input_size": 256}}, tmp_path / "256.pth")
    output = ("--output", tmp_path / "x.png")
    one_line_about(run(monkeypatch, capsys, "overview_figure", "--checkpoint", "no.pth", *output), "no.pth")
    one_line_about(
        run(monkeypatch, capsys, "overview_figure", "--checkpoint", tmp_path / "giant.pth", *output),
        "giant.pth",
        "mixmim_giant",
    )
    one_line_about(
        run(monkeypatch, capsys, "overview_figure", "--checkpoint", tmp_path / "256.pth", *output),
        "256.pth",
        "input size 256",
    )
    assert not list(tmp_path.glob("x.*"))


def saved(path, ids, title):
    images = np.full((len(ids), 2, 32, 32), -15.0, np.float32)
    np.savez(
        path,
        ids=ids,
        **{f"{title}/{part}": images for part in ("original", "predicted", "completed")},
        **{f"{title}/visible": np.ones((1, 1, 32, 32), np.float32)},
    )
    return path


def test_reconstructions_of_the_same_samples_are_compared(tmp_path, monkeypatch, capsys):
    one, other = saved(tmp_path / "1.npz", ["p", "q"], "run/a"), saved(tmp_path / "2.npz", ["p", "q"], "run/b")
    names, results = read_reconstructions([one, other])
    assert (
        names == ["p", "q"]
        and list(results) == ["run/a", "run/b"]
        and results["run/b"]["original"].shape == (2, 2, 32, 32)
    )
    assert (
        run(
            monkeypatch,
            capsys,
            "compare_reconstructions",
            "--input",
            one,
            other,
            "--samples",
            1,
            "--output",
            tmp_path / "c.png",
        )[0]
        == 0
    )
    assert both(tmp_path / "c.png") and b">original<" in (tmp_path / "c.svg").read_bytes()


def test_checkpoints_of_one_name_are_told_apart_by_their_runs(tmp_path):
    for name in "ab":
        (tmp_path / name / "inference").mkdir(parents=True)
    paths = [saved(tmp_path / name / "inference/r.npz", ["p", "q"], "checkpoint_64") for name in "ab"]
    assert list(read_reconstructions(paths)[1]) == ["a/checkpoint_64", "b/checkpoint_64"]
    with pytest.raises(ValueError, match="name each once"):
        read_reconstructions([paths[0], paths[0]])


def test_reconstructions_that_cannot_be_drawn_are_one_line(tmp_path, monkeypatch, capsys):
    good, foreign = saved(tmp_path / "1.npz", ["p", "q"], "a"), saved(tmp_path / "3.npz", ["p", "r"], "c")
    arrays = dict(np.load(good))
    np.savez(tmp_path / "part.npz", **{name: array for name, array in arrays.items() if name != "a/predicted"})
    np.savez(tmp_path / "shape.npz", **{**arrays, "a/predicted": arrays["a/predicted"][:1]})
    np.savez(tmp_path / "ids.npz", ids=arrays["ids"])
    np.save(tmp_path / "array.npy", arrays["ids"])
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-200])
    whole = good.read_bytes()
    middle = whole.index(b"NUMPY", len(whole) // 2) + 200
    (tmp_path / "flipped.npz").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    output = ("--output", tmp_path / "x.png")
    for name in (
        "part.npz",
        "shape.npz",
        "ids.npz",
        "array.npy",
        "bad.npz",
        "empty.npz",
        "cut.npz",
        "flipped.npz",
        "no.npz",
    ):
        one_line_about(
            run(monkeypatch, capsys, "compare_reconstructions", "--input", tmp_path / name, *output),
            f"error: {tmp_path / name}: ",
        )
    one_line_about(
        run(monkeypatch, capsys, "compare_reconstructions", "--input", good, foreign, *output), "3.npz", "other samples"
    )
    one_line_about(
        run(monkeypatch, capsys, "compare_reconstructions", "--input", good, "--samples", 2, *output),
        "--samples 2",
        "there are 2",
    )
    one_line_about(
        run(monkeypatch, capsys, "compare_reconstructions", "--input", good, "--output", tmp_path / "x.jpg"),
        "x.jpg",
        ".png or .svg",
    )
    assert not list(tmp_path.glob("x.*"))


def test_grey_runs_from_black_to_white_over_each_channels_range():
    for channel, (low, high) in RANGES.items():
        shades = grey(np.array([[low - 9, low, (low + high) / 2, high, high + 9]]), channel)
        assert np.allclose(shades[0, :, 0], [0, 0, 0.5, 1, 1]) and np.array_equal(shades[..., 0], shades[..., 2])
    hidden = grey(np.zeros((1, 2)), "VV", visible=np.array([[1, 0]]))
    assert np.allclose(hidden[0], [[1, 1, 1], HIDDEN])


def test_false_colour_is_vv_vh_and_their_ratio():
    patch = np.array([[[-28.0, -8.0]], [[0.0, -22.0]]])  # VH, VV of two pixels
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


def finetuned(folder, score, seed=0, finetune="", split="test", flags=(), global_batch=8, earlier=None, **metrics):
    """What a run of main_finetune.py leaves, in short. earlier: the flag finetune of the part that it continues."""
    folder.mkdir()
    record = {
        "flags": {"finetune": finetune, "seed": seed, "lr": 0.1, "output_dir": str(folder), **dict(flags)},
        "data": {"train": {"samples": 9}},
        "global_batch": global_batch,
    }
    if earlier is not None:
        record["earlier"] = [{"flags": {"finetune": earlier}}, {"flags": {"finetune": None}}]
    (folder / "run.json").write_text(json.dumps(record))
    metrics = metrics or {"ap_macro": score, "ap_micro": 0.5, "f1_macro": 0.25, "f1_micro": 0.125}
    (folder / f"eval_{split}.json").write_text(json.dumps({"epoch": 3, **metrics}))
    return folder


def test_finetuned_runs_are_compared_best_first_with_means_over_seeds(tmp_path, monkeypatch, capsys):
    folders = [
        finetuned(tmp_path / f"{name}{seed}", score, seed, start)
        for name, start, scores in (("random", "", (0.2, 0.4)), ("tuned", "pre.pth", (0.6, 0.5)))
        for seed, score in enumerate(scores)
    ]
    monkeypatch.setattr(
        sys, "argv", ["compare_runs", "--runs", *map(str, folders), "--output", str(tmp_path / "t.csv")]
    )
    importlib.import_module("analysis.compare_runs").main()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if line
    ]
    assert [row[0] for row in rows[2:6]] == ["tuned0", "tuned1", "random1", "random0"]
    assert rows[0][:5] == ["run", "start", "training samples", "epoch", "AP macro"] and rows[2][1:5] == [
        "pre.pth",
        "9",
        "3",
        "0.6000",
    ]
    assert rows[8][:4] == ["2 seeds", "pre.pth", "9", "0.5500 ± 0.0707"] and rows[9][1:4] == [
        "random",
        "9",
        "0.3000 ± 0.1414",
    ]
    assert (tmp_path / "t.csv").read_text().splitlines()[1].startswith("tuned0,pre.pth,9,3,0.6")


def kinds_of(*folders):
    return [rows["run"].to_list() for _, rows in group_by_kind([read_run(folder, "test") for folder in folders])]


def test_runs_of_one_kind_differ_in_seeds_or_in_how_they_were_computed(tmp_path):
    alone = finetuned(tmp_path / "alone", 0.5, flags={"device": "cpu", "accum_iter": 2, "port": None})
    ranks = finetuned(tmp_path / "ranks", 0.4, seed=1, flags={"device": "cuda", "accum_iter": 1, "walltime": 60})
    more = finetuned(tmp_path / "more", 0.6, flags={"accum_iter": 2}, global_batch=16)
    decay = finetuned(tmp_path / "decay", 0.1, flags={"layer_decay": 1.0})
    assert kinds_of(alone, ranks, more, decay) == [["more"], ["alone", "ranks"], ["decay"]]


def test_a_continued_run_started_from_what_its_first_part_did(tmp_path):
    row, kind = read_run(finetuned(tmp_path / "run", 0.5, finetune=None, earlier="pre.pth"), "test")
    assert row["start"] == kind["finetune"] == "pre.pth"


def test_free_flags_are_those_of_where_and_how_and_of_no_continued_run():
    parser = build_parser()
    groups = {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}
    assert set(FREE) <= set(vars(parser.parse_args([])))
    assert set(FREE) & {*SAME_TRAINING, *SAME_RUN} == {"seed", "draw_seed"}
    assert groups["run"] | groups["speed and memory"] | groups["distributed"] <= {*FREE, "start_epoch"}


def test_kinds_are_described_by_what_differs():
    kinds = [
        {"finetune": "/x/a/c_64.pth", "lr": 0.1, "mean": [1.0, 2.0]},
        {"finetune": "", "lr": 0.1, "mean": [1.0, 2.5]},
        {"finetune": "/x/b/c_64.pth", "lr": 0.1, "mean": [1.0, 2.0], "clip_grad": 1.0},
    ]
    assert describe_kinds(kinds) == [
        "from a/c_64.pth, mean 1 2, clip_grad unset",
        "random initialisation, mean 1 2.5, clip_grad unset",
        "from b/c_64.pth, mean 1 2, clip_grad 1",
    ]


def test_dot_plot_has_a_row_for_each_kind_the_best_on_top(tmp_path, monkeypatch, capsys):
    folders = [
        finetuned(tmp_path / f"{name}{seed}", score, seed, start)
        for name, start, scores in (("random", "", (0.2, 0.4)), ("tuned", "x/pre.pth", (0.6, 0.5)))
        for seed, score in enumerate(scores)
    ]
    figure = draw_runs([read_run(folder, "test") for folder in folders])
    first = figure.axes[0]
    assert [axis.get_xlabel() for axis in figure.axes] == ["AP macro", "AP micro", "F1 macro", "F1 micro"]
    assert [label.get_text() for label in first.get_yticklabels()] == [
        "from pre.pth",
        "random initialisation",
    ] and first.yaxis_inverted()
    assert [(line.get_xdata().tolist(), line.get_ydata()[0]) for line in first.lines[::2]] == [
        ([0.6, 0.5], 0),
        ([0.2, 0.4], 1),
    ]
    assert [line.get_xdata()[0] for line in first.lines[1::2]] == pytest.approx([0.55, 0.3])
    assert run(monkeypatch, capsys, "compare_runs", "--runs", *folders, "--figure", tmp_path / "d.png")[0] == 0
    assert both(tmp_path / "d.png")
    one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", *folders, "--figure", "d.gif"), "--figure d.gif")
    one_line_about(
        run(monkeypatch, capsys, "compare_runs", "--runs", *folders, "--output", tmp_path / "no/t.csv"),
        "--output",
        "No such file",
    )


def test_an_undefined_metric_is_no_dot_and_no_mean(tmp_path, monkeypatch, capsys):
    folders = [
        finetuned(tmp_path / f"r{seed}", None, seed, accuracy=0.5, precision=0.5, recall=recall, f1=None)
        for seed, recall in enumerate((0.25, None))
    ]
    axes = draw_runs([read_run(folder, "test") for folder in folders]).axes
    assert [np.isfinite(axis.lines[0].get_xdata()).sum() for axis in axes] == [2, 2, 1, 0]
    assert np.isnan(axes[2].lines[1].get_xdata()).all() and [
        label.get_text() for label in axes[0].get_yticklabels()
    ] == ["2 seeds"]
    monkeypatch.setattr(sys, "argv", ["compare_runs", "--runs", *map(str, folders)])
    importlib.import_module("analysis.compare_runs").main()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if line
    ]
    assert [row[4:] for row in rows[2:4]] == [["0.5000", "0.5000", "0.2500", "–"], ["0.5000", "0.5000", "–", "–"]]
    assert rows[-1][3:] == ["0.5000 ± 0.0000", "0.5000 ± 0.0000", "–", "–"]


def test_runs_that_cannot_be_compared_are_one_line(tmp_path, monkeypatch, capsys):
    one = finetuned(tmp_path / "one", 0.5)
    flood = finetuned(tmp_path / "flood", None, accuracy=0.5, precision=0.5, recall=None, f1=None)
    other = tmp_path / "other"
    other.mkdir()
    one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", one, flood), "apart")
    one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", one, other), "run.json: does not exist")
    one_line_about(
        run(monkeypatch, capsys, "compare_runs", "--runs", one, "--split", "val"), "eval_val.json: does not exist"
    )
    (one / "eval_test.json").write_text("{")
    one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", one), "eval_test.json: not JSON")
    (one / "eval_test.json").write_text("{}")
    one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", one), "not a run of main_finetune.py")
    for damaged in (
        "[]",
        "3",
        '{"epoch": 1, "ap_macro": "x", "ap_micro": 1, "f1_macro": 1, "f1_micro": 1}',
        "[" * 100_000,
    ):
        (one / "eval_test.json").write_text(damaged)
        one_line_about(run(monkeypatch, capsys, "compare_runs", "--runs", one), str(one))
    assert run(monkeypatch, capsys, "compare_runs", "--runs", flood)[0] == 0
