# SPDX-License-Identifier: MIT
"""Model selection: which epoch of a finetuning run is best, by the published rules on validation metrics.

A rule decides whether a new epoch replaces the best one so far; it must be strictly better. An undefined metric (None)
is worse than any value and equal to another undefined one. Source: SAR-W-MixMAE, IEEE JSTARS 2026.
"""

MACRO = ("ap_macro", "f1_macro", "precision_macro")
METRICS = MACRO + ("ap_micro", "f1_micro", "precision_micro")


def _greater(a, b):
    return a is not None and (b is None or a > b)


def _by_score(**weights):
    """The rule that compares a weighted sum of metrics. The sum is undefined if one of the metrics is."""

    def score(metrics):
        values = [metrics[name] for name in weights]
        return None if None in values else sum(weight * value for weight, value in zip(weights.values(), values))

    return lambda new, incumbent: _greater(score(new), score(incumbent))


def _most_best(new, incumbent):
    """The rule "most best results": better on more of the six metrics; in a tie, on more macro metrics."""

    def lead(names):
        return sum(_greater(new[name], incumbent[name]) - _greater(incumbent[name], new[name]) for name in names)

    return (lead(METRICS), lead(MACRO)) > (0, 0)


# {task: {rule: better(new, incumbent)}}; new and incumbent are the metrics of one epoch each
RULES = {
    "multilabel": {
        "best": _by_score(f1_macro=1.3, f1_micro=1.1, ap_macro=1.2, precision_macro=1.2),
        "best_default": _by_score(**dict.fromkeys(METRICS, 1.0)),
        "best_mbr": _most_best,
    },
    "multiclass": {"best": _by_score(accuracy=1.0)},
    "flood": {"best": _by_score(accuracy=1.0)},
    "segmentation": {"best": _by_score(iou_macro=1.0)},
}
FILES = {rule: f"checkpoint_{rule}.pth" for rule in RULES["multilabel"]}


class Selection:
    """The best epoch so far by each rule of a task, a key of RULES. Raises ValueError for another task."""

    def __init__(self, task):
        if task not in RULES:
            raise ValueError(f"task '{task}' is unknown; choose one of {', '.join(RULES)}")
        self.rules = RULES[task]
        self.held = {}  # {rule: {"epoch", "metrics"}}; all rules or none

    def update(self, epoch, metrics):
        """Compares an epoch with the best ones. Returns the names of the rules by which it is now the best.

        metrics: as `util.metrics` returns them; those per class are not kept. Raises KeyError if a metric is missing.
        """
        entry = {"epoch": epoch, "metrics": {name: value for name, value in metrics.items() if name != "per_class"}}
        won = [
            rule
            for rule, better in self.rules.items()
            if rule not in self.held or better(metrics, self.held[rule]["metrics"])
        ]
        self.held.update(dict.fromkeys(won, entry))
        return won

    def best(self, rule):
        """(epoch, its metrics) that is best by a rule. Raises ValueError before the first epoch."""
        if rule not in self.held:
            raise ValueError(f"rule '{rule}' holds no epoch; rules with one: {', '.join(self.held) or 'none'}")
        return self.held[rule]["epoch"], self.held[rule]["metrics"]

    def state_dict(self):
        """{rule: {"epoch", "metrics"}}, plain values; empty before the first epoch."""
        return {rule: dict(entry) for rule, entry in self.held.items()}

    def load_state_dict(self, state):
        """Restores a `state_dict`. Raises ValueError for rules of another task or for metrics that are missing."""
        if state and state.keys() != self.rules.keys():
            raise ValueError(
                f"this selection has the rules {', '.join(self.rules)}; the state to load has "
                f"{', '.join(map(str, state))}"
            )
        for rule, entry in state.items():
            try:
                int(entry["epoch"])
                self.rules[rule](entry["metrics"], entry["metrics"])
            except (TypeError, KeyError) as error:
                raise ValueError(f"what rule '{rule}' holds is not an epoch with its metrics ({error})") from None
        self.held = {rule: dict(entry) for rule, entry in state.items()}
