# SPDX-License-Identifier: MIT
"""BigEarthNet v2 (reBEN), Sentinel-1: folders or the LMDB, with the official parquet files or CSV dumps of them."""

import logging
import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import DataError, data_error, quoted
from sarwmix.bigearthnet import (
    CLASSES,
    BigEarthNet,
    LmdbStore,
    PatchFolders,
    every_patch,
    is_lmdb,
    labelled,
    multi_hot,
    parse_labels,
)
from sarwmix.layouts import Layout, content_of, find_layout, folders_in, places_of_lists
from sarwmix.listing import (
    PARTS,
    S1_NAME,
    Listing,
    as_paths,
    check_names,
    check_root,
    check_split,
    join_listings,
    place_name,
    read_csv_rows,
    split_lists,
)

IMAGES = "BigEarthNet-S1"
OFFICIAL, SNOW_CLOUD = "metadata.parquet", "metadata_for_patches_with_snow_cloud_or_shadow.parquet"

log = logging.getLogger(__name__)


class BigEarthNetv2(BigEarthNet):
    """BigEarthNet v2: item i is (sar (2, 120, 120) float32 dB, order VH, VV; labels (19,) float32 multi-hot).

    root: the folder that contains BigEarthNet-S1 (other layouts: `find_layout`), or the authors' LMDB, or a folder that
    contains it. split: train, val (or validation), test, train_val, all.
    metadata: a parquet file with the official columns, or one or several CSV dumps of it; by default metadata.parquet
    in root, else the split's benv2_*.csv in root. These may also be in the folder of images or the LMDB, and, if root
    is that folder, beside it. Files with a column `split` are filtered by it; split="all" takes all rows. All rows of a
    CSV without that column are used, for any split.
    keep_unlabelled: keeps patches without a label, whose 19 labels are then 0; the column of labels may be absent.
    False drops them, for supervised training.
    include_snow_cloud: appends the patches of metadata_for_patches_with_snow_cloud_or_shadow.parquet, which is in the
    folder of metadata.parquet.
    id_col: 0-based column of the S1 names, if it is not named s1_name.
    max_nonfinite: fraction of NaN, infinite and no-data pixels above which reading a band fails.
    Raises DataError for metadata that cannot be used; `check_files` and `check_units` look at the images.
    Source: Clasen et al., reBEN: Refined BigEarthNet, 2025.
    """

    MEAN, STD = (-19.1966, -12.5144), (5.4501, 5.0019)

    def __init__(
        self, root, split="train_val", metadata=None, id_col=None, max_nonfinite=0.01, include_snow_cloud=False,
        keep_unlabelled=True
    ):  # fmt: skip
        root, split = check_root(root), check_split(split)
        store = _find_store(root)
        if metadata is None:
            metadata = _default_metadata(root, store, split, include_snow_cloud, keep_unlabelled)
        elif include_snow_cloud:
            raise DataError(
                "--include_snow_cloud adds to the default metadata only; with --metadata, name the file of these "
                "patches there"
            )
        else:
            metadata = as_paths(metadata)
        if store is None:
            raise DataError(
                f"{root / IMAGES}: no such folder, no folder with patches is in {root}, and no LMDB (data.mdb); "
                f"{content_of(root)}; give the folder that holds {IMAGES}, or the LMDB, with --data_path"
            )
        listing = _read_listing(metadata, root, split, id_col, keep_unlabelled) if metadata else _unlabelled(store)
        super().__init__(root, split, metadata, store, listing, max_nonfinite)


def _unlabelled(store):
    """The Listing of all patches of a store, without labels."""
    listing = every_patch(store)
    log.info("%s: no metadata: all %d patches are taken, without labels", store.folder, len(listing.ids))
    listing.labels = np.zeros((len(listing.ids), len(CLASSES)), np.uint8)
    return listing


def _read_listing(metadata, root, split, id_col, keep_unlabelled):
    """The Listing of the patches of a split, in the order of the metadata files. Raises DataError."""
    parts, listed, counts = [], Counter(), []
    for path in metadata:
        listing, splits = read_metadata(path, place_name(path, root), id_col, need_labels=not keep_unlabelled)
        listed.update(splits)
        counts.append(len(listing.ids))
        parts.append(_of_split(listing, splits, split, path))
    listing = join_listings(parts)
    if len(listing.ids) == 0:
        raise DataError(
            f"{', '.join(map(str, metadata))}: no row of split '{split}' (rows: "
            f"{', '.join(f'{name} {count}' for name, count in sorted(listed.items())) or 'none'}); "
            "choose another split, or give other metadata"
        )
    empty = [str(path) for path, count in zip(metadata, counts) if count == 0]
    if empty:
        raise data_error(f"{len(empty)} of {len(counts)} files have a header, but no rows", empty, "copy them again")
    unlabelled = len(listing.ids) - np.count_nonzero(listing.labels.any(axis=1))
    if unlabelled and not keep_unlabelled:
        listing = labelled(listing, ", ".join(map(str, metadata)))
    elif unlabelled:
        log.info("%d of %d patches have no label, and stay", unlabelled, len(listing.ids))
    return listing


# ---- Locations of images and metadata ------------------------------------------------------------


def _find_store(root):
    """The store under a folder: BigEarthNet-S1, else an LMDB, else folders in another layout, else None.

    Raises DataError if there are several.
    """
    if not (root / IMAGES).is_dir():
        found = [root] if is_lmdb(root) else [folder for folder in folders_in(root) if is_lmdb(folder)]
        if len(found) > 1:
            raise data_error(
                f"{root} holds {len(found)} LMDBs", [folder.name for folder in found], "give one with --data_path"
            )
        if found:
            return LmdbStore(found[0])
    layout = find_layout(root, IMAGES, acquisitions=True)
    if layout is None and (root / IMAGES).is_dir():
        layout = Layout(root / IMAGES, acquisitions=True)  # without patches, which check_files reports
    return layout and PatchFolders(layout)


def _default_metadata(root, store, split, include_snow_cloud, keep_unlabelled):
    """Paths of metadata.parquet, or of the split's CSV dumps; then of the snow and cloud patches. Raises DataError.

    [] without any, if the split is all patches, with or without labels.
    """
    some = False  # whether there is a list of a part of the split
    for folder in [root] if store is None else places_of_lists(root, store.folder, IMAGES):
        official = folder / OFFICIAL
        chosen = [official] if os.path.lexists(official) else split_lists(folder, "benv2", split)
        missing = [path.name for path in chosen if not os.path.lexists(path)]
        some |= len(missing) < len(chosen)
        if not missing:
            return chosen + ([snow_cloud_beside(official)] if include_snow_cloud else [])
    if store is not None and split == "all" and keep_unlabelled and not (some or include_snow_cloud):
        return []
    beside = " or beside it" if store is not None and store.folder == root else ""
    raise DataError(
        f"{root}: neither {OFFICIAL} nor {', '.join(missing)} is there{beside}; copy the dataset's metadata into it, "
        "or name them with --metadata" + ("; --split all takes all patches without it" if keep_unlabelled else "")
    )


def snow_cloud_beside(official):
    """Path of the second official file, in the folder of the first. Raises DataError if it does not exist."""
    path = official.parent / SNOW_CLOUD
    if not path.exists():
        raise DataError(f"{path}: does not exist; copy it there, or leave --include_snow_cloud out")
    return path


# ---- Metadata ------------------------------------------------------------------------------------


def is_parquet(path):
    return path.suffix.lower() in (".parquet", ".pq")


def read_metadata(path, place, id_col, need_labels=True):
    """Reads a metadata file. Returns (Listing of all rows, their splits, or () if the file has no such column).

    place: name of the file in messages. need_labels: the column of labels must exist, and its cells must be empty or
    lists of classes; otherwise rows with other cells have no label.
    """
    read = _read_parquet if is_parquet(path) else _read_csv
    lines, names, labels, splits = read(path, id_col, need_labels)
    splits = ["val" if value == "validation" else value for value in splits]
    place += ": row " if is_parquet(path) else ":"

    def where(i):
        return f"{place}{lines[i]}"

    check_names(names, where)
    unknown = [i for i, value in enumerate(splits) if value not in PARTS["all"]]
    if unknown:
        raise data_error(
            f"{len(unknown)} of {len(names)} rows have an unknown split",
            [f"{quoted(splits[i])} ({where(i)})" for i in unknown],
            "it must be train, validation or test",
        )
    return Listing(
        np.array(names, dtype=str), _encode(*labels, where, need_labels), (place,), line=np.array(lines, np.int64)
    ), splits


def _columns(path, header, id_col, need_labels):
    """Column numbers of the S1 name, the labels and the split; None if absent. Raises DataError."""
    if id_col is not None and not 0 <= id_col < len(header):
        raise DataError(f"{path}: has no column {id_col}, only 0 to {len(header) - 1}; correct --id_col")
    if id_col is not None and S1_NAME.fullmatch(header[id_col]):
        raise DataError(
            f"{path}: has no header, its first row names {quoted(header[id_col])}; write the names of the columns "
            "above it"
        )
    for name in (*(("s1_name",) if id_col is None else ()), *(("labels",) if need_labels else ())):
        if name not in header:
            remedy = "restore its header" + (", or give the column's number with --id_col" if name == "s1_name" else "")
            raise DataError(f"{path}: has no column {name} (columns: {', '.join(map(quoted, header))}); {remedy}")
    for name in ("labels", "split", *(("s1_name",) if id_col is None else ())):
        if header.count(name) > 1:
            raise DataError(f"{path}: has {header.count(name)} columns {name}; remove all but one")
    labels, split = (header.index(name) if name in header else None for name in ("labels", "split"))
    return header.index("s1_name") if id_col is None else id_col, labels, split


def _read_parquet(path, id_col, need_labels):
    """Reads a parquet file. Returns (row numbers from 0, S1 names, labels for `_encode`, splits)."""
    try:
        with pq.ParquetFile(path) as file:
            header = file.schema_arrow.names
            columns = [None if k is None else header[k] for k in _columns(path, header, id_col, need_labels)]
            table = file.read(columns=[name for name in columns if name])
        ids, labels, splits = (name and table[name] for name in columns)
        names = ["" if name is None else str(name) for name in ids.to_pylist()]
        labels = ([0] * len(names), [()]) if labels is None else _numbered_lists(labels.combine_chunks())
        splits = () if splits is None else splits.to_pylist()
    except DataError:
        raise
    except (OSError, ValueError, LookupError, OverflowError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: cannot be read as a parquet file ({reason}); check the path and the file") from error
    return range(len(names)), names, labels, splits


def _numbered_lists(column):
    """Labels of a parquet file for `_encode`: tuples of names, or text if a cell is not a list.

    column: Arrow array. If there are at most 256 different names and no nulls, each list is represented by bytes, one
    for each name, because half a million Python lists would take seconds.
    """
    if pa.types.is_list(column.type) and pa.types.is_string(column.type.value_type) and not column.null_count:
        names = column.flatten().dictionary_encode()
        if not names.null_count and len(names.dictionary) <= 256:
            known, text = names.dictionary.to_pylist(), names.indices.to_numpy().astype(np.uint8).tobytes()
            ends = np.cumsum(column.value_lengths().to_numpy()).tolist()
            numbers, distinct = _numbered(text[start:end] for start, end in zip([0, *ends], ends))
            return numbers, [tuple(known[k] for k in key) for key in distinct]
    values = ([] if value is None else value for value in column.to_pylist())
    return _numbered(
        tuple(name if isinstance(name, str) else repr(name) for name in value)
        if isinstance(value, list)
        else str(value)
        for value in values
    )


def _numbered(values):
    """Returns (the number of each value, the different values in the order of their numbers)."""
    numbers = {}
    return [numbers.setdefault(value, len(numbers)) for value in values], list(numbers)


def _read_csv(path, id_col, need_labels):
    """Reads a CSV dump with a header. Returns (line numbers from 1, S1 names, labels for `_encode`, splits)."""
    lines, names, labels, splits, ragged, distinct = [], [], [], [], [], {}
    rows = read_csv_rows(path)
    header = [name.strip() for name in next(rows, (0, ()))[1]]
    if not header:
        raise DataError(f"{path}: is empty; copy it again")
    id_at, labels_at, split_at = _columns(path, header, id_col, need_labels)
    for line, row in rows:
        if len(row) != len(header):
            ragged.append(f"{path.name}:{line}")
            continue
        lines.append(line)
        names.append(row[id_at].strip())
        text = () if labels_at is None or not row[labels_at].strip() else row[labels_at]
        labels.append(distinct.setdefault(text, len(distinct)))
        if split_at is not None:
            splits.append(row[split_at].strip())
    if ragged:
        raise data_error(
            f"{path}: {len(ragged)} of {len(lines) + len(ragged)} rows do not have the {len(header)} cells of "
            "the header",
            ragged,
            "correct the rows, or copy the file again",
        )
    return lines, names, (labels, list(distinct)), splits


def _encode(numbers, distinct, where, need_labels):
    """Encodes labels as (N, 19) uint8; rows without a name are 0. Raises DataError for labels that cannot be read; if
    they are not needed, it logs a warning, and these rows are 0.

    distinct: the few thousand different tuples of names or printed lists. numbers: (N,) index of each row in it.
    """
    table, problems = np.zeros((len(distinct), len(CLASSES)), np.uint8), {}
    for number, value in enumerate(distinct):
        try:
            table[number] = multi_hot(value if isinstance(value, tuple) else parse_labels(value))
        except DataError as error:
            problems[number] = str(error)
    if problems:
        found = [f"{problems[number]} ({where(i)})" for i, number in enumerate(numbers) if number in problems]
        if not need_labels:
            log.warning("%d of %d rows have labels that cannot be read: %s", len(found), len(numbers), found[0])
            return table[np.array(numbers, np.int64)]
        raise data_error(
            f"{len(found)} of {len(numbers)} rows have labels that cannot be read",
            found,
            "use lists of the 19-class names in datasets/bigearthnet_classes.csv",
        )
    return table[np.array(numbers, np.int64)]


def _of_split(listing, splits, split, path):
    """The rows of the split; all rows if the file has no splits."""
    if len(splits) == 0:
        log.info("%s has no split column: all its %d rows are taken as split %s", path, len(listing.ids), split)
        return listing
    kept = listing.take(np.array([value in PARTS[split] for value in splits]))
    log.info("%s: %d of %d rows are of split %s", path, len(kept.ids), len(listing.ids), split)
    return kept
