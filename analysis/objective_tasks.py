# SPDX-License-Identifier: MIT
"""Evaluates one frozen encoder, or the baselines, on the tasks of `analysis.objective_study`, which starts this.

    python -m analysis.objective_tasks --output DIR --arm norm_pix --seed 0 --checkpoint PATH --water DIR
    python -m analysis.objective_tasks --output DIR --baselines --water DIR

The arm "random" is the model of the checkpoint, untrained. What follows "--" are flags of main_pretrain.py that say how
the images of --dataset are read. A result is a file in DIR/results/TASK; one that is there, of the same checkpoint and
data, is not made again.
"""

import sys
import time
from pathlib import Path

import numpy as np

import main_pretrain
from analysis.objective_arms import RANDOM
from analysis.objective_encoders import identity_of, trained, untrained, untrained_identity
from analysis.objective_images import Floods, LandCover
from analysis.objective_places import Tiles, Water
from common.command_line import Parser, positive_share, seed
from common.errors import DataError, UsageError
from common.files import make_folder, read_json, write_json
from sarwmix.registry import open_dataset
from util.datasets import build_dataset

LABELLED = ("benv1", "benv2")
TASKS = ("land_cover", "floods", "water", "tiles")
BASELINES = "baselines.json"
AGAIN = "remove it, and start the study again"


# ---- Flags ---------------------------------------------------------------------------------------


def add_task_flags(parser):
    """Adds the flags of the data of the tasks."""
    group = parser.add_argument_group("data; a task without data is left out")
    group.add_argument(
        "--dataset",
        choices=("benv1", "benv2", "chips", "masks", "sen1floods11"),
        default="benv2",
        help="data of the pretraining; the task land_cover uses the labels of benv1 and benv2",
    )
    group.add_argument("--data_path", metavar="DIR", help="folder of the data, as for main_pretrain.py")
    group.add_argument("--flood_path", metavar="DIR", help="pairs of SEN12-FLOOD, for the task floods")
    group.add_argument("--water", metavar="DIR", help="images with masks in groups, for the task water")
    group.add_argument(
        "--water_dataset", choices=("sen1floods11", "masks"), default="sen1floods11", help="dataset of --water"
    )
    group.add_argument("--positive", default="water", metavar="CLASS", help="class of the task water")
    group.add_argument(
        "--tiles", metavar="DIR", help="tiles with masks (--dataset masks) in groups, for the task tiles"
    )
    group.add_argument("--tile_class", default="water", metavar="CLASS", help="class of the task tiles")
    group.add_argument(
        "--tile_share",
        type=positive_share,
        default=0.02,
        metavar="SHARE",
        help="the task tiles separates tiles with at least this share of the class from tiles without it",
    )


def task_words(args):
    """The words of `add_task_flags` that give these flags again."""
    names = ("dataset", "data_path", "flood_path", "water", "water_dataset", "positive", "tiles", "tile_class")
    words = [word for name in names if getattr(args, name) for word in (f"--{name}", getattr(args, name))]
    return [*words, "--tile_share", str(args.tile_share)]


def build_parser():
    parser = Parser(__doc__.splitlines()[0], "analysis.objective_tasks")
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--arm", default="", metavar="NAME", help=f"name of the encoder in the results; {RANDOM}: an untrained encoder"
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the pretraining of the encoder")
    group.add_argument("--checkpoint", metavar="PATH", help="checkpoint of the pretraining; its encoder is frozen")
    group.add_argument("--baselines", action="store_true", help="evaluate the baselines instead of an encoder")
    group.add_argument("--output", required=True, metavar="DIR", help="folder of the study")
    add_task_flags(parser)
    return parser


# ---- Tasks ---------------------------------------------------------------------------------------


def names_of(args):
    """The names of the tasks that these flags give data for."""
    given = (args.data_path and args.dataset in LABELLED, args.flood_path, args.water, args.tiles)
    return [name for name, data in zip(TASKS, given) if data]


def open_task(name, args, words):
    """A task with its data. words: flags of main_pretrain.py. Raises DataError, UsageError."""
    if name == "land_cover":
        flags = main_pretrain.parse_flags(["--dataset", args.dataset, "--data_path", args.data_path, *words])
        return LandCover(*(build_dataset(flags, split, supervised=True) for split in ("train", "test")))
    if name == "floods":
        return Floods(*(open_dataset("sen12flood", args.flood_path, split, None, True) for split in ("train", "test")))
    if name == "water":
        dataset = open_dataset(args.water_dataset, args.water, "all", None, True)
        return Water(dataset, class_of(dataset, args.positive, "--positive"))
    dataset = open_dataset("masks", args.tiles, "all", None, True)
    return Tiles(dataset, class_of(dataset, args.tile_class, "--tile_class"), args.tile_share)


def class_of(dataset, name, flag):
    """The number of a class. Raises UsageError."""
    if name not in dataset.CLASSES:
        raise UsageError(f"{flag} {name}: the classes of {dataset.root} are {', '.join(dataset.CLASSES)}; name one")
    return dataset.CLASSES.index(name)


# ---- Results -------------------------------------------------------------------------------------


def result_path(output, task, arm, number):
    """Where the result of an encoder on a task lies."""
    return Path(output) / "results" / task / f"{arm}_seed{number}.json"


def baselines_path(output, task):
    return Path(output) / "results" / task / BASELINES


def is_there(path, stated):
    """Whether there is a result that states the same. Raises DataError for a file that is no result."""
    if not path.exists():
        return False
    content = read_json(path, AGAIN)
    return isinstance(content, dict) and all(content.get(name) == value for name, value in stated.items())


def plain(value):
    """A result without NaN, which JSON lacks: None."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def keep(path, content):
    make_folder(path.parent)
    write_json(path, plain(content))


def stated_by(arm, number, checkpoint):
    """The identity of the encoder of an arm, which its results state."""
    return untrained_identity(checkpoint, number) if arm == RANDOM else identity_of(checkpoint)


def encoder_of(args):
    """The Frozen encoder of the flags. Raises DataError, UsageError."""
    if args.arm == RANDOM:
        return untrained(args.checkpoint, args.seed)
    return trained(args.checkpoint, args.dataset)


def evaluate(args, tasks):
    """Makes the results of an encoder, or of the baselines, that are not there. Raises DataError, UsageError."""
    identity = None if args.baselines else stated_by(args.arm, args.seed, args.checkpoint)
    frozen = None
    for task in tasks:
        started, stated = time.monotonic(), {"task": task.name, "encoder": identity, "data": task.data}
        path = result_path(args.output, task.name, args.arm, args.seed)
        if args.baselines:
            path = baselines_path(args.output, task.name)
        if is_there(path, stated):
            continue
        if args.baselines:
            found = {"methods": task.baselines()}
        else:
            frozen = frozen or encoder_of(args)
            found = {"arm": args.arm, "seed": args.seed, **task.evaluate(frozen)}
        keep(path, {**stated, **found})
        print(f"{path}: {time.monotonic() - started:.0f} s", flush=True)


def check_flags(args):
    """Raises UsageError for flags that are not enough."""
    if not args.baselines and not (args.arm and args.checkpoint):
        raise UsageError("--arm and --checkpoint must name an encoder, or --baselines be given")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise UsageError(f"--checkpoint {args.checkpoint}: there is no such checkpoint")
    if not names_of(args):
        raise DataError("no task has data; give one of --data_path, --flood_path, --water and --tiles")


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = build_parser()
    args = parser.parse_checked(words[:end], check_flags)
    with parser.input_errors():
        evaluate(args, [open_task(name, args, words[end + 1 :]) for name in names_of(args)])


if __name__ == "__main__":
    main()
