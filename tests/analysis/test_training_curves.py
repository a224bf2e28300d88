# SPDX-License-Identifier: MIT
"""Training curves: what they are read from, what is left out, and what is drawn."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from analysis.exponential_2_n_training import draw_curves, main, names_of, read_curve
from analysis.programs import short_names
from tests.helpers.runs import argv, refusal


def log_text(losses, rate=0.5):
    return "".join(
        json.dumps({"train_loss": loss, "train_lr": rate, "epoch": epoch}) + "\n" for epoch, loss in enumerate(losses)
    )


def write_events(folder, points, suffix="", purge=None):
    """Events as SummaryWriter writes them: points (tag, step, value); purge: the step that a continued run goes on from."""
    writer = EventFileWriter(str(folder), filename_suffix=suffix)
    if purge is not None:
        writer.add_event(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))
    for tag, step, value in points:
        writer.add_event(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))
    writer.close()


def test_of_a_log_the_later_line_counts_and_damaged_lines_are_counted(tmp_path):
    path = tmp_path / "anything"
    damaged = [
        b'{"epoch": 7, "train_loss": NaN}',
        b"\xff\x00",
        b"[1]",
        b'{"epoch": -1, "train_loss": 1}',
        b'{"train_loss": 1}',
        b"[" * 100_000,
        b'{"epoch": 9, "train_l',
    ]
    path.write_bytes(log_text([3.0, 9.0]).encode() + b'\n{"epoch": 1, "train_loss": 2.0}\n' + b"\n".join(damaged))
    curve, skipped = read_curve(path)
    assert curve["loss"].to_dict() == {1: 3.0, 2: 2.0} and skipped == len(damaged)
    assert curve["lr"].iloc[0] == 0.5 and math.isnan(curve["lr"].iloc[1])


def test_events_are_averaged_over_each_epoch_and_a_continued_run_replaces_what_it_repeats(tmp_path):
    write_events(
        tmp_path,
        [("train_loss", 500, 4.0), ("train_loss", 1000, 2.0), ("train_loss", 1500, 9.0), ("test_loss", 1000, 7.0)]
        + [("lr", 500, 0.1), ("lr", 1000, 0.2)],
        ".0",
    )
    write_events(
        tmp_path,
        [("train_loss", 1500, 1.0), ("train_loss", 2000, 0.5), ("lr", 2000, 0.3), ("train_loss", 2500, math.nan)],
        ".1",
        purge=1001,
    )
    curve, skipped = read_curve(tmp_path)
    assert curve["loss"].to_dict() == {1: 3.0, 2: 0.75} and skipped == 1
    assert curve["lr"].to_list() == pytest.approx([0.2, 0.3])


def test_an_events_file_is_known_by_its_content_and_read_alone(tmp_path):
    for suffix, loss in ((".0", 1.0), (".1", 2.0)):
        write_events(tmp_path, [("train_loss", 1000, loss)], suffix)
    last = sorted(tmp_path.iterdir())[-1].rename(tmp_path / "copy")
    assert read_curve(last)[0]["loss"].to_dict() == {1: 2.0}


@pytest.mark.parametrize(
    "steps, epochs", (((0, 1000, 2000), [1, 2, 3]), ((1000, 2000, 3000), [1, 2, 3]), ((0, 400, 999, 1000), [1, 2]))
)
def test_a_csv_of_tensorboard_counts_epochs_from_the_end_or_the_beginning(tmp_path, steps, epochs):
    path = tmp_path / "run-x-tag-train_loss.csv"
    path.write_text(
        "Wall time,Step,Value\n" + "".join(f"1.7e9,{step},{step / 10}\n" for step in steps) + "1.7e9,5000\n"
    )
    curve, skipped = read_curve(path)
    assert curve.index.to_list() == epochs and skipped == 1 and curve["lr"].isna().all()
    assert curve["loss"].iloc[0] == pytest.approx(
        np.mean([step / 10 for step in steps if step < 1000 or step == steps[0]])
    )


def test_a_folder_is_read_by_its_log_or_else_by_the_events_in_it(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    write_events(tmp_path / "tensorboard", [("loss", 1000, 5.0)])
    assert read_curve(tmp_path)[0]["loss"].to_dict() == {1: 5.0}
    (tmp_path / "log.txt").write_text(log_text([4.0]))
    assert read_curve(tmp_path)[0]["loss"].to_dict() == {1: 4.0}


def test_runs_are_called_by_their_folders_as_far_as_these_differ(tmp_path):
    for place in ("a/run", "b/run", "b/run/tensorboard", "c"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
    assert names_of([tmp_path / "c", tmp_path / "b/run/log.txt", tmp_path / "x/tag.csv"], None) == ["c", "run", "tag"]
    assert names_of([tmp_path / "a/run", tmp_path / "b/run/tensorboard"], None) == ["a/run", "b/run"]
    assert names_of(["p", "q"], ["one", "two"]) == ["one", "two"]
    assert short_names(["/x", "/x"]) == ["x", "x"]
    with pytest.raises(ValueError, match="would be called run"):
        names_of([tmp_path / "a/run", tmp_path / "a/run/log.txt"], None)


def curve_of(last, rate=0.001):
    epochs = np.arange(1, last + 1)
    return pd.DataFrame({"loss": 1 / epochs, "lr": rate}, index=epochs)


def test_figure_has_ticks_at_powers_of_two_marks_within_and_a_panel_for_known_rates():
    figure = draw_curves({"a": curve_of(100), "b": curve_of(3, math.nan)}, log2=True, marks=(40, 600))
    loss, rate = figure.axes
    assert [line.get_label() for line in loss.lines[:2]] == ["a", "b"]
    assert list(loss.lines[0].get_ydata()[:2]) == [1, 0.5]
    assert [int(tick) for tick in loss.get_xticks()] == [1, 2, 4, 8, 16, 32, 64, 128] and loss.get_xscale() == "log"
    assert [line.get_xdata()[0] for line in rate.lines[2:]] == [40]
    assert [text.get_text() for text in loss.texts] == ["epoch 40"]
    low, high = rate.get_ylim()
    assert low == 0 and high > 0.001
    (alone,) = draw_curves({"b": curve_of(3, math.nan)}).axes
    assert alone.get_xscale() == "linear" and alone.get_xlabel() == "epoch"


def test_curves_that_coincide_have_markers_at_different_epochs():
    for log2 in (False, True):
        lines = draw_curves({name: curve_of(256) for name in "ab"}, log2).axes[0].lines
        first, other = (set(line.get_markevery()) for line in lines)
        assert {index for index in first & other if index > 3} == {255} and len(first) > 7
        assert lines[0].get_marker() != lines[1].get_marker()
    assert {2**n - 1 for n in range(9)} == first


def test_program_writes_both_figures_and_the_table_and_says_what_it_left_out(tmp_path, capsys):
    ours, theirs, table = tmp_path / "ours", tmp_path / "theirs.csv", tmp_path / "t.csv"
    ours.mkdir()
    (ours / "log.txt").write_text(log_text([3.0, 2.0]) + "{")
    theirs.write_text("Wall time,Step,Value\n1,1000,4\n")
    main(argv(ours, theirs, "--mark --output", tmp_path / "l.svg", "--table", table))
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"warning: {ours}: 1 of its entries" in warning
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert "training loss" in (tmp_path / "l.svg").read_text()
    assert table.read_text().splitlines() == ["run,epoch,loss,lr", "ours,1,3.0,0.5", "ours,2,2.0,0.5", "theirs,1,4.0,"]


def test_what_cannot_be_drawn_is_one_line_and_nothing_is_written(tmp_path, capsys):
    good, bad, events = tmp_path / "log.txt", tmp_path / "bad.txt", tmp_path / "events"
    good.write_text(log_text([1.0]))
    bad.write_text("nothing\n{}\n")
    events.mkdir()
    write_events(events, [("psnr", 1000, 1.0)])
    (tmp_path / "empty").mkdir()
    before = set(tmp_path.rglob("*"))
    figure = tmp_path / "l.png"
    for flags, *words in (
        ([bad, "--output", figure], bad, "no epoch", "2 of its lines"),
        ([tmp_path / "no", "--output", figure], tmp_path / "no", "No such file"),
        ([tmp_path / "empty", "--output", figure], "neither log.txt nor events"),
        ([events, "--output", figure], events, "no train_loss, but psnr"),
        ([good, "--labels", "a", "b", "--output", figure], "--labels: 2 for 1"),
        ([good, "--output", figure, "--mark", "x"], "--mark"),
        ([good, "--output", tmp_path / "l.pdf"], "l.pdf", ".png or .svg"),
        ([good, "--output", tmp_path / "no/l.png"], "--output", "No such file"),
    ):
        line = refusal(main, flags, capsys)
        assert all(str(word) in line for word in ("exponential_2_n_training: error: ", *words)), line
    assert set(tmp_path.rglob("*")) == before
    line = refusal(main, [good, "--output", figure, "--table", tmp_path / "no/t.csv"], capsys)
    assert "--table" in line and "No such file" in line
