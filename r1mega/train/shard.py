"""A microbatch as one rank of a parallel layout sees it: padded to what divides, cut over context-parallel ranks. Pure,
but for `join_rows`, which puts per-row results together again.

So nobody but the policy has to know the layout: microbatches are built, and losses computed, of whole samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from r1mega.model.context_parallel import zigzag_rows
from r1mega.train.packing import Microbatch, list_offsets
from r1mega_kernels import KeptTokens


@dataclass(frozen=True, slots=True)
class Cut:
    """How a layout cuts a row of tokens: over context-parallel ranks, each part over tensor-parallel ranks.

    align: the number of tokens that a layer sees is a multiple of it (1, or what FP8 matrix products want).
    """

    cp: int = 1
    cp_rank: int = 0
    tp: int = 1
    tp_rank: int = 0
    sequence_parallel: bool = False
    align: int = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of a microbatch of R rows (t = padded tokens / cp).

    tokens, positions, labels: [t] int64. cu_seqlens: [sequences + 1] int32, of the whole padded sequences. padding: bool,
    of the tokens that this rank's layers see ([t], or [t / tp] under sequence parallelism); None: there is no padding on
    any rank. rows: [r] where this rank computes response tokens; places: [r] which of the R those are.
    routed_experts: [t or t / tp, MoE layers, top-k] choices to replay for the tokens that this rank's layers see, or None.
    kept: the ids over which the log-probs of the t tokens are, those of `rows` cut; None: the whole vocabulary.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    padding: torch.Tensor | None
    rows: torch.Tensor
    places: torch.Tensor
    routed_experts: torch.Tensor | None = None
    kept: KeptTokens | None = None


def shard(batch: Microbatch, cut: Cut) -> Shard:
    """Pad every sequence to a multiple of 2 * cp (the zigzag's chunks), and the row to what gives every rank a multiple of
    `align` tokens; take a part.
    """
    chunk = 2 * cut.cp if cut.cp > 1 else 1
    bounds = batch.cu_seqlens.to("cpu", torch.int64)
    spans = (bounds.diff() + chunk - 1) // chunk * chunk
    tail = -int(spans.sum()) % (math.lcm(chunk, cut.align * cut.cp) * cut.tp)
    if tail:
        spans = torch.cat([spans, torch.tensor([tail])])
    padded = torch.zeros(len(spans) + 1, dtype=torch.int64)
    padded[1:] = spans.cumsum(0)
    total = int(padded[-1])
    # where each token of the microbatch goes: its sequence may start later than before
    shifts = padded[: len(bounds) - 1] - bounds[:-1]
    place = torch.arange(batch.num_tokens) + torch.repeat_interleave(shifts, bounds.diff())
    is_padding = torch.ones(total, dtype=torch.bool)
    is_padding[place] = not batch.sample_indices
    own = zigzag_rows(padded, cut.cp, cut.cp_rank)
    local = torch.full((total,), -1, dtype=torch.int64)
    local[own] = torch.arange(len(own))
    rows = local[place[batch.rows.cpu()]]
    positions = torch.arange(total) - torch.repeat_interleave(padded[:-1], spans)
    device = batch.tokens.device

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(total).index_copy_(0, place.to(device), values)[own.to(device)]

    seen = own  # by this rank's layers
    if cut.sequence_parallel:
        seen = own.chunk(cut.tp)[cut.tp_rank]
    mine = is_padding[seen]
    routed = batch.routed_experts
    if routed is not None:  # padding goes to the first experts: any different ones will do
        first = torch.arange(routed.shape[2], device=device, dtype=routed.dtype).expand(total, *routed.shape[1:])
        routed = first.index_copy(0, place.to(device), routed)[seen.to(device)]
    return Shard(
        tokens=spread(batch.tokens),
        positions=positions[own].to(device),
        labels=spread(batch.labels),
        cu_seqlens=padded.to(device, torch.int32),
        padding=mine.to(device) if is_padding.any() else None,
        rows=rows[rows >= 0].to(device),
        places=(rows >= 0).nonzero()[:, 0].to(device),
        routed_experts=routed,
        kept=_kept(batch, rows, len(own)),
    )


def _kept(batch: Microbatch, rows: torch.Tensor, num_tokens: int) -> KeptTokens | None:
    """Of `num_tokens` tokens of this rank, of the batch's lists. rows: [R] where each of its rows is here, -1: on another rank."""
    if batch.kept_ids is None or batch.kept_offsets is None:
        return None
    ids, counts, device = batch.kept_ids, batch.kept_offsets.diff(), batch.kept_ids.device
    if not (rows >= 0).all():
        mine = (rows >= 0).to(device)
        ids = ids[torch.repeat_interleave(mine, counts)]  # rows rise, so the lists stay in order
        rows, counts = rows[rows >= 0], counts[mine]
    return KeptTokens(ids, list_offsets(counts.new_zeros(num_tokens).index_copy_(0, rows.to(device), counts)))


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor, num_rows: int, group: dist.ProcessGroup):
        ctx.save_for_backward(places)
        joined = values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, places, values)
        dist.all_reduce(joined, group=group)
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None, None


def join_rows(
    values: torch.Tensor, places: torch.Tensor, num_rows: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """[r, ...] of each context-parallel rank -> [num_rows, ...] on all of them. group: None when there is one rank.

    Every rank must then compute the same function of the result: the backward pass hands each rank the gradient of its
    own rows and adds nothing up.
    """
    if group is None:
        return values
    return _JoinRows.apply(values, places, num_rows, group)
