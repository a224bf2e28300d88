# SPDX-License-Identifier: MIT
"""From a configuration or a checkpoint to a downstream model, and the preparation of its input.

from pretrained import load
model, prepare = load("checkpoint_best.pth")              # ours, exported or released (then with dataset="benv2")
logits = model(prepare(sar_db)[0])                        # sar_db (B, 2, 120, 120), dB, order VH, VV
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import models_mixmim_ft
import models_mixmim_seg
import models_sen12_ft
from batch_preparation import BatchPreparation, PixelPreparation, Weighting
from common.errors import UsageError
from models_mixmim import ENCODERS, MixMIMEncoder, size_of
from sarwmix.registry import DATASETS
from util.checkpoint import initialise
from util.checkpoint_input import TRAINED_WITH, LoadedCheckpoint, flags_of
from util.configuration import dataset_defaults, need_statistics, settle
from util.metrics import flood_metrics, multiclass_metrics, multilabel_metrics, segmentation_metrics

DECODER = ("decoder_", "mask_token")  # of a pretraining checkpoint
HEAD = ("head.",)
FLOOD_PATCH, FLOOD_SIZE = 128, 512  # sides of the patches a flood image is cut into, and of the published images


@dataclass(frozen=True)
class Task:
    """What a dataset asks of a model.

    name: also of its selection rules. sizes: {size: factory of the model}. criterion: (logits, targets) → loss, for
    segmentation that of `engine_segment`. activate: logits (N, K, …) → probabilities. metrics: (probabilities, labels)
    → dict, for segmentation of a confusion matrix. headline: row of the summary table → its metrics (macro, micro), or
    (value,). images_per_sample: 1, or 2 for pairs.
    """

    name: str
    sizes: dict
    criterion: Callable
    activate: Callable
    metrics: Callable
    headline: dict
    images_per_sample: int = 1


MULTILABEL = Task(
    "multilabel",
    models_mixmim_ft.SIZES,
    F.multilabel_soft_margin_loss,
    torch.sigmoid,
    multilabel_metrics,
    {
        "Average Precision": ("ap_macro", "ap_micro"),
        "F1 Score": ("f1_macro", "f1_micro"),
        "Precision": ("precision_macro", "precision_micro"),
    },
)
FLOOD = Task(
    "flood",
    models_sen12_ft.SIZES,
    F.cross_entropy,
    partial(torch.softmax, dim=1),
    flood_metrics,
    {"Accuracy": ("accuracy",), "Precision": ("precision",), "Recall": ("recall",), "F1 Score": ("f1",)},
    images_per_sample=2,
)
MULTICLASS = Task(
    "multiclass",
    models_mixmim_ft.SIZES,
    F.cross_entropy,
    partial(torch.softmax, dim=1),
    multiclass_metrics,
    {
        "Accuracy": ("accuracy",),
        "F1 Macro": ("f1_macro",),
        "Precision Macro": ("precision_macro",),
        "Recall Macro": ("recall_macro",),
    },
)
SEGMENTATION = Task(
    "segmentation",
    models_mixmim_seg.SIZES,
    None,
    partial(torch.softmax, dim=1),
    segmentation_metrics,
    {"Mean IoU": ("iou_macro",), "F1 Macro": ("f1_macro",), "Accuracy": ("accuracy",)},
)
TASKS = {task.name: task for task in (MULTILABEL, MULTICLASS, FLOOD, SEGMENTATION)}


def has_classes(dataset):
    """Whether the dataset of this name, which may be None, has fixed classes; chips have those of their tables."""
    return dataset in DATASETS and bool(DATASETS[dataset].CLASSES)


def task_of(config):
    """The Task of a configuration: that of its dataset, or, for chips, the one that their table or a checkpoint states.

    Raises UsageError if neither states one.
    """
    if has_classes(config.dataset):
        return TASKS[DATASETS[config.dataset].task]
    if config.task not in TASKS:
        raise UsageError(
            f"--dataset {config.dataset}: neither the checkpoint nor the data say what is classified; give labels with "
            "--metadata"
        )
    return TASKS[config.task]


def classifier_defaults(dataset):
    """The layer (of `settle`) of a classifier of a dataset. The input size of floods is left to their images.

    dataset: its name or class or, for chips, which have classes and statistics of their own, what is trained on.
    """
    kind = DATASETS[dataset] if isinstance(dataset, str) else dataset
    return {
        "model": "mixmim_base",
        "input_size": None if kind.task == "flood" else 128,
        "nb_classes": len(kind.CLASSES) or None,
        "task": kind.task if kind.CLASSES else None,
        "patch_cut": "vhvv",
        "patch_op": "avg",
        **dataset_defaults(kind),
    }


def build_model(config, meta=False):
    """The classifier of a configuration, on the CPU; meta: without memory, to find out whether it can be built.

    Raises UsageError.
    """
    if config.model not in models_mixmim_ft.SIZES:
        raise UsageError(f"--model {config.model} is unknown; choose one of {', '.join(models_mixmim_ft.SIZES)}")
    task = task_of(config)
    options = {"num_classes": config.nb_classes, "drop_path_rate": config.drop_path}
    if task is FLOOD:
        if config.input_size and config.input_size % FLOOD_PATCH:
            raise UsageError(
                f"--input_size {config.input_size}: flood images are cut into patches of {FLOOD_PATCH} pixels, so "
                f"it must be a multiple of {FLOOD_PATCH}"
            )
        options |= {"img_size": FLOOD_PATCH, "patch_cut": config.patch_cut, "patch_op": config.patch_op}
    else:
        options["img_size"] = config.input_size
    try:
        with torch.device("meta" if meta else "cpu"):
            return task.sizes[config.model](**options)
    except ValueError as error:
        raise UsageError(f"--input_size: {error}") from None


def build_preparation(config):
    """The preparation of a model's input, without weights: of whole images, or for segmentation of their pixels."""
    kind, crop_scale = BatchPreparation, None
    if task_of(config) is SEGMENTATION:
        kind, crop_scale = PixelPreparation, config.crop_scale
    return kind(config.input_size, config.mean, config.std, config.seed, Weighting("none"), crop_scale)


def check_classes(checkpoint, dataset):
    """Refuses a LoadedCheckpoint that does not classify what the dataset labels. Raises UsageError naming both.

    Chips take the classes of the checkpoint, so that only a head is needed.
    """
    if not checkpoint.has_head:
        raise UsageError(
            f"{checkpoint.path}: a pretraining checkpoint, which has no head to classify with; finetune it first "
            f"(--finetune without --eval), or look at its features with --embed"
        )
    classes, stated = list(DATASETS[dataset].CLASSES), checkpoint.stated()
    theirs = stated.get("classes", stated.get("nb_classes"))
    if has_classes(dataset) and theirs not in (classes, len(classes)):
        shown = (
            f"{theirs} classes" if isinstance(theirs, int) else f"{len(theirs)} classes ({', '.join(theirs[:3])}, …)"
        )
        raise UsageError(
            f"{checkpoint.path}: classifies {shown}, but --dataset {dataset} has {len(classes)} "
            f"({', '.join(classes[:3])}{', …' if len(classes) > 3 else ''}); choose the dataset it was finetuned on"
        )


def load_weights(model, checkpoint, head):
    """Loads the weights of a LoadedCheckpoint into a classifier, with its head or without.

    Returns the names of the resampled weights. Raises UsageError.
    """
    return initialise(model, checkpoint.state, checkpoint.path, ignore=DECODER, keep=() if head else HEAD)


def load(path, dataset=None, device="cpu", **flags):
    """A checkpoint as (model, prepare), both in evaluation mode on the device.

    path: a checkpoint of ours, of the released code or of another program; an exported folder; the folder of a run.
    dataset: of DATASETS; needed for checkpoints that do not state how their input is prepared, as
    the released ones. flags: model, input_size, mean, std, patch_cut, patch_op, where it does not state them. A
    pretraining checkpoint gives an encoder whose head is untrained: use model.forward_features. Raises UsageError.
    """
    checkpoint, config = _configured(path, dataset, flags)
    with flags_of(checkpoint.path):
        model = build_model(config)
    load_weights(model, checkpoint, head=checkpoint.has_head)
    return model.to(device).eval(), build_preparation(config).to(device).eval()


def load_encoder(path, dataset=None, device="cpu", **flags):
    """The encoder of a checkpoint, for feature maps, as (MixMIMEncoder, prepare), in evaluation mode on the device.

    maps = encoder.forward_intermediates(prepare(sar_db)[0])    # sar_db (B, 2, H, W), dB; H and W multiples of 32

    Arguments as of `load`. prepare, a PixelPreparation, fills and standardises images of any size, and neither resizes
    them nor checks that they are dB. Raises UsageError.
    """
    checkpoint, config = _configured(path, dataset, flags)
    side = FLOOD_PATCH if task_of(config) is FLOOD else config.input_size
    encoder = MixMIMEncoder(**ENCODERS[config.model], img_size=side)
    initialise(encoder, checkpoint.state, checkpoint.path, ignore=DECODER + HEAD)
    prepare = PixelPreparation(side, config.mean, config.std, weighting=Weighting("none"))
    return encoder.to(device).eval(), prepare.to(device).eval()


def _configured(path, dataset, flags):
    """(LoadedCheckpoint, the configuration of its model) for the arguments of `load`. Raises UsageError."""
    checkpoint = LoadedCheckpoint.load(path, size_of)
    dataset = dataset or checkpoint.flags().get("dataset")
    if dataset not in DATASETS:
        raise UsageError(
            f"{checkpoint.path}: does not say what it was trained on; give dataset, one of {', '.join(DATASETS)}"
        )
    if checkpoint.has_head:
        check_classes(checkpoint, dataset)
    known = {"drop_path": 0.0, "seed": 0, "force_input": False, "dataset": dataset, "crop_scale": None}
    given = argparse.Namespace(**dict.fromkeys(TRAINED_WITH) | known | flags)
    unused = {} if checkpoint.has_head else {"task": "multiclass", "nb_classes": 2}
    config = settle(
        given, checkpoint.used_as_is(given), classifier_defaults(dataset), unused, {"input_size": FLOOD_SIZE}
    )
    need_statistics(config)
    return checkpoint, config
