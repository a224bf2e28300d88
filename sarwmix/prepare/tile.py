# SPDX-License-Identifier: MIT
"""Cuts Sentinel-1 scenes into tiles, as a packed store (format: `sarwmix.packed_store`).

    python -m sarwmix.tile scene.tif --units linear --out STORE --size 128
    python -m sarwmix.tile rtc_VV.tif rtc_VH.tif FOLDER --units dB --out STORE --workers 8
    mpirun -np 4 python -m sarwmix.tile FOLDER --units dB --out STORE

A scene is a GeoTIFF with the bands VV and VH, or one file for each (`sarwmix.raster`). It is read in rows of tiles, so
that the memory does not depend on its size. Every tile keeps its scene, row, column, coordinate system and transform.
After an interruption, the same command writes the missing parts; the result is byte for byte the same for
any number of interruptions, ranks and processes.
"""

import json
import logging
from dataclasses import astuple, dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd

from common.command_line import Parser, Range, positive_int
from common.errors import DataError, data_error, listed
from common.files import check_room, claimed, write_csv, write_json
from common.workers import add_workers_flag, run_command
from sarwmix.chips import Chips
from sarwmix.listing import EVERY
from sarwmix.moments import Moments
from sarwmix.packed_store import BAD, DTYPES, IMAGES, MANIFEST, MOST_SIDE, SAMPLES, STORED_SPLITS, VERSION
from sarwmix.plausibility import find_fault
from sarwmix.prepare.store_writer import (
    RECORD,
    PartFile,
    finish,
    images_per_part,
    read_report,
    sample_table,
    store_facts,
    write_images,
)
from sarwmix.raster import GRID, Image, add_reading_flags, find_images, reading_of

TILES_AT_ONCE = 64  # tiles that are read at a time
PROBES = 32  # scenes of which some values are checked before the store is begun
MOST_PARTS = 99_999  # whose numbers have five digits

log = logging.getLogger(__name__)


# ---- Plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How scenes are cut: side and distance of tiles in pixels, and the largest share of pixels without data."""

    size: int
    stride: int
    max_nodata: float

    def starts(self, length):
        """The first pixel of each tile along a side of `length` pixels; only the last tile may extend beyond it."""
        return range(0, max(1, length - self.size + self.stride), self.stride)


@dataclass(frozen=True)
class Part(PartFile):
    """A part file: rows of tiles of some scenes. rows: ((number of the scene, Image, first pixel row), …)."""

    rows: tuple


def find_scene(named, reading):
    """(Image, None), or (None, error in one line) if the files of a scene cannot be used. named: (name, paths)."""
    name, paths = named
    try:
        return Image.find(name, paths, reading), None
    except DataError as error:
        return None, str(error)


def probe(scenes, cut):
    """Reads a row of tiles of some scenes, before anything is written. Raises DataError for values that are not in the
    stated units."""
    for k in np.unique(np.linspace(0, len(scenes) - 1, PROBES).astype(int)):
        image, total = scenes[k], Moments()
        rows = cut.starts(image.height)
        with image.opened() as read:
            for _, tile in tiles_of(read, rows[len(rows) // 2], image.width, cut):
                total.add(tile)
        fault = find_fault(total.summary()) if (total.count > total.nodata).all() else None
        if fault:
            raise DataError(f"{image.bands[0].path}: {fault}")


def plan_parts(scenes, cut, per_part):
    """The Parts of all scenes, each with at most `per_part` tiles, but at least one row of them. Raises DataError."""
    parts, rows, tiles = [], [], 0
    for number, image in enumerate(scenes):
        wide = len(cut.starts(image.width))
        for row in cut.starts(image.height):
            if rows and tiles + wide > per_part:
                parts.append(Part(len(parts), tuple(rows)))
                rows, tiles = [], 0
            rows.append((number, image, row))
            tiles += wide
    parts.append(Part(len(parts), tuple(rows)))
    if len(parts) > MOST_PARTS:
        raise DataError(f"--part_mb: gives {len(parts):,} parts, more than {MOST_PARTS:,}; raise it")
    return parts


# ---- Parts ---------------------------------------------------------------------------------------


def cut_part(part, cut, out, split, dtype, skip_bad):
    """Reads the scenes of a part, codes and writes the tiles with enough data. Returns its report.

    The report is also written beside the part and marks the part as finished. It has "tiles", [[scene number, row,
    column]], "bad", [(scene, reason)], and "part": None if no tile has enough data.
    """
    done = read_report(out / part.report, out / part.file)
    if done is not None:
        return done
    most = sum(len(cut.starts(image.width)) for _, image, _ in part.rows)
    images, tiles, bad = np.empty((most, 2, cut.size, cut.size), np.float32), [], []
    for number, rows in groupby(part.rows, itemgetter(0)):
        rows = list(rows)
        image = rows[0][1]
        try:
            with image.opened() as read:
                for _, _, row in rows:
                    for column, tile in tiles_of(read, row, image.width, cut):
                        if np.isnan(tile).any(0).mean() <= cut.max_nodata:
                            images[len(tiles)] = tile
                            tiles.append([number, row, column])
        except DataError as error:
            bad.append((image.name, str(error)))
    report = {"part": None, "tiles": tiles, "bad": bad}
    if tiles:
        first, last = (part.rows[k][1].name for k in (0, -1))
        name = f"tiles of {first}" + (f" to {last}" if last != first else "")
        report |= write_images(out / part.file, split, images[: len(tiles)], dtype, Chips.FLOOR_DB, name)
    if skip_bad or not bad:
        write_json(out / part.report, report)
    return report


def tiles_of(read, row, width, cut):
    """Yields (column, tile (2, size, size) float32 in dB, NaN for no data) of one row of tiles. Raises DataError.

    read: of `Image.opened`. width: of the scene. Reads some tiles at a time, which limits the memory.
    """
    starts = cut.starts(width)
    for k in range(0, len(starts), TILES_AT_ONCE):
        columns = starts[k : k + TILES_AT_ONCE]
        values = read(row, columns[0], cut.size, columns[-1] - columns[0] + cut.size)
        for column in columns:
            yield column, values[:, :, column - columns[0] :][:, :, : cut.size]


# ---- The store -----------------------------------------------------------------------------------


def make_tables(scenes, reports, split):
    """{IMAGES, SAMPLES: DataFrame} of all tiles."""
    tiles = [tile for report in reports for tile in report["tiles"]]
    grid = pd.DataFrame([scenes[k].grid_row(scenes[k].name, row, column) for k, row, column in tiles], columns=GRID)
    ids = [f"{scene}_r{row:05d}_c{column:05d}" for scene, row, column in zip(grid.scene, grid.row, grid.column)]
    images = {
        "name": ids,
        "nonfinite": np.concatenate([report["nonfinite"] for report in reports]).astype(np.int64),
    }
    rows = np.arange(len(ids), dtype=np.int64)
    samples = {"id": ids, "split": split, "position": rows, "group": grid.scene}
    return {IMAGES: pd.DataFrame(images), SAMPLES: sample_table(samples, rows[:, None], {}, grid)}


def refuse_bad(bad, out, skip_bad, count):
    """Raises DataError for scenes that cannot be used, [(scene, reason)]; with skip_bad, only if all of them are bad.

    out: the folder for a list of them, or None.
    """
    names = {name for name, _ in bad}
    if bad and count == 1:
        raise DataError(bad[0][1])
    if bad and not (skip_bad and len(names) < count):
        where = ""
        if out is not None:
            write_csv(out / BAD, ("image", "reason"), bad)
            where = f", listed in {out / BAD}"
        raise data_error(
            f"{len(names)} of {count} scenes cannot be used{where}",
            [reason for _, reason in bad],
            "correct the files or flags and run again, or leave them out with --skip_bad",
        )
    if bad:
        log.warning("%d of %d scenes are left out in whole or in part: %s", len(names), count, bad[0][1])


def log_tiles(scenes, reports, cut):
    """Logs how many tiles have enough data, and which scenes have none. Raises DataError if there is none at all."""
    possible = sum(len(cut.starts(image.height)) * len(cut.starts(image.width)) for image in scenes)
    used = {tile[0] for report in reports for tile in report["tiles"]}
    kept = sum(len(report["tiles"]) for report in reports)
    empty = [image.name for k, image in enumerate(scenes) if k not in used]
    if not kept:
        raise DataError(
            f"none of {possible} tiles of {cut.size}x{cut.size} pixels has data in {1 - cut.max_nodata:.0%} of its "
            "pixels; choose a smaller --size, or raise --max_nodata"
        )
    log.info("%d of %d tiles have enough data and are kept, of %d scenes", kept, possible, len(used))
    if empty:
        log.warning("%d scenes have no tile with enough data: %s", len(empty), listed(empty))


def tile(args, workers):
    """Cuts all scenes. Raises DataError."""
    out, reading = Path(args.out), reading_of(args)
    cut = Cut(args.size, args.stride or args.size, args.max_nodata)
    named = workers.on_main(find_images, args.scenes)
    found = workers.map(partial(find_scene, reading=reading), named, "scenes")
    scenes = [image for image, _ in found if image]
    bad = [[name, error] for (name, _), (_, error) in zip(named, found) if error]
    workers.on_main(refuse_bad, bad, None, args.skip_bad, len(found))
    known = store_facts("chips", Chips, cut.size)
    if not args.skip_bad:
        workers.on_main(probe, scenes, cut)
    parts = workers.on_main(plan_parts, scenes, cut, images_per_part(args.part_mb, known["shape"], args.dtype))
    record = {
        "generator": "sarwmix.tile",
        "version": VERSION,
        **known,
        "dtype": args.dtype,
        "part_mb": args.part_mb,
        "cut": astuple(cut),
        "split": args.split,
        "reading": astuple(reading),
        "scenes": [
            [image.name, image.height, image.width, image.crs, image.transform]
            + [[band.number, Path(band.path).stat().st_size] for band in image.bands]
            for image in scenes
        ],
    }
    with claimed(workers, out, json.loads(json.dumps(record)), last=MANIFEST, name=RECORD) as complete:
        if not complete:
            pixels = sum(image.height * image.width for image in scenes) * (cut.size / cut.stride) ** 2
            need = int(2 * pixels * np.dtype(args.dtype).itemsize)
            there = sum(path.stat().st_size for path in out.glob("part_*.bin"))
            workers.on_main(check_room, [("--out", out, max(0, need - there))])
            work = partial(cut_part, cut=cut, out=out, split=args.split, dtype=args.dtype, skip_bad=args.skip_bad)
            reports = workers.map(work, parts, "parts")
            reports[0]["bad"] = bad + reports[0]["bad"]
            workers.on_main(finish_store, out, scenes, reports, known, args)
        workers.on_main(lambda: [path.unlink() for path in out.glob("part_*.json")])


def finish_store(out, scenes, reports, known, args):
    """Writes the tables and the manifest. Raises DataError for bad scenes, or if there is no tile.

    Without a tile, `out` is emptied, so that other flags can be tried.
    """
    cut = Cut(args.size, args.stride or args.size, args.max_nodata)
    bad = [row for report in reports for row in report["bad"]]
    refuse_bad(bad, out, args.skip_bad, len({name for name, _ in bad} | {image.name for image in scenes}))
    try:
        log_tiles(scenes, reports, cut)
    except DataError:
        for path in (*out.glob("part_*.json"), out / RECORD):
            path.unlink()
        raise
    kept = [report for report in reports if report["part"]]
    kept[0]["bad"] = bad
    finish(out, make_tables(scenes, kept, args.split), kept, known, args.dtype)


# ---- Program -------------------------------------------------------------------------------------


def get_args_parser():
    parser = Parser("Cut Sentinel-1 scenes into tiles, as a packed store to train on, embed and map.", "sarwmix.tile")
    parser.add_argument(
        "scenes",
        nargs="+",
        metavar="SCENE",
        help="GeoTIFFs (or COGs) of VV and VH; or a file for each channel, with names that differ only in VV and VH, "
        "or given as VV.tif,VH.tif; or folders of such files. Name them before the flags",
    )
    group = parser.add_argument_group("values")
    add_reading_flags(group)
    group = parser.add_argument_group("tiles")
    group.add_argument("--size", type=positive_int, default=128, metavar="PIXELS", help="side of a tile")
    group.add_argument(
        "--stride",
        type=positive_int,
        metavar="PIXELS",
        help="step from tile to tile (default: --size, so that tiles do not overlap)",
    )
    group.add_argument(
        "--max_nodata",
        type=Range(float, at_least=0, at_most=0.5),
        default=0.25,
        metavar="SHARE",
        help="share of pixels without data above which a tile is left out; pixels beyond the edge of a scene count",
    )
    group.add_argument(
        "--split", choices=STORED_SPLITS, default=EVERY, help="split to which all tiles belong; every: no split"
    )
    group.add_argument(
        "--skip_bad", action="store_true", help="leave out scenes that cannot be used, instead of ending with an error"
    )
    group = parser.add_argument_group("store")
    group.add_argument("--out", metavar="STORE", required=True, help="folder to write, new or empty")
    group.add_argument("--dtype", choices=DTYPES, default="uint16", help="coding of values, as of sarwmix.prepare.pack")
    group.add_argument(
        "--part_mb",
        type=positive_int,
        default=32,
        metavar="MIB",
        help="largest size of a part, MiB; a process needs about ten times as much memory, and half a gigabyte",
    )
    add_workers_flag(group)
    return parser


def work(args, workers):
    if args.size > MOST_SIDE:
        raise DataError(f"--size {args.size}: must be at most {MOST_SIDE}")
    if args.stride and args.stride > args.size:
        raise DataError(f"--stride {args.stride}: is more than --size {args.size}, so that pixels would be left out")
    tile(args, workers)


def main(argv=None):
    run_command(get_args_parser(), work, argv)


if __name__ == "__main__":
    main()
