# SPDX-License-Identifier: MIT
"""What a classifier does on a split, and --eval, --embed and --export of main_finetune.py: a checkpoint as it is."""

import logging
from pathlib import Path

from common.errors import DataError, Interrupted, UsageError
from engine_finetune import predict
from models_mixmim import size_of
from pretrained import (
    FLOOD_SIZE,
    TASKS,
    build_model,
    build_preparation,
    check_classes,
    fill_defaults,
    has_head,
    load_weights,
)
from sarwmix.registry import DATASETS
from util.checkpoint import find_checkpoint, load_checkpoint
from util.checkpoint_input import flags_of, settle_input
from util.datasets import build_dataset, build_test_loader, check_data, drop_missing, log_statistics
from util.export import export
from util.program import apply_speed_flags
from util.reports import log_headline, log_metrics, scalars, write_features, write_metrics, write_predictions
from util.training import samples_of

log = logging.getLogger(__name__)


def evaluate(task, model, prepare, dataset, args, ranks, between=None):
    """Loss and metrics of a split, the same on every rank: (dict, probabilities (N, K) float64). between: as in `predict`."""
    loader = build_test_loader(dataset, args, ranks, args.dist_eval)
    try:
        logits, labels = predict(model, prepare, loader, ranks, args.amp, between=between)
    except Interrupted:
        between()  # which ends the run
        raise
    probabilities = task.activate(logits.double())

    def measure():
        try:
            return {"loss": task.criterion(logits, labels).item(), **task.metrics(probabilities, labels)}
        except ValueError as error:
            raise DataError(f"split '{dataset.split}': {error}") from None

    return ranks.together(measure), probabilities


def open_checkpoint(args):
    """(state, the flags completed by what it says) of --finetune or --resume. Raises UsageError where they contradict."""
    path = args.checkpoint = find_checkpoint(args.checkpoint)
    state = load_checkpoint(path)
    trained = state.get("args", {})
    args.dataset = args.dataset or trained.get("dataset")
    if args.dataset not in DATASETS:
        raise UsageError(f"--dataset is missing, and {path} does not say it: one of {', '.join(DATASETS)}")
    if args.eval:
        check_classes(state, path, args)
    args = settle_input(args, state, path, size_of(state["model"]))
    fill_defaults(args)
    log_statistics(args, (path, state))
    if not args.val_fraction:  # what was kept apart in training stays so
        args.val_fraction, args.draw_seed = (
            trained.get(name, getattr(args, name)) for name in ("val_fraction", "draw_seed")
        )
    return state, args


def build_trained(args, state):
    """The model of the flags with a checkpoint's weights, and its head where it has one. Raises UsageError."""
    with flags_of(args.checkpoint):
        model = build_model(args)
    load_weights(model, state, args.checkpoint, head=has_head(state))
    return apply_speed_flags(model, args)


def use_checkpoint(args, ranks):
    """--eval, --embed and --export: what a checkpoint does on a split, as it is."""
    state, args = ranks.together(lambda: open_checkpoint(args))
    task, path, metrics, data = TASKS[args.dataset], args.checkpoint, {}, {}
    if args.eval or args.embed:
        dataset = drop_missing(ranks.together(lambda: build_dataset(args, supervised=bool(args.eval))), args, ranks)
        args.input_size = args.input_size or dataset.size
        data = samples_of({args.split: check_data(dataset, args, ranks, read_once=True)})
        model = ranks.together(lambda: build_trained(args, state)).to(ranks.device)
        prepare = build_preparation(args).to(ranks.device)
        log.info(
            "%s: %s, epoch %s, on %d samples of %s, split %s",
            path,
            args.model,
            state.get("epoch"),
            len(dataset),
            args.dataset,
            args.split,
        )
    if args.eval:
        metrics, probabilities = evaluate(task, model, prepare, dataset, args, ranks)
        log_metrics(metrics, dataset.CLASSES)
        log_headline(task.headline, metrics)
        ranks.on_main(
            lambda: write_metrics(
                Path(args.output_dir) / f"eval_{args.split}.json",
                metrics,
                checkpoint=str(path),
                dataset=args.dataset,
                split=args.split,
                samples=len(dataset),
                epoch=state.get("epoch"),
            )
        )
        if args.predictions:
            ranks.on_main(lambda: write_predictions(args.predictions, dataset, probabilities))
    if args.embed:
        features, _ = predict(
            model, prepare, build_test_loader(dataset, args, ranks, args.dist_eval), ranks, args.amp, features=True
        )
        ranks.on_main(lambda: write_features(args.embed, dataset, features))
    if args.export:
        args.input_size = args.input_size or FLOOD_SIZE
        classes = DATASETS[args.dataset].CLASSES if has_head(state) else None
        ranks.on_main(
            lambda: export(
                args.export,
                state,
                args,
                classes,
                {args.split: scalars(metrics)} if metrics else {},
                data if metrics else {},
            )
        )
