# SPDX-License-Identifier: MIT
"""Packed stores for tests, and the flags of their loaders."""

from types import SimpleNamespace

from sarwmix.prepare import pack
from tests.helpers.runs import argv


def packed(folder, dataset, source, *flags):
    """Runs sarwmix.prepare.pack in this process; flags as for `argv`. Returns the path of the store."""
    pack.main(argv("--workers 1 --out", folder, "--dataset", dataset, "--data_path", source, flags))
    return folder


LOADER = dict(batch_size=8, accum_iter=1, seed=4, split="train", num_workers=0, pin_mem=True, data_timeout=1)
DATA = dict(dataset="benv2", data_path=None, metadata=None, id_col=None, include_snow_cloud=False, max_nonfinite=0.01)


def loader_flags(**changes):
    """The flags that `build_dataset` and `build_loader` read, with some that are others or more."""
    return SimpleNamespace(**{**LOADER, **DATA, "data_cache": "none", "mean": None, "std": None, **changes})
