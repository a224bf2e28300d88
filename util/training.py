# SPDX-License-Identifier: MIT
"""What is trained and with what; how a run starts, goes on, and says what it is."""
import logging
from dataclasses import dataclass

import torch

from util.checkpoint import check_same_run, load_checkpoint, load_latest, restore
from util.misc import environment

log = logging.getLogger(__name__)

# Flags of every training that a continued run must repeat; batch_size counts by itself, as images may be mixed within a
# micro-batch.
SAME_TRAINING = ("model", "input_size", "drop_path", "dataset", "split", "mean", "std", "batch_size", "epochs", "warmup_epochs", "lr",
                 "min_lr", "weight_decay", "clip_grad", "amp", "seed")


@dataclass
class Training:
    """A model, how its input is prepared, and what optimises it, on one rank."""
    model: torch.nn.Module
    prepare: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @classmethod
    def build(cls, model, prepare, groups, betas, args, device):
        """AdamW over parameter groups with learning rate args.lr; everything on the device."""
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=True)
        return cls(model.to(device), prepare.to(device), optimizer, torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"))

    def state(self, epoch, args, facts):
        """A checkpoint after an epoch (0-based); `facts` is what a continued run must repeat."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "epoch": epoch, "args": dict(vars(args)), "input": self.prepare.describe(), "run": facts}

    def record(self, args, ranks, data, global_batch):
        """What a run is, for run.json; data: what `check_data` returned, of one split or several."""
        return {"flags": vars(args), **environment(ranks), "data": data, "global_batch": global_batch,
                "n_parameters": sum(p.numel() for p in self.model.parameters())}

    def resume(self, args, facts):
        """Continue the run that --resume names: the checkpoint it goes on from, or None if there is nothing to continue.

        Raises UsageError if it would be another run, or does not fit.
        """
        if args.resume == "auto":
            state, path = load_latest(args.output_dir)
            if state is None:
                log.info("nothing to continue in %s: starting", args.output_dir)
        else:
            path = args.resume
            state = load_checkpoint(path) if path else None
        if state is not None:
            check_same_run(state.get("run", {}), facts)
            restore(state, path, self.model, self.optimizer, self.scaler)
            log.info("continuing %s after epoch %d", path, state["epoch"])
        return state


def same_run_facts(flags, names, world_size, data):
    """What must not change between the parts of one run: the flags of these names, the batches of a step, the samples."""
    return {**{name: flags[name] for name in (*SAME_TRAINING, *names) if name in flags},
            "accum_iter × ranks": flags.get("accum_iter", 1) * world_size, "data_path (its samples)": data}


def settle_learning_rate(args, ranks, samples, steps):
    """Fill in args.lr from the base rate and the global batch, and say what a step is. Returns the global batch."""
    global_batch = args.batch_size * args.accum_iter * ranks.world_size
    rule = f"blr {args.blr:g} × {global_batch}/256" if args.lr is None else "--lr"
    args.lr = args.blr * global_batch / 256 if args.lr is None else args.lr
    log.info("%d samples of %s, split %s: %d steps an epoch", samples, args.dataset, args.split, steps)
    log.info("global batch %d = %d images × %d micro-batches × %d ranks; lr %.4g (%s); %s, amp %s", global_batch,
             args.batch_size, args.accum_iter, ranks.world_size, args.lr, rule, ranks.device, args.amp)
    return global_batch
