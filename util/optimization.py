# SPDX-License-Identifier: MIT
"""Mixed precision, the optimizer step, and the record of losses and gradient norms of an epoch."""

import logging
import time

import torch

from common.errors import TrainingError

log = logging.getLogger(__name__)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
PROBE_SIDE = 256  # of the matrices whose product shows whether a CPU emulates 16-bit arithmetic
PROBE_SECONDS = 0.02  # that the product is repeated for
EMULATED = 8  # times as slow as float32
MOST_IDS = 64  # sample ids named in an error
MOST_SKIPPED = 50  # fp16 steps skipped in a row before a run counts as diverged


# ---- Mixed precision -----------------------------------------------------------------------------


def settle_amp(amp, ranks):
    """--amp; where it is None, the type that the devices compute in.

    That is "bf16" on a GPU, "fp16" on GPUs before compute capability 8.0, and "off" on a CPU.
    """
    on_gpu = ranks.device.type == "cuda"
    if amp == "off" or amp is None and not on_gpu:
        return "off"
    emulated = any(ranks.gather(emulates_16_bits(ranks.device, AMP_DTYPES[amp or "bf16"])))
    if amp is None and emulated:
        log.info("--amp fp16 is chosen, because GPUs before compute capability 8.0 have no bf16 arithmetic")
        return "fp16"
    if emulated:
        log.warning(
            "--amp %s: this %s has no instructions for it, and matrix products take many times as long as %s; leave "
            "the flag out",
            amp,
            *(("GPU", "in fp16") if on_gpu else ("CPU", "in float32")),
        )
    return amp or "bf16"


def emulates_16_bits(device, dtype=torch.bfloat16):
    """Whether a device emulates products in bf16 or fp16.

    GPUs emulate bf16 before compute capability 8.0. On a CPU a product is timed, for milliseconds.
    """
    if device.type == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other longer than they compute
    try:
        return _product_seconds(dtype) > EMULATED * _product_seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _product_seconds(dtype):
    """Seconds of a matrix product on the CPU, the shortest of several."""
    matrix, times, end = torch.ones(PROBE_SIDE, PROBE_SIDE, dtype=dtype), [], time.perf_counter() + PROBE_SECONDS
    while len(times) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    return min(times)


def autocast(device, amp):
    """The mixed-precision context of `--amp`."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")


# ---- Steps ---------------------------------------------------------------------------------------


def optimizer_step(parameters, optimizer, scaler, clip_grad):
    """Clips and applies the gradients. Returns their norm before clipping, on the device."""
    scaler.unscale_(optimizer)
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


class StepRecord:
    """Loss and gradient norm of every step of an epoch. They stay on the device until `collect` reads them.

    sampler: the MicroBatchSampler of the epoch. scaled: whether the loss is scaled (fp16). progress: what `progress`
    gave for the first steps of the epoch, where a run continues in mid-epoch. losses: of the steps read so far.
    grad_norm: of the last of them.
    """

    def __init__(self, sampler, ranks, scaled, progress=None):
        progress = progress or {"step": 0, "losses": torch.zeros(0), "grad_norm": 0.0, "skipped": 0}
        self.sampler, self.ranks, self.scaled = sampler, ranks, scaled
        self.read, self.losses = progress["step"], progress["losses"].tolist()
        self.grad_norm, self.skipped = progress["grad_norm"], progress["skipped"]
        self.values = torch.zeros(2, sampler.steps, device=ranks.device)

    def add(self, step, loss, grad_norm):
        self.values[0, step], self.values[1, step] = loss, grad_norm

    def collect(self, done):
        """Reads what the steps before step `done` gave, averaged over ranks. Every rank calls it.

        Raises TrainingError, on all ranks alike, at the first loss or norm that is not finite. With a scaled loss a
        norm may overflow, as that step is then skipped; but not many times in a row.
        """
        if done == self.read:
            return
        recent = self.ranks.mean(self.values[:, self.read : done].clone()).tolist()
        for step, (loss, norm) in enumerate(zip(*recent), self.read):
            bad = None
            if not abs(loss) < float("inf"):
                bad = f"loss {loss}"
            elif not norm < float("inf"):
                self.skipped += 1
                if not self.scaled:
                    bad = f"gradient norm {norm}"
                elif self.skipped >= MOST_SKIPPED:
                    bad = f"{self.skipped} fp16 steps in a row overflowed; try --amp bf16 or a lower --lr"
            else:
                self.skipped = 0
            if bad:
                raise TrainingError(
                    f"epoch {self.sampler.epoch}, step {step}: {bad}; {self._samples_of(step)}; the last saved "
                    "checkpoint precedes this step"
                )
            self.losses.append(loss)
            self.grad_norm = norm
        self.read = done

    def mean_loss(self, steps):
        """The mean loss of the last steps read."""
        recent = self.losses[-steps:]
        return sum(recent) / len(recent)

    def progress(self):
        """The steps read so far, for a checkpoint: plain values and tensors."""
        return {
            "step": self.read,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "grad_norm": self.grad_norm,
            "skipped": self.skipped,
        }

    def _samples_of(self, step):
        ids = self.sampler.global_batch(self.sampler.epoch, step).flatten().tolist()
        more = f" and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
        return f"sample ids {', '.join(map(str, ids[:MOST_IDS]))}{more}"
