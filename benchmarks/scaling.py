# SPDX-License-Identifier: MIT
"""Speed of several ranks on one node, and the overhead of parallel training, compared with our plain re-implementation.

    python -m benchmarks.scaling --ranks 1 2

torchrun starts each number of ranks, with the same batch size per rank. Every round measures, in a new random order
that is the same on all ranks: rank 0 alone while the others wait; all ranks without exchange of gradients; all ranks
with DDP; the reference with DDP and its default settings. The difference of the first two is lost to shared resources
(memory, caches, power). The difference of the second and the third is lost to the exchange of gradients and to waiting
for the slowest rank. On a CPU the cores are divided among the ranks, so rank 0 alone has no more cores than one of
several. Writes scaling.json and prints a table.
"""

import argparse
import json
import subprocess
import sys
from statistics import median

import torch
import torch.distributed as td
from torch.nn.parallel import DistributedDataParallel

from benchmarks.report import benchmark_parser, changed, in_turns, report, shown, speedup
from benchmarks.step import Ours, Reference, add_execution_flags, add_path_flags, noise, usual_amp
from util.distributed import distribute, pick_device, start_ranks

MARK = "scaling: "  # prefix of the output line of rank 0 that contains the result


def measure(args):
    """Measures with the ranks that torchrun started. Rank 0 prints JSON: {way: seconds of a step, one per round}."""
    flags = {"device": args.device, "local_rank": None, "dist_url": "env://", "port": None, "dist_timeout": 10}
    ranks = start_ranks(argparse.Namespace(**flags))
    batches, mode = noise(args.batch_size, ranks.device, args.seed), None if args.compile == "off" else args.compile
    path = Ours(args, batches, ranks.device, args.amp, compile_mode=mode)

    def first_loss(model):
        path.trained = model
        return path.loss(path.batches[0], path.mask())

    wrapped = distribute(path.model, ranks, first_loss)

    def train(trained, on_this_rank, path=path):
        def turn():
            path.trained = trained
            if on_this_rank:
                path.run(args.steps)
            if ranks.world_size > 1:
                td.barrier()

        return turn

    reference = Reference(args, batches, ranks.device, args.amp)
    plain = DistributedDataParallel(reference.trained) if ranks.world_size > 1 else reference.trained
    ways = {
        "alone": train(path.model, ranks.is_main),
        "together": train(path.model, True),
        "exchanging": train(wrapped, True),
        "reference": train(plain, True, reference),
    }
    in_turns(ways, args.warmup)
    seconds = in_turns(ways, args.rounds, args.seed)
    if ranks.is_main:
        of_a_step = {name: [value / args.steps for value in values] for name, values in seconds.items()}
        print(MARK + json.dumps({"threads": torch.get_num_threads(), **of_a_step}), flush=True)
    ranks.close()


def main(argv=None):
    parser = benchmark_parser("scaling", "Speed of several ranks on one node.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of ranks")
    add_path_flags(parser)
    add_execution_flags(parser)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each number of ranks")
    parser.add_argument("--warmup", type=int, default=2, help="first turns, not timed")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        measure(args)
        return
    args = changed(args, amp=args.amp or usual_amp(pick_device(args.device, 0)))
    rows = []
    for count in args.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += ["-m", "benchmarks.scaling", *(sys.argv[1:] if argv is None else argv), "--amp", args.amp, "--one"]
        done = subprocess.run(command, capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
        if line is None:
            sys.exit(f"{count} ranks: {done.stderr.strip()[-2000:]}")
        found = json.loads(line.removeprefix(MARK))
        rate = {name: count * args.batch_size / median(found[name]) for name in ("together", "exchanging", "reference")}
        alone = args.batch_size / median(found["alone"])
        rows.append(
            {
                "ranks": count,
                "threads": found["threads"],
                "alone": alone,
                **rate,
                "speedup": shown(speedup(found["reference"], found["exchanging"])),
                "efficiency": shown(speedup(found["alone"], found["exchanging"])),
                "lost_sharing": f"{1 - speedup(found['alone'], found['together'])['median']:.1%}",
                "lost_exchange": f"{1 - speedup(found['together'], found['exchanging'])['median']:.1%}",
                "seconds": found,
            }
        )
    report(
        "scaling",
        args,
        rows,
        {
            "ranks": "ranks",
            "threads": "threads each",
            "alone": "one alone, images/s",
            "together": "all, no exchange, images/s",
            "exchanging": "all, images/s",
            "reference": "reference, all",
            "speedup": "× reference (quartiles)",
            "efficiency": "of N × alone (quartiles)",
            "lost_sharing": "lost to sharing",
            "lost_exchange": "lost to exchange",
        },
    )


if __name__ == "__main__":
    main()
