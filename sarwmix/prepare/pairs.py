# SPDX-License-Identifier: MIT
"""Makes pairs of images of one's own into the data of --dataset sen12flood: is there a flood in the second image?

    python -m sarwmix.pairs --table pairs.csv --units dB --out STORE
    mpirun -np 4 python -m sarwmix.pairs --table pairs.csv --units linear --out STORE

The table, CSV or parquet, has a row per pair: `before` and `after`, GeoTIFFs (`sarwmix.raster`), with paths relative to
its folder; `label`, 1 if there is a flood in the second image, else 0; and, optional, `split`, train or test, and
`group`, the place.
STORE gets
  images/<group>/<name>.npy          (2, S, S) float32, VH, VV, linear, NaN for no data; each image once;
  sources.csv                        the file, share of no data, coordinate system and transform of each image;
  bad.csv                            the pairs that --skip_bad leaves out, and why, if there are any;
  pairs_train.csv, pairs_test.csv    folder,first,second,label, written last.
After an interruption, the same command writes the missing images; the result is byte for byte the same for any number
of interruptions, ranks and processes.
"""

import logging
import math
import re
import shlex
import shutil
from collections import Counter
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.command_line import Parser, rate, seed
from common.errors import DataError, data_error
from common.files import check_room, claimed, save_array, write_csv
from common.workers import add_workers_flag, run_command
from sarwmix.geotiff import load_rasterio
from sarwmix.listing import PATCH, drawn_by_group, read_csv_rows
from sarwmix.packed_store import BAD
from sarwmix.prepare.pair_table import groups_of, read_pairs
from sarwmix.prepare.sen12_index import KEPT, SPLITS
from sarwmix.raster import NEAR, Image, add_reading_flags, reading_of

RECORD, SOURCES = "pairs.json", "sources.csv"
VERSION = 1
TEST_FRACTION = 0.2
READ_WITHOUT_ASKING = 0.01  # default of --max_nonfinite in the programs that read the store

log = logging.getLogger(__name__)


# ---- Grids ---------------------------------------------------------------------------------------


def find_image(named, reading):
    """(Image, None), or (None, error in one line) if the files of an image cannot be used. named: (name, paths)."""
    try:
        return Image.find(*named, reading), None
    except DataError as error:
        return None, str(error)


def shape_fault(image):
    """Why an image cannot be cut into patches, in words; None if it can."""
    if image.height == image.width and image.height % PATCH == 0:
        return None
    side = min(image.height, image.width) // PATCH * PATCH
    remedy = f"crop it (gdal_translate -srcwin 0 0 {side} {side} FILE NEW)" if side else "take a larger area"
    return (
        f"{_name(image)}: is {image.height}x{image.width} pixels, but images must be square, with a side that is a "
        f"multiple of {PATCH}; {remedy}"
    )


def grid_fault(first, second, unreferenced):
    """Why two Images do not show the same ground pixel by pixel, in words; None if they do, or if that is insisted on.

    unreferenced: whether images without a coordinate system are taken for aligned if they have the same size.
    """
    bare = [which for which, image in (("the first", first), ("the second", second)) if not image.crs]
    if bare and not unreferenced:
        return (
            f"{_name(first)} and {_name(second)}: {f'{bare[0]} has' if len(bare) == 1 else 'have'} no coordinate "
            "system, so that it cannot be seen whether they are aligned; georeference them (gdal_edit.py -a_srs … "
            "-a_ullr …), or insist with --unreferenced"
        )
    found = []
    if (first.height, first.width) != (second.height, second.width):
        found.append(f"{first.height}x{first.width} and {second.height}x{second.width} pixels")
    if bare and not found:
        return None
    same_crs = bare or _same_crs(first.crs, second.crs)
    if not same_crs:
        found.append(f"{_short(first.crs)} and {_short(second.crs)}")
    elif not bare:
        shift = distance(first, second)
        if not shift <= NEAR:
            found.append(f"{shift:.3g} pixels apart")
    if not found:
        return None
    return f"{_name(first)} and {_name(second)}: do not lie on one grid ({', '.join(found)}); {_remedy(first, bare)}"


def distance(first, second):
    """The largest distance of the corners of the first Image on the grids of both, in its pixels, by rows or columns.

    It is infinite for a transform that cannot be inverted.
    """
    apart = _corners(second) - _corners(first)
    try:
        return float(np.abs(np.linalg.solve(np.reshape(first.transform, (2, 3))[:, :2], apart)).max())
    except np.linalg.LinAlgError:
        return math.inf


def _corners(image):
    """(2, 4): x and y of the corners of an Image."""
    corners = [(column, row, 1) for column in (0, image.width) for row in (0, image.height)]
    return np.reshape(image.transform, (2, 3)) @ np.array(corners).T


def overlapping(images, others):
    """The names of those images that show ground of one of the others, both {name: Image}, by their extents.

    Images that overlap by less than a pixel, and those of different coordinate systems, are not compared.
    """
    found, extents = [], {}
    for image in others.values():
        extents.setdefault(image.crs, []).append(_extent(image, 0))
    extents = {crs: np.array(boxes) for crs, boxes in extents.items() if crs}
    for name, image in images.items():
        if image.crs in extents:
            (west, south, east, north), (lefts, bottoms, rights, tops) = _extent(image, 1), extents[image.crs].T
            if ((west < rights) & (lefts < east) & (south < tops) & (bottoms < north)).any():
                found.append(name)
    return found


def _extent(image, margin):
    """(4,): the least x and y, and the greatest, without a margin in pixels."""
    corners = _corners(image)
    low, high = corners.min(1), corners.max(1)
    pixel = (high - low) / (image.width, image.height)
    return np.concatenate([low + margin * pixel, high - margin * pixel])


def _remedy(first, bare):
    """How to bring the second image onto the grid of the first."""
    a, b, c, d, e, f = first.transform
    if bare or b or d:
        return "bring one onto the grid of the other (gdalwarp -t_srs … -te … -ts …)"
    (west, east), (south, north) = sorted((c, c + a * first.width)), sorted((f, f + e * first.height))
    extent = " ".join(f"{value:.12g}" for value in (west, south, east, north))
    crs = first.crs if first.crs.startswith("EPSG:") else f"'{_short(first.crs)}'"
    return (
        f"warp the second: gdalwarp -t_srs {crs} -te {extent} -ts {first.width} {first.height} -r bilinear FILE NEW, "
        "each of its files"
    )


def _same_crs(one, other):
    if one == other:
        return True
    read = load_rasterio().crs.CRS.from_user_input
    return read(one) == read(other)


def _short(crs):
    """A coordinate system in messages: "EPSG:32633", or the name in a WKT."""
    name = re.search('"([^"]+)"', crs)
    return name[1] if name and not crs.startswith("EPSG:") else crs


def _name(image):
    return image.bands[1].path


# ---- Plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """An image of the store: its name there, "<group>/<name>"; its files as the table names them; and what is read."""

    name: str
    files: str
    image: Image


@dataclass(frozen=True)
class Plan:
    """What can be said before images are read.

    side: of all images, pixels. folders: {row: the folder of its pair}, of the pairs that can be used so far. entries:
    {number of the image: Entry}, of these pairs. faults: {row: why its pair cannot be used}. Rows count from 0.
    """

    side: int
    folders: dict
    entries: dict
    faults: dict


def make_plan(table, found, args):
    """The Plan of a PairTable. found: for each image what `find_image` returned. Raises DataError."""
    images = [image for image, _ in found]
    shapes = [error or shape_fault(image) for image, error in found]
    grids = [
        (image.crs, image.transform, image.height, image.width) if image is not None and image.crs else None
        for image in images
    ]
    folders, faults = groups_of(table, grids), {}
    for k, pair in enumerate(table.pairs):
        fault = shapes[pair.first] or shapes[pair.second]
        fault = fault or grid_fault(images[pair.first], images[pair.second], args.unreferenced)
        if fault:
            faults[k] = fault
    sides = Counter(images[pair.first].height for k, pair in enumerate(table.pairs) if k not in faults)
    side = max(sides, key=lambda side: (sides[side], -side), default=0)
    for k, pair in enumerate(table.pairs):
        if k not in faults and images[pair.first].height != side:
            own = images[pair.first].height
            faults[k] = (
                f"{_name(images[pair.first])} and {_name(images[pair.second])}: are {own}x{own} pixels, but most "
                f"images {side}x{side}; all must be of one size, so crop the larger ones (gdal_translate -srcwin "
                f"0 0 {min(own, side)} {min(own, side)} FILE NEW)"
            )
    _refuse(faults, len(table.pairs), args.skip_bad)
    used = {k: folder for k, folder in enumerate(folders) if k not in faults}
    _check_draw(table, used, args)
    entries = {
        number: Entry(f"{folder}/{table.names[number]}", table.files(number), images[number])
        for k, folder in used.items()
        for number in (table.pairs[k].first, table.pairs[k].second)
    }
    return Plan(side, used, entries, faults)


def _refuse(faults, count, skip_bad):
    """Raises DataError if there are faults, {row: reason}; with skip_bad, only if no pair of `count` is left."""
    if faults and not (skip_bad and len(faults) < count):
        raise data_error(
            f"{len(faults)} of {count} pairs cannot be used",
            dict.fromkeys(faults.values()),
            "correct the files, the table or the flags, or leave the pairs out with --skip_bad"
            if len(faults) < count
            else "correct the files, the table or the flags",
        )


def _check_draw(table, folders, args):
    """Raises DataError if the test split cannot be drawn, because it is stated, or because no place would be left."""
    if table.has_splits:
        if args.test_fraction is not None:
            raise DataError(f"--test_fraction: {args.table} has a column split; leave the flag out")
        return
    fraction, places = _fraction(args), len(set(folders.values()))
    if fraction and max(1, round(fraction * places)) >= places:
        raise DataError(
            f"{args.table}: --test_fraction {fraction:g} of {places} place{'s' * (places != 1)} leaves nothing to "
            "train on; lower it, use --test_fraction 0, or add places"
        )


def _fraction(args):
    return TEST_FRACTION if args.test_fraction is None else args.test_fraction


# ---- Images --------------------------------------------------------------------------------------


def store_image(entry, out, max_nodata):
    """Writes an image, unless it is there, which it is as a whole. Returns (share of its values without data, fault).

    The fault is None, or says in one line why the image cannot be used; it is then not written.
    """
    path = out / "images" / f"{entry.name}.npy"
    if path.exists():
        return float(np.isnan(np.load(path)).mean()), None
    try:
        values = (10 ** (entry.image.read().astype(np.float64) / 10)).astype(np.float32)
    except DataError as error:
        return None, str(error)
    share = float(np.isnan(values).mean())
    if share > max_nodata:
        return share, (
            f"{_name(entry.image)}: {share:.2%} of the values are no data, more than the {max_nodata:.2%} of "
            "--max_nodata; raise it, crop the images, or remove the pair"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_array(path, values)
    return share, None


# ---- The store -----------------------------------------------------------------------------------


def make_store(args, workers):
    """Makes the store of a table. Raises DataError."""
    out, reading = Path(args.out), reading_of(args)
    table = workers.on_main(read_pairs, args.table, reading.bands is not None)
    found = workers.map(partial(find_image, reading=reading), zip(table.names, table.paths), "images looked at")
    plan = workers.on_main(make_plan, table, found, args)
    record = {
        "generator": "sarwmix.pairs",
        "version": VERSION,
        "reading": astuple(reading),
        "max_nodata": args.max_nodata,
        "unreferenced": args.unreferenced,
        "draw": None if table.has_splits else [_fraction(args), args.draw_seed],
        "images": [_identity(entry) for entry in plan.entries.values()],
        "pairs": [[table.pairs[k].split, *_listed(plan, table.pairs[k])] for k in plan.folders],
    }
    with claimed(workers, out, record, last=KEPT["test"].name, name=RECORD) as complete:
        if not complete:
            workers.on_main(_check_room, out, plan)
            work = partial(store_image, out=out, max_nodata=args.max_nodata)
            stored = workers.map(work, plan.entries.values(), "images")
            workers.on_main(finish, plan, dict(zip(plan.entries, stored)), table, args)
    workers.on_main(report, out)


def _identity(entry):
    """What decides the values of an image: plain values."""
    image = entry.image
    bands = [[band.number, Path(band.path).stat().st_size] for band in image.bands]
    return [entry.name, entry.files, image.crs, image.transform, bands]


def _check_room(out, plan):
    missing = sum(not (out / "images" / f"{entry.name}.npy").exists() for entry in plan.entries.values())
    check_room([("--out", out, missing * 2 * plan.side**2 * np.float32().itemsize)])


def finish(plan, stored, table, args):
    """Writes the lists. stored: {number of the image: what `store_image` returned}.

    Raises DataError for pairs that cannot be used, and removes what was written.
    """
    out, faults = Path(args.out), dict(plan.faults)
    for k in plan.folders:
        fault = stored[table.pairs[k].first][1] or stored[table.pairs[k].second][1]
        if fault:
            faults[k] = fault
    kept = {k: folder for k, folder in plan.folders.items() if k not in faults}
    try:
        _refuse(faults, len(table.pairs), args.skip_bad)
        _check_draw(table, kept, args)
    except DataError:
        shutil.rmtree(out / "images", ignore_errors=True)
        (out / RECORD).unlink()
        raise
    used = sorted({number for k in kept for number in (table.pairs[k].first, table.pairs[k].second)})
    _remove_others(out, {plan.entries[number].name for number in used})
    rows = [(plan.entries[n].name, plan.entries[n].files, f"{stored[n][0]:.6f}", *_georeference(plan, n)) for n in used]
    write_csv(out / SOURCES, ("image", "files", "nodata", "crs", *"abcdef"), rows)
    (out / BAD).unlink(missing_ok=True)
    if faults:
        bad = [(table.pairs[k], faults[k]) for k in sorted(faults)]
        rows = [(pair.place, table.files(pair.first), table.files(pair.second), why) for pair, why in bad]
        write_csv(out / BAD, ("row", "before", "after", "reason"), rows)
    splits = splits_of(table, kept, args)
    _warn_of_overlap(table, plan, splits)
    for split, listed in KEPT.items():
        listed.write(out, [_listed(plan, table.pairs[k]) for k in kept if splits[k] == split])


def _warn_of_overlap(table, plan, splits):
    """Warns if images of the split test show ground that is in the split train. splits: {row: split}."""
    images = {split: {} for split in SPLITS}
    for k, split in splits.items():
        for number in (table.pairs[k].first, table.pairs[k].second):
            images[split][plan.entries[number].name] = plan.entries[number].image
    found = overlapping(images["test"], images["train"])
    if found:
        log.warning(
            "%d of %d images of split test show ground that images of split train show as well, the first is %s; name "
            "their places in a column group",
            len(found),
            len(images["test"]),
            found[0],
        )


def splits_of(table, folders, args):
    """{row: split} of pairs, as stated, or drawn by place. folders: {row: folder of its pair}."""
    if table.has_splits:
        return {k: table.pairs[k].split for k in folders}
    if not _fraction(args):
        return dict.fromkeys(folders, SPLITS[0])
    places = np.array(list(folders.values()), dtype=str)
    held = drawn_by_group("test", places, 0.0, _fraction(args), args.draw_seed, args.table)
    return {k: SPLITS[int(test)] for k, test in zip(folders, held)}


def _listed(plan, pair):
    """The row of a list of pairs."""
    (folder, first), (_, second) = (plan.entries[number].name.split("/") for number in (pair.first, pair.second))
    return folder, first, second, pair.label


def _georeference(plan, number):
    image = plan.entries[number].image
    return image.crs, *image.transform


def _remove_others(out, names):
    """Removes the images that are in no pair: those whose partners cannot be used."""
    for path in (out / "images").glob("*/*.npy"):
        if f"{path.parent.name}/{path.stem}" not in names:
            path.unlink()
    for folder in (out / "images").iterdir():
        if not any(folder.iterdir()):
            folder.rmdir()


def report(out):
    """Logs the counts of the store, and what to run next."""
    pairs = {split: [row for _, row in read_csv_rows(out / KEPT[split].name)][1:] for split in SPLITS}
    places = {split: len({row[0] for row in rows}) for split, rows in pairs.items()}
    labels = {split: Counter(row[-1] for row in rows) for split, rows in pairs.items()}
    nodata = max(float(row[2]) for _, row in list(read_csv_rows(out / SOURCES))[1:])
    if (out / BAD).exists():
        bad = list(read_csv_rows(out / BAD))[1:]
        log.warning("%d pairs cannot be used and are left out, listed in %s: %s", len(bad), out / BAD, bad[0][1][-1])
    for split in SPLITS:
        if len(labels[split]) == 1:
            log.warning("all pairs of split %s have the label %s; add pairs of the other", split, *labels[split])
    flags = ["--val_fraction 0.1"] if places["train"] > 1 else []
    if not pairs["test"]:
        flags.append("--test_split none")
        log.warning(
            "no pair is in split test: main_finetune.py needs --test_split none, and --val_fraction, which keeps "
            "places apart for the selection%s",
            "" if places["train"] > 1 else "; that takes two places, and there is one",
        )
    if nodata > READ_WITHOUT_ASKING:
        flags.append(f"--max_nonfinite {math.ceil(nodata * 100) / 100:g}")
    counts = [
        f"{split} {labels[split].total()} pairs of {places[split]} places ({labels[split]['0']} without flood, "
        f"{labels[split]['1']} with)"
        for split in SPLITS
    ]
    command = f"python main_finetune.py --dataset sen12flood --data_path {shlex.quote(str(out))} {' '.join(flags)}"
    log.info("%s: %s. To train on them: %s --finetune CHECKPOINT", out, ", ".join(counts), command.strip())


# ---- Program -------------------------------------------------------------------------------------


def get_args_parser():
    parser = Parser(
        "Convert pairs of your own images, before and after a flood, into data for --dataset sen12flood.",
        "sarwmix.pairs",
    )
    group = parser.add_argument_group("files")
    group.add_argument(
        "--table",
        required=True,
        metavar="FILE",
        help="CSV or parquet with a row for each pair. Columns: before and after (GeoTIFFs of VV and VH; or a file "
        "for each channel, of which the table names one, or both as VV.tif,VH.tif; paths are relative to the table), "
        "label (1: flood in the second image, 0: none), and optionally split (train, test) and group (the place)",
    )
    group.add_argument("--out", required=True, metavar="STORE", help="folder to write, new or empty")
    add_workers_flag(group)
    group = parser.add_argument_group("values")
    add_reading_flags(group)
    group.add_argument(
        "--max_nodata",
        type=rate,
        default=READ_WITHOUT_ASKING,
        metavar="SHARE",
        help="share of values without data above which an image cannot be used; if above 0.01, give main_finetune.py "
        "--max_nonfinite with the same value",
    )
    group = parser.add_argument_group("pairs")
    group.add_argument(
        "--unreferenced",
        action="store_true",
        help="treat images without a coordinate system as aligned if they have the same size",
    )
    group.add_argument(
        "--test_fraction",
        type=rate,
        metavar="SHARE",
        help="draw this share of the places, at least one, as the split test; 0: no split test (default: 0.2, if the "
        "table has no column split)",
    )
    group.add_argument("--draw_seed", type=seed, default=0, metavar="N", help="seed of the draw of the split test")
    group.add_argument(
        "--skip_bad", action="store_true", help="leave out pairs that cannot be used, instead of ending with an error"
    )
    return parser


def main(argv=None):
    run_command(get_args_parser(), make_store, argv)


if __name__ == "__main__":
    main()
