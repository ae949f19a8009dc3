"""transformer_engine.pytorch.triton.permutation in torch: tokens to the experts that they are routed to, and back.

The autograd functions that call it (transformer_engine/pytorch/permutation.py) are Transformer Engine's own. `row_id_map`
is [tokens, 2 * experts + 1]: for each token the rows that it goes to, the experts that those belong to, and how many there are.
"""

from __future__ import annotations

import torch


def make_row_id_map(routing_map: torch.Tensor, num_tokens: int, num_experts: int) -> torch.Tensor:
    """From the routing map [tokens, experts]: rows are in the order of experts, tokens of one expert in their own.

    Of a token's experts the last comes first, as the kernel leaves them. Places that no expert takes are -1.
    """
    routed = routing_map.bool()
    rows = torch.full((num_tokens, num_experts), -1, dtype=torch.int32)
    rows.T[routed.T] = torch.arange(int(routed.sum()), dtype=torch.int32)
    order = torch.where(routed, torch.arange(num_experts), -1).argsort(dim=1, descending=True, stable=True)
    counts = routed.sum(1, keepdim=True)
    taken = torch.arange(num_experts) < counts
    return torch.cat([rows.gather(1, order).where(taken, -1), order.int().where(taken, -1), counts.int()], 1).int()


def _places(row_id_map: torch.Tensor, num_experts: int, pad_offsets: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """(token, expert, row) of every routed pair."""
    taken = torch.arange(num_experts) < row_id_map[:, -1:]
    tokens = taken.nonzero()[:, 0]
    experts = row_id_map[:, num_experts:-1][taken].long()
    rows = row_id_map[:, :num_experts][taken].long()
    return tokens, experts, rows if pad_offsets is None else rows + pad_offsets[experts]


def permute_with_mask_map(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    probs: torch.Tensor | None,
    scale: torch.Tensor | None,
    pad_offsets: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
    scale_hidden_dim: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(rows of experts [num_out_tokens, hidden], their scales, their probs). A routed token with probability 0 gives zeros."""
    tokens, experts, rows = _places(row_id_map, num_experts, pad_offsets)
    output = inp.new_zeros(num_out_tokens, hidden_size)
    values = inp[tokens]
    permuted_scale = permuted_probs = None
    if probs is not None:
        chosen = probs[tokens, experts]
        permuted_probs = probs.new_zeros(num_out_tokens).index_copy_(0, rows, chosen)
        values = values.masked_fill((chosen == 0)[:, None], 0)
    if scale is not None:
        permuted_scale = scale.new_zeros(num_out_tokens, scale_hidden_dim).index_copy_(0, rows, scale[tokens])
    return output.index_copy_(0, rows, values), permuted_scale, permuted_probs


def unpermute_with_mask_map(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    merging_probs: torch.Tensor | None,
    permuted_probs: torch.Tensor | None,
    pad_offsets: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(sum of a token's rows [tokens, hidden], weighted by merging_probs; probs [tokens, experts])."""
    tokens, experts, rows = _places(row_id_map, num_experts, pad_offsets)
    values = inp[rows].float()
    if merging_probs is not None:
        values = values * merging_probs[tokens, experts].float()[:, None]
    output = torch.zeros(num_tokens, hidden_size).index_add_(0, tokens, values).to(inp.dtype)
    if permuted_probs is None:
        return output, None
    probs = permuted_probs.new_zeros(num_tokens, num_experts)
    probs[tokens, experts] = permuted_probs[rows]
    return output, probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad: torch.Tensor,
    row_id_map: torch.Tensor,
    fwd_input: torch.Tensor,
    merging_probs: torch.Tensor,
    pad_offsets: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the rows [num_out_tokens, hidden], gradient of merging_probs [tokens, experts])."""
    tokens, experts, rows = _places(row_id_map, num_experts, pad_offsets)
    gradient = fwd_output_grad[tokens].float()
    weighted = (gradient * merging_probs[tokens, experts].float()[:, None]).to(fwd_output_grad.dtype)
    of_rows = fwd_output_grad.new_zeros(num_out_tokens, hidden_size).index_copy_(0, rows, weighted)
    of_probs = torch.zeros_like(merging_probs)
    of_probs[tokens, experts] = (gradient * fwd_input[rows].float()).sum(1).to(merging_probs.dtype)
    return of_rows, of_probs


def make_chunk_sort_map(
    split_sizes: torch.Tensor, sorted_indices: torch.Tensor, num_tokens: int, num_splits: int
) -> torch.Tensor:
    """[num_tokens] int32: where each row goes when chunks of `split_sizes` rows are put in the order `sorted_indices`.

    Rows behind the last chunk stay.
    """
    chunks = list(torch.split(torch.arange(int(split_sizes.sum())), split_sizes.tolist()))
    sources = torch.cat([chunks[i] for i in sorted_indices.tolist()])
    destination = torch.arange(num_tokens, dtype=torch.int32)
    destination[sources] = torch.arange(len(sources), dtype=torch.int32)
    return destination


def sort_chunks_by_map(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    probs: torch.Tensor | None,
    num_tokens: int,
    hidden_size: int,
    is_forward: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(rows [num_tokens, hidden], probs [num_tokens]) moved to where the map says, or back."""
    place = row_id_map.long()

    def moved(values: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(values).index_copy_(0, place, values) if is_forward else values[place]

    return moved(inp), None if probs is None else moved(probs)
