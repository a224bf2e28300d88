# SPDX-License-Identifier: MIT
"""Simulates a Sentinel-1 IW GRD image of a land cover map: mean backscatter, then detection with speckle and noise.

The order of channels is VH, VV; σ⁰ is linear unless a name ends in `_db`.
"""

import numpy as np
from scipy import ndimage

from sarwmix.simulate.landcover import FORESTS, PARCELLED, WATER, LandCover, fractal, hashed

C = LandCover
BANDS = ("VH", "VV")

# Mean σ⁰ in dB, and its standard deviations in dB: between scenes (season, angle, wind), between parcels, and within a
# place (moisture, biomass). Typical values of C band at 30° to 45° incidence (Ulaby and Long, "Microwave Radar and
# Radiometric Remote Sensing", 2014), adjusted so that a large set has about the mean and standard deviation of
# BigEarthNet. They are not measurements. Values of water are without noise.
#                      VH     VV   scene parcel texture
BACKSCATTER = {
    C.URBAN: (-13.5, -6.8, 0.8, 0.0, 0.8),
    C.INDUSTRY: (-14.0, -6.5, 0.8, 0.0, 0.6),
    C.ARABLE: (-19.5, -11.6, 1.0, 1.2, 0.6),
    C.PERMANENT: (-17.8, -11.0, 0.8, 1.0, 0.7),
    C.PASTURE: (-19.7, -12.0, 0.8, 0.9, 0.6),
    C.COMPLEX: (-18.1, -11.0, 0.8, 1.7, 0.6),
    C.AGRI_NATURAL: (-17.2, -10.6, 0.8, 1.1, 1.2),
    C.AGROFOREST: (-18.0, -11.4, 0.8, 0.8, 1.0),
    C.BROADLEAVED: (-14.6, -9.2, 0.6, 0.0, 0.5),
    C.CONIFEROUS: (-15.4, -9.6, 0.6, 0.0, 0.6),
    C.MIXED: (-14.9, -9.3, 0.6, 0.0, 0.6),
    C.GRASSLAND: (-20.8, -12.8, 1.0, 0.0, 1.2),
    C.MOOR: (-19.0, -12.0, 0.8, 0.0, 1.2),
    C.TRANSITIONAL: (-17.3, -10.8, 0.7, 0.6, 0.9),
    C.BEACH: (-24.0, -16.5, 1.0, 0.0, 0.8),
    C.INLAND_WETLAND: (-19.3, -11.8, 1.2, 0.0, 1.3),
    C.COASTAL_WETLAND: (-20.5, -13.0, 1.2, 0.0, 1.3),
    C.INLAND_WATER: (-31.0, -20.5, 1.8, 0.0, 0.7),
    C.SEA: (-31.0, -18.8, 2.2, 0.0, 0.9),
}

# Crops of arable parcels: frequency, and offset of VH and of VV in dB from the class mean. Bare soil, winter cereals,
# maize, rape, root crops.
CROPS = ((0.30, -2.2, -1.4), (0.30, -0.6, -1.8), (0.15, 2.0, 1.2), (0.12, 3.2, 1.4), (0.13, 2.6, 2.2))

# Sentinel-1 IW GRDH averages five overlapping looks, which its product specification equates to 4.4 independent ones. A
# look is the sum of two squared real Gaussian fields; nine such fields give a gamma distribution of 4.5 looks.
FIELDS = 9

# Width of the Gaussian point-spread function of the field, pixels. The intensity of the speckle has the correlation
# exp(−d²/2s²): 0.71, 0.26, 0.05 at 1, 2, 3 pixels, as measured on terrain-corrected patches (−3 dB: 20 m).
PSF_SIGMA, PSF_REACH = 1.22, 4


def _psf():
    x = np.arange(-PSF_REACH, PSF_REACH + 1)
    profile = np.exp(-(x**2) / (2 * PSF_SIGMA**2))
    return (profile / np.sqrt((profile**2).sum())).astype(np.float32)


def detect(rng, sigma0, targets=None):
    """The multilooked intensity of a scene, with speckle of the statistics and correlation of a GRD image.

        I = 1/K · Σ_k (h ∗ (√σ⁰·n_k + a))²,   n_k real Gaussian of unit variance, k = 1 … K = FIELDS, Σ h² = 1

    so that E[I] = h² ∗ σ⁰, and over uniform ground I is gamma distributed with K/2 equivalent looks.
    sigma0: (H, W), linear. targets: (H, W), signed amplitudes a of coherent reflectors, equal in all fields, or None.
    Returns (H − 2·PSF_REACH, W − 2·PSF_REACH) float32, without the border that the convolution would distort.
    Source: Goodman, "Statistical properties of laser speckle patterns" (1975); Oliver and Quegan, "Understanding SAR
    Images" (2004), chapter 4.
    """
    amplitude = np.sqrt(np.asarray(sigma0, np.float32))
    psf, inner = _psf(), slice(PSF_REACH, -PSF_REACH)
    intensity = 0
    for _ in range(FIELDS):
        field = rng.standard_normal(amplitude.shape, dtype=np.float32)
        field *= amplitude
        if targets is not None:
            field += targets
        field = ndimage.convolve1d(field, psf, axis=0)[inner]
        field = ndimage.convolve1d(field, psf, axis=1)[:, inner]
        intensity += field**2
    return intensity / FIELDS


def _normal(*keys):
    """Approximately normal numbers of variance 1 for keys, each the sum of three `hashed` uniform numbers."""
    return 2 * (hashed(*keys, 1) + hashed(*keys, 2) + hashed(*keys, 3)) - 3


def _parcel_offsets(seed, scene, parcelled):
    """Offset in dB of each parcel from the class mean, (2, H, W): crop, state of the field, rows of trees."""
    offsets = np.zeros((2, *scene.land_cover.shape), np.float32)
    parcel, cover = scene.parcel[parcelled], scene.land_cover[parcelled]
    spread = np.array([row[3] for row in BACKSCATTER.values()], np.float32)[cover]
    common = _normal(seed, parcel, 31)
    vh, vv = (spread * (0.75 * common + 0.66 * _normal(seed, parcel, key)) for key in (32, 33))

    arable = cover == C.ARABLE
    shares, crop_vh, crop_vv = np.array(CROPS, np.float32).T
    crop = np.minimum(np.searchsorted(np.cumsum(shares), hashed(seed, parcel[arable], 34)), len(CROPS) - 1)
    season = _normal(seed, np.arange(len(CROPS)), 35)  # a crop differs between dates
    vh[arable] += (crop_vh + 0.8 * season)[crop]
    vv[arable] += (crop_vv + 0.6 * season)[crop]

    rows = (cover == C.PERMANENT) & (hashed(parcel, 36) < 0.6)
    period = 3.2 + 3 * hashed(parcel[rows], 37)
    stripes = np.sin(2 * np.pi * scene.parcel_across[parcelled][rows] / period)
    vh[rows] += 1.8 * stripes
    vv[rows] += 1.4 * stripes
    offsets[:, parcelled] = vh, vv
    return offsets


def _natural_offsets(rng, seed, scene):
    """Offset in dB within parcels and classes, (2, H, W): moisture and biomass, trees, sea state."""
    cover, shape = scene.land_cover, scene.land_cover.shape
    texture = np.array([row[4] for row in BACKSCATTER.values()], np.float32)[cover]
    moisture = fractal(rng, shape, largest=90, slope=2.4, step=2)
    biomass = fractal(rng, shape, largest=25, slope=2.0, step=2)
    vh, vv = texture * (0.6 * moisture + 0.8 * biomass), texture * (0.9 * moisture + 0.44 * biomass)

    scrub = (cover == C.AGRI_NATURAL) & (biomass > 0.5)
    vh[scrub] += 2.0
    vv[scrub] += 1.2
    rows, cols = np.nonzero(cover == C.AGROFOREST)
    tree = hashed(seed, rows // 2, cols // 2, 41) > 0.86
    vh[rows[tree], cols[tree]] += 4.0
    vv[rows[tree], cols[tree]] += 2.5
    vh[scene.hedge] += 3.0
    vv[scene.hedge] += 2.2

    sea = cover == C.SEA
    wind = fractal(rng, shape, largest=500, slope=3.0, step=4)
    vv[sea] += rng.uniform(0.4, 1.6) * wind[sea]
    vh[sea] += 0.4 * wind[sea]
    return np.stack([vh, vv])


def _built_offsets(scene):
    """Offset in dB of streets, yards and buildings, (2, H, W). Few buildings are very bright."""
    cover = scene.land_cover
    offsets = np.zeros((2, *cover.shape), np.float32)
    built = (cover == C.URBAN) | (cover == C.INDUSTRY)
    size = -np.log1p(-scene.building[built])  # exponential: a heavy tail in linear units
    facing = scene.alignment[built]  # walls along the track return the double bounce
    offsets[1, built] = np.minimum(4.2 * size, 14) - 2.6 + 3.5 * facing
    offsets[0, built] = np.minimum(3.6 * size, 12) - 2.2 + 1.0 * facing
    street = built & scene.paved
    offsets[:, street] -= np.array([[5.0], [4.0]], np.float32)
    return offsets


def _relief_offset(scene, incidence, looks_east):
    """Offset in dB of the slope α of land towards the sensor, (H, W): illuminated area, 10·log10(sin θ/sin(θ − α))."""
    slope = np.gradient(scene.elevation, 10.0, axis=1)
    local = np.clip(incidence - np.arctan(slope if looks_east else -slope), 0.2, 1.2)
    offset = 10 * np.log10(np.sin(incidence) / np.sin(local))
    return np.where(np.isin(scene.land_cover, WATER), 0, np.clip(offset, -4, 5)).astype(np.float32)


def backscatter(rng, scene):
    """Mean σ⁰ in dB of a Geography, (2, H, W) float32, VH, VV, without speckle, noise and single reflectors."""
    seed = int(rng.integers(2**31))
    table = np.array([BACKSCATTER[cover] for cover in LandCover], np.float32)
    common, own = rng.standard_normal(len(table)), rng.standard_normal((2, len(table)))
    level = table[:, :2].T + table[:, 2] * (0.85 * common + 0.5 * own) + rng.normal(0, 0.8)
    sigma0_db = level.astype(np.float32)[:, scene.land_cover]
    sigma0_db += _parcel_offsets(seed, scene, np.isin(scene.land_cover, (*PARCELLED, C.TRANSITIONAL)))
    sigma0_db += _natural_offsets(rng, seed, scene)
    sigma0_db += _built_offsets(scene)
    sigma0_db += _relief_offset(scene, incidence=np.deg2rad(rng.uniform(31, 44)), looks_east=rng.random() < 0.5)
    road = scene.paved & ~np.isin(scene.land_cover, (C.URBAN, C.INDUSTRY, *FORESTS))
    for band, level_db in zip(sigma0_db, (-23.0, -15.5)):
        band[road] = np.minimum(band[road], level_db)
    return sigma0_db


def reflectors(rng, scene):
    """Signed amplitudes of the single reflectors for `detect`, (2, H, W), with peaks of −3 … +22 dB in VV."""
    shape, count = scene.land_cover.shape, len(scene.target_rows)
    peak_vv = np.minimum(-3 + 4.0 * rng.exponential(size=count), 22)
    peak_vh = peak_vv - 5 - 3 * rng.exponential(size=count)
    sign = rng.choice([-1, 1], count)  # neighbours add up or cancel
    amplitudes = np.zeros((2, *shape), np.float32)
    for band, peak in zip(amplitudes, (peak_vh, peak_vv)):
        amplitude = 10 ** (peak / 20) / _psf().max() ** 2
        np.add.at(band, (scene.target_rows, scene.target_cols), sign * amplitude)
    return amplitudes


def noise_floor(rng, shape):
    """Noise-equivalent σ⁰ (H, W), linear: −25 … −30 dB, increasing with the distance from the middle of the beam.

    Lower than the −22 dB that the instrument guarantees; chosen so that the standard deviation of VH over many patches,
    including water, is close to BigEarthNet's.
    """
    middle, height = rng.uniform(-0.5, 1.5), rng.uniform(-30, -27)
    across = np.linspace(0, 1, shape[1]) - middle
    return np.broadcast_to(10 ** ((height + across**2) / 10), shape).astype(np.float32)


def observe(rng, scene):
    """Images a Geography of H × W: (2, H − 2·PSF_REACH, W − 2·PSF_REACH) float32, σ⁰ in dB, order VH, VV.

    The speckle of VH and VV is independent. Noise is added to σ⁰ before detection, as in a receiver.
    """
    sigma0 = 10 ** (backscatter(rng, scene) / 10) + noise_floor(rng, scene.land_cover.shape)
    images = [detect(rng, band, targets) for band, targets in zip(sigma0, reflectors(rng, scene))]
    return 10 * np.log10(np.stack(images))
