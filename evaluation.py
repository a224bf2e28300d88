# SPDX-License-Identifier: MIT
"""What a classifier does on a split, and --eval, --embed and --export of main_finetune.py: a checkpoint as it is."""

import logging
from pathlib import Path

from common.errors import DataError, Interrupted, UsageError
from engine_finetune import predict
from exported_program import build_program
from models_mixmim import size_of
from pretrained import (
    FLOOD_SIZE,
    TASKS,
    build_model,
    build_preparation,
    check_classes,
    classifier_defaults,
    load_weights,
)
from sarwmix.registry import DATASETS
from util.checkpoint_input import LoadedCheckpoint, flags_of
from util.configuration import log_configuration, log_statistics, machine_settings, settle
from util.datasets import build_dataset, build_test_loader, check_data, drop_missing
from util.export import export
from util.program import apply_speed_flags
from util.reports import log_headline, log_metrics, scalars, write_features, write_metrics, write_predictions
from util.training import sample_counts

log = logging.getLogger(__name__)


def evaluate(model, prepare, dataset, config, ranks, between=None):
    """Loss and metrics of a split, the same on every rank: (dict, probabilities (N, K) float64).

    between: as in `predict`.
    """
    task = TASKS[config.dataset]
    loader = build_test_loader(dataset, config, ranks, config.dist_eval)
    try:
        logits, labels = predict(model, prepare, loader, ranks, config.amp, between=between)
    except Interrupted:
        between()  # which ends the run
        raise
    probabilities = task.activate(logits.double())
    with ranks.together():
        try:
            metrics = {"loss": task.criterion(logits, labels).item(), **task.metrics(probabilities, labels)}
        except ValueError as error:
            raise DataError(f"split '{dataset.split}': {error}") from None
    return metrics, probabilities


def use_checkpoint(flags, ranks):
    """--eval, --embed and --export: what a checkpoint does on a split, as it is."""
    machine = machine_settings(flags, ranks)
    with ranks.together():
        checkpoint = LoadedCheckpoint.load(flags.finetune or flags.resume, size_of)
        config = configure(flags, checkpoint, machine)
        log_statistics(config, DATASETS[config.dataset], checkpoint)
    metrics, data = {}, {}
    if config.eval or config.embed:
        with ranks.together():
            dataset = build_dataset(config, supervised=bool(config.eval))
        dataset = drop_missing(dataset, config, ranks)
        config = settle(config, {"input_size": dataset.size})
        data = sample_counts({config.split: check_data(dataset, config, ranks, read_once=True)})
        with ranks.together():
            model = apply_speed_flags(build_trained(config, checkpoint), config).to(ranks.device)
            prepare = build_preparation(config).to(ranks.device)
        log.info(
            "%s: %s, epoch %s, on %d samples of %s, split %s",
            checkpoint.path,
            config.model,
            checkpoint.state.get("epoch"),
            len(dataset),
            config.dataset,
            config.split,
        )
    config = settle(config, {"input_size": FLOOD_SIZE})
    log_configuration(config, flags)
    if config.eval:
        metrics, probabilities = evaluate(model, prepare, dataset, config, ranks)
        log_metrics(metrics, dataset.CLASSES)
        log_headline(TASKS[config.dataset].headline, metrics)
        where = metrics_source(config, checkpoint.path, dataset, checkpoint.state.get("epoch"))
        ranks.on_main(write_metrics, Path(config.output_dir) / f"eval_{config.split}.json", metrics, **where)
        if config.predictions:
            ranks.on_main(write_predictions, config.predictions, dataset, probabilities)
    if config.embed:
        loader = build_test_loader(dataset, config, ranks, config.dist_eval)
        features, _ = predict(model, prepare, loader, ranks, config.amp, features=True)
        ranks.on_main(write_features, config.embed, dataset, features)
    if config.export:
        measured = {config.split: scalars(metrics)} if metrics else {}
        ranks.on_main(export_checkpoint, config, checkpoint, measured, data if metrics else {})


def configure(flags, checkpoint, machine):
    """The configuration: flags → what the checkpoint states → its dataset → the machine. Raises UsageError.

    The input size of floods may stay None, for the dataset to state.
    """
    trained = checkpoint.flags()
    flags = settle(flags, {"dataset": trained.get("dataset")})
    if flags.dataset not in DATASETS:
        raise UsageError(f"--dataset is missing, and {checkpoint.path} does not say it: one of {', '.join(DATASETS)}")
    if flags.eval:
        check_classes(checkpoint, flags.dataset)
    config = settle(flags, checkpoint.used_as_is(flags), classifier_defaults(flags.dataset))
    if not config.val_fraction:  # the folders that were kept apart in training are kept apart here
        kept = {name: trained[name] for name in ("val_fraction", "draw_seed") if name in trained}
        config = config.changed(**kept)
    return settle(config, machine)


def build_trained(config, checkpoint):
    """The model of the configuration with a checkpoint's weights, and its head where it has one. Raises UsageError."""
    with flags_of(checkpoint.path):
        model = build_model(config)
    load_weights(model, checkpoint, head=checkpoint.has_head)
    return model


def export_checkpoint(config, checkpoint, metrics, data):
    """--export: weights, program and model card. metrics, data: as of `export`. Raises UsageError, TrainingError."""
    classes = DATASETS[config.dataset].CLASSES if checkpoint.has_head else None
    program = build_program(
        build_trained(config, checkpoint), build_preparation(config), TASKS[config.dataset], features=classes is None
    )
    export(config.export, checkpoint.state, config, classes, metrics, data, program)


def metrics_source(config, path, dataset, epoch):
    """What metrics are of, for the file that holds them. path, epoch: of the checkpoint."""
    return {
        "checkpoint": str(path),
        "dataset": config.dataset,
        "split": dataset.split,
        "samples": len(dataset),
        "epoch": epoch,
    }
