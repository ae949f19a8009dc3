"""Core attention without Transformer Engine: causal, for latent and grouped-query attention, on torch's own kernels.

Dense [s, b, h, d], packed [t, h, d] (thd), and context parallelism by gathering keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import pad, scaled_dot_product_attention

from r1mega.model.context_parallel import zigzag_rows


class CausalAttention(MegatronModule):
    """Drop-in for TEDotProductAttention where it cannot run. Always causal; no dropout, no bias.

    Arguments as Megatron's attention layers give them; k_channels and v_channels may differ (latent attention).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_kwargs: Any,
    ):
        super().__init__(config)
        self.scale = softmax_scale
        self.cp_group: dist.ProcessGroup | None = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """[s, b, h, d] -> [s, b, h * d_v]; with packed_seq_params [t, h, d] -> [t, h * d_v].

        Masks other than the causal one are not looked at: sequences are padded at their end only.
        """
        group = self.cp_group if self.cp_group is not None and self.cp_group.size() > 1 else None
        if packed_seq_params is not None:
            if group is not None:
                return packed_zigzag_attention(query, key, value, packed_seq_params, group, self.scale)
            return packed_attention(query, key, value, packed_seq_params.index, self.scale)
        if group is not None:
            return zigzag_attention(query, key, value, group, self.scale)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        return causal_attention(q, k, v, self.scale).permute(2, 0, 1, 3).flatten(2)


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, with the rectangles that all layers share.

    padding_mask: [1, tokens] bool; the layers' routers find it here (see megatron_patches.py).
    """

    padding_mask: torch.Tensor | None = None

    @cached_property
    def index(self) -> PackingIndex:
        return packing_index(self.cu_seqlens_q)

    def rows(self, ranks: int, rank: int) -> torch.Tensor:
        """The packed tokens that a context-parallel rank holds."""
        return zigzag_rows(self.cu_seqlens_q, ranks, rank).to(self.cu_seqlens_q.device)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T * scale, causal or under `mask`) v. [b, h, s, d] x3 -> [b, h, s, d_v]; fewer KV heads are shared.

    torch's flash kernel wants equal head sizes of q, k and v and else builds all scores: the smaller is zero-padded.
    """
    size, value_size = query.shape[-1], value.shape[-1]
    if value_size < size:
        value = pad(value, (0, size - value_size))
    elif size < value_size:
        scale = scale if scale is not None else size**-0.5
        query, key = (pad(t, (0, value_size - size)) for t in (query, key))
    grouped = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return output[..., :value_size]


# ---------------------------------------------------------------------- packed sequences


@dataclass(frozen=True, slots=True)
class PackingIndex:
    """Packed tokens <-> rectangles of sequences of similar length, padded at their end.

    shapes: (sequences, length) of each rectangle; gather: [padded tokens], the packed token of each place (padding
    repeats a token of the sequence); scatter: [tokens], the place of each packed token.
    """

    shapes: tuple[tuple[int, int], ...]
    gather: torch.Tensor
    scatter: torch.Tensor


def packing_index(cu_seqlens: torch.Tensor, shortest: float = 0.75) -> PackingIndex:
    """Rectangles for the sequences bounded by cu_seqlens [sequences + 1].

    shortest: the least length in a rectangle as a share of its longest, which bounds the padding. Empty sequences are
    skipped.
    """
    bounds = cu_seqlens.detach().to("cpu", torch.int64)
    lengths, order = torch.sort(bounds.diff(), descending=True, stable=True)
    sizes = lengths.tolist()
    shapes: list[tuple[int, int]] = []
    gathered, filled = [], []
    first, offset = 0, 0
    while first < len(sizes) and sizes[first] > 0:
        longest, last = sizes[first], first
        while last < len(sizes) and sizes[last] > 0 and sizes[last] >= shortest * longest:
            last += 1
        starts, own = bounds[order[first:last]][:, None], lengths[first:last, None]
        column = torch.arange(longest)[None]
        gathered.append((starts + torch.minimum(column, own - 1)).flatten())
        filled.append((offset + torch.arange((last - first) * longest))[(column < own).flatten()])
        shapes.append((last - first, longest))
        offset += (last - first) * longest
        first = last
    gather, places = torch.cat(gathered), torch.cat(filled)
    scatter = torch.empty(len(places), dtype=torch.int64)
    scatter[gather[places]] = places
    return PackingIndex(tuple(shapes), gather.to(cu_seqlens.device), scatter.to(cu_seqlens.device))


class _ToRectangles(torch.autograd.Function):
    """[t, ...] -> [padded, ...]. Padding comes after all real tokens of a causal sequence: its gradient is zero."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        return tensor.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _FromRectangles(torch.autograd.Function):
    """[padded, ...] -> [t, ...]."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        ctx.padded = tensor.shape[0]
        return tensor.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        padded = gradient.new_zeros(ctx.padded, *gradient.shape[1:])
        return padded.index_copy_(0, ctx.saved_tensors[0], gradient), None


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: PackingIndex, scale: float | None
) -> torch.Tensor:
    """Causal attention inside each packed sequence. [t, h, d] -> [t, h * d_v], one kernel call a rectangle.

    A call a sequence costs several times as much for the hundreds of short sequences of a packed microbatch.
    """
    rectangles = [_ToRectangles.apply(t, index.gather, index.scatter) for t in (query, key, value)]
    sizes = [rows * length for rows, length in index.shapes]
    outputs = []
    for (rows, length), *qkv in zip(index.shapes, *(t.split(sizes) for t in rectangles), strict=True):
        q, k, v = (t.unflatten(0, (rows, length)).transpose(1, 2) for t in qkv)
        outputs.append(causal_attention(q, k, v, scale).transpose(1, 2).flatten(0, 1))
    return _FromRectangles.apply(torch.cat(outputs), index.scatter).flatten(1)


# ---------------------------------------------------------------------- context parallelism


class _AllGather(torch.autograd.Function):
    """[s, ...] -> [ranks, s, ...]. torch.distributed.nn's all_gather fails for sub-groups on gloo."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(gathered, tensor.contiguous(), group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()], None


def zigzag_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup, scale: float | None
) -> torch.Tensor:
    """Causal attention over a sequence that is cut over the context-parallel ranks. [s / cp, b, h, d] -> [.., h * d_v].

    Megatron's zigzag: of 2 * cp chunks, rank r holds r and 2 * cp - 1 - r, which balances causal work.
    """
    ranks, rank = group.size(), group.rank()
    chunk = query.shape[0] // 2
    keys, values = (_restore_order(_AllGather.apply(t, group)) for t in (key, value))
    device = query.device
    first = torch.arange(rank * chunk, (rank + 1) * chunk, device=device)
    second = torch.arange((2 * ranks - 1 - rank) * chunk, (2 * ranks - rank) * chunk, device=device)
    visible = torch.cat([first, second])[:, None] >= torch.arange(2 * ranks * chunk, device=device)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, keys, values))
    return causal_attention(q, k, v, scale, visible).permute(2, 0, 1, 3).flatten(2)


def packed_zigzag_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: PackedSequences,
    group: dist.ProcessGroup,
    scale: float | None,
) -> torch.Tensor:
    """Causal attention inside each packed sequence, every sequence cut over the ranks. [t / cp, h, d] -> [.., h * d_v].

    Queries are gathered too and every rank computes all rows: right, simple, and no faster than one rank. On GPUs
    Transformer Engine's context parallelism runs instead.
    """
    own = packing.rows(group.size(), group.rank())
    place = torch.empty(own.numel() * group.size(), dtype=torch.int64, device=query.device)
    everyone = torch.cat([packing.rows(group.size(), r) for r in range(group.size())])
    place[everyone] = torch.arange(everyone.numel(), device=query.device)
    q, k, v = (_AllGather.apply(t, group).flatten(0, 1).index_select(0, place) for t in (query, key, value))
    return packed_attention(q, k, v, packing.index, scale).index_select(0, own)


def _restore_order(gathered: torch.Tensor) -> torch.Tensor:
    """[ranks, s / ranks, ...] in zigzag -> [s, ...] in order."""
    ranks, size = gathered.shape[:2]
    halves = gathered.unflatten(1, (2, size // 2))
    return torch.cat([*halves[:, 0], *halves[:, 1].flip(0)])
