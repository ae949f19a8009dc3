"""Rating of a solver from the problems that it solved, by the Elo formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SCALE = 400.0 / math.log(10)
"""Rating points by which the odds of solving a problem change e-fold (Elo: tenfold in 400 points)."""

LOWEST, HIGHEST = 0.0, 4000.0
"""Where a rating is looked for. Nothing solved, or everything, has no maximum: it ends at one of these."""

_CHI_SQUARE_95 = 3.841458820694124
"""95% point of chi-square with one degree of freedom."""


@dataclass(frozen=True, slots=True)
class Rating:
    """The most likely rating, and the ends of its 95% interval (by likelihood ratio)."""

    value: float
    low: float
    high: float


def solve_probability(rating: float, difficulty: float) -> float:
    """That a solver of this rating solves a problem of this difficulty: 1 / (1 + 10^((difficulty - rating) / 400))."""
    return 1.0 / (1.0 + 10.0 ** ((difficulty - rating) / 400.0))


def log_likelihood(rating: float, difficulties: Sequence[float], solved: Sequence[float]) -> float:
    """Of the results at a rating. solved: share of solved attempts at each problem, in [0, 1]; each problem counts once
    however many attempts there were, since attempts at one problem are not independent.
    """
    total = 0.0
    for difficulty, share in zip(difficulties, solved, strict=True):
        x = (rating - difficulty) / SCALE
        # log p = -log(1 + e^-x), log(1 - p) = -log(1 + e^x), neither of which may overflow
        total -= share * _softplus(-x) + (1 - share) * _softplus(x)
    return total


def estimate_rating(difficulties: Sequence[float], solved: Sequence[float]) -> Rating:
    """Maximum likelihood within [LOWEST, HIGHEST]. ValueError without problems or for a share outside [0, 1].

    At the maximum the expected number of solved problems equals that which was solved: a monotone equation.
    """
    if not difficulties or not all(0 <= share <= 1 for share in solved):
        raise ValueError("a rating needs at least one problem, and shares of solved attempts within [0, 1]")
    total = math.fsum(solved)
    value = _crossing(lambda r: math.fsum(solve_probability(r, d) for d in difficulties) - total, LOWEST, HIGHEST)
    level = log_likelihood(value, difficulties, solved) - _CHI_SQUARE_95 / 2
    low = _crossing(lambda r: log_likelihood(r, difficulties, solved) - level, LOWEST, value)
    high = _crossing(lambda r: level - log_likelihood(r, difficulties, solved), value, HIGHEST)
    return Rating(value, low, high)


def _crossing(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function passes 0 within [low, high]; the end that is nearer to it when it does not."""
    if increasing(low) >= 0:
        return low
    if increasing(high) <= 0:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)
    return (low + high) / 2


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
