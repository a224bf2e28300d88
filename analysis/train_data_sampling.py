# SPDX-License-Identifier: MIT
"""Draws finetuning results against the share of the training labels, pretrained beside random initialisation.

    python -m analysis.train_data_sampling logs output/finetune_* --published --output shares.png
    python -m analysis.train_data_sampling --published --output shares.png

If logs do not state the share, --share_from takes it from their names; or complete the CSV table of
analysis.logfile_reader by hand, and pass it in place of the logs.
"""

from analysis import result_charts as charts
from analysis.figures import COLOURS, MARKERS, VERMILION, write_figure
from analysis.programs import account, add_name_flags, add_picture_flag, log_parser, percent, results_of
from analysis.runs import MAIN_METRICS, Result
from common.errors import DataError

# BigEarthNet v2 S1, mixmim_base, 64 epochs of pretraining: start → share of the labels → MAIN_METRICS.
PUBLISHED_IN = "SAR-W-MixMAE, IEEE JSTARS 2026"
PUBLISHED = {
    "pretrained": {
        1.0: (0.7141, 0.8391, 0.6443, 0.7384),
        0.5: (0.6928, 0.8245, 0.6293, 0.7261),
        0.25: (0.6616, 0.8139, 0.6016, 0.7190),
        0.125: (0.6453, 0.8046, 0.5894, 0.7076),
    },
    "random": {
        1.0: (0.6107, 0.7713, 0.4936, 0.6750),
        0.5: (0.5781, 0.7339, 0.4713, 0.6509),
        0.25: (0.5545, 0.7139, 0.4295, 0.6233),
        0.125: (0.5268, 0.6827, 0.4058, 0.5977),
    },
}
STARTS = {"pretrained": "pretrained", "random": "random initialisation"}


def published():
    """PUBLISHED as a list of Result."""
    return [
        Result(
            PUBLISHED_IN,
            start,
            pretraining_epochs=64 if start == "pretrained" else None,
            share=share,
            split="test",
            metrics=dict(zip(MAIN_METRICS, values)),
        )
        for start, shares in PUBLISHED.items()
        for share, values in shares.items()
    ]


def series_of(results):
    """{(start, epochs of pretraining or None): {share: [results]}}, random initialisation last."""
    kinds = {}
    for start in STARTS:
        of_start = [result for result in results if result.start == start]
        for epochs, part in charts.gather(of_start, "pretraining_epochs", descending=True).items():
            kinds[start, epochs] = charts.gather(part, "share", descending=True)
    return kinds


def names_and_styles(kinds):
    """{(start, epochs): (label, style of the line)}. Random initialisation has one colour, pretrained all others."""
    looks = [(colour, marker) for colour, marker in zip(COLOURS, MARKERS) if colour != VERMILION]
    named = {}
    for k, (start, epochs) in enumerate(kinds):
        colour, marker = (VERMILION, "s") if start == "random" else looks[k % len(looks)]
        after = f", {epochs} epoch{'s' if epochs > 1 else ''}" if epochs else ""
        named[start, epochs] = f"{STARTS[start]}{after}", {"color": colour, "marker": marker}
    return named


def draw_shares(series, overlay, metrics):
    """A Figure with a panel for each metric. series: of `series_of`. overlay: published series, hollow and dashed."""
    figure, axes = charts.panel_grid(metrics)
    shares = {share for groups in (*series.values(), *overlay.values()) for share in groups}
    for metric, axis in axes.items():
        charts.octaves(axis, shares, percent)
        for kind, (name, style) in names_and_styles(series).items():
            charts.draw_series(axis, metric, series[kind], **style, label=name)
        for kind, (name, style) in names_and_styles(overlay).items():
            charts.draw_series(axis, metric, overlay[kind], **style, ls="--", mfc="white", label=f"published: {name}")
    notes = [charts.note_on([group for groups in series.values() for group in groups.values()])] if series else []
    notes += [f"published: {PUBLISHED_IN}; BigEarthNet v2 S1, base"] if overlay else []
    return charts.finish(
        figure,
        axes,
        "share of the training labels",
        "Finetuned results by share of the training labels",
        "; ".join(notes),
    )


def main(argv=None):
    parser = log_parser("train_data_sampling", __doc__.splitlines()[0], nargs="*")
    add_name_flags(parser)
    parser.add_argument(
        "--published", action="store_true", help=f"also draw the results of {PUBLISHED_IN}; no logs are needed"
    )
    add_picture_flag(parser)
    args = parser.parse_args(argv)
    with parser.input_errors():
        if not (args.logs or args.published):
            raise DataError("logs: none are named; name some, or add --published")
        results, skipped = results_of(args) if args.logs else ([], [])
        placed = [result for result in results if result.start and result.share]
        if results and not placed:
            raise DataError(
                f"{results[0].source}: neither this nor another log states its start and its share of the labels; use "
                "--share_from and --epochs_from"
            )
        known = published() if args.published else []
        series, overlay = series_of(placed), series_of(known)
        metrics = charts.metrics_to_draw(placed + known)
        write_figure(draw_shares(series, overlay, metrics), args.output)
    rows = [
        ((f"{origin}{name}", percent(share)), group)
        for origin, part in (("", series), ("published: ", overlay))
        for kind, (name, _) in names_and_styles(part).items()
        for share, group in part[kind].items()
    ]
    charts.print_points(rows, ["start", "share"], metrics)
    others = [result for result in results if result not in placed]
    print(
        *charts.left_out(
            others, "they do not state their start or their share of the labels; use --share_from and --epochs_from"
        ),
        *(account(results, skipped) if args.logs else []),
        sep="\n",
    )


if __name__ == "__main__":
    main()
