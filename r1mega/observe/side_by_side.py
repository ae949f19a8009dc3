"""Charts that show the RL stages of a pipeline together: what one of them does that another, without a reward or a
stage before it, does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from r1mega.observe.charts import PALETTE, SMOOTH_FROM, Chart, Lines, draw, points, running_mean

COMPARED = (
    ("response/length_mean", "Response length of the RL stages", {"rangemode": "tozero", "title": {"text": "tokens"}}),
    ("reward/accuracy", "Accuracy of the RL stages", {"range": [-0.02, 1.02], "tickformat": ".0%"}),
    (
        "response/mixed_language_fraction",
        "Language mixing of the RL stages",
        {"rangemode": "tozero", "tickformat": ".0%"},
    ),
)
"""(metric, title, y axis)."""

_CAPTION = "On training prompts, over each stage's own steps; long series as a running mean."


def compare_stages(stages: Mapping[str, Lines]) -> list[Chart]:
    """A chart for each metric of COMPARED that at least two of the stages have. stages: metrics by name, in order."""
    charts = []
    for metric, title, axis in COMPARED:
        colors = itertools.cycle(PALETTE)
        traces = [_trace(name, next(colors), *points(lines, metric)) for name, lines in stages.items()]
        traces = [trace for trace in traces if any(value is not None for value in trace["y"])]
        if len(traces) > 1:
            name = f"stages-{metric.rpartition('/')[2].replace('_', '-')}"
            charts.append(Chart(name, "Overview", title, _CAPTION, draw(traces, axis)))
    return charts


def _trace(name: str, color: str, steps: list[int], values: list[float | None]) -> dict[str, Any]:
    if len(values) >= SMOOTH_FROM:
        values = running_mean(values, len(values) // 12)
    return {
        "type": "scatter", "mode": "lines", "x": steps, "y": values, "name": name,
        "line": {"color": color, "width": 2.2}, "hovertemplate": "%{y:.4g}",
    }  # fmt: skip
