# SPDX-License-Identifier: MIT
"""What is trained and with what; how a run starts, goes on, and says what it is."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.errors import UsageError
from util.checkpoint import check_same_run, find_checkpoint, is_exported, load_checkpoint, load_latest, restore
from util.checkpoint_input import STARTED_WITH, flags_of, settle_start
from util.datasets import log_statistics
from util.misc import environment

log = logging.getLogger(__name__)

# Flags of every training that a continued run must repeat; batch_size counts by itself, as images may be mixed within a
# micro-batch.
SAME_TRAINING = (
    "model",
    "input_size",
    "drop_path",
    "dataset",
    "split",
    "mean",
    "std",
    "batch_size",
    "epochs",
    "warmup_epochs",
    "lr",
    "min_lr",
    "weight_decay",
    "clip_grad",
    "amp",
    "seed",
)


@dataclass
class Start:
    """Where in a run training begins or goes on: at an epoch (0-based), or after some steps of it.

    progress: of `run_steps`, None at the beginning of an epoch. source: the checkpoint it goes on from, None for a new run;
    selection, bits: what it says of the epochs selected so far, and of `Training.bits`.
    """

    epoch: int
    progress: dict | None = None
    source: Path | None = None
    selection: dict | None = None
    bits: dict = field(default_factory=dict)

    @property
    def step(self):
        return self.progress["step"] if self.progress else 0


@dataclass
class Training:
    """A model, how its input is prepared, and what optimises it, on one rank.

    filled_before: pixels that had been filled when the run was saved that this one continues. origin: of `origin_of`, None
    for random initialisation. data: of `samples_of`. execution: of `util.tuning.settle_execution`, None until then.
    """

    model: torch.nn.Module
    prepare: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    filled_before: int = 0
    origin: dict | None = None
    execution: dict | None = None
    data: dict | None = None

    @classmethod
    def build(cls, model, prepare, groups, betas, args, device):
        """AdamW over parameter groups with learning rate args.lr; everything on the device."""
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=True)
        return cls(
            model.to(device),
            prepare.to(device),
            optimizer,
            torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"),
        )

    def state(self, epoch, args, facts, filled, progress=None):
        """A checkpoint after an epoch (0-based, the last finished one), and maybe some steps of the next.

        facts: what a continued run must repeat. filled: of `filled`. progress: of `run_steps`.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "args": dict(vars(args)),
            "input": self.prepare.describe(),
            "run": facts,
            "filled": filled,
            "bits": self.bits(),
            **({"data": self.data} if self.data else {}),
        }
        return state if progress is None else {**state, "progress": progress}

    def bits(self):
        """On what the last bits of a result depend, besides the run."""
        device = self.prepare.mean.device
        return {
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            **{name: (self.execution or {}).get(name) for name in ("compile", "attention")},
        }

    def bytes(self):
        """About what a checkpoint takes: weights, and two moments of those that are trained."""
        return sum(p.nbytes * (3 if p.requires_grad else 1) for p in self.model.parameters())

    def filled(self, ranks, *datasets):
        """No-data and non-finite pixels that were filled so far, by the preparation of batches or by datasets, on all ranks."""
        own = sum(dataset.nonfinite.value for dataset in datasets if hasattr(dataset, "nonfinite"))
        return self.filled_before + sum(ranks.gather(int(self.prepare.filled) + own))

    def record(self, args, ranks, data, global_batch):
        """What a run is, for run.json; data: what `check_data` returned, of one split or several."""
        return {
            "flags": vars(args),
            **environment(ranks),
            "data": data,
            "global_batch": global_batch,
            "execution": self.execution,
            "n_parameters": sum(p.numel() for p in self.model.parameters()),
            "initialised_from": self.origin,
        }

    def resume(self, args, facts, steps):
        """Continue the run that --resume names. Returns Start, which is args.start_epoch if there is nothing to continue.

        steps: of an epoch. Raises UsageError if it would be another run, or does not fit.
        """
        if args.resume == "auto":
            state, path = load_latest(args.output_dir)
            if state is None:
                log.info("nothing to continue in %s: starting", args.output_dir)
        elif Path(args.resume).is_dir() and args.resume and not is_exported(args.resume):
            state, path = load_latest(args.resume)
            if state is None:
                raise UsageError(
                    f"--resume {args.resume}: a folder without a checkpoint; name a checkpoint, or the folder of a run"
                )
        else:
            path = Path(args.resume)
            state = load_checkpoint(path) if args.resume else None
        if state is None:
            return Start(args.start_epoch)
        check_same_run(state.get("run", {}), facts)
        restore(state, path, self.model, self.optimizer, self.scaler)
        start = Start(state["epoch"] + 1, state.get("progress"), path, state.get("selection"), state.get("bits") or {})
        if start.step > steps:
            raise UsageError(f"{path}: is of step {start.step} of an epoch, which has {steps}; it is of another run")
        self.filled_before = state.get("filled", 0)
        log.info(
            "continuing %s after epoch %d%s",
            path,
            state["epoch"],
            f" and {start.step} of {steps} steps" if start.progress else "",
        )
        return start

    def warn_of_other_bits(self, start):
        """Say what has changed since the run was saved that this one continues, and makes other last bits."""
        changed = [
            f"{name} {value} (was {start.bits[name]})"
            for name, value in self.bits().items()
            if start.bits.get(name, value) != value
        ]
        if changed:
            log.warning("the run goes on with %s: it is the same run, but not to the last bit", ", ".join(changed))


def open_start(args, size_of, complete, names=STARTED_WITH):
    """The checkpoint of --finetune, without its optimizer, or None; completes the flags by what it says of its encoder.

    size_of: of models_mixmim. complete(args): fills in what it does not say, and checks that the model can be built; without
    a checkpoint that is done already. names: as in `settle_start`. Raises UsageError.
    """
    if not args.finetune:
        log_statistics(args)
        return None
    path = args.finetune = find_checkpoint(args.finetune)
    state = load_checkpoint(path)
    settle_start(args, state, path, size_of(state["model"]), names)
    with flags_of(path):
        complete(args)
    log_statistics(args, (path, state))
    return {name: value for name, value in state.items() if name != "optimizer"}


def samples_of(parts, state=None):
    """What a checkpoint says of its data, {"train", …: {"samples", "simulated"}}.

    parts: {name: what `check_data` returned}. state: the checkpoint that the training starts from, whose data are "pretraining".
    """
    before = (state or {}).get("data", {})
    before = before.get("pretraining", before.get("train"))
    return {
        **{
            name: {"samples": part["samples"], "simulated": part["simulated"]}
            for name, part in parts.items()
            if "simulated" in part
        },
        **({"pretraining": before} if before else {}),
    }


def origin_of(state, path):
    """What run.json says of the checkpoint that the weights are from: its finished epochs, if it tells, and its flags."""
    epoch, flags = state.get("epoch"), state.get("args", {})
    return {
        "checkpoint": str(path),
        "epochs": epoch + 1 if isinstance(epoch, int) else None,
        "flags": {
            name: value
            for name, value in flags.items()
            if isinstance(value, (bool, int, float, str, list, tuple, type(None)))
        },
    }


def after_epochs(origin):
    """How a log line says after how many epochs a checkpoint was saved."""
    return f" (epochs: {origin['epochs']})" if origin["epochs"] else ""


def check_alike(start, ranks, folder):
    """Whether all ranks go on from the same place. Raises UsageError on all of them."""
    places = ranks.gather((start.epoch, start.step))
    if len(set(places)) > 1:
        seen = ", ".join(f"rank {rank}: epoch {epoch}, step {step}" for rank, (epoch, step) in enumerate(places))
        raise UsageError(
            f"--resume: the ranks see different checkpoints in {folder} ({seen}); it must be one folder for all of them"
        )


def same_run_facts(flags, names, world_size, data):
    """What must not change between the parts of one run: the flags of these names, the batches of a step, the samples."""
    return {
        **{name: flags[name] for name in (*SAME_TRAINING, *names) if name in flags},
        "accum_iter × ranks": flags.get("accum_iter", 1) * world_size,
        "data_path (its samples)": data,
    }


def settle_learning_rate(args, ranks, samples, steps):
    """Fill in args.lr from the base rate and the global batch, and say what a step is. Returns the global batch."""
    global_batch = args.batch_size * args.accum_iter * ranks.world_size
    rule = f"blr {args.blr:g} × {global_batch}/256" if args.lr is None else "--lr"
    args.lr = args.blr * global_batch / 256 if args.lr is None else args.lr
    log.info("%d samples of %s, split %s: %d steps an epoch", samples, args.dataset, args.split, steps)
    log.info(
        "global batch %d = %d images × %d micro-batches × %d ranks; lr %.4g (%s); %s, amp %s",
        global_batch,
        args.batch_size,
        args.accum_iter,
        ranks.world_size,
        args.lr,
        rule,
        ranks.device,
        args.amp,
    )
    return global_batch
