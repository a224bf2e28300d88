# SPDX-License-Identifier: MIT
"""Feature maps of the encoder at any size, against the plain second implementation, and the segmentation head."""

import copy

import pytest
import torch

import models_mixmim_ft
import models_mixmim_seg
from common.errors import UsageError
from models_mixmim import MixMIMEncoder, mixmim_tiny
from pretrained import load_encoder
from tests.helpers import oracle_mixmim as oracle
from tests.helpers.released import layout
from tests.models.test_models_ft import WIDTHS, randomised
from util.pos_embed import fit_position_weights

TINY = dict(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


def encoder(img_size):
    torch.manual_seed(0)
    return randomised(mixmim_tiny(img_size=img_size)).double().eval()


@pytest.mark.parametrize(
    "img_size, size",
    [(64, (64, 64)), (64, (96, 64)), (64, (32, 160)), (128, (96, 32)), (32, (64, 32)), (128, (128, 128))],
)
def test_agrees_with_the_oracle_at_every_size(img_size, size):
    model = encoder(img_size)
    images = torch.randn(2, 2, *size, dtype=torch.float64)
    config = oracle.OracleConfig(img_size=img_size, **TINY)
    maps = model.forward_intermediates(images)
    expected = oracle.feature_maps(dict(model.named_parameters()), config, images)
    assert model.out_channels == [32, 64, 128, 256] and model.strides == [4, 8, 16, 32]
    for found, wanted, channels, stride in zip(maps, expected, model.out_channels, model.strides):
        assert found.shape == (2, channels, size[0] // stride, size[1] // stride)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # timm resamples embeddings in float32
    weight = model.layers[0].blocks[0].attn.relative_position_bias_table
    loss, other = (sum(image.square().mean() for image in found) for found in (maps, expected))
    torch.testing.assert_close(*(torch.autograd.grad(x, weight)[0] for x in (loss, other)), rtol=1e-4, atol=1e-8)


def test_the_last_map_is_what_encode_gives():
    model = encoder(64).float()
    images = torch.randn(2, 2, 64, 64)
    assert torch.equal(model.forward_intermediates(images)[-1].flatten(2).transpose(1, 2), model.encode(images))


def test_a_larger_image_is_seen_as_by_a_model_of_that_size():
    model, larger = encoder(128), mixmim_tiny(img_size=256).double().eval()
    weights, resampled = fit_position_weights(copy.deepcopy(model.state_dict()), larger.state_dict())
    assert "absolute_pos_embed" in resampled
    larger.load_state_dict(weights)
    images = torch.randn(1, 2, 256, 256, dtype=torch.float64)
    for one, other in zip(model.forward_intermediates(images), larger.forward_intermediates(images)):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("place", [(0, 0), (40, 72), (92, 156), (0, 156), (92, 0)])
def test_a_change_moves_the_map_where_it_is(place):
    model = encoder(64)
    images = torch.randn(1, 2, 96, 160, dtype=torch.float64)
    changed = images.clone()
    changed[:, :, place[0] : place[0] + 4, place[1] : place[1] + 4] += 5
    before, after = (model.forward_intermediates(x)[0][0] for x in (images, changed))
    moved = (after - before).detach().abs().sum(0)  # (24, 40)
    row, column = place[0] // 4, place[1] // 4
    assert divmod(int(moved.argmax()), 40) == (row, column)
    window = torch.zeros(24, 40, dtype=torch.bool)
    window[row // 8 * 8 : row // 8 * 8 + 8, column // 8 * 8 : column // 8 * 8 + 8] = True
    assert bool((moved[window] > 0).all()) and float(moved[~window].max()) == 0


@pytest.mark.parametrize("shape", [(1, 2, 60, 64), (1, 3, 64, 64), (1, 2, 0, 64), (0, 2, 64, 64)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 32"):
        encoder(64).forward_intermediates(torch.zeros(shape))


# ---- Segmentation --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", WIDTHS)
def test_the_encoder_of_a_segmenter_has_the_released_layout(size):
    with torch.device("meta"):
        model = getattr(models_mixmim_seg, size)(num_classes=3)
    ours = {n: (tuple(t.shape), t.dtype) for n, t in model.state_dict().items() if not n.startswith("head.")}
    assert ours == layout(WIDTHS[size][0], (2, 2, 18, 2), WIDTHS[size][1], (8, 8, 8, 4))


def test_a_segmenter_gives_every_pixel_its_logits():
    torch.manual_seed(0)
    model = models_mixmim_seg.mixmim_tiny(img_size=64, num_classes=3)
    images = torch.randn(2, 2, 96, 64)
    logits = model(images)
    assert logits.shape == (2, 3, 96, 64)
    assert torch.allclose(logits[:1], model(images[:1]), atol=1e-5)
    logits.square().mean().backward()
    unused = {name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().any()}
    assert unused == set()
    classifier = models_mixmim_ft.mixmim_tiny(img_size=64)
    classifier.load_state_dict(model.state_dict() | classifier.state_dict() | dict(encoder_of(model)), strict=False)
    square = torch.randn(2, 2, 64, 64)
    torch.testing.assert_close(model.forward_features(square), classifier.forward_features(square))


def encoder_of(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}


def test_an_encoder_is_loaded_alone(tmp_path):
    torch.manual_seed(0)
    model = mixmim_tiny(img_size=64)
    stated = {"channels": ["VH", "VV"], "units": "dB", "input_size": 64, "mean": [-18.0, -11.0], "std": [4.0, 4.5]}
    args = {"dataset": "benv2", "model": "mixmim_tiny"}
    torch.save({"model": model.state_dict(), "epoch": 0, "args": args, "input": stated}, tmp_path / "a.pth")
    encoder, prepare = load_encoder(tmp_path / "a.pth")
    assert type(encoder) is MixMIMEncoder and not encoder.training
    sar_db = torch.randn(1, 2, 64, 96) * 4 - 15
    x, _ = prepare(sar_db)
    torch.testing.assert_close(x[0, 1], (sar_db[0, 1] + 11) / 4.5)
    for one, other in zip(encoder.forward_intermediates(x), model.eval().forward_intermediates(x), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UsageError, match="does not say what it was trained on"):
        torch.save({"model": model.state_dict()}, tmp_path / "b.pth")
        load_encoder(tmp_path / "b.pth")
