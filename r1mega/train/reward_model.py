"""Optimizer steps and scores of a reward model: whole sequences packed, one score each, at its last token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from r1mega.algorithm.pairwise import pairwise_losses, pointwise_losses
from r1mega.checkpoint.hf import HFTensors, read_config
from r1mega.config.schema import ModelConfig, ParallelConfig
from r1mega.model.flops import Work, sequences_work
from r1mega.platform.groups import wait_for_all
from r1mega.train.heads import TokenScores
from r1mega.train.packing import Microbatch, build_microbatch, plan_packing
from r1mega.train.policy import Policy
from r1mega.train.trainer import Trainer, UpdateResult

Objective = Literal["pairwise", "pointwise"]


@dataclass(frozen=True, slots=True)
class PreferenceSample:
    """What is judged together. sequences: token ids of (chosen, rejected), or of one response.

    target: the margin of a pair; 1 for a safe response, 0 for an unsafe one. lengths: tokens of the scored texts alone.
    """

    sequences: tuple[tuple[int, ...], ...]
    target: float
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences))


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceMicrobatch(Microbatch):
    """wanted: [samples] float32, the target of each sample; rows are the last tokens of their sequences."""

    wanted: torch.Tensor


@dataclass(frozen=True, slots=True)
class PreferenceResult:
    """Means over the step's samples on all ranks. accuracy: pairs in order, or responses on the right side of 0. work: of
    the forward pass, over all ranks.
    """

    update: UpdateResult[torch.Tensor]
    loss: float
    accuracy: float
    work: Work


def preference_step(
    trainer: Trainer, samples: Sequence[PreferenceSample], indices: Sequence[int], objective: Objective, capacity: int
) -> PreferenceResult:
    """One optimizer step on the mean loss of the samples with these indices; every rank takes its share of them."""
    policy = trainer.policy
    batches = _share(policy, samples, indices, capacity)

    def loss(batch: PreferenceMicrobatch, scores: TokenScores) -> tuple[torch.Tensor, torch.Tensor]:
        values, wanted = scores.values, batch.wanted
        if objective == "pairwise":
            chosen, rejected = values.view(-1, 2).unbind(1)
            losses, right = pairwise_losses(chosen, rejected, wanted), chosen > rejected
        else:
            losses, right = pointwise_losses(values, wanted), (values > 0) == (wanted > 0.5)
        sums = torch.stack([losses.detach().sum().double(), right.sum().double()])
        return losses.sum() / len(indices), sums

    width = 2 if objective == "pairwise" else 1
    result = trainer.update(batches, loss, total_response_tokens=width * len(indices))
    parts = [part.cpu() for part in result.statistics] if policy.reports else []
    sums = torch.stack([torch.zeros(2, dtype=torch.float64), *parts]).sum(0)
    dist.all_reduce(sums)
    mean_loss, accuracy = (sums / len(indices)).tolist()
    work = sequences_work((len(sequence), 0) for i in indices for sequence in samples[i].sequences)
    return PreferenceResult(result, mean_loss, accuracy, work)


def preference_scores(policy: Policy, samples: Sequence[PreferenceSample], capacity: int) -> torch.Tensor:
    """[samples, 1 or 2] float64 scores, on every rank. A collective call."""
    batches = _share(policy, samples, range(len(samples)), capacity)
    mine: dict[int, list[float]] = {}
    for batch, scores in zip(batches, policy.scores(batches), strict=False):
        if batch.sample_indices:
            rows = scores.values.double().cpu().view(len(batch.sample_indices), -1).tolist()
            mine |= dict(zip(batch.sample_indices, rows, strict=True))
    everyone: list[dict[int, list[float]]] = [mine]
    if dist.get_world_size() > 1:
        everyone = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
    merged = {index: row for part in everyone for index, row in part.items()}
    return torch.tensor([merged[index] for index in range(len(samples))], dtype=torch.float64)


class ShardedRewardModel:
    """A reward model that the stage `reward_model` exported, in the trainer's parallel layout, for scoring alone. On a
    GPU its weights stay in host memory between calls. Making one is a collective call.
    """

    def __init__(self, directory: Path, model: ModelConfig, parallel: ParallelConfig, capacity: int) -> None:
        changes = {"path": directory, "log_probs": "logits", "mtp_loss_coefficient": 0.0, "recompute": "none"}
        self._policy = Policy(
            model.model_copy(update=changes), read_config(directory), parallel, seed=0, scalar_head=True
        )
        self._policy.load_hf(HFTensors(directory))
        self._capacity = capacity
        self._move(torch.device("cpu"))

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """A score for each of this rank's sequences. A collective call: what all ranks have is shared among them."""
        wait_for_all("rollout", "the responses that a reward model is to score")
        everyone: list[list[Sequence[int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, list(sequences))
        distinct = sorted({tuple(sequence) for part in everyone for sequence in part})
        if not distinct:
            return []
        samples = [PreferenceSample((sequence,), 0.0, ()) for sequence in distinct]
        self._move(self._policy.device)
        scores = preference_scores(self._policy, samples, self._capacity)[:, 0].tolist()
        self._move(torch.device("cpu"))
        known = dict(zip(distinct, scores, strict=True))
        return [known[tuple(sequence)] for sequence in sequences]

    def _move(self, device: torch.device) -> None:
        for chunk in self._policy.chunks:
            chunk.to(device)


def _share(
    policy: Policy, samples: Sequence[PreferenceSample], indices: Sequence[int], capacity: int
) -> list[PreferenceMicrobatch]:
    """This replica's microbatches; all replicas have equally many."""
    lengths = [sample.num_tokens for sample in samples]
    plan = plan_packing(
        lengths, [indices], capacity, policy.num_replicas, policy.microbatch_multiple, policy.min_microbatches
    )
    return [_pack([samples[i] for i in members], members) for members in plan.bins[0][policy.replica]]


def _pack(members: Sequence[PreferenceSample], indices: Sequence[int]) -> PreferenceMicrobatch:
    """One packed row; a sample's sequences follow each other, and `rows` are the last tokens of all sequences."""
    sequences = [list(sequence) for member in members for sequence in member.sequences]
    packed = build_microbatch(sequences, [len(s) for s in sequences], indices)
    last = packed.cu_seqlens[1 : len(sequences) + 1].long() - 1
    packed = dataclasses.replace(
        packed, rows=last, targets=packed.tokens[last], sequence_ids=torch.arange(len(sequences))
    )
    wanted = torch.tensor([member.target for member in members], dtype=torch.float32)
    return packed.carrying(PreferenceMicrobatch, wanted=wanted)
