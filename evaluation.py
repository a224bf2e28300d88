# SPDX-License-Identifier: MIT
"""What a model does on a split, and --eval, --embed and --export of main_finetune.py: a checkpoint as it is."""

import logging
import signal
import sys
from pathlib import Path

from common.errors import DataError, Interrupted, UsageError, data_error
from engine_finetune import predict
from engine_segment import probabilities, score
from exported_program import build_program
from models_mixmim import size_of
from pretrained import (
    FLOOD_SIZE,
    SEGMENTATION,
    build_model,
    build_preparation,
    check_classes,
    classifier_defaults,
    has_classes,
    load_weights,
    task_of,
)
from sarwmix.raster import Image, find_images, reading_of
from sarwmix.registry import DATASETS, OWN
from util.checkpoint_input import LoadedCheckpoint, flags_of
from util.configuration import log_configuration, log_statistics, machine_settings, need, need_statistics, settle
from util.datasets import build_dataset, build_test_loader, check_data, drop_missing
from util.export import export
from util.maps import grids_of, map_paths
from util.program import apply_speed_flags
from util.reports import (
    log_headline,
    log_metrics,
    scalars,
    write_confusions,
    write_features,
    write_metrics,
    write_predictions,
    write_probabilities,
)
from util.scene_maps import map_scene
from util.sliding import Windows
from util.training import sample_counts

TASK_NAMES = {"multilabel": "several labels", "multiclass": "one label", "flood": "floods", "segmentation": "masks"}

# Flags without effect on what is done with a checkpoint, and those without effect if no dataset is opened.
OF_TRAINING = ("lr",)
OF_IMAGES = ("split", "val_fraction", "test_fraction", "draw_seed", "num_workers")

log = logging.getLogger(__name__)


def evaluate(model, prepare, dataset, config, ranks, between=None):
    """Loss and metrics of a split, the same on every rank: (dict, probabilities (N, K) float64).

    For segmentation (dict, confusion (N, K, K) of each image). between: as in `engine_finetune.each_batch`.
    """
    task = task_of(config)
    loader = build_test_loader(dataset, config, ranks, config.dist_eval)
    try:
        if task is SEGMENTATION:
            results = score(model, prepare, loader, ranks, config.amp, windows_of(config), between)
        else:
            results = predict(model, prepare, loader, ranks, config.amp, between=between)
    except Interrupted:
        between()  # which ends the run
        raise
    summary = _pixel_summary if task is SEGMENTATION else _image_summary
    with ranks.together():
        try:
            return summary(task, *results)
        except ValueError as error:
            raise DataError(f"split '{dataset.split}': {error}") from None


def _image_summary(task, logits, labels):
    probabilities = task.activate(logits.double())
    return {"loss": task.criterion(logits, labels).item(), **task.metrics(probabilities, labels)}, probabilities


def _pixel_summary(task, confusion, ignored, losses):
    metrics, pixels = task.metrics(confusion.sum(0)), int(confusion.sum())
    counts = {"pixels": pixels, "ignored_pixels": int(ignored.sum())}
    return {"loss": losses.sum().item() / pixels, **metrics, **counts}, confusion


def windows_of(config):
    """The Windows in which a segmentation model predicts larger images."""
    return Windows(config.input_size, config.overlap, config.batch_size)


def use_checkpoint(flags, ranks):
    """--eval, --predict, --embed and --export: what a checkpoint does on a split, as it is."""
    checkpoint, config, classes = open_checkpoint(flags, ranks)
    metrics, data = {}, {}
    if config.eval or config.embed or (config.predict and not config.output_map):
        with ranks.together():
            dataset = build_dataset(config, supervised=bool(config.eval), classes=classes)
            if config.eval and dataset.task != config.task and not has_classes(config.dataset):
                raise UsageError(
                    f"{checkpoint.path}: was trained on {TASK_NAMES[config.task]}, but {config.data_path} has "
                    f"{TASK_NAMES[dataset.task]}; give a table of the same kind with --metadata"
                )
        dataset = drop_missing(dataset, config, ranks)
        with ranks.together():
            for flag, path in (("--predict", config.predict), ("--embed", config.embed)):
                if path and Path(path).suffix == ".tif":
                    grids_of(dataset.georeference(), dataset.size, flag)  # refuses what has no map before any work
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
    log_configuration(config, flags, OF_TRAINING + (OF_IMAGES if not data else ()))
    if config.eval:
        metrics, results = evaluate(model, prepare, dataset, config, ranks)
        log_metrics(metrics, dataset.CLASSES)
        log_headline(task_of(config).headline, metrics)
        where = metrics_source(config, checkpoint.path, dataset, checkpoint.state.get("epoch"))
        ranks.on_main(write_metrics, Path(config.output_dir) / f"eval_{config.split}.json", metrics, **where)
        if config.predictions:
            write = write_confusions if task_of(config) is SEGMENTATION else write_predictions
            ranks.on_main(write, config.predictions, dataset, results)
    if config.output_map:
        map_scenes(config, checkpoint, classes, ranks)
    elif config.predict:
        if not config.eval:
            results = task_of(config).activate(outputs(model, prepare, dataset, config, ranks).double())
        ranks.on_main(write_probabilities, config.predict, dataset, results, classes)
    if config.embed:
        features = outputs(model, prepare, dataset, config, ranks, features=True)
        ranks.on_main(write_features, config.embed, dataset, features, config.embed_bands)
    if config.export:
        measured = {config.split: scalars(metrics)} if metrics else {}
        ranks.on_main(export_checkpoint, config, checkpoint, measured, data if metrics else {})


def open_checkpoint(flags, ranks):
    """(LoadedCheckpoint, the configuration to use it with, its classes or None) of flags. Raises UsageError."""
    machine = machine_settings(flags, ranks)
    with ranks.together():
        checkpoint = LoadedCheckpoint.load(flags.finetune or flags.resume, size_of)
        config = configure(flags, checkpoint, machine)
        classes = classes_of(checkpoint, config)
        log_statistics(config, DATASETS[config.dataset], checkpoint)
        check_use(config, checkpoint)
    return checkpoint, config, classes


def check_use(config, checkpoint):
    """Refuses what a checkpoint cannot be used for. Raises UsageError."""
    of_pixels = task_of(config) is SEGMENTATION
    need(
        of_pixels or not config.output_map,
        f"--output_map: {checkpoint.path} classifies whole images; use --predict FILE alone, or a segmentation model",
    )
    need(
        not of_pixels or config.output_map or not config.predict,
        f"--predict: {checkpoint.path} is a segmentation model; --predict names the scene, and --output_map FILE.tif "
        "the map to write",
    )
    need(
        not config.embed or DATASETS[config.dataset].task != "segmentation",
        f"--embed: --dataset {config.dataset} has a class for each pixel; use --dataset chips to embed its images",
    )


def map_scenes(config, checkpoint, classes, ranks):
    """--output_map: the map of each scene of --predict, the scenes spread over the ranks. Raises DataError.

    A scene that cannot be read is an error after the others of its rank are mapped.
    """
    with ranks.together():
        reading = reading_of(config)
        scenes = [Image.find(name, files, reading) for name, files in find_images([config.predict])]
        paths = map_paths(config.output_map, [scene.name for scene in scenes])
        bands = {Path(band.path).resolve() for scene in scenes for band in scene.bands}
        for path in paths:
            need(path.resolve() not in bands, f"--output_map {path}: is the scene itself; choose another name")
        model = apply_speed_flags(build_trained(config, checkpoint), config).to(ranks.device).eval()
        prepare = build_preparation(config).to(ranks.device)

    def predicted(images):
        return probabilities(model, prepare, images.to(ranks.device, non_blocking=True), config.amp)

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes what is half written
    mine, failed = list(zip(scenes, paths))[ranks.rank :: ranks.world_size], []
    for scene, path in mine:  # no rank waits for another, which may take longer than --dist_timeout
        try:
            map_scene(scene, predicted, path, classes, windows_of(config), config.map_values)
        except DataError as error:
            failed.append(error)
    if len(mine) == 1 and failed:
        raise failed[0]
    if failed:
        remedy = "correct or remove them; the others are mapped"
        raise data_error(f"{len(failed)} of {len(mine)} scenes cannot be mapped", map(str, failed), remedy)


def outputs(model, prepare, dataset, config, ranks, features=False):
    """Logits (N, K) of a split or, with `features`, features (N, C); on every rank."""
    loader = build_test_loader(dataset, config, ranks, config.dist_eval)
    return predict(model, prepare, loader, ranks, config.amp, features=features)[0]


def classes_of(checkpoint, config):
    """Names of the classes that a checkpoint classifies; None for an encoder. Raises UsageError if it is needed."""
    if has_classes(config.dataset) or not checkpoint.has_head:
        return DATASETS[config.dataset].CLASSES or None
    trained_on = checkpoint.flags().get("dataset")
    classes = checkpoint.stated().get("classes") or (has_classes(trained_on) and DATASETS[trained_on].CLASSES)
    if not classes:
        raise UsageError(
            f"{checkpoint.path}: does not state its classes, like all released files; use it with the --dataset "
            "that it was trained on"
        )
    return tuple(classes)


def configure(flags, checkpoint, machine):
    """The configuration: flags → what the checkpoint states → its dataset → the machine. Raises UsageError.

    The input size of floods may stay None, for the dataset to state.
    """
    trained = checkpoint.flags()
    flags = settle(flags, {"dataset": trained.get("dataset")})
    if flags.dataset not in DATASETS:
        raise UsageError(f"--dataset is missing, and {checkpoint.path} does not say it: one of {', '.join(DATASETS)}")
    own = flags.dataset in OWN  # images of one's own, which are divided by their table or by a draw
    if flags.eval or flags.predict:
        check_classes(checkpoint, flags.dataset)
    if has_classes(trained.get("dataset")):
        flags = settle(flags, {"task": DATASETS[trained["dataset"]].task})
    config = settle(
        flags,
        checkpoint.used_as_is(flags),
        classifier_defaults(flags.dataset),
        {} if checkpoint.has_head else {"task": "multiclass", "nb_classes": 2},  # of the head, which is not used
        {"split": "all" if own and not flags.eval else "test"},
    )
    need_statistics(config)
    if not (config.val_fraction or config.test_fraction):  # the groups that were kept apart in training are so here
        drawn = ("val_fraction", "test_fraction", "draw_seed")
        config = config.changed(**{name: trained[name] for name in drawn if name in trained})
        if own and config.split != "all" and (config.val_fraction or config.test_fraction):
            log.info(
                "split %s is drawn as in training if the data have no splits of their own; --split all uses all images",
                config.split,
            )
    return settle(config, machine)


def build_trained(config, checkpoint):
    """The model of the configuration with a checkpoint's weights, and its head where it has one. Raises UsageError."""
    with flags_of(checkpoint.path):
        model = build_model(config)
    load_weights(model, checkpoint, head=checkpoint.has_head)
    return model


def export_checkpoint(config, checkpoint, metrics, data):
    """--export: weights, program and model card. metrics, data: as of `export`. Raises UsageError, TrainingError."""
    classes = classes_of(checkpoint, config) if checkpoint.has_head else None
    program = build_program(
        build_trained(config, checkpoint), build_preparation(config), task_of(config), features=classes is None
    )
    export(config.export, checkpoint.state, config, classes, metrics, data, program)


def metrics_source(config, path, dataset, epoch):
    """What metrics are of, for the file that holds them. path, epoch: of the checkpoint."""
    return {
        "checkpoint": str(path),
        "dataset": config.dataset,
        "split": dataset.split,
        "samples": len(dataset),
        "classes": list(dataset.CLASSES),
        "epoch": epoch,
    }
