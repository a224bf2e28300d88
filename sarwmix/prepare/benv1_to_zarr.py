# SPDX-License-Identifier: MIT
"""BigEarthNet v1: from patch folders and official split lists to a Zarr store that carries checksums, and the check of
one.

    python -m sarwmix.prepare.benv1_to_zarr --root DIR --train LIST --val LIST --test LIST --out OUT
    mpirun -np 4 python -m sarwmix.prepare.benv1_to_zarr …
    python -m sarwmix.prepare.benv1_to_zarr --out OUT --verify

writes OUT/benv1.zarr (Zarr format 3: group sentinel1/<patch> with arrays VH and VV, float32 dB, and the attributes
`labels` and `corresponding_s2_patch`), OUT/benv1_{train,val,test}.csv (S2 name, S1 name), OUT/bad.csv (what could not
be converted) and, last, OUT/manifest.csv (SHA-256 of each patch). Every patch is put in place whole: run it again after
an interruption, and it does what is missing. The result is the same, byte for byte, however often it was interrupted.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.command_line import Parser, share
from common.errors import DataError, data_error
from common.files import check_room, claimed, sha256_of, write_atomically, write_csv
from common.packages import load
from common.workers import add_workers_flag, run_command
from sarwmix.bigearthnet import SIZE
from sarwmix.bigearthnetv1 import S2_START, ZarrStore, every_patch, open_store, patches_by_s2_name, read_list
from sarwmix.listing import CHANNELS, check_root, join_listings, read_csv_rows, refuse_duplicates

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
STORE, MANIFEST, BAD, RECORD = "benv1.zarr", "manifest.csv", "bad.csv", "conversion.json"
VERSION = 1  # of the layout: another one gives other files for the same patches
CHUNK = 256  # patches that a process does at a time
DISK_BYTES = 145_000  # of a patch: two arrays that hardly shrink, and eight files and folders


class Outcome(NamedTuple):
    """What became of one patch. sha256: of its VH, its VV (little-endian float32) and its labels as JSON."""

    patch: str
    s2_name: str = ""
    sha256: str = ""
    fault: str = ""  # why it could not be read


@dataclass
class Plan:
    """What is to be converted. lists: {split: names in the order of its list}.

    Lost: names for which there is no folder.
    """

    patches: list
    lists: dict
    lost: list  # of Outcome


# ---- What is to be done --------------------------------------------------------------------------


def make_plan(source, lists, id_col):
    """The Plan for split lists {split: path}; every patch if there are none.

    Raises DataError for lists that cannot be used.

    S2 names of no patch are not an error here, but lost: lists and folders may be large, and one of them incomplete.
    """
    if not lists:
        return Plan(every_patch(source).ids.tolist(), {}, [])
    read = {split: read_list(path, str(path), id_col) for split, path in lists.items()}
    pairs, unreadable = {}, []
    if any(are_s2 for _, are_s2 in read.values()):
        pairs = patches_by_s2_name(source, unreadable)
    names = {split: [pairs.get(name, name) for name in listing.ids.tolist()] for split, (listing, _) in read.items()}
    refuse_duplicates(join_listings([replace(read[split][0], ids=np.array(names[split])) for split in read]))
    fault = "belongs to none of the patches"
    if unreadable:
        fault += (
            f"; the metadata of {len(unreadable)} patches cannot be read, the first: {_relative(unreadable[0], source)}"
        )
    listed = sorted(name for part in names.values() for name in part)
    lost = [Outcome(name, fault=fault) for name in listed if S2_START.match(name)]
    return Plan([name for name in listed if not S2_START.match(name)], names, lost)


def _relative(error, source):
    """A message without the folder of the source, so that files do not depend on where that is."""
    return str(error).replace(f"{source.folder}/", "")


# ---- One patch -----------------------------------------------------------------------------------


@cache
def _patch_in_memory():
    """({file name: content}, group) of a patch in Zarr's layout, to be filled with one patch after the other.

    Making a group and arrays takes longer than reading, compressing and writing. A file for each array, beside its
    metadata, rather than in folders of its own: there are half a million patches.
    """
    files, zarr = {}, load("zarr", "writing a Zarr store")
    codecs = zarr.codecs
    group = zarr.create_group(files, zarr_format=3)
    arrays = [
        group.create_array(
            channel,
            shape=(SIZE, SIZE),
            chunks=(SIZE, SIZE),
            dtype="float32",
            fill_value=np.nan,
            serializer=codecs.BytesCodec(endian="little"),
            compressors=[codecs.ZstdCodec(level=3), codecs.Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True},
        )
        for channel in CHANNELS
    ]
    return files, group, arrays


def write_patch(folder, image, metadata):
    """Write a patch, (2, 120, 120) float32 dB, as the Zarr group `folder`, in place only when it is whole."""
    files, group, arrays = _patch_in_memory()
    for array, band in zip(arrays, image):
        array[:] = band
    group.attrs.put({"labels": metadata.label_names(), "corresponding_s2_patch": metadata.s2_name()})
    temporary = folder.with_name(f".{folder.name}.tmp")
    for name, content in files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(content.to_bytes())
    os.rename(temporary, folder)


def read_patch(store, patch, max_nonfinite):
    """(image (2, 120, 120) float32 dB, Metadata, Outcome) of a whole patch.

    Raises DataError for what is amiss with it.
    """
    image, metadata = store.image(patch, max_nonfinite), store.metadata(patch)
    metadata.labels()  # raises for a name that is none of the 43
    digest = hashlib.sha256(image.astype("<f4").tobytes() + json.dumps(metadata.label_names()).encode()).hexdigest()
    return image, metadata, Outcome(patch, metadata.s2_name(), digest)


def convert_patch(patch, source, target, max_nonfinite):
    """Have a patch in the store `target`. Returns its Outcome."""
    folder = target.folder / patch
    if folder.exists():
        try:
            return read_patch(target, patch, max_nonfinite)[-1]
        except DataError:  # the machine went down before it was on the disk, or the disk is ill
            shutil.rmtree(folder)
    try:
        image, metadata, outcome = read_patch(source, patch, max_nonfinite)
    except DataError as error:
        return Outcome(patch, fault=_relative(error, source))
    write_patch(folder, image, metadata)
    return outcome


def _convert_all(patches, source, target, max_nonfinite):
    return [convert_patch(patch, source, target, max_nonfinite) for patch in patches]


# ---- The store -----------------------------------------------------------------------------------


def convert(root, out, lists, id_col, max_nonfinite, skip_bad, workers):
    """Convert the patches of the folder `root` that are in split lists {split: path}, or all if there are none.

    manifest.csv comes last. Returns False if everything was there already. Raises DataError for lists and folders that
    cannot be used, and, when all other patches are converted, for those that could not be, unless skip_bad.
    """
    source, target = workers.on_main(_open, root), ZarrStore(out / STORE)
    record = workers.on_main(_record, lists, id_col, max_nonfinite)
    # Before the folder is begun: lists may have to be corrected first.
    plan = workers.on_main(lambda: None if (out / MANIFEST).exists() else make_plan(source, lists, id_col))
    with claimed(workers, out, record, last=MANIFEST, name=RECORD) as complete:
        if complete:
            workers.on_main(_check_left_out, out, skip_bad)
            return False
        workers.on_main(_prepare, out, target, len(plan.patches))
        work = partial(_convert_all, source=source, target=target, max_nonfinite=max_nonfinite)
        done = workers.map(work, _chunks(plan.patches), f"parts of {CHUNK} patches")
        workers.on_main(_finish, out, plan, [outcome for part in done for outcome in part], skip_bad)
    return True


def _chunks(items):
    return [items[k : k + CHUNK] for k in range(0, len(items), CHUNK)]


def _open(root):
    load("zarr", "writing a Zarr store")
    source = open_store(check_root(root))
    if isinstance(source, ZarrStore):
        raise DataError(f"--root {root}: is a Zarr store already; give the folder of patch folders")
    return source


def _record(lists, id_col, max_nonfinite):
    """What decides the content of the store. Whether bad patches are left out does not: it may be decided later."""
    for path in lists.values():
        if not path.is_file():
            raise DataError(f"{path}: no such list; correct the path")
    hashes = {split: sha256_of(path) for split, path in lists.items()}
    return {
        "program": "sarwmix.prepare.benv1_to_zarr",
        "version": VERSION,
        "lists": hashes,
        "id_col": id_col,
        "max_nonfinite": max_nonfinite,
    }


def _check_left_out(out, skip_bad):
    """A complete store that lacks patches is not what was asked for without --skip_bad."""
    left_out = len(list(read_csv_rows(out / BAD))) - 1
    if left_out and not skip_bad:
        raise DataError(
            f"--out {out} is complete but for {left_out} patches ({out / BAD}); restore them, remove {out / MANIFEST} "
            "and "
            "run again, or leave it at that with --skip_bad"
        )


def _prepare(out, target, patches):
    """The groups above the patches; what an interrupted run left half-done is removed.

    Raises DataError if room lacks.
    """
    target.folder.mkdir(parents=True, exist_ok=True)
    for path in [path for path in target.folder.glob(".*.tmp") if path.is_dir()]:
        shutil.rmtree(path)
    check_room([("--out", out, DISK_BYTES * (patches - len(target.patches())))])
    files = {}
    load("zarr", "writing a Zarr store").create_group(files, zarr_format=3)
    for folder in (target.folder.parent, target.folder):
        write_atomically(folder / "zarr.json", lambda file: file.write(files["zarr.json"].to_bytes()))


def _finish(out, plan, outcomes, skip_bad):
    """Lists and manifest; without them, DataError, if patches are bad."""
    whole = {outcome.patch: outcome for outcome in outcomes if not outcome.fault}
    bad = sorted(plan.lost + [outcome for outcome in outcomes if outcome.fault])
    write_csv(out / BAD, ("patch", "reason"), [(outcome.patch, outcome.fault) for outcome in bad])
    if bad and not (skip_bad and whole):
        for split in SPLITS:
            (out / f"benv1_{split}.csv").unlink(missing_ok=True)
        raise data_error(
            f"{len(bad)} of {len(bad) + len(whole)} patches could not be converted",
            [f"{outcome.patch} ({outcome.fault})" for outcome in bad],
            "restore them and run again, which does only these, or leave them out with --skip_bad; "
            f"{out / BAD} has them all",
        )
    os.sync()  # patches are many, and were not waited for one by one
    for split, names in plan.lists.items():
        rows = [(whole[name].s2_name, name) for name in names if name in whole]
        write_csv(out / f"benv1_{split}.csv", None, rows)
        log.info("%s: %d of %d patches", out / f"benv1_{split}.csv", len(rows), len(names))
    if not plan.lists:
        log.info("no split lists were given: all %d patches are converted, and no benv1_*.csv is written", len(whole))
    write_csv(out / MANIFEST, ("patch", "sha256"), [(name, whole[name].sha256) for name in sorted(whole)])


# ---- Looking again -------------------------------------------------------------------------------


def verify(out, workers):
    """Read every patch of a store again and compare it with the manifest. Returns how many there are.

    Raises DataError, with their number and the first five, for patches that are not what was written.
    """
    target, expected = ZarrStore(out / STORE), workers.on_main(_read_manifest, out)
    faults = workers.map(
        partial(_faults, target=target), _chunks(sorted(expected.items())), f"parts of {CHUNK} patches"
    )
    more = workers.on_main(
        lambda: [f"{patch}: is not in {MANIFEST}" for patch in target.patches() if patch not in expected]
    )
    found = [fault for part in faults for fault in part] + more
    if found:
        raise data_error(
            f"{out}: {len(found)} of {len(expected)} patches are not what was written",
            found,
            f"remove their folders in {target.folder} and {MANIFEST}, and run the conversion again: it does only these",
        )
    return len(expected)


def _read_manifest(out):
    if not (out / MANIFEST).exists():
        raise DataError(f"{out / MANIFEST}: does not exist, so the conversion is not complete; run it again")
    rows = [row for _, row in read_csv_rows(out / MANIFEST)]
    if not rows or rows[0] != ["patch", "sha256"] or any(len(row) != 2 for row in rows):
        raise DataError(f"{out / MANIFEST}: is not a list of patch and sha256; remove it and run the conversion again")
    return dict(rows[1:])


def _faults(patches, target):
    faults = []
    for patch, sha256 in patches:
        try:
            if read_patch(target, patch, max_nonfinite=1.0)[-1].sha256 != sha256:
                faults.append(f"{patch}: has other values or labels")
        except DataError as error:
            faults.append(_relative(error, target))
    return faults


# ---- Flags ---------------------------------------------------------------------------------------


def get_args_parser():
    parser = Parser(
        "Convert the Sentinel-1 folders of BigEarthNet v1 to a Zarr store with checksums.",
        "sarwmix.prepare.benv1_to_zarr",
    )
    group = parser.add_argument_group("input")
    group.add_argument("--root", type=Path, metavar="DIR", help="BigEarthNet-S1-v1.0, or the folder that holds it")
    for split in SPLITS:
        group.add_argument(
            f"--{split}",
            type=Path,
            metavar="LIST",
            help="official split list, S2 names or S2 and S1 names; without any list, every patch is converted",
        )
    group.add_argument(
        "--id_col", type=int, metavar="N", help="0-based column of the S1 names in the lists, where they are not found"
    )
    group.add_argument(
        "--max_nonfinite",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="share of NaN, infinite or no-data pixels above which a patch is bad",
    )
    group.add_argument(
        "--skip_bad", action="store_true", help="leave patches that cannot be read out, instead of failing"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of benv1.zarr, benv1_*.csv, bad.csv and manifest.csv; new, or begun by this program",
    )
    group.add_argument(
        "--verify", action="store_true", help="with --out alone: read the store again and compare it with its manifest"
    )
    add_workers_flag(group)
    return parser


def main(argv=None):
    parser = get_args_parser()

    def work(args, workers):
        lists = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
        if args.verify:
            if args.root or lists or args.skip_bad:
                parser.error("--verify goes with --out alone: it reads what was written")
            log.info("%s: %d patches are what was written", args.out, verify(args.out, workers))
            return
        if args.root is None:
            parser.error("--root is missing: the folder of patch folders")
        wrote = convert(args.root, args.out, lists, args.id_col, args.max_nonfinite, args.skip_bad, workers)
        log.info("%s: %s", args.out, "complete" if wrote else "complete already, nothing to do")

    run_command(parser, work, argv)


if __name__ == "__main__":
    main()
