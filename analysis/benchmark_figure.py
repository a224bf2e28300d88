# SPDX-License-Identifier: MIT
"""Draws the measurements of the benchmarks: a figure for each JSON file of a folder.

python -m analysis.benchmark_figure output/benchmarks --output docs/figures
python -m analysis.benchmark_figure output/gpu_report
"""

import re
import textwrap
from pathlib import Path

import numpy as np

from analysis.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, entitle, new_chart, write_figure
from common.command_line import Parser
from common.errors import DataError
from common.files import read_json


def colour_of(name):
    """Grey for the reference, orange for the reference with our settings, blue for ours."""
    if not name.startswith("reference"):
        return BLUE
    return GREY if "," not in name or "again" in name or "GeoTIFF" in name else ORANGE


def quartiles(series):
    """The 25th, 50th and 75th percentile of each series of values: (3, series)."""
    return np.transpose([np.percentile(values, (25, 50, 75)) for values in series])


def bars(axis, names, values, colours, unit, digits=0):
    """Horizontal bars, the first on top, with whiskers and the median beside them. values: of `quartiles`."""
    place, (low, middle, high) = np.arange(len(names))[::-1], values
    axis.barh(place, middle, color=colours, height=0.7)
    axis.errorbar(middle, place, xerr=[middle - low, high - middle], fmt="none", ecolor="black", capsize=3, lw=1)
    for y, value, end in zip(place, middle, high):
        label_bar(axis, max(value, end), y, f"{value:,.{digits}f}")
    axis.set_yticks(place, names)
    axis.set_xlabel(unit)
    axis.set_xlim(0, max(high) * 1.15)


def label_bar(axis, x, y, text, size=9):
    """Writes text beside the end of a horizontal bar."""
    axis.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=size)


def draw_step(figure, data):
    """Images per second of each path, with a panel for each precision."""
    kinds = list(dict.fromkeys("float32" if row["amp"] == "off" else "16 bits" for row in data["rows"]))
    size = int(data["flags"]["batch_size"]) * int(data["flags"]["steps"])
    for axis, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds):
        rows = [row for row in data["rows"] if (row["amp"] == "off") == (kind == "float32")]
        rates = quartiles(size / np.array(row["seconds"]) for row in rows)
        paths = [row["path"] for row in rows]
        bars(axis, paths, rates, [colour_of(path) for path in paths], "images/s", 1 if rates.max() < 100 else 0)
        axis.set_title(kind if kind == "float32" else ", ".join(dict.fromkeys(row["amp"] for row in rows)), loc="left")
    return f"A pretraining step, {data['flags']['model']}, batch {data['flags']['batch_size']}"


def draw_parity(figure, data):
    """Losses by step, and the relative difference of each training to the one in float32."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    base, smooth = np.array(data["rows"][0]["losses"]), int(data["flags"]["batches"])  # one pass over the batches
    window = np.ones(smooth) / smooth
    # Thin lines on thick ones, so that curves which coincide are all visible.
    styles = [
        ("black", 4, "-"),
        (GREY, 3, "-"),
        (BLUE, 2, "-"),
        (ORANGE, 1.5, "--"),
        (GREEN, 1.2, ":"),
        (PURPLE, 1.2, "-."),
        (VERMILION, 1, "--"),
    ]
    for row, (colour, width, style) in zip(data["rows"], styles):
        losses = np.array(row["losses"])
        steps = np.arange(smooth, len(losses) + 1)
        name = row["path"] if row["amp"] in row["path"] or row["amp"] == "off" else f"{row['path']} ({row['amp']})"
        line = {"color": colour, "lw": width, "ls": style}
        above.plot(steps, np.convolve(losses, window, "valid"), **line, label=name)
        if row is not data["rows"][0]:
            below.plot(steps, np.convolve(np.abs(losses / base - 1), window, "valid"), **line)
    above.set_ylabel(f"loss, mean of {smooth} steps")
    above.legend(frameon=False, fontsize=9)
    below.set_yscale("log")
    below.set_ylabel("relative difference\nto float32")
    below.set_xlabel("step")
    return f"Losses of the same training in several ways, {data['flags']['model']}, batch {data['flags']['batch_size']}"


def draw_memory(figure, data):
    """Memory per image, and the time of a step, of each path."""
    left, right = figure.subplots(1, 2)
    models, paths = (list(dict.fromkeys(row[name] for row in data["rows"])) for name in ("model", "path"))
    for k, (path, colour) in enumerate(zip(paths, (GREY, BLUE, GREEN)[-len(paths) :])):
        rows = [row for row in data["rows"] if row["path"] == path]
        for axis, values in (
            (left, [row["kept_mb_per_image"] for row in rows]),
            (right, [row["step_s"] for row in rows]),
        ):
            place = np.arange(len(rows)) + 0.27 * (k - (len(paths) - 1) / 2)
            axis.bar_label(axis.bar(place, values, 0.26, color=colour, label=path), fmt="{:,.3g}", fontsize=8)
    for axis, label in (
        (left, "MB/image kept for backward"),
        (right, f"seconds a step, batch {data['flags']['batch_size']}"),
    ):
        axis.set_xticks(range(len(models)), [name.removeprefix("mixmim_") for name in models])
        axis.set_ylabel(label)
    left.margins(y=0.3 if len(models) < 3 else 0.05)
    left.legend(frameon=False)
    return "Memory and time of a step, by size of the model"


def draw_data(figure, data):
    """Samples per second of random batches by layout, with one thread."""
    axis, layouts = figure.subplots(), [row["layout"] for row in data["rows"]]
    rates = quartiles(row["rounds"] for row in data["rows"])
    colours = [BLUE if layout.startswith("packed") else GREY for layout in layouts]
    bars(axis, layouts, rates, colours, "samples/s, one thread")
    axis.set_xscale("log")
    axis.set_xlim(rates[0].min() / 2, rates[2].max() * 4)
    return "Reading random batches by layout of the data"


def short_name(kernel, most=44):
    """The name of a kernel without its template arguments, at most `most` characters long."""
    name = re.split(r"[<(]", kernel.removeprefix("void ").replace("(anonymous namespace)::", ""))[0]
    name = name if name.startswith("aten::") else name.split("::")[-1]
    return name if len(name) <= most else f"{name[: most - 1]}…"


def draw_kernels(figure, row):
    """The kernels with the most time, and the share of time in which the GPU is idle."""
    kernels, idle = ([found for found in row["found"] if name in found] for name in ("kernel", "idle"))
    bars_of = [(short_name(found["kernel"]), found["ms"], found["share"], BLUE) for found in kernels]
    bars_of += [("idle", found["idle"] * found["ms"], found["idle"], VERMILION) for found in idle]
    names, values, shares, colours = zip(*bars_of)
    axis, place = figure.subplots(), np.arange(len(names))[::-1]
    axis.barh(place, values, color=colours, height=0.7)
    for y, value, share in zip(place, values, shares):
        label_bar(axis, value, y, f"{value:.3g} ms, {share:.1%}", 8)
    axis.set_yticks(place, names, fontsize=8)
    axis.set_xlabel("ms a step")
    axis.set_xlim(0, max(values) * 1.3)
    return "Where the time of a step goes"


def draw_outcomes(figure, rows):
    """How each part ended, and the findings of parts without a panel, as text."""
    axis = figure.subplots()
    axis.set_axis_off()
    lines = []
    for row in rows:
        found = [entry["text"] for entry in row["found"] if not row.get("data") and "kernel" not in entry]
        texts = [": ".join(filter(None, (row["status"], row["reason"]))), *found]
        lines += [
            (row["part"].replace("_", " ") if k == 0 else "", line, row["status"])
            for k, line in enumerate(line for text in texts for line in textwrap.wrap(text, 95))
        ]
    for k, (name, line, status) in enumerate(lines):
        place, style = 1 - (k + 0.5) / len(lines), {"fontsize": 8, "va": "center"}
        axis.text(0, place, name, **style, fontweight="bold", color=VERMILION if status == "failed" else "black")
        axis.text(0.14, place, line, **style, color="dimgrey" if status == "left out" else "black")
    return "How the parts ended"


def draw_gpu_report(figure, data):
    """A panel for each part with measurements, drawn as the benchmark itself, and one with how all parts ended."""
    done = {name: value for row in data["rows"] for name, value in row.get("data", {}).items()}
    panels = [(draw, done[name], size) for name, (draw, size) in DRAWINGS.items() if name in done]
    panels += [
        (draw_kernels, row, (9, 3.5)) for row in data["rows"] if any("kernel" in found for found in row["found"])
    ]
    panels += [(draw_outcomes, data["rows"], (9, 3.5))]
    heights = [max(size[1] for _, _, size in panels[k : k + 2]) for k in range(0, len(panels), 2)]
    places = figure.subfigures(len(heights), 2, height_ratios=heights, hspace=0.06, wspace=0.03, squeeze=False).flat
    for (paint, values, _), place, letter in zip(panels, places, "abcdefgh"):
        place.suptitle(f"{letter}   {paint(place, values)}", x=0.01, ha="left", fontsize=10, fontweight="bold")
    good = sum(row["status"] == "ok" for row in data["rows"])
    return f"Pretraining, finetuning and their speed: {good} of {len(data['rows'])} parts of the report are ok"


DRAWINGS = {
    "step": (draw_step, (11, 3)),
    "parity": (draw_parity, (8, 5)),
    "memory": (draw_memory, (9, 3.5)),
    "data": (draw_data, (9, 6)),
    "gpu_report": (draw_gpu_report, (15, 12)),
}


def draw(name, data):
    """The Figure of the JSON of a benchmark. Raises DataError if it is not what the benchmark writes."""
    paint, size = DRAWINGS[name]
    figure = new_chart(*size)
    try:
        title = paint(figure, data)
        machine = data["machine"]
        place = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DataError(f"{name}.json: not what python -m benchmarks.{name} writes (no {error})") from None
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return entitle(figure, title, f"{place}, PyTorch {machine['torch']}")


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.benchmark_figure")
    parser.add_argument("folder", type=Path, help="folder of the JSON files of the benchmarks")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for benchmark_NAME.png and .svg (default: the same)"
    )
    args = parser.parse_args(argv)
    output = args.output or args.folder
    paths = [path for path in (args.folder / f"{name}.json" for name in DRAWINGS) if path.is_file()]
    if not paths:
        parser.error(f"{args.folder}: no benchmark's JSON is there; python -m benchmarks --out {args.folder} makes it")
    for path in paths:
        with parser.input_errors():
            figure = draw(path.stem, read_json(path, f"run python -m benchmarks.{path.stem} again"))
            output.mkdir(parents=True, exist_ok=True)
            print(write_figure(figure, output / f"benchmark_{path.stem}.png")[0])


if __name__ == "__main__":
    main()
