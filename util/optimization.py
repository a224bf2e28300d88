# SPDX-License-Identifier: MIT
"""One epoch of optimisation steps, whatever is trained: accumulation, mixed precision, clipping, the record of the losses."""

import contextlib
import logging
import time
from functools import partial

import torch

from common.errors import Interrupted, TrainingError
from util.lr_sched import adjust_learning_rate
from util.misc import duration, peak_memory
from util.sampling import stream_seed

log = logging.getLogger(__name__)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
MASK_STREAM, DROP_PATH_STREAM, MIXUP_STREAM = 1, 2, 3  # random streams of a micro-batch, besides sample order and flips
PROBE_SIDE, PROBE_S, EMULATED = (
    256,
    0.02,
    8,
)  # a product of matrices of this side, repeated for so long; how many times as slow is emulated
MOST_IDS = 64  # sample ids named in an error
MOST_SKIPPED = 50  # fp16 steps skipped in a row before a run counts as diverged


def settle_amp(amp, ranks):
    """--amp, or without it what the devices compute in: "bf16", or "fp16" where a GPU is older than Ampere; "off" on a CPU."""
    on_gpu = ranks.device.type == "cuda"
    if amp == "off" or amp is None and not on_gpu:
        return "off"
    emulated = any(ranks.gather(emulates_16_bits(ranks.device, AMP_DTYPES[amp or "bf16"])))
    if amp is None and emulated:
        log.info("--amp fp16 is chosen, as GPUs before compute capability 8.0 have no arithmetic in bf16")
        return "fp16"
    if emulated:
        log.warning(
            "--amp %s: this %s has no instructions for it, and products take many times as long as %s; leave the flag out",
            amp,
            *(("GPU", "in fp16") if on_gpu else ("CPU", "in float32")),
        )
    return amp or "bf16"


def emulates_16_bits(device, dtype=torch.bfloat16):
    """Whether products in bf16 or fp16 are emulated on a device: on GPUs bf16 is before compute capability 8.0; a CPU is tried, in milliseconds."""
    if device.type == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0)

    def seconds(dtype):
        matrix, times, end = torch.ones(PROBE_SIDE, PROBE_SIDE, dtype=dtype), [], time.perf_counter() + PROBE_S
        while len(times) < 2 or time.perf_counter() < end:
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - started)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other longer than they compute
    try:
        return seconds(dtype) > EMULATED * seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def autocast(device, amp):
    """The mixed-precision context of `--amp`."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")


def accumulate(model, micro_batch_loss, batches, scaler, epoch, step, ranks, args):
    """Forward and backward of this rank's micro-batches of one step. Returns their mean loss, on the device.

    With DDP, gradients are reduced with the last micro-batch only. Drop path is a function of (seed, epoch, step,
    micro-batch).
    """
    total = torch.zeros((), device=ranks.device)
    for i in range(args.accum_iter):
        micro = i * ranks.world_size + ranks.rank
        batch = next(batches)
        torch.manual_seed(stream_seed(args.seed, DROP_PATH_STREAM, epoch, step, micro))
        waits = ranks.world_size == 1 or i == args.accum_iter - 1
        with contextlib.nullcontext() if waits else model.no_sync():
            loss = micro_batch_loss(batch, step, micro)
            scaler.scale(loss / args.accum_iter).backward()
        total += loss.detach() / args.accum_iter
    return total


def optimizer_step(parameters, optimizer, scaler, clip_grad):
    """Clip and apply the gradients. Returns their norm before clipping, on the device."""
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
    """Loss and gradient norm of every step of an epoch. They stay on the device and are read at log steps and saves only.

    progress: what `progress` gave for the first steps of the epoch, where a run goes on in the middle of one.
    """

    def __init__(self, steps, ranks, scaled, progress=None):
        progress = progress or {"step": 0, "losses": torch.zeros(0), "grad_norm": 0.0, "skipped": 0}
        self.ranks, self.scaled = ranks, scaled
        self.read, self.losses = progress["step"], progress["losses"].tolist()
        self.grad_norm, self.skipped = progress["grad_norm"], progress["skipped"]
        self.values = torch.zeros(2, steps, device=ranks.device)

    def add(self, step, loss, grad_norm):
        self.values[0, step], self.values[1, step] = loss, grad_norm

    def collect(self, done, epoch, describe_step):
        """Read what the steps before step `done` gave, averaged over ranks, into losses and grad_norm (the last).

        Raises TrainingError, on all ranks alike, at the first loss or norm that is not finite. With a scaled loss (fp16)
        a norm may overflow, as that step is then skipped; but not many times in a row.
        """
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
                    f"epoch {epoch}, step {step}: {bad}; {describe_step(epoch, step)}; the last saved checkpoint precedes this step"
                )
            self.losses.append(loss)
            self.grad_norm = norm
        self.read = done

    def progress(self):
        """How far the epoch is, for a checkpoint: plain values and tensors."""
        return {
            "step": self.read,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "grad_norm": self.grad_norm,
            "skipped": self.skipped,
        }


def run_steps(
    model, micro_batch_loss, loader, optimizer, scaler, epoch, ranks, args, writer=None, progress=None, between=None
):
    """Train for one epoch, or what is left of it. Returns (statistics of the whole epoch, its progress, for a checkpoint).

    Statistics: {"loss", "lr", "grad_norm", "samples_per_s"}, the loss averaged over steps and ranks.
    model: maybe under DDP. micro_batch_loss(batch, step, micro) → loss, a scalar on the device. loader: yields this
    rank's micro-batches, with a MicroBatchSampler as its batch_sampler. scaler: GradScaler, disabled unless fp16.
    args: flags of a main program. writer: TensorBoard writer, on rank 0. progress: of a checkpoint that was made in this
    epoch. between(done, progress) is called between two steps, after the first `done` of the epoch; progress(), on all
    ranks, reads the losses and gives the progress for a checkpoint.
    Raises TrainingError when the loss or the gradients are not finite.
    """
    model.train()
    sampler, steps = loader.batch_sampler, loader.batch_sampler.steps
    record = StepRecord(steps, ranks, scaler.is_enabled(), progress)
    first = sampler.first_step = record.read
    sampler.epoch = epoch
    samples = args.batch_size * args.accum_iter * ranks.world_size
    parameters = [p for p in model.parameters() if p.requires_grad]
    started = time.monotonic()
    logged = first, started

    def describe_step(epoch, step):
        ids = sampler.global_batch(epoch, step).flatten().tolist()
        return f"sample ids {', '.join(map(str, ids[:MOST_IDS]))}{f' and {len(ids) - MOST_IDS} more' if len(ids) > MOST_IDS else ''}"

    def progress_after(done):
        record.collect(done, epoch, describe_step)
        return record.progress()

    batches = iter(loader) if first < steps else None
    for step in range(first, steps):
        done = step + 1
        lr = adjust_learning_rate(optimizer, epoch + step / steps, args)
        try:
            loss = accumulate(model, micro_batch_loss, batches, scaler, epoch, step, ranks, args)
        except Interrupted:
            between(step, partial(progress_after, step))  # which ends the run
            raise
        record.add(step, loss, optimizer_step(parameters, optimizer, scaler, args.clip_grad))
        if done % args.log_freq == 0 or done == steps:
            record.collect(done, epoch, describe_step)
            window = record.losses[step - step % args.log_freq :]  # the same wherever the run was stopped
            now = time.monotonic()
            speed, logged = samples * (done - logged[0]) / (now - logged[1]), (done, now)
            left = (args.stop_epoch - epoch) * steps - done
            log.info(
                "Epoch [%d/%d] step %d/%d  loss %.4f  lr %.3e  grad %.3f  %.0f samples/s  ETA %s  memory %.2f GB",
                epoch,
                args.stop_epoch,
                done,
                steps,
                sum(window) / len(window),
                lr,
                record.grad_norm,
                speed,
                duration(left * (now - started) / (done - first)),
                peak_memory(ranks.device) / 1e9,
            )
            if writer is not None:
                place = int((epoch + done / steps) * 1000)
                writer.add_scalar("train_loss", sum(window) / len(window), place)
                writer.add_scalar("lr", lr, place)
        if between is not None and done < steps:
            between(done, partial(progress_after, done))
    return {
        "loss": sum(record.losses) / steps,
        "lr": adjust_learning_rate(optimizer, epoch + (steps - 1) / steps, args),
        "grad_norm": record.grad_norm,
        "samples_per_s": round(samples * (steps - first) / (time.monotonic() - started), 1),
    }, record.progress()
