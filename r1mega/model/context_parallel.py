"""Which packed tokens a context-parallel rank holds: Megatron's zigzag, sequence by sequence. Pure."""

from __future__ import annotations

import torch

from r1mega.errors import ConfigError


def zigzag_rows(cu_seqlens: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """Indices [t / ranks] of the packed tokens of `rank`, in the order in which it holds them.

    cu_seqlens: [sequences + 1] bounds of the whole sequences. Each is cut into 2 * ranks chunks; rank r holds chunks r
    and 2 * ranks - 1 - r, which balances causal work. Raises ConfigError when a length is not a multiple of 2 * ranks.
    """
    bounds = cu_seqlens.detach().to("cpu", torch.int64)
    if ranks == 1:
        return torch.arange(int(bounds[-1]))
    lengths = bounds.diff()
    odd = lengths[lengths % (2 * ranks) != 0]
    if odd.numel():
        raise ConfigError(
            f"a packed sequence of {int(odd[0])} tokens cannot be cut over parallel.cp = {ranks}: "
            f"pad every sequence to a multiple of {2 * ranks}"
        )
    rows = []
    for start, length in zip(bounds[:-1].tolist(), lengths.tolist(), strict=True):
        chunk = length // (2 * ranks)
        for c in (rank, 2 * ranks - 1 - rank):
            rows.append(torch.arange(start + c * chunk, start + (c + 1) * chunk))
    return torch.cat(rows)
