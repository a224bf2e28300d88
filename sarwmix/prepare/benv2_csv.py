# SPDX-License-Identifier: MIT
"""BigEarthNet v2: writes the official metadata as one CSV file per split.

    python -m sarwmix.prepare.benv2_csv --metadata metadata.parquet --out DIR [--include_snow_cloud]

writes benv2_{train,val,test,train_val}.csv with the official columns, in the order of the parquet file. Labels are
printed lists of quoted names. The S1 name is in column 4 (0-based).
"""

import logging
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq

from common.command_line import Parser
from common.errors import DataError, data_error
from common.files import remove_half_written, write_csv
from common.workers import run_command
from sarwmix.bigearthnetv2 import is_parquet, read_metadata, snow_cloud_beside
from sarwmix.listing import PARTS, join_listings, read_csv_rows, refuse_duplicates
from sarwmix.prepare.completeness import log_completeness, published

log = logging.getLogger(__name__)

COLUMNS = (
    "patch_id",
    "labels",
    "split",
    "country",
    "s1_name",
    "s2v1_name",
    "contains_seasonal_snow",
    "contains_cloud_or_shadow",
)
LISTS = ("train", "val", "test", "train_val")


def read_official(path):
    """Reads an official file. Returns (Listing, splits, rows of COLUMNS, all cells str).

    Raises DataError for another file, and for the rows that BigEarthNetv2 rejects.
    """
    if not is_parquet(path):
        raise DataError(
            f"{path}: its name does not end in .parquet; give the official metadata.parquet with --metadata"
        )
    listing, splits = read_metadata(path, str(path), id_col=None)
    with pq.ParquetFile(path) as file:
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise data_error(f"{path} lacks {len(missing)} of the official columns", missing, "copy it again")
        columns = file.read(columns=list(COLUMNS)).to_pydict()
    cells = (["" if value is None else str(value) for value in columns[name]] for name in COLUMNS)
    return listing, splits, list(zip(*cells))


def write_lists(metadata, out, include_snow_cloud=False):
    """Writes the four lists of a metadata file into the folder `out`.

    include_snow_cloud: appends the rows of the second official file, which is in the same folder. Raises DataError for
    metadata that cannot be used, and if lists with other content exist.
    """
    paths = [metadata, snow_cloud_beside(metadata)] if include_snow_cloud else [metadata]
    listings, splits, rows = zip(*map(read_official, paths))
    refuse_duplicates(join_listings(listings))
    splits, rows = list(chain(*splits)), list(chain(*rows))
    lists = {
        out / f"benv2_{name}.csv": [row for row, split in zip(rows, splits) if split in PARTS[name]] for name in LISTS
    }
    differ = [
        str(path)
        for path, content in lists.items()
        if path.exists() and [tuple(row) for _, row in read_csv_rows(path)] != [COLUMNS, *content]
    ]
    if differ:
        raise data_error(
            f"{len(differ)} lists are there already and differ", differ, "remove them, or choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    remove_half_written(out)
    dataset = published("benv2", chain.from_iterable(listing.ids.tolist() for listing in listings))
    for name, (path, content) in zip(LISTS, lists.items()):
        write_csv(path, COLUMNS, content)
        log_completeness(log, path, dataset, name, len(content), include_snow_cloud)


def get_args_parser():
    parser = Parser(
        "Write the official metadata of BigEarthNet v2 as one CSV file per split.", "sarwmix.prepare.benv2_csv"
    )
    group = parser.add_argument_group("input")
    group.add_argument("--metadata", type=Path, required=True, help="the official metadata.parquet")
    group.add_argument(
        "--include_snow_cloud",
        action="store_true",
        help="add the patches with seasonal snow, cloud or shadow, from the second official file in the same folder",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, help="folder of the lists")
    parser.set_defaults(workers=1)
    return parser


def main(argv=None):
    def work(args, workers):
        workers.on_main(write_lists, args.metadata, args.out, args.include_snow_cloud)

    run_command(get_args_parser(), work, argv)


if __name__ == "__main__":
    main()
