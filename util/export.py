# SPDX-License-Identifier: MIT
"""A checkpoint as people share it: model.safetensors, config.json and a model card, README.md, in a folder of their own.

`load_checkpoint` reads such a folder like a checkpoint. Pretraining checkpoints are exported without their decoder.
"""

import json
import logging
import shutil
from pathlib import Path

from safetensors.torch import save
from tabulate import tabulate

from util.checkpoint import EXPORTED_CONFIG, EXPORTED_WEIGHTS

FORMAT = 1
# Flags that tell what a model was trained on and how, for the card; some are of pretraining, some of finetuning.
RECIPE = (
    "dataset",
    "split",
    "train_fraction",
    "val_split",
    "epochs",
    "batch_size",
    "accum_iter",
    "world_size",
    "lr",
    "weight_decay",
    "layer_decay",
    "drop_path",
    "freeze_encoder",
    "mask_ratio",
    "norm_pix_loss",
    "weight_mode",
    "weight_level",
    "weight_domain",
    "weight_clip",
    "exp_scale",
    "finetune",
    "seed",
)

log = logging.getLogger(__name__)


def export(folder, state, args, classes, metrics, data):
    """Write a checkpoint into a new folder, which appears whole or not at all.

    state: of `load_checkpoint`. args: flags settled with it: dataset, model, input_size, mean, std, patch_cut, patch_op.
    classes: names, or None for an encoder. metrics: {split: {name: value}}, and data: {split: {"samples", "simulated"}}
    that they were measured on, besides those the checkpoint holds.
    """
    folder = Path(folder)
    task = (
        "encoder"
        if classes is None
        else "pair classifier"
        if args.dataset == "sen12flood"
        else "multi-label classifier"
    )
    trained = state.get("args", {})
    if state.get("metrics"):
        split = trained.get("val_split", "val")
        metrics = {split: state["metrics"], **metrics}
        data = {**({split: state["data"]["val"]} if "val" in state.get("data", {}) else {}), **data}
    config = {
        "format": FORMAT,
        "library_name": "sar-w-mixmae",
        "task": task,
        "epoch": state.get("epoch"),
        "input": {
            "channels": ["VH", "VV"],
            "units": "dB",
            "input_size": args.input_size,
            "mean": list(args.mean),
            "std": list(args.std),
            **({"classes": list(classes)} if classes else {}),
        },
        "args": {
            "dataset": args.dataset,
            "model": args.model,
            "patch_cut": args.patch_cut,
            "patch_op": args.patch_op,
            **({"nb_classes": len(classes)} if classes else {}),
        },
        "recipe": {name: trained[name] for name in RECIPE if isinstance(trained.get(name), (str, int, float))},
        "data": state.get("data", {}),
        "metrics": metrics,
        "measured_on": data,
    }
    weights = {
        name: value.contiguous().clone()
        for name, value in state["model"].items()
        if classes or not name.startswith(("decoder_", "mask_token"))
    }
    staged = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        (staged / EXPORTED_WEIGHTS).write_bytes(
            save(weights, {"format": "pt"})
        )  # save_file would make it unreadable to others
        (staged / EXPORTED_CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (staged / "README.md").write_text(
            model_card(config, sum(value.numel() for value in weights.values())), encoding="utf-8"
        )
        if folder.exists():
            folder.rmdir()
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    log.info("wrote %s: %s", folder, ", ".join(sorted(path.name for path in folder.iterdir())))


def model_card(config, size):
    """The text of README.md: what it is, what it was trained on, how its input is prepared, its metrics, how to load it."""
    prepared, facts = config["input"], config["args"]
    side = prepared["input_size"]
    steps = [
        f"two channels, {' and '.join(prepared['channels'])} in this order, Sentinel-1 IW GRD backscatter in {prepared['units']}",
        f"pixels without data: the channel's mean; then bilinear resizing to {side}×{side} pixels",
        *(
            f"{channel}: (x − ({mean:g})) / {std:g}"
            for channel, mean, std in zip(prepared["channels"], prepared["mean"], prepared["std"])
        ),
    ]
    if config["task"] == "pair classifier":
        steps.append(
            f"both images of a pair alike; the model cuts them into patches of 128×128 (patch_cut {facts['patch_cut']}, "
            f"patch_op {facts['patch_op']})"
        )
    names = sorted({name for values in config["metrics"].values() for name in values})
    figures = tabulate(
        [(name, *(values.get(name) for values in config["metrics"].values())) for name in names],
        ["metric", *config["metrics"]],
        tablefmt="pipe",
        floatfmt=".4f",
        missingval="–",
    )
    classes = "".join(f"\n{k}. {name}" for k, name in enumerate(prepared.get("classes", ())))
    output = (
        "encoder: features (B, C) from `model.forward_features`"
        if not classes
        else f"{len(prepared['classes'])} logits; {'softmax' if config['task'] == 'pair classifier' else 'a sigmoid each'} gives probabilities"
    )
    recipe = "\n".join(f"| {name} | {value} |" for name, value in config["recipe"].items())
    simulated = any(part["simulated"] for part in (*config["data"].values(), *config["measured_on"].values()))
    tags = ["sentinel-1", "sar", "remote-sensing", "masked-autoencoder", *["simulated"] * simulated]
    warning = (
        "**Simulated data**: this model, or a figure below, comes from simulated images and says nothing of measured ones.\n\n"
        * simulated
    )
    return f"""---
library_name: {config["library_name"]}
license: mit
pipeline_tag: {"image-classification" if classes else "image-feature-extraction"}
tags: [{", ".join(tags)}]
---
# {facts["model"]}, {config["task"]}, {facts["dataset"]}

{warning}SAR-W-MixMAE ([arXiv 2503.01181](https://arxiv.org/abs/2503.01181)); {size:,} values; {output}.

The license is that of the code. Change it where the data, or the weights that the training started from, ask for another.

## Trained on
{_sizes(config["data"])}Epoch {config["epoch"]} (counted from 0) of a run with these flags:

| flag | value |
|---|---|
{recipe}

## How its input is prepared
{chr(10).join(f"{k}. {step}" for k, step in enumerate(steps, 1))}

## Metrics
{_sizes(config["measured_on"]) if names else ""}{figures if names else "None were recorded with this checkpoint."}
{f"{chr(10)}## Classes{classes}{chr(10)}" if classes else ""}
## Loading
In a checkout of SAR-W-MixMAE:

```python
from pretrained import load
model, prepare = load("path/to/this/folder")
x, _ = prepare(sar_db)          # sar_db: (B, 2, height, width), dB
```
"""


def _sizes(data):
    """A line of Markdown: how many samples each part has, and whether they are simulated; empty where that is not known."""
    parts = [
        f"{name} {part['samples']:,} {'simulated ' if part['simulated'] else ''}samples" for name, part in data.items()
    ]
    return f"Data: {', '.join(parts)}.\n\n" if parts else ""
