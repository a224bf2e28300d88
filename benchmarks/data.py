# SPDX-License-Identifier: MIT
"""Throughput of random samples by layout of the same data: GeoTIFF, LMDB, Zarr, packed store, plain arrays.

    python -m benchmarks.data --out output/benchmark_data --samples 2000

Simulates patches once (they stay in --out), writes them in every layout, and reads random batches. Each round measures
all layouts in a new random order. Files are read from the page cache, not from a disk. Writes data.json and prints a
table.
"""

import time
from functools import partial

import numpy as np
import torch
from safetensors.numpy import save
from tabulate import tabulate

from benchmarks.report import benchmark_parser, loader_flags, write_report
from common.files import write_csv
from common.packages import load
from common.workers import Workers
from sarwmix.bigearthnetv1 import BigEarthNetv1
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.packed import PackedDataset
from sarwmix.packed_store import DTYPES
from sarwmix.prepare import pack
from sarwmix.simulate import patches as simulate
from util.datasets import SamplesWithIds, build_loader
from util.distributed import Launch, Ranks

SHARD = 500  # samples per shard of the sharded Zarr array


# ---- The same samples in every layout ------------------------------------------------------------


def write_layouts(folder, samples, seed):
    """Writes simulated patches in every layout, unless they exist. Returns the dataset of GeoTIFFs."""
    scenes = folder / "geotiff"
    parameters = simulate.Parameters(samples, seed=seed, val_fraction=0, test_fraction=0)
    simulate.simulate_dataset(scenes, parameters, Workers(2))
    dataset = BigEarthNetv2(scenes, split="train")
    images = np.stack([dataset.image(i).numpy() for i in range(len(dataset))])
    if not (folder / "lmdb").exists():
        write_lmdb(folder / "lmdb", dataset.ids, images, scenes / "metadata.parquet")
    if not (folder / "zarr").exists():
        write_zarr(folder / "zarr", dataset, images)
    if not (folder / "zarr_sharded").exists():
        array = load("zarr", "writing a Zarr store").create_array(
            folder / "zarr_sharded",
            shape=images.shape,
            dtype="float32",
            chunks=(1, *images.shape[1:]),
            shards=(SHARD, *images.shape[1:]),
            compressors=None,
        )
        array[:] = images
    for dtype in DTYPES:
        source = ["--dataset", "benv2", "--data_path", str(scenes), "--splits", "train"]
        pack.main([*source, "--dtype", dtype, "--part_mb", "32", "--out", str(folder / f"packed_{dtype}")])
        plain = folder / f"plain_{dtype}" / "images.bin"
        plain.parent.mkdir(exist_ok=True)
        if not plain.exists():
            images.astype(dtype).tofile(plain)  # as uint16 only the number of bytes is meaningful
    return dataset


def write_lmdb(path, ids, images, metadata):
    """Writes the layout of the authors' LMDB: key s1_name, value safetensors with VH and VV; metadata beside it."""
    lmdb = load("lmdb", "writing an LMDB")
    with lmdb.open(str(path), map_size=4 * images.nbytes + 2**24) as env, env.begin(write=True) as transaction:
        for name, image in zip(ids.tolist(), images):
            transaction.put(name.encode(), save({"VH": image[0], "VV": image[1]}))
    (path / "metadata.parquet").write_bytes(metadata.read_bytes())


def write_zarr(path, dataset, images):
    """Writes the released layout: a group with uncompressed arrays VH and VV per patch, and a list of patches."""
    root = load("zarr", "writing a Zarr store").open_group(path, mode="w").create_group("sentinel1")
    for name, image in zip(dataset.ids.tolist(), images):
        patch = root.create_group(name, attributes={"labels": ["Sea and ocean"]})
        for channel, values in zip(dataset.CHANNELS, image):
            array = patch.create_array(
                channel, shape=values.shape, chunks=values.shape, dtype="float32", compressors=None
            )
            array[:] = values
    write_csv(path / "benv1_train.csv", None, [("", name) for name in dataset.ids.tolist()])


def disk_bytes(folder):
    """(bytes of the files, bytes that they occupy on the file system)."""
    sizes = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(s.st_size for s in sizes), sum(s.st_blocks * 512 for s in sizes)


# ---- Reading -------------------------------------------------------------------------------------


def stack(dataset, ids):
    return torch.stack([dataset.image(i) for i in ids])


LAYOUTS = {  # name: (class of the dataset, folder)
    "GeoTIFF": (BigEarthNetv2, "geotiff"),
    "LMDB": (BigEarthNetv2, "lmdb"),
    "Zarr, a group per patch": (BigEarthNetv1, "zarr"),
    **{f"packed {dtype}, dB": (PackedDataset, f"packed_{dtype}") for dtype in DTYPES},
}


def methods(folder, geotiff):
    """{name: (folder of the layout, batch(ids))}, each read by one thread."""
    sharded = load("zarr", "reading a Zarr store").open_array(folder / "zarr_sharded", mode="r")
    found = {
        name: (layout, partial(stack, kind(folder / layout, "train")))
        for name, (kind, layout) in LAYOUTS.items()
        if kind is not PackedDataset
    }
    found["Zarr, sharded, a chunk per sample"] = ("zarr_sharded", lambda ids: sharded.oindex[np.sort(ids)])
    for dtype in DTYPES:
        mapped = np.memmap(folder / f"plain_{dtype}" / "images.bin", dtype, "r", shape=(len(geotiff), 2, 120, 120))
        packed, cached = (PackedDataset(folder / f"packed_{dtype}", "train") for _ in range(2))
        cached.cache()
        found |= {
            f"NumPy memmap gather, {dtype}": (f"plain_{dtype}", mapped.__getitem__),
            f"packed {dtype}, codes": (f"packed_{dtype}", packed.codes),
            f"packed {dtype}, dB": (f"packed_{dtype}", packed.images),
            f"packed {dtype} in RAM, codes": (f"packed_{dtype}", cached.codes),
            f"packed {dtype} in RAM, dB": (f"packed_{dtype}", cached.images),
        }
    return found


def rate(batch, samples, size, seconds, rng):
    """Samples per second of random batches, measured for about `seconds`."""
    started, done = time.perf_counter(), 0
    while True:
        batch(rng.integers(0, samples, size))
        done += size
        elapsed = time.perf_counter() - started
        if elapsed > seconds:
            return done / elapsed


def loader_rate(dataset, workers, size, seconds):
    """Samples per second of the training loader, with labels; the first batch is not timed."""
    ranks = Ranks(Launch(), torch.device("cpu"))
    loader = build_loader(SamplesWithIds(dataset), loader_flags(size, workers), ranks)
    batches, started = -1, None  # the first batch waits for the workers to start
    while True:
        for _ in loader:
            batches += 1
            if batches == 0:
                started = time.perf_counter()
            elif time.perf_counter() - started > seconds:
                return batches * size / (time.perf_counter() - started)
        loader.batch_sampler.epoch += 1


# ---- Report --------------------------------------------------------------------------------------


def measure(args):
    """The rows of the table, dicts."""
    folder = args.out
    geotiff = write_layouts(folder, args.samples, args.seed)
    torch.set_num_threads(1)
    rng, rows = np.random.default_rng(args.seed), []
    found = methods(folder, geotiff)
    rates = {name: [] for name in found}
    for _ in range(args.rounds):
        for name in rng.permutation(list(found)).tolist():
            rates[name].append(rate(found[name][1], len(geotiff), args.batch_size, args.seconds, rng))
    loaders = {name: [] for name in found if name in LAYOUTS}
    for _ in range(args.rounds):
        for name in rng.permutation(list(loaders)).tolist():
            kind, layout = LAYOUTS[name]
            dataset = kind(folder / layout, "train")
            loaders[name].append(loader_rate(dataset, args.workers, args.batch_size, args.seconds))
    for name, (layout, _) in found.items():
        size, allocated = disk_bytes(folder / layout)
        rows.append(
            {
                "layout": name,
                "samples_per_s": float(np.median(rates[name])),
                "rounds": rates[name],
                "loader_samples_per_s": float(np.median(loaders[name])) if name in loaders else None,
                "bytes_per_sample": size / len(geotiff),
                "allocated_bytes_per_sample": allocated / len(geotiff),
            }
        )
    return rows


def table(rows, workers):
    """The rows as text."""
    base = rows[0]["samples_per_s"]
    shown = [
        (
            row["layout"],
            f"{row['samples_per_s']:,.0f}",
            f"{1e6 / row['samples_per_s']:,.1f}",
            f"{row['samples_per_s'] / base:,.1f}",
            f"{row['loader_samples_per_s']:,.0f}" if row["loader_samples_per_s"] else "",
            f"{row['bytes_per_sample'] / 1e3:.1f}",
            f"{row['allocated_bytes_per_sample'] / 1e3:.1f}",
        )
        for row in rows
    ]
    return tabulate(
        shown,
        headers=[
            "layout",
            "samples/s",
            "µs/sample",
            "× GeoTIFF",
            f"loader, {workers} workers",
            "kB/sample",
            "kB on disk",
        ],
        disable_numparse=True,
        colalign=("left", *["right"] * 6),
    )


def need_stores(_):
    """Raises DataError before any work if a package of a layout is missing."""
    for package in ("lmdb", "zarr"):
        load(package, "the benchmark of data layouts")


def main(argv=None):
    parser = benchmark_parser("data", "Throughput of random batches by data layout.")
    parser.add_argument("--samples", type=int, default=2000, help="simulated patches")
    parser.add_argument("--batch_size", type=int, default=256, help="samples of a batch")
    parser.add_argument("--workers", type=int, default=2, help="loader processes, or threads of the packed store")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of each measurement, at least one batch")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each layout; the median is shown")
    args = parser.parse_checked(argv, need_stores)
    rows = measure(args)
    write_report("data", args, rows)
    print(table(rows, args.workers))


if __name__ == "__main__":
    main()
