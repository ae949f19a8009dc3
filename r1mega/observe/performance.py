"""How fast a step was, a rank: tokens and model FLOPs a second, and the share of the device's peak (MFU)."""

from __future__ import annotations

from collections.abc import Mapping
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
