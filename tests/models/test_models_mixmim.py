# SPDX-License-Identifier: MIT
"""The pretraining model against a plain second implementation (oracle_mixmim.py), its layout, and what must not leak."""

import functools
import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import models_mixmim
from models_mixmim import MixMIM, mixmim_base, mixmim_huge, mixmim_large, mixmim_tiny
from tests.helpers import oracle_mixmim as oracle
from tests.helpers.released import layout

TINY = dict(
    embed_dim=32,
    depths=(1, 1, 2, 1),
    num_heads=(1, 2, 4, 8),
    decoder_embed_dim=64,
    decoder_depth=2,
    decoder_num_heads=4,
)
FAMILY = {  # factory, width and heads of the encoder, parameters in all and trainable
    "base": (mixmim_base, dict(embed_dim=128, num_heads=(4, 8, 16, 32)), 113_686_264, 113_547_000),
    "large": (mixmim_large, dict(embed_dim=192, num_heads=(6, 12, 24, 48)), 222_270_068, 222_065_268),
    "huge": (mixmim_huge, dict(embed_dim=352, num_heads=(11, 22, 44, 88)), 682_964_778, 682_596_138),
}


def rng(seed):
    return torch.Generator().manual_seed(seed)


def inputs(batch, img_size, dtype=torch.float64, seed=0):
    """Images that differ from each other, and weights between 1 and e."""
    g = rng(seed)
    x = torch.randn(batch, 2, img_size, img_size, generator=g, dtype=torch.float64)
    x = x + torch.arange(batch, dtype=torch.float64).view(-1, 1, 1, 1) / 2
    weights = torch.exp(torch.rand(batch, 2, img_size, img_size, generator=g, dtype=torch.float64))
    return x.to(dtype), weights.to(dtype)


def as_mask(cells):
    return torch.tensor(cells, dtype=torch.float32).view(1, -1, 1)


def random_mask(L, ones, seed=0):
    mask = torch.zeros(1, L, 1)
    mask[0, torch.randperm(L, generator=rng(seed))[:ones]] = 1
    return mask


@torch.no_grad()
def randomise(model, seed=1):
    """Move biases, norms, bias tables and the mask token away from their start, where a mistake in them hardly shows."""
    g = rng(seed)
    for name, p in model.named_parameters():
        if p.requires_grad and (p.ndim == 1 or name.endswith("bias_table") or name == "mask_token"):
            p.add_(torch.randn(p.shape, generator=g).to(p), alpha=0.5 if name.endswith("bias_table") else 0.2)
    return model


def build(factory, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return randomise(factory(**kwargs)).to(dtype).eval()


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def disagreements(model, config, x, weights, mask):
    """Largest |model - oracle| over the oracle's largest value: of the loss, pred, and the gradient of every parameter.

    A gradient that is zero but for rounding (a bias table of one entry) is judged by 1e-6 of the largest gradient there is.
    """
    params = trainable(model)
    loss, pred, _ = model(x, weights, mask=mask)
    grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    expected_loss, expected_pred = oracle.oracle_forward(dict(model.named_parameters()), config, x, weights, mask)
    expected_grads = torch.autograd.grad(expected_loss, list(params.values()), materialize_grads=True)

    largest = max(g.abs().max() for g in expected_grads)
    found = {
        "loss": abs(loss - expected_loss) / abs(expected_loss),
        "pred": (pred - expected_pred).abs().max() / expected_pred.abs().max(),
    }
    for name, g, e in zip(params, grads, expected_grads):
        found[f"gradient of {name}"] = (g - e).abs().max() / max(e.abs().max(), 1e-6 * largest)
    return {quantity: error.item() for quantity, error in found.items()}


def assert_agrees(model, config, x, weights, mask, tolerance=1e-9):
    wrong = {q: e for q, e in disagreements(model, config, x, weights, mask).items() if not e <= tolerance}
    assert not wrong, f"{len(wrong)} quantities disagree with the oracle: {dict(list(wrong.items())[:20])}"


# ---- The oracle itself, on cases small enough for the head ---------------------------------------


def test_oracle_by_hand():
    assert oracle.relative_position_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert oracle.windows(4, 2) == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert oracle.mask_at(as_mask([0, 1, 1, 0]), 2, 4) == [0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0]
    assert oracle.merge(torch.arange(16.0).view(1, 16, 1), 4)[0].tolist() == [
        [0, 4, 1, 5],
        [2, 6, 3, 7],
        [8, 12, 9, 13],
        [10, 14, 11, 15],
    ]
    assert oracle.mix(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), [0, 1]).flatten().tolist() == [1, 4, 3, 2]
    rec = torch.tensor([[10, 11], [20, 21], [30, 31], [40, 41]])[..., None]  # own 0, own 1, partner 0, partner 1
    assert oracle.unmix(rec, as_mask([0, 1])).flatten().tolist() == [40, 11, 30, 21]


def test_oracle_attention_by_hand():
    """One head of width 1, q = k = 0 but for the bias: weights ln 3 and 0 give 3/4 and 1/4, and a forbidden key gives 0."""
    p = {"a.qkv.weight": torch.tensor([[0.0], [0.0], [1.0]]), "a.proj.weight": torch.tensor([[1.0]])}
    x = torch.tensor([[[8.0], [4.0]]])
    bias = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]])
    assert torch.allclose(oracle.attention(p, "a", x, 1, bias).flatten(), torch.tensor([7.0, 6.0]))
    alone = torch.eye(2, dtype=torch.bool)
    assert torch.equal(oracle.attention(p, "a", x, 1, bias, alone), x)


# ---- Agreement -----------------------------------------------------------------------------------

MASKS = {  # cells per side -> {what it is: mask}; 1 = cell from the partner image
    1: {"own": as_mask([0]), "all partner": as_mask([1])},
    2: {
        "ratio 0": random_mask(4, 0),
        "ratio 0.25": random_mask(4, 1),
        "ratio 0.5": random_mask(4, 2),
        "ratio 0.75": random_mask(4, 3),
        "column": as_mask([0, 1, 0, 1]),
    },
    4: {
        "ratio 0": random_mask(16, 0),
        "ratio 0.25": random_mask(16, 4),
        "ratio 0.5": random_mask(16, 8),
        "ratio 0.75": random_mask(16, 12),
        "one cell": random_mask(16, 1),
        "all but one": random_mask(16, 15),
        "all partner": random_mask(16, 16),
        "stage-2 windows of one image": as_mask([1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0]),
    },
    8: {"ratio 0.5": random_mask(64, 32), "unequal": random_mask(64, 19)},
}


@functools.cache
def tiny_of(img_size):
    """One model for all masks of a size, in turn: nothing of an earlier mask may stay behind."""
    return build(mixmim_tiny, img_size=img_size, **TINY)


@pytest.mark.parametrize("img_size, kind", [(32 * side, kind) for side, masks in MASKS.items() for kind in masks])
def test_agrees_at_every_size_and_mask(img_size, kind):
    config = oracle.OracleConfig(img_size=img_size, **TINY)
    batch = 4 if img_size <= 128 else 2
    assert_agrees(tiny_of(img_size), config, *inputs(batch, img_size), MASKS[img_size // 32][kind])


@pytest.mark.parametrize(
    "weight_level, norm_pix_loss, weighted, batch",
    list(itertools.product(("token", "pixel"), (False, True), (False, True), (2, 4))),
)
def test_agrees_for_every_loss(weight_level, norm_pix_loss, weighted, batch):
    kwargs = dict(TINY, img_size=64, weight_level=weight_level, norm_pix_loss=norm_pix_loss)
    x, weights = inputs(batch, 64)
    assert_agrees(
        build(mixmim_tiny, **kwargs),
        oracle.OracleConfig(**kwargs),
        x,
        weights if weighted else None,
        random_mask(4, 1, seed=batch),
    )


def test_agrees_for_an_odd_batch_without_mixing():
    kwargs = dict(TINY, img_size=64)
    assert_agrees(build(mixmim_tiny, **kwargs), oracle.OracleConfig(**kwargs), *inputs(3, 64), torch.zeros(1, 4, 1))


@pytest.mark.parametrize(
    "size, depths, mlp_ratio",
    [  # the narrow MLP keeps huge within seconds
        ("base", (1, 1, 2, 1), 4.0),
        ("large", (1, 1, 2, 1), 4.0),
        ("huge", (1, 1, 1, 1), 1.0),
    ],
)
def test_agrees_at_released_widths(size, depths, mlp_ratio):
    factory, widths, _, _ = FAMILY[size]
    kwargs = dict(depths=depths, decoder_depth=1, norm_pix_loss=True)
    model = build(factory, mlp_ratio=mlp_ratio, **kwargs)
    assert_agrees(model, oracle.OracleConfig(**widths, **kwargs), *inputs(2, 128), random_mask(16, 7, seed=3))


@pytest.mark.slow
def test_full_base_agrees():
    model = build(mixmim_base, norm_pix_loss=True)
    assert_agrees(model, oracle.OracleConfig(norm_pix_loss=True), *inputs(2, 128), random_mask(16, 8, seed=5))


@pytest.mark.parametrize("ones", [5, 8])
def test_agrees_in_float32(ones):
    kwargs = dict(TINY, img_size=128, norm_pix_loss=True)
    model = build(mixmim_tiny, dtype=torch.float32, **kwargs)
    x, weights = inputs(4, 128, torch.float32)
    assert_agrees(model, oracle.OracleConfig(**kwargs), x, weights, random_mask(16, ones), tolerance=1e-4)


def test_drop_path_is_off_in_evaluation():
    kwargs = dict(TINY, img_size=64)
    model = build(mixmim_tiny, drop_path_rate=0.5, **kwargs)
    x, weights = inputs(2, 64)
    assert_agrees(model, oracle.OracleConfig(**kwargs), x, weights, random_mask(4, 2))
    with torch.no_grad():
        evaluated, trained = (model.train(mode)(x, weights, mask=random_mask(4, 2))[0] for mode in (False, True))
    assert evaluated != trained


# ---- Layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", FAMILY)
def test_released_layout_and_parameter_totals(size):
    factory, widths, total, total_trainable = FAMILY[size]
    with torch.device("meta"):  # shapes without memory
        model = factory()
    ours = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    expected = layout(widths["embed_dim"], (2, 2, 18, 2), widths["num_heads"], (8, 8, 8, 4), decoder=(512, 8))
    assert ours == expected
    for is_vector in (True, False):  # optimizer states are stored by position within a weight decay group
        in_group = [name for name, p in trainable(model).items() if (p.ndim == 1) is is_vector]
        assert in_group == [name for name in expected if name in set(in_group)]
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"absolute_pos_embed", "decoder_pos_embed"}
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in trainable(model).values()) == total_trainable


def test_tiny_is_tiny():
    model = mixmim_tiny()
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 1e7
    assert model.absolute_pos_embed.shape[-1] % 32 == 0
    loss, pred, _ = model(*inputs(2, 128, torch.float32))
    assert torch.isfinite(loss) and pred.shape == (2, 16, 2048)


def test_factories_are_constructor_calls():
    torch.manual_seed(0)
    one = mixmim_base(depths=(1, 1, 1, 1), decoder_depth=1).state_dict()
    torch.manual_seed(0)
    other = MixMIM(
        img_size=128,
        embed_dim=128,
        depths=(1, 1, 1, 1),
        num_heads=(4, 8, 16, 32),
        window_sizes=(8, 8, 8, 4),
        decoder_embed_dim=512,
        decoder_depth=1,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        drop_path_rate=0.0,
        range_mask_ratio=0.0,
        norm_pix_loss=False,
        weight_level="token",
    ).state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fixed_embeddings():
    model = mixmim_base(depths=(1, 1, 1, 1), decoder_depth=1)
    for embedding, dim, grid in ((model.absolute_pos_embed, 128, 32), (model.decoder_pos_embed, 512, 4)):
        assert not embedding.requires_grad
        assert (embedding[0].double() - oracle.sincos_embedding(dim, grid)).abs().max() < 1e-6
    row_1_column_2 = model.absolute_pos_embed[0, 1 * 32 + 2]
    quarter, i = 32, 5
    omega = 10000 ** (-i / quarter)
    at = [i, quarter + i, 2 * quarter + i, 3 * quarter + i]
    by_hand = torch.tensor([math.sin(2 * omega), math.cos(2 * omega), math.sin(omega), math.cos(omega)])
    assert torch.allclose(row_1_column_2[at], by_hand, atol=1e-6)


def test_relative_position_index_is_swins():
    for stage in mixmim_tiny(**TINY).layers:
        for block in stage.blocks:
            index = block.attn.relative_position_index
            assert torch.equal(index, oracle.relative_position_index(math.isqrt(len(index))))


# ---- Gradients and leaks -------------------------------------------------------------------------


def test_every_trainable_parameter_of_base_learns():
    torch.manual_seed(0)
    model = mixmim_base(norm_pix_loss=True)
    x, weights = inputs(2, 128, torch.float32)
    loss, pred, mask = model(x, weights)
    assert pred.shape == (2, 16, 2048) and mask.shape == (1, 16, 1) and mask.sum() == 8
    loss.backward()
    idle = [
        name
        for name, p in trainable(model).items()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert not idle
    assert model.absolute_pos_embed.grad is None and model.decoder_pos_embed.grad is None


@pytest.mark.parametrize("ones", [5, 8, 11])
def test_a_prediction_sees_only_the_other_cells_of_its_own_image(ones):
    """d pred / d pixel is exactly 0, not small, for every hidden pixel, and not 0 for every pixel that may be seen.

    The cells of an image are predicted in two groups, those mixed away (mask 1) from those that stayed and the reverse.
    """
    model = build(mixmim_tiny, img_size=128, **TINY)
    mask = random_mask(16, ones, seed=ones)
    mixed_away = mask.flatten().bool()
    x, weights = inputs(4, 128)
    x.requires_grad_()
    _, pred, _ = model(x, weights, mask=mask)
    for image in (0, 2):
        for predicted in (mixed_away, ~mixed_away):
            probe = torch.randn(pred[image, predicted].shape, generator=rng(0), dtype=pred.dtype)
            (gradient,) = torch.autograd.grad((pred[image, predicted] * probe).sum(), x, retain_graph=True)
            by_cell = oracle.cut(gradient)  # (4, 16, 32, 32, 2)
            assert not by_cell[image, predicted].any()
            assert by_cell[image, ~predicted].all()
            assert not by_cell[[other for other in range(4) if other != image]].any()


def test_a_loud_partner_changes_nothing():
    """Whatever is in the other images, an image's prediction stays as it is."""
    model = build(mixmim_tiny, img_size=128, **TINY)
    x, _ = inputs(4, 128)
    louder = x.clone()
    louder[2:] = 1e4 * x[2:].flip(-1)
    mask = random_mask(16, 6)
    with torch.no_grad():
        before, after = model(x, None, mask=mask)[1], model(louder, None, mask=mask)[1]
    assert torch.allclose(before[:2], after[:2], rtol=0, atol=1e-10)
    assert not torch.allclose(before[2:], after[2:], atol=1e-3)


# ---- The same, computed in other ways ------------------------------------------------------------


def grads_of(model, x, weights, mask, seed=0):
    """Loss and gradients, with drop path drawn from a seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(x, weights, mask=mask)[0]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in trainable(model).values())]


def bits_kept(model, x, mask):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        model(x, None, mask=mask)
    return sum(kept)


def test_grad_checkpointing_changes_memory_only():
    model = build(mixmim_tiny, drop_path_rate=0.5, **TINY).train()
    x, weights = inputs(4, 128)
    mask = random_mask(16, 7)
    before, much = grads_of(model, x, weights, mask), bits_kept(model, x, mask)
    model.execute_with(grad_checkpointing=True)
    assert bits_kept(model, x, mask) < much / 3
    for found, expected in zip(grads_of(model, x, weights, mask), before):
        assert torch.equal(found, expected)
    assert any(
        not torch.equal(a, b) for a, b in zip(grads_of(model, x, weights, mask, seed=1), before)
    )  # drop path was on


def test_shapes_depend_on_how_many_cells_are_masked_not_on_which():
    model = mixmim_tiny(**TINY)
    for ones, groups in ((8, (None, 4, 2, 2)), (5, (None, 4, 1, 1))):
        found = set()
        for cells in itertools.islice(itertools.combinations(range(16), ones), 0, None, 97):
            mask = torch.zeros(16, dtype=torch.bool)
            mask[list(cells)] = True
            layouts, _ = model.layouts(mask, (128, 128), "cpu")
            found.add(tuple((tuple(layout.position.shape), layout.same_image is None) for layout in layouts))
        assert len(found) == 1
        (shapes,) = found
        for (position, unmasked), expected in zip(shapes, groups):
            assert position[0] == (expected or 1) and unmasked == (expected in (None, 2))


@pytest.mark.slow
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_compiled_blocks_compute_the_same_and_are_compiled_once(grad_checkpointing, monkeypatch):
    """Traced as for any backend; five graphs serve all masks: one a stage and the decoder's."""
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        models_mixmim.Blocks,
        "compile",
        lambda self, mode, dynamic: nn.Module.compile(self, backend=backend, fullgraph=True, dynamic=dynamic),
    )
    torch._dynamo.reset()
    model = build(mixmim_tiny, **TINY).train()
    x, weights = inputs(4, 128)
    masks = [random_mask(16, 8, seed) for seed in range(4)]
    before = [grads_of(model, x, weights, mask) for mask in masks]
    model.execute_with(grad_checkpointing, compile_mode="default")
    for mask, expected in zip(masks, before):
        for found, value in zip(grads_of(model, x, weights, mask), expected):
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)
    assert backend.frame_count == 5
    torch._dynamo.reset()


# ---- The mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 5, 8])
def test_fused_and_plain_attention_compute_the_same(kind):
    """With and without an additive mask, with groups that have biases of their own, and in the decoder, which has no bias."""
    model, (x, weights) = build(mixmim_tiny, **TINY).train(), inputs(4, 128)
    mask, found, called = random_mask(16, kind), {}, []
    fused = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **kwargs: called.append(1) or fused(*args, **kwargs),
        )
        for variant in (*model.attention_variants, None):
            called.clear()
            model.execute_with(attention=variant)
            found[variant] = grads_of(model, x, weights, mask), len(called)
    assert model.attention_variants == ("plain", "fused")
    assert [found[name][1] for name in ("plain", "fused", None)] == [
        0,
        7,
        0,
    ]
    for plain, fused, usual in zip(*(found[name][0] for name in ("plain", "fused", None))):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)
        assert torch.equal(usual, plain)


def test_execution_can_be_changed_and_taken_back(monkeypatch):
    """Compiled, compiled with other attention, eager again: code is compiled for each, and not called afterwards."""
    backend = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(
        models_mixmim.Blocks,
        "compile",
        lambda self, mode, dynamic: nn.Module.compile(self, backend=backend, dynamic=dynamic),
    )
    torch._dynamo.reset()
    model = build(
        models_mixmim.MixMIMEncoder, img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_sizes=(8, 4)
    )
    x, _ = inputs(2, 32)
    before = model.encode(x)
    for attention, graphs, fused in (("plain", 2, False), ("fused", 4, True)):
        model.execute_with(compile_mode="default", attention=attention)
        torch.testing.assert_close(model.encode(x), before, rtol=1e-9, atol=1e-12)
        assert backend.frame_count == graphs and ("scaled_dot_product_attention" in backend.graphs[-1].code) == fused
    model.execute_with()
    torch._dynamo.reset()
    assert torch.equal(model.encode(x), before) and backend.frame_count == 4


@pytest.mark.parametrize(
    "img_size, ratio", [(128, 0), (128, 0.25), (128, 0.5), (128, 0.6), (128, 0.75), (128, 1), (64, 0.5), (32, 0.5)]
)
def test_draw_mask_takes_int_of_L_times_ratio_cells(img_size, ratio):
    model = mixmim_tiny(img_size=img_size, **TINY)
    L = (img_size // 32) ** 2
    mask = model.draw_mask(ratio)
    assert mask.shape == (1, L, 1) and mask.is_floating_point()
    assert ((mask == 0) | (mask == 1)).all()
    assert mask.sum() == int(L * ratio)


def test_draw_mask_follows_its_generator_and_reaches_every_cell():
    model = mixmim_tiny(**TINY)
    assert torch.equal(model.draw_mask(0.5, generator=rng(7)), model.draw_mask(0.5, generator=rng(7)))
    torch.manual_seed(7)
    one = model.draw_mask(0.5)
    torch.manual_seed(7)
    assert torch.equal(model.draw_mask(0.5), one)
    g = rng(0)
    share = torch.stack([model.draw_mask(0.25, generator=g) for _ in range(2000)]).mean(dim=0)
    assert (share - 0.25).abs().max() < 0.05  # five standard deviations


def test_range_mask_ratio_varies_the_count():
    model = mixmim_tiny(range_mask_ratio=0.25, **TINY)
    g = rng(0)
    counts = {int(model.draw_mask(0.5, generator=g).sum()) for _ in range(200)}
    assert counts == {8, 9, 10, 11}  # int(16 * (0.5 + u)), 0 <= u < 0.25
    assert torch.equal(model.draw_mask(0.5, generator=rng(3)), model.draw_mask(0.5, generator=rng(3)))


def test_a_given_mask_is_used_and_returned():
    model = build(mixmim_tiny, img_size=64, **TINY)
    x, weights = inputs(2, 64)
    mask = random_mask(4, 1)
    loss, pred, returned = model(x, weights, mask=mask)
    assert torch.equal(returned.to(mask), mask)
    torch.manual_seed(3)
    drawn_loss, _, drawn = model(x, weights, mask_ratio=0.5)
    torch.manual_seed(3)
    assert torch.equal(model.draw_mask(0.5).to(drawn), drawn)
    assert torch.equal(model(x, weights, mask=drawn)[0], drawn_loss)


# ---- The loss ------------------------------------------------------------------------------------


def test_patchify_is_channel_fastest():
    model = mixmim_tiny(img_size=64, **TINY)
    images = torch.arange(2 * 2 * 64 * 64, dtype=torch.float32).view(2, 2, 64, 64)
    patches = model.patchify(images)
    assert patches.shape == (2, 4, 2048)
    for image, cell, row, column, channel in (
        (0, 0, 0, 0, 0),
        (0, 0, 0, 0, 1),
        (0, 1, 0, 1, 0),
        (1, 2, 3, 31, 1),
        (1, 3, 31, 5, 0),
    ):
        value = images[image, channel, 32 * (cell // 2) + row, 32 * (cell % 2) + column]
        assert patches[image, cell, (row * 32 + column) * 2 + channel] == value
    assert torch.equal(patches, oracle.cut(images).reshape(2, 4, -1))
    assert torch.equal(model.unpatchify(patches), images)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("weight_level", ["token", "pixel"])
def test_the_loss_of_a_multilooked_target_by_hand(weight_level, norm_pix_loss):
    model = build(mixmim_tiny, img_size=64, looks=8, weight_level=weight_level, norm_pix_loss=norm_pix_loss, **TINY)
    x, weights = inputs(2, 64)
    target = torch.randn(2, 2, 8, 8)
    loss, pred, _ = model(x, weights, mask=torch.tensor([1.0, 0, 0, 1]), target=target)
    assert pred.shape == (2, 4, 32) and model.decoder_pred.weight.shape[0] == 32
    total = 0.0
    for b in range(2):
        for cell in range(4):
            rows, columns = slice(4 * (cell // 2), 4 * (cell // 2) + 4), slice(4 * (cell % 2), 4 * (cell % 2) + 4)
            values = target[b, :, rows, columns]
            if norm_pix_loss:
                values = (values - values.mean()) / (values.var() + 1e-6).sqrt()
            error = (pred[b, cell].view(4, 4, 2).permute(2, 0, 1) - values).square()
            whole = weights[b].view(2, 8, 8, 8, 8).mean((2, 4))[:, rows, columns]  # averaged as the target is
            total += (error.mean((1, 2)) * whole.mean((1, 2)) if weight_level == "token" else error * whole).mean()
    torch.testing.assert_close(loss, total / 8)


def test_looks_change_the_prediction_head_alone():
    one, eight = (build(mixmim_tiny, img_size=64, looks=looks, **TINY).state_dict() for looks in (1, 8))
    assert [name for name in one if one[name].shape != eight[name].shape] == [
        "decoder_pred.weight",
        "decoder_pred.bias",
    ]
    assert list(one) == list(eight)


def test_a_target_of_another_resolution_is_refused():
    x, weights = inputs(2, 64)
    with pytest.raises(ValueError, match="target of 64 pixels a side; 8 are needed"):
        build(mixmim_tiny, img_size=64, looks=8, **TINY)(x, weights)
    with pytest.raises(ValueError, match="looks 3"):
        mixmim_tiny(img_size=64, looks=3, **TINY)


@pytest.mark.parametrize("weight_level", ["token", "pixel"])
def test_constant_weights_scale_the_loss(weight_level):
    model = build(mixmim_tiny, img_size=64, weight_level=weight_level, **TINY)
    x, weights = inputs(2, 64)
    mask = random_mask(4, 2)
    plain, one, three = (model(x, w, mask=mask)[0] for w in (None, torch.ones_like(x), torch.full_like(x, 3)))
    torch.testing.assert_close(one, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(three, 3 * plain, rtol=1e-12, atol=0)


def test_token_and_pixel_weights_differ_only_within_tokens():
    token, pixel = (build(mixmim_tiny, img_size=64, weight_level=level, **TINY) for level in ("token", "pixel"))
    x, varying = inputs(2, 64)
    mask = random_mask(4, 2)
    constant_in_cell = varying[:, :, ::32, ::32].repeat_interleave(32, dim=2).repeat_interleave(32, dim=3)
    losses = [model(x, w, mask=mask)[0] for w in (constant_in_cell, varying) for model in (token, pixel)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    assert abs(losses[2] - losses[3]) > 1e-4 * losses[2]


def test_bf16_autocast_stays_close_and_returns_a_float32_loss():
    model = build(mixmim_tiny, dtype=torch.float32, img_size=128, norm_pix_loss=True, **TINY)
    x, weights = inputs(2, 128, torch.float32)
    mask = random_mask(16, 8)
    full = model(x, weights, mask=mask)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, weights, mask=mask)[0]
    assert full.dtype == half.dtype == torch.float32
    assert half != full  # autocast did something
    torch.testing.assert_close(half, full, rtol=0.03, atol=0)
    half.backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())


# ---- Refusals ------------------------------------------------------------------------------------


def test_odd_batches_are_refused_unless_nothing_is_mixed():
    model = mixmim_tiny(img_size=64, **TINY)
    x, weights = inputs(3, 64, torch.float32)
    with pytest.raises(ValueError, match=r"odd|even|itself"):
        model(x, weights, mask_ratio=0.5)
    with pytest.raises(ValueError, match=r"odd|even|itself"):
        model(x, weights, mask=as_mask([0, 0, 1, 0]))
    assert torch.isfinite(model(x, weights, mask_ratio=0)[0])
    assert torch.isfinite(model(x, weights, mask_ratio=0.2)[0])  # int(4 * 0.2) = 0 cells


@pytest.mark.parametrize("img_size", [100, 96, 224])
def test_sizes_that_do_not_divide_are_refused(img_size):
    with pytest.raises(ValueError, match=str(img_size)):
        mixmim_tiny(img_size=img_size, **TINY)


def test_unknown_weight_level_is_refused():
    with pytest.raises(ValueError, match="voxel"):
        mixmim_tiny(weight_level="voxel", **TINY)


# ---- Start values --------------------------------------------------------------------------------


def test_drop_path_rises_linearly_over_the_encoder():
    depths = (2, 1, 3, 2)
    model = mixmim_tiny(**dict(TINY, depths=depths), drop_path_rate=0.35)
    blocks = [block for stage in model.layers for block in stage.blocks]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.35 * i / 7 for i in range(8)])
    assert not any(getattr(module, "drop_prob", 0) for module in model.decoder_blocks.modules())


def test_initialisation():
    torch.manual_seed(0)
    model = mixmim_base(depths=(1, 1, 2, 1), decoder_depth=1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            weight = module.weight.detach()
            assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6), name
            assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
            assert module.eps == 1e-5, name
    tables = torch.cat([t.flatten() for name, t in model.state_dict().items() if name.endswith("bias_table")])
    for small in (tables, model.mask_token.detach()):
        assert small.std() == pytest.approx(0.02, rel=0.15)  # a cut at two standard deviations gives 0.0176
        assert abs(small.mean()) < 0.003
    framework = 1 / math.sqrt(2 * 4 * 4)  # nn.Conv2d's own start: uniform within 1/sqrt(fan in)
    conv = model.patch_embed.proj
    for tensor in (conv.weight.detach(), conv.bias.detach()):
        assert 0.9 * framework < tensor.abs().max() <= framework * (1 + 1e-6)
        assert tensor.std() == pytest.approx(framework / math.sqrt(3), rel=0.15)
