"""Stages `sft` and `distill`: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from r1mega.config.model_files import context_length
from r1mega.config.schema import NonNegative, OptimizerConfig, Positive, PositiveInt, Section, TrainingStage
from r1mega.config.validate import holds_weights, missing_file_problems, tokenizer_problems


class SFTOptimizer(OptimizerConfig):
    """The paper's: a cosine from 5e-5 to 5e-6."""

    lr: Positive = 5e-5
    min_lr: NonNegative = 5e-6
    schedule: Literal["constant", "linear", "cosine"] = "cosine"


class DistillOptimizer(SFTOptimizer):
    """The paper's for its 1.5B student (2e-5 for 70B), down to a tenth."""

    lr: Positive = 1e-4
    min_lr: NonNegative = 1e-5


class SFTData(Section):
    """Files of samples (data/sft.py says what a line is)."""

    files: tuple[Path, ...]
    template: str = "r1_zero"  # for lines without the key
    max_tokens: PositiveInt = 32768  # paper: the context of SFT
    on_bad_line: Literal["error", "skip"] = "error"
    on_long: Literal["error", "skip"] = "error"


class HeldOut(Section):
    """Samples that are measured and not trained on."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    every_steps: PositiveInt | None = None  # None: after each epoch


class SFTStage(TrainingStage):
    """Fine-tuning on responses; from weights, or from scratch when model.path holds none and init_std is given."""

    stage: Literal["sft"]
    data: SFTData
    tokenizer: Path | None = None  # an HF directory; None: model.path
    epochs: PositiveInt = 2  # paper: 2-3
    batch_size: PositiveInt = 128  # samples a step (paper)
    microbatch_tokens: PositiveInt = 32768  # packing target; with parallel.cp each of its ranks has 1/cp of them
    min_microbatches: PositiveInt | None = None
    # of a replica in an optimizer step, as far as there are samples; None: 2 * parallel.pp of a pipeline, else 1
    prompt_loss_weight: NonNegative = 0.0  # loss on responses only
    init_std: Positive | None = None
    held_out: HeldOut = HeldOut()
    metrics_every_steps: PositiveInt = 1
    optimizer: SFTOptimizer = SFTOptimizer()

    @property
    def tokenizer_path(self) -> Path:
        return self.tokenizer or self.model.path

    def problems(self, hf: dict[str, Any], world: int) -> Iterator[str]:
        """See Stage. Weights or init_std, data files, tokenizer and lengths."""
        yield from missing_file_problems(("data.files", path) for path in self.data.files)
        has_weights = holds_weights(self.model.path)
        if self.init_std is None and not has_weights:
            yield f"model.path = {self.model.path}: holds no *.safetensors; set init_std to start from scratch (0.02 is usual)"
        elif self.init_std is not None and has_weights:
            yield f"init_std = {self.init_std}: {self.model.path} holds weights; leave init_std out to start from them"
        if hf:
            yield from tokenizer_problems(self.tokenizer_path, hf)
        if self.microbatch_tokens < self.data.max_tokens:
            yield (
                f"microbatch_tokens = {self.microbatch_tokens} does not hold the longest sample, data.max_tokens = "
                f"{self.data.max_tokens}; raise it to at least that"
            )
        context = context_length(hf) if hf else None
        if context is not None and self.data.max_tokens > context:
            yield (
                f"data.max_tokens = {self.data.max_tokens}: the model's max_position_embeddings is {context}; lower it to at "
                f"most {context}"
            )


class DistillStage(SFTStage):
    """SFT of a dense student on the factory's data: the same code with the paper's figures for students."""

    stage: Literal["distill"]  # type: ignore[assignment]  # the same keys, and another name
    batch_size: PositiveInt = 64  # paper
    optimizer: DistillOptimizer = DistillOptimizer()
