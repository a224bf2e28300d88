# SPDX-License-Identifier: MIT
"""Pretrain SAR-W-MixMAE on Sentinel-1 patches: `python main_pretrain.py --data_path DIR --output_dir DIR`."""

import common.startup  # noqa: F401 (first: puts the environment right, reports a missing package)

# isort: split
import logging
import math
import sys
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from timm.optim import param_groups_weight_decay

import engine_pretrain
from batch_preparation import PretrainingPreparation, Weighting
from common.console import setup_logging
from common.ending import leave, run_program
from common.errors import UsageError
from common.files import write_atomically
from models_mixmim import SIZES, size_of
from pretrain_flags import build_parser, check_flags
from sarwmix.registry import DATASETS
from util.checkpoint import find_checkpoint, initialise
from util.checkpoint_input import LoadedCheckpoint, flags_of
from util.configuration import (
    dataset_defaults,
    log_configuration,
    log_statistics,
    machine_settings,
    need_statistics,
    settle,
)
from util.datasets import (
    ImagesWithIds,
    build_dataset,
    build_loader,
    check_data,
    drop_missing,
    high_contrast_ids,
)
from util.distributed import start_ranks
from util.misc import duration, log_flags
from util.program import check_one_command
from util.quicklook import draw_reconstructions, pixels
from util.run import Run
from util.sampling import Place
from util.training import Training, run_identity, sample_counts

log = logging.getLogger(__name__)

MODEL_DEFAULTS = {"model": "mixmim_base", "input_size": 128, "norm_pix_loss": False, "target": "pixels"}
# Flags that a continued run must repeat, besides those of every training.
SAME_RUN = (
    "mask_ratio",
    "range_mask_ratio",
    "norm_pix_loss",
    "weight_mode",
    "weight_level",
    "weight_domain",
    "weight_clip",
    "exp_scale",
    "crop_scale",  # like the next two None by default, the value for checkpoints of older runs, which lack these flags
    "looks",
    "speckle_looks",
)
PICTURE_SAMPLES = 4
CHECKED_SAMPLES = 32  # after each epoch, their loss and features show whether the model learns
FEWEST_STEPS = 200  # after these and the warm-up, the run warns of a model that has not learned


def parse_flags(argv=None):
    """The flags as Config. Those that are left to the checkpoint, the dataset or the machine are None."""
    return build_parser().parse_checked(argv, check)


def check(flags):
    """`check_flags`, and refuses a model that cannot be built, before any work. Returns Config. Raises UsageError."""
    flags = check_flags(flags)
    if flags.inference is None and not flags.finetune:
        configure(flags)
    return flags


def configure(flags, checkpoint=None, machine=None, dataset=None):
    """The configuration: flags → what the checkpoint states → program and dataset → machine.

    checkpoint: the LoadedCheckpoint that the training starts from, or None. machine: of `machine_settings`, or None
    where it does not matter. dataset: what is trained on; by default the class of --dataset. Raises UsageError, also
    for a model that cannot be built.
    """
    config = settle(
        flags,
        checkpoint.started_from(flags) if checkpoint else {},
        MODEL_DEFAULTS | dataset_defaults(dataset or DATASETS[flags.dataset]),
        machine or {},
    )
    if dataset is not None:
        need_statistics(config)
    with flags_of(checkpoint and checkpoint.path):
        build_model(config, meta=True)
    return config


def build_model(config, meta=False):
    """The model of the configuration, on the CPU; meta: without memory, to find out whether it can be built."""
    if config.model not in SIZES:
        raise UsageError(f"--model {config.model} is unknown; choose one of {', '.join(SIZES)}")
    try:
        with torch.device("meta" if meta else "cpu"):
            return SIZES[config.model](
                img_size=config.input_size,
                norm_pix_loss=config.norm_pix_loss,
                weight_level=config.weight_level,
                looks=config.looks or 1,
                range_mask_ratio=config.range_mask_ratio,
                drop_path_rate=config.drop_path,
            )
    except ValueError as error:
        raise UsageError(f"--input_size: {error}") from None


def build_preparation(config):
    return PretrainingPreparation(
        config.input_size,
        config.mean,
        config.std,
        config.seed,
        Weighting(config.weight_mode, config.weight_domain, config.exp_scale, config.weight_clip),
        config.crop_scale,
        looks=config.looks or 1,
        speckle_looks=config.speckle_looks,
    )


def build_training(config, device, checkpoint=None):
    """AdamW with (0.9, 0.95), no weight decay on biases and 1-D parameters; everything from config.seed.

    checkpoint: the LoadedCheckpoint whose weights the model starts from, or None.
    """
    torch.manual_seed(config.seed)
    model = build_model(config)
    resampled, head = (), ""
    if checkpoint:
        told = checkpoint.state["model"].get("decoder_pred.bias")
        other = told is not None and len(told) != len(model.decoder_pred.bias)
        head = f", with a new prediction head, as --looks is {config.looks or 1}" if other else ""
        keep = ("decoder_pred.",) if other else ()
        resampled = initialise(model, checkpoint.state, checkpoint.path, keep=keep)
    groups = param_groups_weight_decay(model, config.weight_decay)
    training = Training.build(model, build_preparation(config), groups, (0.9, 0.95), config, device)
    if checkpoint:
        training.initialised_from(checkpoint, resampled, head)
    return training


# ---- Pretraining ---------------------------------------------------------------------------------


class Pretraining(Run):
    """A pretraining. After each epoch it saves a checkpoint, at save epochs also a picture of reconstructions."""

    train_one_epoch = engine_pretrain.train_one_epoch  # a function of (run, epoch), here as a method

    def __init__(self, config, ranks, training, loader, identity, dataset):
        super().__init__(config, ranks, training, loader, identity)
        self.dataset, self.shown = dataset, ranks.on_main(high_contrast_ids, dataset, PICTURE_SAMPLES)

    def warm_up_loss(self, model):
        return engine_pretrain.warm_up_loss(model, self.warm_up_images, self.config)

    def after_epoch(self, epoch, statistics):
        done, filled = epoch + 1, self.filled()
        if filled:
            log.warning("%d no-data or non-finite pixels were set to the channel's mean so far", filled)
        kept = done in self.config.save_epochs
        if kept and self.ranks.is_main:
            self.draw(done)
        entry = {f"train_{name}": value for name, value in statistics.items()}
        entry |= {"epoch": epoch, "filled_pixels": filled} | self.ranks.on_main(self.check, done, kept)
        self.finish_epoch(epoch, entry, (f"checkpoint_{done}.pth",) if kept else ())
        if done < self.config.stop_epoch:
            self.stop_if_asked(Place(done), saved=True)

    @cached_property
    def checked_images(self):
        """Some images of the whole dataset, (B, 2, h, w) dB, B even."""
        count = max(2, min(CHECKED_SAMPLES, len(self.dataset) // 2 * 2))
        rows = np.linspace(0, len(self.dataset) - 1, count).round().astype(int).tolist()
        return torch.stack([self.dataset.image(i) for i in rows])

    def check(self, done, kept):
        """Measures, logs and returns what the model has learned, and warns after the warm-up of one that has not."""
        training, config = self.training, self.config
        mask = engine_pretrain.draw_micro_batch_mask(training.model, config, Place(0))
        health = engine_pretrain.check_health(training.model, training.prepare, self.checked_images, mask, config.amp)
        log.info(
            "Epoch %d: on %d images the loss is %.4f, %.3f of the loss of the best constant; the variance of the "
            "features is %.1f%% of their mean square, and %.1f%% of it is between images",
            done,
            len(self.checked_images),
            health["check_loss"],
            health["check_loss"] / health["check_constant"],
            100 * health["check_variance"],
            100 * health["check_between"],
        )
        if kept and done >= config.warmup_epochs and done * self.steps >= FEWEST_STEPS:
            for line in engine_pretrain.complaints(health):
                log.warning(line)
        return health

    def draw(self, done):
        """Draws reconstructions of the same samples after each save epoch, into a PNG and TensorBoard."""
        result = reconstruct_samples(
            self.training.model, self.training.prepare, self.dataset, self.shown, self.config.amp
        )
        picture = save_picture(
            self.directory.path / f"reconstruction_{done}.png",
            {"prediction": result},
            self.dataset.ids[self.shown].tolist(),
            self.config.norm_pix_loss,
        )
        self.directory.writer.add_image("reconstruction", picture, done)


def pretrain(flags, ranks):
    """The whole job, from flags to checkpoints."""
    started, machine = time.monotonic(), machine_settings(flags, ranks)
    with ranks.together():
        checkpoint = LoadedCheckpoint.load(flags.finetune, size_of) if flags.finetune else None
    with ranks.together():
        dataset = build_dataset(flags)
    dataset = drop_missing(dataset, flags, ranks)
    with ranks.together():
        config = configure(flags, checkpoint, machine, dataset)
        loader = build_loader(ImagesWithIds(dataset), config, ranks)
    log_configuration(config, flags)
    log_statistics(config, dataset, checkpoint)
    data = check_data(dataset, config, ranks)
    with ranks.together():
        training = build_training(config, ranks.device, checkpoint)
    training.data = sample_counts({"train": data}, checkpoint)
    checkpoint = None  # frees its tensors
    identity = run_identity(config, SAME_RUN, ranks.world_size, data["fingerprint"])
    run = Pretraining(config, ranks, training, loader, identity, dataset)
    run.log_steps(len(dataset), lr_given=flags.lr is not None)
    with run.opened(data):
        run.train()
    log.info("Training time %s", duration(time.monotonic() - started))


# ---- Pictures ------------------------------------------------------------------------------------


def reconstruct_samples(model, prepare, dataset, ids, amp):
    """Reconstructions of some samples under a chequered mask, which hides every other cell."""
    grid = math.isqrt(model.num_cells)
    mask = (torch.arange(grid)[:, None] + torch.arange(grid)) % 2
    return engine_pretrain.reconstruct(
        model, prepare, torch.stack([dataset.image(i) for i in ids]), mask.view(1, -1, 1), amp
    )


def save_picture(path, results, names, standardised):
    """Draws reconstructions (dict title → result of `reconstruct`) into a PNG; returns its pixels, (H, W, 3) uint8."""
    note = "each token's own mean and standard deviation are put back (norm_pix_loss)" if standardised else ""
    figure = draw_reconstructions(results, names, note)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    log.info("wrote %s", path)
    return pixels(figure)


def run_inference(flags, device, amp):
    """Draws what one or several checkpoints reconstruct of the same samples, under the same mask, into PNGs.

    Model, input size and statistics are those a checkpoint states, those of --dataset where it does not; the numbers go
    into an .npz.
    """
    dataset = drop_missing(build_dataset(flags), flags)
    ids = high_contrast_ids(dataset, flags.inference_samples)
    names = dataset.ids[ids].tolist()
    results, standardised = {}, False
    checkpoints = [find_checkpoint(path) for path in flags.inference or [flags.resume]]
    one_run = len({Path(path).parent for path in checkpoints}) == 1
    for path in checkpoints:
        checkpoint = LoadedCheckpoint.load(path, size_of)
        with flags_of(path):
            config = configure(settle(flags, checkpoint.used_as_is(flags)), dataset=dataset)
        model = build_model(config)
        initialise(model, checkpoint.state, path)
        title = checkpoint.name if one_run else f"{Path(path).parent.name}/{checkpoint.name}"
        prepare = build_preparation(config).to(device)
        results[title] = reconstruct_samples(model.to(device), prepare, dataset, ids, amp)
        standardised |= config.norm_pix_loss
        log.info("%s: %s, input %d, epoch %s", path, config.model, config.input_size, checkpoint.state.get("epoch"))
    if len({result["original"].shape for result in results.values()}) > 1:
        raise UsageError(
            "--inference: the checkpoints have different input sizes and cannot be drawn side by side; draw them one "
            "by one"
        )
    folder = Path(flags.output_dir) / "inference"
    folder.mkdir(parents=True, exist_ok=True)
    for page, start in enumerate(range(0, len(ids), PICTURE_SAMPLES), 1):
        rows = slice(start, start + PICTURE_SAMPLES)
        part = {
            title: {name: value if name == "visible" else value[rows] for name, value in result.items()}
            for title, result in results.items()
        }
        save_picture(folder / f"reconstructions_{page}.png", part, names[rows], standardised)
    arrays = {f"{title}/{name}": value.numpy() for title, result in results.items() for name, value in result.items()}
    write_atomically(folder / "reconstructions.npz", lambda file: np.savez_compressed(file, ids=names, **arrays))


def main():
    flags = parse_flags()
    ranks = start_ranks(flags)
    setup_logging(logging.INFO if ranks.is_main else logging.ERROR, sys.stdout, force=True)
    log_flags(flags)
    check_one_command(flags, ranks)
    if flags.inference is None:
        pretrain(flags, ranks)
    else:
        amp = machine_settings(flags, ranks)["amp"]
        if ranks.is_main:
            run_inference(flags, ranks.device, amp)
    ranks.close()


if __name__ == "__main__":
    leave(run_program(main))
