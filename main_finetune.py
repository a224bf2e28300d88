# SPDX-License-Identifier: MIT
"""Finetune a pretrained encoder, and evaluate, embed or export what came out.

python main_finetune.py --dataset benv2 --data_path DIR --finetune CHECKPOINT --output_dir DIR
python main_finetune.py --eval --split test --data_path DIR --finetune DIR/checkpoint_best.pth
"""

import common.startup  # noqa: F401 (first: puts the environment right, reports a missing package)

# isort: split
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from timm.data import Mixup

from common.command_line import Parser
from common.console import setup_logging
from common.ending import leave, run_program
from common.errors import DataError, UsageError
from engine_finetune import train_one_epoch
from evaluation import evaluate, use_checkpoint
from models_mixmim import ENCODERS, size_of
from models_sen12_ft import PATCH_CUTS, PATCH_OPS
from pretrained import FLOOD, TASKS, build_model, build_preparation, fill_defaults, load_weights
from sarwmix.helper import FILES, Selection
from sarwmix.registry import DATASETS, SPLITS
from util.checkpoint import load_checkpoint
from util.checkpoint_input import STARTED_WITH, add_force_flag
from util.datasets import (
    SamplesWithIds,
    add_data_flags,
    build_dataset,
    build_loader,
    check_data,
    drop_missing,
    take_statistics,
)
from util.distributed import distribute, start_ranks
from util.lr_decay import param_groups_lrd
from util.misc import duration, log_flags
from util.optimization import autocast, settle_amp
from util.program import (
    add_distributed_flags,
    add_run_flags,
    add_schedule_flags,
    add_speed_flags,
    check_common_flags,
)
from util.reports import log_headline, log_metrics, log_table, scalars, shown, write_frame, write_metrics
from util.run_directory import RunDirectory
from util.stopping import Pauses
from util.training import (
    Training,
    after_epochs,
    check_alike,
    open_start,
    origin_of,
    same_run_facts,
    samples_of,
    settle_learning_rate,
)
from util.tuning import settle_execution

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
HEAD_STD = 2e-5  # of the new head's weights, so that training starts from nearly equal logits
FRACTION_STREAM = 4  # of the draw of --train_fraction


# ---- Flags ---------------------------------------------------------------------------------------


def build_parser():
    """The flags of this program, in groups."""
    parser = Parser(
        description="Finetune a SAR-W-MixMAE encoder: BigEarthNet (multi-label) or SEN12-FLOOD (image pairs)."
    )
    group = parser.add_argument_group("what to do", "without any of these: finetune, then evaluate what was selected")
    group.add_argument("--eval", action="store_true", help="evaluate a checkpoint, named with --finetune or --resume")
    group.add_argument(
        "--predictions",
        metavar="FILE",
        help="with --eval: a row per sample, with id, labels and probabilities (.csv or .parquet)",
    )
    group.add_argument(
        "--embed",
        metavar="FILE",
        help="write the features of a checkpoint's encoder with ids and labels (.npz or .parquet)",
    )
    group.add_argument(
        "--export",
        metavar="DIR",
        help="write a checkpoint as safetensors with config.json and a model card; "
        "with --eval, its metrics are put into the card",
    )
    add_force_flag(group)
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
        type=int,
        metavar="PIXELS",
        help="side of the input; default: that of the checkpoint, else "
        "128; floods: that of the images, a multiple of 128",
    )
    group.add_argument(
        "--nb_classes", type=int, metavar="N", help="classes (default, and only choice: those of the dataset)"
    )
    group.add_argument(
        "--drop_path", type=float, default=0.1, metavar="RATE", help="stochastic depth of the last block"
    )
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
    group = add_data_flags(parser)
    group.add_argument(
        "--dataset",
        choices=tuple(DATASETS),
        help="BigEarthNet v1 or v2, or SEN12-FLOOD; can be left out where a checkpoint of ours is evaluated",
    )
    group.add_argument(
        "--split", choices=SPLITS, help="part to train on (default: train), or to evaluate or embed (default: test)"
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
        "--val_fraction",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="sen12flood: share of the training folders, whole ones, that becomes the split val",
    )
    group.add_argument(
        "--train_fraction",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the training samples to use, drawn at random; smaller shares are parts of larger ones",
    )
    group.add_argument(
        "--draw_seed", type=int, metavar="N", help="of --train_fraction and --val_fraction (default: --seed)"
    )
    group = add_schedule_flags(parser, batch_size=128, epochs=50, warmup_epochs=5, blr=5e-4, min_lr=1e-6)
    group.add_argument(
        "--layer_decay", type=float, default=0.7, metavar="FACTOR", help="learning rate of a block relative to the next"
    )
    group = parser.add_argument_group("mixing of samples", "off by default, as in the published recipe")
    group.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="mixup above 0")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="cutmix above 0")
    group.add_argument(
        "--cutmix_minmax",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="cutmix with a share of the side between these",
    )
    group.add_argument("--mixup_prob", type=float, default=1.0, metavar="P", help="probability of mixing at all")
    group.add_argument(
        "--mixup_switch_prob", type=float, default=0.5, metavar="P", help="probability of cutmix where both are on"
    )
    group.add_argument(
        "--mixup_mode", choices=("batch", "pair", "elem"), default="batch", help="what has a share of its own"
    )
    group.add_argument(
        "--smoothing", type=float, default=0.0, metavar="S", help="label smoothing: 1 becomes 1 − S/2, 0 becomes S/2"
    )
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


def parse_flags(argv=None):
    """Parse and check the flags; anything wrong is one line and exit status 2."""
    return build_parser().parse_checked(argv, check_flags)


def check_flags(args):
    """Refuse values and pairs of flags that cannot be meant, before any work. Raises UsageError."""

    def need(ok, message):
        if not ok:
            raise UsageError(message)

    args.draw_seed = args.seed if args.draw_seed is None else args.draw_seed
    if args.export and not (args.eval or args.embed):
        args.data_path = args.data_path or ""  # not read
    take_statistics(args)
    check_common_flags(args)
    for name, low, high in (("train_fraction", 0, 1), ("layer_decay", 0, 1)):
        need(
            low < getattr(args, name) <= high, f"--{name} {getattr(args, name)}: must be above {low} and at most {high}"
        )
    for name in ("mixup_prob", "mixup_switch_prob"):
        need(0 <= getattr(args, name) <= 1, f"--{name} {getattr(args, name)}: a probability is needed")
    need(args.mixup >= 0 and args.cutmix >= 0, f"--mixup {args.mixup} and --cutmix {args.cutmix}: must be at least 0")
    need(0 <= args.smoothing < 1, f"--smoothing {args.smoothing}: must be at least 0 and below 1")
    need(0 <= args.val_fraction < 1, f"--val_fraction {args.val_fraction}: must be at least 0 and below 1")
    need(args.draw_seed >= 0, f"--draw_seed {args.draw_seed}: must be at least 0")
    need(
        not args.cutmix_minmax or 0 < args.cutmix_minmax[0] <= args.cutmix_minmax[1] <= 1,
        "--cutmix_minmax: two shares above 0 and at most 1 are needed, the smaller one first",
    )
    need(
        not mixes(args) or args.batch_size % 2 == 0,
        f"--batch_size {args.batch_size}: must be even, as samples are mixed in pairs",
    )
    need(args.eval or not args.predictions, "--predictions: needs --eval")
    target = Path(args.export or "")
    need(
        not args.export or not target.exists() or target.is_dir() and not any(target.iterdir()),
        f"--export {args.export}: exists and is not an empty folder; choose another",
    )
    for name, kinds in (("predictions", (".csv", ".parquet")), ("embed", (".npz", ".parquet"))):
        path = getattr(args, name)
        need(not path or Path(path).suffix in kinds, f"--{name} {path}: its name must end in {' or '.join(kinds)}")
        need(not path or Path(path).parent.is_dir(), f"--{name} {path}: there is no such folder; make it")
    for name in ("predictions", "embed", "export", *(("output_dir",) if args.eval else ())):
        path = getattr(args, name)
        need(not path or can_write(Path(path)), f"--{name} {path}: cannot be written there; choose another place")
    need(not Path(args.output_dir).is_file(), f"--output_dir {args.output_dir}: is a file; choose a folder")
    if works_with_checkpoint(args):
        args.checkpoint = args.finetune or args.resume
        need(args.checkpoint and args.resume != "auto", "name the checkpoint to use with --finetune PATH")
        args.split = args.split or "test"
        return
    need(args.dataset is not None, f"--dataset is missing: one of {', '.join(DATASETS)}")
    need(
        args.finetune is not None or args.resume,
        "--finetune is missing: the checkpoint to start from, or '' for random initialisation",
    )
    need(
        args.dataset == "sen12flood" or not args.val_fraction,
        "--val_fraction: only sen12flood needs it; BigEarthNet has a validation split",
    )
    need(args.split not in ("test", "all"), f"--split {args.split}: would train on the test split")
    classes = len(DATASETS[args.dataset].CLASSES)
    need(
        args.nb_classes in (None, classes),
        f"--nb_classes {args.nb_classes}: --dataset {args.dataset} has {classes} classes",
    )
    published = args.dataset == "sen12flood" and not args.val_fraction
    args.split, args.val_split = args.split or "train", args.val_split or ("test" if published else "val")
    if args.freeze_encoder:
        args.drop_path = 0.0  # features of a frozen encoder are what they will be in use
    if not args.finetune:
        complete(args)


def complete(args):
    """Fill in what neither a flag nor a checkpoint said, and see whether the model can be built. Raises UsageError."""
    fill_defaults(args)
    build_model(args, meta=True)


def can_write(path):
    """Whether a file or folder can be made at a path, as far as one can tell without trying."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return folder.is_dir() and os.access(folder, os.W_OK)


def works_with_checkpoint(args):
    """Whether a checkpoint is used as it is, and nothing trained."""
    return bool(args.eval or args.embed or args.export)


def mixes(args):
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


# ---- Data ----------------------------------------------------------------------------------------


def build_splits(args):
    """{"train", "val", "test": dataset}, without "test" for --test_split none. Raises DataError where they overlap."""
    splits = {
        "train": build_dataset(args, args.split, args.metadata, supervised=True),
        "val": build_dataset(args, args.val_split, args.val_metadata, supervised=True),
    }
    if args.test_split != "none":
        splits["test"] = build_dataset(args, args.test_split, args.test_metadata, supervised=True)
    trained_on = set(splits["train"].ids.tolist())
    for name in [name for name in splits if name != "train"]:
        both = [sample for sample in splits[name].ids.tolist() if sample in trained_on]
        if both:
            raise DataError(
                f"{len(both)} of {len(splits[name])} samples of split '{getattr(args, f'{name}_split')}' would be trained on "
                f"too: {', '.join(both[:3])}{', …' if len(both) > 3 else ''}; choose other splits, or give lists of its own "
                f"with --{name}_metadata"
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


def open_encoder(args):
    """The checkpoint of --finetune, None without one; completes the flags by what it says. Raises UsageError."""
    flood = (
        TASKS[args.dataset] is FLOOD
    )  # whose input_size is that of the images, not of the patches that the encoder takes
    return open_start(args, size_of, complete, [name for name in STARTED_WITH if not (flood and name == "input_size")])


def build_training(args, device, state=None):
    """AdamW with (0.9, 0.999) and layer decay; the head, new, with weights of std 2e-5; everything from args.seed.

    state: of `open_encoder`.
    """
    torch.manual_seed(args.seed)
    model, origin = build_model(args), None
    if state is not None:
        resampled = load_weights(model, state, args.finetune, head=False)
        origin = origin_of(state, args.finetune)
        log.info(
            "initialised from %s%s, with a new head%s",
            args.finetune,
            after_epochs(origin),
            f"; resampled: {', '.join(resampled)}" if resampled else "",
        )
    torch.nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)
    torch.nn.init.zeros_(model.head.bias)
    if args.freeze_encoder:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("head.")
    groups = param_groups_lrd(model, args.weight_decay, layer_decay=args.layer_decay)
    training = Training.build(model, build_preparation(args), groups, (0.9, 0.999), args, device)
    training.origin = origin
    return training


def build_mixup(args):
    """timm's Mixup for `engine_finetune.mix`, or None."""
    if not mixes(args):
        return None
    return Mixup(
        args.mixup,
        args.cutmix,
        args.cutmix_minmax,
        args.mixup_prob,
        args.mixup_switch_prob,
        args.mixup_mode,
        label_smoothing=0.0,
        num_classes=args.batch_size,
    )


def rehearsal(args, ranks):
    """A function of a model, maybe under DDP: a loss of a random batch of the shapes of training, the same at each call."""
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.randn(args.batch_size, 2, args.input_size, args.input_size, generator=generator).to(ranks.device)

    def loss_of(model):
        with autocast(ranks.device, args.amp):
            return model(*[images] * (2 if TASKS[args.dataset] is FLOOD else 1)).sum()

    return loss_of


def run_epochs(args, ranks, training, splits, loader, directory, start, facts, selection, pauses):
    """Train from the start to args.stop_epoch; after each epoch evaluate, select, and save."""
    task, classes = TASKS[args.dataset], list(splits["train"].CLASSES)
    wrapped, mixup, steps = (
        distribute(training.model, ranks, rehearsal(args, ranks)),
        build_mixup(args),
        loader.batch_sampler.steps,
    )
    size = sum(p.numel() for p in training.model.parameters())

    def save(epoch, progress=None, metrics=None, entry=None, names=()):
        state = training.state(epoch, args, facts, training.filled(ranks, *splits.values()), progress)
        state["input"]["classes"] = classes
        state["selection"] = selection.state_dict()
        directory.save(state if metrics is None else {**state, "metrics": metrics}, entry, names)

    for epoch in range(start.epoch, args.stop_epoch):
        unfinished = partial(save, epoch - 1)
        stats, progress = train_one_epoch(
            wrapped,
            training.prepare,
            task.criterion,
            loader,
            training.optimizer,
            training.scaler,
            epoch,
            ranks,
            args,
            mixup,
            directory.writer,
            start.progress if epoch == start.epoch else None,
            pauses.between_steps(epoch, steps, unfinished),
        )
        metrics, _ = evaluate(
            task,
            training.model,
            training.prepare,
            splits["val"],
            args,
            ranks,
            partial(pauses.pause, f"the evaluation of epoch {epoch}", partial(unfinished, progress)),
        )
        held = selection.update(epoch, metrics)
        log.info(
            "Epoch %d  %s  loss %.4f  %s%s",
            epoch,
            args.val_split,
            metrics["loss"],
            "  ".join(f"{name} {shown(metrics[name])}" for keys in task.headline.values() for name in keys),
            f"  best by {', '.join(held)}" if held else "",
        )
        filled = training.filled(ranks, *splits.values())
        if filled:
            log.warning(
                "%d no-data or non-finite pixels were filled so far: with %s",
                filled,
                "-60 dB" if task is FLOOD else "the channel's mean",
            )
        entry = {
            **{f"train_{name}": value for name, value in stats.items()},
            **{f"test_{name}": value for name, value in scalars(metrics).items()},
            "epoch": epoch,
            "n_parameters": size,
            "evaluated_split": args.val_split,
            "filled_pixels": filled,
        }
        if directory.writer is not None:
            for name, value in scalars(metrics).items():
                directory.writer.add_scalar(f"test_{name}", value, (epoch + 1) * 1000)
        pauses.save(partial(save, epoch, metrics=scalars(metrics), entry=entry, names=[FILES[rule] for rule in held]))
        pauses.pause(f"epoch {epoch + 1}, step 0/{steps}")
    if start.epoch >= args.stop_epoch:
        log.info("all %d epochs are done already", args.stop_epoch)


def go_on_selecting(selection, start, folder):
    """Take over what a continued run has selected. Raises UsageError if that is not there."""
    if start.source is None:
        return
    try:
        selection.load_state_dict(start.selection or {})
    except ValueError as error:
        raise UsageError(
            f"{start.source}: does not fit this run ({error}); to start from its weights only, use --finetune"
        ) from None
    for rule, entry in selection.state_dict().items():
        if not any((place / FILES[rule]).exists() for place in (folder, start.source.parent)):
            raise UsageError(
                f"{start.source}: epoch {entry['epoch']} was selected into {FILES[rule]}, which is not beside it; copy it there"
            )


def load_selected(path, epoch):
    """The checkpoint a rule selected. Raises UsageError if it is of another epoch, and so of another run."""
    state = load_checkpoint(path)
    if state["epoch"] != epoch:
        raise UsageError(
            f"{path} is of epoch {state['epoch']}, but epoch {epoch} was selected; it was written by another run. "
            f"Evaluate the checkpoint you mean with --eval"
        )
    return state


def report(args, ranks, training, splits, selection, folder, pauses):
    """Evaluate what was selected on the test split, and end with the table that log readers look for."""
    task, rule = TASKS[args.dataset], "best"
    epoch, metrics = selection.best(rule)
    for name, file in FILES.items():
        if name in selection.state_dict():
            log.info("%s: epoch %d", file, selection.best(name)[0])
    split = args.val_split
    if "test" in splits:
        path, split = folder / FILES[rule], args.test_split
        training.model.load_state_dict(ranks.together(lambda: load_selected(path, epoch))["model"])
        metrics, _ = evaluate(
            task,
            training.model,
            training.prepare,
            splits["test"],
            args,
            ranks,
            partial(pauses.pause, "the final evaluation"),
        )
        log_metrics(metrics, splits["test"].CLASSES)
        ranks.on_main(
            lambda: write_metrics(
                folder / f"eval_{split}.json",
                metrics,
                checkpoint=str(path),
                dataset=args.dataset,
                split=split,
                samples=len(splits["test"]),
                epoch=epoch,
            )
        )
    log.info("selected on split %s; the figures are of split %s", args.val_split, split)
    log.info("Best Results Summary: Epoch %d", epoch)
    log_headline(task.headline, metrics)


def finetune(args, ranks):
    """The whole job, from flags to the evaluation of the selected checkpoint."""
    started = time.monotonic()
    state = ranks.together(lambda: open_encoder(args))
    splits = {
        name: drop_missing(dataset, args, ranks) for name, dataset in ranks.together(lambda: build_splits(args)).items()
    }
    args.input_size = args.input_size or splits["train"].size
    if args.val_split == args.test_split:
        log.warning(
            "the checkpoint is selected on the split it is tested on, so its test figures are optimistic; %s",
            "--val_fraction 0.1 selects on training folders instead of as published"
            if TASKS[args.dataset] is FLOOD
            else "choose another --val_split",
        )
    if args.train_fraction < 1:
        whole, splits["train"] = splits["train"], draw_fraction(splits["train"], args.train_fraction, args.draw_seed)
        log_class_balance(whole, splits["train"])
    loader = ranks.together(lambda: build_loader(SamplesWithIds(splits["train"]), args, ranks))
    summary = {name: check_data(dataset, args, ranks, read_once=name == "test") for name, dataset in splits.items()}
    steps = loader.batch_sampler.steps
    global_batch = settle_learning_rate(args, ranks, len(splits["train"]), steps)
    training = ranks.together(lambda: build_training(args, ranks.device, state))
    training.data = samples_of({name: summary[name] for name in ("train", "val")}, state)
    state = None  # its tensors are free
    facts = same_run_facts(
        vars(args), SAME_RUN, ranks.world_size, [summary[name]["fingerprint"] for name in ("train", "val")]
    )
    selection = Selection(TASKS[args.dataset].name)
    with RunDirectory(args.output_dir, ranks) as directory:
        directory.open(resume=bool(args.resume), overwrite=args.overwrite)
        start = ranks.together(lambda: training.resume(args, facts, steps))
        check_alike(start, ranks, args.output_dir)
        ranks.together(lambda: go_on_selecting(selection, start, directory.path))
        if start.source is None and not args.finetune:
            log.info("random initialisation")
        settle_execution(training, rehearsal(args, ranks), args, ranks, start)
        directory.begin(training.record(args, ranks, summary, global_batch), start, steps, args.log_dir, args.overwrite)
        if args.train_fraction < 1:
            ranks.on_main(
                lambda: write_frame(directory.path / "train_ids.csv", pd.DataFrame({"id": splits["train"].ids}))
            )
        with Pauses(args, ranks, training.bytes()) as pauses:
            run_epochs(args, ranks, training, splits, loader, directory, start, facts, selection, pauses)
            log.info("Training time %s", duration(time.monotonic() - started))
            report(args, ranks, training, splits, selection, directory.path, pauses)


def main():
    args = parse_flags()
    ranks = start_ranks(args)
    setup_logging(logging.INFO if ranks.is_main else logging.ERROR, sys.stdout, force=True)
    log_flags(args)
    args.amp = settle_amp(args.amp, ranks)
    if works_with_checkpoint(args):
        use_checkpoint(args, ranks)
    else:
        finetune(args, ranks)
    ranks.close()


if __name__ == "__main__":
    leave(run_program(main))
