# SPDX-License-Identifier: MIT
"""Common parts of the benchmarks: flags, timing in turns, ratios within a round, the machine, JSON and table."""

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
    """What a measurement ran on: processor, cores and threads, memory, GPU, versions."""
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
    """Times callables in turn: every round runs each of them once, in a new random order.

    variants: {name: callable}. Returns {name: [seconds, one per round]}. A disturbance that lasts longer than a round
    affects all variants, so ratios within a round are more reliable than times. until: time limit on the clock of
    time.monotonic(). After the first round, a round starts only if it would end in time, at the duration of the longest
    round so far.
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
    """{"median", "low", "high"} of values: low and high are quartiles, or minimum and maximum of fewer than four."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 3 else (min(values), None, max(values))
    return {"median": median(values), "low": low, "high": high}


def speedup(base, other):
    """Speed-up of `other` over `base`, as `spread` of the ratios in each round. base, other: seconds, one per round."""
    return spread([a / b for a, b in zip(base, other)])


def shown(value, digits=2):
    """A `spread` as text: median (low–high)."""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


def benchmark_parser(name, description, timed=False):
    """A parser with the flags of all benchmarks. timed: with --seconds, which `deadline` reads."""
    parser = Parser(description, f"benchmarks.{name}" if name else "benchmarks")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("output/benchmarks"),
        metavar="DIR",
        help=f"folder for {name or 'NAME'}.json, and for data that later runs use again",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers and of the order of turns")
    if timed:
        parser.add_argument(
            "--seconds", type=float, help="approximate time limit; it reduces rounds and steps if needed"
        )
    return parser


def changed(args, **values):
    """A copy of the flags with some of the values replaced."""
    return argparse.Namespace(**{**vars(args), **values})


def loader_flags(batch_size, workers, seed=0, pin_mem=False):
    """The flags that `util.datasets.build_loader` reads, for training on split train."""
    return argparse.Namespace(
        batch_size=batch_size,
        accum_iter=1,
        seed=seed,
        split="train",
        num_workers=workers,
        pin_mem=pin_mem,
        data_timeout=8,
    )


def deadline(args):
    """The value of time.monotonic() at which --seconds end; None without the flag."""
    return None if args.seconds is None else time.monotonic() + args.seconds


def write_report(name, args, rows):
    """Writes --out/NAME.json: command, flags, machine, rows (dicts)."""
    args.out.mkdir(parents=True, exist_ok=True)
    written = {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": machine(),
        "rows": rows,
    }
    write_json(args.out / f"{name}.json", written)


def report(name, args, rows, headers):
    """Writes --out/NAME.json and prints the rows as a table. rows: dicts; headers: {key of a row: heading}."""
    write_report(name, args, rows)

    def cell(value):
        return f"{value:,.2f}" if isinstance(value, float) else "" if value is None else str(value)

    cells = [[cell(row[key]) for key in headers] for row in rows]
    align = ["left" if isinstance(rows[0][key], str) else "right" for key in headers]
    print(tabulate(cells, headers=list(headers.values()), disable_numparse=True, colalign=align))
