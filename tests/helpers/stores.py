# SPDX-License-Identifier: MIT
"""Packed stores for tests."""

from sarwmix.prepare import pack
from tests.helpers.runs import argv


def packed(folder, dataset, source, *flags):
    """Runs sarwmix.prepare.pack in this process; flags as for `argv`. Returns the path of the store."""
    pack.main(argv("--workers 1 --out", folder, "--dataset", dataset, "--data_path", source, flags))
    return folder
