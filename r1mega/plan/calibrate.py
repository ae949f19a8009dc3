"""Two of the time model's constants from steps that were measured: published ones, or those of a run on the cluster in question."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from r1mega.config.load import load_config
from r1mega.config.stages.rl import RLStage
from r1mega.errors import ConfigError, DataError
from r1mega.files import read_json_lines
from r1mega.observe.metrics import METRICS_FILE
from r1mega.plan.generator import generator_memory
from r1mega.plan.given import read_model
from r1mega.plan.gpu import GPU
from r1mega.plan.seconds import Efficiency, plan_seconds
from r1mega.plan.workload import Lengths, replicas_work

FITTED = ("rollout", "logprob", "update")
"""Phases that the fitted constants decide; reshard hangs on the network alone, which stays what it is assumed to be."""

Predict = Callable[[Efficiency], float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """phases: of each the measured seconds (medians of `steps` steps) and those that the fitted constants predict."""

    run: Path
    steps: int
    efficiency: Efficiency
    phases: Mapping[str, tuple[float, float]]


def fit(known: Sequence[tuple[Predict, float]]) -> Efficiency:
    """matmul and overhead_seconds by least squares of relative errors; network and memory stay what they are assumed to be.

    known: predictions and what was measured. Seconds are linear in 1 / matmul and in overhead_seconds, so that three
    predictions say all of one; neither is less than nothing, and nothing is faster than a GPU's peak.
    """
    rows = []
    for predict, measured in known:
        base = predict(Efficiency(matmul=1.0, overhead_seconds=0.0))
        slope = predict(Efficiency(matmul=0.5, overhead_seconds=0.0)) - base
        overhead = (predict(Efficiency(matmul=1.0, overhead_seconds=0.001)) - base) * 1000
        rows.append((slope / measured, overhead / measured, 1 - (base - slope) / measured))
    table = np.array(rows)
    slowness, overhead = (float(x) for x in np.linalg.lstsq(table[:, :2], table[:, 2], rcond=None)[0])
    if overhead < 0:
        slowness, overhead = float(np.linalg.lstsq(table[:, :1], table[:, 2], rcond=None)[0][0]), 0.0
    return Efficiency(matmul=_rounded(1 / max(1.0, slowness)), overhead_seconds=_rounded(overhead))


def calibrated(run: Path, gpu: GPU, per_node: int) -> Calibration:
    """By the steps of an RL run: its config, its number of processes, its samples' lengths and its phases' seconds. The first
    step, which warms up, counts only where it is the only one. Raises ConfigError where these are not there.
    """
    try:
        config = load_config(run / "config.yaml")
        world = json.loads((run / "environment.json").read_text())["world_size"]
        lines = read_json_lines(run / METRICS_FILE)
    except (ConfigError, DataError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--calibrate {run}: not the directory of a run ({error})") from error
    if not isinstance(config, RLStage):
        raise ConfigError(f"--calibrate {run}: a run of stage {config.stage}; the phases of an RL step are wanted")
    steps = [line for line in lines if line.get("time/update_seconds")]
    if not steps:
        raise ConfigError(f"--calibrate {run}: {METRICS_FILE} has no step with time/update_seconds yet")
    steps = steps[1:] or steps
    middle = {name: statistics.median(step[name] for step in steps if step.get(name)) for name in _read(steps)}
    response = middle["response/length_mean"]
    whole = middle["tokens/step"] / (config.rollout.num_prompts * config.rollout.group_size)
    work = replicas_work(config, Lengths(response, prompt=max(1, round(whole - response))), world)
    hf, dtype = read_model(config, run / "config.yaml"), getattr(torch, config.model.dtype)
    generator = generator_memory(hf, dtype, config.rollout, gpu.memory_bytes)

    def predict(efficiency: Efficiency) -> Mapping[str, float]:
        return plan_seconds(
            config, hf, world, gpu, work, generator, imbalance=1.0, per_node=per_node, efficiency=efficiency
        ).phases

    def of(phase: str) -> Predict:
        return lambda efficiency: predict(efficiency)[phase]

    phases = [phase for phase in FITTED if f"time/{phase}_seconds" in middle and predict(Efficiency())[phase] > 0]
    efficiency = fit([(of(phase), middle[f"time/{phase}_seconds"]) for phase in phases])
    found = predict(efficiency)
    shown = [phase for phase in found if f"time/{phase}_seconds" in middle]
    return Calibration(
        run, len(steps), efficiency, {phase: (middle[f"time/{phase}_seconds"], found[phase]) for phase in shown}
    )


def lines(calibration: Calibration | None, gpu: GPU) -> Iterator[str]:
    """Of the report: the constants, and by how much each phase of the run misses them."""
    if calibration is None:
        return
    e = calibration.efficiency
    yield ""
    yield (
        f"calibrated  on {calibration.steps} steps of {calibration.run}: {e.matmul:.3g} of {gpu.name}'s matrix products, "
        f"{1e3 * e.overhead_seconds:.3g} ms a layer of a decoding step; assumed {e.network:g} of links, {e.memory:g} of memory"
    )
    for phase, (measured, predicted) in calibration.phases.items():
        yield f"  {phase:<10}{measured:,.2f} s measured, {predicted:,.2f} s planned, {predicted / measured - 1:+.0%}"


def _read(steps: Sequence[Mapping[str, object]]) -> list[str]:
    names = ["response/length_mean", "tokens/step", *(f"time/{phase}_seconds" for phase in (*FITTED, "reshard"))]
    return [name for name in names if any(step.get(name) for step in steps)]


def _rounded(value: float) -> float:
    """To two digits: more of them would say more than is known."""
    return float(f"{value:.2g}")
