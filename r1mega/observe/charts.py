"""The report's charts: which metrics stand together, and the plotly figures made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1mega.observe.registry import PHASES, find_metric

Lines = Sequence[Mapping[str, Any]]

BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, GREY = (
    "#2f6fde", "#e07b39", "#2a9d74", "#8a63d2", "#d1495b", "#1f9bb0", "#98a1b0",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, "#c2a11c", "#5b6b8c")
PHASE_COLORS = dict(zip((*PHASES, "evaluate"), (BLUE, TEAL, PURPLE, ORANGE, GREEN, "#c2a11c"), strict=True))
SMOOTH_FROM = 24
"""Series with at least so many points get a running mean over a twelfth of them."""

ACCURACY, LENGTH = "reward/accuracy", "response/length_mean"
NOT_PARTS = ("reward/mean", "reward/std", "reward/excluded_fraction")


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart: `figure` is plotly's {"data", "layout"} in JSON types."""

    id: str
    section: str
    title: str
    caption: str
    figure: dict[str, Any]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart: a metric, its name in the legend, its color."""

    metric: str
    label: str
    color: str


@dataclass(frozen=True, slots=True)
class ChartSpec:
    """What a chart shows. caption: empty for the registry's meaning of the first series."""

    section: str
    title: str
    series: tuple[Series, ...]
    caption: str = ""
    unit: str = ""
    fraction: bool = False  # y from 0 to 1
    log: bool = False
    floor: float | None = None  # y starts here at the latest
    evaluation: str | None = None  # metric of the evaluations, drawn as markers


SPECS = (
    ChartSpec(
        "Learning", "Response length", (Series(LENGTH, "training prompts", ORANGE),), unit="tokens", floor=0,
        evaluation="eval/length_mean",
    ),
    ChartSpec(
        "Learning", "Accuracy", (Series(ACCURACY, "training prompts", BLUE),), fraction=True,
        evaluation="eval/accuracy",
    ),
    ChartSpec(
        "Learning", "Loss",
        (Series("train/loss", "training", BLUE), Series("eval/loss", "evaluation", RED)), unit="nats/token",
    ),
    ChartSpec("Rewards", "Reward", (Series("reward/mean", "mean", BLUE), Series("reward/std", "deviation", GREY))),
    ChartSpec(
        "Reasoning", "Reflection", (Series("response/reflection_fraction", "reflecting", PURPLE),), fraction=True,
    ),
    ChartSpec(
        "Reasoning", "Language mixing", (Series("response/mixed_language_fraction", "mixed", TEAL),), fraction=True,
    ),
    ChartSpec(
        "Reasoning", "Truncated responses, groups without signal",
        (
            Series("response/truncated_fraction", "truncated", RED),
            Series("group/no_signal_fraction", "no signal", GREY),
        ),
        caption="Responses cut at the length limit; groups whose rewards are all equal, which teach nothing.",
        fraction=True,
    ),
    ChartSpec("Policy", "KL from the reference", (Series("policy/kl", "KL", PURPLE),), unit="nats/token", floor=0),
    ChartSpec("Policy", "Entropy", (Series("policy/entropy", "entropy", GREEN),), unit="nats/token", floor=0),
    ChartSpec("Policy", "Gradient norm", (Series("policy/grad_norm", "norm", ORANGE),), floor=0),
    ChartSpec("Policy", "Clipped tokens", (Series("policy/clip_fraction", "clipped", RED),), unit="fraction", floor=0),
    ChartSpec(
        "Health", "Trainer against sampler",
        (Series("logprob/diff_max", "max", RED), Series("logprob/diff_mean", "mean", BLUE)),
        caption="Difference of log-probs of the same tokens, logarithmic. Exact agreement (zero) is not drawn.",
        unit="nats", log=True,
    ),
    ChartSpec(
        "Health", "Expert load", (Series("expert/load_max_over_mean", "busiest / mean", ORANGE),), unit="ratio",
        floor=1,
    ),
    ChartSpec(
        "Speed", "Throughput",
        (
            Series("tokens/rollout_per_second", "rollout", PHASE_COLORS["rollout"]),
            Series("tokens/update_per_second", "update", PHASE_COLORS["update"]),
        ),
        caption="Sampled tokens over the rollout's time, trained tokens over the update's.", unit="tokens/s", floor=0,
    ),
    ChartSpec(
        "Speed", "Model FLOPs",
        tuple(
            Series(f"perf/{name}_tflops_per_gpu", name, color)
            for name, color in [*((n, PHASE_COLORS[n]) for n in ("rollout", "logprob", "update")), ("step", GREY)]
        ),
        caption="Operations that the model's mathematics asks for, a rank and second, by the slowest rank's time.",
        unit="TFLOP/s", floor=0,
    ),
    ChartSpec("Speed", "Resident memory", (Series("memory/rss_bytes", "rank 0", GREY),), unit="bytes", floor=0),
)  # fmt: skip
SECTIONS = ("Learning", "Rewards", "Reasoning", "Policy", "Health", "Speed", "Probes")


def build_charts(lines: Lines) -> list[Chart]:
    """The charts that the metrics allow, section by section; series without a finite value are left out."""
    charts = [chart for spec in (*SPECS, *_found_specs(lines)) if (chart := _line_chart(spec, lines)) is not None]
    if (phases := _phase_chart(lines)) is not None:
        charts.insert(next((i for i, c in enumerate(charts) if c.section == "Speed"), len(charts)), phases)
    return [chart for section in SECTIONS for chart in _two_by_two([c for c in charts if c.section == section])]


def _two_by_two(charts: list[Chart]) -> list[Chart]:
    """Two charts a row; one that would stand alone gets the whole row."""
    narrow = [index for index, chart in enumerate(charts) if not chart.wide]
    if len(narrow) % 2:
        charts[narrow[-1]] = dataclasses.replace(charts[narrow[-1]], wide=True)
    return charts


def _found_specs(lines: Lines) -> list[ChartSpec]:
    """Charts of the metric families whose members depend on the run: reward parts, probes."""
    names = dict.fromkeys(name for line in lines for name in line)
    peaks = {kind: [name for name in names if name.endswith(f"_{kind}_peak_bytes")] for kind in ("device", "host")}
    parts = [name for name in names if name.startswith("reward/") and name not in NOT_PARTS]
    probes = [name for name in names if name.startswith("probe/")]
    caption = "Means of the unweighted parts of which the reward is the weighted sum."
    return [
        ChartSpec("Rewards", "Reward parts", _colored(parts), caption=caption),
        *(
            ChartSpec("Speed", f"Peak {kind} memory", _colored(members), unit="bytes", floor=0)
            for kind, members in peaks.items()
        ),
        ChartSpec(
            "Speed",
            "Slowest rank and median",
            _colored([name for name in names if name.startswith("straggler/") and name.endswith("_seconds")]),
            caption="Of each phase; `straggler/*_worst_rank` names the rank.",
            unit="s",
            floor=0,
        ),
        ChartSpec("Probes", "Skill probes", _colored(probes), fraction=True),
    ]


def _colored(names: Sequence[str]) -> tuple[Series, ...]:
    return tuple(
        Series(name, name.split("/", 1)[1].replace("_", " "), PALETTE[i % len(PALETTE)]) for i, name in enumerate(names)
    )


def points(lines: Lines, metric: str) -> tuple[list[int], list[float | None]]:
    """(steps, values) of the lines that have the metric; values that were not finite are None."""
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    return [step for step, _ in found], [value for _, value in found]


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the known values within window // 2 places on both sides (fewer near the ends)."""
    means: list[float | None] = []
    for place in range(len(values)):
        around = values[max(0, place - window // 2) : place + window // 2 + 1]
        known = [value for value in around if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


def _line_chart(spec: ChartSpec, lines: Lines) -> Chart | None:
    traces: list[dict[str, Any]] = []
    for series in spec.series:
        traces += _traces(spec, series, *points(lines, series.metric))
    evaluated = _evaluation_traces(lines, spec.evaluation)
    if not traces and not evaluated:
        return None
    axis: dict[str, Any] = {"title": {"text": spec.unit}} if spec.unit else {}
    if spec.fraction:
        axis |= {"range": [-0.02, 1.02], "tickformat": ".0%"}
    elif spec.log:
        axis |= {"type": "log", "exponentformat": "power"}
    elif spec.floor is not None:
        axis |= {"rangemode": "tozero"} if spec.floor == 0 else {"autorangeoptions": {"include": spec.floor}}
    if spec.unit == "bytes":
        axis |= {"tickformat": ".2s", "ticksuffix": "B", "title": None}
    caption = spec.caption
    if not caption and (metric := find_metric(spec.series[0].metric)) is not None:
        caption = f"{metric.meaning[:1].upper()}{metric.meaning[1:]}."
    return Chart(_slug(spec.title), spec.section, spec.title, caption, draw([*traces, *evaluated], axis))


def _traces(spec: ChartSpec, series: Series, steps: list[int], values: list[float | None]) -> list[dict[str, Any]]:
    """One line, or for a long series a pale one with its running mean over it."""
    if spec.log:
        values = [value if value else None for value in values]
    if not any(value is not None for value in values):
        return []
    known = sum(value is not None for value in values)
    trace = {
        "type": "scatter", "x": steps, "y": values, "name": series.label, "legendgroup": series.metric,
        "mode": "lines" if known > 3 else "lines+markers", "line": {"color": series.color, "width": 2.2},
        "hovertemplate": "%{y:.4g}",
    }  # fmt: skip
    if known < SMOOTH_FROM or spec.log:
        return [trace]
    window = max(2, known // 12)
    pale = trace | {"line": {"color": series.color, "width": 1}, "opacity": 0.4, "showlegend": False}
    smooth = trace | {"y": running_mean(values, window), "hoverinfo": "skip", "hovertemplate": None}
    return [pale | {"name": series.label}, smooth]


def _evaluation_traces(lines: Lines, metric: str | None) -> list[dict[str, Any]]:
    """Markers for the evaluations, with their interval where it is known."""
    steps, values = points(lines, metric) if metric else ([], [])
    if not any(value is not None for value in values):
        return []
    trace = {
        "type": "scatter", "x": steps, "y": values, "name": "evaluation prompts", "mode": "markers",
        "marker": {"color": "#1d2430", "size": 8, "symbol": "diamond"}, "hovertemplate": "%{y:.4g}",
    }  # fmt: skip
    ends = [(line.get(f"{metric}_low"), line.get(f"{metric}_high")) for line in lines if metric in line]
    bounds = [
        (high - value, value - low)
        for value, (low, high) in zip(values, ends, strict=True)
        if value is not None and low is not None and high is not None
    ]
    if len(bounds) == len(values):
        above, below = ([pair[side] for pair in bounds] for side in (0, 1))
        trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2}
    return [trace]


def _phase_chart(lines: Lines) -> Chart | None:
    """Stacked seconds a step by phase; what no phase claims is "other"."""
    timed = [line for line in lines if line.get("time/step_seconds") is not None]
    if not timed:
        return None
    steps = [line["step"] for line in timed]
    names = dict.fromkeys(f"time/{phase}_seconds" for phase in PHASE_COLORS)
    names |= dict.fromkeys(name for line in timed for name in line if name.startswith("time/"))
    names.pop("time/step_seconds", None)
    traces = []
    for index, name in enumerate(names):
        values = [line.get(name) or 0.0 for line in timed]
        if any(values):
            phase = name.removeprefix("time/").removesuffix("_seconds")
            traces.append(bar(steps, values, phase, PHASE_COLORS.get(phase, PALETTE[index % len(PALETTE)])))
    inside = [name for name in names if name != "time/evaluate_seconds"]  # evaluations stand between steps
    other = [max(0.0, line["time/step_seconds"] - sum(line.get(name) or 0.0 for name in inside)) for line in timed]
    traces.append(bar(steps, other, "other", GREY))
    layout = {"barmode": "stack", "bargap": 0.15 if len(steps) <= 80 else 0}
    figure = draw(traces, {"title": {"text": "seconds"}}, layout)
    caption = "Wall time of each step by phase, exclusive: a nested phase does not count for the one around it."
    return Chart("time-by-phase", "Speed", "Time by phase", caption, figure, wide=True)


def bar(steps: Sequence[int | str], values: list[float], name: str, color: str) -> dict[str, Any]:
    """A trace of bars, of seconds unless the caller says otherwise."""
    return {
        "type": "bar", "x": steps, "y": values, "name": name, "marker": {"color": color, "line": {"width": 0}},
        "hovertemplate": "%{y:.3f} s",
    }  # fmt: skip


def draw(
    traces: list[dict[str, Any]],
    y_axis: dict[str, Any],
    layout: Mapping[str, Any] | None = None,
    *,
    names: bool = False,
) -> dict[str, Any]:
    """Traces in the report's common dress, checked by plotly (ValueError for a property that it does not have).

    names: x holds names, not steps.
    """
    import plotly.graph_objects as go

    grid = {"gridcolor": "#e9ecf2", "zeroline": False, "linecolor": "#c9d0dc", "ticks": "outside", "ticklen": 4,
            "tickcolor": "#c9d0dc", "automargin": True}  # fmt: skip
    x_axis: dict[str, Any] = {"type": "category"}
    if not names:
        steps = [step for trace in traces for step in trace["x"]]
        whole = {"dtick": 1} if max(steps) - min(steps) < 8 else {}  # no half steps
        x_axis = {"title": {"text": "step", "standoff": 6}, **whole}
    figure = go.Figure(
        data=traces,
        layout={
            "template": "none",
            "font": {"family": "Inter, 'Segoe UI', system-ui, sans-serif", "size": 12, "color": "#4a5568"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 56, "r": 16, "t": 8, "b": 40},
            "hovermode": "x unified",
            "showlegend": sum(trace.get("showlegend", True) for trace in traces) > 1,
            "legend": {
                "orientation": "h",
                "y": 1.02,
                "yanchor": "bottom",
                "x": 0,
                "bgcolor": "rgba(0,0,0,0)",
                "traceorder": "normal",
            },
            "xaxis": {**grid, "showgrid": False, "showline": True, **x_axis},
            "yaxis": {**grid, **y_axis},
            **(layout or {}),
        },
    )
    return figure.to_dict()


def _slug(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
