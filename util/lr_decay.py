# SPDX-License-Identifier: MIT
"""Layer-wise learning-rate decay for finetuning: the learning rate falls from the head to the input."""

from collections import defaultdict


def layer_id(name, depths):
    """The layer number of a parameter, 0 … N, with N = sum(depths) blocks.

    Patch and position embedding: 0. Block: its number, counted over all stages from 1. Merging after a stage: 1 + the
    blocks up to and including that stage, the number of the block that it feeds. All others (last norm, head): N.
    name: as in `named_parameters()`. depths: blocks per stage.
    """
    part, *place = name.split(".")
    if part in ("patch_embed", "absolute_pos_embed"):
        return 0
    if part == "layers":
        stage, kind = int(place[0]), place[1]
        if kind == "blocks":
            return sum(depths[:stage]) + int(place[2]) + 1
        if kind == "downsample":
            return sum(depths[: stage + 1]) + 1
    return sum(depths)


def param_groups_lrd(model, weight_decay, no_weight_decay_list=(), layer_decay=0.75):
    """Parameter groups for an optimizer, with an `lr_scale` by which `adjust_learning_rate` multiplies the learning
    rate.

        lr_scale = layer_decay^(N + 1 − layer_id)     from layer_decay at the head to layer_decay^(N+1) at the embedding

    model: an encoder with stages `layers[i].blocks`, with or without a head; not wrapped in DDP. weight_decay: of all
    parameters except those of at most one dimension (biases, norms) and those in no_weight_decay_list; relative
    position bias tables have two dimensions and decay. Frozen parameters are in no group. Returns a list of {"params",
    "weight_decay", "lr_scale"}, sorted by layer id, decayed parameters first. The order is the same in every run,
    because optimizer states are restored by position. Raises ValueError if nothing is trainable. Source: BEiT, arXiv
    2106.08254.
    """
    depths = [len(stage.blocks) for stage in model.layers]
    members = defaultdict(list)  # (layer id, spared from weight decay) → parameters
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[layer_id(name, depths), parameter.ndim <= 1 or name in no_weight_decay_list].append(parameter)
    if not members:
        raise ValueError("the model has no trainable parameter: all of them are frozen (requires_grad is False)")
    return [
        {
            "params": members[place, spared],
            "weight_decay": 0.0 if spared else weight_decay,
            "lr_scale": layer_decay ** (sum(depths) + 1 - place),
        }
        for place, spared in sorted(members)
    ]
