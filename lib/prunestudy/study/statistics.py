"""Intervals and tests of paired differences."""

import math
from collections.abc import Sequence

import numpy as np

ALPHA = 0.05
OUTCOMES = ("confirmed", "undecided", "contradicted")
_DRAWS = 2000


def interval(values: Sequence[float]) -> tuple[int, float, float, float, float]:
    """Number, mean, sd and 95% t-interval (low, high) of `values`; NaN of fewer than two."""
    n = len(values)
    if n < 2:
        return n, *(values or [math.nan]), math.nan, math.nan, math.nan
    from scipy.special import stdtrit  # late: it takes a second

    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
    return n, mean, sd, mean - half, mean + half


def one_sided(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paired t-tests of `d` (..., n): p of a mean above 0 and below; NaN without a spread."""
    from scipy.special import stdtr

    n = d.shape[-1]
    if n < 2:
        return (none := np.full(d.shape[:-1], math.nan)), none
    mean, error = d.mean(-1), d.std(-1, ddof=1) / math.sqrt(n)
    t = np.divide(mean, error, out=np.full_like(mean, math.nan), where=error > 0)
    return stdtr(n - 1, -t), stdtr(n - 1, t)


def holm(p: np.ndarray) -> np.ndarray:
    """The p-values (..., m) adjusted over the last axis; NaN, of a test not made, counts as 1."""
    filled = np.where(np.isnan(p), 1.0, p)
    order = filled.argsort(-1)
    steps = np.take_along_axis(filled, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(filled)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(steps, -1).clip(max=1), -1)
    return np.where(np.isnan(p), math.nan, adjusted)


def decided(p: np.ndarray, opposite: np.ndarray) -> np.ndarray:
    """The outcomes of tests with these adjusted p-values; NaN decides nothing."""
    confirmed, undecided, contradicted = OUTCOMES
    return np.select([p < ALPHA, opposite < ALPHA], [confirmed, contradicted], undecided)


def drawn(d: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the mean of `d` (seeds, images): both are drawn, 2,000 times."""
    generator, (seeds, images) = np.random.default_rng(0), d.shape
    differs = d[:, d.any(0)]  # the other images add nothing, however often they are drawn
    share = [1 / images] * differs.shape[1]
    times = generator.multinomial(images, [*share, max(0, 1 - sum(share))], _DRAWS)[:, :-1]
    weights = generator.multinomial(seeds, [1 / seeds] * seeds, _DRAWS)
    means = np.einsum("ds,si,di->d", weights, differs, times, optimize=True) / (seeds * images)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
