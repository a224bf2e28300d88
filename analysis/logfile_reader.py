# SPDX-License-Identifier: MIT
"""Read log.txt of one or several runs and draw their training loss and learning rate against the epoch.

    python -m analysis.logfile_reader --log output/pretrain/log.txt --output loss.png
"""
import argparse
import json
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def read_log(path):
    """log.txt, one JSON object a line, as a DataFrame with the epochs (0-based) as index.

    Of an epoch that stands there twice, the later line counts. Raises ValueError naming the file and line.
    """
    entries = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if line.strip():
            try:
                entry = json.loads(line)
                entries.append({**entry, "epoch": int(entry["epoch"])})
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: not a log entry with an epoch; remove the line") from None
    if not entries:
        raise ValueError(f"{path}: no epoch is logged there yet")
    return pd.DataFrame(entries).drop_duplicates("epoch", keep="last").set_index("epoch").sort_index()


def draw_losses(logs):
    """logs: dict name → DataFrame of `read_log`. Returns a matplotlib Figure."""
    figure = Figure(figsize=(7, 4), dpi=120)
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    rate = axis.twinx()
    for i, (name, log) in enumerate(logs.items()):
        axis.plot(log.index + 1, log["train_loss"], marker=".", color=f"C{i}", label=name)
        rate.plot(log.index + 1, log["train_lr"], linestyle=":", color=f"C{i}", linewidth=1)
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss")
    rate.set_ylabel("learning rate (dotted)")
    rate.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if len(logs) > 1:
        axis.legend()
    figure.tight_layout()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", nargs="+", required=True, metavar="FILE", help="log.txt of one or several runs")
    parser.add_argument("--output", required=True, metavar="PNG", help="picture to write")
    args = parser.parse_args()
    try:
        logs = {str(Path(path).parent): read_log(path) for path in args.log}
        draw_losses(logs).savefig(args.output)
    except (OSError, ValueError) as error:
        parser.exit(2, f"logfile_reader: error: {error}\n")


if __name__ == "__main__":
    main()
