# SPDX-License-Identifier: MIT
"""The classifiers: their layout, their one encoder, and how flood images are cut and compared."""

import pytest
import torch

import models_mixmim_ft
import models_sen12_ft
from models_mixmim import mixmim_tiny
from tests.helpers import oracle_mixmim as oracle
from tests.helpers.released import layout

WIDTHS = {
    "mixmim_base": (128, (4, 8, 16, 32)),
    "mixmim_large": (192, (6, 12, 24, 48)),
    "mixmim_huge": (352, (11, 22, 44, 88)),
}


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "models, classes, size, total, trainable",
    [
        (models_mixmim_ft, 19, "mixmim_base", 86_901_515, 86_770_443),
        (models_mixmim_ft, 19, "mixmim_large", 195_232_903, 195_036_295),
        (models_mixmim_ft, 19, "mixmim_huge", 655_296_573, 654_936_125),
        (models_sen12_ft, 2, "mixmim_base", 86_884_090, 86_753_018),
    ],
)
def test_released_layout_and_parameter_totals(models, classes, size, total, trainable):
    with torch.device("meta"):
        model = getattr(models, size)()
    dim, heads = WIDTHS[size]
    ours = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    assert ours == layout(dim, (2, 2, 18, 2), heads, (8, 8, 8, 4), classes=classes)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_features_are_the_mean_over_the_tokens_of_the_same_encoder():
    torch.manual_seed(0)
    pretrained = randomised(mixmim_tiny(img_size=64)).double().eval()
    classifier = models_mixmim_ft.mixmim_tiny(img_size=64).double().eval()
    classifier.load_state_dict(pretrained.state_dict(), strict=False)
    x = torch.randn(3, 2, 64, 64, dtype=torch.float64)
    config = oracle.OracleConfig(img_size=64, embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
    expected = oracle.encode(dict(pretrained.named_parameters()), config, x, torch.zeros(1, 4, 1))
    features = classifier.forward_features(x)
    assert features.shape == (3, 256)
    torch.testing.assert_close(features, expected.mean(1), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        classifier.head.weight.copy_(torch.eye(19, 256))
        classifier.head.bias.copy_(torch.arange(19.0))
    torch.testing.assert_close(classifier(x), features[:, :19] + torch.arange(19.0))


@pytest.mark.parametrize(
    "model, inputs",
    [(models_mixmim_ft.mixmim_tiny(img_size=64, num_classes=3), 1), (models_sen12_ft.mixmim_tiny(img_size=64), 2)],
)
def test_every_trainable_parameter_learns(model, inputs):
    torch.manual_seed(0)
    randomised(model)(*torch.randn(inputs, 2, 2, 64, 64)).square().sum().backward()
    still = {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not (p.grad is not None and p.grad.abs().max() > 0)
    }
    assert still <= ({"norm.bias"} if inputs == 2 else set())  # it cancels in the difference, but for rounding
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["absolute_pos_embed"]


def test_drop_path_acts_in_training_only():
    torch.manual_seed(0)
    model, x = models_mixmim_ft.mixmim_tiny(img_size=32, drop_path_rate=0.9), torch.randn(4, 2, 32, 32)
    assert torch.equal(model.eval()(x), model(x)) and not torch.equal(model.train()(x), model(x))


# ---- Floods --------------------------------------------------------------------------------------


def numbered(height, width, size):
    """(1, 2, H, W) whose values are 100·channel + the raster number of the size×size patch."""
    patch = torch.arange(height // size)[:, None] * (width // size) + torch.arange(width // size)
    image = patch.repeat_interleave(size, 0).repeat_interleave(size, 1).float()
    return torch.stack([image, 100 + image])[None]


def test_patches_keep_vh_and_vv_together():
    model = models_sen12_ft.mixmim_tiny()
    images = torch.cat([numbered(512, 512, 128), 1000 + numbered(512, 512, 128)])
    patches = model.cut(images)
    assert patches.shape == (32, 2, 128, 128)
    for i, patch in enumerate(patches):
        image, place = divmod(i, 16)
        assert (patch[0] == 1000 * image + place).all() and (patch[1] == 1000 * image + 100 + place).all()


def test_the_released_cut_pairs_vh_with_vh_and_vv_with_vv():
    patches = models_sen12_ft.mixmim_tiny(patch_cut="released").cut(numbered(512, 512, 128))
    assert patches.shape == (16, 2, 128, 128)
    values = [tuple(channel.unique().item() for channel in patch) for patch in patches]
    assert values == [(2 * k, 2 * k + 1) for k in range(8)] + [(100 + 2 * k, 101 + 2 * k) for k in range(8)]


def test_a_pair_is_told_by_the_differences_of_its_patches():
    torch.manual_seed(0)
    model = randomised(models_sen12_ft.mixmim_tiny(img_size=32)).eval()
    one, other = torch.randn(2, 3, 2, 64, 96)
    single = models_mixmim_ft.mixmim_tiny(img_size=32, num_classes=2).eval()
    single.load_state_dict(model.state_dict())
    with torch.no_grad():
        change = torch.stack(
            [
                (
                    single.forward_features(one[:, :, r : r + 32, c : c + 32])
                    - single.forward_features(other[:, :, r : r + 32, c : c + 32])
                ).abs()
                for r in (0, 32)
                for c in (0, 32, 64)
            ]
        )
        torch.testing.assert_close(model(one, other), single.head(change.mean(0)))
        torch.testing.assert_close(model(one, other, patch_op="max"), single.head(change.amax(0)))
        torch.testing.assert_close(model(one, other), model(other, one))
        torch.testing.assert_close(model(one, one), model.head.bias.expand(3, 2))
        model.patch_op = "max"
        torch.testing.assert_close(model(one, other), single.head(change.amax(0)))


def test_wrong_shapes_and_choices_are_refused():
    flood, image = models_sen12_ft.mixmim_tiny(), torch.zeros(1, 2, 128, 128)
    for images in (torch.zeros(1, 2, 200, 256), torch.zeros(1, 3, 256, 256), torch.zeros(1, 2, 256, 64)):
        with pytest.raises(ValueError, match="multiples of 128"):
            flood(images, images)
    with pytest.raises(ValueError, match="equal"):
        flood(image, torch.zeros(1, 2, 256, 256))
    with pytest.raises(ValueError, match="avg or max"):
        flood(image, image, patch_op="median")
    with pytest.raises(ValueError, match="vhvv or released"):
        models_sen12_ft.mixmim_tiny(patch_cut="other")
    with pytest.raises(ValueError, match="2, 128, 128"):
        models_mixmim_ft.mixmim_tiny()(torch.zeros(1, 2, 64, 64))
