# SPDX-License-Identifier: MIT
"""Writes checkpoints atomically, and reads them without executing code from them.

Each is a `SealedFile`, with its SHA-256 in `checkpoint.pth.sha256`.
"""

import argparse
import json
import logging
import os
import pickle
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import UsageError, listed
from common.safe_zip import packing_fault
from common.sealed_file import SealedFile
from util.checkpoint_checks import fault_of, fault_of_moments
from util.foreign import take_weights
from util.pos_embed import fit_position_weights

LATEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
ZIP_SIGN, LFS_SIGN = b"PK\x03\x04", b"version https://git-lfs"
WEB_PAGE = re.compile(rb"\s*(<\?xml|<!doctype|<html|<head|<body)", re.IGNORECASE)
EXPORTED_WEIGHTS, EXPORTED_CONFIG, EXPORTED_PROGRAM = "model.safetensors", "config.json", "model.pt2"
SAFE_TORCH = (2, 10)
FIXED = ("relative_position_index", "pos_embed")  # suffixes of tensors that are computed, not learned
# Besides tensors and plain containers, the released checkpoints hold the flags of their run in a Namespace.
ALLOWED_CLASSES = [argparse.Namespace]

log = logging.getLogger(__name__)


# ---- Writing -------------------------------------------------------------------------------------


def save_checkpoint(folder, state, names=()):
    """Writes `state` as the latest checkpoint of a run and under `names`, and keeps the previous checkpoint.

    state: dict of tensors and plain values, so that it loads with weights_only. LATEST is replaced last: a run that is
    killed before repeats the epoch and writes the other names again. Raises UsageError, with the previous checkpoint
    intact, if writing fails for lack of space or permission.
    """
    folder = Path(folder)
    try:
        if (folder / LATEST).exists():
            SealedFile(folder / LATEST).copy_to(
                folder / PREVIOUS
            )  # copied and not renamed, so that LATEST always exists
        first, *others = *names, LATEST
        new = SealedFile(folder / first)
        new.write(lambda file: torch.save(state, file))
        for name in others:
            new.copy_to(folder / name)
    except OSError as error:
        before = "the previous one is intact" if (folder / LATEST).exists() else "there is no previous one"
        raise UsageError(
            f"{folder / LATEST}: the checkpoint could not be written ({error.strerror or error}); {before}. Free "
            "space or change --output_dir, then continue with --resume auto"
        ) from error


def go_on_from(path, folder, companions):
    """Makes a loaded checkpoint the latest one of the run in `folder`.

    The former latest checkpoint becomes the previous one, unless it is damaged. companions: glob of further checkpoints
    that are copied too if `path` is in another folder.
    """
    path, latest = Path(path), Path(folder) / LATEST
    if not os.path.samefile(path.parent, folder):
        for other in path.parent.glob(companions):
            SealedFile(other).copy_to(latest.with_name(other.name))
    if latest.exists():
        if os.path.samefile(path, latest):
            return
        if SealedFile(latest).is_intact() and path.name != PREVIOUS:
            SealedFile(latest).copy_to(latest.with_name(PREVIOUS))
    SealedFile(path).copy_to(latest)


# ---- Reading -------------------------------------------------------------------------------------


def check_torch(path=""):
    """Raises UsageError if this PyTorch can execute code from files even with weights_only. path: the file to open."""
    if torch.__version__ < SAFE_TORCH:
        least = ".".join(map(str, SAFE_TORCH))
        raise UsageError(
            f"{f'{path}: not opened, as ' if path else ''}PyTorch {torch.__version__} cannot read checkpoints safely "
            f"(CVE-2025-32434, CVE-2026-24747); install {least} or newer: pip install --upgrade 'torch>={least}' "
            f"torchvision"
        )


def is_exported(folder):
    """Whether a folder is an exported model, or part of one."""
    return any((Path(folder) / name).exists() for name in (EXPORTED_CONFIG, EXPORTED_WEIGHTS))


def find_checkpoint(path):
    """Resolves a path to a checkpoint file or an exported folder, a str. Logs a path that differs from the given one.

    The folder of a run resolves to its selected checkpoint, or else its latest; the weights and the program of an
    exported folder resolve to the folder. Raises UsageError for a folder without a checkpoint.
    """
    given = Path(path)
    if given.is_dir() and not is_exported(given):
        name = next((name for name in (BEST, LATEST) if (given / name).exists()), None)
        if name is None:
            raise UsageError(
                f"{path}: a folder without {BEST}, {LATEST} or an exported model ({EXPORTED_CONFIG}, "
                f"{EXPORTED_WEIGHTS}); give the checkpoint file, or the folder of a run"
            )
        log.info("%s is the folder of a run: using its %s", path, name)
        return str(given / name)
    if given.name in (EXPORTED_WEIGHTS, EXPORTED_PROGRAM) and given.with_name(EXPORTED_CONFIG).is_file():
        log.info("%s: read with the %s beside it", path, EXPORTED_CONFIG)
        return str(given.parent)
    return str(path)


def load_checkpoint(path):
    """Reads a checkpoint of this program, the released code or another program, or an exported folder, onto the CPU.

    Returns a dict with at least "model"; "args" is a dict too. The checksum beside the file is verified first. Only
    tensors, plain containers and argparse.Namespace are unpickled. `util.foreign` converts checkpoints of other
    programs. Raises UsageError, which names the file, if it is missing, damaged, not a checkpoint, or holds other
    objects.
    """
    path = Path(path)
    if path.is_dir():
        return _load_exported(path)
    check_torch(path)
    sealed = SealedFile(path)
    try:
        beginning = _beginning(path)
        is_intact = sealed.is_intact()
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such checkpoint") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if not is_intact:
        raise UsageError(
            f"{path}: damaged: its checksum differs from that in {sealed.sidecar.name}; use another, or the previous "
            f"one ({PREVIOUS}). If you changed it yourself, remove {sealed.sidecar.name}"
        )
    fault = packing_fault(path) if beginning.startswith(ZIP_SIGN) else None
    if fault:
        raise _damaged(path, fault)
    try:
        if beginning[8:9] == b"{":  # safetensors: the length of the header, then the header, JSON
            return _checked(path, load_file(path))
        with torch.serialization.safe_globals(ALLOWED_CLASSES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1][:120]}" if found else "its content is not allowed"
        raise UsageError(
            f"{path}: refused, because loading it would run code from the file or it is damaged ({reason}); save "
            "only the weights (state_dict) with the program that wrote it"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise _damaged(path, (str(error).splitlines() or ["empty"])[0]) from None
    return _checked(path, state)


def _beginning(path):
    """The first bytes of a file. Raises OSError, and UsageError for a Git LFS pointer or a web page."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: cannot be read, as it is not a plain file; name a checkpoint")
    with open(path, "rb") as file:
        beginning = file.read(256)
    if beginning.startswith(LFS_SIGN):
        raise UsageError(
            f"{path}: a pointer of Git LFS, not the file that it stands for; fetch it with git lfs pull, or download it"
        )
    if WEB_PAGE.match(beginning):
        raise UsageError(
            f"{path}: a web page, not a checkpoint; download the file again, by its direct link (on a model hub the "
            f"one with /resolve/, not /blob/)"
        )
    return beginning


def _damaged(path, reason):
    return UsageError(
        f"{path}: damaged or not a checkpoint ({reason[:160]}); use another, or the previous one ({PREVIOUS})"
    )


def _checked(path, state):
    """Validates a loaded state and converts it to the form of our checkpoints. Raises UsageError."""
    try:
        state, remarks = take_weights(state)
    except ValueError as error:
        raise UsageError(f"{path}: not a checkpoint of this program or of the released code: {error}") from None
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = vars(state["args"])
    fault = fault_of(state)
    if fault:
        raise _damaged(path, fault)
    if remarks:
        log.info("%s: %s", path, "; ".join(remarks))
    return {part: value for part, value in state.items() if value is not None}


def _load_exported(folder):
    """Reads a model that `util.export` wrote, in the form of a checkpoint."""
    for name in (EXPORTED_CONFIG, EXPORTED_WEIGHTS):
        try:
            _beginning(folder / name)
        except FileNotFoundError:
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
            raise UsageError(
                f"{folder}: no exported model, {name} is missing (there: {there}); copy or download the whole folder, "
                f"or give a checkpoint file"
            ) from None
        except OSError as error:
            raise UsageError(f"{folder / name}: cannot be read ({error.strerror})") from None
    try:
        config = json.loads((folder / EXPORTED_CONFIG).read_text(encoding="utf-8"))
        state = {
            "model": load_file(folder / EXPORTED_WEIGHTS),
            "args": dict(config["args"]),
            "input": dict(config["input"]),
            "epoch": config["epoch"],
            "data": config.get("data"),
        }
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UsageError(
            f"{folder}: damaged, or not written by --export ({' '.join(str(error).split())[:160]}); export it again"
        ) from None
    return _checked(folder, state)


def load_latest(folder):
    """(state, path) of the newest checkpoint of a run that can be loaded; (None, None) if the run has no checkpoint.

    Tries the latest, the previous, and then the other checkpoints from new to old, and warns of each that cannot be
    loaded. Raises UsageError if there are checkpoints and none can be loaded.
    """
    folder = Path(folder)
    last = [folder / LATEST, folder / PREVIOUS]
    others = [path for path in folder.glob("checkpoint*.pth") if path not in last and path.is_file()]
    others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    candidates = [path for path in (*last, *others) if path.is_file()]
    for path in candidates:
        try:
            return load_checkpoint(path), path
        except UsageError as error:
            log.warning("%s; trying the previous one", error)
    if candidates:
        raise UsageError(
            f"{folder}: none of its checkpoints can be loaded ({', '.join(path.name for path in candidates)}), for the "
            f"reasons above; they are left as they are. Restore one from a copy, name another with --resume PATH, or "
            f"begin a new run in another --output_dir"
        )
    return None, None


def initialise(model, state, path, ignore=(), keep=()):
    """Initialises a model from the weights of a checkpoint, and resamples position weights to the model's input size.

    state: from `load_checkpoint`. ignore: name prefixes of weights that the model may lack (a decoder). keep: name
    prefixes of weights that the model keeps (a new head). All other parameters must exist with their shapes, except
    fixed tables, which are computed if they are missing. Returns the names of the resampled entries. Raises UsageError
    with the file and the first entries that do not fit.
    """
    own = model.state_dict()
    weights = {
        name: value
        for name, value in state["model"].items()
        if not name.startswith(tuple(keep)) and (name in own or not name.startswith(tuple(ignore)))
    }
    weights |= {name: value for name, value in own.items() if name.startswith(tuple(keep))}
    fixed = [name for name in own if name not in weights and name.endswith(FIXED)]
    weights |= {name: own[name] for name in fixed}
    weights, resampled = fit_position_weights(weights, own)
    missing = [name for name in own if name not in weights]
    foreign = [name for name in weights if name not in own]
    misshapen = [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    found = {"lacks": missing, "has weights that the model lacks,": foreign, "has other shapes:": misshapen}
    faults = [f"{what} {listed(names, 3)}" for what, names in found.items() if names]
    if faults:
        raise UsageError(
            f"{path}: does not fit this model: it {', and it '.join(faults[:2])}; check --model and --input_size"
        )
    if fixed:
        log.info("%s: lacks %s; these are computed, as they are not learned", path, listed(fixed, 1))
    model.load_state_dict(weights)
    return resampled


def restore(state, path, model, optimizer, scaler):
    """Loads the state of a checkpoint into the run that continues it. Raises UsageError if it does not fit."""
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        begun = state["epoch"] >= 0 or state.get("progress", {"step": 0})["step"] > 0
        fault = fault_of_moments(optimizer, begun)
        if fault:
            raise ValueError(fault)
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(
            f"{path}: does not fit this run ({str(error).splitlines()[0][:160]}); to start from its weights only, "
            f"use --finetune"
        ) from None


def check_same_run(saved, current):
    """Raises UsageError, with the flags and both values, if a continued run differs from the saved one.

    saved, current: {flag: value that must agree}. A flag that the saved run did not have is None. saved: empty for a
    checkpoint of another program.
    """
    differing = [name for name, value in current.items() if saved.get(name) != value]
    changed = [f"--{name} {current[name]} (was {saved.get(name)})" for name in differing]
    if saved and changed:
        raise UsageError(
            f"--resume: these flags differ from those of the run: {', '.join(changed)}; give the values of the run, "
            "or start a new run in another --output_dir with --finetune"
        )
