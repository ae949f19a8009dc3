"""The samples of a step, drawn or read, and the microbatches that the packing makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from r1mega.config.layout import least_microbatches
from r1mega.config.schema import TrainingStage
from r1mega.config.stages.reward_model import RewardModelStage
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import SFTStage
from r1mega.errors import ConfigError
from r1mega.model.flops import Work, sequences_work
from r1mega.train.packing import plan_packing, split_minibatches

PACKED_MINIBATCHES = 2
"""How many of a step's minibatches are packed; the others are drawn from the same lengths."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of responses (of whole samples where there are no prompts apart): given ones, or lognormal by mean and
    coefficient of variation, clipped at the longest that the config allows. None: a quarter of that.
    """

    mean: float | None = None
    cv: float = 0.8
    given: tuple[int, ...] = ()
    prompt: int = 256

    def draw(self, count: int, longest: int, seed: int) -> list[int]:
        """`count` lengths of 1 to `longest`."""
        generator = np.random.default_rng(seed)
        if self.given:
            drawn = generator.choice(np.array([min(length, longest) for length in self.given]), count)
        else:
            variance = math.log(1 + self.cv**2)
            mean = math.log(self.mean or longest / 4) - variance / 2
            drawn = generator.lognormal(mean, math.sqrt(variance), count)
        return np.clip(np.rint(drawn), 1, longest).astype(int).tolist()


def read_lengths(path: Path) -> tuple[int, ...]:
    """One number a line. Raises ConfigError for another file."""
    try:
        lengths = tuple(int(line) for line in path.read_text().split())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--lengths {path}: wants one number of tokens a line ({error})") from error
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"--lengths {path}: wants numbers of tokens above 0, one a line")
    return lengths


@dataclass(frozen=True)
class Workload:
    """One step of a stage.

    samples: (prompt tokens, response tokens) of each; minibatches: optimizer steps; microbatches: of a replica in one of
    them; microbatch_tokens: the largest, before padding.
    """

    samples: tuple[tuple[int, int], ...]
    minibatches: int
    microbatches: int
    microbatch_tokens: int

    @property
    def tokens(self) -> int:
        return int(self.whole.tokens)

    @cached_property
    def whole(self) -> Work:
        """All samples of the step."""
        return sequences_work((prompt + response, response) for prompt, response in self.samples)

    @property
    def responses(self) -> list[int]:
        return [response for _, response in self.samples]


def replicas_work(config: TrainingStage, lengths: Lengths, gpus: int) -> Workload:
    """`workload` of a stage that is started on so many GPUs."""
    p = config.parallel
    multiple = p.pp if (p.vpp or 1) > 1 else 1
    return workload(config, lengths, max(1, gpus // (p.tp * p.pp * p.cp)), multiple)


def longest_drawn(config: TrainingStage) -> int:
    """Tokens of the longest response, of the longest sample where there are no prompts apart.

    Raises ConfigError for a stage that is not planned (`base`).
    """
    if isinstance(config, RLStage):
        return config.rollout.max_response_tokens
    if isinstance(config, SFTStage | RewardModelStage):
        return config.data.max_tokens
    raise ConfigError(
        f"a stage {config.stage} is not planned: its samples have no lengths to draw; plan one of RL, SFT or a reward model"
    )


def workload(config: TrainingStage, lengths: Lengths, replicas: int, multiple: int = 1) -> Workload:
    """Of a stage with these lengths on so many data-parallel replicas. multiple: of microbatches (interleaved pipelines)."""
    prompt, minibatches, least, longest, together = 0, 1, None, longest_drawn(config), 1
    if isinstance(config, RLStage):
        count = config.rollout.num_prompts * config.rollout.group_size
        capacity = config.update.microbatch_tokens
        prompt, minibatches = min(lengths.prompt, config.data.max_prompt_tokens), config.update.num_minibatches
        least = config.update.min_microbatches
    elif isinstance(config, SFTStage):
        count, capacity = config.batch_size, config.microbatch_tokens
        least = config.min_microbatches
    else:
        assert isinstance(config, RewardModelStage)
        together = 2 if config.objective == "pairwise" else 1  # a microbatch holds whole pairs
        count, capacity = config.batch_size, config.microbatch_tokens
    drawn = lengths.draw(count * together, longest, config.seed)
    whole = [prompt * together + sum(drawn[i : i + together]) for i in range(0, len(drawn), together)]
    parts = split_minibatches(count, minibatches, f"{config.seed}/plan")[:PACKED_MINIBATCHES]
    bins = plan_packing(
        whole, parts, capacity, replicas, multiple, least or least_microbatches(config.parallel.pp)
    ).bins
    sizes = [[sum(whole[i] for i in members) for members in rank] for part in bins for rank in part]
    return Workload(tuple((prompt, response) for response in drawn), minibatches, len(sizes[0]), max(map(max, sizes)))
