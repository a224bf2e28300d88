# SPDX-License-Identifier: MIT
"""SEN12-FLOOD from its archive to what --dataset sen12flood reads, in four steps (README_sen12.md).

    python -m sarwmix.prepare.sen12flood --zip SEN12FLOOD.zip --work WORK --out OUT --workers 8

WORK takes what is extracted from the zip (raw/), the aligned images (aligned/) and the pairs (pairs/); it is emptied at
the end. OUT takes what training reads. Before anything is written, the room that all of it needs is compared with what
is free.
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

from tabulate import tabulate

from common.command_line import Parser, positive_int
from common.errors import DataError, UsageError
from common.files import check_room, room_at, sha256_of
from common.launchers import mpirun
from common.safe_zip import open_archive
from common.workers import add_workers_flag, run_command
from sarwmix.listing import CHANNELS
from sarwmix.prepare.sen12_index import S1_LIST, STEP, pairs, parse_s1_list, read_s1_list
from sarwmix.prepare.sen12_unzip import plan, unzip
from sarwmix.sen12_align_s1_to_s2 import add_warping_flags, align
from sarwmix.sen12_data_prep import add_list_flags, prepare
from sarwmix.sen12_prune_partial_pairs import add_curation_flags, is_complete, prune

log = logging.getLogger(__name__)

PROGRAM = "sarwmix.prepare.sen12flood"
VALUE = 4  # bytes, float32
SOURCES = ("zip", "raw_root", "s1_list", "train_list", "test_list")


def settled(args):
    """The flags with absolute paths, and `raw`, the folder of the unzipped archive."""
    names = (*SOURCES, "work", "out")
    paths = {name: path and (args.relative_to / path).resolve() for name in names for path in [getattr(args, name)]}
    return SimpleNamespace(**vars(args) | paths, raw=paths["raw_root"] or paths["work"] / "raw")


def sources_of(settings):
    """[(flag, path)] of the files and folders that are read."""
    return [(f"--{name}", getattr(settings, name)) for name in SOURCES if getattr(settings, name)]


def parameters_of(settings):
    """{name: value} of all that decides the content of OUT, as OUT records it."""
    lists = {
        name: path and sha256_of(path) for name, path in vars(settings).items() if name in ("train_list", "test_list")
    }
    own = {name: getattr(settings, name) for name in ("layout", "size", "max_zeros", "resampling", "units")}
    return {
        **own,
        "s1_list_sha256": list_digest(settings),
        **{f"{name}_sha256": digest for name, digest in lists.items()},
    }


def list_digest(settings):
    """SHA-256 of the list of images: the one given, or that in the zip or the raw folder; None if the zip has none."""
    if settings.s1_list or settings.raw_root:
        return sha256_of(settings.s1_list or settings.raw_root / S1_LIST)
    with open_archive(settings.zip) as archive:
        member = plan(archive).wanted.get(S1_LIST)
        return member and hashlib.sha256(archive.read(member)).hexdigest()


def check_paths(settings):
    """Raises UsageError for sources that are not there, and for a folder within another that is filled or removed."""
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
    """What the preparation writes: [(what, flag of the folder, bytes)].

    No compression is assumed, and only pixels count.

    folders: {folder: [Image]}, as `read_s1_list` gives them. extracted: bytes that come out of the zip, 0 without one.
    All pairs of the list are counted; some of them will turn out unusable.
    """
    image = len(CHANNELS) * settings.size**2 * VALUE
    usable = sum(image.polarisations == CHANNELS for images in folders.values() for image in images)
    candidates = sum(len(pairs([image.flooded for image in images])) for images in folders.values())
    trained = {
        "images": (f"{usable} images, each once", "--out", usable * image),
        "npy": (f"{candidates} pairs at most", "--out", candidates * 2 * image),
    }[settings.layout]
    needs = [("extracted from the zip", "--work", extracted)] if extracted else []
    return [*needs, (f"{usable} aligned images", "--work", usable * image), trained]


def present(folder, apart=()):
    """Bytes of the files under a folder, which need not exist; `apart` from those under, or at, other paths."""
    apart, total = {Path(path).resolve() for path in apart}, 0
    for place, folders, files in os.walk(Path(folder).resolve()):
        folders[:] = [name for name in folders if Path(place, name) not in apart]
        if Path(place) in apart:  # the folder itself: its content cannot be told apart
            return 0
        total += sum(Path(place, name).lstat().st_size for name in files if Path(place, name) not in apart)
    return total


def read_sources(settings):
    """({folder: [Image]}, bytes to extract): of the list given, else of that in the zip or the raw folder.

    Raises DataError.
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
    """Log what goes where, and raise DataError if the file systems cannot take it.

    What is there is not needed again.
    """
    work, out = settings.work, settings.out
    needs = estimate(*read_sources(settings), settings)
    sources = [path for path in (settings.zip, settings.raw_root) if path is not None]
    folders = {"--work": work, "--out": out}
    missing, rows = [], [(what, f"{flag} {folders[flag]}", _gb(count)) for what, flag, count in needs]
    for flag, folder, other in (("--work", work, out), ("--out", out, work)):
        there = present(folder, [other, *sources])
        needed = max(0, sum(count for _, name, count in needs if name == flag) - there)
        missing.append((flag, folder, needed))
        rows += [
            ("there already", f"{flag} {folder}", _gb(there)),
            ("still needed", f"{flag} {folder}", _gb(needed)),
            ("free", f"{flag} {folder}", _gb(room_at(folder)[1])),
        ]
    header = ("what", "where", "GB")
    for line in tabulate(rows, header, disable_numparse=True, colalign=("left", "left", "right")).splitlines():
        log.info("%s", line)
    if settings.layout == "npy":
        log.info("pairs that the curation drops are not written: --out will need less than this")
    if settings.keep_intermediate:
        log.info("the content of --work stays afterwards")
    else:
        log.info("the content of --work is removed after the last step, when the most is needed")
    check_room(missing)


def _gb(count):
    return f"{count / 1e9:.3f}"


# ---- The steps -----------------------------------------------------------------------------------


def say(text):
    sys.stdout.write(f"[prepare] {text}\n")
    sys.stdout.flush()


def begin(settings):
    """Whether OUT is complete already; else the room is checked.

    Raises DataError for OUT of other parameters, or lack of room.
    """
    if is_complete(settings.out, parameters_of(settings)):
        remove_intermediate(settings)
        say(f"{settings.out} is complete already, nothing to do")
        return True
    check_disk(settings)
    return False


def run_steps(settings, workers):
    """Runs the four steps on all ranks and processes. Each continues where it was stopped."""
    s, aligned, made = settings, settings.work / "aligned", settings.work / "pairs"

    def step(text, work, *args):
        workers.on_main(say, text)
        if not work(*args, workers):
            log.info("complete already, nothing to do")

    if s.zip:
        step("1/4 unzipping what is needed", unzip, s.zip, s.raw)
    step("2/4 aligning the Sentinel-1 images", align, s.raw, aligned, s.s1_list, s.resampling, s.units, s.size)
    step("3/4 making pairs", prepare, made, aligned, None, s.train_list, s.test_list)
    text = "4/4 dropping pairs that lack data, writing the others"
    step(text, prune, aligned, made, s.out, s.max_zeros, s.size, s.layout)
    workers.on_main(finish, s)


def finish(settings):
    """Remove the intermediate folders, and say what comes next."""
    remove_intermediate(settings)
    say(
        f"done: {settings.out}. preparation.json has the counts, dropped.csv what is not there and why. To train on "
        "it from "
        "BigEarthNet v1 weights:"
    )
    say(
        f"  python main_finetune.py --dataset sen12flood --data_path {shlex.quote(str(settings.out))} "
        "--finetune benv1_pretrain_checkpoint_64.pth --batch_size 16"
    )


def remove_intermediate(settings):
    """Remove what the steps wrote, which is where a step.json lies. Renamed first, as this may be stopped too."""
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
    parser = Parser("Prepare SEN12-FLOOD, from its archive to what --dataset sen12flood reads.", PROGRAM)
    group = parser.add_argument_group("files")
    group.add_argument("--zip", type=path, help="the archive as it was downloaded")
    group.add_argument(
        "--raw_root", "--raw-root", type=path, help=f"or the folder that it was extracted to, with {S1_LIST}"
    )
    group.add_argument("--work", type=path, help="folder of what the steps need in between, removed at the end")
    group.add_argument("--out", type=path, help="folder of what training reads")
    group.add_argument("--s1_list", "--s1-list", type=path, help=f"list of images, instead of that {S1_LIST}")
    group.add_argument("--keep_intermediate", "--keep-intermediate", action="store_true", help="leave --work as it is")
    group.add_argument("--relative_to", type=path, default=Path(), help="folder that relative paths are meant from")
    group = parser.add_argument_group("steps", "As in the programs of the steps.")
    add_warping_flags(group)
    add_list_flags(group)
    add_curation_flags(group)
    group = parser.add_argument_group("processes")
    add_workers_flag(group)
    group.add_argument(
        "--ranks", type=positive_int, default=1, help="MPI ranks; the variable LAUNCH starts them otherwise"
    )
    group.add_argument("--as_rank", action="store_true", help=argparse.SUPPRESS)  # of those that `start_ranks` started
    return parser


def path(text):
    """An argparse type: a path, of at least one character."""
    if not text:
        raise argparse.ArgumentTypeError("a value is needed")
    return Path(text)


def check(args):
    """Raises UsageError for flags that are missing, or contradict each other."""
    if args.zip and args.raw_root:
        raise UsageError("--zip and --raw_root: give one of them")
    if not args.zip and not args.raw_root:
        raise UsageError("--zip, or --raw_root, is needed; see --help")
    for name in ("work", "out"):
        if not getattr(args, name):
            raise UsageError(f"--{name} is needed; see --help")
    if bool(args.train_list) != bool(args.test_list):
        raise UsageError("--train_list and --test_list go together")
    check_paths(settled(args))


def start_ranks(ranks, argv):
    """Replace this process by MPI ranks of itself, where LAUNCH or --ranks asks for them.

    Raises DataError without mpirun.
    """
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
