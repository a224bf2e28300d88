# SPDX-License-Identifier: MIT
"""Means over seeds, and differences seed by seed, as numbers and as text."""

import numpy as np
from scipy import stats


def half_width(values):
    """The half-width of the 95 % interval of the mean of values (a Series), by Student's t; NaN of one value."""
    if len(values) < 2:
        return np.nan
    return stats.t.ppf(0.975, len(values) - 1) * values.std() / np.sqrt(len(values))


def spread(values):
    """Mean and standard deviation over seeds, as text; "–" without values."""
    values = values.dropna()
    return "–" if not len(values) else f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def paired(rows, plain, metric):
    """(mean difference over common seeds, half-width of its 95 % interval by Student's t); NaN where undefined."""
    pairs = rows.set_index("seed")[metric].sub(plain.set_index("seed")[metric]).dropna()
    return pairs.mean(), half_width(pairs)


def difference(rows, plain, metric):
    """`paired` as text; "–" without a common seed."""
    mean, half = paired(rows, plain, metric)
    return "–" if np.isnan(mean) else f"{mean:+.3f}" + ("" if np.isnan(half) else f" ± {half:.3f}")
