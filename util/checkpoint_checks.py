# SPDX-License-Identifier: MIT
"""Validates the content of a checkpoint before it is used: types, ranges and shapes."""

from functools import partial

import torch

LARGEST_INPUT = 2048  # pixels per side
LARGEST_DB = 1e6  # of statistics
MOST_CLASSES = 100_000


def _is_count(value, least=0, most=float("inf")):
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_share(value):
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _are_names(value):
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _has_names(value):
    return isinstance(value, dict) and _are_names(list(value))


def are_statistics(value, above=-LARGEST_DB):
    """Whether a value has the form of the means of two channels in dB, or with above=0 of their standard deviations."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(number, (int, float)) and above < number < LARGEST_DB for number in value)
    )


def _are_samples(value):
    return _has_names(value) and all(
        isinstance(part, dict) and _is_count(part.get("samples")) and isinstance(part.get("simulated"), bool)
        for part in value.values()
    )


def _is_progress(value):
    losses = value.get("losses") if isinstance(value, dict) else None
    return (
        isinstance(losses, torch.Tensor)
        and losses.ndim == 1
        and losses.is_floating_point()
        and bool(losses.isfinite().all())
        and value.get("step") == len(losses)
        and _is_count(value["step"])
        and isinstance(value.get("grad_norm"), float)
        and _is_count(value.get("skipped"))
    )


# Entry of a checkpoint → type or check of its value. Entries may be missing or None.
PARTS = {
    "args": dict,
    "input": dict,
    "run": dict,
    "optimizer": dict,
    "scaler": dict,
    "selection": dict,
    "metrics": dict,
    "bits": _has_names,
    "epoch": partial(_is_count, least=-1),  # the last finished one; -1 before the first
    "data": _are_samples,  # {"train", …: {"samples": count, "simulated": bool}}
    "filled": _is_count,
    "progress": _is_progress,  # within an epoch: {"step", "losses" of these steps, "grad_norm", "skipped"}
}
# The same for the entries of its "args" and "input".
VALUES = {
    "model": str,
    "dataset": str,
    "patch_cut": str,
    "patch_op": str,
    "units": str,
    "input_size": partial(_is_count, least=1, most=LARGEST_INPUT),
    "nb_classes": partial(_is_count, least=1, most=MOST_CLASSES),
    "mean": are_statistics,
    "std": partial(are_statistics, above=0),
    "channels": _are_names,
    "classes": _are_names,
    "task": ("multilabel", "multiclass", "flood", "segmentation").__contains__,
    "val_fraction": _is_share,
    "test_fraction": _is_share,
    "draw_seed": _is_count,
}


def _fits(value, wanted):
    return isinstance(value, wanted) if isinstance(wanted, type) else wanted(value)


def fault_of(state):
    """Describes the first fault of a checkpoint, a dict with a dict "model"; None if it is valid."""
    for name, value in state["model"].items():
        fault = _fault_of_weight(name, value)
        if fault:
            return f"its weight {name!r} {fault}"
    flags, stated = state.get("args"), state.get("input")
    for where, part, known in (("", state, PARTS), (" of its flags", flags, VALUES), (" of its input", stated, VALUES)):
        for name, wanted in known.items():
            value = part.get(name) if isinstance(part, dict) else None
            if value is not None and not _fits(value, wanted):
                return f"'{name}'{where} is not what it should be: {_short(value)}"
    missing = [name for name in ("channels", "units") if stated is not None and stated.get(name) is None]
    return f"'{missing[0]}' of its input is missing" if missing else None


def _short(value):
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fault_of_weight(name, value):
    if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
        return "is no tensor"
    if (
        value.layout != torch.strided
        or value.device.type != "cpu"
        or value.untyped_storage().nbytes() < value.numel() * value.element_size()
    ):
        return "has not all of its values in the file"
    if value.is_floating_point() and not value.isfinite().all():
        return "is not finite"
    return None


def fault_of_moments(optimizer, has_begun):
    """Describes the first fault of the state loaded into an AdamW, or None. has_begun: whether it has taken a step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if not state and not has_begun:
                continue
            for name, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
                value = state.get(name)
                if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.shape != shape:
                    return f"'{name}' of its optimizer is not a tensor of shape {tuple(shape)}"
    return None
