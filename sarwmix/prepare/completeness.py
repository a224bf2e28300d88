# SPDX-License-Identifier: MIT
"""Compares how much data is found with what the complete dataset has (datasets/complete_counts.csv).

A part of a dataset is legitimate, so that nothing here raises an error. More than the complete dataset is a warning.
Imports no torch, as `sarwmix.listing`.
"""

import csv
import re
from pathlib import Path

from sarwmix.listing import EVERY, PARTS

COUNTS_TABLE = Path(__file__).parents[2] / "datasets" / "complete_counts.csv"
FIRST_YEAR = 2014  # of Sentinel-1; simulated acquisitions are dated before
ACQUIRED = re.compile(r"_([0-9]{4})[0-9]{4}T[0-9]{6}")


def _read_counts():
    """{dataset: {what: {split: count}}}. The first `what` of a dataset is its samples."""
    found = {}
    with open(COUNTS_TABLE, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            counts = found.setdefault(row["dataset"], {}).setdefault(row["what"], {})
            counts[row["split"]] = int(row["count"])
    return found


COMPLETE = _read_counts()


def are_simulated(names):
    """Whether one of these names of samples or images has a date before the launch of Sentinel-1."""
    dates = map(ACQUIRED.search, names)
    return any(date and int(date[1]) < FIRST_YEAR for date in dates)


def published(dataset, names):
    """The name of the dataset; None, which has no complete counts, if the samples or images are simulated."""
    return None if are_simulated(names) else dataset


def complete_count(dataset, split, found=0, what=None):
    """The number that a complete split has; None if it is not known.

    split: one of SPLITS, or EVERY: all that the dataset has, in split lists or not. With "all", this is the number of
    the split lists unless more are `found`. what: a value of the column of that name (default: the samples).
    """
    table = COMPLETE.get(dataset, {})
    counts = table.get(what or next(iter(table), None), {})
    parts = PARTS["all"] if split == EVERY else PARTS.get(split, ())
    listed = sum(counts.get(part, 0) for part in parts)
    every = counts.get(EVERY) if split in ("all", EVERY) else None
    return every if every and (split == EVERY or found > listed) else listed or None


def _unlisted(dataset, split):
    """The number of samples that a split may have besides those of its published list: all that are in no list."""
    if split in ("all", EVERY):
        return 0
    return max(0, (complete_count(dataset, EVERY) or 0) - (complete_count(dataset, "all") or 0))


def completeness(dataset, split, found, what=None):
    """A phrase for messages: the number that was found, and the share of the complete split that it is."""
    noun = what or next(iter(COMPLETE.get(dataset, {})), "samples")
    count, whole = complete_count(dataset, split, found, what), "dataset" if split in ("all", EVERY) else "split"
    if count is None or found == count:
        return f"{found:,} {noun}" + (", complete" if count else "")
    if found > count:
        out = ", which leaves out patches with snow, cloud or shadow" if _unlisted(dataset, split) else ""
        return f"{found:,} {noun}, more than the {count:,} of the complete {whole}{out}"
    tenths = 1000 * found // count  # rounded down: 100.0 % is complete
    share = f"{tenths / 10:.1f} %" if tenths or not found else "less than 0.1 %"
    return f"{found:,} of {count:,} {noun} ({share} of the complete {whole})"


def log_completeness(log, place, dataset, split, found, added=False):
    """Logs `completeness` after the place; a warning if there is more than the complete split has.

    added: the split may have samples that are in none of the published lists.
    """
    most = (complete_count(dataset, split, found) or found) + (_unlisted(dataset, split) if added else 0)
    text = f"{place}: {completeness(dataset, split, found)}"
    if found > most:
        log.warning("%s; check whether the lists repeat samples or contain those of other splits", text)
    else:
        log.info("%s", text)


def counts_beside(dataset, found):
    """A phrase with several counts, each beside that of the complete dataset. found: {(what, split): count}."""
    phrases, complete = [], True
    for (what, split), n in found.items():
        count = complete_count(dataset, split, n, what)
        complete = complete and n == count
        of = "" if count in (None, n) else f" of {count:,}" if n < count else f" instead of {count:,}"
        phrases.append(f"{n:,}{of} {what}{'' if split == EVERY else f' for {split}'}")
    return ", ".join(phrases) + (": complete" if complete else "")
