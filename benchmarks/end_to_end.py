# SPDX-License-Identifier: MIT
"""Speed of pretraining including the loader, by layout of the data, compared with our plain re-implementation.

    python -m benchmarks.end_to_end --out output/benchmarks

Simulates patches once, in --out, and packs them. Without rasterio, the packed store has random images, and the variants
that read GeoTIFFs are skipped. Every round runs all variants in a new random order. A turn starts the loader, takes
--skip steps that are not timed, and then the timed steps. "batch in hand" trains on images in memory; the additional
time of the others is the cost of their loader, including the CPU time that it takes from the step. Files are read from
the page cache. Writes end_to_end.json and prints a table.
"""

import importlib.util
import os
import shutil
import time
from statistics import median

from torch.utils.data import DataLoader

from benchmarks.random_store import write_random_store
from benchmarks.reference import ReferenceSamples
from benchmarks.report import benchmark_parser, changed, deadline, in_turns, loader_flags, report, shown, speedup
from benchmarks.step import Ours, Reference, add_execution_flags, add_path_flags, noise, usual_amp, wait
from common.workers import Workers
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.packed import PackedDataset
from sarwmix.packed_store import MANIFEST
from sarwmix.prepare import pack
from sarwmix.simulate import patches as simulate
from util.datasets import ImagesWithIds, build_loader, fill_cache
from util.distributed import Launch, Ranks, pick_device
from util.misc import keep_freed_memory


def write_data(args):
    """Writes the data, unless they exist. Returns (folder of GeoTIFFs, packed store) of simulated patches; without
    rasterio (None, store of random images)."""
    workers = Workers(min(len(os.sched_getaffinity(0)), 1 + args.samples // 256))
    if importlib.util.find_spec("rasterio") is None:
        store = args.out / "end_to_end_random"
        if not (store / MANIFEST).exists():
            shutil.rmtree(store, ignore_errors=True)  # of a run that was interrupted
            write_random_store(store, "benv2", {"train": args.samples}, seed=args.seed, workers=workers)
        return None, store
    scenes, packed = args.out / "end_to_end_geotiff", args.out / "end_to_end_packed"
    parameters = simulate.Parameters(args.samples, seed=args.seed, val_fraction=0, test_fraction=0)
    simulate.simulate_dataset(scenes, parameters, workers)
    source = ["--dataset", "benv2", "--data_path", str(scenes), "--splits", "train"]
    pack.main([*source, "--part_mb", "64", "--out", str(packed)])
    return scenes, packed


class Way:
    """A `Path` with the source of its batches: loader() returns an iterable. turn: (skipped, timed) steps."""

    def __init__(self, path, loader, to_batch, turn):
        self.path, self.loader, self.to_batch, self.turn = path, loader, to_batch, turn
        self.seconds, self.waited = [], []

    def __call__(self):
        """Runs one turn. Records the seconds per timed step, and how many of them were spent waiting for a batch."""
        skipped, steps = self.turn
        batches, waited = iter(self.loader()), 0.0
        for i in range(skipped + steps):
            if i == skipped:
                wait(self.path.device)
                started, waited = time.perf_counter(), 0.0
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.path.losses.append(self.path.step(self.to_batch(batch), self.path.mask()))
        wait(self.path.device)
        self.seconds.append((time.perf_counter() - started) / steps)
        self.waited.append(waited / steps)


def build_ways(args, device, scenes, packed):
    """{name: Way}. scenes, packed: from `write_data`."""
    ranks, turn = Ranks(Launch(), device), (args.skip, args.steps)
    ours = Ours(args, None, device, args.amp, compile_mode=None if args.compile == "off" else args.compile)
    reference = Reference(args, None, device, args.amp)

    def prepared(batch):
        return [tensor.to(device, non_blocking=True) for tensor in batch]

    def with_our_loader(dataset, cache="none"):
        flags = loader_flags(args.batch_size, args.workers, args.seed, pin_mem=True)
        if cache != "none":
            fill_cache(dataset, cache, ranks)
        samples = ImagesWithIds(dataset)
        return Way(
            ours,
            lambda: build_loader(samples, flags, ranks),
            lambda batch: batch[1].to(device, non_blocking=True),
            turn,
        )

    hand = noise(args.batch_size, device, args.seed, args.skip + args.steps)
    if scenes is None:
        print("GeoTIFFs are left out, as rasterio is not installed; the reference has prepared batches in hand instead")
        hand_prepared = [reference.prepare(images) for images in hand]
        ways = {"reference, batch in hand": Way(reference, lambda: hand_prepared, lambda batch: batch, turn)}
    else:
        geotiff = BigEarthNetv2(scenes, "train")
        samples, workers = ReferenceSamples(geotiff), args.workers if args.workers is not None else 2

        def reference_loader():
            pin = device.type == "cuda"
            return DataLoader(samples, args.batch_size, True, num_workers=workers, pin_memory=pin, drop_last=True)

        ways = {
            "reference, GeoTIFF": Way(reference, reference_loader, prepared, turn),
            "ours, GeoTIFF": with_our_loader(geotiff),
        }
    ways |= {
        "ours, packed": with_our_loader(PackedDataset(packed, "train")),
        "ours, packed, data_cache ram": with_our_loader(PackedDataset(packed, "train"), "ram"),
    }
    if device.type == "cuda":
        ways["ours, packed, data_cache device"] = with_our_loader(PackedDataset(packed, "train"), "device")
    return ways | {"ours, batch in hand": Way(ours, lambda: hand, lambda batch: batch, turn)}


def main(argv=None):
    parser = benchmark_parser(
        "end_to_end", "Speed of pretraining with its data, compared with our plain re-implementation.", timed=True
    )
    add_path_flags(parser)
    parser.add_argument(
        "--samples", type=int, default=1024, help="number of simulated patches, at least (skip + steps) × batch_size"
    )
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn")
    parser.add_argument("--skip", type=int, default=3, help="steps of a turn before the timed ones")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each way")
    parser.add_argument(
        "--workers", type=int, help="loader processes or threads (default: as in training; 2 for the reference)"
    )
    add_execution_flags(parser)
    args = parser.parse_args(argv)
    if (args.skip + args.steps) * args.batch_size > args.samples:
        parser.error(f"--samples {args.samples}: a turn needs {(args.skip + args.steps) * args.batch_size}")
    device, ends = pick_device(args.device, 0), deadline(args)
    args = changed(args, amp=args.amp or usual_amp(device))
    if device.type == "cpu":
        keep_freed_memory()
    ways = build_ways(args, device, *write_data(args))
    in_turns(ways, args.rounds, args.seed, ends)
    rows, base, hand = [], next(iter(ways.values())).seconds, ways["ours, batch in hand"].seconds
    for name, way in ways.items():
        ratio, cost = speedup(base, way.seconds), speedup(way.seconds, hand)
        rows.append(
            {
                "way": name,
                "ms": median(way.seconds) * 1e3,
                "images_per_s": args.batch_size / median(way.seconds),
                "ratio": ratio,
                "speedup": shown(ratio),
                "waiting": f"{median(way.waited) / median(way.seconds):.1%}",
                "beyond_hand": "" if name.startswith("reference") else f"{cost['median'] - 1:+.1%}",
                "seconds": way.seconds,
                "waited": way.waited,
            }
        )
    report(
        "end_to_end",
        args,
        rows,
        {
            "way": "training",
            "ms": "ms",
            "images_per_s": "images/s",
            "speedup": "× reference (quartiles)",
            "waiting": "waiting for data",
            "beyond_hand": "beyond batch in hand",
        },
    )


if __name__ == "__main__":
    main()
