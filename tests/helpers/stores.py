# SPDX-License-Identifier: MIT
"""Packed stores for tests, and command lines written in one string."""

from sarwmix.prepare import pack


def argv(*flags):
    """The words of a command line: strings are split at spaces, paths and numbers are kept."""
    return [word for flag in flags for word in (flag.split() if isinstance(flag, str) else [flag])]


def packed(folder, dataset, source, *flags):
    """Runs sarwmix.prepare.pack in this process; flags as in `argv`. Returns the path of the store."""
    line = argv("--workers 1 --out", folder, "--dataset", dataset, "--data_path", source, *flags)
    pack.main(list(map(str, line)))
    return folder
