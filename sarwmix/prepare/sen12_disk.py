# SPDX-License-Identifier: MIT
"""SEN12-FLOOD: how much room its whole preparation needs, and whether it is there, before anything starts.

    python -m sarwmix.prepare.sen12_disk --zip SEN12FLOOD.zip --work WORK --out OUT --layout images

WORK takes what is extracted from the zip and the aligned images, OUT what training reads. All of it is there at the same
time, at the end of the last step. What lies in these folders already is not needed again. Nothing is written.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from common.command_line import Parser, positive_int
from common.errors import DataError
from common.files import check_room, room_at
from common.safe_zip import open_archive
from common.workers import run_command
from sarwmix.listing import CHANNELS
from sarwmix.prepare.sen12_unzip import plan
from sarwmix.sen12_index import LAYOUTS, S1_LIST, SIDE, pairs, parse_s1_list, read_s1_list

log = logging.getLogger(__name__)

PROGRAM = "sarwmix.prepare.sen12_disk"
VALUE = 4  # bytes, float32


@dataclass(frozen=True)
class Need:
    """What a step writes into a folder; flag: how the user named the folder."""

    what: str
    flag: str
    folder: Path
    bytes: int


def estimate(folders, extracted, work, out, layout="images", size=SIDE):
    """What the preparation writes: list of Need. No compression is counted on, and of the file formats only the pixels.

    folders: {folder: [Image]}, as `read_s1_list` gives them. extracted: bytes that come out of the zip, 0 without one.
    size: side of an aligned image, pixels. Pairs are all that the list has; some of them will turn out unusable.
    """
    image = len(CHANNELS) * size**2 * VALUE
    usable = sum(image.polarisations == CHANNELS for images in folders.values() for image in images)
    candidates = sum(len(pairs([image.flooded for image in images])) for images in folders.values())
    what, trained = {
        "images": (f"{usable} images, each once", usable * image),
        "npy": (f"{candidates} pairs at most", candidates * 2 * image),
    }[layout]
    needs = [Need("extracted from the zip", "--work", work, extracted)] if extracted else []
    return [*needs, Need(f"{usable} aligned images", "--work", work, usable * image), Need(what, "--out", out, trained)]


def present(folder, apart=()):
    """Bytes of the files under a folder, which need not exist; `apart` from those under, or at, other paths."""
    apart, total = {Path(path).resolve() for path in apart}, 0
    for place, folders, files in os.walk(Path(folder).resolve()):
        folders[:] = [name for name in folders if Path(place, name) not in apart]
        if Path(place) in apart:  # the folder itself: what in it is whose cannot be told
            return 0
        total += sum(Path(place, name).lstat().st_size for name in files if Path(place, name) not in apart)
    return total


def read_sources(zip_path, raw_root, s1_list):
    """({folder: [Image]}, bytes to extract): from s1_list, else from the list in the zip or in raw_root. Raises DataError."""
    extracted = 0
    if zip_path is not None:
        with open_archive(zip_path) as archive:
            planned = plan(archive)
        extracted = planned.bytes
        if s1_list is None and planned.s1_list is not None:
            return parse_s1_list(planned.s1_list, f"{zip_path}: {planned.wanted[S1_LIST]}"), extracted
    elif not raw_root.is_dir():
        raise DataError(
            f"--raw_root {raw_root}: there is no such folder; give the one that holds the folders of SEN12-FLOOD"
        )
    if s1_list is None and (raw_root is None or not (raw_root / S1_LIST).is_file()):
        raise DataError(f"{zip_path or raw_root}: holds no {S1_LIST}; give it with --s1_list")
    return read_s1_list(s1_list or raw_root / S1_LIST), extracted


def check(args):
    """Log what goes where, and raise DataError if the file systems cannot take it."""
    folders, extracted = read_sources(args.zip, args.raw_root, args.s1_list)
    needs = estimate(folders, extracted, args.work, args.out, args.layout, args.size)
    sources = [path for path in (args.zip, args.raw_root) if path is not None]
    missing, rows = [], [(need.what, f"{need.flag} {need.folder}", _gb(need.bytes)) for need in needs]
    for flag, folder, other in (("--work", args.work, args.out), ("--out", args.out, args.work)):
        there = present(folder, [other, *sources])
        needed = max(0, sum(need.bytes for need in needs if need.flag == flag) - there)
        missing.append((flag, folder, needed))
        rows += [
            ("there already", f"{flag} {folder}", _gb(there)),
            ("still needed", f"{flag} {folder}", _gb(needed)),
            ("free", f"{flag} {folder}", _gb(room_at(folder)[1])),
        ]
    for line in tabulate(
        rows, ("what", "where", "GB"), disable_numparse=True, colalign=("left", "left", "right")
    ).splitlines():
        log.info("%s", line)
    if args.layout == "npy":
        log.info("pairs that the curation drops will not be written: --out will need less than this")
    if args.keep_intermediate:
        log.info("the content of --work stays afterwards")
    else:
        log.info(
            "the content of --work can go when the last step has ended; the most is needed at its end all the same"
        )
    check_room(missing)


def _gb(count):
    return f"{count / 1e9:.3f}"


def get_args_parser():
    parser = Parser("Say how much room the preparation of SEN12-FLOOD needs, and whether it is there.", PROGRAM)
    group = parser.add_argument_group("input")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--zip", type=Path, help="the zip as it was downloaded")
    source.add_argument(
        "--raw_root", "--raw-root", dest="raw_root", type=Path, help="or the folder that it was extracted to"
    )
    group.add_argument(
        "--s1_list", "--s1-list", dest="s1_list", type=Path, help=f"{S1_LIST}, instead of the one in the zip or folder"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--work", type=Path, required=True, help="folder of extracted and aligned images")
    group.add_argument("--out", type=Path, required=True, help="folder of what training reads")
    group.add_argument("--layout", choices=LAYOUTS, default="images", help="a file for each image, or for each pair")
    group.add_argument("--size", type=positive_int, default=SIDE, help="side of an aligned image, pixels of 10 m")
    group.add_argument(
        "--keep_intermediate",
        "--keep-intermediate",
        dest="keep_intermediate",
        action="store_true",
        help="--work is kept afterwards; the room needed is the same",
    )
    parser.set_defaults(workers=1)  # there is nothing to spread
    return parser


def main(argv=None):
    def work(args, workers):
        workers.on_main(check, args)

    run_command(get_args_parser(), work, argv)


if __name__ == "__main__":
    main()
