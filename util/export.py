# SPDX-License-Identifier: MIT
"""Exports a checkpoint for sharing: model.safetensors, config.json, a program and a model card, README.md.

`load_checkpoint` reads such a folder like a checkpoint. Pretraining checkpoints are exported without their decoder.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch
from safetensors.torch import save
from tabulate import tabulate

from common.files import make_folder, sync
from util.checkpoint import EXPORTED_CONFIG, EXPORTED_PROGRAM, EXPORTED_WEIGHTS

FORMAT = 1
# Flags of pretraining and of finetuning that describe the training on the card.
RECIPE = """dataset split train_fraction val_split epochs batch_size accum_iter world_size lr weight_decay layer_decay
drop_path freeze_encoder mask_ratio norm_pix_loss weight_mode weight_level weight_domain weight_clip exp_scale finetune
seed""".split()

TAGS = ("sentinel-1", "sar", "remote-sensing", "masked-autoencoder")
PIPELINES = ("image-feature-extraction", "image-classification")  # of an encoder, and of a classifier
SIMULATED = (
    "**Simulated data**: this model, or a figure below, comes from simulated images; it is no evidence for "
    "measured images.\n\n"
)
CARD = Template("""---
library_name: $library_name
license: mit
pipeline_tag: $pipeline
tags: [$tags]
---
# $model, $task, $dataset

${warning}SAR-W-MixMAE ([arXiv 2503.01181](https://arxiv.org/abs/2503.01181)); $size values; $output.

The license is that of the code. Change it if the data, or the weights that the training started from,
require another.

## Trained on
${trained_on}Epoch $epoch (counted from 0) of a run with these flags:

| flag | value |
|---|---|
$recipe

## How its input is prepared
$steps

## Metrics
$metrics
$classes
## Loading
With PyTorch alone, 2.10 or newer:

```python
import torch
model = torch.export.load("path/to/this/folder/model.pt2").module()
$call
```
$input: (B, 2, $shape), float32, $channels in $units; $free. The
program prepares its input as above, but does not check it: images that are not in $units, or whose
channels are in another order, give wrong outputs without a warning.

It computes in float32 on the CPU or, after `model.to("cuda")`, on a GPU (not measured on a GPU).
PyTorch $torch wrote it. A .pt2 file can hold code that runs when it is loaded:
load one only if you trust where it comes from. model.safetensors holds no code.

In a checkout of SAR-W-MixMAE, which checks its input:

```python
from pretrained import load
model, prepare = load("path/to/this/folder")
x, _ = prepare(sar_db)          # sar_db: (B, 2, $shape), dB
```
""")

# Name of a classifier of each task.
CLASSIFIERS = {
    "multilabel": "multi-label classifier",
    "multiclass": "single-label classifier",
    "flood": "pair classifier",
    "segmentation": "segmentation",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """The model with its preparation as a program of torch.export.

    content: of the file, bytes-like. images: the number of tensors that it takes. activation: the function that makes
    probabilities of its outputs, logits: "sigmoid" or "softmax"; None: the outputs are features.
    """

    content: bytes
    images: int
    activation: str | None


def export(folder, state, args, classes, metrics, data, program):
    """Export a checkpoint to a new folder, atomically.

    state: of `load_checkpoint`. args: dataset, task, model, input_size, mean, std, patch_cut, patch_op, as resolved for
    it. classes: names, or None for an encoder. metrics: {split: {name: value}}. data: {split: {"samples",
    "simulated"}}, which the metrics were measured on. Both are added to those of the checkpoint. program: the Program
    of the model.
    """
    folder = Path(folder)
    task = CLASSIFIERS[args.task] if classes else "encoder"
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
            **({"nb_classes": len(classes), "task": args.task} if classes else {}),
        },
        "program": {
            "images": program.images,
            "output": "logits" if program.activation else "features",
            "activation": program.activation,
            "torch": str(torch.__version__),
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
    make_folder(staged)
    try:
        # save_file would make a file that only its owner can read.
        (staged / EXPORTED_WEIGHTS).write_bytes(save(weights, {"format": "pt"}))
        (staged / EXPORTED_PROGRAM).write_bytes(program.content)
        (staged / EXPORTED_CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        size = sum(value.numel() for value in weights.values())
        (staged / "README.md").write_text(model_card(config, size), encoding="utf-8")
        for path in (*staged.iterdir(), staged):
            sync(path)
        if folder.exists():
            folder.rmdir()
        staged.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    log.info("wrote %s: %s", folder, ", ".join(sorted(path.name for path in folder.iterdir())))


def model_card(config, size):
    """The text of README.md for a config.json. size: number of values in the weights."""
    prepared, facts, side = config["input"], config["args"], config["input"]["input_size"]
    program, classes, metrics = config["program"], prepared.get("classes", ()), config["metrics"]
    simulated = any(part["simulated"] for part in (*config["data"].values(), *config["measured_on"].values()))
    of_pixels = facts.get("task") == "segmentation"
    steps = [
        f"two channels, {' and '.join(prepared['channels'])} in this order, Sentinel-1 IW GRD backscatter in "
        f"{prepared['units']}",
        "pixels without data: the channel's mean"
        + (f"; then bilinear resizing to {side}×{side} pixels" if not of_pixels else ""),
    ]
    for channel, mean, std in zip(prepared["channels"], prepared["mean"], prepared["std"]):
        steps.append(f"{channel}: (x − ({mean:g})) / {std:g}")
    if program["images"] == 2:
        steps.append(
            "both images of a pair in the same way; the model cuts them into patches of 128×128 (patch_cut "
            f"{facts['patch_cut']}, patch_op {facts['patch_op']})"
        )
    output = "encoder: features (B, C) from `model.forward_features`"
    if classes:
        activation = "a sigmoid of each" if program["activation"] == "sigmoid" else program["activation"]
        output = f"{len(classes)} logits{' for each pixel' * of_pixels}; {activation} gives probabilities"
    names = sorted({name for values in metrics.values() for name in values})
    rows = [(name, *(values.get(name) for values in metrics.values())) for name in names]
    table = tabulate(rows, ["metric", *metrics], tablefmt="pipe", floatfmt=".4f", missingval="–")
    return CARD.substitute(
        facts | config,
        pipeline="image-segmentation" if of_pixels else PIPELINES[bool(classes)],
        tags=", ".join(TAGS + ("simulated",) * simulated),
        warning=SIMULATED if simulated else "",
        size=f"{size:,}",
        output=output,
        trained_on=_sizes(config["data"]),
        recipe="\n".join(f"| {name} | {value} |" for name, value in config["recipe"].items()),
        steps=_numbered(steps, 1),
        metrics=_sizes(config["measured_on"]) + table if names else "None were recorded with this checkpoint.",
        classes=f"\n## Classes\n{_numbered(classes, 0)}\n" if classes else "",
        call=_call(program, f"{len(classes)}, {side}, {side}" if of_pixels else len(classes)),
        shape=f"{side}, {side}" if of_pixels else "height, width",
        free="B can be any number" if of_pixels else "B, height and width can be any numbers",
        input="sar_db" if program["images"] == 1 else "first, second, of the same shape",
        channels=" and ".join(prepared["channels"]),
        units=prepared["units"],
        torch=program["torch"],
    )


def _call(program, classes):
    """The Python that calls a loaded program, as `program` of config.json describes it."""
    images = "sar_db" if program["images"] == 1 else "first, second"
    if program["output"] == "features":
        return f"features = model({images})  # (B, C)"
    axis = "1" if program["activation"] == "softmax" else ""
    return f"logits = model({images})  # (B, {classes})\nprobabilities = logits.{program['activation']}({axis})"


def _numbered(items, first):
    return "\n".join(f"{k}. {item}" for k, item in enumerate(items, first))


def _sizes(data):
    """A line of Markdown with the number of samples of each split, and whether they are simulated; empty if unknown."""
    kinds = {name: "simulated samples" if part["simulated"] else "samples" for name, part in data.items()}
    parts = [f"{name} {data[name]['samples']:,} {kind}" for name, kind in kinds.items()]
    return f"Data: {', '.join(parts)}.\n\n" if parts else ""
