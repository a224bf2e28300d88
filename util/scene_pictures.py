# SPDX-License-Identifier: MIT
"""Pictures of a scene beside a map of it: the scene in false colour, and classes or features in colours.

Both are drawn on the grid of the scene, upright, from averages that are as coarse as the picture needs.
"""

import re
from collections import Counter, namedtuple
from colorsys import hls_to_rgb

import numpy as np
from matplotlib import rc_context
from matplotlib.patches import Patch

from common.packages import load
from util.quicklook import false_colour, new_chart

ROWS = 512  # that are read at a time: a row of the usual blocks
COMPONENT = "principal component"
CLASS_TAG = "CLASS_{}"  # of the band of a map of classes: the name of a class
LENGTHS = (100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)  # of a scale bar, m
UNKNOWN = (1.0, 1.0, 1.0)  # colour of pixels without data
FRAME = "0.6"
PLAIN = {"text.parse_math": False}  # names of classes are text, with or without $
LEAST_WIDE = 2.8  # inches of a panel, for its title

# Words in names of classes, and colours that colour-blind readers tell apart: two of them differ by 15 and more in
# CIELAB, as seen with each kind of dichromacy (Machado et al. 2009). The first row with a word of a name decides.
NAMED = (
    ("no non not unflooded nonwater", "#EDE4CC"),
    ("flood flooded flooding inundated inundation", "#4CB7E6"),
    ("water waters sea ocean lake river rivers", "#1B5FA8"),
    ("urban town city built settlement settlements industrial", "#DB4A32"),
    ("forest forests tree trees woodland wood", "#12542F"),
    ("wetland wetlands marsh swamp mangrove mangroves bog", "#5B2A6B"),
    ("crop crops cropland farmland arable agriculture agricultural", "#F2C94C"),
    ("grass grassland grasslands pasture pastures meadow shrub shrubland open", "#9CCB86"),
    ("bare soil sand beach rock rocks", "#A38075"),
    ("snow ice glacier", "#D9ECFA"),
    ("land dry background other", "#EDE4CC"),
)
OTHERS = ("#CC79A7", "#E69F00", "#009E73", "#6A3D9A", "#D55E00", "#56B4E9", "#F0E442", "#5C3D2E")  # in turn
SHADES = (0.0, 0.4, -0.4, 0.65)  # of a colour that has been given before: towards white, or black

# What a file of a map holds, as coarse as asked for. bands: (K, H, W) float, NaN for no data; None of a map of classes.
# classes: (H, W) numbers, -1 for no data; of bands, the most probable. names: of bands or classes. transform: of the
# pixels of these arrays. crs: of rasterio, or None.
Map = namedtuple("Map", "bands classes names transform crs")


# ---- Colours of classes --------------------------------------------------------------------------


def class_colours(names):
    """A colour, (3,) uint8, for each name of a class: by its meaning where it is known, else the next of a cycle."""
    others, given, colours = iter(OTHERS), Counter(), []
    for number, name in enumerate(names):
        words = set(re.findall(r"[a-z]+", name.lower()))
        colour = next((_rgb(colour) for known, colour in NAMED if words & set(known.split())), None)
        if colour is None and (other := next(others, None)):
            colour = _rgb(other)
        if colour is None:  # hues that are far apart
            colour = np.array(hls_to_rgb(number * 0.618 % 1, (0.4, 0.6, 0.75)[number % 3], 0.5))
        key = tuple(colour)
        shade = SHADES[given[key] % len(SHADES)]
        given[key] += 1
        colours.append(colour * (1 + shade) if shade < 0 else colour + shade * (1 - colour))
    return np.rint(np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)


def _rgb(colour):
    return np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])


# ---- Coarse scenes and maps ----------------------------------------------------------------------


class Overview:
    """A scene averaged in linear power over squares, gathered from rows that come from the top.

    side: of the squares, pixels, such that no more than `most` are beside each other; those at the right and lower
    edges may be cut.
    """

    def __init__(self, height, width, most):
        self.height, self.width = height, width
        self.side = max(1, -(-max(height, width) // most))
        self.columns = np.arange(0, width, self.side)
        self.power, self.count = np.zeros((2, 2, -(-height // self.side), len(self.columns)))

    def add(self, row, values):
        """Adds the rows from `row` on: (2, rows, width) in dB, NaN for no data."""
        known = np.isfinite(values)
        power = np.exp(np.where(known, values, -np.inf) * np.float32(np.log(10) / 10))
        places = (row + np.arange(values.shape[1])) // self.side
        first = np.flatnonzero(np.diff(places, prepend=-1))
        for total, part in ((self.power, power), (self.count, known)):
            columns = np.add.reduceat(part, self.columns, axis=2, dtype=np.float64)
            total[:, places[first]] += np.add.reduceat(columns, first, axis=1)

    def picture(self):
        """(2, h, w) in dB, NaN where a square has no data."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.count, 10 * np.log10(self.power / self.count + 1e-12), np.nan).astype(np.float32)


def overview(image, most):
    """The Overview of an image: of `sarwmix.raster`, or what has height, width and opened()."""
    result = Overview(image.height, image.width, most)
    with image.opened() as read:
        for row in range(0, image.height, ROWS):
            result.add(row, read(row, 0, min(ROWS, image.height - row), image.width))
    return result


def read_map(file, most):
    """The Map in an open file of rasterio, with sides of at most `most` pixels: averages, or the most frequent class.

    A map of classes is one band of uint8. Its overviews are used, if it has any.
    """
    resampling = load("rasterio", "reading maps").enums.Resampling
    scale = max(1, max(file.shape) / most)
    shape = tuple(max(1, round(side / scale)) for side in file.shape)
    a, b, c, d, e, f = tuple(file.transform)[:6]
    across, down = file.width / shape[1], file.height / shape[0]
    place = (a * across, b * down, c, d * across, e * down, f), file.crs
    if file.count == 1 and file.dtypes[0] == "uint8":
        classes = file.read(1, out_shape=shape, resampling=resampling.mode, masked=True).astype(int).filled(-1)
        tags = file.tags(1)
        count = max((k + 1 for k in range(256) if CLASS_TAG.format(k) in tags), default=classes.max() + 1)
        return Map(None, classes, [tags.get(CLASS_TAG.format(k), f"class {k}") for k in range(count)], *place)
    bands = file.read(out_shape=(file.count, *shape), resampling=resampling.average, masked=True, out_dtype=np.float32)
    bands = bands.filled(np.nan)
    classes = np.where(np.isfinite(bands).all(0), np.argmax(np.nan_to_num(bands, nan=-1), 0), -1)
    names = [name or f"band {k}" for k, name in enumerate(file.descriptions, start=1)]
    return Map(bands, classes, names, *place)


# ---- Drawing -------------------------------------------------------------------------------------


@rc_context(PLAIN)
def draw_map(scene, transform, found, panel=4.6):
    """A Figure of a scene and a map beside it, or below it where the scene is wide.

    scene: its Overview. transform: (a, b, c, d, e, f) of its pixels. found: a Map. panel: the longer side of the
    scene, inches. Three bands named "principal component" are shown as red, green and blue; others are classes.
    """
    picture, side = scene.picture(), scene.side
    a, b, _, d, e, _ = transform
    aspect = np.hypot(b, e) / np.hypot(a, d)  # of a pixel
    left, right = _panels(scene.height * aspect, scene.width, panel)
    known = np.isfinite(picture).all(0)
    extent = (0, picture.shape[2] * side, picture.shape[1] * side, 0)  # the last squares may be cut
    _show(left, false_colour(np.where(known, picture, 0)), known, extent)
    left.set_title("scene: red VV, green VH, blue VV/VH", fontsize=10)
    if found.bands is not None and len(found.bands) == 3 and all(name.startswith(COMPONENT) for name in found.names):
        shown, known = to_colours(found.bands)
        right.set_title("features: principal components 1, 2, 3", fontsize=10)
    else:
        colours, known = class_colours(found.names), found.classes >= 0
        shown = colours[np.maximum(found.classes, 0)] / 255
        right.set_title("most probable class", fontsize=10)
        _add_legend(
            left.figure, {found.names[k]: colours[k] / 255 for k in np.unique(found.classes[known])}, known.all()
        )
    _show(right, shown, known, _extent(found, transform))
    for axis in (left, right):
        axis.set(xlim=(0, scene.width), ylim=(scene.height, 0), xticks=[], yticks=[], aspect=aspect)
        axis.spines[:].set(color=FRAME, lw=0.5)
    if found.crs is not None and found.crs.is_projected:
        _scale_bar(left, np.hypot(a, d) * found.crs.linear_units_factor[1])
    return left.figure


def _panels(height, width, longer):
    """Two axes of a new figure, one above the other where they are wide. longer: the longer side of one, inches."""
    high, wide = (max(0.3, side * longer / max(height, width)) for side in (height, width))
    if wide > 1.5 * high:
        return new_chart(wide + 0.2, 2 * high + 0.88).subplots(2, 1)
    return new_chart(2 * max(wide, LEAST_WIDE) + 0.3, high + 0.48).subplots(1, 2)


def _add_legend(figure, colours, everywhere):
    """A legend of classes, {name: colour}, below the panels. everywhere: whether all pixels have data."""
    handles = [Patch(fc=colour, ec=FRAME, lw=0.5, label=name) for name, colour in colours.items()]
    if not everywhere:
        handles.append(Patch(fc=UNKNOWN, ec=FRAME, lw=0.5, label="no data"))
    widths = [0.6 + 0.08 * len(handle.get_label()) for handle in handles]  # inches
    columns = len(handles)
    if sum(widths) > figure.get_figwidth():
        columns = int(np.clip(figure.get_figwidth() / max(widths), 1, len(handles)))
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.2 * -(-len(handles) // max(1, columns)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _show(axis, colours, known, extent):
    axis.imshow(np.where(known[..., None], colours, UNKNOWN), extent=extent, interpolation_stage="rgba")


def _extent(found, transform):
    """(left, right, bottom, top) of a Map, in pixels of the scene with this transform."""
    a, b, c, d, e, f = transform
    corners = np.array([[0, 0], found.classes.shape[::-1]], float)
    p, q, r, s, t, u = found.transform
    places = corners @ np.array([[p, q], [s, t]]).T + [r - c, u - f]
    (left, top), (right, bottom) = places @ np.linalg.inv([[a, b], [d, e]]).T
    return left, right, bottom, top


def to_colours(bands):
    """(3, H, W) → (H, W, 3) in [0, 1], each band between its 2nd and 98th percentile; (H, W) mask of known pixels."""
    known = np.isfinite(bands).all(0)
    low, high = (np.percentile(bands[:, known], q, axis=1)[:, None, None] for q in (2, 98))
    return np.clip((bands - low) / np.maximum(high - low, 1e-9), 0, 1).transpose(1, 2, 0), known


def _scale_bar(axis, pixel):
    """A bar of up to a quarter of the width, with its length. axis: in pixels of this side, m."""
    width, height = axis.get_xlim()[1], axis.get_ylim()[0]
    length = max((n for n in LENGTHS if n <= width * pixel / 4), default=LENGTHS[0])
    x, y, wide = 0.04 * width, 0.95 * height, length / pixel
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length} m"
    axis.plot([x, x + wide], [y, y], color="black", lw=5, solid_capstyle="butt")
    axis.plot([x, x + wide], [y, y], color="white", lw=3, solid_capstyle="butt")
    box = {"facecolor": "black", "alpha": 0.55, "linewidth": 0, "pad": 2}
    place = {"xytext": (2, 8), "textcoords": "offset points", "va": "bottom"}
    axis.annotate(text, (x, y), color="white", fontsize=9, bbox=box, **place)
