# SPDX-License-Identifier: MIT
"""The programs that start from finetuning logs: tables, training times, and charts by the values of their lines."""

import csv

import numpy as np
import pytest

from analysis import exponential_2_n_epoch, logfile_reader, logfile_time_process, train_data_sampling
from analysis.logfile_time_process import elapsed, shown, training_time
from analysis.result_charts import metrics_to_draw, octaves, panel_grid, spread
from analysis.runs import Result, lines_of
from tests.helpers.result_logs import FLOOD_SCORES, PIPE, SCORES, clocked, ours, released, run_folder, written
from tests.helpers.runs import refusal


def rows_of(text):
    """The cells of the pipe tables in a text, headers included."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def printed(program, capsys, *flags):
    program.main([str(flag) for flag in flags])
    return capsys.readouterr().out


# ---- Logfile_reader ------------------------------------------------------------------------------


def test_results_are_tabulated_best_first_and_accounted_for(tmp_path, capsys):
    written(tmp_path, "logs/a.log", ours({**SCORES, "ap_macro": 0.5, "ap_micro": 0.9}, seed=1, train_fraction=0.125))
    written(tmp_path, "logs/b.log", released(PIPE))
    written(tmp_path, "logs/none.log", ours({**SCORES, "ap_macro": None}))
    written(tmp_path, "logs/cut.log", clocked('flags: {"seed\nEpoch [0/2]'))
    run_folder(tmp_path / "runs/flood", FLOOD_SCORES)
    out = printed(logfile_reader, capsys, tmp_path, "--output", tmp_path / "t.csv")
    rows = rows_of(out)
    assert rows[0][:8] == ["log", "start", "pretraining epochs", "share", "seed", "epoch", "split", "AP macro"]
    assert [row[:8] for row in rows[1:4]] == [
        ["b.log", "pretrained", "64", "–", "3", "37", "–", "0.7141"],
        ["a.log", "random", "–", "12.5 %", "1", "1", "test", "0.5000"],
        ["none.log", "random", "–", "100 %", "0", "1", "test", "–"],
    ]
    assert rows[4][-4:] == ["accuracy", "precision", "recall", "F1"]
    assert rows[5] == ["flood", "random", "–", "100 %", "0", "7", "test", "0.9100", "0.8200", "0.7300", "0.7700"]
    assert out.splitlines()[-2:] == [
        "5 logs read: 4 results; 1 left out; malformed lines: 1",
        f"- {tmp_path}/logs/cut.log: no Best Results Summary: not finished",
    ]
    by_micro = rows_of(printed(logfile_reader, capsys, tmp_path / "logs", "--sort_by", "ap_micro"))
    assert [row[0] for row in by_micro[1:]] == ["a.log", "b.log", "none.log"]
    with open(tmp_path / "t.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["accuracy"] for row in table] == ["", "", "", "0.91"]
    assert [row["ap_macro"] for row in table] == ["0.7141", "0.5", "", ""]
    assert rows_of(printed(logfile_reader, capsys, tmp_path / "t.csv"))[1:4] == [[*row] for row in rows[1:4]]


def test_what_names_alone_know_is_taken_from_them(tmp_path, capsys):
    written(tmp_path, "finetune_16_50p.log", released(PIPE))
    written(tmp_path, "random_16_25p.log", released(PIPE, "Namespace(finetune='')"))
    flags = [tmp_path, "--epochs_from", r"_(\d+)_", "--share_from", r"(\d+)p\.log"]
    assert [row[:4] for row in rows_of(printed(logfile_reader, capsys, *flags))[1:]] == [
        ["finetune_16_50p.log", "pretrained", "16", "50 %"],
        ["random_16_25p.log", "random", "–", "25 %"],
    ]
    assert "--share_from (.)p: finds '0' in" in refusal(logfile_reader.main, [tmp_path, "--share_from", "(.)p"], capsys)
    assert "has 0 groups" in refusal(logfile_reader.main, [tmp_path, "--share_from", "p"], capsys)
    assert "no regular expression" in refusal(logfile_reader.main, [tmp_path, "--epochs_from", "("], capsys)


def test_no_result_is_one_line(tmp_path, capsys):
    for words in (f"{tmp_path}: holds no log of a finetuning; name", "no result in 1 logs"):
        assert words in refusal(logfile_reader.main, [tmp_path], capsys)
        cut = written(tmp_path, "cut.log", clocked("Epoch [0/2]"))
    good = written(tmp_path, "good/a.log", ours())
    for flags, words in (
        ([cut], f"no result in 1 logs: {cut} (no Best Results Summary: not finished); name"),
        ([tmp_path / "nowhere"], "nowhere: does not exist; name"),
        (
            [good, "--output", tmp_path / "none/t.csv"],
            f"--output {tmp_path}/none/t.csv: No such file or directory; name",
        ),
        ([good, "--sort_by", "beauty"], "--sort_by"),
        ([], "logs"),
    ):
        assert words in refusal(logfile_reader.main, flags, capsys)


# ---- Logfile_time_process ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clocks, hours",
    (
        ((10, 12.5), 2.5),
        ((23, 1), 2),
        ((10, 23, 11, 23, 10), 48),
        ((10, 11, 10.9, 12), 2),
        ((2.5, 2.99, 2.0, 2.5, 3), 0.5),
        ((23.9999, 0.0001, 23.9999, 1), 1.0001),
        ((5,), 0),
    ),
)
def test_clocks_pass_midnight_and_step_back(clocks, hours):
    assert elapsed([clock * 3600 for clock in clocks]) == pytest.approx(hours * 3600)


FINISHED = clocked("flags: {}\nEpoch [0/2]\nTraining time 1:00:10\nBest Results Summary: Epoch 1")
KILLED = clocked("flags: {}\nEpoch [0/2]\nEpoch [1/2]", start="23:30:00.0", step=1800)
MAE = clocked(f"job dir: /x\nNamespace(a=1,\nb=2)\nEpoch: [0]  [0/9]\n{'x' * 9}")  # job dir and flags begin one part
RANK_1 = "\n[1,1]<stdout>:[09:00:00.0] Training time 9:00:00\n"


@pytest.mark.parametrize(
    "text, seconds, way",
    (
        (FINISHED, 3610, "Training time"),
        (clocked("Training time 1 day, 2:03:04"), 93784, "Training time"),
        (clocked("Training time 2 days, 2:03:04"), 93784 + 86400, "Training time"),
        (FINISHED + FINISHED, 7220, "sum of 2 Training times"),
        (KILLED, 3600, "first to last clock"),
        (KILLED + KILLED, 7200, "sum of 2 parts, first to last clock"),  # without the pause
        (KILLED + FINISHED, 7210, "Training time + first to last clock"),
        (MAE + MAE, 8, "sum of 2 parts, first to last clock"),
        (KILLED.replace("\n", RANK_1), 3600, "first to last clock"),
    ),
)
def test_training_times_are_summed_over_the_parts_of_a_log(text, seconds, way):
    assert training_time(lines_of(text)) == (seconds, way)


def test_training_times_of_a_folder(tmp_path, capsys):
    written(tmp_path, "a.log", released(PIPE))
    written(tmp_path, "b.log", clocked('flags: {"mask_ratio": 0.5}\nEpoch [0/2]', step=100 * 3600 / 10))
    written(tmp_path, "none.log", "Epoch [0/2]\n[10:00:00] one clock\n")
    written(tmp_path, "README", "a text\n")
    run_folder(tmp_path / "run")
    out = printed(logfile_time_process, capsys, tmp_path, "--gpus", 8, "--output", tmp_path / "t.csv")
    rows = rows_of(out)
    assert rows[1:] == [
        [f"{tmp_path}/a.log", "3:10:20", "3.172", "25.378", "Training time"],
        [f"{tmp_path}/b.log", "10:00:00", "10.000", "80.000", "first to last clock"],
    ]
    assert out.splitlines()[-3:] == [
        "Total of 2 logs: 13:10:20, 13.17 hours; on 8 GPUs 105.38 GPU-hours",
        "1 logs without a time:",
        f"- {tmp_path}/none.log: neither a Training time nor clocks",
    ]
    row = (tmp_path / "t.csv").read_text().splitlines()[1]
    assert row == f"11420,{tmp_path}/a.log,3:10:20,3.172,25.378,Training time"
    assert "GPU" not in printed(logfile_time_process, capsys, tmp_path / "a.log")
    assert shown(100 * 3600 + 61.6) == "100:01:02"
    assert "--gpus 0: must be at least 1" in refusal(logfile_time_process.main, [tmp_path, "--gpus", 0], capsys)
    line = refusal(logfile_time_process.main, [tmp_path / "run", tmp_path / "README"], capsys)
    assert "no training time in 2 logs" in line and "a run folder" in line and "holds no line" in line


# ---- Charts --------------------------------------------------------------------------------------


def result(score, start="pretrained", epochs=None, share=1.0, split="test"):
    """A Result whose four drawn metrics are score, + 0.1, + 0.2, + 0.3."""
    metrics = dict(
        zip(("ap_macro", "ap_micro", "f1_macro", "f1_micro"), (score, score + 0.1, score + 0.2, score + 0.3))
    )
    return Result("a.log", start, pretraining_epochs=epochs, share=share, split=split, metrics=metrics)


def lines_by_label(axis):
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def whiskers(axis):
    """[(x, low, high)] of the error bars."""
    return sorted(
        (float(segment[0, 0]), *sorted(map(float, segment[:, 1])))
        for container in axis.containers
        for segment in container.lines[2][0].get_segments()
    )


def test_spread_leaves_missing_values_out():
    results = [result(0.2), result(0.4), Result("x", metrics={"ap_macro": None})]
    found = spread(results, "ap_macro")
    assert (found.mean, found.low, found.high, found.runs) == (pytest.approx(0.3), 0.2, 0.4, 2)
    assert str(found) == "0.3000 (0.2000 to 0.4000)" and spread(results[2:], "ap_macro") is None


def test_what_is_drawn_by_epochs():
    results = [
        result(0.5, epochs=16),
        result(0.3, epochs=16),
        result(0.6, epochs=64),
        result(0.2, "random"),
        result(0.1, "random"),
        result(0.9, start=None),
    ]
    series, others = exponential_2_n_epoch.arrange(results)
    assert others == results[5:]
    figure = exponential_2_n_epoch.draw_epochs(series, metrics_to_draw(results), (40, 600))
    assert [axis.get_ylabel() for axis in figure.axes] == ["AP macro", "AP micro", "F1 macro", "F1 micro"]
    for k, axis in enumerate(figure.axes):
        lines = lines_by_label(axis)
        assert list(lines) == ["pretrained", "random initialisation"]
        assert np.allclose(lines["pretrained"].get_xydata(), [[16, 0.4 + 0.1 * k], [64, 0.6 + 0.1 * k]])
        assert np.allclose(lines["random initialisation"].get_ydata(), 0.15 + 0.1 * k)
        assert np.allclose(whiskers(axis), [[16, 0.3 + 0.1 * k, 0.5 + 0.1 * k]])
        assert axis.get_xscale() == "log"
        assert [text.get_text() for text in axis.texts] == ["epoch 40"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["64", "32", "16"]
    assert figure.texts[-1].get_text() == "mean of 1 to 2 runs, with their minimum and maximum"


def test_shares_are_lines_of_their_own():
    results = [result(0.5, epochs=16), result(0.4, epochs=16, share=0.25), result(0.1, "random", share=0.25)]
    figure = exponential_2_n_epoch.draw_epochs(exponential_2_n_epoch.arrange(results)[0], metrics_to_draw(results), ())
    lines = lines_by_label(figure.axes[0])
    assert list(lines) == [
        "pretrained, 100 % of the labels",
        "pretrained, 25 % of the labels",
        "random initialisation, 25 % of the labels",
    ]
    pretrained, random = (lines[f"{start}, 25 % of the labels"] for start in ("pretrained", "random initialisation"))
    assert pretrained.get_color() == random.get_color()
    alone = exponential_2_n_epoch.draw_epochs(
        exponential_2_n_epoch.arrange(results[1:])[0], metrics_to_draw(results), ()
    )
    assert list(lines_by_label(alone.axes[0])) == ["pretrained", "random initialisation"]
    assert alone.texts[-1].get_text() == "25 % of the labels, one run each"


def test_chart_by_epochs_of_logs_and_of_floods(tmp_path, capsys):
    written(tmp_path, "a.log", released(PIPE))
    written(tmp_path, "b.log", ours(output_dir="b"))
    out = printed(exponential_2_n_epoch, capsys, tmp_path, "--output", tmp_path / "e.png")
    assert rows_of(out)[1:] == [
        ["random initialisation", "100 %", "1", "0.7141", "0.8391", "0.6443", "0.7384"],
        ["64", "–", "1", "0.7141", "0.8391", "0.6443", "0.7384"],
    ]
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG") and "AP macro" in (tmp_path / "e.svg").read_text()
    assert "epochs of pretraining" in refusal(
        exponential_2_n_epoch.main, [tmp_path / "b.log", "--output", tmp_path / "x.png"], capsys
    )
    flood = run_folder(tmp_path / "flood", FLOOD_SCORES, finetune="p/checkpoint_8.pth")
    line = refusal(exponential_2_n_epoch.main, [tmp_path, "--output", tmp_path / "x.png"], capsys)
    assert "holds many labels, other logs hold floods" in line
    out = printed(exponential_2_n_epoch, capsys, flood, "--output", tmp_path / "f.svg")
    assert rows_of(out) == [
        ["pretraining epochs", "share", "runs", "accuracy", "F1"],
        ["8", "100 %", "1", "0.9100", "0.7700"],
    ]
    assert not (tmp_path / "x.png").exists()


def test_results_of_several_splits_are_not_mixed():
    with pytest.raises(ValueError, match="holds split test, other logs hold split val"):
        metrics_to_draw([result(0.5), result(0.5, split="val")])
    assert metrics_to_draw([result(0.5), result(0.5, split=None)])


def test_what_is_drawn_by_share():
    results = [
        result(0.5, epochs=64),
        result(0.3, epochs=64, share=0.25),
        result(0.5, epochs=64, share=0.25),
        result(0.4, epochs=16),
        result(0.2, "random", share=0.25),
    ]
    series = train_data_sampling.series_of(results)
    overlay = train_data_sampling.series_of(train_data_sampling.published())
    figure = train_data_sampling.draw_shares(series, overlay, metrics_to_draw(results))
    for k, axis in enumerate(figure.axes):
        lines = lines_by_label(axis)
        assert list(lines) == [
            "pretrained, 64 epochs",
            "pretrained, 16 epochs",
            "random initialisation",
            "published: pretrained, 64 epochs",
            "published: random initialisation",
        ]
        assert np.allclose(lines["pretrained, 64 epochs"].get_xydata(), [[1, 0.5 + 0.1 * k], [0.25, 0.4 + 0.1 * k]])
        assert np.allclose(whiskers(axis), [[0.25, 0.3 + 0.1 * k, 0.5 + 0.1 * k]])
        for label, line in lines.items():
            hollow = line.get_markerfacecolor() == "white"
            assert hollow == (line.get_linestyle() == "--") == label.startswith("published")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["100 %", "50 %", "25 %", "12.5 %"]
    macro = [lines_by_label(axis)["published: random initialisation"].get_ydata().tolist() for axis in figure.axes]
    assert macro[0] == [0.6107, 0.5781, 0.5545, 0.5268] and macro[3] == [0.6750, 0.6509, 0.6233, 0.5977]


def test_ticks_that_would_touch_are_left_out():
    axis = next(iter(panel_grid({"f1": "F1"})[1].values()))
    octaves(axis, {1.0, 0.125, 0.1}, "{:g}".format)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "0.125"]
    assert axis.get_xlim()[0] < 0.1 and axis.get_xlim()[1] > 1


def test_chart_by_share_of_logs_and_of_what_is_published(tmp_path, capsys):
    out = printed(train_data_sampling, capsys, "--published", "--output", tmp_path / "p.svg")
    assert rows_of(out)[1] == ["published: pretrained, 64 epochs", "100 %", "1", "0.7141", "0.8391", "0.6443", "0.7384"]
    assert len(rows_of(out)) == 9 and "published: random initialisation" in (tmp_path / "p.svg").read_text()
    written(tmp_path, "a_50p.log", released(PIPE))
    written(tmp_path, "b.log", released(PIPE))
    flags = [tmp_path, "--share_from", r"_(\d+)p", "--output", tmp_path / "s.png"]
    out = printed(train_data_sampling, capsys, *flags)
    assert rows_of(out)[1:] == [["pretrained, 64 epochs", "50 %", "1", "0.7141", "0.8391", "0.6443", "0.7384"]]
    assert f"- {tmp_path}/b.log" in out.splitlines()
    assert "logs: none are named" in refusal(train_data_sampling.main, ["--output", tmp_path / "x.png"], capsys)
    assert "share of the labels; use" in refusal(
        train_data_sampling.main, [tmp_path, "--output", tmp_path / "x.png"], capsys
    )
    assert "must end in .png or .svg" in refusal(
        train_data_sampling.main, ["--published", "--output", tmp_path / "x.pdf"], capsys
    )
    refusal(train_data_sampling.main, ["--published"], capsys)
