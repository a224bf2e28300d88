# SPDX-License-Identifier: MIT
"""Layer-wise learning-rate decay: the nearer a layer is to the input, the smaller its learning rate in finetuning."""

from collections import defaultdict


def layer_id(name, depths):
    """Place of a parameter between input and output: 0 … N, N = sum(depths) blocks.

    Patch and position embedding: 0. A block: its number, counted over all stages from 1. The merging after a stage: 1 +
    the blocks up to and including that stage, so that it goes with the first block it feeds. All else (last norm,
    head): N. name: as in `named_parameters()`. depths: blocks per stage.
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
    """Optimizer groups whose `lr_scale`, by which `adjust_learning_rate` multiplies the lr, falls towards the input.

        lr_scale = layer_decay^(N + 1 − layer_id)     from layer_decay at the head to layer_decay^(N+1) at the embedding

    model: an encoder with stages `layers[i].blocks`, and maybe a head; not wrapped in DDP. weight_decay: of all but
    parameters of at most one dimension (biases, norms) and those named in no_weight_decay_list; relative position bias
    tables have two and decay. Frozen parameters are in no group.
    Returns a list of {"params", "weight_decay", "lr_scale"}, by layer id, the decayed before the others: an order that
    does not change between runs, as an optimizer's state is restored by position.
    Raises ValueError if nothing is trainable. Source: BEiT, arXiv 2106.08254.
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
