# SPDX-License-Identifier: MIT
"""Draws finetuning results against the number of pretraining epochs, on an axis of powers of two.

    python -m analysis.exponential_2_n_epoch logs output/finetune_* --output epochs.png

If logs do not state the number of pretraining epochs, --epochs_from takes it from their names; or complete the CSV
table of analysis.logfile_reader by hand, and pass it in place of the logs.
"""

import math

from analysis import result_charts as charts
from analysis.figures import COLOURS, MARKERS, mark_epochs, write_figure
from analysis.programs import account, add_name_flags, add_picture_flag, log_parser, percent, results_of
from common.errors import DataError

MARKED = (40, 600)  # saved epochs that are no powers of two; the published warm-up has 40 epochs


def arrange(results):
    """({share of the labels: ({epochs: [pretrained]}, [random])}, [results with unknown epochs])."""
    placed = [result for result in results if result.start == "random" or result.pretraining_epochs]
    series = {}
    for share, part in charts.gather(placed, "share", descending=True).items():
        pretrained = [result for result in part if result.start != "random"]
        series[share] = (
            charts.gather(pretrained, "pretraining_epochs"),
            [result for result in part if result.start == "random"],
        )
    return series, [result for result in results if result.start != "random" and not result.pretraining_epochs]


def names_of(series):
    """{share: suffix of its labels}, empty for a single share."""
    names = {share: ", share not known" if share is None else f", {percent(share)} of the labels" for share in series}
    return names if len(names) > 1 else dict.fromkeys(names, "")


def powers_around(values):
    """The powers of two that enclose all values."""
    return [2**k for k in range(math.floor(math.log2(min(values))), math.ceil(math.log2(max(values))) + 1)]


def draw_epochs(series, metrics, marks):
    """A Figure with a panel for each metric. series: of `arrange`; metrics: {metric: label}; marks: epochs to mark."""
    epochs = [epoch for line, _ in series.values() for epoch in line]
    figure, axes = charts.panel_grid(metrics)
    for metric, axis in axes.items():
        charts.octaves(axis, powers_around(epochs))
        for k, ((line, random), name) in enumerate(zip(series.values(), names_of(series).values())):
            colour = COLOURS[k % len(COLOURS)]
            charts.draw_series(
                axis, metric, line, color=colour, marker=MARKERS[k % len(MARKERS)], label=f"pretrained{name}"
            )
            level = charts.spread(random, metric)
            if level:
                axis.axhline(level.mean, color=colour, ls="--", label=f"random initialisation{name}")
                axis.axhspan(level.low, level.high, color=colour, alpha=0.12, lw=0)
        mark_epochs([axis], [mark for mark in marks if min(epochs) <= mark <= max(epochs)])
    shares = (
        [f"{percent(share)} of the labels" for share in series if share not in (None, 1)] if len(series) == 1 else []
    )
    groups = [group for line, random in series.values() for group in (*line.values(), random) if group]
    return charts.finish(
        figure,
        axes,
        "epochs of pretraining",
        "Finetuned results by epochs of pretraining",
        ", ".join((*shares, charts.note_on(groups))),
    )


def rows_of(series):
    """The points of the figure, as rows for `print_points`."""
    rows = []
    for share, (line, random) in series.items():
        shown = "–" if share is None else percent(share)
        rows += [((epochs, shown), results) for epochs, results in line.items()]
        rows += [(("random initialisation", shown), random)] if random else []
    return rows


def main(argv=None):
    parser = log_parser("exponential_2_n_epoch", __doc__.splitlines()[0])
    add_name_flags(parser)
    parser.add_argument(
        "--mark",
        nargs="*",
        type=int,
        default=MARKED,
        metavar="EPOCH",
        help="epochs to mark with a line, if there are results on both sides",
    )
    add_picture_flag(parser)
    args = parser.parse_args(argv)
    with parser.input_errors():
        results, skipped = results_of(args)
        series, others = arrange(results)
        if not any(line for line, _ in series.values()):
            raise DataError(
                f"{results[0].source}: neither this nor another log states its epochs of pretraining; use --epochs_from"
            )
        metrics = charts.metrics_to_draw([result for result in results if result not in others])
        write_figure(draw_epochs(series, metrics, args.mark), args.output)
    charts.print_points(rows_of(series), ["pretraining epochs", "share"], metrics)
    print(
        *charts.left_out(others, "they do not state their epochs of pretraining; use --epochs_from"),
        *account(results, skipped),
        sep="\n",
    )


if __name__ == "__main__":
    main()
