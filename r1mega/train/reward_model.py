"""Optimizer steps and scores of a reward model: whole sequences packed, one score each, at its last token."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
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
from r1mega.train.sample_exchange import gather_places, gather_rows, run_rounds
from r1mega.train.sample_plan import BUFFER_BYTES, TOKEN_BYTES, Want, plan_rounds, ranks_by
from r1mega.train.trainer import Trainer, UpdateResult

Objective = Literal["pairwise", "pointwise"]
_Key = tuple[int, int, int]
"""(length, digest) of a sequence."""
_Shares = tuple[tuple[tuple[int, ...], ...], ...]
"""Microbatches of each replica, as places of samples."""


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
    share = _shares(policy, [sample.num_tokens for sample in samples], indices, capacity)[policy.replica]
    batches = [_pack([samples[i] for i in places], places) for places in share]

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
    result = trainer.update(batches, loss, total_response_tokens=width * len(indices), entropies=False)
    parts = [part.cpu() for part in result.statistics] if policy.reports else []
    sums = torch.stack([torch.zeros(2, dtype=torch.float64), *parts]).sum(0)
    dist.all_reduce(sums)
    mean_loss, accuracy = (sums / len(indices)).tolist()
    work = sequences_work((len(sequence), 0) for i in indices for sequence in samples[i].sequences)
    return PreferenceResult(result, mean_loss, accuracy, work)


def preference_scores(policy: Policy, samples: Sequence[PreferenceSample], capacity: int) -> torch.Tensor:
    """[samples, 1 or 2] float64 scores, on every rank. A collective call."""
    share = _shares(policy, [sample.num_tokens for sample in samples], range(len(samples)), capacity)[policy.replica]
    batches = [_pack([samples[i] for i in places], places) for places in share]
    return _scores(policy, batches, len(samples), len(samples[0].sequences))


def _scores(policy: Policy, batches: Sequence[PreferenceMicrobatch], num_samples: int, width: int) -> torch.Tensor:
    """[num_samples, width] of all replicas' batches, `width` sequences a sample, on every rank."""
    found = torch.zeros(num_samples, width, dtype=torch.float64)
    for batch, scores in zip(batches, policy.scores(batches), strict=False):
        if policy.reports and batch.sample_indices:
            found[list(batch.sample_indices)] = scores.values.double().cpu().view(-1, width)
    dist.all_reduce(found)
    return found


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
        self._capacity, self._places = capacity, gather_places(self._policy, dist.get_rank())
        self._move(torch.device("cpu"))

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """A score for each of this rank's sequences. A collective call: what all ranks have is shared among them, each
        sequence once, and goes to the ranks that score it, as samples go to those that train on them.
        """
        wait_for_all("rollout", "the responses that a reward model is to score")
        mine = [_key(sequence) for sequence in sequences]
        holders = self._holders(set(mine))
        if not holders:
            return []
        keys = list(holders)
        shares = _shares(self._policy, [length for length, *_ in keys], range(len(keys)), self._capacity)
        here = self._fetch(holders, dict(zip(mine, sequences, strict=True)), shares)
        batches = [
            _pack([PreferenceSample((here[i],), 0.0, ()) for i in places], places)
            for places in shares[self._policy.replica]
        ]
        self._move(self._policy.device)
        scores = _scores(self._policy, batches, len(keys), 1)[:, 0].tolist()
        self._move(torch.device("cpu"))
        known = dict(zip(keys, scores, strict=True))
        return [known[key] for key in mine]

    @staticmethod
    def _holders(mine: set[_Key]) -> dict[_Key, np.ndarray]:
        """The ranks that have each distinct sequence; in an order that does not depend on who has it."""
        ranks: dict[_Key, list[int]] = {}
        for rank, rows in enumerate(gather_rows(np.array(sorted(mine), dtype=np.int64).reshape(-1, 3))):
            for length, first, second in rows.tolist():
                ranks.setdefault((length, first, second), []).append(rank)
        return {key: np.array(ranks[key]) for key in sorted(ranks)}

    def _fetch(
        self, holders: Mapping[_Key, np.ndarray], own: Mapping[_Key, Sequence[int]], shares: _Shares
    ) -> dict[int, tuple[int, ...]]:
        """The sequences that this rank scores, by their places among all."""
        keys, replicas, wants = list(holders), ranks_by("replica", self._places), {}
        for replica, bins in enumerate(shares):
            ranks = replicas[replica]
            for place in (place for places in bins for place in places):
                num_bytes = np.full(len(ranks), TOKEN_BYTES * keys[place][0])
                wants[place] = Want(holders[keys[place]], ranks, num_bytes)
        here = {
            place: tuple(own[keys[place]])
            for places in shares[self._policy.replica]
            for place in places
            if keys[place] in own
        }

        def pack(place: int, _target: int) -> list[np.ndarray]:
            return [np.asarray(own[keys[place]], dtype=np.int32)]

        def unpack(place: int, octets: np.ndarray) -> None:
            here[place] = tuple(octets.copy().view(np.int32).tolist())

        rounds = plan_rounds(wants, dist.get_rank(), len(self._places), BUFFER_BYTES)
        run_rounds(rounds, pack, unpack, lambda place, _rank: TOKEN_BYTES * keys[place][0])
        return here

    def _move(self, device: torch.device) -> None:
        for chunk in self._policy.chunks:
            chunk.to(device)


def _key(sequence: Sequence[int]) -> _Key:
    """Of a sequence, wherever it is."""
    digest = hashlib.blake2b(np.asarray(sequence, dtype=np.int32).tobytes(), digest_size=16).digest()
    return (len(sequence), *np.frombuffer(digest, dtype="<i8").tolist())


def _shares(policy: Policy, lengths: Sequence[int], indices: Sequence[int], capacity: int) -> _Shares:
    """The microbatches of each replica, as indices of samples; all replicas have equally many."""
    return plan_packing(
        lengths, [indices], capacity, policy.num_replicas, policy.microbatch_multiple, policy.min_microbatches
    ).bins[0]


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
