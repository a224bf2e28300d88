# SPDX-License-Identifier: MIT
"""The parts of the report (benchmarks/gpu_report.py).

part(found, settings, seconds) runs in its own process, which is forked from one that has imported this module and
computed nothing. A part that has computed nothing may fork further processes. seconds: the time that it plans with.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import main_finetune
import main_pretrain
import pretrained
from benchmarks import end_to_end, memory, parity, step
from benchmarks.apart import Apart, LeftOut, Part
from benchmarks.random_store import write_random_store
from benchmarks.report import machine
from common.ending import run_program
from common.workers import Workers
from sarwmix.packed import PackedDataset
from util.checkpoint import EXPORTED_PROGRAM
from util.distributed import pick_device
from util.optimization import StepRecord, emulates_16_bits

ROOT = Path(__file__).resolve().parent.parent
FULL_MEMORY = 40e9  # bytes of GPU memory that suffice for every path at the published batch size
KERNELS = 10  # number of kernels in the profile
PROGRAM_TOLERANCE = 1e-3  # of logits: an exported program may run other kernels


@dataclass(frozen=True)
class Settings:
    """Sizes of the parts. step_amps: precisions of the part "step". epoch_steps: steps per epoch of pretraining, which
    has 3 epochs. finetune: batch size."""

    out: Path
    seed: int
    device: str
    amp: str
    step_amps: tuple
    model: str
    batch: int
    epoch_steps: int
    finetune: int
    floods: tuple  # batch, side of an image
    parity: tuple  # batch, batches, steps
    larger: tuple  # models of the part on memory
    cases: tuple  # of benchmarks.memory
    compile: tuple  # modes of torch.compile

    @classmethod
    def of(cls, found, out, seed):
        """The Settings for the machine that `look_at_machine` describes. None, if that failed, stands for a CPU."""
        if not found or found["device"] == "cpu":
            amp = found["amp"] if found else "off"
            return cls(
                out,
                seed,
                "cpu",
                amp,
                tuple(dict.fromkeys((amp, "off"))),
                "mixmim_tiny",
                batch=4,
                epoch_steps=5,
                finetune=4,
                floods=(2, 128),
                parity=(4, 2, 8),
                larger=("mixmim_tiny",),
                cases=memory.CASES,
                compile=(),
            )
        return cls(
            out,
            seed,
            "cuda",
            found["amp"],
            (found["amp"],),
            "mixmim_base",
            batch=256 if found["gpu_bytes"] >= FULL_MEMORY else 64,
            epoch_steps=20,
            finetune=64,
            floods=(8, 512),
            parity=(64, 4, 200),
            larger=("mixmim_large", "mixmim_huge"),
            cases=memory.CASES[1:],
            compile=("default",),
        )

    def flags(self, **others):
        """The settings and `others` as flags of a program; a value of None omits the flag."""
        own = {"out": self.out, "seed": self.seed, "device": self.device, "model": self.model}
        values = {**own, "batch_size": self.batch, "amp": self.amp, **others}
        return [str(word) for name, value in values.items() if value is not None for word in (f"--{name}", value)]


def clean(out):
    """Removes the data and checkpoints of all parts, including parts that were killed."""
    for path in (out / "runs", *out.glob("end_to_end_*/")):
        shutil.rmtree(path, ignore_errors=True)


def rate(row):
    value = row["images_per_s"]
    return f"{value:,.{0 if value >= 100 else 1}f} images/s"


# ---- The machine ---------------------------------------------------------------------------------


def look_at_machine(found, settings, seconds):
    """Describes the machine."""
    device = pick_device("auto", 0)
    gpu = device.type == "cuda"
    emulated = emulates_16_bits(device, torch.bfloat16)
    facts = {
        **machine(),
        "device": device.type,
        "amp": "bf16" if not emulated else "fp16" if gpu else "off",
        "gpu_bytes": torch.cuda.get_device_properties(device).total_memory if gpu else None,
    }
    found.state["machine"] = facts
    size = f"{facts['cores']} cores, {facts['memory_gb']} GB"
    if gpu:
        size = f"{facts['gpu_bytes'] / 1e9:.0f} GB, CUDA {facts['cuda']}"
    found.add(f"{facts['gpu'] or facts['cpu']}, {size}, PyTorch {facts['torch']}, Python {facts['python']}")
    if emulated:
        found.add(
            f"bf16 is left out, as this {'GPU' if gpu else 'processor'} emulates it: {'fp16' if gpu else 'float32'} "
            "instead"
        )


# ---- (a) tests -----------------------------------------------------------------------------------


class Outcomes:
    """A plugin of pytest that counts outcomes after each test, so that the counts exist if the part is killed."""

    def __init__(self, found):
        self.found, self.of = found, {"passed": [], "failed": [], "skipped": []}

    def __str__(self):
        return ", ".join(f"{len(tests)} {outcome}" for outcome, tests in self.of.items() if tests)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.of[report.outcome].append(report.nodeid.split("::")[-1])
            self.found.state["found"] = [{"text": str(self), **self.of}]
            self.found.write()


def run_tests(found, settings, seconds):
    """Runs tests/test_cuda.py, which skips its tests without a GPU."""
    if importlib.util.find_spec("pytest") is None:
        raise LeftOut("pytest is not installed")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins of other programs may fail to import
    import pytest

    outcomes = Outcomes(found)
    pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_cuda.py")], plugins=[outcomes])
    found.state["found"] = []
    found.add(str(outcomes) or "no test was found", **outcomes.of)
    if outcomes.of["failed"] or not str(outcomes):
        sys.exit(f"failed: {', '.join(outcomes.of['failed']) or 'no test was found'}")
    if settings.device == "cpu":
        raise LeftOut("there is no GPU")


# ---- (b) training --------------------------------------------------------------------------------


def killed_at(number):
    """Makes this process kill itself in the middle of its `number`-th training step."""
    taken, add = [0], StepRecord.add

    def counting(self, *args):
        taken[0] += 1
        if taken[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *args)

    StepRecord.add = counting


def as_program(module, flags, kill_at):
    """Runs a main program with these flags, as `python main_….py` does. Returns its exit status."""
    sys.argv = [f"{module.__name__}.py", *map(str, flags)]
    if kill_at:
        killed_at(kill_at)
    return run_program(module.main)


def run(module, flags, log, kill_at=None):
    """Runs a main program in its own process until it ends, or kills itself in step `kill_at`. Returns the seconds."""
    started = time.monotonic()
    process = Apart(as_program, module, flags, kill_at, log=log)
    status = process.wait()
    if status != (-signal.SIGKILL if kill_at else 0):
        sys.exit(f"{module.__name__} ended with status {status}: {process.last_line()}")
    return time.monotonic() - started


def write_stores(work, settings):
    """Writes the packed stores for pretraining and finetuning."""
    workers = Workers(1 if settings.device == "cpu" else min(8, len(os.sched_getaffinity(0))))
    few, (batch, side) = 2 * settings.finetune, settings.floods
    splits = {"train": settings.epoch_steps * settings.batch, "val": few, "test": few}
    write_random_store(work / "patches", "benv2", splits, seed=settings.seed, workers=workers)
    write_random_store(
        work / "floods", "sen12flood", {"train": 3 * batch, "test": 2 * batch}, side, settings.seed, workers
    )


def losses_of(folder):
    return [json.loads(line)["train_loss"] for line in (folder / "log.txt").read_text().splitlines()]


def pretrain(found, settings, work, log):
    """Pretrains without interruption, then again with a kill in mid-epoch. Returns the folder of the first run."""
    steps = 3 * settings.epoch_steps
    flags = settings.flags(
        out=None,
        data_path=work / "patches",
        split="train",
        data_cache="device",
        epochs=3,
        warmup_epochs=1,
        save_every_steps=steps * 5 // 12,
        compile="off",
        log_freq=5,
    )
    flags += ["--norm_pix_loss", "--save_epochs"]
    whole, cut = work / "pretrain", work / "pretrain_killed"
    took = run(main_pretrain, (*flags, "--output_dir", whole), log)
    expected = losses_of(whole)
    found.add(
        f"pretraining, {settings.model}, batch {settings.batch}, {settings.amp}: {steps} steps in {took:.0f} s with "
        f"start and saves, loss {expected[0]:.4f} → {expected[-1]:.4f}",
        losses=expected,
        seconds=took,
    )
    run(main_pretrain, (*flags, "--output_dir", cut), log, kill_at=steps * 6 // 10)
    done = len(losses_of(cut))
    run(main_pretrain, (*flags, "--output_dir", cut, "--resume", "auto"), log)
    shutil.rmtree(cut / "tensorboard")
    losses = losses_of(cut)
    apart = max(abs(a / b - 1) for a, b in zip(losses, expected)) if len(losses) == len(expected) else float("inf")
    found.add(
        f"killed in step {steps * 6 // 10} and continued: losses of the {len(losses)} epochs "
        + ("equal to the last bit" if losses == expected else f"differ by {apart:.1e} at most"),
        losses=losses,
        apart=apart,
        epochs_before=done,
    )
    if settings.device == "cpu" and losses != expected or apart > 0.05:
        sys.exit(f"a continued run gives other losses: {losses}, not {expected}")
    return whole


def finetune(found, settings, work, log, start):
    """Finetunes both classifiers from the pretrained checkpoint. Returns {dataset: folder}."""
    folders = {}
    for dataset, store, batch in (
        ("benv2", "patches", settings.finetune),
        ("sen12flood", "floods", settings.floods[0]),
    ):
        folders[dataset] = work / dataset
        flags = settings.flags(
            out=None,
            dataset=dataset,
            data_path=work / store,
            data_cache="device",
            finetune=start / "checkpoint.pth",
            batch_size=batch,
            epochs=1,
            warmup_epochs=0,
            compile="off",
            output_dir=folders[dataset],
        )
        took = run(main_finetune, flags, log)
        entry = json.loads((folders[dataset] / "log.txt").read_text())
        found.add(
            f"finetuning, {dataset}, batch {batch}: loss {entry['train_loss']:.4f} in training, "
            f"{entry['test_loss']:.4f} after it, {took:.0f} s",
            dataset=dataset,
            seconds=took,
            train_loss=entry["train_loss"],
            test_loss=entry["test_loss"],
        )
    return folders


def same_logits(checkpoint, exported, store, device):
    """Compares the logits of a checkpoint with those of its export and of the program. Returns the exit status."""
    images = PackedDataset(store, "test").images(list(range(2)))
    with torch.no_grad():
        logits = []
        for path in (checkpoint, exported):
            model, prepare = pretrained.load(path, device=device)
            logits.append(model(*(prepare(batch.to(device))[0] for batch in images)))
        program = torch.export.load(exported / EXPORTED_PROGRAM).module().to(device)
        difference = (program(*(batch.to(device) for batch in images)) - logits[0]).abs().max().item()
    if not logits[0].isfinite().all() or not torch.equal(*logits):
        return "logits differ"
    return 0 if difference < PROGRAM_TOLERANCE else f"logits of {EXPORTED_PROGRAM} differ by {difference:.2g}"


def export(found, settings, work, log, folders):
    """Exports the finetuned checkpoints, and checks the logits of the exports and of their programs."""
    for dataset, folder in folders.items():
        checkpoint, exported = folder / "checkpoint_best.pth", work / f"{dataset}_exported"
        store = work / ("patches" if dataset == "benv2" else "floods")
        run(main_finetune, ("--export", exported, "--finetune", checkpoint, "--device", settings.device), log)
        check = Apart(same_logits, checkpoint, exported, store, settings.device, log=log)
        if check.wait():
            sys.exit(f"{dataset}: exported and loaded again: {check.last_line()}")
        size = sum(path.stat().st_size for path in exported.iterdir())
        found.add(
            f"exported, {dataset}: {size / 1e6:,.0f} MB; loaded, it gives the logits of the checkpoint, and so does "
            f"{EXPORTED_PROGRAM}",
            bytes=size,
        )


def train(found, settings, seconds):
    """Pretrains, continues a killed pretraining, finetunes, exports and loads; on packed stores of random images."""
    work, log, started = settings.out / "runs", settings.out / "runs.log", time.monotonic()
    log.unlink(missing_ok=True)
    work.mkdir()
    process = Apart(write_stores, work, settings, log=log)
    if process.wait():
        sys.exit(f"the packed stores could not be made: {process.last_line()}")
    size = sum(path.stat().st_size for path in work.rglob("part_*.bin"))
    found.add(f"packed stores of random images: {size / 1e6:,.0f} MB in {time.monotonic() - started:.0f} s", bytes=size)
    folders = finetune(found, settings, work, log, pretrain(found, settings, work, log))
    export(found, settings, work, log, folders)


# ---- (c) … (f): benchmarks -----------------------------------------------------------------------


def benchmark(module, found, settings, *flags):
    """Runs a benchmark with these flags and includes its JSON. Returns the rows."""
    sys.argv = [f"{module.__name__}.py", *flags]
    module.main()
    name = module.__name__.split(".")[-1]
    found.keep(settings.out / f"{name}.json")
    return found.state["data"][name]["rows"]


def measure_step(found, settings, seconds):
    """Measures eager execution first, so that its result exists even if compilation fails; then all ways in turns."""
    sizes = (10, 3, 50) if settings.device == "cuda" else (1, 1, 2)
    turn = dict(zip(("steps", "warmup", "rounds"), sizes))
    more = ["--grad_checkpointing", "--attention", "--amp", *settings.step_amps]
    flags = settings.flags(seconds=seconds * (0.15 if settings.compile else 1), amp=None, **turn)
    report_step(found, benchmark(step, found, settings, *flags, *more))
    if not settings.compile:
        found.add("compiled: left out on a CPU, where it takes minutes")
        return
    flags = settings.flags(seconds=seconds * 0.8, amp=None, **turn)
    rows = benchmark(step, found, settings, *flags, *more, "--compile", *settings.compile)
    found.state["found"] = []  # these rows include the eager ways, measured again
    report_step(found, rows)


def report_step(found, rows):
    for row in rows:
        peak = f", peak {row['peak_gb']:.1f} GB besides weights and moments" if row["peak_gb"] else ""
        mfu = f", MFU {row['mfu']}" if row["mfu"] else ""
        found.add(
            f"{row['path']}: {row['ms']:.1f} ms, {rate(row)}, {row['ratio']['median']:.2f} × reference{mfu}{peak}, "
            f"{'float32' if row['amp'] == 'off' else row['amp']}"
        )


def measure_end_to_end(found, settings, seconds):
    """Measures training steps with their loader."""
    gpu, rasterio = settings.device == "cuda", importlib.util.find_spec("rasterio") is not None
    skip, steps = (2, 6) if gpu else (1, 2)
    if not rasterio:
        found.add("GeoTIFF loader: left out, as rasterio is not installed")
    flags = settings.flags(
        seconds=seconds * (0.3 if settings.compile else 1),
        samples=(skip + steps) * settings.batch,
        skip=skip,
        steps=steps,
        rounds=30 if gpu else 2,
        workers=None if gpu else 1,
    )
    for mode in ("off", *settings.compile[:1]):  # eager first, as in `measure_step`
        for row in benchmark(end_to_end, found, settings, *flags, "--compile", mode):
            compiled = "" if mode == "off" or row["way"].startswith("reference") else f", compile {mode}"
            found.add(
                f"{row['way']}{compiled}: {row['ms']:.1f} ms, {rate(row)}, {row['ratio']['median']:.2f} × reference, "
                f"waiting for data {row['waiting']}"
            )


def compare_losses(found, settings, seconds):
    """Trains in 16 bits and in float32, and compares the losses."""
    batch, batches, steps = settings.parity
    flags = settings.flags(seconds=seconds, batch_size=batch, batches=batches, steps=steps, amp=None)
    rows = benchmark(parity, found, settings, *flags)
    for row in rows[1:]:
        found.add(
            f"{row['path']}: loss {row['first']:.4f} → {row['last']:.4f} in {len(row['losses'])} steps of {batch}; "
            f"float32 {rows[0]['last']:.4f}; most apart {row['apart_shown']}, in the end {row['apart_last_shown']}"
        )


def measure_one(args, model, case, path):
    """Measures a case of benchmarks.memory; the body of its process."""
    path.write_text(json.dumps(memory.measure(args, model, case)))


def measure_memory(found, settings, seconds):
    """Measures larger models with and without gradient checkpointing, each in its own process."""
    sys.argv = ["memory.py", *settings.flags(model=None), "--models", *settings.larger]
    args = memory.get_args_parser().parse_args()
    rows, path, started, longest = [], settings.out / "case.json", time.monotonic(), 0.0
    for model in settings.larger:
        for case in settings.cases:
            begun = time.monotonic()
            if begun - started + longest > seconds:
                found.add(f"{model}, {case}: left out, as time is short")
                continue
            process = Apart(measure_one, args, model, case, path, log=settings.out / "memory.log")
            if process.wait():
                found.add(f"{model}, {case}: failed: {process.last_line()}")
                continue
            row = json.loads(path.read_text())
            path.unlink()
            rows.append(row)
            memory.write(args, rows)
            found.keep(settings.out / "memory.json")
            longest = max(longest, time.monotonic() - begun)
            found.add(
                f"{row['model']}, {row['path']}: step of {row['batch_size']} {row['step_s'] * 1e3:,.0f} ms, "
                f"{row['batch_size'] / row['step_s']:,.0f} images/s, peak {row['peak_gb']:.1f} GB, "
                f"{row['kept_mb_per_image']:.1f} MB an image kept"
            )
    if not rows:
        sys.exit("no case could be measured")


# ---- (g) profile ---------------------------------------------------------------------------------


def busy_time(spans):
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def profile_step(found, settings, seconds):
    """Profiles a training step: the kernels with the most time, and the idle time of the GPU."""
    device, gpu = pick_device(settings.device, 0), settings.device == "cuda"
    args = argparse.Namespace(model=settings.model, seed=settings.seed)
    path = step.Ours(args, step.noise(settings.batch, device, settings.seed), device, settings.amp)
    path.run(3)
    started = time.perf_counter()
    path.run(1)
    # A tenth of the time is for the steps, because reading a profile takes longer than recording it.
    steps = max(1, min(5, int(seconds / 10 / (time.perf_counter() - started))))
    kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * gpu]
    once = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)  # warmup: excludes the start of the profiler
    with torch.profiler.profile(activities=kinds, schedule=once) as profiler:
        for count in (1, steps):
            path.run(count)
            profiler.step()
    if gpu:
        on_gpu = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
        spans = [event for event in on_gpu if not event.is_user_annotation]
        taken = [(event.name, event.time_range.end - event.time_range.start) for event in spans]
    else:
        functions = (event for event in profiler.key_averages() if not event.is_user_annotation)
        taken = [(event.key, event.self_cpu_time_total) for event in functions]
    if not taken:
        sys.exit("the profiler saw nothing; is CUPTI installed, and may this user profile?")
    if not gpu:
        add_kernels(found, taken, sum(value for _, value in taken), steps)
        found.add("share of idle time: left out, as there is no GPU")
        return
    spans = [(event.time_range.start, event.time_range.end) for event in spans]
    whole, busy = max(end for _, end in spans) - min(start for start, _ in spans), busy_time(spans)
    add_kernels(found, taken, whole, steps)
    found.add(
        f"GPU idle {1 - busy / whole:.1%} of {whole / steps / 1e3:.1f} ms a step, {len(spans) / steps:,.0f} kernels "
        "and copies a step",
        idle=1 - busy / whole,
        ms=whole / steps / 1e3,
    )


def add_kernels(found, taken, whole, steps):
    """Adds the kernels with the most time. taken: [(name, µs)]; their shares are of `whole`, µs."""
    total = Counter()
    for name, value in taken:
        total[name] += value
    for name, value in total.most_common(KERNELS):
        share, ms = value / whole, value / steps / 1e3
        found.add(f"{share:6.1%}  {ms:8.3f} ms a step  {name[:90]}", kernel=name, share=share, ms=ms)


MACHINE = Part("machine", "The machine", 1, look_at_machine)
# Shares: expected seconds on an H100, of eight minutes. Time that a part does not use goes to later parts.
PARTS = (
    Part("tests", "(a) Tests that need a GPU", 90, run_tests),
    Part("training", "(b) Training, killed and continued; finetuning; export", 100, train),
    Part("step", "(c) A training step", 150, measure_step),
    Part("end_to_end", "(d) Training with its data", 60, measure_end_to_end),
    Part("parity", "(e) Losses in 16 bits and in float32", 40, compare_losses),
    Part("memory", "(f) Larger models, with and without gradient checkpointing", 45, measure_memory),
    Part("profile", "(g) Profile of a step", 20, profile_step),
)
