# SPDX-License-Identifier: MIT
"""SEN12-FLOOD, step 1: extracts from the zip only the files that the preparation reads.

    python -m sarwmix.prepare.sen12_unzip --zip SEN12FLOOD.zip --out DIR --workers 4

The program writes DIR/S1list.json, DIR/<folder>/<image>_corrected_{VH,VV}.tif, DIR/<folder>/S2_<date>_B04.tif and last
DIR/unzipped.json with their numbers. The other Sentinel-2 bands are not extracted. Folders of the zip that enclose all
files are omitted.
"""

import json
import logging
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.command_line import Parser
from common.errors import DataError
from common.files import check_room, claimed, write_json
from common.safe_zip import open_archive
from common.workers import Workers, add_workers_flag, run_command
from sarwmix.listing import EVERY
from sarwmix.prepare.completeness import counts_beside, published
from sarwmix.prepare.sen12_index import S1_LIST, STEP

log = logging.getLogger(__name__)

PROGRAM = "sarwmix.prepare.sen12_unzip"
MARKER = "unzipped.json"
PARTS_PER_PROCESS = 4  # balances the load; the zip is opened once for each part
_WANTED = re.compile(r"([A-Za-z0-9-]{1,32})/([A-Za-z0-9_]+_corrected_(VH|VV)|S2_[0-9-]+_B04)\.tif")
_RADAR = re.compile(r"(.*/)?[^/]+/S1[^/]*_corrected_(VH|VV)\.tif")


@dataclass(frozen=True)
class Plan:
    """The members of a zip to extract. root: the folders, each with its "/", that enclose all of them; "" for none.

    wanted: {path below root: member}. bytes: their total size. left_out: number of other members. s1_list: the parsed
    S1list.json, None if there is none.
    """

    root: str
    wanted: dict
    bytes: int
    left_out: int
    s1_list: object

    @property
    def folders(self):
        """The wanted members by folder: {folder: {path below root: member}}. S1list.json is in folder ""."""
        found = {}
        for path, member in self.wanted.items():
            found.setdefault(path.rpartition("/")[0], {})[path] = member
        return found

    def counts(self):
        """(name of the published dataset, or None; {(what, split): number of wanted folders and images})."""
        channels = {}
        for path in filter(_RADAR.fullmatch, self.wanted):
            channels.setdefault(path.rpartition("_corrected_")[0], []).append(path)
        return published("sen12flood", channels), {
            ("folders", EVERY): len({image.partition("/")[0] for image in channels}),
            ("images", EVERY): len(channels),
            ("images of one polarisation", EVERY): sum(len(paths) == 1 for paths in channels.values()),
        }


def plan(archive):
    """The Plan for an Archive. Raises DataError if this is not SEN12-FLOOD, or more than one."""
    root = _root(archive)
    below = {name[len(root) :]: name for name in sorted(archive.members) if name.startswith(root)}
    wanted = {path: name for path, name in below.items() if path == S1_LIST or _WANTED.fullmatch(path)}
    if not any(path.endswith(("_VH.tif", "_VV.tif")) for path in wanted):
        raise DataError(
            f"{archive.path}: no <folder>/<image>_corrected_VV.tif lies beside {root}{S1_LIST}; "
            "give the zip of SEN12-FLOOD"
        )
    taken = set(wanted.values())
    elsewhere = [name for name in sorted(archive.members) if _RADAR.fullmatch(name) and name not in taken]
    if elsewhere:
        log.warning(
            "%s: %d Sentinel-1 images lie elsewhere than in %s<folder>/ and are left out, the first is %s",
            archive.path,
            len(elsewhere),
            root,
            elsewhere[0],
        )
    total = sum(archive.members[name].file_size for name in wanted.values())
    return Plan(root, wanted, total, len(archive.members) - len(wanted), _s1_list(archive, wanted.get(S1_LIST)))


def _root(archive):
    """The root of the zip: the folder of the least deep S1list.json, else the folder that encloses all images."""
    lists = [name for name in archive.members if name.rpartition("/")[2] == S1_LIST]
    depth = min((name.count("/") for name in lists), default=0)
    roots = {name[: -len(S1_LIST)] for name in lists if name.count("/") == depth}
    if not lists:
        images = [name.split("/") for name in archive.members if _RADAR.fullmatch(name)]
        roots = {"".join(f"{part}/" for part in parts[:-2]) for parts in images}
    if not roots:
        raise DataError(
            f"{archive.path}: holds neither {S1_LIST} nor any <folder>/<image>_corrected_VV.tif; "
            "give the zip of SEN12-FLOOD"
        )
    if len(roots) > 1:
        raise DataError(
            f"{archive.path}: holds more than one data set ({', '.join(repr(root) for root in sorted(roots)[:5])}); "
            "unpack the right one, and give its folder with --raw_root instead"
        )
    return roots.pop()


def _s1_list(archive, name):
    if name is None:
        log.warning("%s: holds no %s, which the next steps need; give it to them with --s1_list", archive.path, S1_LIST)
        return None
    content = archive.read(name)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{archive.path}: member {name} cannot be read as JSON ({error}); download the zip again"
        ) from None


# ---- Extraction ----------------------------------------------------------------------------------


def unzip(path, out, workers=Workers()):
    """Extracts the wanted members of the zip `path` into the folder `out`, distributing folders over workers.

    unzipped.json is written last, so that an interrupted run is continued. Raises DataError if the zip cannot be
    trusted, if it is not the zip that the folder was begun with, if there is no room, or if `out` has other content.
    """
    planned, record = workers.on_main(_prepare, path, out)
    with claimed(workers, out, record, last=MARKER, name=STEP) as complete:
        if complete:
            return
        folders = list(planned.folders.values())
        count = min(len(folders), PARTS_PER_PROCESS * workers.processes * workers.world_size)
        parts = [
            {path: member for folder in folders[n::count] for path, member in folder.items()} for n in range(count)
        ]
        workers.map(partial(_extract, path, out), parts, "parts of the zip")
        workers.on_main(
            write_json,
            out / MARKER,
            {
                "folders": len(planned.folders) - (S1_LIST in planned.wanted),
                "files": len(planned.wanted),
                "bytes": planned.bytes,
                "left_out": planned.left_out,
                "s1_list": S1_LIST in planned.wanted,
            },
        )
    log.info("%s: extracted %s", out, counts_beside(*planned.counts()))


def _prepare(path, out):
    """Returns (Plan, record of the step) of a zip. Raises DataError if there is no room for the files."""
    with open_archive(path) as archive:
        planned = plan(archive)
        missing = sum(archive.members[name].file_size for name in archive.pending(planned.wanted, out).values())
        record = {
            "program": PROGRAM,
            "zip_bytes": Path(path).stat().st_size,
            "zip_directory_sha256": archive.fingerprint(),
        }
    if missing:
        check_room([("--out", out, missing)])
    log.info(
        "%s: %d files (%.3f GB) of %s are extracted, %d others are not; %.3f GB remain to be written",
        path,
        len(planned.wanted),
        planned.bytes / 1e9,
        planned.root or "its root",
        planned.left_out,
        missing / 1e9,
    )
    return planned, record


def _extract(path, out, chosen):
    with open_archive(path) as archive:
        archive.extract(chosen, out)


def get_args_parser():
    parser = Parser("Extract the files that the preparation of SEN12-FLOOD reads from its zip.", PROGRAM)
    group = parser.add_argument_group("input")
    group.add_argument("--zip", type=Path, required=True, help="the downloaded zip")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    add_workers_flag(group)
    return parser


def main(argv=None):
    run_command(get_args_parser(), lambda args, workers: unzip(args.zip, args.out, workers), argv)


if __name__ == "__main__":
    main()
