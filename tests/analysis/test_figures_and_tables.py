# SPDX-License-Identifier: MIT
"""The analysis programs: what they read, what they refuse, and figures by the values of their pixels."""

import json
import warnings

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from analysis import compare_reconstructions, compare_runs, overview_figure, weight_map
from analysis.compare_reconstructions import draw_comparison, read_reconstructions, titled
from analysis.compare_runs import FREE, describe_kinds, draw_runs, group_by_kind, read_run
from analysis.figures import COVERED, image_grid, write_figure
from analysis.weight_map import draw_weights, read_patch
from finetune_flags import build_parser
from main_finetune import SAME_RUN
from models_mixmim import mixmim_tiny
from sarwmix.bigearthnetv2 import BigEarthNetv2
from tests.helpers.runs import refusal
from util.quicklook import HIDDEN, RANGES, draw_reconstructions, false_colour, grey, new_figure, pixels
from util.training import SAME_TRAINING


@pytest.fixture
def run(capsys):
    """run(program, *flags) → what it prints."""

    def run(program, *flags):
        program.main([str(flag) for flag in flags])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(program, flags, *words): the program ends with one line that has these words, and writes no figure."""

    def refused(program, flags, *words):
        line = refusal(program.main, flags, capsys)
        assert all(str(word) in line for word in words), line
        assert not list(tmp_path.glob("*x.*"))

    return refused


def table(text):
    """The cells of all lines of a text that are not empty."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line]


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


# ---- weight_map, overview_figure -----------------------------------------------------------------


def test_weight_map_of_a_simulated_patch(tmp_path, run):
    run(weight_map, "--simulate", 1, "--output", tmp_path / "w.svg")
    assert both(tmp_path / "w.svg")


def test_weight_map_shows_both_channels_and_takes_no_data_for_the_mean(tmp_path):
    rng = np.random.default_rng(0)
    vh, vv = rng.normal(-20, 1, (128, 128)), rng.normal(-12, 1, (128, 128))
    vv[3, 4] = np.nan
    sar_db = read_patch(write_band(tmp_path / "vh.tif", vh), write_band(tmp_path / "vv.tif", vv))
    figure = draw_weights(sar_db)
    vv[3, 4] = BigEarthNetv2.MEAN[1]
    for row, channel, values in ((0, "VH", vh), (1, "VV", vv)):
        assert figure.axes[3 * row].get_ylabel() == channel
        shown, weight, clipped = (axis.images[0].get_array() for axis in figure.axes[3 * row : 3 * row + 3])
        np.testing.assert_allclose(shown, grey(values, channel), atol=1e-6)
        assert weight.argmin() == values.argmax()
        assert weight.max() == pytest.approx(np.e) and weight.min() == pytest.approx(1, abs=1e-3)
        assert (clipped <= weight + 1e-3).all() and (clipped < 1.001).sum() > 100


def test_weight_map_refuses_what_it_cannot_draw(tmp_path, refused):
    small, large = (write_band(tmp_path / f"{side}.tif", np.full((side, side), -15.0)) for side in (8, 9))
    for flags, *words in (
        (("--vh", "no.tif", "--vv", "no.tif"), "no.tif"),
        (("--vh", small, "--vv", large), large, "9×9", "8×8"),
        (("--vh", small), "--vv"),
        (("--simulate", 1, "--vh", small), "either"),
        (("--simulate", -1), "--simulate -1"),
        (("--simulate", "x"), "--simulate"),
        (("--simulate", 1, "--output", tmp_path / "x.pdf"), "x.pdf", ".png or .svg"),
    ):
        refused(weight_map, ("--output", tmp_path / "x.png", *flags), *words)


def test_overview_needs_a_checkpoint_and_draws_it(tmp_path, run, refused):
    model = mixmim_tiny().state_dict()
    for name, args in (
        ("c", {"model": "mixmim_tiny"}),
        ("giant", {"model": "mixmim_giant"}),
        ("256", {"model": "mixmim_tiny", "input_size": 256}),
    ):
        torch.save({"model": model, "args": args}, tmp_path / f"{name}.pth")
    run(overview_figure, "--checkpoint", tmp_path / "c.pth", "--output", tmp_path / "o.png")
    assert both(tmp_path / "o.png")
    for name, *words in (("no.pth", "no.pth"), ("giant.pth", "mixmim_giant"), ("256.pth", "input size 256")):
        refused(overview_figure, ("--checkpoint", tmp_path / name, "--output", tmp_path / "x.png"), name, *words)


# ---- compare_reconstructions, util.quicklook --------------------------------------------------


def saved(path, ids, title):
    images = np.full((len(ids), 2, 32, 32), -15.0, np.float32)
    np.savez(
        path,
        ids=ids,
        **{f"{title}/{part}": images for part in ("original", "predicted", "completed")},
        **{f"{title}/visible": np.ones((1, 1, 32, 32), np.float32)},
    )
    return path


def test_reconstructions_of_the_same_samples_are_compared(tmp_path, run):
    one, other = saved(tmp_path / "1.npz", ["p", "q"], "run/a"), saved(tmp_path / "2.npz", ["p", "q"], "run/b")
    names, results = read_reconstructions([one, other])
    assert names == ["p", "q"] and list(results) == ["run/a", "run/b"]
    assert results["run/b"]["original"].shape == (2, 2, 32, 32)
    run(compare_reconstructions, "--input", one, other, "--samples", 1, "--output", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert all(f">{word}<".encode() in (tmp_path / "c.svg").read_bytes() for word in ("original", "visible", "run"))


def test_a_comparison_has_a_row_for_each_image_and_the_epochs_as_titles():
    original = np.full((2, 2, 32, 32), -15.0)
    result = {"original": original, "visible": np.zeros((1, 1, 32, 32))}
    result["visible"][..., 16:] = 1
    results = {f"r/checkpoint_{k}": {**result, "predicted": original + k} for k in (1, 4)}
    figure = draw_comparison(results)
    titles = ["original", "visible", "r\nafter 1 epoch", "r\nafter 4 epochs"]
    assert len(figure.axes) == 8 and [axis.get_title() for axis in figure.axes[:4]] == titles
    visible, _, last = (axis.images[0].get_array() for axis in figure.axes[5:])
    assert (visible[:, :16] == COVERED).all() and np.allclose(visible[:, 16:], false_colour(original[0])[:, 16:])
    assert np.allclose(last, false_colour(original[0] + 4))
    assert titled("run/best") == "run\nbest" and titled("checkpoint") == "checkpoint"


def test_checkpoints_of_one_name_are_told_apart_by_their_runs(tmp_path):
    for name in "ab":
        (tmp_path / name / "inference").mkdir(parents=True)
    paths = [saved(tmp_path / name / "inference/r.npz", ["p", "q"], "checkpoint_64") for name in "ab"]
    assert list(read_reconstructions(paths)[1]) == ["a/checkpoint_64", "b/checkpoint_64"]
    with pytest.raises(ValueError, match="name each once"):
        read_reconstructions([paths[0], paths[0]])


def test_reconstructions_that_cannot_be_drawn_are_one_line(tmp_path, refused):
    good, foreign = saved(tmp_path / "1.npz", ["p", "q"], "a"), saved(tmp_path / "3.npz", ["p", "r"], "c")
    arrays, whole = dict(np.load(good)), good.read_bytes()
    np.savez(tmp_path / "part.npz", **{name: array for name, array in arrays.items() if name != "a/predicted"})
    np.savez(tmp_path / "shape.npz", **{**arrays, "a/predicted": arrays["a/predicted"][:1]})
    np.savez(tmp_path / "ids.npz", ids=arrays["ids"])
    np.save(tmp_path / "array.npy", arrays["ids"])
    middle = whole.index(b"NUMPY", len(whole) // 2) + 200
    damaged = {
        "bad.npz": b"PK nothing",
        "empty.npz": b"",
        "cut.npz": whole[:-200],
        "flipped.npz": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    output = ("--output", tmp_path / "x.png")
    for name in ("part.npz", "shape.npz", "ids.npz", "array.npy", *damaged, "no.npz"):
        refused(compare_reconstructions, ("--input", tmp_path / name, *output), f"error: {tmp_path / name}: ")
    for flags, *words in (
        ((good, foreign, *output), "3.npz", "other samples"),
        ((good, "--samples", 2, *output), "--samples 2", "there are 2"),
        ((good, "--samples", -1, *output), "--samples -1"),
        ((good, "--output", tmp_path / "x.jpg"), "x.jpg", ".png or .svg"),
    ):
        refused(compare_reconstructions, ("--input", *flags), *words)


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


# ---- figures: pages and palettes -------------------------------------------------------------------


def test_a_page_of_images_has_square_panels_and_a_palette_if_asked_for(tmp_path):
    figure, axes = image_grid(2, 3, head=0.5, left=0.4, right=0.2)
    places = [axis.get_position() for axis in axes.flat]
    width, height = figure.get_size_inches()
    assert width == 8 and all(place.width * width == pytest.approx(place.height * height) for place in places)
    assert places[0].y1 * height == pytest.approx(height - 0.5) and places[3].y0 == pytest.approx(0, abs=1e-9)
    for axis, pixels_ in zip(axes.flat, np.random.default_rng(0).random((6, 32, 32, 3))):
        axis.imshow(pixels_)
    sizes = [write_figure(figure, tmp_path / "f.png", colours=colours)[0].stat().st_size for colours in (None, 256)]
    assert sizes[1] < sizes[0] and (tmp_path / "f.svg").exists()
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.mode == "P" and picture.width == 1600


# ---- compare_runs ---------------------------------------------------------------------------------


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


@pytest.fixture
def folders(tmp_path):
    """Two kinds of runs with two seeds each."""
    return [
        finetuned(tmp_path / f"{name}{seed}", score, seed, start)
        for name, start, scores in (("random", "", (0.2, 0.4)), ("tuned", "x/pre.pth", (0.6, 0.5)))
        for seed, score in enumerate(scores)
    ]


def test_finetuned_runs_are_compared_best_first_with_means_over_seeds(tmp_path, folders, run):
    rows = table(run(compare_runs, "--runs", *folders, "--output", tmp_path / "t.csv"))
    assert [row[0] for row in rows[2:6]] == ["tuned0", "tuned1", "random1", "random0"]
    assert rows[0][:5] == ["run", "start", "training samples", "epoch", "AP macro"]
    assert rows[2][1:5] == ["x/pre.pth", "9", "3", "0.6000"]
    assert rows[8][:4] == ["2 seeds", "x/pre.pth", "9", "0.5500 ± 0.0707"]
    assert rows[9][1:4] == ["random", "9", "0.3000 ± 0.1414"]
    assert (tmp_path / "t.csv").read_text().splitlines()[1].startswith("tuned0,x/pre.pth,9,3,0.6")


def test_runs_of_one_kind_differ_in_seeds_or_in_how_they_were_computed(tmp_path):
    alone = finetuned(tmp_path / "alone", 0.5, flags={"device": "cpu", "accum_iter": 2, "port": None})
    ranks = finetuned(tmp_path / "ranks", 0.4, seed=1, flags={"device": "cuda", "accum_iter": 1, "walltime": 60})
    more = finetuned(tmp_path / "more", 0.6, flags={"accum_iter": 2}, global_batch=16)
    decay = finetuned(tmp_path / "decay", 0.1, flags={"layer_decay": 1.0})
    kinds = group_by_kind([read_run(folder, "test") for folder in (alone, ranks, more, decay)])
    assert [rows["run"].to_list() for _, rows in kinds] == [["more"], ["alone", "ranks"], ["decay"]]


def test_a_continued_run_started_from_what_its_first_part_did(tmp_path):
    row, kind = read_run(finetuned(tmp_path / "run", 0.5, finetune=None, earlier="pre.pth"), "test")
    assert row["start"] == kind["finetune"] == "pre.pth"


def test_free_flags_are_those_of_where_and_how_and_of_no_continued_run():
    parser = build_parser()
    groups = {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}
    assert FREE <= set(vars(parser.parse_args([])))
    assert FREE & {*SAME_TRAINING, *SAME_RUN} == {"seed", "draw_seed"}
    free = groups["run"] | groups["device, speed and memory"] | groups["several GPUs or machines"]
    assert free <= {*FREE, "start_epoch", "finetune"} and "finetune" not in FREE


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


def test_dot_plot_has_a_row_for_each_kind_the_best_on_top(tmp_path, folders, run, refused):
    figure = draw_runs([read_run(folder, "test") for folder in folders])
    first = figure.axes[0]
    assert [axis.get_xlabel() for axis in figure.axes] == ["AP macro", "AP micro", "F1 macro", "F1 micro"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["from pre.pth", "random initialisation"]
    assert first.yaxis_inverted()
    dots = [(line.get_xdata().tolist(), line.get_ydata()[0]) for line in first.lines[::2]]
    assert dots == [([0.6, 0.5], 0), ([0.2, 0.4], 1)]
    assert [line.get_xdata()[0] for line in first.lines[1::2]] == pytest.approx([0.55, 0.3])
    run(compare_runs, "--runs", *folders, "--figure", tmp_path / "d.png")
    assert both(tmp_path / "d.png")
    refused(compare_runs, ("--runs", *folders, "--figure", "d.gif"), "--figure d.gif")
    refused(compare_runs, ("--runs", *folders, "--output", tmp_path / "no/t.csv"), "--output", "No such file")


def test_an_undefined_metric_is_no_dot_and_no_mean(tmp_path, run):
    folders = [
        finetuned(tmp_path / f"r{seed}", None, seed, accuracy=0.5, precision=0.5, recall=recall, f1=None)
        for seed, recall in enumerate((0.25, None))
    ]
    axes = draw_runs([read_run(folder, "test") for folder in folders]).axes
    assert [np.isfinite(axis.lines[0].get_xdata()).sum() for axis in axes] == [2, 2, 1, 0]
    assert np.isnan(axes[2].lines[1].get_xdata()).all()
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["2 seeds"]
    rows = table(run(compare_runs, "--runs", *folders))
    assert [row[4:] for row in rows[2:4]] == [["0.5000", "0.5000", "0.2500", "–"], ["0.5000", "0.5000", "–", "–"]]
    assert rows[-1][3:] == ["0.5000 ± 0.0000", "0.5000 ± 0.0000", "–", "–"]


def test_runs_that_cannot_be_compared_are_one_line(tmp_path, refused):
    one = finetuned(tmp_path / "one", 0.5)
    flood = finetuned(tmp_path / "flood", None, accuracy=0.5, precision=0.5, recall=None, f1=None)
    (tmp_path / "other").mkdir()
    refused(compare_runs, ("--runs", one, flood), "have no metrics in common; compare them separately")
    refused(compare_runs, ("--runs", one, tmp_path / "other"), "run.json: does not exist")
    refused(compare_runs, ("--runs", one, "--split", "val"), "eval_val.json: does not exist")
    for damaged, said in (
        ("{", "eval_test.json: not a JSON object"),
        ("{}", "not a run of main_finetune.py"),
        ("[]", "not a run of main_finetune.py"),
        ("3", "eval_test.json: not a JSON object"),
        ('{"epoch": 1, "ap_macro": "x", "ap_micro": 1, "f1_macro": 1, "f1_micro": 1}', "is not what main_finetune.py"),
        ("[" * 100_000, "eval_test.json: not a JSON object"),
    ):
        (one / "eval_test.json").write_text(damaged)
        refused(compare_runs, ("--runs", one), one, said)
