# SPDX-License-Identifier: MIT
"""How a training is executed: `--compile auto` times eager and compiled execution, with both ways of attention, and
takes the fastest.

Forward and backward passes of the model are timed before DDP takes it, so that no rank waits for another within a step,
and without an optimizer step. Nothing that a run's numbers depend on is changed: no weight, gradient, moment or random
stream.
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

WARM_UP = 3  # steps of each candidate that are not timed; the first one compiles
ROUNDS = 3  # timed rounds of steps of each candidate, whose median counts
ROUND_SECONDS = 0.5  # that a round takes at least
LIMIT = 300  # seconds after which no further candidate is tried
OFF = "off"  # of --compile
OUT_OF_MEMORY = "out of memory"  # how PyTorch words it


def describe(execution):
    """An execution in words. execution: {"compile": "off" or a torch.compile mode, "attention": of `execute_with`}."""
    how = "eager" if execution["compile"] == OFF else f"compiled ({execution['compile']})"
    return f"{how} with {execution['attention']} attention"


def settle_execution(training, loss_of, config, ranks, start):
    """Chooses how `training.model` is executed, and notes it in `training.execution`. The same on all ranks.

    loss_of(model) → the loss of a batch of the shapes of training. start: `util.training.Start`. With --compile auto,
    or without the flag, a continued run keeps the execution of the run that it continues, if that ran on such a device.
    Without the flag a new run is timed on CUDA, and eager on a CPU. Raises TrainingError where a mode that was asked
    for cannot be compiled.
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
    """The execution of the run that is continued, or None for a new run, one on another device, or an older one that
    does not say."""
    before, variants = start.bits, training.model.attention_variants
    if before.get("device") != training.bits()["device"] or before.get("compile") not in COMPILE_MODES:
        return None
    return {
        "compile": before["compile"],
        "attention": before["attention"] if before.get("attention") in variants else variants[0],
    }


def leave_out(execution, failure):
    """Go on without a way that has failed."""
    log.warning("--compile auto: %s is left out: %s", describe(execution), failure)


def refuse(execution, failure):
    """End a run whose --compile cannot be had."""
    raise TrainingError(
        f"--compile {execution['compile']}: {failure}; mend the compiler (C++ with the headers of Python; on a GPU "
        "also "
        f"Triton), or go on without it: --compile off"
    )


class Bench:
    """Has a model executed in one way or another, and times it.

    Every rank calls the same methods and gets the same results.
    """

    def __init__(self, training, loss_of, config, ranks):
        self.training, self.model, self.loss_of, self.ranks = training, training.model, loss_of, ranks
        self.grad_checkpointing, self.batch_size = config.grad_checkpointing, config.batch_size
        self._compiled = False

    def set(self, execution):
        """Execute in this way from now on; what was compiled for another is thrown away."""
        if self._compiled:
            torch.compiler.reset()
        self._compiled = execution["compile"] != OFF
        self.model.execute_with(
            self.grad_checkpointing, execution["compile"] if self._compiled else None, execution["attention"]
        )

    def compiled_or(self, execution, on_failure):
        """Set an execution.

        Where its compiler fails, on_failure(execution, failure) is called, and it is set to be eager. Returns what is
        set.
        """
        if execution["compile"] == OFF:
            self.set(execution)
            return execution
        _, failure = self.attempt(lambda: self.set(execution) or self.steps(1))
        if failure and OUT_OF_MEMORY in failure:
            with self.ranks.together():
                self.steps(1)  # raises that as training would
        elif failure:
            on_failure(execution, failure)
            execution = {**execution, "compile": OFF}
            self.set(execution)
        return execution

    def fastest(self, usual):
        """Time all ways, and set the fastest. Returns it, with what was measured: "ms" of a forward and backward pass.

        A way that fails on one rank, or does not fit its memory, is left out. Raises what it was if none works.
        """
        variants, started, times = self.model.attention_variants, time.monotonic(), {}
        for way in ({"compile": mode, "attention": variant} for mode in (OFF, "default") for variant in variants):
            if max(self.ranks.gather(time.monotonic() - started)) > LIMIT:
                leave_out(way, f"measuring has taken {LIMIT} s")
                continue
            _, failure = self.attempt(lambda: self.set(way) or self.steps(WARM_UP))
            if failure is None:
                seconds, failure = self.attempt(self.time)
            if failure is None:
                times[describe(way)] = max(seconds), way
                continue
            leave_out(way, failure)
            if way["compile"] != OFF and OUT_OF_MEMORY not in failure:
                break  # the compiler, which will not do better with other attention
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

    def attempt(self, work):
        """Run work() on every rank.

        Returns (the results of all, None), or (None, what has failed on the first rank where something did).
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # whatever a compiler raises; the other ranks must not wait for this one
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
        """Seconds of a step on this rank: the median of some rounds."""
        steps = max(1, math.ceil(ROUND_SECONDS / self.steps(1)))
        return statistics.median(self.steps(steps) for _ in range(ROUNDS))

    def steps(self, count):
        """Mean seconds of some forward and backward passes, beside memory as large as the moments that training will
        hold."""
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
