"""Stage `reward_model`: a scalar head learns what people (or judges) prefer, or which responses are safe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from r1mega.config.model_files import context_length
from r1mega.config.schema import NonNegative, OptimizerConfig, PositiveInt, Section, TrainingStage
from r1mega.config.validate import missing_file_problems, weights_problems


class PreferenceData(Section):
    """JSONL of {"question", "chosen", "rejected", optional "margin"}, or of {"question", "response", "safe"}."""

    files: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()  # never trained on; evaluated
    template: str = "r1_zero"  # as data.template of the other stages; the export remembers it
    min_margin: NonNegative = 0.0  # pairs with a smaller stated margin are unclear and dropped (paper: they are)
    max_tokens: PositiveInt = 4096  # of prompt and text
    on_long: Literal["error", "skip"] = "error"


class PreferenceEvaluation(Section):
    """When held-out preferences are scored."""

    every_steps: PositiveInt | None = None  # None: before the first and after the last step only


class RewardModelStage(TrainingStage):
    """pairwise: -log sigmoid(chosen - rejected - margin) on pairs; pointwise: cross-entropy on safe and unsafe ones."""

    stage: Literal["reward_model"]
    objective: Literal["pairwise", "pointwise"] = "pairwise"
    reads: Literal["summary", "response"] | None = None
    # what of a response is scored: the text after the reasoning, or all of it. None: the paper's choice, summaries for
    # helpfulness (pairwise), whole responses for harmlessness (pointwise)
    margin: Literal["none", "stated"] = (
        "none"  # stated: the pair's own margin is asked for in the loss (0 where it has none)
    )
    batch_size: PositiveInt = 256  # pairs, or responses, an optimizer step (paper)
    num_epochs: PositiveInt = 1  # paper
    microbatch_tokens: PositiveInt = 16384  # packing target; with parallel.cp each of its ranks has 1/cp of them
    data: PreferenceData
    evaluate: PreferenceEvaluation = PreferenceEvaluation()
    optimizer: OptimizerConfig = OptimizerConfig(lr=6e-6)  # paper

    @property
    def text_read(self) -> Literal["summary", "response"]:
        return self.reads or ("summary" if self.objective == "pairwise" else "response")

    @property
    def longest(self) -> int:
        """Tokens of what a microbatch has to hold: a pair, or a response."""
        return self.data.max_tokens * (2 if self.objective == "pairwise" else 1)

    def problems(self, hf: dict[str, Any], world: int) -> Iterator[str]:
        """See Stage. Weights, data files and lengths."""
        yield from weights_problems(self.model.path, hf)
        files = [("data.files", self.data.files), ("data.held_out", self.data.held_out)]
        yield from missing_file_problems([(key, path) for key, paths in files for path in paths])
        if self.microbatch_tokens < (longest := self.longest):
            yield (
                f"microbatch_tokens = {self.microbatch_tokens} does not hold the longest "
                f"{'pair, 2 * ' if self.objective == 'pairwise' else 'response, '}data.max_tokens = {longest}; raise it"
            )
        context = context_length(hf) if hf else None
        if context is not None and self.data.max_tokens > context:
            yield f"data.max_tokens = {self.data.max_tokens}: the model's max_position_embeddings is {context}"
        if self.model.mtp_loss_coefficient:
            yield "model.mtp_loss_coefficient: a reward model predicts no tokens; leave it at 0"
        if self.objective == "pointwise" and self.margin != "none":
            yield "margin = stated: only pairs have margins; set objective=pairwise"
        if self.batch_size < world:
            yield f"batch_size = {self.batch_size} leaves some of the {world} processes without work; raise it"
