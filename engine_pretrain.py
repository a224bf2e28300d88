# SPDX-License-Identifier: MIT
"""Pretraining loops: one epoch of steps, and reconstructions to look at. Knows tensors; no file, no dataset."""
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
MASK_STREAM, DROP_PATH_STREAM = 1, 2      # random streams of a micro-batch, besides sample order and flips
MOST_IDS = 64                             # sample ids named in an error
MOST_SKIPPED = 50                         # fp16 steps skipped in a row before a run counts as diverged


def autocast(device, amp):
    """The mixed-precision context of `--amp`."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")


def draw_micro_batch_mask(model, args, epoch, step, micro):
    """The mask of one micro-batch, (1, L, 1): a function of (seed, epoch, step, micro-batch)."""
    generator = torch.Generator().manual_seed(stream_seed(args.seed, MASK_STREAM, epoch, step, micro))
    return model.draw_mask(args.mask_ratio, generator)


def accumulate(model, prepare, batches, scaler, epoch, step, ranks, args):
    """Forward and backward of this rank's micro-batches of one step. Returns their mean loss, on the device.

    batches: iterator of (ids, dB images). With DDP, gradients are reduced with the last micro-batch only.
    """
    bare = getattr(model, "module", model)
    total = torch.zeros((), device=ranks.device)
    for i in range(args.accum_iter):
        micro = i * ranks.world_size + ranks.rank
        ids, sar_db = (t.to(ranks.device, non_blocking=True) for t in next(batches))
        x, weights = prepare(sar_db, ids, epoch)
        mask = draw_micro_batch_mask(bare, args, epoch, step, micro)
        torch.manual_seed(stream_seed(args.seed, DROP_PATH_STREAM, epoch, step, micro))
        waits = model is bare or i == args.accum_iter - 1
        with contextlib.nullcontext() if waits else model.no_sync():
            with autocast(ranks.device, args.amp):
                loss, _, _ = model(x, weights, mask=mask)
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


def train_one_epoch(model, prepare, loader, optimizer, scaler, epoch, ranks, args, writer=None):
    """Train for one epoch. Returns {"loss", "lr", "grad_norm", "images_per_s"}, the loss averaged over steps and ranks.

    model: a MixMIM, maybe under DDP. prepare: BatchPreparation. loader: yields (ids, dB images) micro-batches, with a
    MicroBatchSampler as its batch_sampler. scaler: GradScaler, disabled unless fp16. args: flags of main_pretrain.
    writer: TensorBoard writer, on rank 0. Raises TrainingError when the loss or the gradients are not finite.
    """
    model.train()
    sampler = loader.batch_sampler
    sampler.epoch = epoch
    steps, batches = sampler.steps, iter(loader)
    images = args.batch_size * args.accum_iter * ranks.world_size
    parameters = [p for p in model.parameters() if p.requires_grad]
    record = StepRecord(steps, ranks, scaled=scaler.is_enabled())
    started = logged = time.monotonic()

    def describe_step(epoch, step):
        ids = sampler.global_batch(epoch, step).flatten().tolist()
        return f"sample ids {', '.join(map(str, ids[:MOST_IDS]))}{f' and {len(ids) - MOST_IDS} more' if len(ids) > MOST_IDS else ''}"

    for step in range(steps):
        lr = adjust_learning_rate(optimizer, epoch + step / steps, args)
        loss = accumulate(model, prepare, batches, scaler, epoch, step, ranks, args)
        record.add(step, loss, optimizer_step(parameters, optimizer, scaler, args.clip_grad))
        if (step + 1) % args.log_freq == 0 or step == steps - 1:
            since = step + 1 - record.read
            mean_loss, norm = record.collect(step, epoch, describe_step)
            now = time.monotonic()
            speed, logged = images * since / (now - logged), now
            left = (args.stop_epoch - epoch) * steps - step - 1
            log.info("Epoch [%d/%d] step %d/%d  loss %.4f  lr %.3e  grad %.3f  %.0f images/s  ETA %s  memory %.2f GB",
                     epoch, args.stop_epoch, step + 1, steps, mean_loss, lr, norm, speed,
                     duration(left * (now - started) / (step + 1)), peak_memory(ranks.device) / 1e9)
            if writer is not None:
                place = int((epoch + (step + 1) / steps) * 1000)
                writer.add_scalar("train_loss", mean_loss, place)
                writer.add_scalar("lr", lr, place)
    return {"loss": sum(record.seen) / steps, "lr": lr, "grad_norm": norm,
            "images_per_s": round(images * steps / (time.monotonic() - started), 1)}


@torch.no_grad()
def reconstruct(model, prepare, sar_db, mask, amp="off"):
    """What a model sees and predicts of some images, in dB, all (B, 2, H, W) on the CPU, and the mask.

    sar_db: (B, 2, h, w), B even; mask: (1, L, 1). Returns a dict: original (resized), visible (1 where a pixel was shown,
    (1, 1, H, W)), predicted (every cell, each from the other half of its own image), completed (the hidden cells
    predicted, the others as they are). With norm_pix_loss the prediction is of standardised tokens: their own mean and
    standard deviation are put back.
    """
    was_training = model.training
    model.eval()
    x, _ = prepare(sar_db.to(prepare.mean.device))
    with autocast(x.device, amp):
        _, pred, _ = model(x, None, mask=mask)
    _, mean, std = model.target(x)
    predicted = model.unpatchify(pred.float() * std + mean)
    hidden = model.mix(torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])]), mask)[:1, :1]
    model.train(was_training)
    return {"original": prepare.to_db(x).cpu(), "visible": 1 - hidden.cpu(), "predicted": prepare.to_db(predicted).cpu(),
            "completed": prepare.to_db(torch.where(hidden.bool(), predicted, x)).cpu()}
