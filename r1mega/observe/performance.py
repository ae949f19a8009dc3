"""How fast a step was, a rank: tokens and model FLOPs a second, and the share of the device's peak (MFU)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

RATED = ("rollout", "logprob", "update", "step")
"""What has rates: a phase, and the whole step."""


def performance(
    metrics: Mapping[str, Any], seconds: Mapping[str, float], ranks: int, peak_tflops: float | None
) -> dict[str, float | None]:
    """`perf/...` of every RATED phase whose `perf/<phase>_flops` and `tokens/<phase>` (over all ranks) are in metrics.

    seconds: of each phase, the slowest rank's. peak_tflops: of one device; None: unknown, then there is no MFU. A phase
    that did not run has no rates (None).
    """
    rates: dict[str, float | None] = {}
    for phase in RATED:
        if f"perf/{phase}_flops" not in metrics:
            continue
        tokens, flops = metrics[f"tokens/{phase}"], metrics[f"perf/{phase}_flops"]
        share = seconds[phase] * ranks
        ran = tokens > 0 and share > 0
        rates[f"perf/{phase}_tokens_per_second_per_gpu"] = tokens / share if ran else None
        speed = flops / share / 1e12 if ran else None
        rates[f"perf/{phase}_tflops_per_gpu"] = speed
        rates[f"perf/{phase}_mfu"] = speed / peak_tflops if speed is not None and peak_tflops else None
    return rates


def stragglers(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """`straggler/<phase>_...`: the slowest rank (the lowest of equal ones), its seconds and the median's. seconds: of each phase,
    by rank; phases that no rank was in are left out. Nothing to tell with one rank.
    """
    found: dict[str, float] = {}
    for phase, values in seconds.items():
        worst = max(values)
        if len(values) > 1 and worst > 0:
            found[f"straggler/{phase}_worst_rank"] = values.index(worst)
            found[f"straggler/{phase}_worst_seconds"] = worst
            found[f"straggler/{phase}_median_seconds"] = statistics.median(values)
    return found
