# SPDX-License-Identifier: MIT
"""What a checkpoint says of the input it was trained with, against what the flags say."""
import argparse
import logging
import math
from contextlib import contextmanager

from util.errors import UsageError

CHANNELS, UNITS = ["VH", "VV"], "dB"      # what the programs feed
# Flags that describe a model and its input; None where the user did not say. A checkpoint may know them.
TRAINED_WITH = ("model", "input_size", "mean", "std", "norm_pix_loss", "patch_cut", "patch_op", "nb_classes")

log = logging.getLogger(__name__)


def add_force_flag(group):
    group.add_argument("--force_input", action="store_true",
                       help="let flags win over what a checkpoint says of its model and input, instead of refusing them")


def facts_of(state):
    """What a checkpoint (of `load_checkpoint`) says: a dict with some of TRAINED_WITH and "classes" (names).

    Checkpoints of the released code have only the flags of their run. Those of flood models were trained on images cut
    in the released way, and their input_size is that of a patch, not of the image, so that it tells nothing.
    """
    known = {**state.get("args", {}), **state.get("input", {})}
    facts = {name: known[name] for name in (*TRAINED_WITH, "classes") if known.get(name) is not None}
    if "input" not in state:
        for name in ("mean", "std"):
            facts.pop(name, None)
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


def _agree(flag, fact):
    if isinstance(fact, (list, tuple)):
        return len(flag) == len(fact) and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(flag, fact))
    return flag == fact


def settle_input(args, state, path):
    """The flags, completed by what a checkpoint says of its model and input.

    args: flags, None where not given; left as they are. Raises UsageError naming flag and both values where they
    contradict each other, unless --force_input; or if the checkpoint needs channels or units that are not fed.
    """
    settled, said = argparse.Namespace(**vars(args)), state.get("input", {})
    if said.get("channels", CHANNELS) != CHANNELS or said.get("units", UNITS) != UNITS:
        raise UsageError(f"{path}: was trained on {', '.join(said['channels'])} in {said['units']}; this program feeds "
                         f"{', '.join(CHANNELS)} in {UNITS}")
    facts, contradictions = facts_of(state), []
    for name in TRAINED_WITH:
        if name not in facts or not hasattr(args, name):
            continue
        flag = getattr(args, name)
        if flag is None:
            setattr(settled, name, facts[name])
        elif not _agree(flag, facts[name]):
            contradictions.append(f"--{name} {_shown(flag)} (it says {_shown(facts[name])})")
    if contradictions and not args.force_input:
        raise UsageError(f"{path}: was trained with other values than {', '.join(contradictions)}; leave the flag out, or insist "
                         f"with --force_input")
    for contradiction in contradictions:
        log.warning("%s: forced %s", path, contradiction)
    if not said:
        log.info("%s: a checkpoint of the released code, which does not say how to feed it: statistics are those of --dataset %s%s",
                 path, args.dataset, f", patch_cut is {settled.patch_cut}" if facts.get("patch_cut") else "")
    return settled


def _shown(value):
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
