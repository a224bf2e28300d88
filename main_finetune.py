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
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from timm.data import Mixup

import engine_finetune
from common.command_line import Parser, non_negative, positive_int, positive_share, rate, share
from common.console import setup_logging
from common.ending import leave, run_program
from common.errors import DataError, UsageError
from evaluation import evaluate, metrics_source, use_checkpoint
from models_mixmim import ENCODERS, size_of
from models_sen12_ft import PATCH_CUTS, PATCH_OPS
from pretrained import FLOOD, build_model, build_preparation, classifier_defaults, load_weights, task_of
from sarwmix.chips import METADATA
from sarwmix.helper import FILES, Selection
from sarwmix.listing import SPLITS
from sarwmix.packed_store import IMAGES, SAMPLES
from sarwmix.registry import DATASETS
from util.checkpoint import load_checkpoint
from util.checkpoint_input import STARTED_WITH, LoadedCheckpoint, add_force_flag, flags_of
from util.configuration import (
    can_write,
    log_configuration,
    log_statistics,
    machine_settings,
    need,
    need_statistics,
    read_statistics,
    settle,
)
from util.datasets import SamplesWithIds, add_data_flags, build_dataset, build_loader, check_data, drop_missing
from util.distributed import start_ranks
from util.lr_decay import param_groups_lrd
from util.misc import duration, log_flags
from util.program import (
    add_distributed_flags,
    add_run_flags,
    add_schedule_flags,
    add_speed_flags,
    check_common_flags,
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
OF_DATA = (*METADATA, SAMPLES, IMAGES)  # names of files in --data_path that results must not replace
HEAD_STD = 2e-5  # of the new head's weights, so that training starts from nearly equal logits
FRACTION_STREAM = 4  # of the draw of --train_fraction


# ---- Flags ---------------------------------------------------------------------------------------


def build_parser():
    """The flags of this program, in groups."""
    parser = Parser(
        description="Finetune a SAR-W-MixMAE encoder: BigEarthNet (multi-label), SEN12-FLOOD (image pairs), or images "
        "of one's own (chips: one label each, or several)."
    )
    parser.set_defaults(task=None)  # of TASKS; chips and checkpoints state it
    add_task_flags(parser)
    add_model_flags(parser)
    add_split_flags(parser)
    group = add_schedule_flags(parser, batch_size=128, epochs=50, warmup_epochs=5, blr=5e-4, min_lr=1e-6)
    group.add_argument(
        "--layer_decay",
        type=positive_share,
        default=0.7,
        metavar="FACTOR",
        help="learning rate of a block relative to the next",
    )
    add_mixing_flags(parser)
    group = add_run_flags(parser, output_dir="output/finetune")
    group.add_argument(
        "--dist_eval",
        action="store_true",
        default=True,
        help="spread evaluation over the ranks, every sample exactly once (the default), rather than rank 0 alone",
    )
    group.add_argument("--no_dist_eval", action="store_false", dest="dist_eval")
    add_speed_flags(parser)
    add_distributed_flags(parser)
    return parser


def add_task_flags(parser):
    """Flags that use a checkpoint as it is."""
    group = parser.add_argument_group("what to do", "without any of these: finetune, then evaluate what was selected")
    group.add_argument("--eval", action="store_true", help="evaluate a checkpoint, named with --finetune or --resume")
    group.add_argument(
        "--predictions",
        metavar="FILE",
        help="with --eval: a row per sample, with id, labels and probabilities (.csv or .parquet)",
    )
    group.add_argument(
        "--predict",
        metavar="FILE",
        help="write the probabilities of a checkpoint's classes for images with or without labels (.csv, .parquet, or "
        ".tif where the images are tiles of a scene: a band per class)",
    )
    group.add_argument(
        "--embed",
        metavar="FILE",
        help="write the features of a checkpoint's encoder with ids, labels and, where they are known, outlines (.npz, "
        ".parquet, or .tif where the images are tiles of a scene)",
    )
    group.add_argument(
        "--embed_bands",
        choices=("pca", "all"),
        default="pca",
        help="bands of a .tif of --embed: the first three principal components of the features, or all features",
    )
    group.add_argument(
        "--export",
        metavar="DIR",
        help="write a checkpoint as safetensors and as a program for PyTorch alone, with config.json and a model card; "
        "with --eval, its metrics are put into the card",
    )
    add_force_flag(group)


def add_model_flags(parser):
    """Flags of the classifier, and of the checkpoint that it starts from."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--finetune",
        metavar="PATH",
        help="start from this checkpoint, exported folder or folder of a run; '' is random initialisation",
    )
    group.add_argument(
        "--model", choices=tuple(ENCODERS), help="size of the model (default: that of the checkpoint, else mixmim_base)"
    )
    group.add_argument(
        "--input_size",
        type=positive_int,
        metavar="PIXELS",
        help="side of the input; default: that of the checkpoint, else "
        "128; floods: that of the images, a multiple of 128",
    )
    group.add_argument(
        "--nb_classes", type=positive_int, metavar="N", help="classes (default, and only choice: those of the dataset)"
    )
    group.add_argument("--drop_path", type=rate, default=0.1, metavar="RATE", help="stochastic depth of the last block")
    group.add_argument("--freeze_encoder", action="store_true", help="train the head alone (linear probe)")
    group.add_argument(
        "--patch_cut",
        choices=PATCH_CUTS,
        help="sen12flood: cut images into patches of VH and VV, or as the released "
        "code does (default: vhvv; released for its checkpoints)",
    )
    group.add_argument(
        "--patch_op", choices=PATCH_OPS, help="sen12flood: mean or maximum of the patches' differences (default: avg)"
    )


def add_split_flags(parser):
    """Flags of the data, and of the parts to train on, to select on and to test on."""
    group = add_data_flags(parser)
    group.add_argument(
        "--dataset",
        choices=tuple(DATASETS),
        help="BigEarthNet v1 or v2, SEN12-FLOOD, or images of one's own (chips); can be left out where a checkpoint of "
        "ours is used on data of its own kind",
    )
    group.add_argument(
        "--split",
        choices=SPLITS,
        help="part to train on (default: train), or to evaluate, predict or embed (default: test; to predict "
        "or embed chips: all)",
    )
    group.add_argument(
        "--val_split",
        choices=SPLITS,
        help="part that selects the checkpoint (default: val; sen12flood without --val_fraction: test, as published)",
    )
    group.add_argument(
        "--test_split", choices=(*SPLITS, "none"), default="test", help="part the selected checkpoint is evaluated on"
    )
    group.add_argument("--val_metadata", nargs="+", metavar="FILE", help="as --metadata, for --val_split")
    group.add_argument("--test_metadata", nargs="+", metavar="FILE", help="as --metadata, for --test_split")
    group.add_argument(
        "--train_fraction",
        type=positive_share,
        default=1.0,
        metavar="SHARE",
        help="share of the training samples to use, drawn at random; smaller shares are parts of larger ones",
    )


def add_mixing_flags(parser):
    """Flags of mixup, cutmix and label smoothing."""
    group = parser.add_argument_group("mixing of samples", "off by default, as in the published recipe")
    group.add_argument("--mixup", type=non_negative, default=0.0, metavar="ALPHA", help="mixup above 0")
    group.add_argument("--cutmix", type=non_negative, default=0.0, metavar="ALPHA", help="cutmix above 0")
    group.add_argument(
        "--cutmix_minmax",
        type=positive_share,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="cutmix with a share of the side between these",
    )
    group.add_argument("--mixup_prob", type=share, default=1.0, metavar="P", help="probability of mixing at all")
    group.add_argument(
        "--mixup_switch_prob", type=share, default=0.5, metavar="P", help="probability of cutmix where both are on"
    )
    group.add_argument(
        "--mixup_mode", choices=("batch", "pair", "elem"), default="batch", help="what has a share of its own"
    )
    group.add_argument(
        "--smoothing", type=rate, default=0.0, metavar="S", help="label smoothing: 1 becomes 1 − S/2, 0 becomes S/2"
    )


def parse_flags(argv=None):
    """The flags as Config. Those that are left to the checkpoint, the dataset or the machine are None."""
    return build_parser().parse_checked(argv, check_flags)


def check_flags(flags):
    """Refuses flags that contradict each other, before any work. Returns Config. Raises UsageError."""
    check_common_flags(flags, needs_data=not flags.export or flags.eval or flags.embed or flags.predict)
    need(
        not flags.cutmix_minmax or flags.cutmix_minmax[0] <= flags.cutmix_minmax[1],
        "--cutmix_minmax: two shares above 0 and at most 1 are needed, the smaller one first",
    )
    need(
        not mixes(flags) or flags.batch_size % 2 == 0,
        f"--batch_size {flags.batch_size}: must be even, as samples are mixed in pairs",
    )
    check_outputs(flags)
    if works_with_checkpoint(flags):
        need(
            (flags.finetune or flags.resume) and flags.resume != "auto",
            "name the checkpoint to use with --finetune PATH",
        )
    else:
        check_training(flags)
    published = flags.dataset == "sen12flood" and not flags.val_fraction
    given = settle(
        flags,
        read_statistics(flags.statistics),
        {"draw_seed": flags.seed},
        {} if works_with_checkpoint(flags) else {"split": "train"},
        {"stop_epoch": flags.epochs},
        {} if works_with_checkpoint(flags) else {"val_split": "test" if published else "val"},
    )
    if flags.freeze_encoder:
        given = given.changed(drop_path=0.0)  # features of a frozen encoder are what they will be in use
    if not works_with_checkpoint(flags) and not flags.finetune:
        some = {"task": "multiclass", "nb_classes": 2}  # for chips, which state them once they are opened
        build_model(settle(given, classifier_defaults(given.dataset), some), meta=True)
    return given


def check_outputs(flags):
    """Refuses places where what is asked for cannot be written. Raises UsageError."""
    need(flags.eval or not flags.predictions, "--predictions: needs --eval")
    target = Path(flags.export or "")
    need(
        not flags.export or not target.exists() or target.is_dir() and not any(target.iterdir()),
        f"--export {flags.export}: exists and is not an empty folder; choose another",
    )
    kinds_of = {
        "predictions": (".csv", ".parquet"),
        "predict": (".csv", ".parquet", ".tif"),
        "embed": (".npz", ".parquet", ".tif"),
    }
    for name, kinds in kinds_of.items():
        path = getattr(flags, name)
        need(not path or Path(path).suffix in kinds, f"--{name} {path}: its name must end in {' or '.join(kinds)}")
        need(not path or Path(path).parent.is_dir(), f"--{name} {path}: there is no such folder; make it")
        need(not path or not Path(path).is_dir(), f"--{name} {path}: is a folder; choose another name")
    files = {name: Path(getattr(flags, name)).resolve() for name in kinds_of if getattr(flags, name)}
    read = {Path(path).resolve() for path in flags.metadata or ()}
    for name, path in files.items():
        twice = next((other for other in files if other != name and files[other] == path), None)
        need(twice is None, f"--{name} {path}: is the file of --{twice} as well; choose another name")
        own = flags.data_path and path.is_relative_to(Path(flags.data_path).resolve())
        image = flags.dataset == "chips" and path.suffix == ".tif"
        need(
            not path.exists() or path not in read and not (own and (image or path.name in OF_DATA)),
            f"--{name} {path}: is a file of the data, which would be lost; choose another name",
        )
    for name in (*kinds_of, "export", *(("output_dir",) if flags.eval else ())):
        path = getattr(flags, name)
        need(not path or can_write(path), f"--{name} {path}: cannot be written there; choose another place")
    need(not Path(flags.output_dir).is_file(), f"--output_dir {flags.output_dir}: is a file; choose a folder")


def check_training(flags):
    """Refuses flags that a finetuning cannot start with. Raises UsageError."""
    need(flags.dataset is not None, f"--dataset is missing: one of {', '.join(DATASETS)}")
    need(
        flags.finetune is not None or flags.resume,
        "--finetune is missing: the checkpoint to start from, or '' for random initialisation",
    )
    need(
        flags.dataset in ("sen12flood", "chips") or not flags.val_fraction,
        "--val_fraction: only sen12flood and chips need it; BigEarthNet has a validation split",
    )
    need(flags.split not in ("test", "all"), f"--split {flags.split}: would train on the test split")
    check_class_number(flags, DATASETS[flags.dataset].CLASSES)


def check_class_number(flags, classes):
    """Refuses another number of classes than the dataset has. Raises UsageError."""
    need(
        not classes or flags.nb_classes in (None, len(classes)),
        f"--nb_classes {flags.nb_classes}: --dataset {flags.dataset} has {len(classes)} classes",
    )


def works_with_checkpoint(flags):
    """Whether a checkpoint is used as it is, and nothing trained."""
    return bool(flags.eval or flags.predict or flags.embed or flags.export)


def mixes(flags):
    return flags.mixup > 0 or flags.cutmix > 0 or flags.cutmix_minmax is not None


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
                f"{len(both)} of {len(splits[name])} samples of split '{getattr(flags, f'{name}_split')}' would be "
                f"trained on too: {', '.join(both[:3])}{', …' if len(both) > 3 else ''}; choose other splits, or give "
                f"lists of its own with --{name}_metadata"
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
    absent = [row[0] for row in rows if row[2] == 0]
    if absent:
        log.warning("no training sample of %d classes: %s", len(absent), ", ".join(absent))


# ---- Finetuning ----------------------------------------------------------------------------------


def configure(flags, checkpoint, images, machine):
    """The configuration: flags → what the checkpoint states → program and dataset → machine.

    checkpoint: the LoadedCheckpoint that the training starts from, or None. images: the training split, whose size is
    the input size of floods. machine: of `machine_settings`. Raises UsageError, also for a model that cannot be built.
    """
    facts = images if flags.dataset == "chips" else DATASETS[flags.dataset]  # chips state their classes and statistics
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
    need_statistics(config)
    with flags_of(checkpoint and checkpoint.path):
        build_model(config, meta=True)
    return config


def build_training(config, device, checkpoint=None):
    """AdamW with (0.9, 0.999) and layer decay; the head, new, with weights of std 2e-5; everything from config.seed.

    checkpoint: the LoadedCheckpoint whose encoder the model starts from, or None.
    """
    torch.manual_seed(config.seed)
    model = build_model(config)
    resampled = load_weights(model, checkpoint, head=False) if checkpoint else ()
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

    train_one_epoch = engine_finetune.train_one_epoch  # a function of (run, epoch), here as a method

    def __init__(self, config, ranks, training, loader, identity, splits):
        super().__init__(config, ranks, training, loader, identity, datasets=splits.values())
        self.splits, self.task = splits, task_of(config)
        self.criterion, self.mixup = self.task.criterion, build_mixup(config)
        self.selection = Selection(self.task.name)

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
                    f"{start.source}: epoch {entry['epoch']} was selected into {FILES[rule]}, which is not beside it; "
                    "copy it there"
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
            f"  best by {', '.join(held)}" if held else "",
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
            f"{path} is of epoch {state['epoch']}, but epoch {epoch} was selected; it was written by another run. "
            f"Evaluate the checkpoint you mean with --eval"
        )
    return state


def label_checksum(dataset):
    """SHA-256 of the classes and the labels of a dataset."""
    return hashlib.sha256("\n".join(dataset.CLASSES).encode() + dataset.label_table().tobytes()).hexdigest()


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
            "the checkpoint is selected on the split it is tested on, so its test figures are optimistic; %s",
            "--val_fraction 0.1 selects on training folders instead of as published"
            if flags.dataset == "sen12flood"
            else "choose another --val_split",
        )
    if flags.train_fraction < 1:
        whole, splits["train"] = (
            splits["train"],
            draw_fraction(splits["train"], flags.train_fraction, flags.draw_seed),
        )
        log_class_balance(whole, splits["train"])
    with ranks.together():
        config = configure(flags, checkpoint, splits["train"], machine)
        loader = build_loader(SamplesWithIds(splits["train"]), config, ranks)
    log_configuration(config, flags)
    log_statistics(config, splits["train"], checkpoint)
    data = {name: check_data(dataset, config, ranks, read_once=name == "test") for name, dataset in splits.items()}
    with ranks.together():
        training = build_training(config, ranks.device, checkpoint)
    training.data = sample_counts({name: data[name] for name in ("train", "val")}, checkpoint)
    checkpoint = None  # frees its tensors
    fingerprints = [data[name]["fingerprint"] for name in ("train", "val")]
    if config.dataset == "chips":  # whose classes and labels a table may change
        fingerprints += [label_checksum(splits[name]) for name in ("train", "val")]
    run = Finetuning(
        config, ranks, training, loader, run_identity(config, SAME_RUN, ranks.world_size, fingerprints), splits
    )
    run.log_steps(len(splits["train"]), lr_given=flags.lr is not None)
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
