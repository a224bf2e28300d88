# SPDX-License-Identifier: MIT
"""Logs and run folders as our programs and the released code write them."""

import json
from datetime import datetime, timedelta

SCORES = {
    "ap_macro": 0.7141,
    "ap_micro": 0.8391,
    "f1_macro": 0.6443,
    "f1_micro": 0.7384,
    "precision_macro": 0.6912,
    "precision_micro": 0.7705,
}


FLOOD_SCORES = {"accuracy": 0.91, "precision": 0.82, "recall": 0.73, "f1": 0.77}


HEADLINE = {"Average Precision": "ap", "F1 Score": "f1", "Precision": "precision"}


PIPE = """| Metric            |   Macro |   Micro |
|:------------------|--------:|--------:|
| Average Precision |  0.7141 |  0.8391 |
| F1 Score          |  0.6443 |  0.7384 |
| Precision         |  0.6912 |  0.7705 |"""


NAMESPACE = "Namespace(batch_size=128, betas=(0.9, 0.95), finetune='/ckpt/checkpoint_64.pth', output_dir='./out/a', resume='', seed=3)"


def clocked(text, start="10:00:00.000001", step=1.0):
    """The text with a clock before each line, `step` seconds apart."""
    clock = datetime.strptime(start, "%H:%M:%S.%f")
    return (
        "\n".join(
            f"[{clock + timedelta(seconds=step * k):%H:%M:%S.%f}] {line}" for k, line in enumerate(text.splitlines())
        )
        + "\n"
    )


def released(table, flags=NAMESPACE, epoch=37):
    """A console log of the released code, in short."""
    return (
        clocked(
            f"{flags}\nEpoch: [0]  [  0/263]  eta: 0:10:11  lr: 0.000001  loss: 0.6931 (0.6931)\nTraining time 3:10:20\n"
            f"Best Results Summary: Epoch {epoch}\n"
        )
        + table
        + "\n"
    )


def table_of(scores):
    """The table that main_finetune.py ends with."""
    value = {name: "–" if score is None else f"{score:.4f}" for name, score in scores.items()}
    if "accuracy" in scores:
        rows = [("Metric", "Value"), *((name.replace("f1", "F1 Score").capitalize(), value[name]) for name in scores)]
    else:
        rows = [
            ("Metric", "Macro", "Micro"),
            *((shown, value[f"{key}_macro"], value[f"{key}_micro"]) for shown, key in HEADLINE.items()),
        ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def ours(scores=SCORES, epoch=1, start="random initialisation", split="test", **flags):
    """A console log of main_finetune.py, in short."""
    flags = {
        "dataset": "benv2",
        "finetune": "",
        "output_dir": "output/ft",
        "seed": 0,
        "test_split": split,
        "train_fraction": 1.0,
        **flags,
    }
    per_class = "| class | samples | AP | F1 | precision | recall |\n|---|---|---|---|---|---|\n| Pastures | 6 | 0.2708 | 0.1 | 0.2 | 0.3 |"
    return clocked(
        f"flags: {json.dumps(flags)}\n{start}\nEpoch [0/2] step 4/4  loss 0.6931\nTraining time 0:00:20\n{per_class}\n"
        f"selected on split val; the figures are of split {split}\nBest Results Summary: Epoch {epoch}\n{table_of(scores)}"
    )


def written(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def run_folder(folder, scores=SCORES, origin=None, outcome="finished", earlier=(), split="test", **flags):
    """What main_finetune.py leaves, in short."""
    flags = {"finetune": "", "seed": 0, "train_fraction": 1.0, "output_dir": "output/ft", "test_split": split, **flags}
    record = {"flags": flags, "initialised_from": origin, "outcome": outcome, "earlier": list(earlier)}
    written(folder, "run.json", json.dumps(record))
    written(
        folder,
        "log.txt",
        json.dumps({"epoch": 0, "evaluated_split": "val", **{f"test_{name}": 0.5 for name in scores}}) + "\n",
    )
    if split != "none":
        written(folder, f"eval_{split}.json", json.dumps({"epoch": 7, "split": split, "per_class": {}, **scores}))
    return folder
