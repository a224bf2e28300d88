# SPDX-License-Identifier: MIT
"""Prepares SEN12-FLOOD in four steps, from its archive to the dataset of --dataset sen12flood (README_sen12.md).

    python -m sarwmix.prepare.sen12flood --zip SEN12FLOOD.zip --work WORK --out OUT --workers 8

WORK holds the extracted files (raw/), the aligned images (aligned/) and the pairs (pairs/), all removed at the end. OUT
is the dataset. Before anything is written, the needed disk space is compared with the free space.
"""

import argparse
import hashlib
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tabulate import tabulate

from common.command_line import Parser, positive_int
from common.errors import DataError, UsageError
from common.files import check_room, room_at, sha256_of
from common.launchers import mpirun
from common.safe_zip import open_archive
from common.workers import add_workers_flag, run_command
from sarwmix.listing import CHANNELS
from sarwmix.prepare.sen12_index import S1_LIST, STEP, log_list, pairs, parse_s1_list, read_s1_list
from sarwmix.prepare.sen12_unzip import plan, unzip
from sarwmix.sen12_align_s1_to_s2 import add_warping_flags, align
from sarwmix.sen12_data_prep import add_list_flags, prepare
from sarwmix.sen12_prune_partial_pairs import add_curation_flags, is_complete, prune

log = logging.getLogger(__name__)

PROGRAM = "sarwmix.prepare.sen12flood"
SOURCES = ("zip", "raw_root", "s1_list", "train_list", "test_list")


def settled(args):
    """The flags with absolute paths, and `raw`, the folder of the unzipped archive."""
    given = {name: getattr(args, name) for name in (*SOURCES, "work", "out")}
    paths = {name: path and (args.relative_to / path).resolve() for name, path in given.items()}
    return SimpleNamespace(**vars(args) | paths, raw=paths["raw_root"] or paths["work"] / "raw")


def sources_of(settings):
    """The input files and folders: [(flag, path)]."""
    return [(f"--{name}", getattr(settings, name)) for name in SOURCES if getattr(settings, name)]


def parameters_of(settings):
    """The parameters that decide the content of OUT, as OUT records them: {name: value}."""
    if settings.s1_list or settings.raw_root:
        digest = sha256_of(settings.s1_list or settings.raw_root / S1_LIST)
    else:
        with open_archive(settings.zip) as archive:
            member = plan(archive).wanted.get(S1_LIST)
            digest = member and hashlib.sha256(archive.read(member)).hexdigest()
    return {
        **{name: getattr(settings, name) for name in ("layout", "size", "max_zeros", "resampling", "units")},
        "s1_list_sha256": digest,
        "train_list_sha256": settings.train_list and sha256_of(settings.train_list),
        "test_list_sha256": settings.test_list and sha256_of(settings.test_list),
    }


def check_paths(settings):
    """Raises UsageError for sources that do not exist, and for folders inside others that are filled or removed."""
    s = settings
    for flag, path in sources_of(s):
        if path == s.raw_root and not path.is_dir():
            raise UsageError(f"{flag} {path}: there is no such folder")
        if path != s.raw_root and not path.is_file():
            raise UsageError(f"{flag} {path}: there is no such file")
    if s.raw_root and not s.s1_list and not (s.raw_root / S1_LIST).is_file():
        raise UsageError(f"{s.raw_root / S1_LIST}: there is no such file; give the list of images with --s1_list")
    if s.work.is_relative_to(s.out):
        raise UsageError(f"--work {s.work} lies in --out; choose another --work")
    for folder in (s.work / step for step in ("raw", "aligned", "pairs")):
        for flag, path in [("--out", s.out), *sources_of(s)]:
            unzipped_there = path == s.raw_root and folder.name == "raw"
            if path.is_relative_to(folder) and not unzipped_there:
                other = "--out" if flag == "--out" else "--work"
                raise UsageError(f"{flag} {path} lies in {folder}, which is filled and removed; choose another {other}")
    for flag, path in (("--work", s.work), ("--out", s.out)):
        if s.raw_root and path.is_relative_to(s.raw_root):
            raise UsageError(f"{flag} {path} lies in --raw_root; choose another {flag}")


# ---- Room on the disk ----------------------------------------------------------------------------


def estimate(folders, extracted, settings):
    """The size of the files that the preparation writes: [(what, flag of the folder, bytes)].

    Counts the pixels of all pairs of the list, without compression, although some pairs will be dropped.
    folders: {folder: [Image]}, as `read_s1_list` returns. extracted: bytes to extract from the zip, 0 without a zip.
    """
    image = len(CHANNELS) * settings.size**2 * np.float32().itemsize
    usable = sum(image.polarisations == CHANNELS for images in folders.values() for image in images)
    candidates = sum(len(pairs([image.flooded for image in images])) for images in folders.values())
    return [
        *([("extracted from the zip", "--work", extracted)] if extracted else []),
        (f"{usable} aligned images", "--work", usable * image),
        {
            "images": (f"{usable} images, each once", "--out", usable * image),
            "npy": (f"{candidates} pairs at most", "--out", candidates * 2 * image),
        }[settings.layout],
    ]


def present(folder, apart=()):
    """Bytes of the files under a folder, which need not exist, without files at or under the paths `apart`."""
    apart, total = {Path(path).resolve() for path in apart}, 0
    for place, folders, files in os.walk(Path(folder).resolve()):
        folders[:] = [name for name in folders if Path(place, name) not in apart]
        if Path(place) in apart:  # the folder itself
            return 0
        total += sum(Path(place, name).lstat().st_size for name in files if Path(place, name) not in apart)
    return total


def read_sources(settings):
    """Returns ({folder: [Image]}, bytes to extract). Raises DataError.

    The list is --s1_list, else the one in the zip or the raw folder.
    """
    if settings.zip is None:
        return read_s1_list(settings.s1_list or settings.raw_root / S1_LIST), 0
    with open_archive(settings.zip) as archive:
        planned = plan(archive)
    if settings.s1_list is not None:
        return read_s1_list(settings.s1_list), planned.bytes
    if planned.s1_list is None:
        raise DataError(f"{settings.zip}: holds no {S1_LIST}; give it with --s1_list")
    return parse_s1_list(planned.s1_list, f"{settings.zip}: {planned.wanted[S1_LIST]}"), planned.bytes


def check_disk(settings):
    """Logs the counts of the list, and the needed and the free disk space. Raises DataError if there is not enough.

    Files that exist already are subtracted.
    """
    work, out = settings.work, settings.out
    images, extracted = read_sources(settings)
    log_list(settings.s1_list or S1_LIST, images, bool(settings.train_list))
    needs = estimate(images, extracted, settings)
    sources = [path for path in (settings.zip, settings.raw_root) if path is not None]
    folders = {"--work": work, "--out": out}
    missing, rows = [], [(what, f"{flag} {folders[flag]}", count / 1e9) for what, flag, count in needs]
    for flag, folder, other in (("--work", work, out), ("--out", out, work)):
        written = present(folder, [other, *sources])
        needed = max(0, sum(count for _, name, count in needs if name == flag) - written)
        missing.append((flag, folder, needed))
        sizes = {"there already": written, "still needed": needed, "free": room_at(folder)[1]}
        rows += [(what, f"{flag} {folder}", size / 1e9) for what, size in sizes.items()]
    for line in tabulate(rows, ("what", "where", "GB"), floatfmt=".3f").splitlines():
        log.info("%s", line)
    if settings.layout == "npy":
        log.info("pairs that the curation drops are not written: --out will need less than this")
    if settings.keep_intermediate:
        log.info("the content of --work is kept")
    else:
        log.info("the content of --work is removed after the last step, when the most is needed")
    check_room(missing)


# ---- The steps -----------------------------------------------------------------------------------


def say(text):
    sys.stdout.write(f"[prepare] {text}\n")
    sys.stdout.flush()


def begin(settings):
    """Whether OUT is complete already; if not, checks the disk space.

    Raises DataError if OUT was made with other parameters, or if there is no room.
    """
    if is_complete(settings.out, parameters_of(settings)):
        remove_intermediate(settings)
        say(f"{settings.out} is already complete, nothing to do")
        return True
    check_disk(settings)
    return False


def run_steps(settings, workers):
    """Runs the four steps on all ranks and processes. Each step continues where it was interrupted."""
    s, aligned, made = settings, settings.work / "aligned", settings.work / "pairs"
    if s.zip:
        workers.on_main(say, "1/4 unzipping what is needed")
        unzip(s.zip, s.raw, workers)
    workers.on_main(say, "2/4 aligning the Sentinel-1 images")
    align(s.raw, aligned, s.s1_list, s.resampling, s.units, s.size, workers)
    workers.on_main(say, "3/4 making pairs")
    prepare(made, aligned, None, s.train_list, s.test_list, workers)
    workers.on_main(say, "4/4 dropping pairs that lack data, writing the others")
    prune(aligned, made, s.out, s.max_zeros, s.size, s.layout, workers)
    workers.on_main(finish, s)


def finish(settings):
    """Removes the intermediate folders, and prints how to train."""
    remove_intermediate(settings)
    say(
        f"done: {settings.out}. preparation.json has the counts, dropped.csv what was dropped and why. To train on it "
        "from BigEarthNet v1 weights:"
    )
    say(
        f"  python main_finetune.py --dataset sen12flood --data_path {shlex.quote(str(settings.out))} "
        "--finetune benv1_pretrain_checkpoint_64.pth --batch_size 16"
    )


def remove_intermediate(settings):
    """Removes the folders of the steps, which hold a step.json. Renames them first, as it may be interrupted."""
    if settings.keep_intermediate:
        return
    for name in ("aligned", "pairs", *(["raw"] if settings.zip else [])):
        folder, removed = settings.work / name, settings.work / f".removing-{name}"
        if (folder / STEP).is_file():
            say(f"removing {folder}")
            folder.rename(removed)
        if removed.exists():
            shutil.rmtree(removed)


# ---- Program -------------------------------------------------------------------------------------


def get_args_parser():
    parser = Parser(
        "Prepare SEN12-FLOOD, from its archive to the data of --dataset sen12flood.",
        PROGRAM,
        usage="[flags] --zip ZIP --work DIR --out DIR",
    )
    group = parser.add_argument_group("files")
    group.add_argument("--zip", type=path, help="the downloaded archive")
    group.add_argument(
        "--raw_root",
        "--raw-root",
        type=path,
        help=f"instead of --zip: the folder that it was extracted to, with {S1_LIST}",
    )
    group.add_argument("--work", type=path, help="folder of intermediate files, removed at the end")
    group.add_argument("--out", type=path, help="folder of the dataset")
    group.add_argument("--s1_list", "--s1-list", type=path, help=f"list of images, instead of that {S1_LIST}")
    group.add_argument(
        "--keep_intermediate", "--keep-intermediate", action="store_true", help="keep the files in --work"
    )
    group.add_argument("--relative_to", type=path, default=Path(), help="folder that relative paths start from")
    group = parser.add_argument_group("steps", "as in the programs of the steps")
    add_warping_flags(group)
    add_list_flags(group)
    add_curation_flags(group)
    group = parser.add_argument_group("processes")
    add_workers_flag(group)
    group.add_argument(
        "--ranks", type=positive_int, default=1, help="MPI ranks; ignored if the variable LAUNCH starts them"
    )
    group.add_argument("--as_rank", action="store_true", help=argparse.SUPPRESS)  # set by `start_ranks`
    return parser


def path(text):
    """An argparse type: a path that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("a value is needed")
    return Path(text)


def check(args):
    """Raises UsageError for flags that are missing or contradict each other."""
    if args.zip and args.raw_root:
        raise UsageError("--zip and --raw_root: give one of them")
    if not args.zip and not args.raw_root:
        raise UsageError("--zip, or --raw_root, is needed; see --help")
    for name in ("work", "out"):
        if not getattr(args, name):
            raise UsageError(f"--{name} is needed; see --help")
    if bool(args.train_list) != bool(args.test_list):
        raise UsageError("--train_list and --test_list must be given together")
    check_paths(settled(args))


def start_ranks(ranks, argv):
    """Replaces this process by MPI ranks of itself, if LAUNCH or --ranks is given. Raises DataError without mpirun."""
    command = [sys.executable, "-m", PROGRAM, *argv, "--as_rank"]
    if os.environ.get("LAUNCH"):
        command = [*os.environ["LAUNCH"].split(), *command]
    elif ranks > 1:
        if shutil.which("mpirun") is None:
            raise DataError(f"--ranks {ranks}: there is no mpirun; install it (INSTALL.md), or use --workers alone")
        cores = len(os.sched_getaffinity(0))
        if not any(word.startswith("--workers") for word in argv):
            command += ["--workers", str(max(1, cores // ranks))]
        command = [*mpirun(ranks, cores), *command]
    else:
        return
    os.execvp(command[0], command)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = get_args_parser()
    parser.parse_checked(argv, check)

    def work(args, workers):
        settings = settled(args)
        if not args.as_rank:
            if workers.on_main(begin, settings):
                return
            if workers.world_size == 1:
                start_ranks(args.ranks, argv)
        run_steps(settings, workers)

    run_command(parser, work, argv)


if __name__ == "__main__":
    main()
