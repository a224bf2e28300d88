# SPDX-License-Identifier: MIT
"""Selects the execution of a training: `--compile auto` times eager and compiled execution with both implementations of
attention, and selects the fastest.

Forward and backward passes of the model are timed before it is wrapped in DDP, so that ranks do not wait for each other
within a step, and without an optimizer step. The timing changes no weight, gradient, moment or random stream.
"""

import gc
import logging
import math
import statistics
import time

import torch

from common.errors import TrainingError
from util.program import COMPILE_MODES

log = logging.getLogger(__name__)

WARM_UP = 3  # untimed steps of each candidate; the first one compiles
ROUNDS = 3  # timed rounds of each candidate; the result is their median
ROUND_SECONDS = 0.5  # minimum duration of a round
LIMIT = 300  # seconds after which no further candidate is timed
OFF = "off"  # value of --compile
OUT_OF_MEMORY = "out of memory"  # part of PyTorch's message


def describe(execution):
    """An execution in words: {"compile": "off" or a mode of torch.compile, "attention": argument of `execute_with`}."""
    how = "eager" if execution["compile"] == OFF else f"compiled ({execution['compile']})"
    return f"{how} with {execution['attention']} attention"


def settle_execution(training, loss_of, config, ranks, start):
    """Selects the execution of `training.model`, and stores it in `training.execution`. The same on all ranks.

    loss_of(model) → the loss of a batch with the shapes of training. start: `util.training.Start`. With --compile auto,
    or without the flag, a continued run keeps its execution if it continues on the same kind of device. Without the
    flag, a new run is timed on CUDA, and eager on a CPU. Raises TrainingError if a requested mode cannot be compiled.
    """
    usual = {"compile": OFF, "attention": training.model.attention_variants[0]}
    before, mode = kept_execution(training, start), config.compile
    if mode is None:
        mode = "auto" if ranks.device.type == "cuda" or before not in (None, usual) else OFF
    bench = Bench(training, loss_of, config, ranks)
    if mode != "auto":
        training.execution = bench.compiled_or({**usual, "compile": mode}, refuse)
    elif before:
        log.info("--compile auto: %s, as in the run that is continued", describe(before))
        training.execution = bench.compiled_or(before, leave_out)
    else:
        training.execution = bench.fastest(usual)
    training.warn_of_other_bits(start)


def kept_execution(training, start):
    """The execution of the run that is continued; None for a new run, another device, or a run without a record."""
    before, variants = start.bits, training.model.attention_variants
    if before.get("device") != training.bits()["device"] or before.get("compile") not in COMPILE_MODES:
        return None
    attention = before.get("attention")
    return {"compile": before["compile"], "attention": attention if attention in variants else variants[0]}


def leave_out(execution, failure):
    """Logs that an execution failed and is skipped."""
    log.warning("--compile auto: %s is left out: %s", describe(execution), failure)


def refuse(execution, failure):
    """Raises TrainingError for a requested --compile that failed."""
    raise TrainingError(
        f"--compile {execution['compile']}: {failure}; repair the compiler (C++ with the headers of Python; on a GPU "
        "also Triton), or run without it: --compile off"
    )


class Bench:
    """Sets and times the execution of a model. Every rank calls the same methods and gets the same results."""

    def __init__(self, training, loss_of, config, ranks):
        self.training, self.model, self.loss_of, self.ranks = training, training.model, loss_of, ranks
        self.grad_checkpointing, self.batch_size = config.grad_checkpointing, config.batch_size
        self._compiled = False

    def set(self, execution):
        """Sets the execution of the model, and discards what was compiled for another."""
        if self._compiled:
            torch.compiler.reset()
        self._compiled = execution["compile"] != OFF
        self.model.execute_with(
            self.grad_checkpointing, execution["compile"] if self._compiled else None, execution["attention"]
        )

    def compiled_or(self, execution, on_failure):
        """Sets an execution and returns it. If compilation fails, calls on_failure(execution, failure), and sets and
        returns the eager execution."""
        if execution["compile"] == OFF:
            self.set(execution)
            return execution
        _, failure = self.attempt(self.begin, execution, 1)
        if failure and OUT_OF_MEMORY in failure:
            with self.ranks.together():
                self.steps(1)  # raises the same error as training would
        elif failure:
            on_failure(execution, failure)
            execution = {**execution, "compile": OFF}
            self.set(execution)
        return execution

    def fastest(self, usual):
        """Times all executions and sets the fastest. Returns it with "ms", the times of a forward and backward pass.

        An execution that fails on a rank, or does not fit its memory, is skipped. If all fail, raises the error of
        `usual`.
        """
        variants, started, times = self.model.attention_variants, time.monotonic(), {}
        for way in ({"compile": mode, "attention": variant} for mode in (OFF, "default") for variant in variants):
            if max(self.ranks.gather(time.monotonic() - started)) > LIMIT:
                leave_out(way, f"measuring has taken {LIMIT} s")
                continue
            _, failure = self.attempt(self.begin, way, WARM_UP)
            if failure is None:
                seconds, failure = self.attempt(self.time)
            if failure is None:
                times[describe(way)] = max(seconds), way
                continue
            leave_out(way, failure)
            if way["compile"] != OFF and OUT_OF_MEMORY not in failure:
                break  # the compiler fails with the other attention too
        if not times:
            self.set(usual)
            with self.ranks.together():
                self.steps(1)
            return usual
        seconds, best = min(times.values(), key=lambda entry: entry[0])
        if best is not way:
            self.set(best)
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.ranks.device)
        measured = {name: round(1e3 * seconds, 3) for name, (seconds, _) in times.items()}
        log.info(
            "--compile auto: %s is the fastest: forward and backward pass of %d samples: %s; measured in %.0f s",
            describe(best),
            self.batch_size,
            ", ".join(f"{name} {ms:.1f} ms" for name, ms in measured.items()),
            time.monotonic() - started,
        )
        return {**best, "ms": measured}

    def begin(self, execution, steps):
        """Sets the execution, and runs some steps, of which the first compiles."""
        self.set(execution)
        self.steps(steps)

    def attempt(self, work, *args):
        """Runs work(*args) on every rank. Returns (results of all ranks, None), or (None, failure of the first rank
        with one)."""
        result, failure = None, None
        try:
            result = work(*args)
        except Exception as error:  # a compiler can raise anything, and the other ranks must not wait for this one
            failure = _one_line(error)
        if failure:
            self.model.zero_grad(set_to_none=True)
            if self.ranks.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        results, failures = zip(*self.ranks.gather((result, failure)))
        failure = next(filter(None, failures), None)
        return (None, failure) if failure else (results, None)

    def time(self):
        """Seconds of a step on this rank: the median of ROUNDS."""
        steps = max(1, math.ceil(ROUND_SECONDS / self.steps(1)))
        return statistics.median(self.steps(steps) for _ in range(ROUNDS))

    def steps(self, count):
        """Mean seconds of `count` forward and backward passes, with memory allocated for the moments of training."""
        device, model = self.ranks.device, self.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        missing = 0 if self.training.optimizer.state else 2 * sum(p.nbytes for p in parameters)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            moments = torch.empty(missing, dtype=torch.uint8, device=device)
            model.train()
            started = time.perf_counter()
            for _ in range(count):
                self.loss_of(model).backward()
                model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = (time.perf_counter() - started) / count
            del moments
        return seconds


def _one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
