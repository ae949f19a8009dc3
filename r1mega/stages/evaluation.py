"""Evaluation inside the RL loop: before the first step, after the last, and every so many between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from r1mega.config.schema import DataConfig
from r1mega.config.stages.rl import RLStage
from r1mega.data.prompts import load_prompts
from r1mega.evaluate.result import EvaluationResult, merge_results
from r1mega.evaluate.run import evaluate_prompts
from r1mega.observe.files import JsonLinesWriter
from r1mega.platform.groups import wait_for_all
from r1mega.stages.runtime import Runtime

if TYPE_CHECKING:
    from r1mega.stages.rl import RLTrainer

EVALUATIONS_FILE = "evaluations.jsonl"


class Evaluation:
    """Grades the policy on prompts that it is not trained on; writes RUN_DIR/evaluations.jsonl.

    Generator replicas share the prompts. Nothing is drawn from the training's random numbers, so a run with another
    evaluation is the same run.
    """

    def __init__(self, config: RLStage, trainer: RLTrainer, runtime: Runtime):
        self._config, self._trainer, self._runtime = config, trainer, runtime
        self._prompts = ()
        if config.evaluate.data is not None:
            data = DataConfig.model_validate(config.data.model_dump() | {"prompts": (config.evaluate.data,)})
            self._prompts = load_prompts(data, trainer.tokenizer)[: config.evaluate.num_prompts]
        self._writer = None
        self._last: dict[str, float] = {}
        if runtime.is_main and self._prompts:
            resume = trainer.start if trainer.start else None
            self._writer = JsonLinesWriter(runtime.run_dir / EVALUATIONS_FILE, resume)
            self._last = {name: value for name, value in (self._writer.last or {}).items() if name != "step"}

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after this step."""
        every = self._config.evaluate.every_steps
        return step == self._config.steps or (every is not None and step % every == 0)

    def run(self, step: int) -> dict[str, Any]:
        """`eval/...` metrics of the weights after `step` (0: as loaded); {} without evaluation data."""
        if not self._prompts:
            return {}
        trainer, tp = self._trainer, self._config.rollout.tp
        replica, num_replicas = dist.get_rank() // tp, dist.get_world_size() // tp
        local = evaluate_prompts(
            trainer.engine, trainer.tokenizer, self._prompts[replica::num_replicas], self._config.evaluate,
            trainer.scorer, trainer.sampling,
        )  # fmt: skip
        wait_for_all("rollout", f"the evaluation after step {step}")
        metrics = self._merged(local, contributes=dist.get_rank() % tp == 0).metrics()
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
