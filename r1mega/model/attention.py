"""Core attention without Transformer Engine: causal, for latent and grouped-query attention, on torch's own kernels.

Dense [s, b, h, d], packed [t, h, d] (thd), and context parallelism by gathering keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention


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
        self.cp_group = pg_collection.cp if pg_collection is not None else None

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
        context_parallel = self.cp_group is not None and self.cp_group.size() > 1
        if packed_seq_params is not None:
            if context_parallel:
                raise NotImplementedError("packed sequences under context parallelism")
            return packed_attention(query, key, value, packed_seq_params.cu_seqlens_q, self.scale)
        if context_parallel:
            return zigzag_attention(query, key, value, self.cp_group, self.scale)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=_grouped(q, k))
        return output.permute(2, 0, 1, 3).flatten(2)


def _grouped(query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.shape[1] != key.shape[1]


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Causal attention inside each packed sequence. [t, h, d], cu_seqlens [sequences + 1] -> [t, h * d_v]."""
    outputs = []
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if start == end:
            continue
        q, k, v = (t[start:end].transpose(0, 1)[None] for t in (query, key, value))
        output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=_grouped(q, k))
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs).flatten(1)


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
    output = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=_grouped(q, k))
    return output.permute(2, 0, 1, 3).flatten(2)


def _restore_order(gathered: torch.Tensor) -> torch.Tensor:
    """[ranks, s / ranks, ...] in zigzag -> [s, ...] in order."""
    ranks, size = gathered.shape[:2]
    halves = gathered.unflatten(1, (2, size // 2))
    return torch.cat([*halves[:, 0], *halves[:, 1].flip(0)])
