"""Supervised training (pre-training, SFT): packed samples with a loss weight a token, and one optimizer step on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist

from r1mega.model.flops import Work, sequences_work
from r1mega.train.heads import TokenScores
from r1mega.train.packing import Microbatch, build_microbatch
from r1mega.train.policy import Policy
from r1mega.train.trainer import Trainer, UpdateResult

from megatron.core import parallel_state  # isort: skip  (after the policy has prepared the platform)


@dataclass(frozen=True, slots=True)
class WeightedSample:
    """token_ids: [n]; weights: [n], the loss weight of each token (the first one is given, whatever its weight)."""

    token_ids: Sequence[int]
    weights: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedMicrobatch(Microbatch):
    """weights: [R] float32, the loss weight of each trained token."""

    _row_fields: ClassVar[tuple[str, ...]] = (*Microbatch._row_fields, "weights")

    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class SupervisedResult:
    """loss: mean cross-entropy a unit of weight, over all ranks (nats); work: of the forward pass, over all ranks."""

    update: UpdateResult[torch.Tensor]
    loss: float
    work: Work


def pack_weighted(samples: Sequence[WeightedSample], sample_indices: Sequence[int]) -> WeightedMicrobatch:
    """One microbatch of whole samples. Tokens of weight 0 are not trained: their logits are not even scored."""
    packed = build_microbatch([list(s.token_ids) for s in samples], [1] * len(samples), sample_indices)
    weights = torch.cat([torch.as_tensor(s.weights, dtype=torch.float32)[1:] for s in samples] or [torch.zeros(0)])
    counts = weights > 0
    if not bool(counts.all()):
        packed = dataclasses.replace(
            packed, rows=packed.rows[counts], targets=packed.targets[counts], sequence_ids=packed.sequence_ids[counts]
        )
    return packed.carrying(WeightedMicrobatch, weights=weights[counts])


def supervised_step(trainer: Trainer, batches: Sequence[WeightedMicrobatch]) -> SupervisedResult:
    """One optimizer step on the mean cross-entropy a unit of weight, over the microbatches of all data-parallel ranks.

    The loss of the multi-token-prediction layers is added when the model was built with them.
    """
    filled = [batch for batch in batches if batch.sample_indices]
    work = sequences_work((length, 0) for batch in filled for length in batch.cu_seqlens.diff().tolist())
    sums = torch.tensor(
        [
            sum(float(b.weights.sum()) for b in batches),
            sum(b.rows.numel() for b in batches),
            work.tokens,
            work.pairs,
        ],
        dtype=torch.float64,
    )
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    total_weight, total_rows, total_tokens, total_pairs = sums.tolist()

    def loss(batch: WeightedMicrobatch, scores: TokenScores) -> tuple[torch.Tensor, torch.Tensor]:
        value = -(scores.values * batch.weights).sum() / total_weight
        return value, torch.stack([value.detach().double() * total_weight, batch.weights.sum().double()])

    result = trainer.update(
        batches, loss, total_response_tokens=int(total_rows), mtp_loss=True, sums_over="tokens", entropies=False
    )
    return SupervisedResult(result, _weighted_mean(result.statistics), Work(total_tokens, total_pairs, total_rows))


def sample_losses(policy: Policy, batches: Sequence[WeightedMicrobatch]) -> list[torch.Tensor]:
    """[samples, 2] float64 a microbatch: the weighted sum of each sample's cross-entropies, and its weight. No update.

    [] off the last pipeline stage, as `Policy.scores`.
    """
    losses = []
    for batch, scores in zip(batches, policy.scores(batches), strict=False):
        weights = batch.weights.to(scores.values.device)
        terms = torch.stack([-(scores.values * weights).double(), weights.double()], dim=1)
        sums = torch.zeros(len(batch.sample_indices), 2, dtype=torch.float64, device=terms.device)
        losses.append(sums.index_add(0, batch.sequence_ids.to(terms.device), terms).cpu())
    return losses


def mean_loss(losses: Sequence[torch.Tensor]) -> float:
    """The mean a unit of weight of what `sample_losses` returned on every rank. A collective call."""
    return _weighted_mean([part.sum(0) for part in losses])


def _weighted_mean(parts: Sequence[torch.Tensor]) -> float:
    """Sum over sum: ranks that see copies of the same tokens count both alike, those without the loss add nothing."""
    total = torch.stack([torch.zeros(2, dtype=torch.float64), *(part.cpu() for part in parts)]).sum(0)
    dist.all_reduce(total)
    return float(total[0] / total[1]) if total[1] > 0 else math.nan
