"""Scored groups -> training samples -> what the loss needs of each microbatch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch

from r1mega.algorithm.grpo import PolicyTokens, token_weights
from r1mega.config.stages.rl import AlgorithmConfig
from r1mega.train.packing import Microbatch, build_microbatch
from r1mega.types import KeptIds, RolloutGroup, SampleSummary, TrainingSample
from r1mega_kernels import group_advantage


def training_samples(groups: Sequence[RolloutGroup], algorithm: AlgorithmConfig) -> list[TrainingSample]:
    """The responses that carry loss, with their advantages.

    A response whose reward has no value is left out of its group altogether. With `mask_truncated`, a truncated one
    counts in its group's mean and std but carries no loss.
    """
    scored = [
        [
            (response, reward.value)
            for response, reward in zip(group.responses, group.rewards, strict=True)
            if reward.value is not None
        ]
        for group in groups
    ]
    rewards = [reward for members in scored for _, reward in members]
    advantages = _advantages(rewards, [0, *itertools.accumulate(map(len, scored))], algorithm).tolist()
    flat = [(place, response) for place, members in enumerate(scored) for response, _ in members]
    samples, last = [], None
    for (place, response), reward, advantage in zip(flat, rewards, advantages, strict=True):
        if not response.token_ids or (algorithm.mask_truncated and response.finish_reason == "length"):
            continue
        group, prompt = groups[place], groups[place].prompt.token_ids
        samples.append(
            TrainingSample(
                token_ids=np.asarray(prompt + response.token_ids, dtype=np.int32),
                prompt_length=len(prompt),
                advantage=advantage,
                sampler_log_probs=np.asarray(response.log_probs, dtype=np.float32),
                routed_experts=response.routed_experts,
                reward=reward,
                opens_group=place != last,
                slot=group.slot,
                kept=response.kept,
            )
        )
        last = place
    return samples


def _advantages(rewards: Sequence[float], offsets: Sequence[int], algorithm: AlgorithmConfig) -> torch.Tensor:
    """[R] of rewards whose groups are rewards[offsets[g]:offsets[g + 1]]."""
    values = torch.tensor(rewards, dtype=torch.float64)
    if algorithm.baseline == "none":
        return values
    return group_advantage(
        values, torch.tensor(offsets), baseline=algorithm.baseline,
        scale="group" if algorithm.normalize_std else "none", epsilon=algorithm.std_epsilon,
    )  # fmt: skip


Known = Sequence[SampleSummary | TrainingSample]
"""All samples of a step, by what every rank knows of them."""


class Samples(Protocol):
    """Samples by their places in the step, those that this rank has: a list, or `StepSamples`."""

    def __getitem__(self, index: int, /) -> TrainingSample: ...


def step_advantages(samples: Known, algorithm: AlgorithmConfig, penalties: torch.Tensor | None = None) -> list[float]:
    """The samples' advantages once all samples of the step are known, in the order of their groups' slots.

    penalties: [samples] that are taken from the rewards first (KL in the reward); the group is then of those samples that
    carry loss. `whiten`: (A - mean) / (std + epsilon) over all response tokens of the step (REINFORCE++); equal ones to 0.
    """
    advantages = torch.tensor([sample.advantage for sample in samples], dtype=torch.float64)
    if penalties is not None:
        rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64) - penalties
        opening = [place for place, sample in enumerate(samples) if sample.opens_group]
        advantages = _advantages(rewards.tolist(), [*opening, len(samples)], algorithm).double()
    if algorithm.whiten and (advantages == advantages[0]).all():
        advantages = torch.zeros_like(advantages)  # not rounding over rounding, nor 0 / 0
    elif algorithm.whiten:
        share = torch.tensor([sample.response_length for sample in samples], dtype=torch.float64)
        share /= share.sum()
        centred = advantages - (share * advantages).sum()
        advantages = centred / ((share * centred**2).sum().sqrt() + algorithm.std_epsilon)
    return advantages.tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyMicrobatch(Microbatch):
    """Responses with what their loss needs; further fields are [R] float32, of each response token.

    advantages; weights: its share of the minibatch's loss; log-probs under the policy that sampled (as the generator gave
    them), under the weights before the step's updates, under the reference (None: no KL term).
    """

    _row_fields: ClassVar[tuple[str, ...]] = (
        *Microbatch._row_fields, "advantages", "weights", "sampler_log_probs", "old_log_probs", "reference_log_probs",
    )  # fmt: skip

    advantages: torch.Tensor
    weights: torch.Tensor
    sampler_log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    reference_log_probs: torch.Tensor | None = None

    @property
    def policy_tokens(self) -> PolicyTokens:
        """As `grpo_loss` takes them."""
        return PolicyTokens(
            advantages=self.advantages,
            old_log_probs=self.old_log_probs,
            sampler_log_probs=self.sampler_log_probs,
            reference_log_probs=self.reference_log_probs,
            weights=self.weights,
            sequence_ids=self.sequence_ids,
            num_sequences=len(self.sample_indices),
        )


def pack_samples(samples: Samples, indices: Sequence[int]) -> Microbatch:
    """One microbatch of the samples with these indices."""
    members = [samples[i] for i in indices]
    routed = [m.routed_experts for m in members if m.routed_experts is not None]
    return build_microbatch(
        [m.token_ids.tolist() for m in members], [m.prompt_length for m in members], indices, routed or None,
        [m.kept or KeptIds.whole(m.response_length) for m in members] if any(m.kept for m in members) else None,
    )  # fmt: skip


def pack_for_loss(samples: Samples, indices: Sequence[int], weights: dict[int, float]) -> PolicyMicrobatch:
    """`pack_samples` for GRPO. weights: the loss weight of one token of each sample (by index). The old log-probs are the
    sampler's, until others are put in their place.
    """
    packed, members = pack_samples(samples, indices), [samples[i] for i in indices]

    def per_token(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)[packed.sequence_ids]

    sampler = torch.from_numpy(np.concatenate([m.sampler_log_probs for m in members] or [np.zeros(0, np.float32)]))
    return packed.carrying(
        PolicyMicrobatch,
        advantages=per_token([m.advantage for m in members]),
        weights=per_token([weights[i] for i in indices]),
        sampler_log_probs=sampler,
        old_log_probs=sampler,
    )


def minibatch_weights(samples: Known, indices: Sequence[int], aggregation: str, max_tokens: int) -> dict[int, float]:
    """The loss weight of one response token of each sample of a minibatch; they sum to 1 as `token_weights` says."""
    lengths = torch.tensor([samples[i].response_length for i in indices])
    return dict(zip(indices, token_weights(lengths, aggregation, max_tokens).tolist(), strict=True))
