# SPDX-License-Identifier: MIT
"""Time, memory and seams of the map of a scene, with a model that costs nothing, or with a trained one.

    python -m benchmarks.scene_map --side 10000 --overlap 0 0.25
    python -m benchmarks.scene_map --side 10000 --overlap 0 0.25 --size 128 --finetune output/maps/model

A random scene is written to a temporary GeoTIFF, and mapped by `util.scene_maps` in a process of its own for each
overlap. The model averages VV over 9 × 9 pixels, and is wrong towards the edges of its window, as networks are. Seams
are measured in its probabilities of a part of the scene (--seam_side): the mean difference between neighbours on both
sides of the edge of a window, relative to that between other neighbours; 1: no seams. Writes scene_map.json and prints
a table.
"""

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import benchmark_parser, report
from common.command_line import Range, positive_int
from engine_segment import probabilities
from models_mixmim import size_of
from pretrained import load
from sarwmix.geotiff import load_rasterio
from sarwmix.raster import Image, Reading
from util.checkpoint_input import LoadedCheckpoint
from util.misc import peak_memory
from util.scene_maps import VALUES, map_scene
from util.sliding import MOST_OVERLAP, Windows, blended

CLASSES = ("water", "land")
ROWS = 500  # of a scene that are drawn at a time


def average_vv(images, fault=2.0, reach=8):
    """Probabilities (N, 2, size, size) of water and land: water where VV is below −14 dB on average.

    Towards the edges of a window its logit is too high by `fault` at the left and the top, too low at the right and
    the bottom, so that neighbours disagree. reach: pixels over which the fault falls by the factor e.
    """
    vv = torch.nan_to_num(images[:, 1], nan=-14.0)
    water = -14 - torch.nn.functional.avg_pool2d(vv, 9, 1, 4, count_include_pad=False)
    near = torch.exp(-torch.arange(images.shape[-1], device=images.device) / reach)
    along = fault * (near - near.flip(0))
    return torch.stack([water + along + along[:, None], torch.zeros_like(water)], 1).softmax(1)


@cache
def loaded(path):
    """(model, prepare) of a checkpoint, in this process."""
    return load(path)


def trained(path, images):
    """Probabilities (N, K, size, size) of dB images, by the segmentation model of a checkpoint."""
    return probabilities(*loaded(path), images, "off")


def classes_of(path):
    """The names of the classes of a segmentation checkpoint."""
    return tuple(LoadedCheckpoint.load(path, size_of).stated()["classes"])


def write_random_scene(path, side, seed=0):
    """Writes a scene of lakes and land with noise, VV and VH in dB float32, strip by strip. Returns the Image."""
    rasterio, rng = load_rasterio(), np.random.default_rng(seed)
    grid = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 300000, 0, -10, 5400000)}
    with rasterio.open(
        path, "w", driver="GTiff", count=2, dtype="float32", width=side, height=side, BIGTIFF="IF_SAFER", **grid
    ) as file:
        for number, name in enumerate(("VV", "VH"), start=1):
            file.set_band_description(number, name)
        for row in range(0, side, ROWS):
            rows = np.arange(row, min(row + ROWS, side))
            lakes = np.sin(rows / 90)[:, None] + np.sin(np.arange(side) / 130) > 0.7
            vv = np.where(lakes, -19, -9) + 2 * rng.standard_normal(lakes.shape, np.float32)
            file.write(np.stack([vv, vv - 7]).astype(np.float32), window=((rows[0], rows[-1] + 1), (0, side)))
    return Image.find(Path(path).stem, [path], Reading())


def measure_seams(probabilities_map, windows):
    """The mean |difference| of neighbours across the edges of windows, relative to that of other neighbours.

    probabilities_map: (K, H, W), tensor or array, NaN for no data. An edge is where a window begins or ends, but for
    the edges of the map. NaN without edges.
    """
    found, across, other = torch.as_tensor(probabilities_map), [], []
    for axis in (1, 2):
        steps = found.diff(dim=axis).abs()
        starts = windows.starts(found.shape[axis])
        edges = {edge for start in starts for edge in (start, start + windows.size)}
        on = torch.tensor([place + 1 in edges for place in range(steps.shape[axis])])
        for steps_of, mask in ((across, on), (other, ~on)):
            some = steps.movedim(axis, 0)[mask.to(found.device)].flatten()
            steps_of.append(some[torch.isfinite(some)])
    return float(torch.cat(across).mean() / torch.cat(other).mean())


def measure(image, predict, windows, folder, values="classes", seam_side=2048, classes=CLASSES):
    """Maps an image into a folder. Returns a row of the table. values: of VALUES. seam_side: pixels."""
    path = Path(folder) / "map.tif"
    before, started = peak_memory(torch.device("cpu")), time.perf_counter()
    map_scene(image, predict, path, classes, windows, values)
    seconds, peak = time.perf_counter() - started, peak_memory(torch.device("cpu"))
    with image.opened() as read:
        part = torch.from_numpy(read(0, 0, *(min(seam_side, side) for side in (image.height, image.width))))
    return {
        "size": windows.size,
        "overlap": windows.overlap,
        "values": values,
        "seconds": seconds,
        "mpixels_per_s": image.height * image.width / seconds / 1e6,
        "peak_gb": peak / 1e9,
        "before_gb": before / 1e9,
        "file_mb": path.stat().st_size / 1e6,
        "seams": measure_seams(blended(part, predict, windows), windows),
    }


def main(argv=None, predict=average_vv):
    """predict: a function of a module, which another process can import; see `util.sliding.blended_rows`."""
    parser = benchmark_parser("scene_map", "Time, memory and seams of the map of a scene.")
    parser.add_argument("--side", type=positive_int, default=10_000, help="side of the scene, pixels")
    parser.add_argument("--size", type=positive_int, default=256, help="side of the windows, pixels")
    share = Range(float, at_least=0, at_most=MOST_OVERLAP)
    parser.add_argument(
        "--overlap", type=share, nargs="+", default=[0.0, 0.25], help="overlaps of the windows, as shares of --size"
    )
    parser.add_argument("--batch_size", type=positive_int, default=16, help="windows in a batch")
    parser.add_argument("--finetune", metavar="PATH", help="run or checkpoint of a segmentation model, used as it is")
    parser.add_argument("--values", choices=VALUES, nargs="+", default=["classes"], help="values of the maps")
    parser.add_argument(
        "--seam_side", type=positive_int, default=2048, help="side of the part in which seams are measured, pixels"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        image = write_random_scene(Path(folder) / "scene.tif", args.side, args.seed)
        rows, classes = [], CLASSES
        if args.finetune:
            predict, classes = partial(trained, args.finetune), classes_of(args.finetune)
        for values in args.values:
            for overlap in args.overlap:
                windows = Windows(args.size, overlap, args.batch_size)
                work = partial(measure, image, predict, windows, folder, values, args.seam_side, classes)
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # with a peak of its own
                    rows.append(pool.submit(work).result())
    report(
        "scene_map",
        args,
        rows,
        {
            "size": "window",
            "overlap": "overlap",
            "values": "values",
            "seconds": "time, s",
            "mpixels_per_s": "Mpixel/s",
            "peak_gb": "peak memory, GB",
            "before_gb": "before, GB",
            "file_mb": "file, MB",
            "seams": "seams",
        },
    )


if __name__ == "__main__":
    main()
