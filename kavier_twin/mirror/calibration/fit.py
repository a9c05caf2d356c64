"""Coefficients from observed durations: bounded, robust, with a prior and with the uncertainty of each.

A duration is modelled as work times coefficients. Its variance grows with its mean (quasi-likelihood, Wedderburn 1974):
each row is weighted by 1 / (dispersion x expected duration), re-weighted a few times, under which predicted and
observed means agree (an L1 or relative-error fit would follow the median and be biased low, since stalls make the
noise lopsided). Rows far outside the noise lose weight (Huber 1964), and in the end all coefficients are scaled so
that the means agree again. A prior adds one Gaussian row a coefficient, so
that what the data cannot tell stays at the prior (ridge regression, maximum a posteriori).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# How far a prior may be off, one standard deviation: this share of its value, or, for one that is zero, the
# coefficient that alone would explain this share of all the time.
PRIOR_SHARE = 0.5
PRIOR_SHARE_OF_ZERO = 0.05
_OUTLIER_SIGMAS = 6.0
_LONGEST_STALL = 20.0  # times the expected duration
_REWEIGHTINGS = 8
_SMALLEST_SECONDS = 1e-6
_SMALLEST_DISPERSION = 1e-9


class Fit(NamedTuple):
    """What was found, one entry a coefficient."""

    values: Floats
    deviations: Floats  # standard deviation; infinite where neither data nor prior says anything
    determined: Bools  # the data says more than the prior did, and that the coefficient is not zero


def fit(
    rows: Floats,
    seconds: Floats,
    *,
    prior: Floats | None = None,
    floor: Floats | None = None,
    weights: Floats | None = None,
) -> Fit:
    """Coefficients for which rows [n, k] (work) times coefficients [k] are the durations seconds [n].

    `weights` [n], at most 1, say how much a row still counts (1 without them). `prior` (NaN: none for that coefficient)
    is where a coefficient stays unless the data moves it; `floor` is what it cannot be below (default 0). Deviations
    take the rows as independent: requests in the same batches are not, so they are lower bounds.
    """
    scale = np.maximum(rows.max(axis=0, initial=0.0), 1e-30)
    scaled = rows / scale
    known = np.zeros(scale.size, np.bool_) if prior is None else np.isfinite(prior)
    centre = np.where(known, 0.0 if prior is None else prior, 0.0) * scale
    lower = (np.zeros(scale.size) if floor is None else floor) * scale
    alone = seconds.sum() / np.maximum(scaled.sum(axis=0), 1e-30)
    spread = np.where(centre > 0.0, PRIOR_SHARE * centre, PRIOR_SHARE_OF_ZERO * alone)
    # A coefficient without work in the data and without a prior has nothing to hold it: zero.
    absent = rows.max(axis=0, initial=0.0) <= 0.0
    pulled = known | absent
    strength = np.where(pulled, 1.0 / np.maximum(spread, 1e-30), 0.0)
    counts = np.ones(seconds.size) if weights is None else weights
    expected = np.maximum(seconds, _SMALLEST_SECONDS)
    values, dispersion, trust = centre.copy(), 1.0, np.ones(seconds.size)
    for _ in range(_REWEIGHTINGS):
        weight = np.sqrt(counts * trust / (dispersion * expected))
        matrix = np.vstack([scaled * weight[:, None], np.diag(strength)])
        target = np.concatenate([seconds * weight, centre * strength])
        values = lower + nnls(matrix, target - matrix @ lower)[0]
        expected = np.maximum(scaled @ values, _SMALLEST_SECONDS)
        residual = (seconds - expected) / np.sqrt(expected)
        # Robust noise level: the median of |residual| is 0.6745 standard deviations of a Gaussian.
        sigma = max(float(np.median(np.abs(residual))) / 0.6745, 1e-12)
        trust = np.minimum(1.0, _OUTLIER_SIGMAS * sigma / np.maximum(np.abs(residual), 1e-30))
        freedom = max(1.0, float(counts.sum()) - int((values > lower).sum()))
        dispersion = max(float((counts * trust * residual**2).sum()) / freedom, _SMALLEST_DISPERSION)
    # Stalls are part of what requests live through: the mean counts them, each up to a limit.
    total = float((counts * np.minimum(seconds, _LONGEST_STALL * expected)).sum())
    values = np.maximum(lower, values * total / float((counts * expected).sum()))
    weight = np.sqrt(counts * trust / (dispersion * expected))
    information = (scaled * weight[:, None]).T @ (scaled * weight[:, None])
    deviations = _deviations(information + np.diag(strength**2))
    before = np.where(pulled, spread, np.inf)
    determined = ~absent & (deviations < 0.7 * before) & (deviations < 0.5 * np.abs(values))
    return Fit(values / scale, deviations / scale, determined)


def _deviations(information: Floats) -> Floats:
    """Standard deviations from an information matrix; infinite along what it knows nothing of."""
    eigenvalues, vectors = np.linalg.eigh(information)
    smallest = 1e-12 * max(float(eigenvalues.max()), 1e-300)
    inverse = np.where(eigenvalues > smallest, 1.0 / np.maximum(eigenvalues, smallest), np.inf)
    with np.errstate(invalid="ignore"):
        variance = np.where(vectors**2 > 1e-12, vectors**2 * inverse, 0.0).sum(axis=1)
    return np.asarray(np.sqrt(variance), dtype=np.float64)
