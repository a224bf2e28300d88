# SPDX-License-Identifier: MIT
"""Tests and measures the code on this machine's GPU within some minutes: `bash scripts/gpu_report.sh`.

    python -m benchmarks.gpu_report --minutes 8 --out output/gpu_report

Needs no data, no network and no set-up. The parts are defined in benchmarks/gpu_parts.py, the most important first.
Each has a share of the time and adapts its work to the measured duration of a step; time that it does not use goes to
later parts. Each part runs in its own process, so that a part that fails, or exceeds its time and is killed, does not
affect the others. After every part, --out/gpu_report.json and the table gpu_report.md are written again;
gpu_report_parts/ has the output of each part. On a CPU, the same parts run with the smallest sizes. The exit status is
1 if a part failed.
"""

import argparse
import datetime
import importlib.util
import shlex
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path

NAME = "gpu_report"
NEEDED = """torch torchvision timm numpy pandas pyarrow tensorboard safetensors sklearn matplotlib tabulate
torchmetrics""".split()
LOOK = 60  # time limit of the part "machine", seconds
MOST_MINUTES = 24 * 60
CLOSING = 3  # seconds that are reserved for writing the tables


def table(rows, style):
    """The rows as a table: part, outcome, seconds, findings."""
    from tabulate import tabulate

    lines = []
    for row in rows:
        texts = [*textwrap.wrap(row["reason"], 100), *(found["text"] for found in row["found"])] or [""]
        facts = (row["title"], row["status"], f"{row['seconds']:.0f}")
        lines += [(*(facts if k == 0 else ("", "", "")), text) for k, text in enumerate(texts)]
    return tabulate(
        lines,
        headers=["part", "outcome", "s", "figures"],
        tablefmt=style,
        disable_numparse=True,
        colalign=("left", "left", "right", "left"),
    )


def write_report(out, started, args, rows):
    """Writes gpu_report.json and gpu_report.md of the rows so far. The first row is that of the machine."""
    from common.files import write_json, write_text

    machine = rows[0].get("machine", {})
    seconds = time.monotonic() - started
    write_json(
        out / f"{NAME}.json",
        {
            "benchmark": NAME,
            "command": shlex.join(["python", "-m", f"benchmarks.{NAME}", *sys.argv[1:]]),
            "flags": {"minutes": args.minutes, "out": str(args.out), "seed": args.seed},
            "machine": machine,
            "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": seconds,
            "rows": rows,
        },
    )
    place = f"{machine.get('gpu') or machine.get('cpu')}, PyTorch {machine.get('torch')}"
    text = f"# Report\n\n{place}; {seconds / 60:.1f} of {args.minutes:g} minutes.\n\n{table(rows, 'pipe')}\n"
    write_text(out / f"{NAME}.md", text)


def missing_packages(names=NEEDED):
    return [name for name in names if importlib.util.find_spec(name) is None]


def interrupted(number, _):
    """A signal handler that ends the report. SystemExit kills the running part; the report has the earlier parts."""
    sys.stderr.write(f"gpu_report.sh: {signal.Signals(number).name}: ended; {NAME}.json has the parts before\n")
    sys.exit(128 + number)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}",
        description="Tests and measures the code on this machine's GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8, help="time limit of the whole report")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("output/gpu_report"),
        metavar="DIR",
        help="folder for the report; a report in it is replaced",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    args = parser.parse_args(argv)
    started = time.monotonic()

    def fail(message):
        parser.exit(2, f"gpu_report.sh: error: {message}\n")

    lacking = missing_packages()
    if lacking:
        fail(
            f"Python packages are missing: {', '.join(lacking)}; install them (pip install "
            f"{' '.join(lacking).replace('sklearn', 'scikit-learn')}), or run bash scripts/setup.sh"
        )
    if not 0 < args.minutes < MOST_MINUTES:
        fail(f"--minutes {args.minutes:g}: must be more than 0 and less than {MOST_MINUTES}")
    parts = args.out / f"{NAME}_parts"
    try:
        if parts.exists():
            shutil.rmtree(parts)
        parts.mkdir(parents=True)
    except OSError as error:
        fail(f"--out {args.out}: cannot be made ({error.strerror}); choose another folder")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    from benchmarks import apart, gpu_parts  # imports PyTorch and the programs once, for all forked parts

    ends = started + 60 * args.minutes - CLOSING
    first = apart.run_parts([gpu_parts.MACHINE], parts, None, min(ends, time.monotonic() + LOOK), lambda rows: None)
    settings = gpu_parts.Settings.of(first[0].get("machine"), parts, args.seed)

    def write(rows):
        gpu_parts.clean(parts)
        write_report(args.out, started, args, first + rows)

    try:
        write([])
        rows = first + apart.run_parts(gpu_parts.PARTS, parts, settings, ends, write)
    finally:
        gpu_parts.clean(parts)
    print(
        f"\n{table(rows, 'simple')}\n\n{args.out / NAME}.json and .md, {time.monotonic() - started:.0f} s; "
        f"python -m analysis.benchmark_figure {args.out} draws it"
    )
    sys.exit(1 if any(row["status"] == "failed" for row in rows) else 0)


if __name__ == "__main__":
    main()
