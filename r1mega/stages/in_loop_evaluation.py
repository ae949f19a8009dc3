"""Evaluation inside the RL loop: before the first step, after the last, and every so many between."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from r1mega.config.schema import DataConfig
from r1mega.config.stages.rl import RLStage
from r1mega.data.prompts import load_prompts
from r1mega.data.tokenizer import Tokenizer
from r1mega.errors import R1MegaError
from r1mega.evaluate.result import EvaluationResult, merge_results
from r1mega.evaluate.run import evaluate_prompts
from r1mega.files import JsonLinesWriter
from r1mega.platform.groups import GeneratorPlace, begin_work, wait_for_all
from r1mega.reward.compose import RewardScorer, Verdicts
from r1mega.rollout.shared_scoring import share_scoring
from r1mega.stages.phases import Phases
from r1mega.stages.runtime import Runtime
from r1mega.types import GenerationEngine, Prompt, SamplingSettings

logger = logging.getLogger(__name__)

EVALUATIONS_FILE = "evaluations.jsonl"


class Evaluation:
    """Grades the policy on prompts that it is not trained on; writes RUN_DIR/evaluations.jsonl.

    Generator replicas share the prompts, and the ranks of each the grading. Nothing is drawn from the training's random numbers, so a run with another
    evaluation is the same run. start: the step that the run goes on after (0: a new one).
    """

    def __init__(
        self,
        config: RLStage,
        runtime: Runtime,
        engine: GenerationEngine,
        tokenizer: Tokenizer,
        scorer: RewardScorer,
        sampling: SamplingSettings,
        phases: Phases,
        start: int,
    ):
        self._config, self._runtime = config, runtime
        self._engine, self._tokenizer, self._sampling = engine, tokenizer, sampling
        self._scorer = scorer
        self._phases = phases
        self._prompts: tuple[Prompt, ...] = ()
        if config.evaluate.data is not None:
            data = DataConfig.model_validate(config.data.model_dump() | {"prompts": (config.evaluate.data,)})
            self._prompts = load_prompts(data, tokenizer)[: config.evaluate.num_prompts]
        self._writer = None
        if runtime.is_main and self._prompts:
            self._writer = JsonLinesWriter(runtime.run_dir / EVALUATIONS_FILE, start or None)

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after this step."""
        every = self._config.evaluate.every_steps
        return step == self._config.steps or (every is not None and step % every == 0)

    def run(self, step: int) -> dict[str, Any]:
        """`eval/...` metrics of the weights after `step` (0: as loaded); {} without evaluation data. An evaluation that fails
        is told and costs the run nothing: its only metric is `eval/failed`.
        """
        if not self._prompts:
            return {}
        with self._runtime.busy_with("evaluate"):
            outcomes = self._outcomes(step)
        errors = [
            f"rank {rank}: {theirs}"
            for rank, theirs in enumerate(outcomes)
            if isinstance(theirs, (R1MegaError, OSError))
        ]
        if errors:
            if self._runtime.is_main:
                logger.error("the evaluation after step %d failed; training goes on. %s", step, "; ".join(errors))
            return {"eval/failed": 1.0}
        firsts = outcomes[:: self._config.rollout.tp]  # the others of a generator hold copies
        metrics = merge_results([result for result in firsts if isinstance(result, EvaluationResult)]).metrics()
        if self._writer is not None:
            self._writer.write({"step": step, **metrics})
        self._runtime.note(f"evaluation after step {step}: {_told(metrics)}")
        return metrics

    def _outcomes(self, step: int) -> list[EvaluationResult | R1MegaError | OSError | None]:
        """Of every rank. A collective call. Each evaluation has a scorer of its own: one that failed leaves nothing to the next."""
        place, verdicts = GeneratorPlace.of_this_rank(self._config.rollout.tp), Verdicts(self._scorer)
        scorer = share_scoring(verdicts, self._config.rollout.tp)
        outcome: EvaluationResult | R1MegaError | OSError
        with self._phases.within("evaluate"):
            begin_work()
            try:
                outcome = evaluate_prompts(
                    self._engine, self._tokenizer, self._prompts[place.replica :: place.num_replicas], self._config.evaluate,
                    scorer, self._sampling,
                )  # fmt: skip
            except (R1MegaError, OSError) as error:
                outcome = error
            finally:
                verdicts.forget()
        wait_for_all("rollout", f"the evaluation after step {step}")
        return _of_all_ranks(outcome)


def _told(metrics: Mapping[str, float]) -> str:
    """What a person wants of it; all of it is in evaluations.jsonl."""
    if "eval/accuracy" not in metrics:
        return "no response could be judged"
    bounds = f"{metrics['eval/accuracy_low']:.3f} to {metrics['eval/accuracy_high']:.3f}"
    return f"accuracy {metrics['eval/accuracy']:.3f} ({bounds}), {metrics['eval/length_mean']:.1f} tokens a response"


def _of_all_ranks(
    outcome: EvaluationResult | R1MegaError | OSError,
) -> list[EvaluationResult | R1MegaError | OSError | None]:
    outcomes: list[EvaluationResult | R1MegaError | OSError | None] = [outcome]
    if dist.get_world_size() > 1:
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome)
    return outcomes
