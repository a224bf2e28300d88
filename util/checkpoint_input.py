# SPDX-License-Identifier: MIT
"""What a checkpoint says of the input it was trained with, against what the flags say."""

import argparse
import logging
import math
from contextlib import contextmanager

from common.errors import UsageError

CHANNELS, UNITS = ["VH", "VV"], "dB"  # what the programs feed
# Flags that describe a model and its input; None where the user did not say. A checkpoint may know them.
TRAINED_WITH = ("model", "input_size", "mean", "std", "norm_pix_loss", "patch_cut", "patch_op", "nb_classes")
STATISTICS = ("mean", "std")
STARTED_WITH = (
    "model",
    "input_size",
    *STATISTICS,
)  # those of an encoder, which a training that starts from it takes over
PATCH = 4  # pixels a side of what makes one token

log = logging.getLogger(__name__)


def add_force_flag(group):
    group.add_argument(
        "--force_input",
        action="store_true",
        help="let flags win over what a checkpoint says of its model and input, instead of refusing them",
    )


def facts_of(state):
    """What a checkpoint (of `load_checkpoint`) says: a dict with some of TRAINED_WITH and "classes" (names).

    Checkpoints of the released code have only the flags of their run. Those of flood models were trained on images cut
    in the released way, and their input_size is that of a patch, not of the image, so that it tells nothing.
    """
    known = {**state.get("args", {}), **state.get("input", {})}
    facts = {name: known[name] for name in (*TRAINED_WITH, "classes") if known.get(name) is not None}
    if "input" not in state:
        for name in STATISTICS:
            facts.pop(name, None)
        facts = {**encoder_input(state["model"]), **facts}
        head = state["model"].get("head.weight")
        if head is not None:
            facts["nb_classes"] = len(head)
            if len(head) == 2:
                facts["patch_cut"] = "released"
                facts.pop("input_size", None)
    return facts


@contextmanager
def flags_of(path):
    """Have a UsageError about flags name the checkpoint that they were taken from."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def encoder_input(weights):
    """What weights alone tell: {"input_size"}, of the images or patches that an encoder takes, where it can be told."""
    table = weights.get("absolute_pos_embed")
    side = math.isqrt(table.shape[1]) if table is not None and table.ndim == 3 else 0
    return {"input_size": PATCH * side} if side and side**2 == table.shape[1] else {}


def agree(flag, fact):
    """Whether a flag says what a checkpoint says, numbers within rounding."""
    if isinstance(fact, (list, tuple)):
        return len(flag) == len(fact) and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(flag, fact))
    return flag == fact


def _flag(args, name):
    """The flag that gave a value, as it is typed."""
    return "--statistics" if name in STATISTICS and getattr(args, "statistics", None) else f"--{name}"


def check_channels(state, path):
    """Refuse a checkpoint that needs channels or units that are not fed. Raises UsageError."""
    said = state.get("input", {})
    if said.get("channels", CHANNELS) != CHANNELS or said.get("units", UNITS) != UNITS:
        raise UsageError(
            f"{path}: was trained on {', '.join(said['channels'])} in {said['units']}; this program feeds "
            f"{', '.join(CHANNELS)} in {UNITS}"
        )


def settle_input(args, state, path, size):
    """The flags, completed by what a checkpoint says of its model and input, for using it as it is.

    args: flags, None where not given; left as they are. size: the model that its weights are of, or None. Raises
    UsageError naming flag and both values where they contradict each other, unless --force_input; or if the checkpoint
    needs channels or units that are not fed.
    """
    check_channels(state, path)
    settled = argparse.Namespace(**vars(args))
    facts, contradictions = {"model": size, **facts_of(state)}, []
    for name in TRAINED_WITH:
        if facts.get(name) is None or not hasattr(args, name):
            continue
        flag = getattr(args, name)
        if flag is None:
            setattr(settled, name, facts[name])
        elif not agree(flag, facts[name]):
            contradictions.append(f"{_flag(args, name)} {shown(flag)} (it says {shown(facts[name])})")
    if contradictions and not args.force_input:
        raise UsageError(
            f"{path}: was trained with other values than {', '.join(contradictions)}; leave the flag out, or insist "
            f"with --force_input"
        )
    for contradiction in contradictions:
        log.warning("%s: forced %s", path, contradiction)
    if "input" not in state:
        log.info(
            "%s: does not say how its input is prepared, as those of the released code%s",
            path,
            f"; patch_cut is {settled.patch_cut}" if facts.get("patch_cut") else "",
        )
    return settled


def settle_start(args, state, path, size, names=STARTED_WITH):
    """Complete the flags of a training that starts from the weights of a checkpoint: an encoder's input is prepared as in its training.

    args: flags, None where not given. size: the model that its weights are of, or None. names: what to take over. Other
    statistics or another input size may be asked for, the former with a warning. Raises UsageError for another model,
    and if the checkpoint needs channels or units that are not fed.
    """
    check_channels(state, path)
    said = facts_of(state)
    facts = {
        "model": size or said.get("model"),
        **encoder_input(state["model"]),
        **{name: said.get(name) for name in STATISTICS},
    }
    for name in names:
        flag, fact = getattr(args, name), facts.get(name)
        if fact is None:
            continue
        if flag is None:
            setattr(args, name, fact)
        elif name == "model" and flag != fact:
            raise UsageError(f"{path}: is a {fact}, not a {flag}; leave --model out, or start from another checkpoint")
        elif name in STATISTICS and not agree(flag, fact):
            log.warning(
                "%s: was trained with --%s %s, and this run uses %s; leave the flag out to prepare its input as in its training",
                path,
                name,
                shown(fact),
                shown(flag),
            )


def shown(value):
    """A flag's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
