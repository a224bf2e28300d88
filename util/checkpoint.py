# SPDX-License-Identifier: MIT
"""Checkpoints: written so that a killed run never leaves half of one, read so that nothing in them is executed."""
import argparse
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from util.errors import UsageError
from util.pos_embed import fit_position_weights

LATEST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
EXPORTED_WEIGHTS, EXPORTED_CONFIG = "model.safetensors", "config.json"
# Besides tensors and plain containers, the released checkpoints hold the flags of their run in a Namespace.
ALLOWED_CLASSES = [argparse.Namespace]

log = logging.getLogger(__name__)


def write_atomically(path, write):
    """Have `write(file)` fill a temporary file beside `path`, flush it to the disk, then put it in place in one step.

    Killed at any moment, `path` holds either what it held before or all of the new content. Raises OSError (disk full,
    …) with the old file untouched and the temporary one removed.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(staged, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _give_second_name(path, name):
    """Make `name`, beside path, the same file in one step; a copy where the file system has no hard links."""
    staged = path.with_name(f".{name}.{os.getpid()}.tmp")
    staged.unlink(missing_ok=True)
    try:
        os.link(path, staged)
    except OSError:
        with open(path, "rb") as source:
            write_atomically(path.with_name(name), lambda file: shutil.copyfileobj(source, file))
    else:
        os.replace(staged, path.with_name(name))


def save_checkpoint(folder, state, names=()):
    """Write `state` as the latest checkpoint of a run, keeping the one before; and under `names`, if there are any.

    state: dict of tensors and plain values (so that it loads with weights_only). LATEST is replaced last: a run that is
    killed in between repeats the epoch, and writes the other names again. Raises UsageError when it cannot be written,
    for lack of space or permission; the earlier checkpoint is then intact.
    """
    folder = Path(folder)
    try:
        if (folder / LATEST).exists():
            _give_second_name(folder / LATEST, PREVIOUS)         # so that LATEST is there at every moment
        first, *others = *names, LATEST
        write_atomically(folder / first, lambda file: torch.save(state, file))
        for name in others:
            _give_second_name(folder / first, name)
    except (OSError, RuntimeError) as error:         # torch.save turns a failed write into a RuntimeError
        raise UsageError(f"{folder / LATEST}: the checkpoint could not be written ({str(error).splitlines()[0]}); the one "
                         f"before is intact. Make room or change --output_dir, then go on with --resume auto") from error


def load_checkpoint(path):
    """Read a checkpoint of ours or of the released code, or an exported folder, onto the CPU; a dict with at least "model".

    Only tensors, plain containers and argparse.Namespace are unpickled; "args" is returned as a dict. Raises UsageError
    that names the file if it is missing, damaged, not a checkpoint, or holds anything else.
    """
    path = Path(path)
    if path.is_dir():
        return _load_exported(path)
    if not path.is_file():
        raise UsageError(f"{path}: there is no such checkpoint")
    try:
        with torch.serialization.safe_globals(ALLOWED_CLASSES):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "its content is not allowed")
        raise UsageError(f"{path}: refused, as loading it would run code from the file or it is damaged "
                         f"({reason.strip()[:160]})") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: damaged or not a checkpoint ({(str(error).splitlines() or ['empty'])[0][:160]}); use "
                         f"another, or the one before it ({PREVIOUS})") from None
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UsageError(f"{path}: not a checkpoint of this program or of the released code: it has no 'model'")
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = vars(state["args"])
    return state


def _load_exported(folder):
    """What `util.export` wrote, in the form of a checkpoint."""
    try:
        config = json.loads((folder / EXPORTED_CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / EXPORTED_WEIGHTS)
        return {"model": weights, "args": dict(config["args"]), "input": dict(config["input"]), "epoch": config["epoch"]}
    except FileNotFoundError as error:
        raise UsageError(f"{folder}: no exported model, {Path(error.filename).name} is missing; give a checkpoint file, or a folder "
                         f"that --export wrote") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UsageError(f"{folder}: damaged, or not written by --export ({' '.join(str(error).split())[:160]}); export it "
                         f"again") from None


def load_latest(folder):
    """The newest loadable checkpoint of a run, as (state, path), or (None, None) if the run has none yet.

    Falls back from the latest to the one before with a warning. Raises UsageError if there are some but none loads.
    """
    candidates = [Path(folder) / name for name in (LATEST, PREVIOUS) if (Path(folder) / name).exists()]
    for path in candidates:
        try:
            return load_checkpoint(path), path
        except UsageError as error:
            log.warning("%s; trying the one before", error)
    if candidates:
        raise UsageError(f"{folder}: none of its checkpoints can be loaded ({', '.join(path.name for path in candidates)}); "
                         f"start again with --overwrite, or name another with --resume PATH")
    return None, None


def initialise(model, state, path, ignore=(), keep=()):
    """Initialise a model from a checkpoint's weights, fitting position weights to its input size.

    state: of `load_checkpoint`. ignore: beginnings of names that are left out where the model has not got them (a
    decoder). keep: beginnings of names that the model keeps as they are (a new head). All other parameters must be
    there with their shapes. Returns the names of the resampled entries. Raises UsageError naming the file and the first
    entries that do not fit.
    """
    own = model.state_dict()
    weights = {name: value for name, value in state["model"].items()
               if not name.startswith(tuple(keep)) and (name in own or not name.startswith(tuple(ignore)))}
    weights |= {name: value for name, value in own.items() if name.startswith(tuple(keep))}
    weights, resampled = fit_position_weights(weights, own)
    missing = [name for name in own if name not in weights]
    foreign = [name for name in weights if name not in own]
    misshapen = [f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}" for name in own
                 if name in weights and weights[name].shape != own[name].shape]
    for what, names in (("lacks", missing), ("has, but the model has not,", foreign), ("has other shapes:", misshapen)):
        if names:
            raise UsageError(f"{path}: not for this model: it {what} {', '.join(names[:3])}"
                             f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}; check --model and --input_size")
    model.load_state_dict(weights)
    return resampled


def restore(state, path, model, optimizer, scaler):
    """Put a checkpoint's whole state into a run that continues it. Raises UsageError naming the file if it does not fit."""
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        int(state["epoch"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: does not fit this run ({str(error).splitlines()[0][:160]}); to start from its weights only, "
                         f"use --finetune") from None


def check_same_run(saved, current):
    """Refuse to continue a run as another one. saved, current: dicts of what must agree, by the names of the flags.

    Raises UsageError naming the flags and both values.
    """
    changed = [f"--{name} {current[name]} (was {saved[name]})" for name in saved
               if name in current and saved[name] != current[name]]
    if changed:
        raise UsageError(f"--resume: this would be another run: {', '.join(changed)}; give the values the run began with, "
                         f"or start a new one in another --output_dir with --finetune")
