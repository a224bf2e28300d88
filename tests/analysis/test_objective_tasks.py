# SPDX-License-Identifier: MIT
"""Tasks of frozen encoders: features, the choice of penalties, and what is measured, on data with known answers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main_pretrain
from analysis import objective_images, objective_places, objective_tasks
from analysis.objective_encoders import of_all, token_features, trained, untrained, whole_features, window_features
from analysis.objective_images import Floods, LandCover
from analysis.objective_places import Tiles, Water, pixel_logits, token_labels
from analysis.objective_probes import (
    PENALTIES,
    PenaltyPath,
    Samples,
    area,
    chosen_penalty,
    group_folds,
    likelihood,
    predicted,
)
from sarwmix.listing import IGNORED
from sarwmix.masks import Masks
from tests.helpers.dataset_fixtures import fails_with
from tests.helpers.encoders import SIDE, masked_images, tiny_checkpoint, tiny_flags
from tests.helpers.runs import argv, refusal


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("encoder") / "checkpoint_1.pth")


@pytest.fixture(scope="module")
def frozen(checkpoint):
    return trained(checkpoint, "benv2")


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 2 * SIDE, SIDE, generator=generator) * 4 - 14


# ---- Encoders ------------------------------------------------------------------------------------


def test_an_untrained_encoder_is_what_pretraining_starts_with(checkpoint, frozen):
    first = main_pretrain.build_training(tiny_flags(seed=3), torch.device("cpu")).model.state_dict()
    again = untrained(checkpoint, 3)
    assert all(torch.equal(first[name], value) for name, value in again.encoder.state_dict().items())
    assert torch.equal(again.prepare.mean, frozen.prepare.mean) and again.encoder.img_size == SIDE
    assert len({frozen.identity, again.identity, untrained(checkpoint, 4).identity}) == 3
    # The same weights, by another way, give the same features.
    same = untrained(checkpoint, 0)
    x = torch.full((2, 2, SIDE, SIDE), -12.0)
    assert torch.allclose(whole_features(same, x), whole_features(frozen, x))


def test_features_of_windows_and_tokens_lie_where_the_pixels_do(frozen, images):
    windows = window_features(frozen, images)
    assert windows.shape == (3, 2, 256)
    assert torch.allclose(windows[:, 1], whole_features(frozen, images[:, :, SIDE:]), atol=1e-5)
    tokens = token_features(frozen, images[0])
    assert tokens.shape == (2 * SIDE // 4, SIDE // 4, 480)
    lower = token_features(frozen, images[0][:, SIDE:])
    assert np.allclose(tokens[SIDE // 4 :], lower, atol=1e-4)
    # The map of the last stage is one value for all tokens of a window of 32 pixels: the mean over tokens is itself.
    assert np.allclose(lower[3, 5, -256:], windows[0, 1].numpy(), atol=1e-4)
    # Without data, an image is the mean; it is padded with it, too.
    hole = torch.full((2, SIDE - 4, SIDE), torch.nan)
    mean = frozen.prepare.mean.expand(2, SIDE, SIDE)
    assert np.allclose(token_features(frozen, hole), token_features(frozen, mean), atol=1e-5)


def test_images_of_several_pairs_are_read_once():
    read = []

    def image(i, which):
        read.append((i, which))
        return torch.full((1,), float([[5, 6], [6, 7]][i][which]))

    data = SimpleNamespace(image_names=np.array([["a", "b"], ["b", "c"]]), images_per_sample=2, image=image)
    found = of_all(Pairs(data), lambda images: images)
    assert found[..., 0].tolist() == [[5, 6], [6, 7]] and sorted(read) == [(0, 0), (0, 1), (1, 1)]


class Pairs:
    def __init__(self, data):
        vars(self).update(vars(data))

    def __len__(self):
        return len(self.image_names)


# ---- Probes --------------------------------------------------------------------------------------


def made_up(seed, count=120, signal=3.0, labels=1):
    """Samples in 6 groups whose first features are the labels, plus noise if the signal is weak."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 2, (count, labels)).astype(np.uint8)
    features = generator.normal(size=(count, 8)).astype(np.float32)
    features[:, :labels] = features[:, :labels] * 0.1 + signal * truth
    return Samples(features, truth, np.arange(count) % 6)


@pytest.mark.parametrize("signal, low, high", [(3, 1, 1), (0, 0.35, 0.65)])
def test_what_is_separable_is_told_and_chance_is_not(signal, low, high):
    train, test = made_up(0, signal=signal), made_up(1, signal=signal)
    penalty, probabilities = predicted(train, test.features, group_folds(train.groups, "x"), likelihood)
    assert low <= area(probabilities[:, 0], test.labels[:, 0]) <= high
    assert penalty <= 0.01 if signal == 0 else penalty == 10


def test_the_penalty_is_the_first_of_the_best_on_what_is_held_out():
    samples = made_up(0, labels=2)
    folds = group_folds(samples.groups, "x")
    held = np.concatenate([rows for _, rows in folds])
    assert len(folds) == 5 and sorted(held) == list(range(120))
    assert all(not set(samples.groups[fit]) & set(samples.groups[rows]) for fit, rows in folds)
    assert chosen_penalty(samples, folds, lambda *_: 1) == PENALTIES[0]
    scores = iter([1, 3, 2, 3, 0])
    assert chosen_penalty(samples, folds, lambda found, labels: next(scores)) == PENALTIES[1]
    fails_with(lambda: group_folds(np.zeros(5), "here"), "here", "one group")


def test_a_path_is_scikit_learns_regression_and_knows_constant_labels():
    samples = made_up(0, signal=0.5)
    path = PenaltyPath(samples.features, samples.labels[:, 0] == 1)
    linear_model = pytest.importorskip("sklearn.linear_model")
    x = (samples.features - samples.features.mean(0)) / samples.features.std(0)
    for k, penalty in enumerate(PENALTIES):
        expected = linear_model.LogisticRegression(C=penalty).fit(x, samples.labels[:, 0]).decision_function(x)
        assert np.allclose(path.logits(k, samples.features), expected, atol=0.05)
    for value in (0.0, 1.0):
        path = PenaltyPath(samples.features, np.full(120, value == 1))
        assert (path.probabilities(4, samples.features) == value).all()


def test_area_counts_ties_half():
    assert area([1, 2, 3, 4], [0, 0, 1, 1]) == 1 and area([1, 1], [0, 1]) == 0.5 and np.isnan(area([1, 2], [1, 1]))


# ---- Images and pairs ----------------------------------------------------------------------------


class Labelled:
    """A dataset whose samples are features already."""

    root, images_per_sample = "made up", 1

    def __init__(self, samples, seen=True):
        self.samples, self.groups, self.seen = samples, samples.groups, seen

    def label_table(self):
        assert self.seen, "labels are looked at"
        return self.samples.labels

    def describe(self):
        return {"root": self.root, "samples": len(self.groups)}


def one_hot(samples):
    return samples._replace(labels=np.concatenate([1 - samples.labels, samples.labels], axis=1))


@pytest.mark.parametrize("task, labels, name", [(LandCover, 2, "AP macro"), (Floods, 1, "AUC")])
def test_labels_of_the_test_are_looked_at_after_all_is_chosen(task, labels, name, monkeypatch):
    train, test = (made_up(seed, labels=labels) for seed in (0, 1))
    if task is Floods:
        train, test = one_hot(train), one_hot(test)
    result = task(Labelled(train), Labelled(test)).tested(train.features, test.features)
    assert result["metrics"][name] == 1 and set(result["metrics"]) == set(task.METRICS)
    calls = []
    monkeypatch.setattr(objective_images, "predicted", lambda *args: calls.append(predicted(*args)) or calls[-1])
    with pytest.raises(AssertionError, match="looked at"):
        task(Labelled(train), Labelled(test, seen=False)).tested(train.features, test.features)
    assert calls[0][0] == result["penalty"] and calls[0][1].shape == (120, labels)


# ---- Places --------------------------------------------------------------------------------------

WET = {"a": (0, 32, 16, 0), "b": (32, 0, 16, 8), "c": (0, 0, 32, 8)}


@pytest.fixture
def places(tmp_path):
    return masked_images(tmp_path / "places", WET)


def test_labels_of_tokens_and_logits_of_pixels():
    mask = torch.full((8, 8), IGNORED, dtype=torch.uint8)
    mask[:4, :4] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    mask[4:, :4] = 0
    known, label = token_labels(mask, 1, (3, 2))
    assert known.tolist() == [[True, False], [True, False], [False, False]]
    assert label.tolist() == [[True, False], [False, False], [False, False]]
    assert pixel_logits([[1.0, -1.0]], (3, 8))[0].tolist() == [1, 1, 0.75, 0.25, -0.25, -0.75, -1, -1]


def block_means(frozen, image):
    return image.view(2, SIDE // 4, 4, SIDE // 4, 4).mean((2, 4)).permute(1, 2, 0).numpy()


def test_water_is_found_and_chosen_without_the_tested_masks(places, monkeypatch):
    monkeypatch.setattr(objective_places, "token_features", block_means)
    data = Masks(places, "all", supervised=True)
    task = Water(data, 1)
    result = task.evaluate(None)
    assert result["metrics"]["IoU"] > 0.97 and set(result["groups"]) == set("abc")
    assert result["groups"]["a"]["has"] == 48 * SIDE and result["groups"]["a"]["pixels"] == 4 * SIDE**2
    # Were all masks of a country dry, what is chosen and fitted for it would be the same.
    (fold,) = [fold for fold in task.folds if fold.name == "a"]
    drawn = [task.draw(lambda image: block_means(None, image), i) for i in range(12)]
    before = task.fitted(fold, drawn)
    drawn = [(x, y if data.groups[i] != "a" else ~y) for i, (x, y) in enumerate(drawn)]
    after = task.fitted(fold, drawn)
    assert after[0] == before[0] and (after[1].models[0][0] == before[1].models[0][0]).all()
    assert {"Otsu, VV", "logistic regression of pixels"} <= set(task.baselines())


def test_tiles_are_told_and_chosen_without_the_tested_labels(places, monkeypatch):
    def levels(frozen, images):
        return images.mean((2, 3))[:, None]

    monkeypatch.setattr(objective_places, "window_features", levels)
    task = Tiles(Masks(places, "all", supervised=True), 1, 0.25)
    result = task.evaluate(None)
    assert result["metrics"] == {"AUC": 1, "AUC, a": 1, "AUC, b": 1, "AUC, c": 1}
    assert result["groups"]["b"]["labels"] == [1, 0, 1, 1]
    rows = task.folds[0].test
    task.truth[rows] = 1 - task.truth[rows]
    again = task.evaluate(None)
    assert again["metrics"]["AUC, a"] == 0 and again["groups"]["a"]["scores"] == result["groups"]["a"]["scores"]
    assert again["penalty"]["a"] == result["penalty"]["a"]
    assert task.baselines()["threshold, VV"]["metrics"]["AUC, b"] == 1
    rare = masked_images(places.parent / "rare", {"a": (32, 0, 0), "b": (8, 8, 0), "c": (8, 0, 0)})
    fails_with(lambda: Tiles(Masks(rare, "all", supervised=True), 1, 1.0), "without a", "--tile_share")


# ---- Program -------------------------------------------------------------------------------------


def test_results_are_kept_for_a_checkpoint_and_its_data(places, checkpoint, tmp_path, capsys, monkeypatch):
    flags = argv("--output", tmp_path / "out", "--water", places, "--water_dataset masks")
    objective_tasks.main([*flags, "--baselines"])
    one = [*flags, *argv("--arm mine --seed 3 --checkpoint", checkpoint)]
    objective_tasks.main(one)
    objective_tasks.main([*flags, *argv("--arm random --seed 3 --checkpoint", checkpoint)])
    folder = tmp_path / "out" / "results" / "water"
    assert {path.name for path in folder.iterdir()} == {"baselines.json", "mine_seed3.json", "random_seed3.json"}
    content = json.loads((folder / "mine_seed3.json").read_text())
    assert (content["arm"], content["seed"]) == ("mine", 3) and 0 <= content["metrics"]["IoU"] <= 1
    monkeypatch.setattr(objective_tasks, "encoder_of", None)
    objective_tasks.main(one)
    other = tiny_checkpoint(tmp_path / "other.pth", seed=9)
    with pytest.raises(TypeError):
        objective_tasks.main([*flags, *argv("--arm mine --seed 3 --checkpoint", other)])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--arm a --checkpoint none.pth --water x", ("none.pth", "no such checkpoint")),
        ("--arm a --water x", ("--arm and --checkpoint",)),
        ("--baselines", ("no task has data",)),
        ("--baselines --water none", ("none",)),
        ("--baselines --water {places} --water_dataset masks --positive ice", ("--positive ice", "land, water")),
    ],
)
def test_wrong_flags_are_one_line(flags, words, places, tmp_path, capsys):
    line = refusal(objective_tasks.main, argv("--output", tmp_path, flags.format(places=places)), capsys)
    assert all(word in line for word in words), line
