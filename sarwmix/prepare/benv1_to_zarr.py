# SPDX-License-Identifier: MIT
"""BigEarthNet v1: converts patch folders and official split lists to a Zarr store with checksums; or verifies a store.

    python -m sarwmix.prepare.benv1_to_zarr --root DIR --train LIST --val LIST --test LIST --out OUT
    mpirun -np 4 python -m sarwmix.prepare.benv1_to_zarr …
    python -m sarwmix.prepare.benv1_to_zarr --out OUT --verify

writes OUT/benv1.zarr (Zarr format 3: group sentinel1/<patch> with arrays VH and VV, float32 dB, and the attributes
`labels` and `corresponding_s2_patch`), OUT/benv1_{train,val,test}.csv (S2 name, S1 name), OUT/bad.csv (patches that
could not be converted) and, last, OUT/manifest.csv (SHA-256 of each patch). Each patch is written atomically: after an
interruption, the same command converts the missing patches. The result is the same, byte for byte, for any number of
interruptions.
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
from sarwmix.bigearthnet import SIZE, every_patch
from sarwmix.bigearthnetv1 import S2_START, ZarrStore, open_store, patches_by_s2_name, read_list
from sarwmix.listing import CHANNELS, EVERY, PARTS, check_root, join_listings, read_csv_rows, refuse_duplicates
from sarwmix.prepare.completeness import log_completeness, published

log = logging.getLogger(__name__)

STORE, MANIFEST, BAD, RECORD = "benv1.zarr", "manifest.csv", "bad.csv", "conversion.json"
VERSION = 1  # of the layout; to be raised if the files of given patches change
CHUNK = 256  # patches of one task
DISK_BYTES = 145_000  # of a patch: two arrays, which hardly compress, and eight files and folders


class Outcome(NamedTuple):
    """The outcome for one patch. sha256: of its VH, its VV (little-endian float32) and its labels as JSON."""

    patch: str
    s2_name: str = ""
    sha256: str = ""
    fault: str = ""  # why it could not be read


@dataclass
class Plan:
    """The patches to convert. lists: {split: names in the order of its list}; lost: Outcomes of names without patch."""

    patches: list
    lists: dict
    lost: list


# ---- Plan ----------------------------------------------------------------------------------------


def make_plan(source, lists, id_col):
    """The Plan for split lists {split: path}, or for every patch without lists.

    S2 names without a patch are recorded as lost, because lists and folders are large and may be incomplete. Raises
    DataError for lists that cannot be used.
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
    """The message of an error with paths relative to the source, so that the files do not depend on its location."""
    return str(error).replace(f"{source.folder}/", "")


# ---- One patch -----------------------------------------------------------------------------------


@cache
def _patch_in_memory():
    """A Zarr group in memory, reused for all patches: ({file name: content}, group, arrays).

    Creating a group and arrays would take longer than reading, compressing and writing a patch. The only chunk of an
    array is a file beside its metadata, not in folders of its own, because there are half a million patches.
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
    """Writes a patch, (2, 120, 120) float32 dB, atomically as the Zarr group `folder`."""
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
    """Reads a patch: (image (2, 120, 120) float32 dB, Metadata, Outcome). Raises DataError if it cannot be used."""
    image, metadata = store.image(patch, max_nonfinite), store.metadata(patch)
    metadata.labels()  # raises for a name that is not one of the 43
    digest = hashlib.sha256(image.astype("<f4").tobytes() + json.dumps(metadata.label_names()).encode()).hexdigest()
    return image, metadata, Outcome(patch, metadata.s2_name(), digest)


def convert_patch(patch, source, target, max_nonfinite):
    """Converts a patch, unless the store `target` has it. Returns its Outcome."""
    folder = target.folder / patch
    if folder.exists():
        try:
            return read_patch(target, patch, max_nonfinite)[-1]
        except DataError:  # damaged: the machine crashed before it was on the disk, or the disk is faulty
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
    """Converts the patches of the folder `root` that are in split lists {split: path}, or all without lists.

    manifest.csv is written last. Raises DataError for lists and folders that cannot be used, and, after all other
    patches are converted, for patches that cannot be converted, unless skip_bad.
    """
    source, target = workers.on_main(_open, root), ZarrStore(out / STORE)
    record = workers.on_main(_record, lists, id_col, max_nonfinite)
    # Before the folder is begun, because lists may have to be corrected.
    plan = workers.on_main(lambda: None if (out / MANIFEST).exists() else make_plan(source, lists, id_col))
    with claimed(workers, out, record, last=MANIFEST, name=RECORD) as complete:
        if complete:
            workers.on_main(_check_left_out, out, skip_bad)
            return
        workers.on_main(_prepare, out, target, len(plan.patches))
        work = partial(_convert_all, source=source, target=target, max_nonfinite=max_nonfinite)
        done = workers.map(work, _chunks(plan.patches), f"parts of {CHUNK} patches")
        workers.on_main(_finish, out, plan, [outcome for part in done for outcome in part], skip_bad)
    log.info("%s: complete", out)


def _chunks(items):
    return [items[k : k + CHUNK] for k in range(0, len(items), CHUNK)]


def _open(root):
    load("zarr", "writing a Zarr store")
    source = open_store(check_root(root))
    if isinstance(source, ZarrStore):
        raise DataError(f"--root {root}: is a Zarr store already; give the folder of patch folders")
    return source


def _record(lists, id_col, max_nonfinite):
    """The parameters that decide the content of the store, without --skip_bad, which may be added later."""
    for path in lists.values():
        if not path.is_file():
            raise DataError(f"{path}: no such list; correct the path")
    return {
        "program": "sarwmix.prepare.benv1_to_zarr",
        "version": VERSION,
        "lists": {split: sha256_of(path) for split, path in lists.items()},
        "id_col": id_col,
        "max_nonfinite": max_nonfinite,
    }


def _check_left_out(out, skip_bad):
    """Raises DataError if a complete store lacks bad patches and --skip_bad is not given."""
    left_out = len(list(read_csv_rows(out / BAD))) - 1
    if left_out and not skip_bad:
        raise DataError(
            f"--out {out} is complete except for {left_out} patches ({out / BAD}); restore them, remove "
            f"{out / MANIFEST} and run again, or accept it with --skip_bad"
        )


def _prepare(out, target, patches):
    """Writes the groups above the patches, removes temporary folders of an interrupted run, checks the disk space."""
    target.folder.mkdir(parents=True, exist_ok=True)
    for path in [path for path in target.folder.glob(".*.tmp") if path.is_dir()]:
        shutil.rmtree(path)
    check_room([("--out", out, DISK_BYTES * (patches - len(target.patches())))])
    files = {}
    load("zarr", "writing a Zarr store").create_group(files, zarr_format=3)
    for folder in (target.folder.parent, target.folder):
        write_atomically(folder / "zarr.json", lambda file: file.write(files["zarr.json"].to_bytes()))


def _finish(out, plan, outcomes, skip_bad):
    """Writes lists and manifest. Raises DataError instead if patches are bad, unless skip_bad."""
    whole = {outcome.patch: outcome for outcome in outcomes if not outcome.fault}
    bad = sorted(plan.lost + [outcome for outcome in outcomes if outcome.fault])
    write_csv(out / BAD, ("patch", "reason"), [(outcome.patch, outcome.fault) for outcome in bad])
    if bad and not (skip_bad and whole):
        for split in PARTS["all"]:
            (out / f"benv1_{split}.csv").unlink(missing_ok=True)
        raise data_error(
            f"{len(bad)} of {len(bad) + len(whole)} patches could not be converted",
            [f"{outcome.patch} ({outcome.fault})" for outcome in bad],
            f"restore them and run again, which converts only these, or leave them out with --skip_bad; {out / BAD} "
            "lists them all",
        )
    os.sync()  # once, because flushing each patch would be slow
    dataset = published("benv1", whole)
    for split, names in plan.lists.items():
        rows = [(whole[name].s2_name, name) for name in names if name in whole]
        write_csv(out / f"benv1_{split}.csv", None, rows)
        place = f"{out / f'benv1_{split}.csv'}: {len(rows):,} of {len(names):,} listed patches"
        log_completeness(log, place, dataset, split, len(rows))
    if not plan.lists:
        place = f"no split lists were given: all {len(whole):,} patches are converted, and no benv1_*.csv is written"
        log_completeness(log, place, dataset, EVERY, len(whole))
    write_csv(out / MANIFEST, ("patch", "sha256"), [(name, whole[name].sha256) for name in sorted(whole)])


# ---- Verification --------------------------------------------------------------------------------


def verify(out, workers):
    """Reads every patch of a store and compares it with the manifest. Returns the number of patches.

    Raises DataError with the number of patches that differ and the first five.
    """
    target, expected = ZarrStore(out / STORE), workers.on_main(_read_manifest, out)
    faults = workers.map(
        partial(_faults, target=target), _chunks(sorted(expected.items())), f"parts of {CHUNK} patches"
    )
    found = [fault for part in faults for fault in part]
    found += [f"{patch}: is not in {MANIFEST}" for patch in workers.on_main(target.patches) if patch not in expected]
    if found:
        raise data_error(
            f"{out}: {len(found)} of {len(expected)} patches differ from {MANIFEST}",
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
        usage="[flags] --root DIR --out DIR",
    )
    group = parser.add_argument_group("input")
    group.add_argument("--root", type=Path, metavar="DIR", help="BigEarthNet-S1-v1.0, or the folder that holds it")
    for split in PARTS["all"]:
        group.add_argument(
            f"--{split}",
            type=Path,
            metavar="LIST",
            help="official split list, S2 names or S2 and S1 names; without any list, every patch is converted",
        )
    group.add_argument(
        "--id_col", type=int, metavar="N", help="0-based column of the S1 names in the lists, if it is not detected"
    )
    group.add_argument(
        "--max_nonfinite",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="share of NaN, infinite or no-data pixels above which a patch is bad",
    )
    group.add_argument(
        "--skip_bad", action="store_true", help="leave out patches that cannot be read, instead of failing"
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
        "--verify", action="store_true", help="with only --out: read the store and compare it with its manifest"
    )
    add_workers_flag(group)
    return parser


def main(argv=None):
    parser = get_args_parser()

    def work(args, workers):
        lists = {split: getattr(args, split) for split in PARTS["all"] if getattr(args, split)}
        if args.verify:
            if args.root or lists or args.skip_bad:
                parser.error("--verify can be used only with --out")
            log.info("%s: all %d patches match the manifest", args.out, verify(args.out, workers))
            return
        if args.root is None:
            parser.error("--root is missing: the folder of patch folders")
        convert(args.root, args.out, lists, args.id_col, args.max_nonfinite, args.skip_bad, workers)

    run_command(parser, work, argv)


if __name__ == "__main__":
    main()
