"""What a handful of scenarios tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]


def quantiles(values: Floats, at: Sequence[float]) -> dict[float, float]:
    """Predictive quantiles of exchangeable values, those that are NaN left out; NaN without any.

    The k-th smallest of n is the quantile k / (n + 1): a further value falls below it with just that probability
    (Hyndman and Fan 1996, type 6). Quantiles beyond those are the extremes: n values tell none beyond 1 / (n + 1).
    """
    seen = values[~np.isnan(values)]
    if not seen.size:
        return dict.fromkeys(at, np.nan)
    return dict(zip(at, map(float, np.quantile(seen, at, method="weibull")), strict=True))


def share_interval(successes: float, of: int, credibility: float = 0.9) -> tuple[float, float]:
    """Jeffreys' interval of a probability (Brown, Cai and DasGupta, "Interval estimation for a binomial proportion",
    2001): equal tails of Beta(k + 1/2, n - k + 1/2), reaching 0 where nothing and 1 where everything succeeded."""
    tail, a, b = (1.0 - credibility) / 2.0, successes + 0.5, of - successes + 0.5
    low = 0.0 if successes == 0 else float(special.betaincinv(a, b, tail))
    high = 1.0 if successes == of else float(special.betaincinv(a, b, 1.0 - tail))
    return low, high


def mean_is_above(differences: Floats, bound: float = 0.0) -> float:
    """The probability that paired differences have a mean above `bound`, with nothing assumed before.

    Student's t for the mean. Where all are equal the spread is not known: then the probability that more than half of
    all differences lie on that side (Jeffreys' prior), which n equal ones make likely but not certain.
    """
    above = differences - bound
    n, spread = above.size, float(above.std(ddof=1)) if above.size > 1 else 0.0
    if spread > 1e-12 * float(np.abs(above).max()):
        return float(special.stdtr(n - 1, above.mean() / (spread / np.sqrt(n))))
    successes = float((above > 0).sum() + 0.5 * (above == 0).sum())
    return 1.0 - float(special.betainc(successes + 0.5, n - successes + 0.5, 0.5))
