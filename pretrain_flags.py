# SPDX-License-Identifier: MIT
"""The flags of main_pretrain.py, and contradictions between them."""

from batch_preparation import WEIGHT_DOMAINS
from common.command_line import Parser, Range, positive_int, positive_share, rate, share
from models_mixmim import SIZES
from sarwmix.weighting import WEIGHT_MODES
from util.checkpoint_input import add_force_flag
from util.configuration import need, read_statistics, settle
from util.datasets import add_data_flags
from util.program import (
    add_distributed_flags,
    add_run_flags,
    add_schedule_flags,
    add_speed_flags,
    check_common_flags,
)

LOOKS = (2, 4, 8, 16)
DEFAULT_LOOKS = 8  # of --target multilook
EXAMPLES = """\
Pretrain on BigEarthNet v2, with the published target:
  python main_pretrain.py --data_path BigEarthNet --norm_pix_loss --output_dir output/benv2
The same on the 4 GPUs of a machine:
  torchrun --nproc_per_node 4 main_pretrain.py --data_path BigEarthNet --norm_pix_loss --output_dir output/benv2
Continue this run after an interruption: repeat its flags and add --resume auto:
  python main_pretrain.py --data_path BigEarthNet --norm_pix_loss --output_dir output/benv2 --resume auto
Pretrain on tiles of your own scenes, which python -m sarwmix.tile has cut:
  python main_pretrain.py --dataset chips --data_path tiles --output_dir output/tiles
Pretrain on them from the weights of a checkpoint:
  python main_pretrain.py --dataset chips --data_path tiles --finetune output/benv2 --output_dir output/tiles
Draw what a checkpoint reconstructs, without training:
  python main_pretrain.py --inference output/benv2/checkpoint.pth --data_path BigEarthNet --split test"""


def build_parser():
    """The flags of this program, in groups."""
    parser = Parser(
        "Pretrain a SAR-W-MixMAE encoder on Sentinel-1 images of VH and VV, without labels: a masked autoencoder whose "
        "loss has polarization weights. The run writes checkpoints, logs and pictures of reconstructions into "
        "--output_dir.",
        usage="[flags] --data_path DIR",
        examples=EXAMPLES,
    )
    add_data_flags(
        parser,
        dataset={
            "choices": ("benv1", "benv2", "chips", "masks", "sen1floods11"),
            "default": "benv2",
            "help": "BigEarthNet v1 or v2; chips: your own images, a folder of GeoTIFFs or the tiles of sarwmix.tile; "
            "masks: your own images with masks, whose masks are not used; or Sen1Floods11",
        },
        split={"default": "train_val", "help": "split to train on, or to draw with --inference"},
    )
    group = add_run_flags(
        parser,
        output_dir="output/pretrain",
        finetune={
            "default": "",
            "help": "start from the weights of this checkpoint, or of the latest checkpoint in this run folder",
        },
    )
    group.add_argument(
        "--save_epochs",
        type=positive_int,
        nargs="*",
        metavar="N",
        help="keep checkpoint_N.pth and draw reconstructions after these epochs (default: powers of two, 40, "
        "600 and the last)",
    )
    add_inference_flags(parser)
    add_model_flags(parser)
    add_weight_flags(parser)
    add_schedule_flags(parser, batch_size=64, epochs=1024, warmup_epochs=40, blr=1.5e-4, min_lr=0.0)
    add_speed_flags(parser)
    add_distributed_flags(parser)
    return parser


def add_inference_flags(parser):
    """Flags that draw reconstructions of checkpoints."""
    group = parser.add_argument_group("reconstructions", "pictures instead of training")
    group.add_argument(
        "--inference",
        nargs="*",
        metavar="CHECKPOINT",
        help="do not train: draw what these checkpoints (default: that of --resume) reconstruct of the same samples",
    )
    group.add_argument(
        "--inference_samples", type=Range(int, at_least=2), default=8, metavar="N", help="samples to draw"
    )


def add_model_flags(parser):
    """Flags of the model, its input and its target."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=tuple(SIZES), help="size of the model (default: the checkpoint's, else mixmim_base)"
    )
    group.add_argument(
        "--input_size",
        type=positive_int,
        metavar="PIXELS",
        help="side of the input: 32, 64, 128, 256, 384 or 512 (default: the checkpoint's, else 128)",
    )
    group.add_argument(
        "--mask_ratio", type=share, default=0.5, help="share of the cells that are masked, with cells of another image"
    )
    group.add_argument(
        "--range_mask_ratio",
        type=share,
        default=0.0,
        help="add a random number between 0 and this to mask_ratio in each step",
    )
    group.add_argument(
        "--norm_pix_loss",
        action="store_true",
        default=None,
        help="standardise the target of each token by its own mean and variance (the published recipe)",
    )
    group.add_argument(
        "--target",
        choices=("pixels", "multilook"),
        help="pixels: reconstruct the pixels, as published; multilook: reconstruct the mean backscatter of squares of "
        "--looks pixels a side, which has less speckle (default: the checkpoint's, else pixels)",
    )
    group.add_argument(
        "--looks",
        type=int,
        choices=LOOKS,
        metavar="K",
        help=f"side in pixels of the squares of --target multilook: {', '.join(map(str, LOOKS))} (default: "
        f"{DEFAULT_LOOKS})",
    )
    group.add_argument(
        "--speckle_looks",
        type=positive_int,
        metavar="L",
        help="multiply the input by gamma speckle of L looks; the target stays as it is (default: none)",
    )
    group.add_argument(
        "--drop_path", type=rate, default=0.0, metavar="RATE", help="rate of stochastic depth in the last block"
    )
    group.add_argument(
        "--crop_scale",
        type=positive_share,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="train on random resized crops, whose area is between these shares of the image; MAE uses 0.2 1 (default: "
        "whole images)",
    )
    add_force_flag(group)


def add_weight_flags(parser):
    """Flags of the polarization weights."""
    group = parser.add_argument_group("polarization weights of the loss")
    group.add_argument(
        "--weight_mode",
        choices=WEIGHT_MODES,
        default="per_channel",
        help="per_channel: VH and VV have their own weights; shared_avg: both have the mean of these weights; "
        "shared_intensity: both have the weights of their mean intensity; none: no weights, as in MixMAE",
    )
    group.add_argument(
        "--weight_level",
        choices=("token", "pixel"),
        default="token",
        help="token: one weight for each token and channel, the mean over its pixels; pixel: one for each pixel",
    )
    group.add_argument(
        "--weight_domain",
        choices=WEIGHT_DOMAINS,
        default="linear",
        help="linear: weights from linear backscatter; standardized: from standardised values taken for dB, as in the "
        "released code",
    )
    group.add_argument(
        "--weight_clip",
        type=Range(float, above=0, at_most=100),
        default=100.0,
        metavar="PERCENTILE",
        help="clip the backscatter of each image and channel at this percentile before the weights are computed",
    )
    group.add_argument(
        "--exp_scale", type=float, default=1.0, metavar="S", help="scale of the weights, which lie between 1 and e^S"
    )


def check_flags(flags):
    """Refuses flags that contradict each other, before any work. Returns Config. Raises UsageError."""
    check_common_flags(flags)
    most = flags.mask_ratio + flags.range_mask_ratio
    need(
        flags.batch_size % 2 == 0 or most == 0,
        f"--batch_size {flags.batch_size}: must be even, as images are mixed in pairs within a batch",
    )
    need(
        most <= 1,
        f"--mask_ratio {flags.mask_ratio} and --range_mask_ratio {flags.range_mask_ratio}: at most 1 together",
    )
    need(
        not flags.crop_scale or flags.crop_scale[0] <= flags.crop_scale[1],
        f"--crop_scale {flags.crop_scale and '{:g} {:g}'.format(*flags.crop_scale)}: MIN must not be above MAX",
    )
    need(
        flags.looks is None or flags.target == "multilook",
        f"--looks {flags.looks}: has no effect on the target {flags.target or 'pixels'}; add --target multilook",
    )
    if flags.inference is not None:
        need(
            flags.inference or flags.resume not in ("", "auto"),
            "--inference: name the checkpoints to draw, or one with --resume PATH",
        )
        need(
            flags.inference_samples % 2 == 0,
            f"--inference_samples {flags.inference_samples}: must be even, as images are mixed in pairs",
        )
    last = flags.stop_epoch or flags.epochs
    save_epochs = sorted({2**k for k in range(flags.epochs.bit_length())} | {40, 600, last})
    own = {"stop_epoch": last, "save_epochs": save_epochs, "draw_seed": flags.seed}
    if flags.target == "multilook":
        own["looks"] = DEFAULT_LOOKS
    return settle(flags, read_statistics(flags.statistics), own)
