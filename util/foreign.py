# SPDX-License-Identifier: MIT
"""Reads checkpoints of other programs: finds the key of the weights, and the prefixes of their names.

Ambiguous files are refused with an error that lists what was found.
"""

import re

import torch

from common.errors import listed

KEYS = ("model", "state_dict", "model_state_dict", "module")  # keys of weights in a file; ours is "model"
EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
ANCHOR = "patch_embed.proj.weight"  # a weight of all our models
# Wrapper modules without weights of their own: torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
BESIDE_ENCODER = ("head.", "decoder_", "mask_token")  # parts that other programs may store outside of the encoder
EMA_NAME = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)


def take_weights(state):
    """Converts the content of a checkpoint file to our form: ({"model": weights, …}, list of remarks for the log).

    Without an entry "model", only the weights are kept, because other entries have other meanings. A prefix that all
    weights of the model share is removed. Our own checkpoints give no remarks. Raises ValueError, which lists what was
    found, for a file without weights of this model or with several sets of them.
    """
    if not isinstance(state, dict):
        raise ValueError(f"it has no 'model', as it is a {type(state).__name__}")
    key, weights = _container(state)
    own, remarks = _without_prefix(weights)
    if key != "model":
        where = "at the top" if key is None else f"under '{key}'"
        remarks = [f"written by another program: only the weights {where} are read", *remarks]
    averaged = [name for name in EMA_KEYS if name != key and isinstance(state.get(name), dict)]
    if averaged:
        remarks.append(f"averaged (EMA) weights, under '{averaged[0]}', are not used")
    if key != "model":
        return {"model": own}, remarks
    return {**{name: value for name, value in state.items() if name not in averaged}, "model": own}, remarks


def _container(state):
    """(key, weights) of the one set of weights in a file. key: None at the top level. Raises ValueError."""
    if isinstance(state.get("model"), dict):
        return "model", state["model"]
    for keys in (KEYS, EMA_KEYS):
        there = [name for name in keys if isinstance(state.get(name), dict)]
        found = [name for name in there if _anchors(state[name])]
        if len(found) == 1:
            return found[0], state[found[0]]
        if found:
            raise ValueError(
                f"it has no 'model', but weights under {_listed(found)}; save the ones you mean under 'model'"
            )
        if there:
            raise ValueError(f"it has no 'model', and its '{there[0]}' has no {ANCHOR}, but {_listed(state[there[0]])}")
    if _anchors(state):
        return None, {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    raise ValueError(f"it has no 'model', but {_listed(state)}")


def _anchors(weights):
    """The names that end in ANCHOR."""
    return [name for name in weights if isinstance(name, str) and f".{_unwrapped(name)}".endswith(f".{ANCHOR}")]


def _unwrapped(name):
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _without_prefix(weights):
    """(weights with the names of our model, remarks on the changes). Raises ValueError."""
    anchors = _anchors(weights)
    if anchors in ([], [ANCHOR]) and not any(
        isinstance(name, str) and WRAPPERS & set(name.split(".")) for name in weights
    ):
        return weights, []
    names, remarks = {}, []
    for name in weights:
        short = _unwrapped(name) if isinstance(name, str) else name
        if short in names:
            raise ValueError(f"it has two weights for {short!r}: {names[short]!r} and {name!r}")
        names[short] = name
    prefixes = [_unwrapped(name)[: -len(ANCHOR)] for name in anchors]
    plain = [prefix for prefix in prefixes if not EMA_NAME.search(prefix)] or prefixes
    if len(plain) > 1:
        raise ValueError(
            f"it has {len(plain)} models, with the prefixes {_listed(plain)}; save the one you mean under 'model'"
        )
    prefix = plain[0] if plain else ""
    own, outside = {}, []
    for short, name in names.items():
        place = _place(short, prefix, [other for other in prefixes if other != prefix])
        if place is None or place in own:
            outside.append(str(name))
        else:
            own[place] = weights[name]
    wrappers = {part for name in weights if isinstance(name, str) for part in name.split(".") if part in WRAPPERS}
    removed = [prefix[:-1]] * bool(prefix) + sorted(wrappers)
    if removed:
        remarks.append(f"removed from the names of its weights: {_listed(f'{part}.' for part in removed)}")
    if outside:
        remarks.append(f"not used, because the model does not have them: {_listed(outside)}")
    return own, remarks


def _place(name, prefix, others):
    """The name of a weight in our model; None if it belongs to another model. others: prefixes of the other models."""
    if not isinstance(name, str) or not prefix and not name.startswith(tuple(others)):
        return name
    if prefix and name.startswith(prefix):
        return name.removeprefix(prefix)
    parts = prefix.split(".")
    for end in range(len(parts)):  # weights in the module that contains the encoder
        beside = "".join(f"{part}." for part in parts[:end])
        if name.startswith(tuple(beside + part for part in BESIDE_ENCODER)):
            return name.removeprefix(beside)
    return None


def _listed(names):
    return listed(map(repr, names), 3) or "nothing"
