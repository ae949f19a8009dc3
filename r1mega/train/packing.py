"""Samples -> minibatches -> microbatches: a pure, printable plan, then packed (thd) tensors.

The plan sees lengths only. Every rank computes it from the same lengths and so knows, without talking, which samples
it trains on. A sample is never split; a microbatch is a concatenation of whole samples.
"""

from __future__ import annotations

import bisect
import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch

from r1mega.errors import ConfigError
from r1mega.types import KeptIds


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """bins[minibatch][rank][microbatch] -> indices of samples. Every rank has equally many microbatches, a multiple of
    what was asked for.

    fill_fraction: real tokens over (microbatches * the largest microbatch of their minibatch): what fixed-size
    microbatches would waste.
    """

    bins: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    fill_fraction: float


def best_fit(lengths: Sequence[int], indices: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each sample goes into the fullest bin that still holds it. Deterministic."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        slot = bisect.bisect_left(free, (lengths[index], -1))
        if slot == len(free):
            bins.append([])
            room, target = capacity, len(bins) - 1
        else:
            room, target = free.pop(slot)
        bins[target].append(index)
        bisect.insort(free, (room - lengths[index], target))
    return bins


def balanced_bins(
    lengths: Sequence[int], indices: Sequence[int], capacity: int, multiple: int, least: int = 1
) -> list[list[int]]:
    """The fewest bins (a multiple of `multiple`) that best-fit needs at `capacity`, then evened out.

    least: bins to make at least, as far as there are samples for another multiple. Evening: the least capacity at which
    best-fit still needs no more bins, by bisection. Bins are empty only where there are fewer samples than bins.
    """
    if not indices:
        return [[] for _ in range(multiple)]
    needed = len(best_fit(lengths, indices, capacity))
    wanted = min(-(-least // multiple), len(indices) // multiple)
    count = max(-(-needed // multiple), wanted) * multiple
    low, high = max(max(lengths[i] for i in indices), -(-sum(lengths[i] for i in indices) // count)), capacity
    while low < high:
        middle = (low + high) // 2
        if len(best_fit(lengths, indices, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    bins = best_fit(lengths, indices, low)
    while len(bins) < count:  # fewer bins than ranks want: split the bin with the most samples
        donor = max(bins, key=len)
        if len(donor) < 2:
            bins.append([])
            continue
        bins.append([donor.pop() for _ in range(len(donor) // 2)])
    return bins


def split_minibatches(num_samples: int, num_minibatches: int, seed: str) -> list[list[int]]:
    """A seeded random partition of range(num_samples) into minibatches whose sizes differ by at most one."""
    order = list(range(num_samples))
    random.Random(seed).shuffle(order)
    return [sorted(order[i::num_minibatches]) for i in range(num_minibatches)]


def plan_packing(
    lengths: Sequence[int],
    minibatches: Sequence[Sequence[int]],
    capacity: int,
    num_ranks: int = 1,
    multiple: int = 1,
    least: int = 1,
) -> PackingPlan:
    """Pack each minibatch into microbatches of at most `capacity` tokens, balanced over the data-parallel ranks.

    lengths: tokens of each sample. multiple: of microbatches a rank and minibatch (interleaved pipelines want it). least:
    microbatches a rank and minibatch, as far as there are samples: of m microbatches a pipeline of pp stages idles for
    (pp - 1) / (m + pp - 1) of its time. Raises ConfigError when a sample is longer than `capacity`.
    """
    longest = max((lengths[i] for batch in minibatches for i in batch), default=0)
    if longest > capacity:
        raise ConfigError(
            f"a sample of {longest} tokens does not fit into update.microbatch_tokens = {capacity}: "
            f"raise it to at least {longest} (max_prompt_tokens + max_response_tokens is always enough)"
        )
    plan, real, allotted = [], 0, 0
    for batch in minibatches:
        bins = balanced_bins(lengths, batch, capacity, num_ranks * multiple, num_ranks * least)
        sizes = [sum(lengths[i] for i in members) for members in bins]
        real, allotted = real + sum(sizes), allotted + len(bins) * max(sizes)
        order = sorted(range(len(bins)), key=lambda b: (-sizes[b], b))
        ranks: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
        for place, b in enumerate(order):  # snake order: big bins go to alternating ends
            row, column = divmod(place, num_ranks)
            ranks[column if row % 2 == 0 else num_ranks - 1 - column].append(tuple(bins[b]))
        plan.append(tuple(tuple(rank) for rank in ranks))
    return PackingPlan(tuple(plan), real / allotted if allotted else 1.0)


Carrier = TypeVar("Carrier", bound="Microbatch")


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Packed samples (thd). T = tokens, R = trained (response) tokens. Whole samples, whatever the parallel layout.

    tokens, positions, labels: [T] int64; labels: the next token of the same sample (0 where there is none).
    cu_seqlens: [samples + 1] int32. Without samples there is one token of padding, for the model must run.
    rows: [R] positions whose logits predict a response token; targets: [R] those tokens; sequence_ids: [R] which
    sample of this microbatch. sample_indices: the samples, in order, as indices into the step's samples.
    routed_experts: [T, MoE layers, top-k] choices to replay, or None; the layers of the whole model, or of this rank alone.
    kept_ids, kept_offsets: the ids over which the log-probs of the R rows are, as `KeptTokens` has them ([M] int32, [R + 1] int64);
    None: the whole vocabulary. `of_rows` leaves them as they are: it is of what heads have read already.
    own_experts: what the routers of this rank took in an earlier pass, and are to take again: by chunk, each [routers, tokens
    that its layers see, top-k], in host memory; or None.
    """

    _row_fields: ClassVar[tuple[str, ...]] = ("rows", "targets")

    sample_indices: tuple[int, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    rows: torch.Tensor
    targets: torch.Tensor
    sequence_ids: torch.Tensor
    routed_experts: torch.Tensor | None = None
    kept_ids: torch.Tensor | None = None
    kept_offsets: torch.Tensor | None = None
    own_experts: tuple[torch.Tensor, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.numel())

    def to(self, device: torch.device, *, kept: bool = True) -> Self:
        """The same on another device (itself when it is there already). kept: with the kept ids, which heads alone read."""
        left_out = {} if kept or self.kept_ids is None else {"kept_ids": None, "kept_offsets": None}
        if self.tokens.device == device and not left_out:
            return self
        fields = self._fields() | left_out
        for name, value in fields.items():
            if torch.is_tensor(value):
                fields[name] = value.to(device, non_blocking=True)
        return dataclasses.replace(self, **fields)

    def row_offsets(self) -> list[int]:
        """[samples + 1] where the rows of each sample begin, and where the last one's end. Reads `sequence_ids`."""
        counts = torch.bincount(self.sequence_ids, minlength=len(self.sample_indices))
        return [0, *counts.cumsum(0).tolist()]

    def of_rows(self, part: slice, *, of_samples: bool = False) -> Self:
        """The same with a part of its rows, as a loss of single tokens reads them. `sequence_ids` is left out: what is of a
        whole sequence cannot be computed of a part, and fails; unless the part is of whole samples.
        """
        rows = {name: value[part] for name in self._row_fields if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **rows, sequence_ids=self.sequence_ids[part if of_samples else slice(0)])

    def carrying(self, kind: type[Carrier], **further: torch.Tensor | None) -> Carrier:
        """The same as a microbatch of a kind with further fields: what a loss compares its scores with."""
        return kind(**(self._fields() | further))

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def build_microbatch(
    token_ids: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    sample_indices: Sequence[int],
    routed_experts: Sequence[np.ndarray] | None = None,
    kept: Sequence[KeptIds] | None = None,
) -> Microbatch:
    """Concatenate samples (each [prompt | response]) into one packed row.

    routed_experts: [tokens - 1, MoE layers, top-k] of each sample; what its last token is routed to changes nothing.
    kept: of each sample's response.
    """
    lengths = [len(ids) for ids in token_ids]
    spans = lengths or [1]
    cu_seqlens = torch.zeros(len(spans) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor(spans, dtype=torch.int32).cumsum(0)
    tokens = torch.tensor([t for ids in token_ids for t in ids] or [0], dtype=torch.int64)
    starts = cu_seqlens[:-1].long()
    positions = torch.arange(len(tokens)) - torch.repeat_interleave(starts, torch.tensor(spans, dtype=torch.int64))
    labels = torch.roll(tokens, -1)
    labels[cu_seqlens[1:].long() - 1] = 0
    # the logits at position p predict token p + 1: rows of a sample are [prompt_length - 1, length - 1)
    parts, sequence_ids = [], []
    for i, (start, length, prompt) in enumerate(zip(starts.tolist(), lengths, prompt_lengths, strict=False)):
        parts.append(torch.arange(start + prompt - 1, start + length - 1))
        sequence_ids.append(torch.full((length - prompt,), i, dtype=torch.int64))
    rows = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    return Microbatch(
        sample_indices=tuple(sample_indices),
        tokens=tokens,
        positions=positions,
        labels=labels,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(spans),
        rows=rows,
        targets=tokens[rows + 1] if len(rows) else torch.zeros(0, dtype=torch.int64),
        sequence_ids=torch.cat(sequence_ids) if sequence_ids else torch.zeros(0, dtype=torch.int64),
        routed_experts=_pack_routing(routed_experts) if routed_experts else None,
        kept_ids=torch.from_numpy(np.concatenate([one.ids for one in kept])) if kept else None,
        kept_offsets=list_offsets(torch.from_numpy(np.concatenate([one.counts for one in kept]))) if kept else None,
    )


def list_offsets(counts: torch.Tensor) -> torch.Tensor:
    """[n] -> [n + 1] int64: where lists of so many values begin, and the last one ends, when they lie one after the other."""
    return torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0, dtype=torch.int64)])


def _pack_routing(parts: Sequence[np.ndarray]) -> torch.Tensor:
    """[T, MoE layers, top-k]: the samples' choices, each followed by a row for its last token. uint8, or int32 of more than 256
    experts: torch computes with hardly any uint16.
    """
    last = np.broadcast_to(np.arange(parts[0].shape[2], dtype=parts[0].dtype), (1, *parts[0].shape[1:]))
    joined = np.concatenate([rows for part in parts for rows in (part, last)])
    return torch.from_numpy(joined if joined.dtype == np.uint8 else joined.astype(np.int32))
