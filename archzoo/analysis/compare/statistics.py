"""Means over seeds, paired differences, and their 95 % intervals by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

CONFIDENCE = 0.95  # of every interval
POWER = 0.8  # with which `seeds_needed` would see an effect
MOST_SEEDS = 100_000  # beyond which no number of seeds is named


class Summary(NamedTuple):
    """One quantity over seeds.

    Attributes:
        mean: Over the seeds.
        spread: Standard deviation over the seeds (n - 1); None for one seed.
        seeds: How many.
    """

    mean: float
    spread: float | None
    seeds: int


class Difference(NamedTuple):
    """The mean of paired differences, arm minus control, over the seeds that both have.

    Attributes:
        mean: Of the differences.
        low: Lower end of the 95 % interval; None for one seed.
        high: Upper end.
        spread: Standard deviation of the differences; None for one seed.
        seeds: How many.
        reference: The control's mean over these seeds.
    """

    mean: float
    low: float | None
    high: float | None
    spread: float | None
    seeds: int
    reference: float

    def relative(self) -> Difference:
        """The same as fractions of the control's mean."""
        if not self.reference:
            return self
        scale = 1 / abs(self.reference)
        low, high, spread = (
            None if number is None else number * scale
            for number in (self.low, self.high, self.spread)
        )
        return Difference(self.mean * scale, low, high, spread, self.seeds, 1.0)


def summary(values: list[float]) -> Summary:
    """Mean and spread of one value a seed.

    Where a value is not finite, as the loss of a run that diverged, neither is the mean, and the
    spread is NaN.
    """
    if not all(map(math.isfinite, values)):  # which `statistics` cannot take
        return Summary(
            sum(values) / len(values), math.nan if len(values) > 1 else None, len(values)
        )
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), spread, len(values))


def paired(arm: Mapping[int, float], control: Mapping[int, float]) -> Difference | None:
    """The paired difference of two arms, each a value by seed; None where they share no seed.

    The interval is D +- t s / sqrt(n), with s the standard deviation of the n differences and t
    the quantile of Student's distribution with n - 1 degrees of freedom (Student 1908).
    """
    seeds = sorted(arm.keys() & control.keys())
    if not seeds:
        return None
    differences = [arm[seed] - control[seed] for seed in seeds]
    mean, spread, count = summary(differences)
    reference = statistics.fmean(control[seed] for seed in seeds)
    if spread is None:
        return Difference(mean, None, None, None, count, reference)
    half = t_quantile((1 + CONFIDENCE) / 2, count - 1) * spread / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, spread, count, reference)


def seeds_needed(spread: float, effect: float) -> int | None:
    """Seeds with which a paired test at 5 % sees an effect with a probability of 80 %.

    The least n with n >= ((t_0.975 + t_0.8) s / effect)^2, both quantiles with n - 1 degrees of
    freedom. None: more than any one would run.

    Args:
        spread: Standard deviation of the paired differences, s.
        effect: The size to be seen.
    """
    if not effect:
        return None
    ratio = (spread / effect) ** 2

    def enough(count: int) -> bool:
        quantiles = (t_quantile(p, count - 1) for p in ((1 + CONFIDENCE) / 2, POWER))
        return count >= sum(quantiles) ** 2 * ratio

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:  # between one that is too few and one that is enough
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def t_cdf(t: float, freedom: int) -> float:
    """Student's distribution function, in closed form for an integer number of degrees of freedom.

    With theta = arctan(t / sqrt(f)): a sum of f / 2 powers of its cosine (Abramowitz and Stegun,
    26.7.3 and 26.7.4).

    Args:
        t: The quantile.
        freedom: Degrees of freedom, at least 1.
    """
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * power / (power + 1)
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return (1 + inside) / 2


def t_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t exceeds with a probability of 1 - `probability`.

    Args:
        probability: From 0.5 to below 1.
        freedom: Degrees of freedom, at least 1. Above 1,000 those of 1,000 are taken, which
            differ in the fourth digit.
    """
    freedom = min(freedom, 1_000)
    return _root(lambda t: t_cdf(t, freedom) - probability)


def _root(function: Callable[[float], float]) -> float:
    """Where a rising function that begins below 0 at 0 crosses it, to rounding."""
    low, high = 0.0, 1.0
    while function(high) < 0:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return high
