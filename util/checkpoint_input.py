# SPDX-License-Identifier: MIT
"""What a checkpoint states about its model and the input it was trained with, compared with the flags."""

import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import UsageError
from util.checkpoint import find_checkpoint, load_checkpoint

CHANNELS, UNITS = ["VH", "VV"], "dB"  # of the input that the programs feed
# Flags that describe a model and its input. They are None where the user leaves them out, and a checkpoint may state
# them.
TRAINED_WITH = (
    *("model", "input_size", "mean", "std", "norm_pix_loss", "target", "looks"),
    *("patch_cut", "patch_op", "nb_classes", "task"),
)
STATISTICS = ("mean", "std")
STARTED_WITH = ("model", "input_size", *STATISTICS)  # of an encoder: a training that starts from it takes them over
PATCH = 4  # side of a token of the first stage, in pixels

log = logging.getLogger(__name__)


def add_force_flag(group):
    group.add_argument(
        "--force_input",
        action="store_true",
        help="use the flags where they contradict the checkpoint's model or input, instead of ending with an error",
    )


@contextmanager
def flags_of(path):
    """Prefixes a UsageError about flags with the checkpoint that they were taken from, once; path may be None."""
    try:
        yield
    except UsageError as error:
        if path is None or str(error).startswith(f"{path}: "):
            raise
        raise UsageError(f"{path}: {error}") from None


@dataclass
class LoadedCheckpoint:
    """A checkpoint on the CPU: its path, its content (of `load_checkpoint`) and the size of its model."""

    path: str
    state: dict
    size: str | None

    @classmethod
    def load(cls, path, size_of):
        """path: a checkpoint, an exported folder, or the folder of a run. size_of: of models_mixmim.

        Raises UsageError.
        """
        path = find_checkpoint(path)
        state = load_checkpoint(path)
        return cls(path, state, size_of(state["model"]))

    @property
    def has_head(self):
        """Whether it is of a classifier; a pretraining checkpoint is not."""
        return any(name.startswith("head.") for name in self.state["model"])

    @property
    def name(self):
        """The file's name, without its extension."""
        return Path(self.path).stem

    def flags(self):
        """The flags of the training that wrote it; {} if it does not state them."""
        return self.state.get("args", {})

    def stated(self):
        """What it states: a dict with some of TRAINED_WITH and "classes" (names).

        Checkpoints of the released code state only the flags of their run. Their flood models were trained on images
        cut in the released way, and their input_size is the side of a patch, not of the image, so it is left out.
        """
        known = {**self.flags(), **self.state.get("input", {})}
        stated = {name: known[name] for name in (*TRAINED_WITH, "classes") if known.get(name) is not None}
        if "input" not in self.state:
            for name in STATISTICS:
                stated.pop(name, None)
            stated = {**encoder_input(self.state["model"]), **stated}
            head = self.state["model"].get("head.weight")
            if head is not None:
                stated["nb_classes"] = len(head)
                if len(head) == 2:
                    stated["patch_cut"] = "released"
                    stated.pop("input_size", None)
        return stated

    def used_as_is(self, flags):
        """The layer of a checkpoint that is evaluated, embedded, exported or drawn: all of TRAINED_WITH that it states.

        flags: None where not given. Raises UsageError naming flag and both values where they contradict each other,
        unless --force_input; and if the checkpoint needs channels or units that are not fed.
        """
        self.check_channels()
        stated = {"model": self.size, **self.stated()}
        layer = {name: stated[name] for name in TRAINED_WITH if stated.get(name) is not None and hasattr(flags, name)}
        contradictions = [
            f"{_flag(flags, name)} {shown(getattr(flags, name))} (the checkpoint: {shown(value)})"
            for name, value in layer.items()
            if getattr(flags, name) is not None and not agree(getattr(flags, name), value)
        ]
        if contradictions and not flags.force_input:
            raise UsageError(
                f"{self.path}: was trained with values other than {', '.join(contradictions)}; leave the flag out, "
                "or insist with --force_input"
            )
        for contradiction in contradictions:
            log.warning("%s: forced %s", self.path, contradiction)
        if "input" not in self.state:
            cut = getattr(flags, "patch_cut", None) or stated.get("patch_cut")
            log.info(
                "%s: does not state how its input is prepared, like all checkpoints of the released code%s",
                self.path,
                f"; patch_cut is {cut}" if stated.get("patch_cut") else "",
            )
        return layer

    def started_from(self, flags, names=STARTED_WITH):
        """The layer of a checkpoint that a training starts from: the input of an encoder is prepared as in its
        training.

        flags: None where not given. names: what to take over. The flags may ask for other statistics, with a warning,
        or for another input size. Raises UsageError for another model, and if the checkpoint needs channels or units
        that are not fed.
        """
        self.check_channels()
        stated = self.stated()
        layer = {
            "model": self.size or stated.get("model"),
            **encoder_input(self.state["model"]),
            **{name: stated.get(name) for name in STATISTICS},
        }
        layer = {name: layer[name] for name in names if layer.get(name) is not None}
        for name, value in layer.items():
            flag = getattr(flags, name)
            if flag is None:
                continue
            if name == "model" and flag != value:
                raise UsageError(
                    f"{self.path}: is a {value}, not a {flag}; leave --model out, or start from another checkpoint"
                )
            if name in STATISTICS and not agree(flag, value):
                log.warning(
                    "%s: was trained with --%s %s, and this run uses %s; leave the flag out to prepare its input as "
                    "in its training",
                    self.path,
                    name,
                    shown(value),
                    shown(flag),
                )
        return layer

    def check_channels(self):
        """Refuses a checkpoint that needs channels or units that are not fed. Raises UsageError."""
        said = self.state.get("input", {})
        if said.get("channels", CHANNELS) != CHANNELS or said.get("units", UNITS) != UNITS:
            raise UsageError(
                f"{self.path}: was trained on {', '.join(said['channels'])} in {said['units']}; this program feeds "
                f"{', '.join(CHANNELS)} in {UNITS}"
            )

    def origin(self):
        """What run.json records about the origin of the weights: checkpoint, epochs, if stated, and flags."""
        epoch, plain = self.state.get("epoch"), (bool, int, float, str, list, tuple, type(None))
        return {
            "checkpoint": str(self.path),
            "epochs": epoch + 1 if isinstance(epoch, int) else None,
            "flags": {name: value for name, value in self.flags().items() if isinstance(value, plain)},
        }


def encoder_input(weights):
    """What weights alone tell: {"input_size"}, the side of the images or patches that an encoder takes.

    {} if unknown.
    """
    table = weights.get("absolute_pos_embed")
    side = math.isqrt(table.shape[1]) if table is not None and table.ndim == 3 else 0
    return {"input_size": PATCH * side} if side and side**2 == table.shape[1] else {}


def agree(flag, stated):
    """Whether a flag has the value that a checkpoint states, numbers within rounding."""
    if isinstance(stated, (list, tuple)):
        return len(flag) == len(stated) and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(flag, stated))
    return flag == stated


def shown(value):
    """A flag's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _flag(flags, name):
    """The flag that gave a value, as it is typed."""
    return "--statistics" if name in STATISTICS and getattr(flags, "statistics", None) else f"--{name}"
