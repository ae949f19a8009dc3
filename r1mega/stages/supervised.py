"""The loop of the supervised stages (base, sft, distill): steps, metrics, checkpoints, orderly stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from r1mega.config.model_files import HFConfig
from r1mega.model.flops import ModelFlops, Work, model_flops
from r1mega.stages.runtime import Runtime
from r1mega.train.supervised import WeightedMicrobatch, supervised_step
from r1mega.train.trainer import Trainer


class SupervisedLoop:
    """Trains a policy from step `start` (done) to `steps`."""

    def __init__(
        self,
        runtime: Runtime,
        trainer: Trainer,
        hf_config: HFConfig,
        start: int,
        steps: int,
        metrics_every_steps: int,
    ):
        self._runtime, self._trainer, self._flops = runtime, trainer, model_flops(hf_config)
        self._has_mtp_loss = bool(trainer.policy.megatron_config.mtp_num_layers)
        self._steps, self._metrics_every_steps = steps, metrics_every_steps
        self._start = start

    def run(self, batches: Iterator[Sequence[WeightedMicrobatch]], measure: Callable[[int], dict[str, float]]) -> None:
        """One optimizer step an item of `batches` (this rank's share). Raises Stopped when asked to stop before the end.

        measure: further metrics of the step just done, asked for on every step. A step has its line in metrics.jsonl when it
        is one of every `metrics_every_steps`, the last, or has such metrics.
        """
        runtime = self._runtime
        for step in runtime.steps(self._trainer, self._start, self._steps):
            with runtime.timer.phase("update"):
                result = supervised_step(self._trainer, next(batches))
            further = measure(step)
            if further or step % self._metrics_every_steps == 0 or step == self._steps:
                times = runtime.timer.finish_step()
                metrics = {
                    "train/loss": result.loss,
                    "policy/grad_norm": result.update.grad_norm,
                    "policy/skipped_updates": float(result.update.skipped),
                    "policy/learning_rate": result.update.lr,
                    "expert/load_max_over_mean": result.update.expert_load,
                    "tokens/update_per_second": result.work.tokens / times["time/update_seconds"],
                    **work_metrics(self._flops, result.work, mtp_loss=self._has_mtp_loss),
                }
                runtime.write_metrics(step, metrics | times | further)


def work_metrics(flops: ModelFlops, work: Work, *, mtp_loss: bool = False) -> dict[str, float]:
    """Of a step that is one update: its tokens and model FLOPs, over all ranks (`work`: of one forward pass)."""
    total = flops.training(work, mtp_loss=mtp_loss)
    tokens = float(work.tokens)
    return {"tokens/update": tokens, "tokens/step": tokens, "perf/update_flops": total, "perf/step_flops": total}
