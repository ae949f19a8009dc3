"""Stage `base`: the nano base model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from r1mega.config.schema import NonNegative, Positive, PositiveInt, Section, TrainingStage


class NanoTask(Section):
    """The nano task (data/nano.py): how much of it to make."""

    num_train_prompts: PositiveInt = 4096
    num_eval_prompts: PositiveInt = 256
    num_general: PositiveInt = (
        768  # requests that are no puzzles (data/nano_general.py): for SFT, preferences and align
    )
    num_general_eval: PositiveInt = 64


class NanoBaseStage(TrainingStage):
    """Makes the nano base model: task, tokenizer, corpus, pre-training from scratch, HF export."""

    stage: Literal["base"]
    task: NanoTask = NanoTask()
    steps: PositiveInt = 1800  # optimizer steps, one packed microbatch a data-parallel rank each
    microbatch_tokens: PositiveInt = 1024  # packing target
    prompt_loss_weight: NonNegative = 0.1
    init_std: Positive = 0.05
    metrics_every_steps: PositiveInt = 20

    def is_finished_at(self, step: int) -> bool:
        return step == self.steps

    def problems(self, hf: dict[str, Any], world: int) -> Iterator[str]:
        if self.microbatch_tokens < 96:
            yield f"microbatch_tokens = {self.microbatch_tokens}: a sample of the nano corpus has up to 96 tokens"
