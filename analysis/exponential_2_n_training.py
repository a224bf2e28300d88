# SPDX-License-Identifier: MIT
"""Draw the training loss of one or several runs against the epoch, with the learning rate below it.

    python -m analysis.exponential_2_n_training output/pretrain --output loss.png
    python -m analysis.exponential_2_n_training ours/log.txt theirs/tensorboard third.csv --labels ours theirs third --log2 \\
        --output losses.png --table losses.csv

What an input is, its content says: a log.txt, of ours or of the released code; the folder of a run, which holds one; TensorBoard's
events, a file or a folder of files; or the CSV that TensorBoard exports of its loss. Of TensorBoard's points the mean over each
epoch is drawn, as log.txt has it. Epochs are counted from 1, as in the names of checkpoints.
"""

import json
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from analysis.compare_runs import short_names, write_table
from analysis.figures import COLOURS, MARKERS, bare, new_chart, write_figure
from common.command_line import Parser

LOG, EVENTS = "log.txt", "*tfevents*"
EVENTS_BEGIN, CSV_BEGINS = b"brain.Event:", b"Wall time,Step,Value"
PER_EPOCH = 1000  # TensorBoard's steps in an epoch
LOSS_TAGS, RATE_TAGS = ("train_loss", "loss"), ("lr",)
UNREADABLE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)  # what a damaged line can raise
FEW = 16  # epochs that can all have a marker
DASHES = ("-", "--", "-.", ":")


# ---- Reading: each gives (DataFrame with the epochs, from 1, as index, and columns loss and lr, NaN if unknown; entries left out)


def read_curve(path):
    """The curve of whatever `path` is. Raises ValueError, which names it, if that cannot be read or holds no epoch."""
    path = Path(path)
    try:
        curve, skipped = read_folder(path) if path.is_dir() else read_file(path)
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; name a log.txt, a folder of a run, or what TensorBoard wrote"
        ) from None
    if curve.empty:
        raise ValueError(
            f"{path}: no epoch is logged there{f', and {skipped} of its lines cannot be read' if skipped else ''}; "
            f"name a log.txt, a folder of a run, or what TensorBoard wrote"
        )
    return curve, skipped


def read_folder(path):
    """A run's folder, by its log.txt; or, without one, the events in it or in its tensorboard/."""
    if (path / LOG).is_file():
        return read_file(path / LOG)
    for folder in (path, path / "tensorboard"):
        if any(folder.glob(EVENTS)):
            return read_events(folder)
    raise ValueError(f"{path}: holds neither {LOG} nor events of TensorBoard; name the folder of a run")


def read_file(path):
    with open(path, "rb") as file:
        begin = file.read(64)
    if EVENTS_BEGIN in begin:
        with (
            TemporaryDirectory() as folder
        ):  # events are known by their name there, and the others of the run are not wanted
            (Path(folder) / "events.out.tfevents").symlink_to(path.resolve())
            return read_events(folder, path)
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        return read_csv(lines) if CSV_BEGINS in begin else read_log(lines)


def read_log(lines):
    """log.txt: a JSON object a line, with epoch (0-based), train_loss, and train_lr if known. A later line on an epoch replaces it."""
    epochs, skipped = {}, 0
    for line in filter(str.strip, lines):
        try:
            entry = json.loads(line)
            epochs[whole(entry["epoch"]) + 1] = (
                finite(entry["train_loss"]),
                finite(entry["train_lr"]) if "train_lr" in entry else math.nan,
            )
        except UNREADABLE:
            skipped += 1
    return pd.DataFrame.from_dict(epochs, orient="index", columns=["loss", "lr"]).sort_index(), skipped


def read_csv(lines):
    """A CSV of TensorBoard: wall time, step, value."""
    next(lines)
    points, skipped = {}, 0
    for line in filter(str.strip, lines):
        try:
            _, step, value = line.split(",")
            points[whole(step)] = finite(value)
        except UNREADABLE:
            skipped += 1
    return by_epoch(points, {}), skipped


def read_events(folder, named=None):
    """The events of a folder, all its files together; named: how to call it. What follows damage in a file is not there."""
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()  # 0: every point
    tags = events.Tags()[SCALARS]
    loss, rate = (next((tag for tag in choice if tag in tags), None) for choice in (LOSS_TAGS, RATE_TAGS))
    if loss is None:
        raise ValueError(
            f"{named or folder}: its events have no {LOSS_TAGS[0]}, but {', '.join(tags) or 'nothing'}; name those of a training"
        )
    points = [{event.step: event.value for event in events.Scalars(tag)} if tag else {} for tag in (loss, rate)]
    kept = [{step: value for step, value in part.items() if math.isfinite(value) and step >= 0} for part in points]
    return by_epoch(*kept), sum(map(len, points)) - sum(map(len, kept))


def by_epoch(loss, rate):
    """Of points {1000 × epochs: value}, the mean loss and the last learning rate of each epoch.

    Our points stand at the end of what they are of; those of the released code at its beginning, so that their first is 0.
    """

    def epoch_of(step):
        return step // PER_EPOCH + 1 if 0 in loss else -(-step // PER_EPOCH)

    points = pd.DataFrame({"loss": pd.Series(loss, dtype=float), "lr": pd.Series(rate, dtype=float)})
    return points.groupby(epoch_of).agg({"loss": "mean", "lr": "last"}).dropna(subset="loss")


def whole(value):
    """int, at least 0, of a number or its text. Raises ValueError, TypeError or OverflowError."""
    number = finite(value)
    if number < 0 or number != int(number):
        raise ValueError(value)
    return int(number)


def finite(value):
    """float, finite, of a number or its text. Raises ValueError, TypeError or OverflowError."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def place_of(path):
    """What to call an input by: the folder of its run; of a CSV, its own name."""
    path = Path(path).resolve()
    place = path if path.is_dir() else path.with_suffix("") if path.suffix == ".csv" else path.parent
    return place.parent if place.name == "tensorboard" else place


# ---- Drawing -------------------------------------------------------------------------------------


def draw_curves(curves, log2=False, marks=()):
    """curves: dict name → DataFrame of `read_curve`. marks: epochs to mark, those within the curves. Returns a Figure."""
    rates = pd.concat([curve["lr"] for curve in curves.values()]).dropna()
    known = len(rates) > 0
    figure = new_chart(7, 4.8 if known else 3.8)
    axes = [
        bare(axis)
        for axis in figure.subplots(1 + known, 1, sharex=True, squeeze=False, height_ratios=(3, 1)[: 1 + known])[:, 0]
    ]
    epochs = np.concatenate([curve.index for curve in curves.values()])
    first, last = int(epochs.min()), int(epochs.max())
    for k, (name, curve) in enumerate(curves.items()):
        style = dict(
            color=COLOURS[k % len(COLOURS)],
            marker=MARKERS[k % len(MARKERS)],
            ls=DASHES[k // len(COLOURS) % len(DASHES)],
            lw=1.4,
            ms=4.5,
        )
        for axis, column in zip(axes, ("loss", "lr")):
            axis.plot(
                curve.index,
                curve[column],
                label=name,
                markevery=with_marker(curve.index, first, last, k / len(curves), log2),
                **style,
            )
    if log2:
        axes[0].set_xscale("log", base=2)
        powers = 2 ** np.arange(
            first.bit_length() - 1, (last - 1).bit_length() + 1
        )  # from at most the first to at least the last
        axes[0].set_xlim(powers[0] / 1.15, powers[-1] * 1.15)
        axes[0].set_xticks(powers, powers)
        axes[0].minorticks_off()
    else:
        axes[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        pad = max(0.5, 0.02 * (last - first))
        axes[0].set_xlim(first - pad, last + pad)
    for mark in sorted({mark for mark in marks if first <= mark <= last}):
        for axis in axes:
            axis.axvline(mark, color="0.45", lw=0.9, ls=(0, (4, 3)), zorder=1)
        axes[0].annotate(
            f"epoch {mark}",
            (mark, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="0.35",
        )
    axes[0].set_ylabel("training loss")
    axes[0].legend(fontsize=9, edgecolor="none", framealpha=0.85, borderpad=0.1)
    if known:
        axes[1].set_ylabel("learning rate")
        axes[1].set_ylim(0, 1.12 * rates.max() or 1)
        axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes[-1].set_xlabel("epoch")
    figure.align_ylabels(axes)
    return figure


def with_marker(epochs, first, last, share, log2):
    """Indices of the epochs that carry a marker: of a short curve all; else powers of two or eighths of the axis, each and a share of
    the way to the next, and the last.

    The share differs between curves, so that those that coincide can be told apart.
    """
    if len(epochs) <= FEW:
        return list(range(len(epochs)))
    steps = np.arange(last.bit_length()) + share if log2 else np.arange(8) + share
    places = 2.0**steps if log2 else first + (last - first) / 8 * steps
    within = places[(places >= epochs.min()) & (places < epochs.max())]
    return np.unique([*np.searchsorted(epochs, within), len(epochs) - 1]).tolist()


def table_of(curves):
    """DataFrame with columns run, epoch, loss, lr."""
    return pd.concat([curve.rename_axis("epoch").reset_index().assign(run=name) for name, curve in curves.items()])[
        ["run", "epoch", "loss", "lr"]
    ]


# ---- Program -------------------------------------------------------------------------------------


def names_of(inputs, labels):
    """A name for each input, all different. Raises ValueError."""
    names = labels or short_names([place_of(path) for path in inputs])
    if len(names) != len(inputs):
        raise ValueError(f"--labels: {len(names)} for {len(inputs)} inputs; give one for each, in their order")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--labels: two inputs would be called {twice}; give each a name of its own")
    return names


def main():
    parser = Parser(__doc__.splitlines()[0], "analysis.exponential_2_n_training")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="log.txt, folder of a run, TensorBoard's events or CSV; one for each run",
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="names of the runs; without, those of their folders"
    )
    parser.add_argument("--log2", action="store_true", help="epochs on a logarithmic axis, ticks at the powers of two")
    parser.add_argument(
        "--mark",
        nargs="*",
        type=int,
        default=[40, 600],
        metavar="EPOCH",
        help="epochs to mark with a line; none without a number",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="figure to write, .png or .svg; both are written"
    )
    parser.add_argument("--table", metavar="CSV", help="also write run, epoch, loss, lr here")
    args = parser.parse_args()
    try:
        names, read = names_of(args.inputs, args.labels), [read_curve(path) for path in args.inputs]
        curves = dict(zip(names, (curve for curve, _ in read)))
        write_figure(draw_curves(curves, args.log2, args.mark), args.output)
        if args.table:
            write_table(table_of(curves), args.table, "--table")
    except ValueError as error:
        parser.error(str(error))
    for path, (_, skipped) in zip(args.inputs, read):
        if skipped:
            print(
                f"{parser.prog}: warning: {path}: {skipped} of its entries have no epoch or no finite loss; they are left out",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
