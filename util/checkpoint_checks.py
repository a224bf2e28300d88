# SPDX-License-Identifier: MIT
"""Whether what a checkpoint says can be true, before anything is made of it: kinds, ranges and shapes of all that is read."""

import torch

LARGEST_INPUT = 8192  # pixels a side
LARGEST_DB = 1e6  # of any value


def _is_count(value, least=0):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def are_statistics(value, above=-LARGEST_DB):
    """Whether a value can be the mean, or above 0 the standard deviation, of two channels in dB."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(number, (int, float)) and above < number < LARGEST_DB for number in value)
    )


def _are_names(value):
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


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


def _is_text(value):
    return isinstance(value, str)


def _is_dict(value):
    return isinstance(value, dict)


def _are_samples(value):
    """Of what a model was trained on: {"train", …: {"samples": count, "simulated": whether}}."""
    return (
        _is_dict(value)
        and _are_names(list(value))
        and all(
            _is_dict(part) and _is_count(part.get("samples")) and isinstance(part.get("simulated"), bool)
            for part in value.values()
        )
    )


def _is_share(value):
    return isinstance(value, (int, float)) and 0 <= value <= 1


# Parts of a checkpoint, of its flags and of what it says of its input → what they are if they are there and not None.
PARTS = {
    **dict.fromkeys(("args", "input", "run", "optimizer", "scaler", "selection", "metrics"), _is_dict),
    "bits": lambda value: _is_dict(value) and _are_names(list(value)),
    "epoch": lambda value: _is_count(value, -1),
    "data": _are_samples,
    "filled": _is_count,
    "progress": _is_progress,
}
FACTS = {
    "model": _is_text,
    "dataset": _is_text,
    "patch_cut": _is_text,
    "patch_op": _is_text,
    "units": _is_text,
    "input_size": lambda value: _is_count(value, 1) and value <= LARGEST_INPUT,
    "nb_classes": lambda value: _is_count(value, 1),
    "mean": are_statistics,
    "std": lambda value: are_statistics(value, above=0),
    "channels": _are_names,
    "classes": _are_names,
    "val_fraction": _is_share,
    "draw_seed": _is_count,
}


def fault_of(state):
    """What is wrong with a checkpoint (dict with a dict "model"), in a few words, or None."""
    for name, value in state["model"].items():
        fault = _fault_of_weight(name, value)
        if fault:
            return f"its weight {name!r} {fault}"
    for where, said, known in (
        ("", state, PARTS),
        (" of its flags", state.get("args"), FACTS),
        (" of its input", state.get("input"), FACTS),
    ):
        for name, is_good in known.items():
            value = said.get(name) if isinstance(said, dict) else None
            if value is not None and not is_good(value):
                return f"'{name}'{where} is not what it should be: {_short(value)}"
    missing = [
        name for name in ("channels", "units") if state.get("input") is not None and state["input"].get(name) is None
    ]
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
    """What is wrong with the state that was loaded into an AdamW, or None; has_begun: whether it has taken a step."""
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
