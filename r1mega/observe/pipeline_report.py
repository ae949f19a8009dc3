"""DIR/report.html of a pipeline: its stages, their lineage, what each brought; it opens without a network."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from r1mega.errors import DataError
from r1mega.files import read_json_lines, write_atomic
from r1mega.observe.charts import GREY, PALETTE, PHASE_COLORS, Chart, bar, build_charts, draw
from r1mega.observe.dag import HEIGHT, WIDTH, lay_out
from r1mega.observe.lineage import Lineage, now, read_lineage
from r1mega.observe.metrics import read_metrics
from r1mega.observe.report import (
    Card,
    duration,
    first_and_last_samples,
    render_page,
    short,
    training_seconds,
    with_evaluations,
    write_report,
)
from r1mega.observe.run import RunDirectory
from r1mega.observe.samples import read_samples
from r1mega.observe.side_by_side import compare_stages
from r1mega.observe.walk import Walk, walk

PIPELINE_FILE = "pipeline.json"
STAGE_CHARTS = ("response-length", "accuracy", "language-mixing", "reward-parts", "loss")
RL_STAGES = ("zero", "reasoning_rl", "align")
SAMPLES_SHOWN = 2


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node and what its run directory holds so far."""

    name: str
    stage: str
    run_dir: Path
    parents: list[str]
    inputs: list[dict[str, Any]]
    state: str
    lineage: Lineage | None
    lines: list[dict[str, Any]]  # metrics with the evaluations joined to them
    evaluations: list[dict[str, Any]]
    samples: list[tuple[int, list[Mapping[str, Any]]]]
    data_cards: list[tuple[str, str]]  # name, text
    results: list[dict[str, Any]]  # of an evaluation: checkpoints with their tasks


@dataclass(frozen=True, slots=True)
class Rung:
    """A checkpoint's accuracy on fresh problems. task: of an evaluation stage, "" inside training; measured: when."""

    name: str
    task: str
    accuracy: float
    low: float | None
    high: float | None
    length: float | None
    measured: str


def write_pipeline_report(directory: Path) -> Path:
    """Write DIR/report.html, and the report of each node that has metrics; the path.

    DataError without DIR/pipeline.json.
    """
    description, nodes = _read(Path(directory))
    for node in nodes:
        if node.lines:
            write_report(node.run_dir)
    page = Path(directory) / "report.html"
    write_atomic(page, _render(description, nodes))
    return page


def read_ladder(directory: Path) -> list[Rung]:
    """The ladder of the pipeline in DIR."""
    return ladder(_read(Path(directory))[1])


def _read(directory: Path) -> tuple[dict[str, Any], list[NodeView]]:
    try:
        description = json.loads((directory / PIPELINE_FILE).read_text())
    except FileNotFoundError as error:
        raise DataError(f"{directory}: not a pipeline's directory (it has no {PIPELINE_FILE})") from error
    except ValueError as error:
        raise DataError(f"{directory / PIPELINE_FILE}: not JSON ({error})") from error
    return description, [_view(node) for node in description["nodes"]]


def _view(node: Mapping[str, Any]) -> NodeView:
    run = RunDirectory(Path(node["run_dir"]))
    lineage = read_lineage(run.path)
    evaluations = read_json_lines(run.evaluations) if run.evaluations.exists() else []
    lines = read_metrics(run.metrics) if run.metrics.exists() else []
    samples = first_and_last_samples(read_samples(run.samples)) if run.samples.exists() else []
    return NodeView(
        node["name"], node["stage"], run.path, node["parents"], node["inputs"],
        state=lineage.state if lineage else "not started",
        lineage=lineage,
        lines=with_evaluations(lines, evaluations) if lines else [],
        evaluations=evaluations,
        samples=[(step, members[:SAMPLES_SHOWN]) for step, members in samples],
        data_cards=[(str(f.relative_to(run.path)), f.read_text()) for f in sorted(run.path.glob("data/card.md"))],
        results=_results(run.path / "results.json"),
    )  # fmt: skip


def _render(description: Mapping[str, Any], nodes: Sequence[NodeView]) -> str:
    rungs = ladder(nodes)
    charts = {node.name: _stage_charts(node) for node in nodes}
    overview = [chart for chart in (_ladder_chart(rungs), _time_chart(nodes)) if chart is not None]
    overview += compare_stages({node.name: node.lines for node in nodes if node.stage in RL_STAGES})
    states = {node.name: node.state for node in nodes}
    return render_page(
        "pipeline.html.j2",
        [*overview, *(chart for node in nodes for chart in charts[node.name])],
        name=description["name"],
        source=description["source"],
        updated=now(),
        state=overall_state(states.values()),
        cards=_cards(nodes, rungs),
        picture=lay_out({node.name: node.parents for node in nodes}),
        box=(WIDTH, HEIGHT),
        nodes=nodes,
        by_name={node.name: node for node in nodes},
        overview=overview,
        charts=charts,
        rungs=rungs,
        walks=_walks(nodes),
        totals=[_totals(node) for node in nodes if node.lines],
        results={node.name: _result(node) for node in nodes},
        spent={node.name: duration(seconds) for node in nodes if (seconds := _wall_seconds(node))},
    )


def overall_state(states: Iterable[str]) -> str:
    """Of the whole pipeline: the first of failed, running, interrupted that a node is in; finished when all are."""
    present = set(states)
    if present == {"finished"}:
        return "finished"
    return next((state for state in ("failed", "running", "interrupted") if state in present), "unfinished")


def ladder(nodes: Sequence[NodeView]) -> list[Rung]:
    """Accuracy of each checkpoint that was evaluated, in the pipeline's order: by the evaluation stages where there is
    one (all checkpoints under the same conditions), else by the evaluations inside training.
    """
    order = {node.name: place for place, node in enumerate(nodes)}
    rungs = [rung for node in nodes for rung in _evaluated(node, nodes)] or _evaluated_in_training(nodes)
    return sorted(rungs, key=lambda rung: (order.get(rung.name, -1), rung.task))


def _walks(nodes: Sequence[NodeView]) -> list[Walk]:
    """A prompt of each task that an evaluation stage has asked several checkpoints, in the pipeline's order."""
    order = {node.name: place for place, node in enumerate(nodes)}
    found = []
    for node in nodes:
        files: dict[str, list[tuple[str, Path]]] = {}
        for checkpoint in node.results:
            for task, entry in checkpoint["tasks"].items():
                if "file" in entry:
                    owner = _owner(checkpoint["path"], checkpoint["name"], nodes)
                    files.setdefault(task, []).append((owner, node.run_dir / entry["file"]))
        for task, results in files.items():
            results.sort(key=lambda item: order.get(item[0], -1))
            if (one := walk(task, results)) is not None:
                found.append(one)
    return found


def _owner(path: str, name: str, nodes: Sequence[NodeView]) -> str:
    """The node that made a checkpoint of an evaluation; its own name where none did."""
    place = Path(path).resolve()
    return next((n.name for n in nodes if place.is_relative_to(n.run_dir.resolve())), name)


def _evaluated(node: NodeView, nodes: Sequence[NodeView]) -> list[Rung]:
    rungs = []
    for checkpoint in node.results:
        owner = _owner(checkpoint["path"], checkpoint["name"], nodes)
        for task, entry in checkpoint["tasks"].items():
            if entry["metrics"].get("eval/accuracy") is not None:
                rungs.append(_rung(owner, task, entry["metrics"], f"{node.name}: {task}"))
    return rungs


def _evaluated_in_training(nodes: Sequence[NodeView]) -> list[Rung]:
    """A stage's evaluation before its first step measures the checkpoint that it starts from, a later one its own."""
    rungs: dict[str, Rung] = {}
    for node in nodes:
        start = next((item["owner"] for item in node.inputs if item["key"] == "model.path"), None)
        for line in node.evaluations:
            if line.get("eval/accuracy") is None:
                continue
            if line["step"] == 0 and start is not None:
                rungs.setdefault(start, _rung(start, "", line, f"before the first step of {node.name}"))
            elif line["step"] > 0:
                rungs[node.name] = _rung(node.name, "", line, f"after step {line['step']} of {node.name}")
    return list(rungs.values())


def _rung(name: str, task: str, line: Mapping[str, Any], measured: str) -> Rung:
    low, high = line.get("eval/accuracy_low"), line.get("eval/accuracy_high")
    return Rung(name, task, line["eval/accuracy"], low, high, line.get("eval/length_mean"), measured)


def _ladder_chart(rungs: Sequence[Rung]) -> Chart | None:
    if not rungs:
        return None
    tasks = list(dict.fromkeys(rung.task for rung in rungs))
    colors = itertools.cycle(PALETTE)
    traces = [_task_bars([rung for rung in rungs if rung.task == task], next(colors)) for task in tasks]
    figure = draw(traces, {"range": [0, 1.02], "tickformat": ".0%"}, {"bargap": 0.45, "barmode": "group"}, names=True)
    caption = "Accuracy of each stage's checkpoint on problems that no stage was trained on, with its 95% interval."
    return Chart("ladder", "Overview", "From stage to stage", caption, figure)


def _task_bars(rungs: Sequence[Rung], color: str) -> dict[str, Any]:
    trace = bar([rung.name for rung in rungs], [rung.accuracy for rung in rungs], rungs[0].task or "accuracy", color)
    trace["hovertemplate"] = "%{y:.1%}"
    above = [rung.high - rung.accuracy for rung in rungs if rung.high is not None]
    below = [rung.accuracy - rung.low for rung in rungs if rung.low is not None]
    if len(above) == len(below) == len(rungs):
        trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2}
    return trace


def _time_chart(nodes: Sequence[NodeView]) -> Chart | None:
    timed = [node for node in nodes if node.lines and training_seconds(node.lines)]
    if not timed:
        return None
    totals = [phase_seconds(node.lines) for node in timed]
    phases = dict.fromkeys([*(p for p in PHASE_COLORS if any(p in t for t in totals)), *(p for t in totals for p in t)])
    names = [node.name for node in timed]
    colors = {"other": GREY, **PHASE_COLORS}
    traces = [
        bar(names, [t.get(phase, 0.0) / 60 for t in totals], phase, colors.get(phase, PALETTE[i % len(PALETTE)]))
        | {"hovertemplate": "%{y:.2f} min"}
        for i, phase in enumerate(phases)
    ]
    figure = draw(traces, {"title": {"text": "minutes"}}, {"barmode": "stack", "bargap": 0.45}, names=True)
    return Chart("time", "Overview", "Time by stage and phase", "Minutes in training steps, by phase.", figure)


def phase_seconds(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each phase over all steps, "other" for what no phase claims.

    A line stands for the steps before it too.
    """
    total: dict[str, float] = {}
    previous = 0
    for line in lines:
        gap, previous = line["step"] - previous, line["step"]
        step = line.get("time/step_seconds")
        if step is None:
            continue
        timed = {key: value or 0.0 for key, value in line.items() if key.startswith("time/")}
        parts = {key[5:-8]: value for key, value in timed.items() if key != "time/step_seconds"}
        inside = sum(value for phase, value in parts.items() if phase != "evaluate")
        for phase, value in {**parts, "other": max(0.0, step - inside)}.items():
            total[phase] = total.get(phase, 0.0) + value * gap
    return {phase: seconds for phase, seconds in total.items() if seconds > 0}


def _totals(node: NodeView) -> tuple[str, str, list[tuple[str, str]], str, str]:
    """(name, steps, seconds by phase, sampled tokens, trained tokens) as texts."""
    sums = {name: sum(line.get(name) or 0 for line in node.lines) for name in ("tokens/rollout", "tokens/update")}
    phases = [(phase, duration(seconds)) for phase, seconds in phase_seconds(node.lines).items()]
    sampled, trained = (f"{value:,.0f}" if value else "–" for value in sums.values())
    return node.name, f"{node.lines[-1]['step']:,}", phases, sampled, trained


def _stage_charts(node: NodeView) -> list[Chart]:
    charts = [chart for chart in build_charts(node.lines) if chart.id in STAGE_CHARTS] if node.lines else []
    charts.sort(key=lambda chart: STAGE_CHARTS.index(chart.id))
    wide = len(charts) % 2 == 1
    return [
        dataclasses.replace(chart, id=f"{node.name}-{chart.id}", section=node.name, wide=wide and chart is charts[-1])
        for chart in charts
    ]


def _cards(nodes: Sequence[NodeView], rungs: Sequence[Rung]) -> list[Card]:
    done = sum(node.state == "finished" for node in nodes)
    cards = [Card("Stages", f"{done} of {len(nodes)}", note="finished")]
    if len(rungs) > 1:
        first, best = rungs[0], max(rungs, key=lambda rung: rung.accuracy)
        note = f"{first.name}, best of all ({best.name})"
        cards.append(Card("Accuracy", f"{best.accuracy:.1%}", f"{first.accuracy:.1%}", note))
    if seconds := sum(_wall_seconds(node) for node in nodes):
        cards.append(Card("Wall time", duration(seconds), note="of all stages, with their starts"))
    lines = [line for node in nodes for line in node.lines]
    sampled, trained = (sum(line.get(f"tokens/{name}") or 0 for line in lines) for name in ("rollout", "update"))
    if sampled or trained:
        cards.append(Card("Tokens", short(sampled), note=f"sampled; {short(trained)} trained"))
    return cards


def _wall_seconds(node: NodeView) -> float:
    attempts = node.lineage.attempts if node.lineage else ()
    ended = [(a.start, a.end) for a in attempts if a.end is not None]
    return sum((_time(end) - _time(start)).total_seconds() for start, end in ended)


def _time(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")


def _results(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text())["checkpoints"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the results of an evaluation ({error})") from error


def _result(node: NodeView) -> str:
    """A node's outcome in a few words, for its box."""
    ends = [line for line in node.evaluations if line.get("eval/accuracy") is not None]
    if node.data_cards:
        return "data"
    if ends:
        return f"accuracy {ends[-1]['eval/accuracy']:.1%}"
    losses = [line["train/loss"] for line in node.lines if line.get("train/loss") is not None]
    return f"loss {losses[-1]:.3f}" if losses else ""
