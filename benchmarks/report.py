# SPDX-License-Identifier: MIT
"""What every benchmark does alike: turns in shuffled order, ratios of the same round, the machine, a table and a JSON."""

import argparse
import os
import platform
import random
import shlex
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from tabulate import tabulate

from common.command_line import Parser
from common.files import write_json


def machine():
    """What the figures hold for: processor, cores and threads, memory, GPU, versions."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory / 1e9, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def in_turns(variants, rounds, seed=0, until=None):
    """Time callables that take turns: every round runs each once, in an order drawn anew.

    variants: {name: callable}. Returns {name: [seconds, one a round]}. What disturbs the machine for longer than a round
    disturbs all alike, so that ratios within a round say more than the times do. until: a time of time.monotonic(); no round
    begins, but the first, that would end after it if it takes as long as the longest so far.
    """
    order, rng, seconds, longest = list(variants), random.Random(seed), {name: [] for name in variants}, 0.0
    for number in range(rounds):
        if number and until is not None and time.monotonic() + longest > until:
            break
        begun = time.monotonic()
        rng.shuffle(order)
        for name in order:
            started = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - started)
        longest = max(longest, time.monotonic() - begun)
    return seconds


def spread(values):
    """{"median", "low", "high"} of some values, low and high being the quartiles (the extremes of fewer than four)."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 3 else (min(values), None, max(values))
    return {"median": median(values), "low": low, "high": high}


def speedup(base, other):
    """How many times faster `other` is than `base`, of seconds round by round: as `spread`."""
    return spread([a / b for a, b in zip(base, other)])


def shown(value, digits=2):
    """A `spread` as text: median, and the quartiles."""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


def benchmark_parser(name, description, timed=False):
    """A parser with the flags of all benchmarks. timed: with --seconds, which `deadline` reads."""
    parser = Parser(description, f"benchmarks.{name}" if name else "benchmarks")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("output/benchmarks"),
        metavar="DIR",
        help=f"folder for {name or 'NAME'}.json, and for data that are used again",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers and of the order of turns")
    if timed:
        parser.add_argument("--seconds", type=float, help="limit of the time, about; fewer rounds and steps if needed")
    return parser


def changed(args, **values):
    """A copy of the flags with some of the values replaced."""
    return argparse.Namespace(**{**vars(args), **values})


def deadline(args):
    """The time of time.monotonic() at which --seconds are over, or None."""
    return None if args.seconds is None else time.monotonic() + args.seconds


def write_report(name, args, rows, **more):
    """Write --out/NAME.json: the command, its flags, the machine, the rows (dicts), and what else is given."""
    args.out.mkdir(parents=True, exist_ok=True)
    written = {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": machine(),
        "rows": rows,
    }
    write_json(args.out / f"{name}.json", written | more)


def report(name, args, rows, headers, **more):
    """Write --out/NAME.json and print the rows as a table. rows: dicts; headers: {key of a row: heading}."""
    write_report(name, args, rows, **more)
    cells = [
        [
            f"{row[key]:,.2f}" if isinstance(row[key], float) else "" if row[key] is None else str(row[key])
            for key in headers
        ]
        for row in rows
    ]
    numeric = ["left" if isinstance(rows[0][key], str) else "right" for key in headers]
    print(tabulate(cells, headers=list(headers.values()), disable_numparse=True, colalign=numeric))
