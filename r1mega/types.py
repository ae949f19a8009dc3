"""Records that pass between the stages, in the order in which the data flows.

Prompt -> GenerationRequest -> Response -> RolloutGroup -> Reward -> TrainingSample -> (packing) Microbatch
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file, rendered and tokenised.

    answers: the accepted golds (at least one for verifiable kinds). language: target language of the chain of thought
    (ISO 639-1) or None. metadata: the other keys of the line (tests, constraints, ...), untouched.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    language: str | None
    token_ids: tuple[int, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to sample. stop_token_ids end a response and belong to it; max_tokens bounds it (tokens)."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`num_samples` responses to one prompt. The seed alone (with the sampling settings) determines them."""

    prompt_token_ids: tuple[int, ...]
    num_samples: int
    seed: int
    sampling: SamplingSettings


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response. log_probs: of each sampled token under the distribution it was drawn from.

    finish_reason: 'stop' (a stop token or string) or 'length' (max_tokens reached: truncated). routed_experts: [prompt +
    response - 1, MoE layers, top-k], the experts that the generator chose at each position it processed, when router
    replay asks for them.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    routed_experts: np.ndarray | None = field(default=None, repr=False, compare=False)


class RewardStatus(enum.StrEnum):
    """A status is not a score: only `OK` carries a value that may be trained on."""

    OK = "ok"
    FAILED = "failed"  # the infrastructure failed (worker died, time-out not caused by the answer); excluded
    UNJUDGED = "unjudged"  # a judge gave no parsable verdict; excluded


@dataclass(frozen=True, slots=True)
class Reward:
    """value: weighted sum of parts (None unless status is OK); parts: unweighted, by name; reason: for a person."""

    value: float | None
    parts: Mapping[str, float]
    status: RewardStatus
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The responses to one prompt, their texts and rewards, and the policy version that sampled them."""

    prompt: Prompt
    responses: tuple[Response, ...]
    texts: tuple[str, ...]
    rewards: tuple[Reward, ...]
    policy_version: int


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSample:
    """One response ready for the update.

    token_ids: [prompt + response] int32; advantage: the same for every response token; sampler_log_probs: [response]
    float32, as the generator reported them (of token_ids[prompt_length:]). routed_experts: see `Response`.
    """

    token_ids: np.ndarray
    prompt_length: int
    advantage: float
    sampler_log_probs: np.ndarray
    routed_experts: np.ndarray | None = None

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length
