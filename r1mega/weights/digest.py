"""A 64-bit digest of a tensor's bits that shards can compute apart and add up.

digest(X) = sum_ij bits(X_ij) * row_key(i) * column_key(j) mod 2^64, all keys odd and pseudo-random (splitmix64). It is
linear, so the digest of a tensor is the sum of its shards' digests, each with its global position: nothing is gathered.
An odd factor is invertible mod 2^64: every single flipped bit changes the digest. Permutations, transposes and swaps
collide with a chance below 2^-32. Not cryptographic: it finds faults, not forgeries.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from r1mega.weights.layout import Placement, Region

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_ELEMENTS = 1 << 16  # on a CPU: int64 temporaries of 512 KiB stay in a core's cache
_CHUNK_ELEMENTS_ON_DEVICE = 1 << 22  # bounds them (32 MiB)


@functools.lru_cache(maxsize=64)
def _keys(axis: int, size: int, device: str) -> torch.Tensor:
    """[size] odd int64 keys; splitmix64 (Steele, Lea, Flood 2014) of the position, another stream for each axis."""
    z = (np.arange(1, size + 1, dtype=np.uint64) + np.uint64(axis << 48)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)


def _axis_keys(axis: int, size: int, device: torch.device) -> torch.Tensor:
    """Keys of at least `size` positions, from a cache that holds powers of two only."""
    return _keys(axis, 1 << max(6, (size - 1).bit_length()), str(device))


@torch.no_grad()
def tensor_digest(tensor: torch.Tensor, region: Region | None = None) -> int:
    """Digest of a 1-D or 2-D tensor's bits, in [0, 2^64). region: its place in the full tensor (default: all of it)."""
    if tensor.dim() not in (1, 2):
        raise ValueError(f"tensor_digest wants 1 or 2 dimensions, got shape {tuple(tensor.shape)}")
    region = region or tuple((0, size) for size in tensor.shape)
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    (first_row, last_row), (first_column, last_column) = ((0, 1), *region) if tensor.dim() == 1 else region
    bits = bits.reshape(last_row - first_row, last_column - first_column)
    columns = _axis_keys(1, last_column, bits.device)[first_column:last_column]
    rows = _axis_keys(0, last_row, bits.device)[first_row:last_row]
    chunk = _CHUNK_ELEMENTS if bits.device.type == "cpu" else _CHUNK_ELEMENTS_ON_DEVICE
    step = max(1, chunk // max(1, bits.shape[1]))
    total = 0
    for start in range(0, bits.shape[0], step):
        # widened before the product: torch's own widening of mixed operands is slower than both
        part = (bits[start : start + step].to(torch.int64) * columns).sum(dim=1)
        total += int((part * rows[start : start + step]).sum())
    return total % 2**64


def generator_digest(placements: Sequence[Placement], parameters: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """This rank's part of every tensor's digest, read back from the generator's own parameters.

    Sharded tensors: to be summed mod 2^64 over the ranks, replicas other than 0 counting 0. Whole ones are complete.
    """
    return {
        placement.name: tensor_digest(placement.read(parameters), placement.source)
        if placement.is_whole or placement.replica == 0
        else 0
        for placement in placements
    }
