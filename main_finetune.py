# SPDX-License-Identifier: MIT
"""Finetune a pretrained encoder, and evaluate, embed or export what came out.

python main_finetune.py --dataset benv2 --data_path DIR --finetune CHECKPOINT --output_dir DIR
python main_finetune.py --eval --split test --data_path DIR --finetune DIR/checkpoint_best.pth
"""

import common.startup  # noqa: F401 (first: puts the environment right, reports a missing package)

# isort: split
import hashlib
import logging
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import torch
from timm.data import Mixup

import engine_finetune
import engine_segment
from common.console import setup_logging
from common.ending import leave, run_program
from common.errors import DataError, UsageError
from evaluation import evaluate, metrics_source, use_checkpoint
from finetune_flags import check_class_number, mixes, parse_flags, works_with_checkpoint
from models_mixmim import size_of
from pretrained import FLOOD, SEGMENTATION, build_model, build_preparation, classifier_defaults, load_weights, task_of
from sarwmix.helper import FILES, Selection
from sarwmix.registry import DATASETS, OWN
from util.checkpoint import load_checkpoint
from util.checkpoint_input import STARTED_WITH, LoadedCheckpoint, flags_of
from util.configuration import (
    log_configuration,
    log_statistics,
    machine_settings,
    need_statistics,
    settle,
)
from util.datasets import SamplesWithIds, build_dataset, build_loader, build_test_loader, check_data, drop_missing
from util.distributed import start_ranks
from util.head_fit import fit_head
from util.lr_decay import param_groups_lrd
from util.misc import duration, log_flags
from util.program import (
    check_one_command,
)
from util.reports import log_headline, log_metrics, log_table, scalars, shown, write_frame, write_metrics
from util.run import Run
from util.sampling import Place
from util.training import Training, run_identity, sample_counts

log = logging.getLogger(__name__)

# Flags that a continued run must repeat, besides those of every training.
SAME_RUN = (
    "layer_decay",
    "freeze_encoder",
    "head_init",  # None by default, the value for checkpoints of older runs, which lack this flag
    "train_fraction",
    "draw_seed",
    "val_split",
    "val_fraction",
    "patch_cut",
    "patch_op",
    "mixup",
    "cutmix",
    "cutmix_minmax",
    "mixup_prob",
    "mixup_switch_prob",
    "mixup_mode",
    "smoothing",
)
SAME_SEGMENTATION = ("crop_scale", "crops", "dice", "overlap")
HEAD_STD = 2e-5  # of the new head's weights, so that training starts from nearly equal logits
FRACTION_STREAM = 4  # of the draw of --train_fraction


# ---- Data ----------------------------------------------------------------------------------------


def build_splits(flags):
    """{"train", "val", "test": dataset}, without "test" for --test_split none. Raises DataError where they overlap."""
    splits = {"train": build_dataset(flags, flags.split, flags.metadata, supervised=True)}
    classes = splits["train"].CLASSES
    splits["val"] = build_dataset(flags, flags.val_split, flags.val_metadata, supervised=True, classes=classes)
    if flags.test_split != "none":
        splits["test"] = build_dataset(flags, flags.test_split, flags.test_metadata, supervised=True, classes=classes)
    trained_on = set(splits["train"].ids.tolist())
    for name in [name for name in splits if name != "train"]:
        both = [sample for sample in splits[name].ids.tolist() if sample in trained_on]
        if both:
            raise DataError(
                f"{len(both)} of {len(splits[name])} samples of split '{getattr(flags, f'{name}_split')}' are "
                f"training samples, too: {', '.join(both[:3])}{', …' if len(both) > 3 else ''}; choose other splits, "
                f"or give other lists with --{name}_metadata"
            )
    return splits


def draw_fraction(dataset, share, seed):
    """A random part of a dataset, in its order. Smaller shares are parts of larger ones of the same seed."""
    order = np.random.default_rng([seed, FRACTION_STREAM]).permutation(len(dataset))
    return dataset.subset(np.sort(order[: max(1, round(share * len(dataset)))]))


def log_class_balance(dataset, part):
    """A table of how often each class occurs in the whole training split and in what was drawn of it."""
    whole, drawn = dataset.label_table(), part.label_table()
    rows = [
        (name, int(n), int(m), f"{n / len(whole):.3f}", f"{m / len(drawn):.3f}")
        for name, n, m in zip(dataset.CLASSES, whole.sum(0, dtype=int), drawn.sum(0, dtype=int))
    ]
    log_table(rows, ["class", f"of {len(whole)}", f"of {len(drawn)} drawn", "share", "share drawn"])


def log_splits(splits):
    """A table of the samples of each class, and of the groups, in each split."""
    counts = [data.label_table().sum(0, dtype=int) for data in splits.values()]
    rows = [(name, *map(int, row)) for name, *row in zip(splits["train"].CLASSES, *counts)]
    rows.append(("samples", *map(len, splits.values())))
    rows.append(("groups", *(len(np.unique(data.groups)) for data in splits.values())))
    log_table(rows, ["class", *splits])


def warn_of_absent_classes(dataset):
    """Warns of classes that a training split has no sample of, and that a model cannot learn."""
    absent = [name for name, count in zip(dataset.CLASSES, dataset.label_table().sum(0)) if not count]
    if absent:
        log.warning("no training sample of %d classes: %s", len(absent), ", ".join(absent))


# ---- Finetuning ----------------------------------------------------------------------------------


def configure(flags, checkpoint, images, machine):
    """The configuration: flags → what the checkpoint states → program and dataset → machine.

    checkpoint: the LoadedCheckpoint that the training starts from, or None. images: the training split, whose size is
    the input size of floods. machine: of `machine_settings`. Raises UsageError, also for a model that cannot be built.
    """
    facts = DATASETS[flags.dataset]
    facts = images if flags.dataset in OWN else facts  # images of one's own state their classes and statistics
    flood = facts.task == "flood"  # whose encoder takes patches, so that its input size is not that of the images
    check_class_number(flags, facts.CLASSES)
    taken = [name for name in STARTED_WITH if not (flood and name == "input_size")]
    config = settle(
        flags,
        checkpoint.started_from(flags, taken) if checkpoint else {},
        classifier_defaults(facts),
        {"input_size": images.size} if flood else {},
        machine,
    )
    if facts.task == "segmentation":
        config = settle(config, {"crops": max(1, round((images.size / config.input_size) ** 2))})
    need_statistics(config)
    with flags_of(checkpoint and checkpoint.path):
        build_model(config, meta=True)
    return config


def build_training(config, device, checkpoint=None):
    """AdamW with (0.9, 0.999) and layer decay; the head, new, if linear with weights of std 2e-5; from config.seed.

    checkpoint: the LoadedCheckpoint whose encoder the model starts from, or None.
    """
    torch.manual_seed(config.seed)
    model = build_model(config)
    resampled = load_weights(model, checkpoint, head=False) if checkpoint else ()
    if task_of(config) is not SEGMENTATION:
        torch.nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)
        torch.nn.init.zeros_(model.head.bias)
    if config.freeze_encoder:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("head.")
    groups = param_groups_lrd(model, config.weight_decay, layer_decay=config.layer_decay)
    training = Training.build(model, build_preparation(config), groups, (0.9, 0.999), config, device)
    if checkpoint:
        training.initialised_from(checkpoint, resampled, ", with a new head")
    return training


def build_mixup(config):
    """timm's Mixup for `engine_finetune.mix`, or None."""
    if not mixes(config):
        return None
    return Mixup(
        config.mixup,
        config.cutmix,
        config.cutmix_minmax,
        config.mixup_prob,
        config.mixup_switch_prob,
        config.mixup_mode,
        label_smoothing=0.0,
        num_classes=config.batch_size,
    )


class Finetuning(Run):
    """A finetuning. After each epoch it evaluates, selects by the published rules, and saves."""

    def __init__(self, config, ranks, training, loader, identity, splits):
        super().__init__(config, ranks, training, loader, identity, datasets=splits.values())
        self.splits, self.task = splits, task_of(config)
        self.criterion, self.mixup = self.task.criterion, build_mixup(config)
        self.selection = Selection(self.task.name)

    def train(self):
        if self.config.head_init == "fitted" and self.start.source is None:
            self.fit_head()
        super().train()

    def fit_head(self):
        """Replaces the new head by one fitted to the features of the training pairs, before the first step."""
        training, config = self.training, self.config
        loader = build_test_loader(self.splits["train"], config, self.ranks)
        features, labels = engine_finetune.predict(
            training.model, training.prepare, loader, self.ranks, config.amp, features=True
        )
        weight, bias = fit_head(features, labels, config.nb_classes)
        head = training.model.head
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        right = ((features @ weight.T + bias).argmax(1) == labels).double().mean().item()
        log.info(
            "--head_init fitted: before training, the head classifies a share of %.3f of the training pairs correctly",
            right,
        )

    def train_one_epoch(self, epoch):
        engine = engine_segment if self.task is SEGMENTATION else engine_finetune
        return engine.train_one_epoch(self, epoch)

    def warm_up_loss(self, model):
        return engine_finetune.warm_up_loss(model, self.warm_up_images, self.config, self.task.images_per_sample)

    def extra_state(self):
        return {
            "input": {**self.training.prepare.describe(), "classes": list(self.splits["train"].CLASSES)},
            "selection": self.selection.state_dict(),
        }

    def restored(self, start):
        """Restores what a continued run has selected. Raises UsageError if that is not there."""
        if start.source is None:
            return
        try:
            self.selection.load_state_dict(start.selection or {})
        except ValueError as error:
            raise UsageError(
                f"{start.source}: does not fit this run ({error}); to start from its weights only, use --finetune"
            ) from None
        for rule, entry in self.selection.state_dict().items():
            if not any((place / FILES[rule]).exists() for place in (self.directory.path, start.source.parent)):
                raise UsageError(
                    f"{start.source}: {FILES[rule]}, which holds the selected epoch {entry['epoch']}, is not beside "
                    "it; copy it there"
                )

    def after_epoch(self, epoch, statistics):
        where = f"the evaluation of epoch {epoch}"
        metrics = self.evaluate("val", partial(self.stop_if_asked, Place(epoch, self.steps), where))
        held = self.selection.update(epoch, metrics)
        log.info(
            "Epoch %d  %s  loss %.4f  %s%s",
            epoch,
            self.config.val_split,
            metrics["loss"],
            "  ".join(f"{name} {shown(metrics[name])}" for keys in self.task.headline.values() for name in keys),
            f"  new best: {', '.join(FILES[rule] for rule in held)}" if held else "",
        )
        filled, figures = self.filled(), scalars(metrics)
        if filled:
            log.warning(
                "%d no-data or non-finite pixels were filled so far: with %s",
                filled,
                "-60 dB" if self.task is FLOOD else "the channel's mean",
            )
        entry = {
            **{f"train_{name}": value for name, value in statistics.items()},
            **{f"test_{name}": value for name, value in figures.items()},
            "epoch": epoch,
            "n_parameters": self.training.num_parameters(),
            "evaluated_split": self.config.val_split,
            "filled_pixels": filled,
        }
        if self.directory.writer is not None:
            for name, value in figures.items():
                self.directory.writer.add_scalar(f"test_{name}", value, (epoch + 1) * 1000)
        self.finish_epoch(epoch, entry, [FILES[rule] for rule in held], metrics=figures)
        self.stop_if_asked(Place(epoch + 1), saved=True)

    def evaluate(self, name, between):
        """Loss and metrics of the split "val" or "test"."""
        training = self.training
        metrics, _ = evaluate(training.model, training.prepare, self.splits[name], self.config, self.ranks, between)
        return metrics

    def report(self):
        """Evaluates the selected checkpoint on the test split, and ends with the table that log readers look for."""
        rule = "best"
        epoch, metrics = self.selection.best(rule)
        for name, file in FILES.items():
            if name in self.selection.state_dict():
                log.info("%s: epoch %d", file, self.selection.best(name)[0])
        split = self.config.val_split
        if "test" in self.splits:
            folder, test = self.directory.path, self.splits["test"]
            path, split = folder / FILES[rule], self.config.test_split
            with self.ranks.together():
                self.training.model.load_state_dict(load_selected(path, epoch)["model"])
            metrics = self.evaluate(
                "test", partial(self.stop_if_asked, Place(self.config.stop_epoch), "the final evaluation", saved=True)
            )
            log_metrics(metrics, test.CLASSES)
            where = metrics_source(self.config, path, test, epoch) | {"split": split}
            self.ranks.on_main(write_metrics, folder / f"eval_{split}.json", metrics, **where)
        log.info("selected on split %s; the figures are of split %s", self.config.val_split, split)
        log.info("Best Results Summary: Epoch %d", epoch)
        log_headline(self.task.headline, metrics)


def load_selected(path, epoch):
    """The checkpoint a rule selected. Raises UsageError if it is of another epoch, and so of another run."""
    state = load_checkpoint(path)
    if state["epoch"] != epoch:
        raise UsageError(
            f"{path} holds epoch {state['epoch']}, but epoch {epoch} was selected; another run wrote the file. "
            "Evaluate the checkpoint you mean with --eval"
        )
    return state


def label_checksum(dataset):
    """SHA-256 of the classes and the labels of a dataset, or of the pixels of each class in its masks."""
    labels = dataset.pixel_counts if dataset.task == "segmentation" else dataset.label_table()
    return hashlib.sha256("\n".join(dataset.CLASSES).encode() + labels.tobytes()).hexdigest()


def finetune(flags, ranks):
    """The whole job, from flags to the evaluation of the selected checkpoint."""
    started, machine = time.monotonic(), machine_settings(flags, ranks)
    with ranks.together():
        checkpoint = LoadedCheckpoint.load(flags.finetune, size_of) if flags.finetune else None
    with ranks.together():
        splits = build_splits(flags)
    splits = {name: drop_missing(dataset, flags, ranks) for name, dataset in splits.items()}
    if flags.val_split == flags.test_split:
        log.warning(
            "the checkpoint is selected and tested on the same split, so the test metrics are optimistic; %s",
            "--val_fraction 0.1 selects on a part of the training folders, unlike the publication"
            if flags.dataset == "sen12flood"
            else "choose another --val_split",
        )
    if flags.train_fraction < 1:
        whole, splits["train"] = (
            splits["train"],
            draw_fraction(splits["train"], flags.train_fraction, flags.draw_seed),
        )
        log_class_balance(whole, splits["train"])
    log_splits(splits)
    warn_of_absent_classes(splits["train"])
    with ranks.together():
        config = configure(flags, checkpoint, splits["train"], machine)
        samples = SamplesWithIds(splits["train"], config.crops or 1)
        loader = build_loader(samples, config, ranks)
    log_configuration(config, flags)
    log_statistics(config, splits["train"], checkpoint)
    data = {name: check_data(dataset, config, ranks, read_once=name == "test") for name, dataset in splits.items()}
    with ranks.together():
        training = build_training(config, ranks.device, checkpoint)
    training.data = sample_counts({name: data[name] for name in ("train", "val")}, checkpoint)
    checkpoint = None  # frees its tensors
    fingerprints = [data[name]["fingerprint"] for name in ("train", "val")]
    if config.dataset in OWN:  # whose classes and labels a table may change
        fingerprints += [label_checksum(splits[name]) for name in ("train", "val")]
    same = SAME_RUN + (SAME_SEGMENTATION if task_of(config) is SEGMENTATION else ())
    run = Finetuning(
        config, ranks, training, loader, run_identity(config, same, ranks.world_size, fingerprints), splits
    )
    run.log_steps(len(samples), lr_given=flags.lr is not None)
    with run.opened(data):
        if config.train_fraction < 1:
            ids = pd.DataFrame({"id": splits["train"].ids})
            ranks.on_main(write_frame, run.directory.path / "train_ids.csv", ids)
        run.train()
        log.info("Training time %s", duration(time.monotonic() - started))
        run.report()


def main():
    flags = parse_flags()
    ranks = start_ranks(flags)
    setup_logging(logging.INFO if ranks.is_main else logging.ERROR, sys.stdout, force=True)
    log_flags(flags)
    check_one_command(flags, ranks)
    if works_with_checkpoint(flags):
        use_checkpoint(flags, ranks)
    else:
        finetune(flags, ranks)
    ranks.close()


if __name__ == "__main__":
    leave(run_program(main))
