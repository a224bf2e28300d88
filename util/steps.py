# SPDX-License-Identifier: MIT
"""One epoch of optimisation steps, whatever is trained: accumulation, mixed precision, clipping, the record of the losses."""
import contextlib
import logging
import time

import torch

from util.errors import TrainingError
from util.lr_sched import adjust_learning_rate
from util.misc import duration, peak_memory
from util.sampling import stream_seed

log = logging.getLogger(__name__)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
MASK_STREAM, DROP_PATH_STREAM, MIXUP_STREAM = 1, 2, 3      # random streams of a micro-batch, besides sample order and flips
MOST_IDS = 64                             # sample ids named in an error
MOST_SKIPPED = 50                         # fp16 steps skipped in a row before a run counts as diverged


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
    """Loss and gradient norm of every step of an epoch. They stay on the device and are read at log steps only."""

    def __init__(self, steps, ranks, scaled):
        self.ranks, self.scaled, self.read, self.skipped = ranks, scaled, 0, 0
        self.values = torch.zeros(2, steps, device=ranks.device)
        self.seen = []

    def add(self, step, loss, grad_norm):
        self.values[0, step], self.values[1, step] = loss, grad_norm

    def collect(self, step, epoch, describe_step):
        """Read the steps since the last call, averaged over ranks: (mean loss, last gradient norm).

        Raises TrainingError, on all ranks alike, at the first loss or norm that is not finite. With a scaled loss (fp16)
        a norm may overflow, as that step is then skipped; but not many times in a row.
        """
        recent = self.ranks.mean(self.values[:, self.read:step + 1].clone()).tolist()
        for i, (loss, norm) in enumerate(zip(*recent)):
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
                raise TrainingError(f"epoch {epoch}, step {self.read + i}: {bad}; {describe_step(epoch, self.read + i)}")
        self.read = step + 1
        self.seen += recent[0]
        return sum(recent[0]) / len(recent[0]), recent[1][-1]


def run_steps(model, micro_batch_loss, loader, optimizer, scaler, epoch, ranks, args, writer=None):
    """Train for one epoch. Returns {"loss", "lr", "grad_norm", "samples_per_s"}, the loss averaged over steps and ranks.

    model: maybe under DDP. micro_batch_loss(batch, step, micro) → loss, a scalar on the device. loader: yields this
    rank's micro-batches, with a MicroBatchSampler as its batch_sampler. scaler: GradScaler, disabled unless fp16.
    args: flags of a main program. writer: TensorBoard writer, on rank 0.
    Raises TrainingError when the loss or the gradients are not finite.
    """
    model.train()
    sampler = loader.batch_sampler
    sampler.epoch = epoch
    steps, batches = sampler.steps, iter(loader)
    samples = args.batch_size * args.accum_iter * ranks.world_size
    parameters = [p for p in model.parameters() if p.requires_grad]
    record = StepRecord(steps, ranks, scaled=scaler.is_enabled())
    started = logged = time.monotonic()

    def describe_step(epoch, step):
        ids = sampler.global_batch(epoch, step).flatten().tolist()
        return f"sample ids {', '.join(map(str, ids[:MOST_IDS]))}{f' and {len(ids) - MOST_IDS} more' if len(ids) > MOST_IDS else ''}"

    for step in range(steps):
        lr = adjust_learning_rate(optimizer, epoch + step / steps, args)
        loss = accumulate(model, micro_batch_loss, batches, scaler, epoch, step, ranks, args)
        record.add(step, loss, optimizer_step(parameters, optimizer, scaler, args.clip_grad))
        if (step + 1) % args.log_freq == 0 or step == steps - 1:
            since = step + 1 - record.read
            mean_loss, norm = record.collect(step, epoch, describe_step)
            now = time.monotonic()
            speed, logged = samples * since / (now - logged), now
            left = (args.stop_epoch - epoch) * steps - step - 1
            log.info("Epoch [%d/%d] step %d/%d  loss %.4f  lr %.3e  grad %.3f  %.0f samples/s  ETA %s  memory %.2f GB",
                     epoch, args.stop_epoch, step + 1, steps, mean_loss, lr, norm, speed,
                     duration(left * (now - started) / (step + 1)), peak_memory(ranks.device) / 1e9)
            if writer is not None:
                place = int((epoch + (step + 1) / steps) * 1000)
                writer.add_scalar("train_loss", mean_loss, place)
                writer.add_scalar("lr", lr, place)
    return {"loss": sum(record.seen) / steps, "lr": lr, "grad_norm": norm,
            "samples_per_s": round(samples * steps / (time.monotonic() - started), 1)}
