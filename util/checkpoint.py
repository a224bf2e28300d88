# SPDX-License-Identifier: MIT
"""Checkpoints: written so that a killed run never leaves half of one, read so that nothing in them is executed.

Each has a sidecar with its SHA-256, `checkpoint.pth.sha256`, in the format of sha256sum. It is written before the
checkpoint takes its name, and then allows both the new one and the one that it replaces; so it is never wrong.
"""

import argparse
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import UsageError
from util.checkpoint_checks import fault_of, fault_of_moments
from util.foreign import take_weights
from util.pos_embed import fit_position_weights

LATEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
ZIP_SIGN, LFS_SIGN = b"PK\x03\x04", b"version https://git-lfs"
WEB_PAGE = re.compile(rb"\s*(<\?xml|<!doctype|<html|<head|<body)", re.IGNORECASE)
EXPORTED_WEIGHTS, EXPORTED_CONFIG = "model.safetensors", "config.json"
SAFE_TORCH = (2, 10)
FIXED = ("relative_position_index", "pos_embed")  # ends of names of what is computed, not learned
# Besides tensors and plain containers, the released checkpoints hold the flags of their run in a Namespace.
ALLOWED_CLASSES = [argparse.Namespace]

log = logging.getLogger(__name__)


# ---- Writing -------------------------------------------------------------------------------------


def _staged(path):
    """The temporary file beside `path`, on the same file system, that is to take its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync_folder(path):
    """Have the disk know which names the files of a folder have."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path, write):
    """Have `write(file)` fill a temporary file beside `path`, flush it to the disk, then put it in place in one step.

    Killed at any moment, `path` holds either what it held before or all of the new content. Raises OSError (disk full,
    …) with the old file untouched and the temporary one removed.
    """
    path = Path(path)
    with _filled(path, write) as staged:
        os.replace(staged, path)
    _sync_folder(path.parent)


@contextmanager
def _filled(path, write):
    """A temporary file beside path, filled by write(file) and flushed to the disk; it is gone at the end, or has moved."""
    staged = _staged(path)
    try:
        with open(staged, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield staged
    finally:
        staged.unlink(missing_ok=True)


class _Hashed:
    """A file to write to that tells a hash what was meant to be written, whatever the disk makes of it."""

    def __init__(self, file, sha256):
        self._file, self._sha256 = file, sha256

    def write(self, data):
        self._sha256.update(data)
        return self._file.write(data)

    def flush(self):
        self._file.flush()


def sidecar(path):
    """The file with the checksum of a checkpoint, as sha256sum writes it."""
    return Path(f"{path}.sha256")


def _digests(path):
    """The checksums that the sidecar of a checkpoint allows: one, or two if a save was interrupted; none without sidecar.

    An empty sidecar, which a crash of the machine may leave, allows nothing.
    """
    try:
        lines = sidecar(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line.split()[0] for line in lines if line.strip()] or [""]


def _digest_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path):
    """The one checksum of a checkpoint. Of one that is damaged it is that of what it should be."""
    known = _digests(path)
    if len(known) == 1:
        return known[0]
    found = _digest_of(path)
    return found if found in known or not known else known[0]


def is_intact(path):
    """Whether a checkpoint has the checksum that its sidecar says, if it has one."""
    known = _digests(path)
    return not known or _digest_of(path) in known


def _put(staged, path, digest):
    """Give a file its final name, and a sidecar. At every moment the sidecar is right for what has the name."""

    def write_sidecar(*digests):
        write_atomically(
            sidecar(path), lambda file: file.write("".join(f"{each}  {path.name}\n" for each in digests).encode())
        )

    replaced = [_digest(path)] if path.exists() else []
    write_sidecar(digest, *replaced)
    os.replace(staged, path)
    staged.unlink(missing_ok=True)  # still there if both were names of one file, which rename(2) leaves as they are
    _sync_folder(path.parent)
    if replaced:
        write_sidecar(digest)


def _give_second_name(path, other):
    """Make `other` the same checkpoint as `path`; a copy where the file system has no hard links, or is another one."""
    staged, digest = _staged(other), _digest(path)
    staged.unlink(missing_ok=True)
    try:
        os.link(path, staged)
    except OSError:
        with open(path, "rb") as source, _filled(other, lambda file: shutil.copyfileobj(source, file)) as staged:
            _put(staged, other, digest)
    else:
        _put(staged, other, digest)


def save_checkpoint(folder, state, names=()):
    """Write `state` as the latest checkpoint of a run, keeping the one before; and under `names`, if there are any.

    state: dict of tensors and plain values (so that it loads with weights_only). Each file has its checksum beside it.
    LATEST is replaced last: a run that is killed in between repeats the epoch, and writes the other names again. Raises
    UsageError when it cannot be written, for lack of space or permission; the earlier checkpoint is then intact.
    """
    folder = Path(folder)
    try:
        if (folder / LATEST).exists():
            _give_second_name(folder / LATEST, folder / PREVIOUS)  # so that LATEST is there at every moment
        first, *others = *names, LATEST
        sha256 = hashlib.sha256()
        with _filled(folder / first, lambda file: torch.save(state, _Hashed(file, sha256))) as staged:
            _put(staged, folder / first, sha256.hexdigest())
        for name in others:
            _give_second_name(folder / first, folder / name)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
        raise UsageError(
            f"{folder / LATEST}: the checkpoint could not be written ({(str(error).splitlines() or [type(error).__name__])[0]}); the one "
            f"before is intact. Make room or change --output_dir, then go on with --resume auto"
        ) from error


def go_on_from(path, folder, companions):
    """Make a checkpoint, which was loaded, the latest of the run in a folder, so that nothing can go on from another one.

    The one that was the latest becomes the one before, unless it is damaged. companions: pattern of names of other
    checkpoints of the run, which are brought along from another folder.
    """
    path, latest = Path(path), Path(folder) / LATEST
    if not os.path.samefile(path.parent, folder):
        for other in path.parent.glob(companions):
            _give_second_name(other, latest.with_name(other.name))
    if latest.exists():
        if os.path.samefile(path, latest):
            return
        if is_intact(latest) and path.name != PREVIOUS:
            _give_second_name(latest, latest.with_name(PREVIOUS))
    _give_second_name(path, latest)


# ---- Reading -------------------------------------------------------------------------------------


def check_torch(path=""):
    """Refuse a PyTorch that a file can make run code, even with weights_only. path: of what is not opened. Raises UsageError."""
    if torch.__version__ < SAFE_TORCH:
        raise UsageError(
            f"{f'{path}: not opened, as ' if path else ''}PyTorch {torch.__version__} cannot read checkpoints safely "
            f"(CVE-2025-32434, CVE-2026-24747); install {'.'.join(map(str, SAFE_TORCH))} or newer: pip install --upgrade "
            f"'torch>={'.'.join(map(str, SAFE_TORCH))}' torchvision"
        )


def is_exported(folder):
    """Whether a folder is an exported model, or a part of one."""
    return any((Path(folder) / name).exists() for name in (EXPORTED_CONFIG, EXPORTED_WEIGHTS))


def find_checkpoint(path):
    """The checkpoint file, or exported folder, that the user means by a path; text. Logged where it is not the path itself.

    The folder of a run stands for its selected checkpoint, else for its latest one; the weights of an exported folder
    stand for the folder. Raises UsageError for a folder without a checkpoint.
    """
    given = Path(path)
    if given.is_dir() and not is_exported(given):
        name = next((name for name in (BEST, LATEST) if (given / name).exists()), None)
        if name is None:
            raise UsageError(
                f"{path}: a folder without {BEST}, {LATEST} or an exported model ({EXPORTED_CONFIG}, {EXPORTED_WEIGHTS}); give "
                f"the checkpoint file, or the folder of a run"
            )
        log.info("%s is the folder of a run: using its %s", path, name)
        return str(given / name)
    if given.name == EXPORTED_WEIGHTS and given.with_name(EXPORTED_CONFIG).is_file():
        log.info("%s: read with the %s beside it", path, EXPORTED_CONFIG)
        return str(given.parent)
    return str(path)


def load_checkpoint(path):
    """Read a checkpoint of ours, of the released code or of another program, or an exported folder, onto the CPU.

    Returns a dict with at least "model". A checkpoint with a checksum beside it is compared with it first. Only tensors,
    plain containers and argparse.Namespace are unpickled; "args" is returned as a dict. What another program wrote is
    read by `util.foreign`. Raises UsageError that names the file if it is missing, damaged, not a checkpoint, or holds
    anything else.
    """
    path = Path(path)
    if path.is_dir():
        return _load_exported(path)
    check_torch(path)
    try:
        beginning = _beginning(path)
        if not is_intact(path):
            raise UsageError(
                f"{path}: damaged, as its checksum is not that of {sidecar(path).name}; use another, or the one before it "
                f"({PREVIOUS}). If you changed it yourself, remove {sidecar(path).name}"
            )
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such checkpoint") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if beginning.startswith(ZIP_SIGN):
        _check_container(path)
    try:
        if beginning[8:9] == b"{":  # safetensors: the length of its header, then the header, as JSON
            return _checked(path, load_file(path))
        with torch.serialization.safe_globals(ALLOWED_CLASSES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other protocols, which are read or refused all the same
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1][:120]}" if found else "its content is not allowed"
        raise UsageError(
            f"{path}: refused, as loading it would run code from the file or it is damaged ({reason}); have the program that "
            f"wrote it save the weights alone (its state_dict)"
        ) from None
    except Exception as error:  # there is no end to what a damaged pickle can raise
        raise _damaged(path, (str(error).splitlines() or ["empty"])[0]) from None
    return _checked(path, state)


def _beginning(path):
    """The first bytes of a file. Raises UsageError for what is often found in a checkpoint's place; OSError."""
    with open(path, "rb") as file:
        beginning = file.read(256)
    if beginning.startswith(LFS_SIGN):
        raise UsageError(
            f"{path}: a pointer of Git LFS, not the file that it stands for; fetch that with git lfs pull, or download it"
        )
    if WEB_PAGE.match(beginning):
        raise UsageError(
            f"{path}: a web page, not a checkpoint; download the file again, by its direct link (on a model hub the one "
            f"with /resolve/, not /blob/)"
        )
    return beginning


def _damaged(path, reason):
    return UsageError(
        f"{path}: damaged or not a checkpoint ({reason[:160]}); use another, or the one before it ({PREVIOUS})"
    )


def _check_container(path):
    """Refuse a zip that would take more memory than it has bytes: torch.save packs nothing. Raises UsageError."""
    try:
        with zipfile.ZipFile(path) as file:
            packed = [info.filename for info in file.infolist() if info.compress_type != zipfile.ZIP_STORED]
            total = sum(info.file_size for info in file.infolist())
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OverflowError,
        EOFError,
        OSError,
        struct.error,
    ) as error:
        raise _damaged(path, str(error)) from None
    if packed or total > path.stat().st_size:
        raise _damaged(path, f"its {packed[0] if packed else 'content'} is packed, which PyTorch's never is")


def _checked(path, state):
    """A loaded checkpoint, when its parts are what they should be; in the form of ours, whoever wrote it. Raises UsageError."""
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
    """What `util.export` wrote, in the form of a checkpoint."""
    for name in (EXPORTED_CONFIG, EXPORTED_WEIGHTS):
        try:
            _beginning(folder / name)
        except FileNotFoundError:
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
            raise UsageError(
                f"{folder}: no exported model, {name} is missing (there: {there}); copy or download the whole folder, or give a "
                f"checkpoint file"
            ) from None
        except OSError as error:
            raise UsageError(f"{folder / name}: cannot be read ({error.strerror})") from None
    try:
        config = json.loads((folder / EXPORTED_CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / EXPORTED_WEIGHTS)
        state = {
            "model": weights,
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
    """The newest loadable checkpoint of a run, as (state, path), or (None, None) if the run has none yet.

    Falls back with a warning from the latest to the one before, and to those kept under other names, the newest first.
    Raises UsageError if there are some but none loads.
    """
    folder = Path(folder)
    last = [folder / LATEST, folder / PREVIOUS]
    kept = sorted(
        set(folder.glob("checkpoint*.pth")) - set(last), key=lambda path: path.stat().st_mtime_ns, reverse=True
    )
    candidates = [path for path in (*last, *kept) if path.exists()]
    for path in candidates:
        try:
            return load_checkpoint(path), path
        except UsageError as error:
            log.warning("%s; trying the one before", error)
    if candidates:
        raise UsageError(
            f"{folder}: none of its checkpoints can be loaded ({', '.join(path.name for path in candidates)}), for the reasons "
            f"above; they are left as they are. Restore one from a copy, name another with --resume PATH, or begin a new run in "
            f"another --output_dir"
        )
    return None, None


def initialise(model, state, path, ignore=(), keep=()):
    """Initialise a model from a checkpoint's weights, fitting position weights to its input size.

    state: of `load_checkpoint`. ignore: beginnings of names that are left out where the model has not got them (a
    decoder). keep: beginnings of names that the model keeps as they are (a new head). All other parameters must be
    there with their shapes, except fixed tables, which are computed where they are missing. Returns the names of the
    resampled entries. Raises UsageError naming the file and the first entries that do not fit.
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
    faults = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (
            ("lacks", missing),
            ("has, but the model has not,", foreign),
            ("has other shapes:", misshapen),
        )
        if names
    ]
    if faults:
        raise UsageError(
            f"{path}: not for this model: it {', and it '.join(faults[:2])}; check --model and --input_size"
        )
    if fixed:
        log.info(
            "%s: lacks %s%s, which are computed, as nothing in them is learned",
            path,
            fixed[0],
            f" and {len(fixed) - 1} more" if fixed[1:] else "",
        )
    model.load_state_dict(weights)
    return resampled


def restore(state, path, model, optimizer, scaler):
    """Put a checkpoint's whole state into a run that continues it. Raises UsageError naming the file if it does not fit."""
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
    """Refuse to continue a run as another one. saved, current: dicts of what must agree, by the names of the flags.

    Raises UsageError naming the flags and both values.
    """
    changed = [
        f"--{name} {current[name]} (was {saved[name]})"
        for name in saved
        if name in current and saved[name] != current[name]
    ]
    if changed:
        raise UsageError(
            f"--resume: this would be another run: {', '.join(changed)}; give the values the run began with, "
            f"or start a new one in another --output_dir with --finetune"
        )
