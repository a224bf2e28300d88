# SPDX-License-Identifier: MIT
"""Layer decay: which parameter belongs to which group, and how fast that group learns."""

from types import SimpleNamespace

import pytest
import torch

from models_mixmim import mixmim_base, mixmim_tiny
from util.lr_decay import layer_id, param_groups_lrd
from util.lr_sched import adjust_learning_rate

DEPTHS = [2, 2, 18, 2]


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        return mixmim_base()


def by_name(model, groups):
    """{parameter name: its group}, each in one group only."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    pairs = [(names[parameter], group) for group in groups for parameter in group["params"]]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize(
    "name, place",
    [
        ("absolute_pos_embed", 0),
        ("patch_embed.proj.weight", 0),
        ("patch_embed.norm.bias", 0),
        ("layers.0.blocks.0.norm1.weight", 1),
        ("layers.0.blocks.1.mlp.fc1.bias", 2),
        ("layers.0.downsample.norm.weight", 3),
        ("layers.1.blocks.0.attn.qkv.weight", 3),
        ("layers.1.downsample.reduction.weight", 5),
        ("layers.2.blocks.0.norm2.bias", 5),
        ("layers.2.blocks.17.attn.proj.weight", 22),
        ("layers.2.downsample.norm.bias", 23),
        ("layers.3.blocks.0.attn.relative_position_bias_table", 23),
        ("layers.3.blocks.1.mlp.fc2.weight", 24),
        ("norm.weight", 24),
        ("head.weight", 24),
        ("head.bias", 24),
    ],
)
def test_layer_ids_of_the_base_model(name, place):
    assert layer_id(name, DEPTHS) == place


def test_scales_of_the_base_model(base):
    groups = by_name(base, param_groups_lrd(base, 0.05, layer_decay=0.7))
    scales = {
        "patch_embed.proj.weight": 0.7**25,
        "layers.0.blocks.0.attn.qkv.weight": 0.7**24,
        "layers.0.downsample.reduction.weight": 0.7**22,
        "layers.1.blocks.1.norm1.weight": 0.7**21,
        "layers.2.downsample.norm.weight": 0.7**2,
        "layers.3.blocks.0.mlp.fc1.weight": 0.7**2,
        "layers.3.blocks.1.mlp.fc1.weight": 0.7,
        "norm.bias": 0.7,
    }
    assert {name: groups[name]["lr_scale"] for name in scales} == pytest.approx(scales)


def test_every_trainable_parameter_is_in_exactly_one_group(base):
    groups = param_groups_lrd(base, 0.05)
    trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert by_name(base, groups).keys() == trainable
    assert not {"absolute_pos_embed", "decoder_pos_embed"} & trainable  # fixed, so in no group
    assert all(group.keys() == {"params", "weight_decay", "lr_scale"} for group in groups)
    assert len({(group["lr_scale"], group["weight_decay"]) for group in groups}) == len(groups) == 2 * 25


def test_what_weight_decay_spares(base):
    groups = by_name(
        base, param_groups_lrd(base, 0.05, ["mask_token", "layers.0.blocks.0.attn.relative_position_bias_table"])
    )
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay["layers.0.blocks.1.attn.relative_position_bias_table"] == decay["patch_embed.proj.weight"] == 0.05
    assert decay["layers.0.blocks.0.attn.relative_position_bias_table"] == decay["mask_token"] == 0
    assert decay["patch_embed.proj.bias"] == decay["layers.0.blocks.0.norm1.weight"] == decay["norm.weight"] == 0


def test_groups_are_ordered_from_input_to_output_the_decayed_first(base):
    keys = [(group["lr_scale"], -group["weight_decay"]) for group in param_groups_lrd(base, 0.05)]
    assert keys == sorted(keys)


def test_frozen_encoder_leaves_the_head_and_all_frozen_is_refused():
    model = mixmim_tiny()
    model.head = torch.nn.Linear(model.num_features, 3)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups_lrd(model, 0.05)
    model.head.requires_grad_(True)
    assert param_groups_lrd(model, 0.05, layer_decay=0.7) == [
        {"params": [model.head.weight], "weight_decay": 0.05, "lr_scale": pytest.approx(0.7)},
        {"params": [model.head.bias], "weight_decay": 0.0, "lr_scale": pytest.approx(0.7)},
    ]


def test_the_schedule_scales_the_groups_and_reports_the_unscaled_rate():
    model = mixmim_tiny()  # 5 blocks
    optimizer = torch.optim.AdamW(param_groups_lrd(model, 0.05, layer_decay=0.5), lr=1.0)
    args = SimpleNamespace(lr=0.8, min_lr=0.0, warmup_epochs=2, epochs=10)
    assert adjust_learning_rate(optimizer, 1, args) == pytest.approx(0.4)
    rates = by_name(model, optimizer.param_groups)
    assert rates["norm.weight"]["lr"] == pytest.approx(0.2)
    assert rates["patch_embed.proj.weight"]["lr"] == pytest.approx(0.4 / 2**6)
