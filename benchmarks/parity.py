# SPDX-License-Identifier: MIT
"""Losses of training in bf16, compiled, or with gradient checkpointing, compared with training in float32.

    python -m benchmarks.parity --model mixmim_tiny --steps 200

All runs have the same initial weights, images and masks. A second float32 run, whose initial weights differ in the last
bits, shows how far equivalent runs diverge. Writes parity.json with the losses of all steps, which
analysis/benchmark_figure.py draws, and prints a table.
"""

import os
import time
from functools import partial

import numpy as np
import torch

from benchmarks.report import benchmark_parser, changed, deadline, report
from benchmarks.step import SIDE, Ours, Reference, add_more_executions, add_path_flags, usual_amp
from common.workers import Workers
from sarwmix.simulate.patches import Parameters, plan_scenes, simulate_scene
from util.distributed import pick_device

LAST_BITS = 1e-6  # relative change of the weights of the control


def patches_of(scene, seed):
    """The patches of a simulated scene, (n, 2, 120, 120) float32 dB."""
    image, _ = simulate_scene((seed, scene.index), scene.side, scene.side, SIDE, scene.landscape)
    patches = image.reshape(2, scene.side, SIDE, scene.side, SIDE).transpose(1, 3, 0, 2, 4)
    return patches.reshape(-1, 2, SIDE, SIDE)[: scene.patches]


def simulated_batches(args, device):
    """Batches (batch_size, 2, 120, 120) of simulated patches, dB."""
    count = args.batch_size * args.batches
    scenes = plan_scenes(Parameters(count, seed=args.seed, val_fraction=0, test_fraction=0))
    workers = Workers(min(len(os.sched_getaffinity(0)), 1 + count // 256))
    images = np.concatenate(workers.map(partial(patches_of, seed=args.seed), scenes, "scenes"))
    shuffled = images[np.random.default_rng(args.seed).permutation(count)]
    return list(torch.from_numpy(shuffled).to(device).split(args.batch_size))


def steps_within(seconds, built, most):
    """The number of steps, 2 to `most`, that all paths together can take within `seconds` (None: no limit)."""
    if seconds is None:
        return most
    begun, each = time.perf_counter(), 0.0
    for build in built:
        path = build()
        path.run(2)
        started = time.perf_counter()
        path.run(2)
        each += (time.perf_counter() - started) / 2
    spent = time.perf_counter() - begun  # counted twice below, because each path is built again
    return int(min(most, max(2, (seconds - 2 * spent) / each)))


def ways(args, batches, device):
    """{name: function that builds a Path}. The first is float32, eager."""

    def perturbed():
        path = Ours(args, batches, device, "off")
        with torch.no_grad():
            for parameter in path.model.parameters():
                parameter.mul_(1 + LAST_BITS * torch.randn_like(parameter))
        return path

    amp = usual_amp(device)
    name = "float32" if amp == "off" else amp
    found = {
        "float32": partial(Ours, args, batches, device, "off"),
        "float32, last bits changed": perturbed,
        name: partial(Ours, args, batches, device, amp),
        "reference": partial(Reference, args, batches, device, amp),
    }
    if args.grad_checkpointing:
        found[f"{name}, grad_checkpointing"] = partial(Ours, args, batches, device, amp, grad_checkpointing=True)
    for mode in args.compile:
        found[f"{name}, compile {mode}"] = partial(Ours, args, batches, device, amp, compile_mode=mode)
    return found


def main(argv=None):
    parser = benchmark_parser(
        "parity", "Losses of training in bf16, compiled, or recomputed, beside those in float32.", timed=True
    )
    add_path_flags(parser)
    parser.add_argument("--batches", type=int, default=16, help="number of batches, which are used in turn")
    parser.add_argument("--steps", type=int, default=200, help="steps of training")
    add_more_executions(parser)
    args = parser.parse_args(argv)
    device, ends = pick_device(args.device, 0), deadline(args)
    rows, found = [], ways(args, simulated_batches(args, device), device)
    left = None if ends is None else ends - time.monotonic()
    args = changed(args, steps=steps_within(left, found.values(), args.steps))
    for name, build in found.items():
        path = build()
        path.run(args.steps)
        losses = [float(loss) for loss in path.losses]
        base = rows[0]["losses"] if rows else losses
        tail = slice(-max(1, args.steps // 10), None)
        apart = max(abs(a / b - 1) for a, b in zip(losses, base))
        apart_last = abs(sum(losses[tail]) / sum(base[tail]) - 1)
        rows.append(
            {
                "path": name,
                "amp": path.amp,
                "first": losses[0],
                "last": sum(losses[tail]) / len(losses[tail]),
                "losses": losses,
                "apart": apart,
                "apart_last": apart_last,
                "apart_shown": f"{apart:.1e}",
                "apart_last_shown": f"{apart_last:.1e}",
            }
        )
    report(
        "parity",
        args,
        rows,
        {
            "path": "training",
            "amp": "amp",
            "first": "first loss",
            "last": "last tenth",
            "apart_shown": "most apart, a step",
            "apart_last_shown": "apart, last tenth",
        },
    )


if __name__ == "__main__":
    main()
