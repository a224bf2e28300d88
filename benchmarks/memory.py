# SPDX-License-Identifier: MIT
"""Memory of a pretraining step, compared with our plain re-implementation, with and without gradient checkpointing.

    python -m benchmarks.memory --models mixmim_base mixmim_large mixmim_huge --batch_size 8

Each case runs in its own process. The peak is that of the GPU, or of the process on a CPU. In addition, the bytes that
autograd saves for the backward pass are counted (each tensor once, without parameters): in all, and within the largest
block, which is what gradient checkpointing recomputes at a time. Counting at two batch sizes separates the part that
grows with the batch from the constant part (weights in 16 bits). From this, the table estimates the batch size that
fits a GPU with a tenth of its memory left free. Writes memory.json and prints a table.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.report import benchmark_parser, changed, report
from benchmarks.step import Ours, Reference, add_amp_flag, add_batch_flags, noise, usual_amp
from models_mixmim import SIZES, Block
from util.distributed import pick_device
from util.misc import peak_memory

CASES = ("reference", "ours", "ours, grad_checkpointing")
COUNTED = (2, 4)  # batch sizes for counting; small, so that they do not determine the peak


def kept_for_backward(path, batch):
    """Bytes that autograd saves for the backward pass, without parameters: [in all, within each block]."""
    own, kept, blocks = {p.untyped_storage().data_ptr() for p in path.model.parameters()}, {}, {}
    hooks = [
        hook
        for block in path.model.modules()
        if isinstance(block, Block)
        for hook in (
            block.register_forward_pre_hook(lambda block, _: blocks.update({block: -sum(kept.values())})),
            block.register_forward_hook(lambda block, *_: blocks.update({block: blocks[block] + sum(kept.values())})),
        )
    ]

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = path.loss(batch, path.mask())
    loss.backward()  # saved tensors live until here, so their addresses are unique
    path.model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return [sum(kept.values()), *blocks.values()]


def per_image(path):
    """Saved bytes: (per image, per image within the largest block, constant). path: its first batches have COUNTED
    images."""
    few, many = (kept_for_backward(path, batch) for batch in path.batches[:2])
    whole, *blocks = [(b - a) / (COUNTED[1] - COUNTED[0]) for a, b in zip(few, many)]
    return whole, max(blocks, default=None), many[0] - whole * COUNTED[1]


def measure(args, model, case):
    """Measures one case in this process. Returns a row of the table. model: key of SIZES; case: of CASES."""
    device = pick_device(args.device, 0)
    checkpointing = case == CASES[-1]
    batches = [noise(size, device, args.seed, 1)[0] for size in (*COUNTED, args.batch_size)]
    path = (Reference if case == CASES[0] else Ours)(changed(args, model=model), batches, device, args.amp)
    kept, block, once = per_image(path)
    if checkpointing:
        path.model.execute_with(grad_checkpointing=True)
        kept, _, once = per_image(path)
    needed = kept + block if checkpointing else kept
    path.batches = path.batches[2:]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    path.run(1)  # allocates the moments of the optimizer
    started = time.perf_counter()
    path.run(args.steps)
    step = (time.perf_counter() - started) / args.steps
    # A trained parameter has a weight, a gradient and two moments.
    fixed = once + sum(p.nbytes * (4 if p.requires_grad else 1) for p in path.model.parameters())
    return {
        "model": model,
        "path": case,
        "amp": path.amp,
        "batch_size": args.batch_size,
        "parameters_m": sum(p.numel() for p in path.model.parameters()) / 1e6,
        "fixed_gb": fixed / 1e9,
        "kept_mb_per_image": kept / 1e6,
        "block_mb_per_image": block and block / 1e6,
        "peak_gb": peak_memory(device) / 1e9,
        "step_s": step,
        **{f"batch_in_{size}_gb": int(max(0, size * 1e9 * 0.9 - fixed) // needed) // 2 * 2 for size in args.memory},
    }


def get_args_parser():
    parser = benchmark_parser(
        "memory", "Memory of a pretraining step by size of the model, with and without gradient checkpointing."
    )
    parser.add_argument(
        "--models",
        choices=tuple(SIZES),
        nargs="+",
        default=["mixmim_base", "mixmim_large", "mixmim_huge"],
        help="sizes of the model",
    )
    add_batch_flags(parser, batch_size=8)
    add_amp_flag(parser)
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument(
        "--memory",
        type=int,
        nargs="+",
        default=[32, 80, 141],
        metavar="GB",
        help="GB of memory of the GPUs for which the batch size is estimated",
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # model and case, in this process
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if args.one:
        model, case = args.one
        print(json.dumps(measure(args, model, case)))
        return
    args = changed(args, amp=args.amp or usual_amp(pick_device(args.device, 0)))
    rows = []
    for model in args.models:
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.memory", *(sys.argv[1:] if argv is None else argv)]
            command += ["--amp", args.amp, "--one", model, case]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{model}: {done.stderr.strip().splitlines()[-1]}")
            rows.append(json.loads(done.stdout))
    write(args, rows)


def write(args, rows):
    """Writes memory.json and prints the table. rows: from `measure`."""
    report(
        "memory",
        args,
        rows,
        {
            "model": "model",
            "path": "path",
            "parameters_m": "parameters, M",
            "fixed_gb": "independent of the batch, GB",
            "kept_mb_per_image": "kept, MB/image",
            "block_mb_per_image": "in a block, MB/image",
            "peak_gb": f"peak at {args.batch_size}, GB",
            "step_s": "step, s",
            **{f"batch_in_{size}_gb": f"batch in {size} GB" for size in args.memory},
        },
    )


if __name__ == "__main__":
    main()
