# SPDX-License-Identifier: MIT
"""Pretrain SAR-W-MixMAE on Sentinel-1 patches: `python main_pretrain.py --data_path DIR --output_dir DIR`."""

import common.startup  # noqa: F401 (first: puts the environment right, reports a missing package)

# isort: split
import logging
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.optim import param_groups_weight_decay

from batch_preparation import WEIGHT_DOMAINS, BatchPreparation
from common.command_line import Parser
from common.console import setup_logging
from common.ending import leave, run_program
from common.errors import UsageError
from common.files import write_atomically
from engine_pretrain import reconstruct, train_one_epoch
from models_mixmim import SIZES, size_of
from sarwmix.quicklook import draw_reconstructions, pixels
from sarwmix.registry import SPLITS
from sarwmix.weighting import WEIGHT_MODES
from util.checkpoint import find_checkpoint, initialise, load_checkpoint
from util.checkpoint_input import add_force_flag, flags_of, settle_input
from util.datasets import (
    ImagesWithIds,
    add_data_flags,
    build_dataset,
    build_loader,
    check_data,
    drop_missing,
    fill_statistics,
    take_statistics,
    telling_ids,
)
from util.distributed import distribute, start_ranks
from util.misc import duration, log_flags
from util.optimization import autocast, settle_amp
from util.program import (
    add_distributed_flags,
    add_run_flags,
    add_schedule_flags,
    add_speed_flags,
    check_common_flags,
)
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
    "mask_ratio",
    "range_mask_ratio",
    "norm_pix_loss",
    "weight_mode",
    "weight_level",
    "weight_domain",
    "weight_clip",
    "exp_scale",
)
PICTURE_SAMPLES = 4


def build_parser():
    """The flags of this program, in groups."""
    parser = Parser(description="Pretrain a SAR-W-MixMAE encoder on Sentinel-1 VH/VV patches.")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=tuple(SIZES), help="size of the model (default: that of the checkpoint, else mixmim_base)"
    )
    group.add_argument(
        "--input_size",
        type=int,
        metavar="PIXELS",
        help="side of the input: 32, 64, 128, 256, 384 or 512 (default: that of the checkpoint, else 128)",
    )
    group.add_argument("--mask_ratio", type=float, default=0.5, help="share of the cells taken from the partner image")
    group.add_argument(
        "--range_mask_ratio", type=float, default=0.0, help="a random addition to mask_ratio, up to this"
    )
    group.add_argument(
        "--norm_pix_loss",
        action="store_true",
        default=None,
        help="standardise the target of each token by its own mean and variance (the published recipe)",
    )
    group.add_argument(
        "--drop_path", type=float, default=0.0, metavar="RATE", help="stochastic depth of the last block"
    )
    group = parser.add_argument_group("polarization weights")
    group.add_argument(
        "--weight_mode",
        choices=WEIGHT_MODES,
        default="per_channel",
        help="VH and VV by their own weights, both by the mean of the two, or plain MixMAE",
    )
    group.add_argument(
        "--weight_level",
        choices=("token", "pixel"),
        default="token",
        help="average the weights over each token and channel, or weigh each pixel",
    )
    group.add_argument(
        "--weight_domain",
        choices=WEIGHT_DOMAINS,
        default="linear",
        help="weights from linear backscatter, or from standardised values taken for dB, as the released code does",
    )
    group.add_argument(
        "--weight_clip",
        type=float,
        default=100.0,
        metavar="PERCENTILE",
        help="clip backscatter at this percentile of image and channel before the weights are made",
    )
    group.add_argument("--exp_scale", type=float, default=1.0, metavar="S", help="weights lie between 1 and e^S")
    group = add_data_flags(parser)
    group.add_argument("--dataset", choices=("benv1", "benv2"), default="benv2", help="BigEarthNet v1 or v2")
    group.add_argument("--split", choices=SPLITS, default="train_val", help="part of the data to use")
    add_schedule_flags(parser, batch_size=64, epochs=1024, warmup_epochs=40, blr=1.5e-4, min_lr=0.0)
    group = add_run_flags(parser, output_dir="output/pretrain")
    group.add_argument(
        "--finetune",
        default="",
        metavar="PATH",
        help="initialise the weights from this checkpoint, or the latest of a run's folder",
    )
    group.add_argument(
        "--save_epochs",
        type=int,
        nargs="*",
        metavar="N",
        help="keep checkpoint_N.pth and draw reconstructions after these epochs (default: powers of two, 40, "
        "600 and the last)",
    )
    group.add_argument(
        "--inference",
        nargs="*",
        metavar="CHECKPOINT",
        help="do not train: draw what these checkpoints (default: --resume) reconstruct of the same samples",
    )
    group.add_argument("--inference_samples", type=int, default=8, metavar="N", help="samples to draw")
    add_force_flag(group)
    add_speed_flags(parser)
    add_distributed_flags(parser)
    return parser


def parse_flags(argv=None):
    """Parse and check the flags; anything wrong is one line and exit status 2."""
    return build_parser().parse_checked(argv, check_flags)


def check_flags(args):
    """Refuse values and pairs of flags that cannot be meant, before any work. Raises UsageError."""
    take_statistics(args)
    check_common_flags(args)
    if args.batch_size % 2 and args.mask_ratio + args.range_mask_ratio > 0:
        raise UsageError(f"--batch_size {args.batch_size}: must be even, as images are mixed in pairs within a batch")
    if not 0 <= args.mask_ratio <= 1 or args.range_mask_ratio < 0 or args.mask_ratio + args.range_mask_ratio > 1:
        raise UsageError(
            f"--mask_ratio {args.mask_ratio} and --range_mask_ratio {args.range_mask_ratio}: both at least 0, and "
            f"together at most 1"
        )
    if not 0 < args.weight_clip <= 100:
        raise UsageError(f"--weight_clip {args.weight_clip}: a percentile above 0 and up to 100 is needed")
    if args.save_epochs is None:
        args.save_epochs = sorted({2**k for k in range(args.epochs.bit_length())} | {40, 600, args.stop_epoch})
    if min(args.save_epochs, default=1) < 1:
        raise UsageError(f"--save_epochs {min(args.save_epochs)}: epochs are counted from 1")
    if args.inference is not None:
        args.inference = args.inference or [path for path in (args.resume,) if path not in ("", "auto")]
        if not args.inference:
            raise UsageError("--inference: name the checkpoints to draw, or one with --resume PATH")
        if args.inference_samples < 2 or args.inference_samples % 2:
            raise UsageError(
                f"--inference_samples {args.inference_samples}: an even number is needed, as images are mixed in pairs"
            )
    elif not args.finetune:
        complete(args)


def complete(args):
    """Fill in what neither a flag nor a checkpoint said, and see whether the model can be built. Raises UsageError."""
    fill_defaults(args)
    build_model(args, meta=True)


def fill_defaults(args):
    """What neither a flag nor a checkpoint said."""
    args.model, args.input_size = args.model or "mixmim_base", args.input_size or 128
    args.norm_pix_loss = bool(args.norm_pix_loss)
    fill_statistics(args)


def build_model(args, meta=False):
    """The model of the flags, on the CPU; meta: without memory, to find out whether it can be."""
    if args.model not in SIZES:
        raise UsageError(f"--model {args.model} is unknown; choose one of {', '.join(SIZES)}")
    try:
        with torch.device("meta" if meta else "cpu"):
            return SIZES[args.model](
                img_size=args.input_size,
                norm_pix_loss=args.norm_pix_loss,
                weight_level=args.weight_level,
                range_mask_ratio=args.range_mask_ratio,
                drop_path_rate=args.drop_path,
            )
    except ValueError as error:
        raise UsageError(f"--input_size: {error}") from None


def build_preparation(args):
    return BatchPreparation(
        args.input_size,
        args.mean,
        args.std,
        args.seed,
        args.weight_mode,
        args.weight_domain,
        args.exp_scale,
        args.weight_clip,
    )


def build_training(args, device):
    """AdamW with (0.9, 0.95), no weight decay on biases and 1-D parameters; everything from args.seed."""
    torch.manual_seed(args.seed)
    model = build_model(args)
    return Training.build(
        model, build_preparation(args), param_groups_weight_decay(model, args.weight_decay), (0.9, 0.95), args, device
    )


def prepare_data(args, ranks):
    """The dataset, its loader and a summary for run.json, all checked before training. Raises DataError, UsageError."""
    dataset = drop_missing(ranks.together(lambda: build_dataset(args)), args, ranks)
    loader = ranks.together(lambda: build_loader(ImagesWithIds(dataset), args, ranks))
    return dataset, loader, check_data(dataset, args, ranks)


def start_of(args, facts, training, steps, state):
    """Fill model, optimizer and scaler from --resume or --finetune; where to start. state: of `open_start`. Raises UsageError."""
    start = training.resume(args, facts, steps)
    if start.source is None and state is not None:
        resampled = initialise(training.model, state, args.finetune)
        training.origin = origin_of(state, args.finetune)
        log.info(
            "initialised from %s%s%s",
            args.finetune,
            after_epochs(training.origin),
            f"; resampled: {', '.join(resampled)}" if resampled else "",
        )
    return start


def reconstruct_samples(model, prepare, dataset, ids, args):
    """Reconstructions of some samples under a chequered mask, which hides every other cell."""
    grid = math.isqrt(model.num_cells)
    mask = (torch.arange(grid)[:, None] + torch.arange(grid)) % 2
    return reconstruct(model, prepare, torch.stack([dataset.image(i) for i in ids]), mask.view(1, -1, 1), args.amp)


def save_picture(path, results, names, standardised):
    """Draw reconstructions (dict title → result of `reconstruct`) into a PNG; returns its pixels, (H, W, 3) uint8."""
    note = "each token's own mean and standard deviation are put back (norm_pix_loss)" if standardised else ""
    figure = draw_reconstructions(results, names, note)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    log.info("wrote %s", path)
    return pixels(figure)


def run_inference(args, ranks):
    """Draw what one or several checkpoints reconstruct of the same samples, under the same mask, into PNGs.

    Model, input size and statistics are those a checkpoint says it was trained with, those of --dataset where it does
    not say; the numbers go into an .npz.
    """
    dataset = drop_missing(build_dataset(args), args)
    ids = telling_ids(dataset, args.inference_samples)
    names = dataset.ids[ids].tolist()
    results, standardised = {}, False
    paths = [find_checkpoint(path) for path in args.inference]
    one_run = len({Path(path).parent for path in paths}) == 1
    for path in paths:
        state = load_checkpoint(path)
        trained = settle_input(args, state, path, size_of(state["model"]))
        fill_defaults(trained)
        with flags_of(path):
            model = build_model(trained)
        initialise(model, state, path)
        title = Path(path).stem if one_run else f"{Path(path).parent.name}/{Path(path).stem}"
        results[title] = reconstruct_samples(
            model.to(ranks.device), build_preparation(trained).to(ranks.device), dataset, ids, trained
        )
        standardised |= trained.norm_pix_loss
        log.info("%s: %s, input %d, epoch %s", path, trained.model, trained.input_size, state.get("epoch"))
    if len({result["original"].shape for result in results.values()}) > 1:
        raise UsageError(
            "--inference: the checkpoints have different input sizes and cannot be drawn side by side; draw "
            "them one by one"
        )
    folder = Path(args.output_dir) / "inference"
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


def rehearsal(args, ranks):
    """A function of a model, maybe under DDP: its loss of a random batch of the shapes of training, the same at each call."""
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.randn(args.batch_size, 2, args.input_size, args.input_size, generator=generator).to(ranks.device)

    def loss_of(model):
        mask = getattr(model, "module", model).draw_mask(args.mask_ratio, torch.Generator().manual_seed(args.seed))
        with autocast(ranks.device, args.amp):
            return model(images, torch.ones_like(images), mask=mask)[0]

    return loss_of


def run_epochs(args, ranks, training, loader, dataset, directory, start, facts, pauses):
    """Train from the start to args.stop_epoch; after each epoch a checkpoint and a log line, at save epochs a picture."""
    wrapped, steps = distribute(training.model, ranks, rehearsal(args, ranks)), loader.batch_sampler.steps
    shown = ranks.on_main(lambda: telling_ids(dataset, PICTURE_SAMPLES))

    def save(epoch, progress=None, entry=None, names=()):
        directory.save(training.state(epoch, args, facts, training.filled(ranks), progress), entry, names)

    for epoch in range(start.epoch, args.stop_epoch):
        done = epoch + 1
        stats, _ = train_one_epoch(
            wrapped,
            training.prepare,
            loader,
            training.optimizer,
            training.scaler,
            epoch,
            ranks,
            args,
            directory.writer,
            start.progress if epoch == start.epoch else None,
            pauses.between_steps(epoch, steps, partial(save, epoch - 1)),
        )
        filled = training.filled(ranks)
        if filled:
            log.warning("%d no-data or non-finite pixels were set to the channel's mean so far", filled)
        if done in args.save_epochs and ranks.is_main:
            result = reconstruct_samples(training.model, training.prepare, dataset, shown, args)
            picture = save_picture(
                directory.path / f"reconstruction_{done}.png",
                {"prediction": result},
                dataset.ids[shown].tolist(),
                args.norm_pix_loss,
            )
            directory.writer.add_image("reconstruction", picture, done)
        entry = {**{f"train_{name}": value for name, value in stats.items()}, "epoch": epoch, "filled_pixels": filled}
        pauses.save(
            partial(save, epoch, entry=entry, names=(f"checkpoint_{done}.pth",) if done in args.save_epochs else ())
        )
        if done < args.stop_epoch:
            pauses.pause(f"epoch {done}, step 0/{steps}")
    if start.epoch >= args.stop_epoch:
        log.info("all %d epochs are done already", args.stop_epoch)


def pretrain(args, ranks):
    """The whole job, from flags to checkpoints."""
    started = time.monotonic()
    state = ranks.together(lambda: open_start(args, size_of, complete))
    dataset, loader, summary = prepare_data(args, ranks)
    steps = loader.batch_sampler.steps
    global_batch = settle_learning_rate(args, ranks, len(dataset), steps)
    training = build_training(args, ranks.device)
    training.data = samples_of({"train": summary}, state)
    facts = same_run_facts(vars(args), SAME_RUN, ranks.world_size, summary["fingerprint"])
    with RunDirectory(args.output_dir, ranks) as directory:
        directory.open(resume=bool(args.resume), overwrite=args.overwrite)
        start = ranks.together(lambda: start_of(args, facts, training, steps, state))
        state = None  # its tensors are free
        check_alike(start, ranks, args.output_dir)
        settle_execution(training, rehearsal(args, ranks), args, ranks, start)
        directory.begin(training.record(args, ranks, summary, global_batch), start, steps, args.log_dir, args.overwrite)
        with Pauses(args, ranks, training.bytes()) as pauses:
            run_epochs(args, ranks, training, loader, dataset, directory, start, facts, pauses)
    log.info("Training time %s", duration(time.monotonic() - started))


def main():
    args = parse_flags()
    ranks = start_ranks(args)
    setup_logging(logging.INFO if ranks.is_main else logging.ERROR, sys.stdout, force=True)
    log_flags(args)
    args.amp = settle_amp(args.amp, ranks)
    if args.inference is None:
        pretrain(args, ranks)
    elif ranks.is_main:
        run_inference(args, ranks)
    ranks.close()


if __name__ == "__main__":
    leave(run_program(main))
