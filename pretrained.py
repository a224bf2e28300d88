# SPDX-License-Identifier: MIT
"""From flags or a checkpoint to a classifier, and how its input is prepared.

from pretrained import load
model, prepare = load("checkpoint_best.pth")              # ours, exported or released (then with dataset="benv2")
logits = model(prepare(sar_db)[0])                        # sar_db (B, 2, 120, 120), dB, order VH, VV
"""

import argparse
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import models_mixmim_ft
import models_sen12_ft
from batch_preparation import BatchPreparation, Weighting
from common.errors import UsageError
from models_mixmim import size_of
from sarwmix.registry import DATASETS
from util.checkpoint import find_checkpoint, initialise, load_checkpoint
from util.checkpoint_input import TRAINED_WITH, facts_of, flags_of, settle_input
from util.datasets import fill_statistics
from util.metrics import flood_metrics, multilabel_metrics

DECODER = ("decoder_", "mask_token")  # of a pretraining checkpoint
HEAD = ("head.",)
FLOOD_PATCH, FLOOD_SIZE = 128, 512  # sides of the patches a flood image is cut into, and of the published images


@dataclass(frozen=True)
class Task:
    """What a dataset asks of a model. name: also of its selection rules. headline: metrics in the order of a table."""

    name: str
    sizes: dict
    criterion: callable
    activate: callable  # logits (N, K) → probabilities (N, K)
    metrics: callable  # (probabilities, labels) → dict
    headline: dict  # row of the summary table → metrics (macro, micro), or (value,)


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
)
TASKS = {"benv1": MULTILABEL, "benv2": MULTILABEL, "sen12flood": FLOOD}


def fill_defaults(args):
    """What neither a flag nor a checkpoint said; input_size of floods stays None, for the dataset to say."""
    flood = TASKS[args.dataset] is FLOOD
    args.model = args.model or "mixmim_base"
    args.nb_classes = args.nb_classes or len(DATASETS[args.dataset].CLASSES)
    args.patch_cut, args.patch_op = args.patch_cut or "vhvv", args.patch_op or "avg"
    if not flood:
        args.input_size = args.input_size or 128
    fill_statistics(args)


def build_model(args, meta=False):
    """The classifier of the flags, on the CPU; meta: without memory, to find out whether it can be. Raises UsageError."""
    if args.model not in models_mixmim_ft.SIZES:
        raise UsageError(f"--model {args.model} is unknown; choose one of {', '.join(models_mixmim_ft.SIZES)}")
    options = {"num_classes": args.nb_classes, "drop_path_rate": args.drop_path}
    if TASKS[args.dataset] is FLOOD:
        if args.input_size and args.input_size % FLOOD_PATCH:
            raise UsageError(
                f"--input_size {args.input_size}: flood images are cut into patches of {FLOOD_PATCH} pixels, so "
                f"it must be a multiple of {FLOOD_PATCH}"
            )
        options |= {"img_size": FLOOD_PATCH, "patch_cut": args.patch_cut, "patch_op": args.patch_op}
    else:
        options["img_size"] = args.input_size
    try:
        with torch.device("meta" if meta else "cpu"):
            return TASKS[args.dataset].sizes[args.model](**options)
    except ValueError as error:
        raise UsageError(f"--input_size: {error}") from None


def build_preparation(args):
    return BatchPreparation(args.input_size, args.mean, args.std, args.seed, Weighting("none"))


def has_head(state):
    """Whether a checkpoint is of a classifier; one of pretraining is not."""
    return any(name.startswith(HEAD) for name in state["model"])


def check_classes(state, path, args):
    """Whether a checkpoint classifies what --dataset labels. Raises UsageError naming both."""
    classes, facts = list(DATASETS[args.dataset].CLASSES), facts_of(state)
    if not has_head(state):
        raise UsageError(
            f"{path}: a pretraining checkpoint, which has no head to classify with; finetune it first (--finetune "
            f"without --eval), or look at its features with --embed"
        )
    theirs = facts.get("classes", facts.get("nb_classes"))
    if theirs not in (classes, len(classes)):
        shown = (
            f"{theirs} classes" if isinstance(theirs, int) else f"{len(theirs)} classes ({', '.join(theirs[:3])}, …)"
        )
        raise UsageError(
            f"{path}: classifies {shown}, but --dataset {args.dataset} has {len(classes)} ({', '.join(classes[:3])}"
            f"{', …' if len(classes) > 3 else ''}); choose the dataset it was finetuned on"
        )


def load_weights(model, state, path, head):
    """Weights of a checkpoint into a classifier; head: whether to take the head too. Returns the names of the resampled."""
    return initialise(model, state, path, ignore=DECODER, keep=() if head else HEAD)


def load(path, dataset=None, device="cpu", **flags):
    """A checkpoint of ours, exported, released or of another program, as (model, prepare), both in evaluation mode on the device.

    path: the file, an exported folder, or the folder of a run. dataset: benv1, benv2 or sen12flood; needed for checkpoints
    that do not say how their input is prepared, as the released ones. flags:
    model, input_size, mean, std, patch_cut, patch_op, where the checkpoint does not know. A pretraining checkpoint gives
    an encoder whose head is untrained: use model.forward_features. Raises UsageError for one that does not fit.
    """
    path = find_checkpoint(path)
    state = load_checkpoint(path)
    dataset = dataset or state.get("args", {}).get("dataset")
    if dataset not in DATASETS:
        raise UsageError(f"{path}: does not say what it was trained on; give dataset, one of {', '.join(DATASETS)}")
    args = argparse.Namespace(
        **{
            **dict.fromkeys(TRAINED_WITH),
            "drop_path": 0.0,
            "seed": 0,
            "force_input": False,
            "dataset": dataset,
            **flags,
        }
    )
    args = settle_input(args, state, path, size_of(state["model"]))
    if has_head(state):
        check_classes(state, path, args)
    fill_defaults(args)
    args.input_size = args.input_size or FLOOD_SIZE
    with flags_of(path):
        model = build_model(args)
    load_weights(model, state, path, head=has_head(state))
    return model.to(device).eval(), build_preparation(args).to(device).eval()
