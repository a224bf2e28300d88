# SPDX-License-Identifier: MIT
"""All benchmarks in turn, with settings for this machine: `python -m benchmarks --out DIR`.

With GPUs: base at batch 256 in bf16, eager and compiled, on 1 to all GPUs; on a CPU: base at batch 16. Each benchmark
writes its JSON to --out; `python -m analysis.benchmark_figure DIR` draws them. A failed benchmark does not stop the
others.
"""

import subprocess
import sys
import time

import torch

from benchmarks.report import benchmark_parser

CPU = {
    "step": "--grad_checkpointing --compile default",
    "end_to_end": "",
    "scaling": "--ranks 1 2",
    "memory": "",
    "parity": "--model mixmim_tiny",
    "data": "",
}
GPU = {
    "step": "--batch_size 256 --steps 10 --warmup 5 --grad_checkpointing --compile default max-autotune-no-cudagraphs",
    "end_to_end": "--batch_size 256 --samples 8192 --steps 20 --workers 10 --compile default",
    "scaling": "--batch_size 256 --steps 10 --compile default",
    "memory": "--batch_size 64",
    "parity": "--batch_size 64 --compile default --grad_checkpointing",
    "data": "",
}


def main(argv=None):
    parser = benchmark_parser("", "All benchmarks, with settings for this machine.")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(GPU), default=list(GPU), metavar="NAME", help="only these benchmarks"
    )
    args = parser.parse_args(argv)
    gpus, failed = torch.cuda.device_count(), []
    for name in args.only:
        flags = (GPU if gpus else CPU)[name].split()
        if gpus and name == "scaling":
            flags += ["--ranks", *map(str, sorted({1, 2, gpus} & set(range(1, gpus + 1))))]
        print(f"\n== {name} ==", flush=True)
        started = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(args.out), "--seed", str(args.seed)]
        if subprocess.run([*command, *flags]).returncode:
            failed.append(name)
        print(f"-- {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
