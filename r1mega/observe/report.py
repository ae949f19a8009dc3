"""RUN_DIR/report.html: one file that shows a run, finished or not, and opens without a network."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from r1mega.errors import DataError
from r1mega.files import read_json_lines, write_atomic
from r1mega.observe.charts import ACCURACY, LENGTH, SECTIONS, Chart, Lines, build_charts, points
from r1mega.observe.metrics import read_metrics
from r1mega.observe.registry import METRICS, find_metric
from r1mega.observe.run import RunDirectory
from r1mega.observe.samples import read_samples

SAMPLES_SHOWN = 4
WINDOW = 5
"""Steps over which training numbers "before" and "after" are averaged (at most half of the steps)."""

_TAG = re.compile(r"&lt;/?(?:think|answer)&gt;")


@dataclass(frozen=True, slots=True)
class Card:
    """A number at the top. before: None for a number without a change; note: how it was taken."""

    label: str
    value: str
    before: str | None = None
    note: str = ""


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html (atomically) and return its path.

    Works while the run goes on, and for what the run has: missing files and metrics leave their part out. DataError
    when there is no step to report on, or a file is damaged.
    """
    run = RunDirectory(run_dir)
    if not run.path.is_dir():
        raise DataError(f"{run.path}: no such run directory")
    lines = read_metrics(run.metrics) if run.metrics.exists() else []
    if not lines:
        raise DataError(
            f"{run.path}: nothing to report yet (metrics.jsonl is missing or empty); let the run finish a step"
        )
    if run.evaluations.exists():
        lines = with_evaluations(lines, read_json_lines(run.evaluations))
    write_atomic(run.report, render_report(run, lines))
    return run.report


def with_evaluations(
    lines: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The lines with those of evaluations joined to them by step (step 0 has an evaluation, but no line of its own)."""
    joined: dict[int, dict[str, Any]] = {}
    for line in (*evaluations, *lines):
        joined.setdefault(line["step"], {}).update(line)
    return [joined[step] for step in sorted(joined)]


def render_report(run: RunDirectory, lines: Sequence[Mapping[str, Any]]) -> str:
    """The page as HTML."""
    config = run.read_config() if run.config.exists() else {}
    environment = run.read_environment() if run.environment.exists() else {}
    status = run.read_status() if run.status.exists() else {}
    charts = build_charts(lines)
    return render_page(
        "report.html.j2",
        charts,
        name=run.path.resolve().name,
        stage=config.get("stage", "run"),
        model=(config.get("model") or {}).get("path"),
        state=status.get("state", "unknown"),
        updated=status.get("time"),
        step=lines[-1]["step"],
        steps=config.get("steps"),
        cards=summary_cards(lines, config.get("steps")),
        sections=[(name, [c for c in charts if c.section == name]) for name in SECTIONS],
        evaluations=evaluation_table(lines),
        samples=first_and_last_samples(read_samples(run.samples) if run.samples.exists() else []),
        latest=_latest_table(lines),
        config=run.config.read_text() if run.config.exists() else None,
        environment=_environment_rows(environment),
        packages=environment.get("packages", {}),
    )


def render_page(template: str, charts: Sequence[Chart], /, **values: Any) -> str:
    """A template of this package with plotly and the charts' figures inside."""
    import plotly.offline

    templates = Environment(
        loader=PackageLoader("r1mega.observe"), autoescape=select_autoescape(default=True), undefined=StrictUndefined
    )
    templates.filters["tagged"] = _tagged
    figures = [{"id": chart.id, **chart.figure} for chart in charts]
    plotly_js = Markup(plotly.offline.get_plotlyjs())
    return templates.get_template(template).render(figures=_script_json(figures), plotly_js=plotly_js, **values)


def summary_cards(lines: Sequence[Mapping[str, Any]], planned_steps: int | None) -> list[Card]:
    """The numbers at the top, as far as the metrics have them."""
    cards = [
        _change_card("Accuracy", lines, ACCURACY, "eval/accuracy", "{:.1%}"),
        _change_card("Response length, tokens", lines, LENGTH, "eval/length_mean", "{:.1f}"),
        _change_card("Loss", lines, "train/loss", "eval/loss", "{:.4f}"),
        *(
            Card(_title(name), f"{values[-1]:.1%}", note="teacher-forced, at the end")
            for name in dict.fromkeys(key for line in lines for key in line if key.startswith("probe/"))
            if (values := _known(lines, name))
        ),
        Card("Steps", f"{lines[-1]['step']:,}", note=f"of {planned_steps:,}" if planned_steps else ""),
    ]
    if seconds := training_seconds(lines):
        per_step = seconds / max(1, lines[-1]["step"])
        cards.append(Card("Time in steps", duration(seconds), note=f"{per_step:.2f} s a step"))
    cards.append(straggler_card(lines))
    if differences := _known(lines, "logprob/diff_max"):
        cards.append(Card("Max log-prob difference", f"{max(differences):.1e}", note="trainer against sampler, nats"))
    return [card for card in cards if card is not None]


def straggler_card(lines: Lines) -> Card | None:
    """The rank that was slowest most often, in the phase in which slowest and median are furthest apart over the run."""
    phases = {
        name.split("/")[1].removesuffix("_worst_rank")
        for line in lines
        for name in line
        if name.endswith("_worst_rank")
    }
    if not phases:
        return None

    def total(phase: str, whose: str) -> float:
        return sum(_known(lines, f"straggler/{phase}_{whose}_seconds"))

    phase = max(sorted(phases - {"step"} or phases), key=lambda phase: total(phase, "worst") - total(phase, "median"))
    named = Counter(_known(lines, f"straggler/{phase}_worst_rank"))
    rank, times = named.most_common(1)[0]
    share = total(phase, "worst") / max(total(phase, "median"), 1e-9)
    note = f"{phase}, in {times} of {named.total()} steps; the slowest took {share:.2f} times the median"
    return Card("Slowest rank", f"rank {rank:.0f}", note=note)


def _change_card(
    label: str, lines: Sequence[Mapping[str, Any]], training: str, evaluation: str, form: str
) -> Card | None:
    """Before -> after: of evaluations when there were two, else of the first and last training steps."""
    evaluated = _known(lines, evaluation)
    if len(evaluated) > 1:
        return Card(label, form.format(evaluated[-1]), form.format(evaluated[0]), "evaluation, first and last")
    trained = _known(lines, training)
    if not trained:
        return Card(label, form.format(evaluated[0]), note="evaluation") if evaluated else None
    window = max(1, min(WINDOW, len(trained) // 2))
    after = form.format(sum(trained[-window:]) / window)
    if len(trained) == 1:
        return Card(label, after, note="training, one step")
    note = f"training, mean of first and last {window} steps" if window > 1 else "training, first and last step"
    return Card(label, after, form.format(sum(trained[:window]) / window), note)


def training_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds in steps. Where lines are written every n-th step, each stands for the n - 1 before it too."""
    total, previous = 0.0, 0
    for line in lines:
        total += (line.get("time/step_seconds") or 0.0) * (line["step"] - previous)
        previous = line["step"]
    return total


@dataclass(frozen=True, slots=True)
class EvaluationTable:
    """The first and the last evaluation (one column when they are the same): rows of (name, values, meaning)."""

    steps: list[int]
    rows: list[tuple[str, list[str], str]]


def evaluation_table(lines: Sequence[Mapping[str, Any]]) -> EvaluationTable | None:
    """All eval/ metrics, in the registry's order; None without evaluations."""
    evaluations = [line for line in lines if any(name.startswith("eval/") for name in line)]
    if not evaluations:
        return None
    shown = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
    order = {metric.name: place for place, metric in enumerate(METRICS)}
    names = {name for line in shown for name in line if name.startswith("eval/")}
    rows = []
    for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
        metric = find_metric(name)
        values = [short(line[name]) if name in line else "–" for line in shown]
        rows.append((name, values, metric.meaning if metric is not None else ""))
    return EvaluationTable([line["step"] for line in shown], rows)


def first_and_last_samples(samples: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[Mapping[str, Any]]]]:
    """(step, its samples) of the first and of the last step that has samples (one entry when they are the same)."""
    steps = sorted({sample["step"] for sample in samples})
    chosen = [steps[0], steps[-1]] if len(steps) > 1 else steps
    return [(step, [s for s in samples if s["step"] == step][:SAMPLES_SHOWN]) for step in chosen]


def _latest_table(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(name, value, unit) of every metric's latest value."""
    latest = {name: (line["step"], value) for line in lines for name, value in line.items() if name != "step"}
    rows = []
    for name in sorted(latest):
        metric = find_metric(name)
        rows.append((name, short(latest[name][1]), metric.unit if metric is not None else ""))
    return rows


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in environment.items():
        if key == "packages":
            continue
        if key == "starts":
            value = "; ".join(f"{start['time']} from step {start['step']}" for start in value)
        elif key == "memory_bytes":
            key, value = "memory", f"{value / 2**30:.1f} GiB"
        elif isinstance(value, list):
            value = " ".join(map(str, value)) or "none"
        rows.append((key.replace("_", " "), str(value)))
    return rows


def _tagged(text: str) -> Markup:
    """Escaped text with its reasoning and answer tags set apart."""
    return Markup(_TAG.sub(lambda tag: f'<span class="tag">{tag.group()}</span>', str(escape(text))))


def _script_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no tag can end it."""
    return Markup(json.dumps(value, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c"))


def _known(lines: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    return [value for value in points(lines, metric)[1] if value is not None]


def _title(name: str) -> str:
    family, _, rest = name.partition("/")
    return f"{family} {rest}".replace("_", " ").capitalize()


def short(value: float | None) -> str:
    """A number for a reader: four digits, or thousands with commas."""
    if value is None:
        return "none"  # not finite, or does not apply
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
