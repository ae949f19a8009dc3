"""`r1mega plan` of a pipeline: GPU hours of the whole recipe, node by node, each on as many GPUs as the file gives it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from r1mega.config.data_factory import DataFactoryStage
from r1mega.config.pipeline import Node, in_turn, load_pipeline
from r1mega.config.schema import Stage
from r1mega.config.stages.cold_start import ColdStartStage
from r1mega.config.stages.evaluate import LONGEST_ANSWER, EvaluateStage
from r1mega.config.stages.reward_model import RewardModelStage
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import SFTStage
from r1mega.errors import ConfigError
from r1mega.plan.command import Job, plan_job
from r1mega.plan.data_work import DataWork
from r1mega.plan.given import on_the_host, read_model
from r1mega.plan.gpu import Efficiency, gpu_kind

if TYPE_CHECKING:
    from r1mega.plan.calibrate import Calibration

AT_ONCE = 8192
"""Responses of an evaluation whose lengths are drawn; more take so many times as long."""


@dataclass(frozen=True, slots=True)
class NodeCost:
    """amount: steps, or responses, in words; seconds: of the node; None: not known (amount says what is missing). data: work on
    its samples, which no GPU has a share in and which is not in the seconds; None: there is none, or of how many is not known.
    """

    name: str
    gpus: int
    amount: str
    seconds: float | None
    verdict: str
    data: DataWork | None = None

    @property
    def gpu_hours(self) -> float:
        return 0.0 if self.seconds is None else self.seconds * self.gpus / 3600


def recipe_lines(path: Path, overrides: Sequence[str], job: Job, samples: Mapping[str, int]) -> tuple[list[str], bool]:
    """(a table with its sums, whether every node fits). job: kind of GPU, lengths of responses and imbalance; its GPUs are the
    nodes' own, ranks_per_machine of them on a node. samples: by node: that are trained on, or responses that are drawn.

    Raises ConfigError with all nodes that cannot be laid out, by name, and for samples of a node that is not there or takes
    its steps from its config.
    """
    on_the_host()
    from r1mega.plan.calibrate import calibrated, lines
    from r1mega.plan.workload import read_lengths

    if job.lengths_file is not None:
        lengths = dataclasses.replace(job.lengths, given=read_lengths(job.lengths_file))
        job = dataclasses.replace(job, lengths=lengths, lengths_file=None)
    pipeline, gpu = load_pipeline(path, overrides), gpu_kind(job.gpu)
    job = dataclasses.replace(job, per_node=pipeline.ranks_per_machine)
    counted = [name for name, node in pipeline.nodes.items() if not isinstance(node.config, RLStage)]
    if wrong := sorted(set(samples) - set(counted)):
        raise ConfigError(f"--samples {wrong[0]}: wants one of {', '.join(counted)}; the steps of RL are `steps`")
    known = None if job.run is None else calibrated(job.run, gpu, job.per_node, job.imbalance)
    costs, problems = [], []
    with contextlib.closing(in_turn(pipeline, dry_run=True)) as nodes:
        for node in nodes:
            try:
                costs.append(node_cost(node, job, samples.get(node.name), known))
            except ConfigError as error:
                problems.append(f"{node.name} ({node.source}): {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    said = [*_table(costs, job.gpu), *lines(known, gpu)]
    return said, all(cost.verdict != "does not fit" for cost in costs)


def node_cost(node: Node, job: Job, samples: int | None, known: Calibration | None = None) -> NodeCost:
    """Saves, evaluations within a stage and rewards are in none. Lengths of samples that are trained on but not drawn (SFT,
    preferences): a quarter of the longest on average.
    """
    from r1mega.plan.report import verdict

    config = node.config
    if not isinstance(config, RLStage | SFTStage | RewardModelStage | DataFactoryStage | EvaluateStage):
        return NodeCost(node.name, node.ranks, f"not planned: a stage {config.stage}", None, "-")
    draws = isinstance(config, RLStage | DataFactoryStage | EvaluateStage)
    lengths = job.lengths if draws else dataclasses.replace(job.lengths, mean=None, given=())
    own = dataclasses.replace(job, path=node.source, overrides=[], gpus=node.ranks, lengths=lengths)
    planned = plan_job(own, config, known)
    fits = verdict(planned.memory, planned.gpu)
    if planned.seconds is None:
        if (drawn := _drawn(config, own, samples, planned.calibration)) is None:
            return NodeCost(node.name, node.ranks, f"--samples {node.name}=N (responses)", None, fits)
        rewritten = isinstance(config, ColdStartStage) and config.rewrite.model.path is not None
        amount = f"{drawn[0]:,} responses" + ", not their rewriting" * rewritten
        return NodeCost(node.name, node.ranks, amount, drawn[1], fits, _work_on_responses(config, own, drawn[0]))
    step, steps = planned.seconds.total, _steps(config, samples)
    if steps is None:
        return NodeCost(node.name, node.ranks, f"{step:,.1f} s a step; --samples {node.name}=N", None, fits)
    data = None
    if isinstance(config, SFTStage) and samples is not None and planned.work is not None:
        mean = planned.work.tokens / len(planned.work.samples)
        data = DataWork(["tokenise"], samples * mean, node.ranks)
    return NodeCost(node.name, node.ranks, f"{steps:,} steps of {step:,.1f} s", steps * step, fits, data)


def _work_on_responses(config: Stage, job: Job, count: int) -> DataWork | None:
    """Filters, hashes and decontamination of what a data factory has drawn: all of it, though wrong answers go first."""
    if not isinstance(config, DataFactoryStage):
        return None
    drawn = job.lengths.draw(min(count, AT_ONCE), config.rollout.max_response_tokens, config.seed)
    return DataWork(["filters", "hash", "decontaminate"], count * sum(drawn) / len(drawn), job.gpus)


def _steps(config: Stage, samples: int | None) -> int | None:
    """None: they hang on samples that nobody told."""
    if isinstance(config, RLStage):
        return config.steps
    if samples is None or not isinstance(config, SFTStage | RewardModelStage):
        return None
    epochs = config.epochs if isinstance(config, SFTStage) else config.num_epochs
    return epochs * math.ceil(samples / config.batch_size)


def _drawn(config: Stage, job: Job, samples: int | None, known: Calibration | None) -> tuple[int, float] | None:
    """(responses, their seconds) of a stage that generates and trains nothing. samples: responses; None: of the prompts that
    max_prompts allows, where it says so. What a second model rewrites is not in it.
    """
    import torch

    from r1mega.plan.decoding import rollout_seconds
    from r1mega.plan.generator import GeneratorConfig, generator_memory
    from r1mega.plan.workload import Workload

    rollout: GeneratorConfig
    prompt = job.lengths.prompt
    if isinstance(config, DataFactoryStage):
        rollout, longest = config.rollout, config.rollout.max_response_tokens
        at_once, prompt = (
            config.rollout.num_prompts * config.rollout.group_size,
            min(prompt, config.data.max_prompt_tokens),
        )
        if samples is None and config.max_prompts is not None:
            samples = config.max_prompts * config.rollout.group_size
    else:
        assert isinstance(config, EvaluateStage)
        rollout, at_once = config.rollout, AT_ONCE
        longest = max((task.max_tokens or LONGEST_ANSWER for task in config.chosen.values()), default=LONGEST_ANSWER)
    if samples is None:
        return None
    gpu, hf, dtype = gpu_kind(job.gpu), read_model(config, job.path), getattr(torch, config.model.dtype)
    memory, lengths = generator_memory(hf, dtype, rollout, gpu.memory_bytes), job.lengths
    count = min(samples, at_once)
    drawn = lengths.draw(count, longest, config.seed)
    work = Workload(tuple((prompt, length) for length in drawn), 1, 1, 1)
    efficiency = Efficiency() if known is None else known.efficiency
    return samples, rollout_seconds(
        rollout, dtype, hf, job.gpus, gpu, work, memory, efficiency, job.per_node
    ) * samples / count


def _table(costs: Sequence[NodeCost], gpu: str) -> list[str]:
    from r1mega.plan.report import aligned

    rows = [("node", "GPUs", "amount", "days", "GPU hours", "")]
    for cost in costs:
        shown = ("-", "-")
        if cost.seconds is not None:
            shown = f"{cost.seconds / 86400:,.1f}", f"{math.ceil(cost.gpu_hours):,}"
        rows.append((cost.name, f"{cost.gpus:,}", cost.amount, *shown, cost.verdict))
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    days, hours = sum(known) / 86400, math.ceil(sum(cost.gpu_hours for cost in costs))
    unknown = sum(cost.verdict == "-" for cost in costs)
    unplanned = f"{unknown} not planned, whether they fit is not known; " if unknown else ""
    return [
        *aligned(rows), "", *(cost.data.line(cost.name) for cost in costs if cost.data is not None),
        f"recipe      {hours:,} hours of {gpu}, {days:,.1f} days one after the other, for {len(known)} of {len(costs)} nodes; "
        f"{unplanned}without saves, evaluations within a stage, rewards, restarts and rewriting by a second model; a model, off by up to 30 % from what tuned programs took (docs/plan.md)",
    ]  # fmt: skip
