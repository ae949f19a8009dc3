"""Parts of tensors read out of a checkpoint's pieces, against slices of the whole tensor."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from r1mega.checkpoint import torch_dist
from r1mega.checkpoint.torch_dist import Stored, TorchDistReader, write_index, write_pieces
from r1mega.errors import CheckpointError

WHOLE = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(0))
ROWS, COLUMNS = ((0, 4), (4, 9), (9, 10)), ((0, 2), (2, 6))
PARTS = (((0, 0), (10, 6)), ((2, 1), (5, 3)), ((5, 0), (5, 6)), ((3, 2), (9, 4)))
"""(offset, shape) of what ranks hold; the last goes beyond what was saved, as a vocabulary that is padded further does."""


def write(directory, left_out: int | None = None) -> TorchDistReader:
    pieces, chunks = [], []
    for number, (layer, (a, b), (c, d)) in enumerate(itertools.product(range(3), ROWS, COLUMNS)):
        offset, piece = torch.Size((layer, a, c)), WHOLE[layer : layer + 1, a:b, c:d].contiguous()
        if number != left_out:
            pieces.append((MetadataIndex("w", offset), piece))
            chunks.append(ChunkStorageMetadata(offset, piece.shape))
    results, _ = write_pieces(directory / "__0_0.distcp", pieces)
    properties = TensorProperties(torch.float32)
    write_index(directory, Metadata({"w": TensorStorageMetadata(properties, WHOLE.shape, chunks)}), results)
    return TorchDistReader(directory)


def leaf(layer: int, offset, shape) -> SimpleNamespace:
    """What is asked of a ShardedTensor."""
    return SimpleNamespace(
        key="w", prepend_axis_num=1, global_offset=(layer, *offset), local_shape=shape, dtype=torch.float32
    )


@pytest.mark.parametrize("block", [1, 13, 2**24])
def test_every_part_of_a_flattened_shard(tmp_path, monkeypatch, block):
    monkeypatch.setattr(torch_dist, "BLOCK", block)
    reader = write(tmp_path)
    for layer, (offset, shape) in itertools.product(range(3), PARTS):
        expected = torch.zeros(shape)
        inside = WHOLE[layer, offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]
        expected[: inside.shape[0], : inside.shape[1]] = inside
        for first in range(0, expected.numel(), 3):
            for last in range(first + 1, expected.numel() + 1, 7):
                found = torch.full((last - first,), 7.0)
                Stored(leaf(layer, offset, shape), reader).copy_into(found, first)
                assert torch.equal(found, expected.flatten()[first:last])


def test_a_gap_between_pieces_is_no_zero(tmp_path):
    stored = Stored(leaf(0, (0, 0), (10, 6)), write(tmp_path, left_out=1))
    with pytest.raises(CheckpointError, match="16 elements of w are in no piece"):
        stored.copy_into(torch.zeros(60), 0)
