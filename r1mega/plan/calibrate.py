"""Two of the time model's constants from steps that were measured: published ones, or those of a run on the cluster in question."""

from __future__ import annotations

import itertools
import json
import math
import re
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
from r1mega.observe.run import RunDirectory
from r1mega.plan.generator import generator_memory
from r1mega.plan.given import read_model
from r1mega.plan.gpu import GPU, Efficiency
from r1mega.plan.seconds import plan_seconds
from r1mega.plan.workload import Lengths, replicas_work

FITTED = ("rollout", "logprob", "update")
"""Phases that the fitted constants decide; reshard hangs on the network alone, which stays what it is assumed to be."""
WANTED = ("response/length_mean", "tokens/rollout", "tokens/step")
MOST_MISSED = 0.5
"""Of a fitted phase's seconds, for the constants to explain them."""
OTHER_RESPONSES = 0.02
"""By which a run's number of responses may differ from the planned one."""

Predict = Callable[[Efficiency], float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """phases: of each the measured seconds (medians of `steps` steps) and those that the fitted constants predict. save_bandwidth:
    bytes/s that a node of the run wrote in its slowest save; None where it keeps none, or saves beside the steps.
    """

    run: Path
    steps: int
    efficiency: Efficiency
    phases: Mapping[str, tuple[float, float]]
    save_bandwidth: float | None = None

    @property
    def explained(self) -> bool:
        """Whether constants within their bounds bring every fitted phase nearly to what was measured."""
        within = self.efficiency.matmul < 1 and self.efficiency.overhead_seconds > 0
        fitted = [self.phases[phase] for phase in FITTED if phase in self.phases]
        return within and all(abs(planned / measured - 1) <= MOST_MISSED for measured, planned in fitted)


def fit(known: Sequence[tuple[Predict, float]]) -> Efficiency:
    """matmul and overhead_seconds by least squares of relative errors; network and memory stay what they are assumed to be.

    known: predictions and what was measured. Seconds are linear in 1 / matmul and in overhead_seconds, so that three
    predictions say all of one; neither is less than nothing, and nothing is faster than a GPU's peak: what would be stays at
    that bound, and the other one is fitted with it there. A constant that no prediction hangs on stays as it is assumed.
    """
    rows = []
    for predict, measured in known:
        base = predict(Efficiency(matmul=1.0, overhead_seconds=0.0))
        slope = predict(Efficiency(matmul=0.5, overhead_seconds=0.0)) - base
        overhead = (predict(Efficiency(matmul=1.0, overhead_seconds=0.001)) - base) * 1000
        rows.append((slope / measured, overhead / measured, 1 - (base - slope) / measured))
    factors, wanted = np.array(rows)[:, :2], np.array(rows)[:, 2]
    assumed, bounds = np.array([1 / Efficiency().matmul, Efficiency().overhead_seconds]), np.array([1.0, 0.0])
    free = factors.any(axis=0)
    found = []
    for held in itertools.product((False, True), repeat=2):
        values, fitted = np.where(free, bounds, assumed), free & ~np.array(held)
        rest = wanted - factors[:, ~fitted] @ values[~fitted]
        values[fitted] = np.linalg.lstsq(factors[:, fitted], rest, rcond=None)[0]
        if (values >= bounds).all():
            found.append((float(np.linalg.norm(factors @ values - wanted)), values.tolist()))
    slowness, overhead = min(found)[1]
    return Efficiency(matmul=_rounded(1 / slowness), overhead_seconds=_rounded(overhead))


def calibrated(run: Path, gpu: GPU, per_node: int, imbalance: float = 1.0) -> Calibration:
    """By the steps of an RL run: its config, its number of processes, its samples' lengths and its phases' seconds. The first
    step, which warms up, counts only where it is the only one. imbalance: of its experts, as the plan has it.

    Raises ConfigError where these are not there, for a run on other GPUs, and for one whose steps no plan describes.
    """
    config, world, its_own, steps = _recorded(run, gpu)
    per_node = its_own or per_node
    middle = {name: statistics.median(_value(run, step, name) for step in steps) for name in WANTED}
    count = config.rollout.num_prompts * config.rollout.group_size
    response, whole = middle["response/length_mean"], middle["tokens/step"] / count
    responses = statistics.median(step["tokens/rollout"] / step["response/length_mean"] for step in steps)
    if abs(responses / count - 1) > OTHER_RESPONSES or whole <= response:
        raise ConfigError(
            f"--calibrate {run}: {responses:,.0f} responses of {response:,.0f} tokens were generated and {whole:,.0f} tokens of "
            f"each of {count:,} trained on, where a plan has {count:,} responses and trains on all of them with their prompts; "
            "give a run without algorithm.dynamic_sampling and without dropped samples"
        )
    measured = {
        phase: statistics.median(times)
        for phase in (*FITTED, "reshard")
        if (times := [step[f"time/{phase}_seconds"] for step in steps if step.get(f"time/{phase}_seconds")])
    }
    work = replicas_work(config, Lengths(response, prompt=max(1, round(whole - response))), world)
    try:
        hf = read_model(config, run / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"--calibrate {run}: {error}") from error
    generator = generator_memory(hf, getattr(torch, config.model.dtype), config.rollout, gpu.memory_bytes)

    def predict(efficiency: Efficiency) -> Mapping[str, float]:
        return plan_seconds(
            config, hf, world, gpu, work, generator, imbalance=imbalance, per_node=per_node, efficiency=efficiency
        ).phases

    def of(phase: str) -> Predict:
        return lambda efficiency: predict(efficiency)[phase]

    phases = [phase for phase in FITTED if phase in measured and predict(Efficiency())[phase] > 0]
    efficiency = fit([(of(phase), measured[phase]) for phase in phases])
    found = predict(efficiency)
    both = {phase: (measured[phase], found[phase]) for phase in found if phase in measured}
    bandwidth = None if config.checkpoint.async_save else _save_bandwidth(run, math.ceil(world / per_node))
    return Calibration(run, len(steps), efficiency, both, bandwidth)


def _save_bandwidth(run: Path, nodes: int) -> float | None:
    """By the newest checkpoint's size and what the run's last start tells of its saves; None where one of them is not there."""
    directory = RunDirectory(run)
    kept = sorted(directory.checkpoints.glob("step_" + "[0-9]" * 6))
    if not kept or not directory.pace.exists():
        return None
    try:
        seconds = float(directory.read_pace()["save_seconds"])
    except (DataError, KeyError, TypeError, ValueError):
        return None  # cut short
    written = sum(file.stat().st_size for file in kept[-1].rglob("*") if file.is_file())
    return written / nodes / seconds if seconds > 0 and written else None


def _recorded(run: Path, gpu: GPU) -> tuple[RLStage, int, int | None, Sequence[Mapping[str, float]]]:
    """(config, number of processes, of them on a machine if that is known, lines of the steps that count) of a run on GPUs of
    this kind.
    """
    try:
        config = load_config(run / "config.yaml")
        environment = json.loads((run / "environment.json").read_text())
        world, names = environment["world_size"], environment["gpus"]
        per_node = environment.get("ranks_per_machine")
        if not (isinstance(world, int) and world > 0 and all(isinstance(name, str) for name in names)):
            raise ValueError("environment.json: world_size is no number of processes, or gpus are no names")
        lines = read_json_lines(run / METRICS_FILE)
    except (ConfigError, DataError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--calibrate {run}: not the directory of a run ({error})") from error
    if not isinstance(config, RLStage):
        raise ConfigError(f"--calibrate {run}: a run of stage {config.stage}; the phases of an RL step are wanted")
    kind = gpu.name.split("-")[0].upper()
    if not names or any(kind not in re.split(r"\W+", name.upper()) for name in names):
        ran = f"it ran on {', '.join(dict.fromkeys(names))}" if names else "it ran without a GPU"
        raise ConfigError(
            f"--calibrate {run}: {ran}, and the plan is for {gpu.name}; give a run on {kind}, or its GPUs as --gpu"
        )
    steps = [line for line in lines if line.get("time/update_seconds")]
    if not steps:
        raise ConfigError(f"--calibrate {run}: {METRICS_FILE} has no step with time/update_seconds yet")
    return config, world, per_node, steps[1:] or steps


def _value(run: Path, step: Mapping[str, float], name: str) -> float:
    if not step.get(name):
        raise ConfigError(
            f"--calibrate {run}: {METRICS_FILE} has no {name} above 0 in step {step.get('step')}; give another run"
        )
    return step[name]


def lines(calibration: Calibration | None, gpu: GPU) -> Iterator[str]:
    """Of the report: the constants, and by how much each phase of the run misses them."""
    if calibration is None:
        return
    e = calibration.efficiency
    yield ""
    yield (
        f"calibrated  on {calibration.steps} steps of {calibration.run}: {e.matmul:.3g} of {gpu.name}'s matrix products, "
        f"{1e3 * e.overhead_seconds:.3g} ms a decoding step; assumed {e.network:g} of links, {e.memory:g} of memory"
    )
    for phase, (measured, predicted) in calibration.phases.items():
        yield f"  {phase:<10}{measured:,.2f} s measured, {predicted:,.2f} s planned, {predicted / measured - 1:+.0%}"
    if calibration.save_bandwidth is not None:
        yield f"  {'save':<10}{calibration.save_bandwidth / 1e9:,.3g} GB/s a node measured"
    if not calibration.explained:
        yield "  no share of the peak explains these phases: what is planned with these constants is not to be trusted"


def _rounded(value: float) -> float:
    """To two digits: more of them would say more than is known."""
    return float(f"{value:.2g}")
