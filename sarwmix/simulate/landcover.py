# SPDX-License-Identifier: MIT
"""Draws the geography of a simulated scene at 10 m: coast, lakes, rivers, relief, forests, parcels, towns, roads.

`draw_geography` paints a scene in layers: farmland and open land by district and parcel, uplands, forests, wetlands,
water, towns. Radar is in `sarwmix.simulate.radar`. Lengths are pixels of 10 m.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from scipy import fft, ndimage


class LandCover(IntEnum):
    """The 19 BigEarthNet classes; the value is the official class index."""

    URBAN, INDUSTRY, ARABLE, PERMANENT, PASTURE, COMPLEX, AGRI_NATURAL, AGROFOREST = range(8)
    BROADLEAVED, CONIFEROUS, MIXED, GRASSLAND, MOOR, TRANSITIONAL, BEACH = range(8, 15)
    INLAND_WETLAND, COASTAL_WETLAND, INLAND_WATER, SEA = range(15, 19)


C = LandCover
FORESTS = (C.BROADLEAVED, C.CONIFEROUS, C.MIXED)
PARCELLED = (C.ARABLE, C.PERMANENT, C.PASTURE, C.COMPLEX, C.AGRI_NATURAL, C.AGROFOREST)
WATER = (C.INLAND_WATER, C.SEA)


@dataclass(frozen=True)
class Landscape:
    """The composition of a kind of landscape: shares of the scene as (lowest, highest), numbers per 100 km²."""

    districts: dict  # {class of a district of open land: relative frequency}
    sea: tuple = (0.0, 0.0)
    lakes: tuple = (0.0, 0.02)
    forest: tuple = (0.1, 0.3)
    forest_mix: tuple = (1, 1, 1)  # relative area of broad-leaved, coniferous, mixed
    uplands: tuple = (0.0, 0.0)
    wetlands: tuple = (0.0, 0.02)
    relief: tuple = (5.0, 40.0)  # standard deviation of the height, m
    rivers: float = 0.8
    cities: float = 1.8
    villages: float = 16.0
    parcel: tuple = (7.0, 22.0)  # width of a parcel


LANDSCAPES = {  # name: (relative frequency, composition)
    "coast": (
        0.32,
        Landscape(
            {C.ARABLE: 4, C.PASTURE: 3, C.COMPLEX: 2, C.AGRI_NATURAL: 2, C.GRASSLAND: 1, C.MOOR: 1},
            sea=(0.4, 0.9),
            forest=(0.08, 0.3),
            wetlands=(0.0, 0.04),
            relief=(3, 30),
            cities=3.5,
        ),
    ),
    "farmland": (
        0.22,
        Landscape(
            {C.ARABLE: 9, C.COMPLEX: 2, C.PASTURE: 1.5, C.AGRI_NATURAL: 1.5, C.PERMANENT: 0.5},
            forest=(0.06, 0.22),
            forest_mix=(2, 1, 1),
            cities=2.8,
            parcel=(9, 30),
        ),
    ),
    "lakeland": (
        0.20,
        Landscape(
            {C.TRANSITIONAL: 3, C.ARABLE: 2, C.PASTURE: 1, C.AGRI_NATURAL: 2, C.MOOR: 0.5},
            lakes=(0.06, 0.22),
            forest=(0.5, 0.75),
            forest_mix=(0.6, 2.5, 2),
            wetlands=(0.04, 0.12),
            relief=(8, 35),
            rivers=0.5,
            cities=0.7,
            villages=7,
            parcel=(8, 18),
        ),
    ),
    "grassland hills": (
        0.14,
        Landscape(
            {C.PASTURE: 6, C.AGRI_NATURAL: 2, C.COMPLEX: 1.5, C.ARABLE: 2, C.GRASSLAND: 1},
            forest=(0.15, 0.4),
            uplands=(0.05, 0.25),
            wetlands=(0.0, 0.06),
            relief=(25, 80),
            parcel=(6, 16),
        ),
    ),
    "mediterranean": (
        0.12,
        Landscape(
            {C.PERMANENT: 4, C.AGROFOREST: 4, C.ARABLE: 2, C.COMPLEX: 2, C.AGRI_NATURAL: 2, C.MOOR: 1, C.GRASSLAND: 1},
            lakes=(0.0, 0.03),
            forest=(0.1, 0.3),
            forest_mix=(3, 1, 1),
            uplands=(0.03, 0.15),
            relief=(20, 70),
            rivers=0.6,
            villages=12,
            parcel=(6, 20),
        ),
    ),
}


@dataclass
class Geography:
    """One scene of H × W pixels of 10 m. Targets are T strong single reflectors: buildings, masts, farms, ships."""

    land_cover: np.ndarray  # (H, W) uint8, LandCover
    elevation: np.ndarray  # (H, W) float32, m
    parcel: np.ndarray  # (H, W) uint32, number of the parcel
    parcel_across: np.ndarray  # (H, W) float32, distance across the rows of the parcel
    hedge: np.ndarray  # (H, W) bool, tree lines between parcels
    paved: np.ndarray  # (H, W) bool, roads and streets
    building: np.ndarray  # (H, W) float32 in [0, 1), a random number for each building, lower in sparse districts
    alignment: np.ndarray  # (H, W) float32 in [0, 1], 1 where streets run along the track of the sensor
    target_rows: np.ndarray  # (T,) int
    target_cols: np.ndarray  # (T,) int


def _interpolate(field, length, step, axis):
    """Interpolates linearly along an axis to `length` values, `step` per old one. Twice as fast as ndimage.zoom."""
    whole, part = divmod(np.arange(length), step)
    part = (part / step).astype(np.float32)
    part = part[:, None] if axis == 0 else part
    left = field.take(whole, axis)
    return left + part * (field.take(whole + 1, axis) - left)


def fractal(rng, shape, largest, slope=3.0, step=1):
    """Draws a smooth random field (H, W) float32 of mean 0 and variance 1 with a power-law spectrum.

    Power falls with frequency**-slope below the wavelength `largest` (pixels), and is constant above it. The field is
    drawn on a larger area, because a Fourier synthesis is periodic. It is drawn at every `step`-th pixel and
    interpolated in between.
    """
    fine = tuple(int(-(-n // step)) + 2 for n in shape)
    high, wide = (fft.next_fast_len(int(1.25 * n) + 4, real=True) for n in fine)
    frequency = np.hypot(fft.fftfreq(high)[:, None], fft.rfftfreq(wide)[None]).astype(np.float32)
    amplitude = (frequency**2 + (step / largest) ** 2) ** np.float32(-slope / 4)
    spectrum = rng.standard_normal((*amplitude.shape, 2), dtype=np.float32).view(np.complex64)[..., 0] * amplitude
    field = fft.irfft2(spectrum, s=(high, wide))[: fine[0], : fine[1]]
    for axis, length in enumerate(shape if step > 1 else ()):
        field = _interpolate(field, length, step, axis)
    field = field[: shape[0], : shape[1]]
    return (field - field.mean()) / field.std()


def hashed(*keys):
    """A random number in [0, 1) for each tuple of integers (arrays that broadcast, or numbers); float32.

    A multiply-xorshift hash. It draws numbers for a parcel or building without a table of all of them.
    """
    state = np.full(1, 0x9E3779B9, np.uint32)  # an array, because a NumPy scalar would warn of overflow
    for key in keys:
        state = (state ^ np.asarray(key).astype(np.int64).astype(np.uint32)) * np.uint32(0x85EBCA6B)
        state = (state ^ (state >> np.uint32(15))) * np.uint32(0xC2B2AE35)
        state = state ^ (state >> np.uint32(13))
    return (state >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def below(field, share):
    """Mask of the lowest `share` of the values of a field; empty for a share of 0."""
    return field < np.quantile(field[::4, ::4], share) if share > 0 else np.zeros(field.shape, bool)


def voronoi(seed, rows, cols, spacing):
    """Number (int32) of the nearest point for each position. Points are on a grid of `spacing`, randomly shifted."""
    rows, cols = np.broadcast_arrays(rows, cols)
    cell_row, cell_col = np.floor(rows / spacing).astype(np.int32), np.floor(cols / spacing).astype(np.int32)
    nearest = np.full(rows.shape, np.inf, np.float32)
    number = np.zeros(rows.shape, np.int32)
    margin, width = 8, int(cell_col.max()) + 16  # for neighbours of edge cells and warped positions outside
    table_rows, table_cols = np.mgrid[-margin : int(cell_row.max()) + margin, -margin:width].astype(np.int32)
    point_rows = ((table_rows + hashed(seed, table_rows, table_cols, 1)) * spacing).astype(np.float32).ravel()
    point_cols = ((table_cols + hashed(seed, table_rows, table_cols, 2)) * spacing).astype(np.float32).ravel()
    centre = (cell_row + margin) * table_rows.shape[1] + cell_col + margin
    for row_step in (-1, 0, 1):
        for col_step in (-1, 0, 1):
            candidate = centre + (row_step * table_rows.shape[1] + col_step)
            distance = (rows - point_rows[candidate]) ** 2 + (cols - point_cols[candidate]) ** 2
            closer = distance < nearest
            nearest[closer], number[closer] = distance[closer], candidate[closer]
    return number


def stamp(shape, points, radius):
    """Mask of discs around points (P, 2) of (row, column). radius: a number, or one per point."""
    mask = np.zeros(shape, bool)
    radius = np.broadcast_to(np.asarray(radius, np.float32), len(points))
    reach = int(np.ceil(radius.max()))
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T
    for offset in offsets[np.hypot(*offsets.T) <= radius.max()]:
        at = np.rint(points[np.hypot(*offset) <= radius] + offset).astype(int)
        at = at[((at >= 0) & (at < shape)).all(axis=1)]
        mask[at[:, 0], at[:, 1]] = True
    return mask


def meander(rng, shape, radius):
    """Centre line (P, 2) of a river of half width `radius` across the scene: a sine-generated curve.

    Source: Langbein and Leopold (1966); meanders about 11 widths long, Leopold and Wolman (1960).
    """
    high, wide = shape
    length = 3 * (high + wide)

    def wandering(scale):  # smooth noise along the river, variance 1
        noise = ndimage.gaussian_filter1d(rng.standard_normal(length), scale, mode="wrap")
        return noise / noise.std()

    wavelength = (22 * radius * rng.uniform(1, 1.6) + 30) * np.exp(0.3 * wandering(60))
    swing = np.clip(rng.uniform(0.4, 1.0) * (1 + 0.45 * wandering(80)), 0, 1.45)
    heading = rng.choice([0, np.pi / 2]) + rng.uniform(-0.5, 0.5) + 0.3 * wandering(250)
    heading = heading + swing * np.sin(np.cumsum(2 * np.pi / wavelength)) + 0.12 * wandering(8)
    line = np.stack([np.cumsum(np.sin(heading)), np.cumsum(np.cos(heading))], axis=1)
    crossing = line[np.argmin(np.hypot(*(line - line.mean(axis=0)).T))]
    return line - crossing + rng.uniform(0.25, 0.75, 2) * (high, wide)


def road(rng, start, end):
    """Points (P, 2) of a road from start to end, by midpoint displacement with straight segments."""
    line = np.stack([start, end]).astype(float)
    for _ in range(4):
        gap = np.diff(line, axis=0)
        middle = line[:-1] + gap / 2 + np.stack([-gap[:, 1], gap[:, 0]], axis=1) * rng.normal(0, 0.07, (len(gap), 1))
        line = np.insert(line, np.arange(1, len(line)), middle, axis=0)
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    at = np.arange(0, along[-1] + 1, 0.7)
    return np.stack([np.interp(at, along, line[:, 0]), np.interp(at, along, line[:, 1])], axis=1)


class Painter:
    """The state of a scene while it is painted. Each method adds a layer over the earlier ones."""

    def __init__(self, rng, shape, landscape):
        self.rng, self.shape, self.landscape = rng, shape, landscape
        self.seed = int(rng.integers(2**31))
        self.rows, self.cols = (axis.astype(np.float32) for axis in np.indices(shape, sparse=True))
        self.area = shape[0] * shape[1] / 1e6  # of 100 km²
        self.cover = np.empty(shape, np.uint8)
        self.height = fractal(rng, shape, largest=400, slope=4.2, step=2)  # relief of mean 0 and variance 1
        self.detail = fractal(rng, shape, largest=45, slope=2.6)  # makes the borders of all layers irregular
        self.paved, self.hedge = np.zeros(shape, bool), np.zeros(shape, bool)
        self.building = np.zeros(shape, np.float32)
        self.alignment = np.zeros(shape, np.float32)
        self.targets = []

    def share(self, limits):
        return self.rng.uniform(*limits)

    def fill(self, cover, mask):
        self.cover[mask] = cover

    def farmland(self):
        """Adds districts of one use each (about 1.3 km), divided into parcels with straight, parallel sides."""
        rng, classes = self.rng, list(self.landscape.districts)
        bend = 14 * fractal(rng, self.shape, largest=160, slope=3.5, step=4)
        rows, cols = self.rows + bend, self.cols - np.roll(bend, bend.shape[0] // 2, axis=0)
        district = voronoi(self.seed, rows, cols, spacing=rng.uniform(95, 150))
        count = int(district.max()) + 1
        weights = np.array(list(self.landscape.districts.values()), float)
        use = rng.choice(np.array(classes, np.uint8), size=count, p=weights / weights.sum())

        # Most districts have about the same direction; the others are rotated by 0.8 rad.
        angle = rng.uniform(0, np.pi) + rng.normal(0, 0.25, count) + rng.choice([0, 0.8], count, p=[0.7, 0.3])
        width = np.exp(rng.uniform(*np.log(self.landscape.parcel), count)) * np.where(use == C.COMPLEX, 0.55, 1.0)
        width = np.maximum(width, 4.5).astype(np.float32)
        length = (width * rng.uniform(1.2, 4.0, count)).astype(np.float32)
        cosine, sine = np.cos(angle).astype(np.float32)[district], np.sin(angle).astype(np.float32)[district]
        rows, cols = self.rows + 0.15 * bend, self.cols + 0.15 * bend
        across = rows * cosine - cols * sine
        strip = self._cut(across / width[district], district, 0)
        along = (rows * sine + cols * cosine) / length[district] + 7 * hashed(self.seed, district, strip, 3)
        field = self._cut(along, district, strip)
        self.parcel = (hashed(self.seed, district, strip, field) * 2**24).astype(np.uint32)
        self.across = across

        self.cover = use[district]
        lot = hashed(self.parcel, 11)
        other = np.isin(self.cover, (C.ARABLE, C.PASTURE))
        self.fill(C.PASTURE, other & (lot < 0.07))
        self.fill(C.ARABLE, other & (lot > 0.93))
        border = np.zeros(self.shape, bool)
        border[1:] |= self.parcel[1:] != self.parcel[:-1]
        border[:, 1:] |= self.parcel[:, 1:] != self.parcel[:, :-1]
        hedges = np.isin(use, (C.PASTURE, C.COMPLEX, C.AGRI_NATURAL)) * rng.uniform(0.1, 0.7, count) + 0.06
        self.hedge = border & (hashed(self.parcel, 12) < hedges.astype(np.float32)[district])

    def _cut(self, position, *keys):
        """Divides a line into irregular pieces: the number (int32) of the piece at each position, in mean pieces."""
        piece = np.floor(position).astype(np.int32)
        late = position - piece < 0.6 * hashed(self.seed, *keys, piece, 4)
        return piece - late

    def uplands_and_forests(self):
        """Adds grass and heath on high ground, forest massifs with clearings, woodlots, young growth at the edges."""
        rng, land = self.rng, self.landscape
        high = below(-self.height - 0.15 * self.detail, self.share(land.uplands))
        kind = fractal(rng, self.shape, largest=250, slope=3.2, step=4)
        self.fill(C.GRASSLAND, high & (kind < 0))
        self.fill(C.MOOR, high & (kind >= 0))

        wooded = fractal(rng, self.shape, largest=260, slope=3.0, step=2) - 0.3 * self.height + 0.12 * self.detail
        share = self.share(land.forest)
        species = fractal(rng, self.shape, largest=160, slope=3.4, step=2) + 0.08 * self.detail
        limits = np.quantile(species[::4, ::4], np.cumsum(land.forest_mix)[:2] / sum(land.forest_mix))
        forest = np.array(FORESTS, np.uint8)[np.digitize(species, limits)]
        massif = below(wooded, share)
        young = below(wooded, 1.12 * share) & ~massif & (kind > 0.2)
        clearing = hashed(self.parcel, 13) < 0.09
        woodlot = (hashed(self.parcel, 14) < 0.04) & np.isin(self.cover, PARCELLED)
        trees = massif | woodlot
        self.cover[trees] = forest[trees]
        self.fill(C.TRANSITIONAL, young | (massif & clearing))
        self.forest_type = forest

    def waters(self):
        """Adds wetlands on low ground, lakes on the lowest, rivers with wooded banks, then the sea with its shore."""
        rng, land = self.rng, self.landscape
        lakes, wet = self.share(land.lakes), self.share(land.wetlands)
        low = self.height + 0.10 * self.detail + 0.5 * fractal(rng, self.shape, largest=120, slope=3.0, step=2)
        self.fill(C.INLAND_WETLAND, below(low, min(lakes + wet, 0.9)))
        for _ in range(rng.poisson(land.rivers * max(self.area, 0.3))):
            radius = np.exp(rng.uniform(np.log(1.2), np.log(9)))
            line = meander(rng, self.shape, radius)
            at = np.clip(np.rint(line).astype(int), 0, np.array(self.shape) - 1)
            inside = (at == np.rint(line)).all(axis=1)
            joined = np.flatnonzero(inside & (self.cover[at[:, 0], at[:, 1]] == C.INLAND_WATER))
            line = line[: joined[0] + 1] if len(joined) else line  # a tributary ends at the river
            wander = 1 + 0.25 * np.sin(np.arange(len(line)) / rng.uniform(30, 90))
            radius = radius * wander
            banks = stamp(self.shape, line, radius + rng.uniform(1, 5)) & (self.detail > rng.uniform(-0.5, 1))
            self.cover[banks] = np.where(self.forest_type[banks] == C.CONIFEROUS, C.MIXED, C.BROADLEAVED)
            self.fill(C.INLAND_WATER, stamp(self.shape, line, radius))
        self.fill(C.INLAND_WATER, below(low, lakes))

        sea = self.share(land.sea)
        if sea > 0:
            self._coast(sea)
        self.water = np.isin(self.cover, WATER)

    def _coast(self, sea):
        rng = self.rng
        angle, span = rng.uniform(0, 2 * np.pi), max(self.shape)
        slope = rng.uniform(2.5, 7) * (self.rows * np.sin(angle) + self.cols * np.cos(angle)) / span
        level = slope + 0.4 * self.height + 0.06 * self.detail
        level += 0.2 * fractal(rng, self.shape, largest=130, slope=2.9, step=2)
        edge = np.quantile(level[::4, ::4], sea)
        gradient = np.float32(np.hypot(*np.gradient(ndimage.uniform_filter(level[::8, ::8], 5), 8)).mean())
        inland = (level - edge) / gradient  # approximate distance from the shore line
        kind = fractal(rng, self.shape, largest=300, slope=3.2, step=4)
        marsh = (inland < rng.uniform(15, 50) * np.clip(kind, 0, 2)) & (self.detail > -1.2)
        self.fill(C.COASTAL_WETLAND, marsh)
        self.fill(C.BEACH, inland < rng.uniform(3, 9) * np.clip(0.6 - kind, 0, 2))
        self.fill(C.SEA, inland < 0)
        creeks = marsh & (inland > 0) & (np.abs(fractal(rng, self.shape, largest=60, slope=3.0, step=2)) < 0.06)
        self.fill(C.SEA, creeks)

    def towns(self):
        """Adds cities, villages and industrial estates with their streets, and the roads between them."""
        rng, land = self.rng, self.landscape
        sites = []
        for expected, radii in ((land.cities, (45, 130)), (land.villages, (7, 24))):
            for _ in range(rng.poisson(expected * self.area)):
                row, col = (int(rng.integers(n)) for n in self.shape)
                if not self.water[row, col]:
                    sites.append((row, col, np.exp(rng.uniform(*np.log(radii)))))
        for i, (row, col, _) in enumerate(sites):
            others = sorted(sites[:i], key=lambda site: np.hypot(site[0] - row, site[1] - col))[:2]
            for other in others:
                wide = rng.choice([0.6, 1.1])
                self.paved |= stamp(self.shape, road(rng, (row, col), other[:2]), wide) & ~self.water
        sites.sort(key=lambda site: site[2])
        for site in sites:
            self._town(*site)

    def _town(self, row, col, radius):
        rng = self.rng
        reach = int(1.8 * radius) + 2
        box = tuple(slice(max(0, at - reach), at + reach + 1) for at in (row, col))
        north, east = self.rows[box[0]] - row, self.cols[:, box[1]] - col
        spread = np.hypot(north, east) / radius + 0.28 * self.detail[box] + 0.12 * self.height[box]
        dry = ~self.water[box]
        urban, ring = (spread < 1) & dry, (spread >= 0.9) & (spread < 1.25) & dry
        sector = voronoi(self.seed + row, north + reach, east + reach, spacing=55)
        angle = rng.uniform(0, np.pi) + rng.normal(0, 0.35, int(sector.max()) + 1).astype(np.float32)
        turn = angle[sector].astype(np.float32)
        u, v = north * np.cos(turn) - east * np.sin(turn), north * np.sin(turn) + east * np.cos(turn)
        block = rng.uniform(8, 15), rng.uniform(14, 30)
        street = ((u % block[0] < 1.3) | (v % block[1] < 1.5)) & (radius > 14)
        density = hashed(self.seed, sector, np.floor(u / block[0]), np.floor(v / block[1]), 24)
        parks = density < 0.1
        density = np.where(parks, 0.2, 0.55 + 0.45 * density) * np.clip(1.45 - 0.6 * spread, 0.6, 1)
        size = rng.uniform(2.0, 3.2)
        house = hashed(self.seed, np.floor(u / size), np.floor(v / size), 21)
        # Estates are whole sectors at the edge of larger towns, with large halls on wide paved yards.
        estate = ring & (radius > 30) & (hashed(self.seed, sector, 22) < 0.5)
        hall = hashed(self.seed, np.floor(u / 6), np.floor(v / 9), 23)
        self.cover[box][urban], self.cover[box][estate] = C.URBAN, C.INDUSTRY
        built = urban | estate
        self.building[box][built] = np.where(estate, hall, house * density)[built]
        self.alignment[box][built] = np.abs(np.cos(2 * turn))[built] ** 8
        self.hedge[box] &= ~built
        self.paved[box] = np.where(built, (street & ~estate) | (estate & (hall < 0.35)), self.paved[box])
        chance = np.where(estate, 0.025, 0.02 * density**2)
        hit = built & (rng.random(built.shape, dtype=np.float32) < chance)
        self.targets.append(np.argwhere(hit) + (box[0].start, box[1].start))

    def single_targets(self):
        """Adds small groups of strong reflectors: farms, masts and pylons on land, a few ships at sea."""
        rng = self.rng
        centres = rng.uniform(0, self.shape, (rng.poisson(120 * self.area), 2))
        at = np.repeat(centres, rng.integers(1, 5, len(centres)), axis=0)
        at = np.floor(at + rng.normal(0, 1.2, at.shape)).astype(int)
        at = at[((at >= 0) & (at < self.shape)).all(axis=1)]
        cover = self.cover[at[:, 0], at[:, 1]]
        rarely = np.isin(cover, (*WATER, *FORESTS, C.INLAND_WETLAND)) & (rng.random(len(at)) > 0.05)
        self.targets.append(at[~rarely])


def draw_geography(rng, shape, landscape=None):
    """Draws the Geography of a scene of shape (H, W) from rng, a NumPy Generator.

    landscape: a key of LANDSCAPES; drawn by frequency if None. Raises KeyError for an unknown landscape.
    """
    if landscape is None:
        frequency = np.array([weight for weight, _ in LANDSCAPES.values()])
        landscape = rng.choice(list(LANDSCAPES), p=frequency / frequency.sum())
    land = LANDSCAPES[landscape][1]
    painter = Painter(rng, shape, land)
    painter.farmland()
    painter.uplands_and_forests()
    painter.waters()
    painter.towns()
    painter.single_targets()
    targets = np.concatenate(painter.targets)
    return Geography(
        painter.cover,
        painter.height * np.float32(painter.share(land.relief)),
        painter.parcel,
        painter.across,
        painter.hedge & ~painter.water,
        painter.paved,
        painter.building,
        painter.alignment,
        targets[:, 0],
        targets[:, 1],
    )
