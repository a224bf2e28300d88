# SPDX-License-Identifier: MIT
"""The flags of main_finetune.py, and contradictions between them."""

from pathlib import Path

from common.command_line import Parser, Range, non_negative, positive_int, positive_share, rate, share
from models_mixmim import ENCODERS
from models_sen12_ft import PATCH_CUTS, PATCH_OPS
from pretrained import build_model, classifier_defaults
from sarwmix.chips import METADATA
from sarwmix.listing import SPLITS
from sarwmix.masks import LEGEND
from sarwmix.packed_store import IMAGES, SAMPLES
from sarwmix.registry import DATASETS, OWN
from util.checkpoint_input import add_force_flag
from util.configuration import can_write, need, read_statistics, settle
from util.datasets import add_data_flags
from util.program import (
    add_distributed_flags,
    add_run_flags,
    add_schedule_flags,
    add_speed_flags,
    check_common_flags,
)
from util.scene_maps import VALUES
from util.sliding import MOST_OVERLAP

HEAD_INITS = ("fitted",)
OF_DATA = (*METADATA, LEGEND, SAMPLES, IMAGES)  # names of files in --data_path that results must not replace


EXAMPLES = """\
Finetune on BigEarthNet v2, and evaluate the selected checkpoint on the test split:
  python main_finetune.py --dataset benv2 --data_path BigEarthNet --finetune output/benv2 --output_dir output/classes
Evaluate a finetuned model:
  python main_finetune.py --eval --split test --data_path BigEarthNet --finetune output/classes
Predict the classes of your own images:
  python main_finetune.py --predict classes.csv --data_path tiles --finetune output/tiles_classes
Map every pixel of a scene with a segmentation model:
  python main_finetune.py --predict scene.tif --output_map map.tif --finetune output/water
Write the features of an encoder:
  python main_finetune.py --embed features.npz --dataset chips --data_path tiles --finetune output/benv2
Export a model for use without this code:
  python main_finetune.py --export exported --finetune output/classes"""


def build_parser(usage="[flags] --dataset NAME --data_path DIR --finetune CHECKPOINT", examples=EXAMPLES):
    """The flags of this program, in groups. usage, examples: of another program that has these flags."""
    parser = Parser(
        "Finetune a pretrained SAR-W-MixMAE encoder on Sentinel-1 images with labels (BigEarthNet, SEN12-FLOOD, "
        "Sen1Floods11 or your own), or use a checkpoint: evaluate it, predict classes, map a scene, write features, or "
        "export it.",
        usage=usage,
        examples=examples,
    )
    parser.set_defaults(task=None)  # of TASKS; chips and checkpoints state it
    add_split_flags(parser)
    group = add_run_flags(
        parser,
        output_dir="output/finetune",
        finetune={
            "default": None,
            "help": "start from this checkpoint, run folder or exported folder, or use it; '': random initialisation",
        },
    )
    group.add_argument(
        "--dist_eval",
        action="store_true",
        default=True,
        help="divide the samples of an evaluation among the ranks, each sample exactly once (the default)",
    )
    group.add_argument("--no_dist_eval", action="store_false", dest="dist_eval", help="evaluate on rank 0 alone")
    add_task_flags(parser)
    add_model_flags(parser)
    add_segmentation_flags(parser)
    group = add_schedule_flags(parser, batch_size=128, epochs=50, warmup_epochs=5, blr=5e-4, min_lr=1e-6)
    group.add_argument(
        "--layer_decay",
        type=positive_share,
        default=0.7,
        metavar="FACTOR",
        help="learning rate of a block, relative to that of the block after it",
    )
    add_mixing_flags(parser)
    add_speed_flags(parser)
    add_distributed_flags(parser)
    return parser


def add_split_flags(parser):
    """Flags of the data, and of the parts to train on, to select on and to test on."""
    add_data_flags(
        parser,
        dataset={
            "choices": tuple(DATASETS),
            "help": "BigEarthNet v1 or v2, SEN12-FLOOD, Sen1Floods11; chips: your own images with labels; masks: your "
            "own images with masks. Not needed to use a checkpoint of this program on data of the same kind",
        },
        split={
            "help": "split to train on, or to evaluate, predict or embed (default: train; with --eval: test; with "
            "--predict or --embed: all of your own images, else test)",
        },
    )
    group = parser.add_argument_group("splits")
    group.add_argument(
        "--val_split",
        choices=SPLITS,
        help="split that selects the checkpoint (default: val; sen12flood without --val_fraction: test, as published)",
    )
    group.add_argument(
        "--test_split",
        choices=(*SPLITS, "none"),
        default="test",
        help="split on which the selected checkpoint is evaluated; none: no evaluation",
    )
    group.add_argument("--val_metadata", nargs="+", metavar="FILE", help="as --metadata, for --val_split")
    group.add_argument("--test_metadata", nargs="+", metavar="FILE", help="as --metadata, for --test_split")
    group.add_argument(
        "--train_fraction",
        type=positive_share,
        default=1.0,
        metavar="SHARE",
        help="share of the training samples to use, drawn at random; a smaller share is a part of a larger one",
    )


def add_task_flags(parser):
    """Flags that use a checkpoint as it is."""
    group = parser.add_argument_group(
        "evaluate, predict, map, embed, export",
        "use the checkpoint of --finetune instead of training; without these flags the program finetunes, then "
        "evaluates the selected checkpoint",
    )
    group.add_argument("--eval", action="store_true", help="evaluate the checkpoint of --finetune or --resume")
    group.add_argument(
        "--predictions",
        metavar="FILE",
        help="with --eval: write a row for each sample, with id, labels and probabilities, or for segmentation with "
        "the pixels and the IoU of each class (.csv or .parquet)",
    )
    group.add_argument(
        "--predict",
        metavar="FILE",
        help="write the probabilities of the classes for images with or without labels (.csv or .parquet; .tif, with "
        "a band for each class, for tiles of a scene). With --output_map: the scene to map, which is a GeoTIFF of VV "
        "and VH, VV.tif,VH.tif, or a folder of scenes",
    )
    group.add_argument(
        "--output_map",
        metavar="FILE",
        help="write a map of the scene of --predict, with the class of every pixel, by a segmentation checkpoint (.tif "
        "and a picture beside it)",
    )
    group.add_argument(
        "--map_values",
        choices=VALUES,
        default="classes",
        help="values of --output_map: the most probable class of each pixel, or a band of probabilities for each class",
    )
    group.add_argument(
        "--embed",
        metavar="FILE",
        help="write the features of the encoder with ids and, where known, labels and outlines (.npz or .parquet; .tif "
        "for tiles of a scene)",
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
        help="write the checkpoint as safetensors and as a program that needs only PyTorch, with config.json and a "
        "model card; with --eval, the card has the metrics",
    )


def add_model_flags(parser):
    """Flags of the classifier."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=tuple(ENCODERS), help="size of the model (default: the checkpoint's, else mixmim_base)"
    )
    group.add_argument(
        "--input_size",
        type=positive_int,
        metavar="PIXELS",
        help="side of the input (default: the checkpoint's, else 128; floods: the images', a multiple of 128)",
    )
    group.add_argument(
        "--nb_classes",
        type=positive_int,
        metavar="N",
        help="number of classes; another number than the dataset's is an error (default: the dataset's)",
    )
    group.add_argument(
        "--drop_path", type=rate, default=0.1, metavar="RATE", help="rate of stochastic depth in the last block"
    )
    group.add_argument("--freeze_encoder", action="store_true", help="train only the head (linear probe)")
    group.add_argument(
        "--head_init",
        choices=HEAD_INITS,
        help="sen12flood: start from a head that is fitted to the features of the training pairs, for few pairs "
        "(default: from weights near zero, as published)",
    )
    group.add_argument(
        "--patch_cut",
        choices=PATCH_CUTS,
        help="sen12flood: vhvv: cut images into patches of VH and VV; released: as the released code does (default: "
        "vhvv; released for its checkpoints)",
    )
    group.add_argument(
        "--patch_op",
        choices=PATCH_OPS,
        help="sen12flood: mean or maximum of the differences between the patches (default: avg)",
    )
    add_force_flag(group)


def add_segmentation_flags(parser):
    """Flags of segmentation."""
    group = parser.add_argument_group("segmentation", "for --dataset masks and sen1floods11")
    group.add_argument(
        "--crop_scale",
        type=positive_share,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="train on random resized crops, whose area is between these shares of the image (default: crops of "
        "input_size × input_size pixels, not resized)",
    )
    group.add_argument(
        "--crops",
        type=positive_int,
        metavar="N",
        help="crops of each image in an epoch (default: as many as cover the area of an image)",
    )
    group.add_argument(
        "--dice",
        type=non_negative,
        metavar="WEIGHT",
        help="add the Dice loss, times this weight, to the cross-entropy (default: no Dice loss)",
    )
    group.add_argument(
        "--overlap",
        type=Range(float, at_least=0, at_most=MOST_OVERLAP),
        default=0.25,
        metavar="SHARE",
        help="overlap of the windows, of side input_size, by which images and scenes are predicted, as a share of it",
    )


def add_mixing_flags(parser):
    """Flags of mixup, cutmix and label smoothing."""
    group = parser.add_argument_group("mixing of samples", "off by default, as in the published recipe")
    group.add_argument("--mixup", type=non_negative, default=0.0, metavar="ALPHA", help="alpha of mixup; 0: no mixup")
    group.add_argument(
        "--cutmix", type=non_negative, default=0.0, metavar="ALPHA", help="alpha of cutmix; 0: no cutmix"
    )
    group.add_argument(
        "--cutmix_minmax",
        type=positive_share,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="cutmix with boxes whose sides are between these shares of the image's, instead of --cutmix",
    )
    group.add_argument(
        "--mixup_prob", type=share, default=1.0, metavar="P", help="probability that a batch, pair or element is mixed"
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=share,
        default=0.5,
        metavar="P",
        help="probability of cutmix instead of mixup, if both are on",
    )
    group.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="draw the shares of mixing once for the batch, for each pair, or for each element",
    )
    group.add_argument(
        "--smoothing",
        type=rate,
        default=0.0,
        metavar="S",
        help="label smoothing: the label 1 becomes 1 − S/2, 0 becomes S/2",
    )


def parse_flags(argv=None):
    """The flags as Config. Those that are left to the checkpoint, the dataset or the machine are None."""
    return build_parser().parse_checked(argv, check_flags)


def check_flags(flags):
    """Refuses flags that contradict each other, before any work. Returns Config. Raises UsageError."""
    opens_data = flags.eval or flags.embed or (flags.predict and not flags.output_map)
    need(
        flags.data_path or flags.output_map or not flags.predict,
        "--data_path is missing: the folder of the images that --predict classifies; to map the scene that --predict "
        "names, add --output_map FILE.tif",
    )
    check_common_flags(flags, needs_data=opens_data or not (flags.export or flags.output_map))
    check_segmentation(flags)
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
        some = {"task": "multiclass", "nb_classes": 2}  # for images of one's own, which state them once opened
        build_model(settle(given, classifier_defaults(given.dataset), some), meta=True)
    return given


def check_segmentation(flags):
    """Refuses flags that segmentation has not, and those that it alone has. Raises UsageError."""
    need(
        not flags.crop_scale or flags.crop_scale[0] <= flags.crop_scale[1],
        "--crop_scale: two shares above 0 and at most 1 are needed, the smaller one first",
    )
    need(
        not flags.output_map or flags.predict and not (flags.eval or flags.embed),
        "--output_map: needs --predict SCENE, and cannot be used with --eval or --embed",
    )
    task = DATASETS[flags.dataset].task if flags.dataset else None
    if task == "segmentation":
        need(
            not (mixes(flags) or flags.smoothing),
            "--mixup, --cutmix, --smoothing: not available for segmentation; leave them out",
        )
    elif task:
        for name in ("crop_scale", "crops", "dice"):
            need(getattr(flags, name) is None, f"--{name}: --dataset {flags.dataset} has no masks; leave it out")


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
        "output_map": (".tif",),
    }
    if flags.output_map:
        del kinds_of["predict"]  # the scene
    for name, kinds in kinds_of.items():
        path = getattr(flags, name)
        need(not path or Path(path).suffix in kinds, f"--{name} {path}: its name must end in {' or '.join(kinds)}")
        need(not path or Path(path).parent.is_dir(), f"--{name} {path}: there is no such folder; make it")
        need(not path or not Path(path).is_dir(), f"--{name} {path}: is a folder; choose another name")
    files = {name: Path(getattr(flags, name)).resolve() for name in kinds_of if getattr(flags, name)}
    read = {Path(path).resolve() for path in flags.metadata or ()}
    for name, path in files.items():
        twice = next((other for other in files if other != name and files[other] == path), None)
        need(twice is None, f"--{name} {path}: is also the file of --{twice}; choose another name")
        own = flags.data_path and path.is_relative_to(Path(flags.data_path).resolve())
        image = flags.dataset in (None, *OWN) and path.suffix == ".tif"
        need(
            not path.exists() or path not in read and not (own and (image or path.name in OF_DATA)),
            f"--{name} {path}: is a file of the data and would be overwritten; choose another name",
        )
    for name in (*kinds_of, "export", *(("output_dir",) if flags.eval else ())):
        path = getattr(flags, name)
        need(not path or can_write(path), f"--{name} {path}: cannot be written there; choose another place")
    scenes = Path(flags.predict or "").resolve()
    need(
        not flags.output_map or not scenes.is_dir() or not files["output_map"].is_relative_to(scenes),
        f"--output_map {flags.output_map}: lies in the folder of the scenes of --predict and would be read as a "
        "scene; choose another folder",
    )
    need(not Path(flags.output_dir).is_file(), f"--output_dir {flags.output_dir}: is a file; choose a folder")


def check_training(flags):
    """Refuses flags that a finetuning cannot start with. Raises UsageError."""
    need(flags.dataset is not None, f"--dataset is missing; choose one of {', '.join(DATASETS)}")
    need(
        flags.finetune is not None or flags.resume,
        "--finetune is missing: the checkpoint to start from, or '' for random initialisation",
    )
    need(
        flags.dataset in (*OWN, "sen12flood") or not flags.val_fraction,
        "--val_fraction: only for sen12flood and your own images; BigEarthNet has a validation split",
    )
    need(flags.split not in ("test", "all"), f"--split {flags.split}: would train on the test split; choose another")
    need(
        not flags.head_init or flags.dataset == "sen12flood",
        f"--head_init {flags.head_init}: only for --dataset sen12flood; leave it out",
    )
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
