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


def build_parser():
    """The flags of this program, in groups."""
    parser = Parser(
        description="Finetune a SAR-W-MixMAE encoder: BigEarthNet (multi-label), SEN12-FLOOD (image pairs), "
        "Sen1Floods11 (segmentation), or images of one's own (chips: one label each, or several; masks: segmentation)."
    )
    parser.set_defaults(task=None)  # of TASKS; chips and checkpoints state it
    add_task_flags(parser)
    add_model_flags(parser)
    add_split_flags(parser)
    add_segmentation_flags(parser)
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
        help="with --eval: a row per sample, with id, labels and probabilities, or for segmentation the pixels and the "
        "IoU of each class (.csv or .parquet)",
    )
    group.add_argument(
        "--predict",
        metavar="FILE",
        help="write the probabilities of a checkpoint's classes for images with or without labels (.csv, .parquet, or "
        ".tif where the images are tiles of a scene: a band per class); with --output_map, the scene to map: a GeoTIFF "
        "of VV and VH, VV.tif,VH.tif, or a folder of scenes",
    )
    group.add_argument(
        "--output_map",
        metavar="FILE",
        help="write the class of every pixel of the scene of --predict, by a segmentation checkpoint (.tif, with a "
        "picture beside it)",
    )
    group.add_argument(
        "--map_values",
        choices=VALUES,
        default="classes",
        help="what --output_map holds: the most probable class of a pixel, or a band of probabilities for each class",
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
        "--head_init",
        choices=HEAD_INITS,
        help="sen12flood: start from a head fitted to the features of the training pairs, for few pairs (default: from "
        "weights near zero, as published)",
    )
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
        help="BigEarthNet v1 or v2, SEN12-FLOOD, Sen1Floods11, or images of one's own, with labels (chips) or masks; "
        "can be left out where a checkpoint of ours is used on data of its own kind",
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


def add_segmentation_flags(parser):
    """Flags of segmentation."""
    group = parser.add_argument_group("segmentation", "--dataset masks and sen1floods11")
    group.add_argument(
        "--crop_scale",
        type=positive_share,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="train on random resized crops whose area is this share of the image (default: input_size × input_size "
        "pixels as they are)",
    )
    group.add_argument(
        "--crops",
        type=positive_int,
        metavar="N",
        help="crops of each image in an epoch (default: as many as cover the area of the image)",
    )
    group.add_argument(
        "--dice", type=non_negative, metavar="WEIGHT", help="add this times the Dice loss to the cross-entropy"
    )
    group.add_argument(
        "--overlap",
        type=Range(float, at_least=0, at_most=MOST_OVERLAP),
        default=0.25,
        metavar="SHARE",
        help="overlap of the windows of input_size in which images and scenes are predicted, as a share of their side",
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
        "--output_map: names the map of the scene that --predict names, and goes with neither --eval nor --embed",
    )
    task = DATASETS[flags.dataset].task if flags.dataset else None
    if task == "segmentation":
        need(not (mixes(flags) or flags.smoothing), "--mixup, --cutmix, --smoothing: segmentation has none of these")
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
        need(twice is None, f"--{name} {path}: is the file of --{twice} as well; choose another name")
        own = flags.data_path and path.is_relative_to(Path(flags.data_path).resolve())
        image = flags.dataset in (None, *OWN) and path.suffix == ".tif"
        need(
            not path.exists() or path not in read and not (own and (image or path.name in OF_DATA)),
            f"--{name} {path}: is a file of the data, which would be lost; choose another name",
        )
    for name in (*kinds_of, "export", *(("output_dir",) if flags.eval else ())):
        path = getattr(flags, name)
        need(not path or can_write(path), f"--{name} {path}: cannot be written there; choose another place")
    scenes = Path(flags.predict or "").resolve()
    need(
        not flags.output_map or not scenes.is_dir() or not files["output_map"].is_relative_to(scenes),
        f"--output_map {flags.output_map}: lies among the scenes of --predict, and would be taken for one of them; "
        "choose another folder",
    )
    need(not Path(flags.output_dir).is_file(), f"--output_dir {flags.output_dir}: is a file; choose a folder")


def check_training(flags):
    """Refuses flags that a finetuning cannot start with. Raises UsageError."""
    need(flags.dataset is not None, f"--dataset is missing: one of {', '.join(DATASETS)}")
    need(
        flags.finetune is not None or flags.resume,
        "--finetune is missing: the checkpoint to start from, or '' for random initialisation",
    )
    need(
        flags.dataset in (*OWN, "sen12flood") or not flags.val_fraction,
        "--val_fraction: only sen12flood and images of one's own need it; BigEarthNet has a validation split",
    )
    need(flags.split not in ("test", "all"), f"--split {flags.split}: would train on the test split")
    need(
        not flags.head_init or flags.dataset == "sen12flood",
        f"--head_init {flags.head_init}: for --dataset sen12flood alone; leave it out",
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
