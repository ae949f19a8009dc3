"""Sections of the stages that make data (cold_start, rejection_sampling): filters, duplicates, contamination, the mix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from r1mega.config.layout import generator_problems
from r1mega.config.precision import vllm_precision_problems
from r1mega.config.rewards import RewardConfig
from r1mega.config.schema import DataConfig, NonNegativeInt, PartialRollouts, PositiveInt, RolloutConfig, Section, Stage
from r1mega.config.validate import context_problems, missing_file_problems, weights_problems

Share = Annotated[float, Field(ge=0, le=1)]


class FilterConfig(Section):
    """What a response must be to become data. Filters run in this order; the data card tells what each one took.

    The paper names the kinds (mixed languages, long paragraphs, code blocks in the reasoning); the limits are our choice.
    """

    truncated: bool = True  # out: responses that were cut at rollout.max_response_tokens
    min_parts: dict[str, float] = {"accuracy": 1.0, "format": 1.0}
    # reward parts that must reach so much, where the prompt's kind has them; a reward without a value is out
    min_tokens: NonNegativeInt = 0
    max_tokens: PositiveInt | None = None
    unreadable: bool = (
        True  # out: control and replacement characters, tags inside the reasoning, no letter or digit in it
    )
    mixed_language: bool = True  # out: reasoning in several scripts
    min_language_share: Share = 0.0  # of the words of the reasoning, in the prompt's language
    max_paragraph_chars: PositiveInt | None = 4000  # of the reasoning
    code_blocks: bool = True  # out: code blocks in the reasoning
    repetition_ngram: PositiveInt = 10  # words
    max_repeated_share: Share = 0.2  # of the response's n-grams that occurred before in it


class DuplicateConfig(Section):
    """Near-duplicates by the Jaccard similarity of word n-grams of question and response."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8  # as similar as this is a duplicate
    ngram: PositiveInt = 5
    num_permutations: PositiveInt = 128


class DecontaminationConfig(Section):
    """A sample that shares an n-gram of words with an evaluation question is out (paper: 10-grams), and one whose question
    holds all of a shorter one.
    """

    files: tuple[Path, ...] = ()  # in any form that stage `evaluate` reads (data/contamination.py)
    ngram: PositiveInt = 10


class GeneralConfig(Section):
    """Data that is not reasoning, merged in: SFT lines (data/sft.py)."""

    files: tuple[Path, ...] = ()
    share: Annotated[float, Field(ge=0, lt=1)] = 0.25  # of the result (paper: 200k of 800k)


class DataFactoryStage(Stage):
    """Samples from a checkpoint, and what is kept of them. No training."""

    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()  # group_size: samples a prompt; num_prompts: prompts sampled together
    reward: RewardConfig = RewardConfig()
    filters: FilterConfig = FilterConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    decontaminate: DecontaminationConfig = DecontaminationConfig()
    max_prompts: PositiveInt | None = None  # None: all; else a seeded choice
    max_per_prompt: PositiveInt = 4  # samples that may stay of one prompt
    licences: dict[str, str] = {}  # of data files, for the card

    def prompt_data(self) -> list[DataConfig]:
        return [self.data]

    def problems(self, hf: dict[str, Any], world: int) -> Iterator[str]:
        """See Stage. Weights, lengths, files, generator and rewards."""
        yield from weights_problems(self.model.path, hf)
        yield from context_problems(hf, self.data, self.rollout)
        files = [("data.prompts", path) for path in self.data.prompts]
        yield from missing_file_problems(
            [*files, *(("decontaminate.files", path) for path in self.decontaminate.files)]
        )
        yield from self.reward.problems(self.rollout.max_response_tokens)
        yield from generator_problems(self.rollout, world, hf, together=False)
        yield from vllm_precision_problems(self.rollout)
        if self.rollout.quantization is not None:
            yield (
                f"rollout.quantization = {self.rollout.quantization} is of RL, which quantises weights as it pushes them; "
                f"stage {self.stage} reads them from model.path in model.dtype; leave it out"
            )
        if self.rollout.partial != PartialRollouts():
            yield "rollout.partial is of RL, whose steps it ends; leave it out"
        if self.rollout.max_kept_ids != RolloutConfig().max_kept_ids:
            yield "rollout.max_kept_ids is of RL, whose trainer is told which ids were kept; leave it out, or set rollout.top_k"
