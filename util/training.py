# SPDX-License-Identifier: MIT
"""What is trained, how its state is saved and restored, and what a continued run must have in common with its
beginning."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.errors import UsageError
from util.checkpoint import check_same_run, is_exported, load_checkpoint, load_latest, restore

log = logging.getLogger(__name__)

# Flags of every training that a continued run must repeat. batch_size is one of them, and not only the number of images
# of a step, because images are mixed within a micro-batch.
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


def run_identity(config, names, world_size, fingerprints):
    """What a continued run must have in common with its beginning: flags, images of a step, samples.

    names: flags of the program, besides SAME_TRAINING. fingerprints: of the data, plain values.
    """
    flags = vars(config)
    return {
        **{name: flags[name] for name in (*SAME_TRAINING, *names) if name in flags},
        "accum_iter × ranks": config.accum_iter * world_size,
        "data_path (its samples)": fingerprints,
    }


def sample_counts(parts, checkpoint=None):
    """What a checkpoint records about its data: {"train", …: {"samples", "simulated"}}.

    parts: {name: what `check_data` returned}. checkpoint: the LoadedCheckpoint that the training starts from, whose
    data are recorded as "pretraining".
    """
    before = {} if checkpoint is None else checkpoint.state.get("data", {})
    before = before.get("pretraining", before.get("train"))
    counts = {
        name: {"samples": part["samples"], "simulated": part["simulated"]}
        for name, part in parts.items()
        if "simulated" in part
    }
    return counts | ({"pretraining": before} if before else {})


@dataclass
class Start:
    """Where training begins or continues: at an epoch (0-based), or after some steps of it.

    progress: of `StepRecord`, None at the beginning of an epoch. source: the checkpoint it continues from, None for a
    new run. selection, bits: what `source` states of the epochs selected so far, and of `Training.bits`.
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
    """A model, the preparation of its input, and its optimizer, on one rank.

    filled_before: pixels that had been filled when the run was saved that this one continues. origin: of
    `LoadedCheckpoint.origin`, None for random initialisation. beginning: what it starts from, for people. data: of
    `sample_counts`. execution: of `util.tuning.settle_execution`, None until then.
    """

    model: torch.nn.Module
    prepare: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    filled_before: int = 0
    origin: dict | None = None
    beginning: str = "random initialisation"
    execution: dict | None = None
    data: dict | None = None

    @classmethod
    def build(cls, model, prepare, groups, betas, config, device):
        """AdamW over parameter groups with learning rate config.lr; everything on the device."""
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        return cls(model.to(device), prepare.to(device), optimizer, scaler)

    def initialised_from(self, checkpoint, resampled, head=""):
        """Notes the LoadedCheckpoint that the weights are from, and the names of the weights that were resampled."""
        self.origin = checkpoint.origin()
        epochs = f" (epochs: {self.origin['epochs']})" if self.origin["epochs"] else ""
        resized = f"; resampled: {', '.join(resampled)}" if resampled else ""
        self.beginning = f"initialised from {checkpoint.path}{epochs}{head}{resized}"

    def state(self, epoch, config, identity, filled, progress=None):
        """A checkpoint after an epoch (0-based, the last finished one), and maybe after some steps of the next.

        identity: of `run_identity`. filled: pixels filled so far. progress: of `StepRecord.progress`.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "args": dict(vars(config)),
            "input": self.prepare.describe(),
            "run": identity,
            "filled": filled,
            "bits": self.bits(),
        }
        if self.data:
            state["data"] = self.data
        if progress is not None:
            state["progress"] = progress
        return state

    def bits(self):
        """What the last bits of a result depend on, besides the run."""
        device = self.prepare.mean.device
        execution = self.execution or {}
        return {
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "compile": execution.get("compile"),
            "attention": execution.get("attention"),
        }

    def checkpoint_bytes(self):
        """The approximate size of a checkpoint: weights, and two moments of those that are trained."""
        return sum(p.nbytes * (3 if p.requires_grad else 1) for p in self.model.parameters())

    def num_parameters(self):
        return sum(p.numel() for p in self.model.parameters())

    def resume(self, config, identity, steps):
        """Restores the run that --resume names. Returns Start, at config.start_epoch if there is nothing to continue.

        steps: of an epoch. Raises UsageError if it would be another run, or does not fit.
        """
        state, path = _state_to_resume(config)
        if state is None:
            return Start(config.start_epoch)
        check_same_run(state.get("run", {}), identity)
        restore(state, path, self.model, self.optimizer, self.scaler)
        start = Start(state["epoch"] + 1, state.get("progress"), path, state.get("selection"), state.get("bits") or {})
        if start.step > steps:
            raise UsageError(
                f"{path}: holds step {start.step} of an epoch, but an epoch of this run has {steps} steps; it "
                "belongs to another run"
            )
        self.filled_before = state.get("filled", 0)
        log.info(
            "continuing %s after epoch %d%s",
            path,
            state["epoch"],
            f" and {start.step} of {steps} steps" if start.progress else "",
        )
        return start

    def warn_of_other_bits(self, start):
        """Logs what has changed since the continued run was saved and affects the last bits of results."""
        changed = [
            f"{name} {value} (was {start.bits[name]})"
            for name, value in self.bits().items()
            if start.bits.get(name, value) != value
        ]
        if changed:
            log.warning("the run continues with %s: the last bits of its results may differ", ", ".join(changed))


def _state_to_resume(config):
    """(checkpoint, its path) of --resume; (None, …) if there is none. Raises UsageError."""
    if config.resume == "auto":
        state, path = load_latest(config.output_dir)
        if state is None:
            log.info("no checkpoint to continue from in %s: starting a new run", config.output_dir)
        return state, path
    if not config.resume:
        return None, None
    path = Path(config.resume)
    if path.is_dir() and not is_exported(path):
        state, path = load_latest(config.resume)
        if state is None:
            raise UsageError(
                f"--resume {config.resume}: a folder without a checkpoint; name a checkpoint, or the folder of a run"
            )
        return state, path
    return load_checkpoint(path), path


def check_alike(start, ranks, folder):
    """Refuses ranks that continue from different places. Raises UsageError on all of them."""
    places = ranks.gather((start.epoch, start.step))
    if len(set(places)) > 1:
        seen = ", ".join(f"rank {rank}: epoch {epoch}, step {step}" for rank, (epoch, step) in enumerate(places))
        raise UsageError(
            f"--resume: the ranks see different checkpoints in {folder} ({seen}); all ranks must use the same folder"
        )
