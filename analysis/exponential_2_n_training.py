# SPDX-License-Identifier: MIT
"""Draws the training loss of one or several runs against the epoch, with the learning rate below.

    python -m analysis.exponential_2_n_training output/pretrain --output loss.png
    python -m analysis.exponential_2_n_training ours/log.txt theirs/tensorboard third.csv --labels ours theirs third \\
        --log2 --output losses.png --table losses.csv

The kind of an input is detected from its content: a log.txt, ours or of the released code; a run folder, which contains
one; TensorBoard events, a file or a folder of files; or the CSV that TensorBoard exports of its loss. TensorBoard
points are averaged over each epoch, as in log.txt. Epochs are counted from 1, as in the names of checkpoints.
"""

import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from analysis.figures import COLOURS, MARKERS, bare, mark_epochs, new_chart, write_figure
from analysis.programs import add_picture_flag, short_names, write_table
from analysis.runs import LOG, finite, log_entries, whole
from common.command_line import Parser
from common.errors import DataError

EVENTS = "*tfevents*"
EVENTS_BEGIN, CSV_BEGINS = b"brain.Event:", b"Wall time,Step,Value"
PER_EPOCH = 1000  # TensorBoard steps per epoch
LOSS_TAGS, RATE_TAGS = ("train_loss", "loss"), ("lr",)
UNREADABLE = (ValueError, KeyError, TypeError, OverflowError)  # raised by a damaged line
REMEDY = "name a log.txt, a run folder, or TensorBoard's events or CSV"
FEW = 16  # at most as many epochs all have a marker
DASHES = ("-", "--", "-.", ":")


# ---- Reading -------------------------------------------------------------------------------------

# Each function returns (curve, number of skipped entries). A curve is a DataFrame indexed by the epoch, from 1, with
# the columns loss and lr (NaN if unknown).


def read_curve(path):
    """The curve of a file or folder. Raises DataError, which names it, if it cannot be read or contains no epoch."""
    path = Path(path)
    try:
        curve, skipped = read_folder(path) if path.is_dir() else read_file(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {REMEDY}") from None
    if curve.empty:
        unreadable = f", and {skipped} of its lines cannot be read" if skipped else ""
        raise DataError(f"{path}: no epoch is logged there{unreadable}; {REMEDY}")
    return curve, skipped


def read_folder(path):
    """The curve of a run folder: of its log.txt, else of the events in it or in its tensorboard/."""
    if (path / LOG).is_file():
        return read_file(path / LOG)
    for folder in (path, path / "tensorboard"):
        if any(folder.glob(EVENTS)):
            return read_events(folder)
    raise DataError(f"{path}: contains neither {LOG} nor events of TensorBoard; name a run folder")


def read_file(path):
    with open(path, "rb") as file:
        begin = file.read(64)
    if EVENTS_BEGIN in begin:
        # TensorBoard identifies event files by their name, and reads all those of a folder.
        with TemporaryDirectory() as folder:
            (Path(folder) / "events.out.tfevents").symlink_to(path.resolve())
            return read_events(folder, path)
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        return read_csv(lines) if CSV_BEGINS in begin else read_log(lines)


def read_log(lines):
    """The curve of a log.txt: epoch (0-based), train_loss, train_lr. Later lines on an epoch replace earlier ones."""
    epochs, skipped = {}, 0
    for epoch, entry in log_entries(lines):
        try:
            rate = finite(entry["train_lr"]) if "train_lr" in entry else math.nan
            epochs[epoch + 1] = finite(entry["train_loss"]), rate
        except UNREADABLE:
            skipped += 1
    return pd.DataFrame.from_dict(epochs, orient="index", columns=["loss", "lr"]).sort_index(), skipped


def read_csv(lines):
    """The curve of a CSV that TensorBoard exported: wall time, step, value."""
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
    """The curve of the event files of a folder, each up to its first damaged event. named: path for messages."""
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()  # 0: every point
    tags = events.Tags()[SCALARS]
    loss, rate = (next((tag for tag in choice if tag in tags), None) for choice in (LOSS_TAGS, RATE_TAGS))
    if loss is None:
        found = ", ".join(tags) or "nothing"
        raise DataError(f"{named or folder}: its events have no {LOSS_TAGS[0]}, but {found}; name those of a training")
    points = [{event.step: event.value for event in events.Scalars(tag)} if tag else {} for tag in (loss, rate)]
    kept = [{step: value for step, value in part.items() if math.isfinite(value) and step >= 0} for part in points]
    return by_epoch(*kept), sum(map(len, points)) - sum(map(len, kept))


def by_epoch(loss, rate):
    """The mean loss and the last learning rate of each epoch, from points {1000 × epochs: value}.

    Our points are logged at the end of the steps that they describe. Those of the released code are logged at the
    beginning, so their first step is 0.
    """

    def epoch_of(step):
        return step // PER_EPOCH + 1 if 0 in loss else -(-step // PER_EPOCH)

    points = pd.DataFrame({"loss": pd.Series(loss, dtype=float), "lr": pd.Series(rate, dtype=float)})
    return points.groupby(epoch_of).agg({"loss": "mean", "lr": "last"}).dropna(subset="loss")


def place_of(path):
    """The path that names an input: of a CSV the file, else the run folder."""
    path = Path(path).resolve()
    place = path if path.is_dir() else path.with_suffix("") if path.suffix == ".csv" else path.parent
    return place.parent if place.name == "tensorboard" else place


# ---- Drawing -------------------------------------------------------------------------------------


def draw_curves(curves, log2=False, marks=()):
    """A Figure of curves, {name: DataFrame of `read_curve`}. marks: epochs to mark if within the curves."""
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
        powers = 2 ** np.arange(first.bit_length() - 1, (last - 1).bit_length() + 1)  # they enclose all epochs
        axes[0].set_xlim(powers[0] / 1.15, powers[-1] * 1.15)
        axes[0].set_xticks(powers, powers)
        axes[0].minorticks_off()
    else:
        axes[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        pad = max(0.5, 0.02 * (last - first))
        axes[0].set_xlim(first - pad, last + pad)
    mark_epochs(axes, sorted({mark for mark in marks if first <= mark <= last}))
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
    """Indices of the epochs that have a marker: all of a short curve; else the last, and powers of two or eighths.

    share: by how much of the distance to the next marker these are shifted. It differs between curves, so that curves
    which coincide are distinguishable.
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
    """A different name for each input. Raises DataError."""
    names = labels or short_names([place_of(path) for path in inputs])
    if len(names) != len(inputs):
        raise DataError(f"--labels: {len(names)} for {len(inputs)} inputs; give one for each, in their order")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"--labels: two inputs would be called {twice}; give each a name of its own")
    return names


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.exponential_2_n_training")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="log.txt, run folder, TensorBoard's events or CSV; one for each run",
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="names of the runs (default: those of their folders)"
    )
    parser.add_argument("--log2", action="store_true", help="logarithmic epoch axis, with ticks at powers of two")
    parser.add_argument(
        "--mark",
        nargs="*",
        type=int,
        default=[40, 600],
        metavar="EPOCH",
        help="epochs to mark with a line; none without a number",
    )
    add_picture_flag(parser)
    parser.add_argument("--table", metavar="CSV", help="also write run, epoch, loss, lr here")
    args = parser.parse_args(argv)
    with parser.input_errors():
        names, read = names_of(args.inputs, args.labels), [read_curve(path) for path in args.inputs]
        curves = dict(zip(names, (curve for curve, _ in read)))
        write_figure(draw_curves(curves, args.log2, args.mark), args.output)
        if args.table:
            write_table(table_of(curves), args.table, "--table")
    for path, (_, skipped) in zip(args.inputs, read):
        if skipped:
            print(
                f"{parser.prog}: warning: {path}: {skipped} of its entries have no epoch or no finite loss; they are "
                "left out",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
