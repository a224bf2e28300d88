# SPDX-License-Identifier: MIT
"""Checks whether values can be Sentinel-1 backscatter, with all limits and their sources.

Limits of pixels apply to every image that is read (`check_decibels`, `check_linear`). Limits of statistics apply to
whole images (`judge`): samples of a dataset before training, a part of a packed store, a split. Values that Sentinel-1
cannot measure are an error; values that it hardly ever measures are a warning.

Measured on real images in dB (BigEarthNet v1 and v2, 7 patches; Sen1Floods11, 12 chips; SEN12MS-CR, 2; TerraMind, 5;
others, 3), on real linear images (OPERA RTC-S1, 315 pairs of 100x100 pixels from 15 places on the coast of California,
8 of them sea; others, 5), and on simulated scenes and floods, which lie within these ranges:
    mean of an image    VH -31.7 (calm sea) … -14.1 (forest), VV -31.0 (calm sea) … -7.9 (town)
    VV above VH         4.8 … 10.6 dB over land, 0.1 (calm sea, where both are noise) … 15.2 of any image
    standard deviation  1.9 … 7.5 dB of an image
    darkest pixel       -57.3 dB in products in dB. OPERA subtracts noise without a floor, so that the backscatter of
                        sea is near 0: 3e-5 of all its VH pixels are below -60 dB, one of 3.1 million is at -103.5
    brightest pixel     25.6 dB
    commonest value     0.02 % of the pixels of an image; up to 0.34 % if values are clipped at 0 dB or rounded to
                        1/8 dB
"""

import logging

import numpy as np

from common.errors import DataError
from sarwmix.listing import CHANNELS

FIRST_LOOK = ("mean", "std", "min", "max")  # the statistics that a run records

# Limits of pixels
DARK_DB, MOST_DARK = -100.0, 1e-3  # level, and largest share of pixels below it; of noise, 3e-9 are below -100 dB
DARKEST_DB = -150.0  # linear values are evenly distributed near 0: 3e-14 of the pixels of noise are so low
BRIGHTEST_DB = 60.0  # the largest digital number, 65535, is 47 dB at a calibration constant of 300
LEAST_LINEAR = -1.0  # subtracted noise is at most -22 dB, or 0.006 (ESA, Sentinel-1 User Handbook)
FLOOR_DB = -60.0  # our choice: the value of pixels without backscatter or data in datasets of linear values

# Limits of the statistics of whole images
BRIGHTEST_MEAN = (-5.0, 0.0)  # VH, VV: 9 and 8 dB above the brightest measured images
DARKEST_MEAN = -45.0  # 13 dB below calm sea, where both channels are noise
SWAPPED_DB = 2.0  # of VH above VV; VV is stronger on every natural surface, and noise is about equal in both
FAR_DB = 5.0  # from the expected mean: one standard deviation of all pixels
STD_RATIO = 3.0  # largest ratio to the expected std, or its inverse; the published std of benv1 is 1.7 times too small
COMMON, AROUND = 0.01, 10  # share of the pixels in one bin of a histogram above any of the AROUND bins on each side

USUAL = (-19.2, -12.5), (5.5, 5.0)  # mean and std of BigEarthNet v2, the default of `expected` below

# (what the values may be instead of dB, with the remedy; function that returns the mean and std (2,) after the remedy).
# m, s: their mean and std; M, S: the expected mean and std.
READINGS = (
    ("dB times 10; divide them by 10", lambda m, s, M, S: (m / 10, s / 10)),
    ("dB times 100; divide them by 100", lambda m, s, M, S: (m / 100, s / 100)),
    ("dB divided by 10; multiply them by 10", lambda m, s, M, S: (m * 10, s * 10)),
    ("dB divided by 100; multiply them by 100", lambda m, s, M, S: (m * 100, s * 100)),
    (
        "standardised already; store dB, which are value * std + mean",
        lambda m, s, M, S: (np.where(np.abs(m) < 2, M, np.inf), s * S),
    ),
    ("amplitude taken for power; square the amplitude", lambda m, s, M, S: (m * 2, s * 2)),
    ("linear values times 10,000; divide these by 10,000", lambda m, s, M, S: (m - 40, s)),
)

log = logging.getLogger(__name__)


# ---- Pixels --------------------------------------------------------------------------------------


def check_decibels(
    image, name, remedy="store 10*log10(value), as the dataset's authors do, or check --dataset and --data_path"
):
    """Raises DataError if an image (2, …), a NumPy array in dB, has values that no pixel can have.

    NaN and infinite values are ignored. name: function from a channel to its name in messages. remedy: against linear
    values, for the message.
    """
    pixels = tuple(range(1, image.ndim))
    for channel, values, lowest, highest in zip(CHANNELS, image, image.min(pixels), image.max(pixels)):
        if not (DARK_DB <= lowest < 0 and highest <= BRIGHTEST_DB):  # rare; true if there is a NaN
            _check_channel(values[np.isfinite(values)], values.size, name(channel), channel, remedy)


def _check_channel(values, size, name, channel, remedy):
    if values.size > size / 2 and values.min() >= 0 and values.any():  # 0 everywhere means no data, not linear values
        raise DataError(f"{name}: {channel} is never negative, so it looks linear, but is read as dB; {remedy}")
    dark, bright = values < DARK_DB, values > BRIGHTEST_DB
    if np.count_nonzero(dark) > MOST_DARK * values.size or (values < DARKEST_DB).any():
        raise _beyond(name, channel, dark, f"below {DARK_DB:g} dB", values.min(), "dB times 10 or 100: divide them")
    if bright.any():
        unit = "no dB: store 10*log10 of calibrated backscatter"
        raise _beyond(name, channel, bright, f"above {BRIGHTEST_DB:g} dB", values.max(), unit)


def check_linear(image, name):
    """Raises DataError if an image (2, …) of linear backscatter has values that no pixel can have.

    NaN and infinite values are ignored. Values of noise and missing data are 0 or slightly negative. name: as in
    `check_decibels`.
    """
    most = 10 ** (BRIGHTEST_DB / 10)
    for channel, values in zip(CHANNELS, image):
        if values.min() >= 0 and values.max() <= most:
            continue
        values = values[np.isfinite(values)]
        if np.count_nonzero(values < 0) > values.size / 2:
            raise DataError(
                f"{name(channel)}: {channel} is mostly negative, so it looks like dB, but pairs are stored linear; "
                "store 10**(dB/10)"
            )
        low, high = values < LEAST_LINEAR, values > most
        if low.any():
            raise _beyond(name(channel), channel, low, f"below {LEAST_LINEAR:g}", values.min(), "dB: store 10**(dB/10)")
        if high.any():
            unit = "digital numbers: calibrate them"
            raise _beyond(name(channel), channel, high, f"above {most:,.0f}", values.max(), unit)


def _beyond(name, channel, which, limit, value, unit):
    """The DataError about the pixels `which` of a channel. unit: what the values may be if most pixels are affected."""
    value = f"{value:g}" if abs(value) < 1e6 else str(value)  # all digits, because a no-data tag needs the exact value
    cause = (
        f"they look like {unit}"
        if which.mean() > 0.5
        else f"if it is a no-data value that lost its tag, restore it (gdal_edit.py -a_nodata {value} FILE) or store "
        "NaN in its place"
    )
    return DataError(
        f"{name}: {which.mean():.2%} of the {channel} pixels are {limit} (as far as {value}), which is impossible "
        f"for backscatter; {cause}"
    )


# ---- Samples -------------------------------------------------------------------------------------


def judge(source, figures, expected=None, histogram=None):
    """Checks whether statistics of whole images can be those of Sentinel-1. Raises DataError; logs warnings.

    source: name of the images in messages. figures: `Moments.summary`. histogram: `Moments.histogram_dict`.
    expected: (mean, std), (2,) each, with which the images will be standardised.
    """
    fault = find_fault(figures, expected)
    if fault:
        raise DataError(f"{source}: {fault}")
    for doubt in find_doubts(figures, expected, histogram):
        log.warning("%s: %s", source, doubt)


def check_batch(batch, expected):
    """Raises DataError if a batch (2, B, H, W), a NumPy array in dB without NaN, cannot be Sentinel-1 data.

    Only pixels above FLOOR_DB count, because images of floods have large areas without data. expected: as in `judge`.
    """
    check_decibels(batch, "batch, {}".format, "give 10*log10(value)")
    seen = [values[values > FLOOR_DB] for values in batch]
    figures = {
        name: [float(getattr(values, name)()) if values.size else None for values in seen] for name in FIRST_LOOK
    }
    fault = find_fault(figures | {"pixels": [values.size for values in seen], "nodata": [0] * len(seen)}, expected)
    if fault:
        raise DataError(f"batch: {fault}")


def find_fault(figures, expected=None):
    """The first impossible statistic, with the remedy, for an error message; or None. Arguments: as in `judge`."""
    mean = figures["mean"]
    for k, (channel, brightest) in enumerate(zip(CHANNELS, BRIGHTEST_MEAN)):
        extremes = [value for value in (figures["min"][k], figures["max"][k]) if value is not None]
        extreme = [value for value in extremes if not DARKEST_DB <= value <= BRIGHTEST_DB]
        if extreme:
            return (
                f"{channel} has a value of {extreme[0]:g} dB, which is impossible for backscatter; "
                f"{_reading(figures, expected) or 'if it is a no-data value that lost its tag, store NaN in its place'}"
            )
        if mean[k] is not None and not DARKEST_MEAN <= mean[k] <= brightest:
            return (
                f"{channel} is {_shown(mean[k])} dB on average, but images are between {DARKEST_MEAN:g} and "
                f"{brightest:g} dB; {_reading(figures, expected) or 'check the units of the files'}"
            )
        if figures["nodata"][k] > figures["pixels"][k]:
            return f"{channel} has no data, or nothing above 0, in most pixels; restore the images"
    if None not in mean and mean[0] > mean[1] + SWAPPED_DB:
        return f"VH is brighter than VV ({_pair(mean)} dB on average), so they are swapped; check which file is which"
    return None


def find_doubts(figures, expected=None, histogram=None):
    """Yields unusual statistics, each with the remedy, for warnings. Arguments: as in `judge`."""
    mean, std = figures["mean"], figures["std"]
    if None in mean:
        return
    if mean[0] > mean[1]:
        yield f"VH is brighter than VV ({_pair(mean)} dB on average), as in noise; check which file is which"
    elif expected is not None and not _is_near(mean, std, *expected):
        remedy = _reading(figures, expected) or (
            "check the units. With a pretrained encoder, images of other places may differ so much; otherwise measure "
            "mean and std with python -m sarwmix.prepare.statistics and give them with --statistics FILE"
        )
        yield (
            f"mean {_pair(mean)}, std {_pair(std)} dB is far from the mean {_pair(expected[0])}, std "
            f"{_pair(expected[1])} that the input is standardised with; {remedy}"
        )
    if max(map(abs, figures["max"])) < 1e-6:
        yield (
            "the greatest value of VH and of VV is exactly 0 dB, or 1, as if scaled or clipped to [0, 1]; store "
            "calibrated backscatter"
        )
    common = [_common_value(k, figures, histogram) for k in range(len(CHANNELS))] if histogram else []
    if any(common):
        yield (
            f"{' and '.join(filter(None, common))}; if it is a no-data value, tag it (gdal_edit.py -a_nodata VALUE "
            "FILE) or store NaN in its place"
        )


def _is_near(mean, std, expected_mean, expected_std):
    apart, ratio = np.abs(np.array(mean) - expected_mean), np.array(std) / np.array(expected_std)
    return bool(np.all((apart <= FAR_DB) & (ratio <= STD_RATIO) & (ratio >= 1 / STD_RATIO)))


def _reading(figures, expected):
    """The first of READINGS that is near the expected statistics, for a message; or None."""
    if None in figures["mean"]:
        return None
    known = [np.array(values, np.float64) for values in (figures["mean"], figures["std"], *(expected or USUAL))]
    return next((f"they look like {words}" for words, as_db in READINGS if _is_near(*as_db(*known), *known[2:])), None)


def _common_value(k, figures, histogram):
    """For a message: a value that is far more common in channel k than its neighbours, and its share; or None."""
    counts = np.array([histogram["below"][k], *histogram["counts"][k], histogram["above"][k]])
    padded = np.pad(counts, AROUND)
    around = np.max([padded[b : b + len(counts)] for b in range(2 * AROUND + 1) if b != AROUND], axis=0)
    share = (counts - around) / max(counts.sum(), 1)
    b = share.argmax()
    if share[b] <= COMMON:
        return None
    low, high = (histogram["lowest"] + (b - side) * histogram["width"] for side in (1, 0))
    where = (
        f"below {high:.0f} dB, down to {figures['min'][k]:g}"
        if b == 0
        else f"above {low:.0f} dB, up to {figures['max'][k]:g}"
        if b == len(counts) - 1
        else f"at one value from {low:.1f} to {high:.1f} dB"
    )
    return f"{share[b]:.1%} of the {CHANNELS[k]} pixels are {where}"


def _shown(value):
    return f"{value:.1f}" if 1 <= abs(value) < 1e6 else f"{value:.2g}"


def _pair(values):
    return "VH {}, VV {}".format(*map(_shown, values))
