# SPDX-License-Identifier: MIT
"""Figures of merit, by hand and against scikit-learn."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
)

from util.metrics import flood_metrics, multiclass_metrics, multilabel_metrics, segmentation_metrics

# Three classes, the last of which does not occur and is predicted once.
PROBABILITIES = torch.tensor([[0.9, 0.2, 0.7], [0.8, 0.6, 0.1], [0.3, 0.4, 0.2], [0.1, 0.1, 0.3]])
LABELS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])


def test_values_by_hand_with_a_class_that_does_not_occur():
    metrics = multilabel_metrics(PROBABILITIES, LABELS)
    assert metrics["per_class"] == {
        "ap": [pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3), 1.0, None],
        "f1": [0.5, pytest.approx(2 / 3), None],
        "precision": [0.5, 1.0, None],
        "recall": [0.5, 0.5, None],
        "support": [2, 2, 0],
    }
    assert metrics["undefined"] == [2]
    # Micro: the positives come 1st, 4th, 5th and, tied with a negative of the absent class, 6th to 7th.
    assert metrics["ap_micro"] == pytest.approx((1 + 2 / 4 + 3 / 5 + 4 / 7) / 4)
    assert (metrics["f1_micro"], metrics["precision_micro"]) == (0.5, 0.5)
    macro = {name: metrics[f"{name}_macro"] for name in ("ap", "f1", "precision")}
    assert macro == pytest.approx({"ap": 11 / 12, "f1": 7 / 12, "precision": 3 / 4})
    counted_as_zero = {"ap": 11 / 18, "f1": 7 / 18, "precision": 1 / 2}
    assert all(abs(macro[name] - counted_as_zero[name]) > 0.15 for name in macro)


def test_an_absent_class_changes_no_macro_mean():
    with_it, without = (
        multilabel_metrics(PROBABILITIES, LABELS),
        multilabel_metrics(PROBABILITIES[:, :2], LABELS[:, :2]),
    )
    assert all(with_it[f"{name}_macro"] == without[f"{name}_macro"] for name in ("ap", "f1", "precision"))
    assert without["undefined"] == []


def test_a_class_that_occurs_and_is_never_predicted_counts_as_zero():
    metrics = multilabel_metrics(torch.tensor([[0.9, 0.4], [0.1, 0.3]]), torch.tensor([[1, 1], [0, 0]]))
    assert metrics["per_class"]["precision"] == metrics["per_class"]["f1"] == [1.0, 0.0]
    assert (metrics["precision_macro"], metrics["f1_macro"], metrics["ap_macro"]) == (0.5, 0.5, 1.0)
    assert metrics["precision_micro"] == 1.0


def test_a_probability_of_one_half_predicts_nothing():
    metrics = multilabel_metrics(torch.tensor([[0.5, 0.50001]]), torch.tensor([[1, 1]]))
    assert metrics["per_class"]["recall"] == [0.0, 1.0]


def random_set(kind):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 6, generator=generator) * (60 if kind == "saturated" else 2)
    labels = (torch.randn(2000, 6, generator=generator) * 4 + logits.clamp(-3, 3) > torch.arange(6)).long()
    probabilities = logits.sigmoid()
    return (probabilities * 20).round() / 20 if kind == "tied" else probabilities, labels


@pytest.mark.parametrize("kind", ["distinct", "tied", "saturated"])
def test_values_are_those_of_scikit_learn(kind):
    probabilities, labels = random_set(kind)
    assert (len(probabilities.unique()) < 0.8 * probabilities.numel()) == (kind != "distinct")
    metrics = multilabel_metrics(probabilities, labels)
    p, y = probabilities.numpy(), labels.numpy()
    assert metrics["per_class"]["ap"] == pytest.approx(average_precision_score(y, p, average=None), abs=1e-6)
    precision, recall, f1, support = precision_recall_fscore_support(y, p > 0.5)
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1), ("support", support)):
        assert metrics["per_class"][name] == pytest.approx(expected, abs=1e-6)
    for average in ("macro", "micro"):
        precision, _, f1, _ = precision_recall_fscore_support(y, p > 0.5, average=average)
        expected = {"ap": average_precision_score(y, p, average=average), "f1": f1, "precision": precision}
        assert {name: metrics[f"{name}_{average}"] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_the_order_of_the_samples_does_not_matter():
    probabilities, labels = random_set("tied")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    assert multilabel_metrics(probabilities[order], labels[order]) == multilabel_metrics(probabilities, labels)


@pytest.mark.parametrize(
    "probabilities, labels, message",
    [
        (torch.full((3, 2), 0.5), torch.zeros(3, 2), "none of the 3 samples has a positive label"),
        (torch.tensor([[0.5, 1.5]]), torch.ones(1, 2), "from 0 to 1"),
        (torch.tensor([[0.5, float("nan")]]), torch.ones(1, 2), "not NaN"),
        (torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2), "floats"),
        (torch.full((1, 2), 0.5), torch.tensor([[0, 2]]), "labels must be 0 or 1"),
        (torch.full((1, 2), 0.5), torch.ones(2, 2), "must be"),
        (torch.full((2, 1), 0.5), torch.ones(2, 1), "two classes or more"),
        (torch.zeros(0, 2), torch.zeros(0, 2), "empty"),
    ],
)
def test_multilabel_input_that_cannot_be_evaluated(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        multilabel_metrics(probabilities, labels)


def flood(predicted, labels):
    """flood_metrics of certain predictions."""
    return flood_metrics(torch.eye(2)[torch.tensor(predicted)], torch.tensor(labels))


def test_flood_values_by_hand():
    metrics = flood([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0])
    assert metrics == {
        "accuracy": 0.75,
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "confusion": {"tn": 4, "fp": 1, "fn": 1, "tp": 2},
    }


def test_flood_is_the_second_class_and_precision_is_not_recall():
    metrics = flood([1, 1, 1, 1], [1, 0, 0, 0])
    assert metrics == {
        "accuracy": 0.25,
        "precision": 0.25,
        "recall": 1.0,
        "f1": pytest.approx(0.4),
        "confusion": {"tn": 0, "fp": 3, "fn": 0, "tp": 1},
    }


def test_flood_figures_that_are_undefined():
    assert flood([0, 1], [0, 0]) == {
        "accuracy": 0.5,
        "precision": 0.0,
        "recall": None,
        "f1": None,
        "confusion": {"tn": 1, "fp": 1, "fn": 0, "tp": 0},
    }
    assert flood([0, 0], [0, 1]) == {
        "accuracy": 0.5,
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "confusion": {"tn": 1, "fp": 0, "fn": 1, "tp": 0},
    }


def test_equal_flood_probabilities_predict_no_flood():
    assert flood_metrics(torch.full((1, 2), 0.5), torch.tensor([1]))["confusion"]["fn"] == 1


@pytest.mark.parametrize(
    "probabilities, labels, message",
    [
        (torch.rand(3, 3), torch.ones(3), r"\(samples, 2\)"),
        (torch.rand(3, 2), torch.ones(3, 1), r"\(samples, 2\)"),
        (torch.randn(3, 2) - 9, torch.ones(3), "from 0 to 1"),
        (torch.rand(3, 2), torch.full((3,), 2), "labels"),
        (torch.zeros(0, 2), torch.zeros(0), "empty"),
    ],
)
def test_flood_input_that_cannot_be_evaluated(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        flood_metrics(probabilities, labels)


def test_all_values_are_plain_and_the_types_of_the_input_do_not_matter():
    metrics = multilabel_metrics(PROBABILITIES, LABELS)
    assert json.loads(json.dumps(metrics)) == metrics
    assert multilabel_metrics(PROBABILITIES.double(), LABELS.bool()) == metrics
    assert multilabel_metrics(PROBABILITIES.half(), LABELS.float()) == metrics
    undefined = flood([0, 1], [0, 0])
    assert json.loads(json.dumps(undefined)) == undefined


def test_one_class_of_each_sample_equals_scikit_learn():
    rng = np.random.default_rng(4)
    probabilities = torch.from_numpy(rng.dirichlet(np.ones(5), 80))
    labels = torch.from_numpy(rng.integers(0, 4, 80))  # the last class does not occur
    found, predicted = multiclass_metrics(probabilities, labels), probabilities.argmax(1)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    expected = precision_recall_fscore_support(labels, predicted, labels=range(5), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected):
        assert found["per_class"][name][:4] == pytest.approx(values[:4].tolist(), abs=1e-6), name
    assert found["per_class"]["f1"][4] is None and found["undefined"] == [4] and found["per_class"]["support"][4] == 0
    assert found["f1_macro"] == pytest.approx(expected[2][:4].mean(), abs=1e-6)
    json.dumps(found)


@pytest.mark.parametrize("labels", [torch.tensor([0, 3]), torch.tensor([0, -1]), torch.tensor([])])
def test_what_one_class_of_each_sample_refuses(labels):
    with pytest.raises(ValueError):
        multiclass_metrics(torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])[: len(labels) or 2], labels[:2])


def test_segmentation_equals_scikit_learn_and_leaves_absent_classes_out():
    generator = np.random.default_rng(0)
    labels, found = generator.choice([0, 1, 3], 500), generator.integers(0, 4, 500)
    found[:200] = labels[:200]
    result = segmentation_metrics(torch.from_numpy(confusion_matrix(labels, found, labels=range(4))))
    present, expected = [0, 1, 3], {"average": None, "labels": [0, 1, 3], "zero_division": 0}
    for name, function in (("iou", jaccard_score), ("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):  # fmt: skip
        values = function(labels, found, **expected)
        assert result["per_class"][name][2] is None
        assert [result["per_class"][name][k] for k in present] == pytest.approx(values.tolist())
        assert result[f"{name}_macro"] == pytest.approx(values.mean())
    assert result["accuracy"] == pytest.approx((labels == found).mean()) and result["undefined"] == [2]
    assert sum(result["per_class"]["support"]) == 500 and json.dumps(result)


def test_segmentation_by_hand():
    result = segmentation_metrics([[3, 1], [2, 4]])
    assert result["per_class"]["iou"] == [3 / 6, 4 / 7] and result["iou_macro"] == (3 / 6 + 4 / 7) / 2
    assert segmentation_metrics([[0, 0], [5, 0]])["per_class"]["precision"] == [None, 0.0]


@pytest.mark.parametrize("confusion", ([[0, 0], [0, 0]], [[1]], [[1, 2]]))
def test_segmentation_input_that_cannot_be_evaluated(confusion):
    with pytest.raises(ValueError, match="pixel|confusion"):
        segmentation_metrics(confusion)
