# SPDX-License-Identifier: MIT
"""The selection rules: who replaces whom, by numbers worked out by hand."""

import itertools
import json
import subprocess
import sys

import pytest

from sarwmix.selection import FILES, METRICS, RULES, Selection
from tests.helpers import ROOT

MULTILABEL, FLOOD = RULES["multilabel"], RULES["flood"]
SCORE = {"f1_macro": 1.3, "f1_micro": 1.1, "ap_macro": 1.2, "precision_macro": 1.2}  # of the rule "best"


def metrics(**changes):
    """All six 0.5 but for the changes."""
    return {**dict.fromkeys(METRICS, 0.5), **changes}


def test_files_and_rules():
    assert FILES == {
        "best": "checkpoint_best.pth",
        "best_default": "checkpoint_best_default.pth",
        "best_mbr": "checkpoint_best_mbr.pth",
    }
    assert MULTILABEL.keys() == FILES.keys() and FLOOD.keys() <= FILES.keys()


@pytest.mark.parametrize("rule", MULTILABEL)
def test_equal_metrics_replace_nothing(rule):
    assert not MULTILABEL[rule](metrics(), metrics())


@pytest.mark.parametrize(
    "gain, loss, replaces",
    [
        ({"f1_macro": 0.60}, {"f1_micro": 0.11}, True),  # 1.3·0.1 = 0.130 > 1.1·0.11 = 0.121
        ({"f1_micro": 0.60}, {"f1_macro": 0.09}, False),  # 1.1·0.1 = 0.110 < 1.3·0.09 = 0.117
        ({"ap_micro": 0.90, "precision_micro": 0.90}, {}, False),
    ],
)  # no part of the score
def test_best_by_hand(gain, loss, replaces):
    new = metrics(**gain, **{name: 0.5 - drop for name, drop in loss.items()})
    assert MULTILABEL["best"](new, metrics()) is replaces


@pytest.mark.parametrize("gained, lost", list(itertools.permutations(SCORE.items(), 2)))
def test_best_weighs_its_four_metrics_as_published(gained, lost):
    loss = {lost[0]: 0.5 - 0.12 / lost[1]}  # 0.12 of the score
    assert MULTILABEL["best"](metrics(**{gained[0]: 0.5 + 0.122 / gained[1]}, **loss), metrics())
    assert not MULTILABEL["best"](metrics(**{gained[0]: 0.5 + 0.118 / gained[1]}, **loss), metrics())


@pytest.mark.parametrize("name", METRICS)
def test_best_default_counts_all_six_alike(name):
    other = METRICS[METRICS.index(name) - 1]
    assert MULTILABEL["best_default"](metrics(**{name: 0.6, other: 0.41}), metrics())
    assert not MULTILABEL["best_default"](metrics(**{name: 0.6, other: 0.39}), metrics())


@pytest.mark.parametrize(
    "changes, replaces",
    [
        (dict(ap_micro=0.51), True),  # 1 : 0
        (dict(ap_micro=0.51, f1_micro=0.51, ap_macro=0.1), True),  # 2 : 1, though the sum falls
        (dict(ap_micro=0.9, f1_micro=0.4, ap_macro=0.4), False),  # 1 : 2, though the sum rises
        (dict(ap_macro=0.51, ap_micro=0.4), True),  # 1 : 1, macro 1 : 0
        (dict(ap_macro=0.4, ap_micro=0.6), False),  # 1 : 1, macro 0 : 1
        (dict(ap_macro=0.6, f1_macro=0.4), False),  # 1 : 1, macro 1 : 1
        (dict(ap_micro=0.6, f1_micro=0.4), False),  # 1 : 1, macro 0 : 0
        (dict(ap_macro=0.6, f1_macro=0.6, precision_macro=0.4, ap_micro=0.4), True),  # 2 : 2, macro 2 : 1
        (dict(ap_macro=0.6, f1_macro=0.4, precision_macro=0.4, ap_micro=0.6), False),
    ],
)  # 2 : 2, macro 1 : 2
def test_best_mbr_counts_victories_then_macro_ones(changes, replaces):
    assert MULTILABEL["best_mbr"](metrics(**changes), metrics()) is replaces


@pytest.mark.parametrize("rule", MULTILABEL)
def test_none_never_wins_and_two_are_equal(rule):
    better, undefined = MULTILABEL[rule], metrics(ap_macro=None)
    assert not better(undefined, metrics(ap_macro=0.0))
    assert better(metrics(ap_macro=0.0), undefined)
    assert not better(undefined, undefined)


def test_none_is_no_obstacle_to_the_other_metrics_of_best_mbr():
    assert MULTILABEL["best_mbr"](metrics(ap_macro=None, f1_macro=0.6), metrics(ap_macro=None))


def test_flood_goes_by_accuracy():
    assert FLOOD["best"]({"accuracy": 0.8, "f1": None}, {"accuracy": 0.7, "f1": 0.9})
    assert not FLOOD["best"]({"accuracy": 0.7, "f1": 0.9}, {"accuracy": 0.7, "f1": 0.1})


def test_selection_over_epochs():
    selection = Selection("multilabel")
    assert selection.update(0, metrics(per_class={"ap": [0.5]}, undefined=[])) == ["best", "best_default", "best_mbr"]
    assert selection.best("best") == (0, metrics(undefined=[]))  # without the figures per class
    assert selection.update(1, metrics()) == []
    assert selection.update(2, metrics(ap_micro=0.9, f1_micro=0.45, f1_macro=0.45)) == ["best_default"]
    assert selection.update(3, metrics(f1_macro=0.6)) == ["best", "best_mbr"]
    assert [selection.best(rule)[0] for rule in FILES] == [3, 2, 3]


def test_selection_of_floods():
    selection = Selection("flood")
    won = [selection.update(epoch, {"accuracy": accuracy}) for epoch, accuracy in enumerate((0.6, 0.5, 0.7, 0.7))]
    assert won == [["best"], [], ["best"], []]
    assert selection.best("best") == (2, {"accuracy": 0.7})


def test_selection_goes_on_from_a_state_that_went_through_json():
    selection = Selection("multilabel")
    selection.update(4, metrics(ap_macro=None, per_class={}, undefined=[3]))
    selection.update(5, metrics(f1_micro=0.6))
    resumed = Selection("multilabel")
    resumed.load_state_dict(json.loads(json.dumps(selection.state_dict())))
    assert resumed.state_dict() == selection.state_dict()
    assert resumed.update(6, metrics()) == selection.update(6, metrics()) == []
    assert resumed.update(7, metrics(f1_micro=0.61)) == selection.update(7, metrics(f1_micro=0.61)) == list(FILES)


def test_a_state_does_not_change_with_the_selection():
    selection = Selection("flood")
    selection.update(0, {"accuracy": 0.5})
    state = selection.state_dict()
    selection.update(1, {"accuracy": 0.6})
    assert state == {"best": {"epoch": 0, "metrics": {"accuracy": 0.5}}}


def test_what_a_selection_refuses():
    with pytest.raises(ValueError, match="task 'floods' is unknown; choose one of multilabel, multiclass, flood"):
        Selection("floods")
    selection = Selection("multilabel")
    with pytest.raises(ValueError, match="holds no epoch"):
        selection.best("best")
    with pytest.raises(ValueError, match="the state to load has best$"):
        selection.load_state_dict({"best": {"epoch": 0, "metrics": {"accuracy": 0.5}}})
    selection.load_state_dict(Selection("multilabel").state_dict())  # saved before the first evaluation
    assert selection.update(0, metrics()) == list(FILES)


def test_the_rules_need_no_torch():
    code = "import sys, sarwmix.helper; sys.exit(bool({'torch', 'util'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
