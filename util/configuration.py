# SPDX-License-Identifier: MIT
"""The configuration of a run: settled once, in one order, and never written again.

A flag that the user leaves out has its parser's default. Where that is None, the first of these that knows it fills it
in: the file of --statistics, the checkpoint that the run starts from with --finetune or uses as it is, the defaults of
the program and its dataset, the machine. --resume fills in nothing: it refuses other values.
"""

import json
import logging
import os
from pathlib import Path

from common.errors import DataError, UsageError
from common.files import read_json
from util.checkpoint_checks import are_statistics
from util.checkpoint_input import CHANNELS, STATISTICS, UNITS, agree, shown
from util.optimization import settle_amp

MOST_WORKERS = 10  # loader processes per rank, unless --num_workers asks for more

log = logging.getLogger(__name__)


class Config:
    """The settled flags of a program, as attributes; `vars(config)` is a dict of plain values."""

    def __init__(self, values):
        self.__dict__.update(values)

    def __setattr__(self, name, value=None):
        raise AttributeError(f"the configuration is settled: {name} cannot be written; use changed()")

    __delattr__ = __setattr__

    def __repr__(self):
        return f"Config({json.dumps(vars(self), sort_keys=True, default=str)})"

    def changed(self, **values):
        """Another configuration, with these values in place of its own."""
        return Config({**vars(self), **values})


def settle(flags, *layers):
    """Config of the flags (a Namespace or Config). Each layer, a dict, fills in what those before it left at None."""
    values = dict(vars(flags))
    for layer in layers:
        values.update((name, value) for name, value in layer.items() if values.get(name) is None)
    return Config(values)


def dataset_defaults(kind):
    """The layer of a dataset or its class: mean and standard deviation in dB (VH, VV). {} if it states none."""
    return {} if kind.MEAN is None else {"mean": list(kind.MEAN), "std": list(kind.STD)}


def need_statistics(config):
    """Refuses a configuration without mean and standard deviation, which chips do not state. Raises UsageError."""
    need(
        config.mean is not None and config.std is not None,
        f"--mean and --std are missing, because --dataset {config.dataset} does not state them: measure them with "
        f"python -m sarwmix.prepare.statistics --dataset {config.dataset} --data_path DIR --out FILE and give "
        f"--statistics FILE{', pack the images (sarwmix.prepare.pack)' if config.dataset == 'chips' else ''}, or "
        "start from a checkpoint that states them",
    )


def machine_settings(flags, ranks):
    """The layer of the machine: mixed precision, loader processes per rank, learning rate of the global batch.

    Exchanges between ranks: do not call it within `ranks.together()`.
    """
    cores = len(os.sched_getaffinity(0))
    return {
        "amp": settle_amp(flags.amp, ranks),
        "num_workers": min(MOST_WORKERS, cores // ranks.launch.local_size),
        "lr": flags.blr * global_batch(flags, ranks) / 256,
    }


def global_batch(config, ranks):
    """Images of one optimizer step, over all micro-batches and ranks."""
    return config.batch_size * config.accum_iter * ranks.world_size


def log_configuration(config, flags, unused=()):
    """Logs one line with what was settled of the flags, as JSON; the line of `util.misc.log_flags` has the others.

    unused: names of flags that have no effect on what the program does, and that the line leaves out.
    """
    settled = {
        name: value for name, value in vars(config).items() if name not in unused and value != getattr(flags, name)
    }
    log.info("configuration: %s", json.dumps(settled, sort_keys=True))


# ---- Mean and standard deviation -----------------------------------------------------------------


def read_statistics(path):
    """{"mean", "std"} of the file that --statistics names; {} without one. Raises UsageError."""
    if not path:
        return {}
    remedy = "give what python -m sarwmix.prepare.statistics --out FILE wrote"
    try:
        content = read_json(path, remedy)
    except DataError as error:
        raise UsageError(f"--statistics {error}") from None
    if isinstance(content, dict) and "mean" not in content:  # statistics.json of a packed store
        stored = content.get("train", content.get("every"))
        content = {"units": UNITS, "channels": CHANNELS, **stored} if isinstance(stored, dict) else content
    if (
        not isinstance(content, dict)
        or not are_statistics(content.get("mean"))
        or not are_statistics(content.get("std"), above=0)
    ):
        raise UsageError(f"--statistics {path}: has no mean and std of two channels; {remedy}")
    if content.get("units") != UNITS or content.get("channels") != CHANNELS:
        raise UsageError(
            f"--statistics {path}: states channels {content.get('channels')} in {content.get('units')}, but the "
            f"input is {', '.join(CHANNELS)} in {UNITS}; {remedy}"
        )
    return {name: [round(float(value), 4) for value in content[name]] for name in STATISTICS}


def log_statistics(config, kind, checkpoint=None):
    """Logs the mean and standard deviation of the input, and where they come from.

    kind: the dataset or its class. checkpoint: the LoadedCheckpoint that may state them, or None.
    """
    stated = {} if checkpoint is None else checkpoint.stated()

    def source(name):
        value = getattr(config, name)
        if config.statistics:
            return f"--statistics {config.statistics}"
        if name in stated and agree(value, stated[name]):
            return str(checkpoint.path)
        own = getattr(kind, name.upper())
        if own is None or not agree(value, own):
            return f"--{name}"
        return f"--data_path {config.data_path}" if config.dataset == "chips" else f"--dataset {config.dataset}"

    log.info(
        "standardised with mean %s and std %s dB (VH, VV), from %s",
        shown(config.mean),
        shown(config.std),
        " and ".join(dict.fromkeys(map(source, STATISTICS))),
    )


# ---- Contradictions between flags ----------------------------------------------------------------


def need(holds, message):
    """Raises UsageError with the message unless the condition holds."""
    if not holds:
        raise UsageError(message)


def can_write(path):
    """Whether a file or folder can be created at a path, as far as permissions tell."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    return folder.is_dir() and os.access(folder, os.W_OK)
