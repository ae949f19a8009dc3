"""Evaluation inside the RL loop: before the first step, after the last, and every so many between."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from r1mega.config.schema import DataConfig
from r1mega.config.stages.rl import RLStage
from r1mega.data.prompts import load_prompts
from r1mega.data.tokenizer import Tokenizer
from r1mega.evaluate.result import EvaluationResult, merge_results
from r1mega.evaluate.run import evaluate_prompts
from r1mega.files import JsonLinesWriter
from r1mega.platform.groups import GeneratorPlace, wait_for_all
from r1mega.reward.compose import RewardScorer
from r1mega.stages.phases import Phases
from r1mega.stages.runtime import Runtime
from r1mega.types import GenerationEngine, Prompt, SamplingSettings

EVALUATIONS_FILE = "evaluations.jsonl"


class Evaluation:
    """Grades the policy on prompts that it is not trained on; writes RUN_DIR/evaluations.jsonl.

    Generator replicas share the prompts. Nothing is drawn from the training's random numbers, so a run with another
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
        self._engine, self._tokenizer, self._scorer, self._sampling = engine, tokenizer, scorer, sampling
        self._phases = phases
        self._prompts: tuple[Prompt, ...] = ()
        if config.evaluate.data is not None:
            data = DataConfig.model_validate(config.data.model_dump() | {"prompts": (config.evaluate.data,)})
            self._prompts = load_prompts(data, tokenizer)[: config.evaluate.num_prompts]
        self._writer = None
        self._last: dict[str, float] = {}
        if runtime.is_main and self._prompts:
            self._writer = JsonLinesWriter(runtime.run_dir / EVALUATIONS_FILE, start or None)
            self._last = {name: value for name, value in (self._writer.last or {}).items() if name != "step"}

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after this step."""
        every = self._config.evaluate.every_steps
        return step == self._config.steps or (every is not None and step % every == 0)

    def run(self, step: int) -> dict[str, Any]:
        """`eval/...` metrics of the weights after `step` (0: as loaded); {} without evaluation data."""
        if not self._prompts:
            return {}
        place = GeneratorPlace.of_this_rank(self._config.rollout.tp)
        with self._phases.within("evaluate"):
            local = evaluate_prompts(
                self._engine, self._tokenizer, self._prompts[place.replica :: place.num_replicas], self._config.evaluate,
                self._scorer, self._sampling,
            )  # fmt: skip
        wait_for_all("rollout", f"the evaluation after step {step}")
        metrics = self._merged(local, contributes=place.is_first).metrics()
        if self._writer is not None:
            self._writer.write({"step": step, **metrics})
        self._runtime.note(f"evaluation after step {step}: accuracy {metrics['eval/accuracy']:.3f}")
        self._last = metrics
        return metrics

    def summary(self) -> dict[str, float]:
        """The last evaluation's figures (rank 0's are right after a restart too)."""
        return self._last

    @staticmethod
    def _merged(local: EvaluationResult, *, contributes: bool) -> EvaluationResult:
        if dist.get_world_size() == 1:
            return local
        parts: list[EvaluationResult | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, local if contributes else None)
        return merge_results([part for part in parts if part is not None])
