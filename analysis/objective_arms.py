# SPDX-License-Identifier: MIT
"""The objectives that `analysis.objective_study` compares: flags of main_pretrain.py, and which differ in one thing."""

import argparse
import re
from typing import NamedTuple

RANDOM = "random"  # the encoder that is not trained
TARGETS = {
    "norm_pix": ("targets standardised by token", ("--norm_pix_loss",)),
    "statistics": ("targets by dataset statistics", ()),
}
VARIATIONS = {  # of each target; "": per_channel weights, averaged over tokens, one look
    "": ("", ()),
    "looks4": ("4 looks", ("--target", "multilook", "--looks", "4")),
    "looks8": ("8 looks", ("--target", "multilook", "--looks", "8")),
    "none": ("no weights", ("--weight_mode", "none")),
    "shared_avg": ("shared weights", ("--weight_mode", "shared_avg")),
    "shared_intensity": ("shared weights of intensity", ("--weight_mode", "shared_intensity")),
    "clip95": ("weights clipped at 95 %", ("--weight_clip", "95")),
    "speckle4": ("speckle of 4 looks added", ("--speckle_looks", "4")),
}
WEIGHTS = ("", "shared_avg", "shared_intensity", "clip95")  # variations that differ from "none" in the weights alone


class Arm(NamedTuple):
    """An objective. flags: words for main_pretrain.py, without data, model and schedule."""

    name: str
    label: str
    flags: tuple


def name_of(target, variation):
    return f"{target}_{variation}" if variation else target


ARMS = {
    name_of(target, variation): Arm(name_of(target, variation), ", ".join(filter(None, (a, b))), (*first, *second))
    for target, (a, first) in TARGETS.items()
    for variation, (b, second) in VARIATIONS.items()
}


def arm(text):
    """The argparse type of the name of an Arm, or of NAME=FLAGS for one's own."""
    name, equals, flags = text.partition("=")
    if not equals and name in ARMS:
        return ARMS[name]
    if not equals:
        raise argparse.ArgumentTypeError(f"is none of {', '.join(ARMS)}; for one of your own write NAME=FLAGS")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in (RANDOM, *ARMS):
        raise argparse.ArgumentTypeError(
            f"the name must be of letters, digits, _ . - and neither {RANDOM} nor that of another arm"
        )
    return Arm(name, name, tuple(flags.split()))


class Contrast(NamedTuple):
    """A planned comparison.

    pairs: [(arm, what it is compared with)]. pooled: whether each pair and seed gives a value; otherwise each seed
    gives the mean over the pairs. main: whether places are drawn again for it, too.
    """

    label: str
    pairs: tuple
    pooled: bool = False
    main: bool = False


def contrasts(names):
    """The planned Contrasts of the arms of these names, in order; those with an arm that is not there are left out."""
    targets = [(name_of("statistics", variation), name_of("norm_pix", variation)) for variation in VARIATIONS]
    varied = [("looks4", ""), ("looks8", ""), *((kind, "none") for kind in WEIGHTS), ("speckle4", "")]
    pairs = targets + [(name_of(t, one), name_of(t, other)) for one, other in varied for t in TARGETS]
    known, main = {*names, RANDOM}, targets[0]
    found = [pair for pair in pairs if set(pair) <= known] + [(name, RANDOM) for name in names]
    planned = [Contrast(f"{a} − {b}", ((a, b),), main=(a, b) in (main, (main[0], RANDOM))) for a, b in found]
    there = tuple(pair for pair in targets if set(pair) <= known)
    if len(there) > 1:
        planned.insert(len(there), Contrast("statistics − norm_pix, mean over variations", there))
        planned.insert(len(there) + 1, Contrast("statistics − norm_pix, variations pooled", there, pooled=True))
    return planned
