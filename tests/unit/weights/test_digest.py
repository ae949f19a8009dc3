"""The digest against a plain Python sum, and what it must tell apart."""

from __future__ import annotations

import struct
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.weights import digest as digest_module
from r1mega.weights.digest import generator_digest, tensor_digest
from r1mega.weights.layout import GeneratorRank, divided_names, generator_layout
from r1mega.weights.transfer import sum_digests
from tests.reference import DEEPSEEK, make_reference
from tests.unit.weights.brute_force import empty_parameters


def splitmix(value: int) -> int:
    z = value * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) | 1


def plain_digest(tensor: torch.Tensor) -> int:
    """The definition in unbounded integers."""
    total = 0
    for i, row in enumerate(tensor.reshape(-1, tensor.shape[-1]).tolist()):
        for j, value in enumerate(row):
            (bits,) = struct.unpack("<i", struct.pack("<f", value))
            total += bits * splitmix(i + 1) * splitmix(j + 1 + (1 << 48))
    return total % 2**64


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1,), (70,), (5, 7), (130, 3)])
def test_equals_the_definition(shape):
    tensor = matrix(1, 1).new_tensor(matrix(1, torch.Size(shape).numel()).tolist()).reshape(shape)
    assert tensor_digest(tensor) == plain_digest(tensor)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    row=st.integers(0, 40),
    column=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_shards_add_up(rows, columns, row, column, seed):
    whole, row, column = matrix(rows, columns, seed), min(row, rows), min(column, columns)
    parts = 0
    for r in ((0, row), (row, rows)):
        for c in ((0, column), (column, columns)):
            if r[0] < r[1] and c[0] < c[1]:
                parts += tensor_digest(whole[r[0] : r[1], c[0] : c[1]], (r, c))
    assert parts % 2**64 == tensor_digest(whole)


def test_chunking_changes_nothing(monkeypatch):
    whole = matrix(200, 50)
    expected = tensor_digest(whole)
    monkeypatch.setattr(digest_module, "_CHUNK_ELEMENTS", 120)
    assert tensor_digest(whole) == expected


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 599), bit=st.integers(0, 31), seed=st.integers(0, 9))
def test_every_flipped_bit_shows(position, bit, seed):
    tensor = matrix(20, 30, seed)
    before = tensor_digest(tensor)
    tensor.view(torch.int32).view(-1)[position] ^= torch.tensor(-(2**31) if bit == 31 else 1 << bit, dtype=torch.int32)
    assert tensor_digest(tensor) != before


@settings(max_examples=200, deadline=None)
@given(first=st.integers(0, 599), second=st.integers(0, 599), seed=st.integers(0, 9))
def test_every_swap_shows(first, second, seed):
    tensor = matrix(20, 30, seed).to(torch.bfloat16)
    before, flat = tensor_digest(tensor), tensor.view(-1)
    same = bool(flat[first] == flat[second])
    flat[[first, second]] = flat[[second, first]]
    assert (tensor_digest(tensor) != before) != same


def test_transposes_permutations_and_signs_of_zero_show():
    square = matrix(32, 32)
    variants = [
        square,
        square.T,
        square.flip(0),
        square.flip(1),
        square.roll(1, 0),
        square.roll(1, 1),
        square.reshape(16, 64),
        torch.zeros(32, 32),
        -torch.zeros(32, 32),
        square.to(torch.bfloat16),
    ]
    assert len({tensor_digest(variant) for variant in variants}) == len(variants)


def test_ranks_add_up_to_the_whole():
    """Four tensor-parallel ranks' partial digests, read from shards cut by hand, sum to the full tensors' digests."""
    state = make_reference(DEEPSEEK, batch=1, length=2).state
    totals: dict[str, int] = {}
    for rank in range(4):
        layout = generator_layout(DEEPSEEK, GeneratorRank(4, rank))
        for p in layout:
            if p.is_whole:
                continue
            shard = state[p.name][tuple(slice(start, stop) for start, stop in p.source)]
            totals[p.name] = totals.get(p.name, 0) + tensor_digest(shard, p.source)
    partial = {name: value % 2**64 for name, value in totals.items()}
    assert len(totals) > 50
    assert partial == {name: tensor_digest(state[name]) for name in totals}
    identity = sum_digests({"a": 2**64 - 1, "b": 2**63}, ["a", "b"], lambda tensor: None)
    assert identity == {"a": 2**64 - 1, "b": 2**63}


@pytest.mark.parametrize(("vocabulary", "tp", "ep"), [(96, 2, 2), (96, 4, 1), (96, 4, 4), (20, 2, 1), (129, 4, 4)])
def test_every_rank_ends_with_the_digest_of_every_tensor(vocabulary, tp, ep):
    """Also where a rank holds no row of the vocabulary (96 rows over 4: 32, 32, 32, 0), or nothing of most experts."""
    config = DEEPSEEK | {"vocab_size": vocabulary}
    state = make_reference(config, batch=1, length=2).state
    ranks = [GeneratorRank(tp, rank, ep, rank % ep) for rank in range(tp)]
    partials = []
    for rank in ranks:
        placements = generator_layout(config, rank)
        parameters = empty_parameters(placements)
        parameters = {name: tensor.to(torch.float32) for name, tensor in parameters.items()}
        for p in placements:
            p.read(parameters).copy_(state[p.name][tuple(slice(start, stop) for start, stop in p.source)])
        partials.append(generator_digest(placements, parameters))
    sent: list[torch.Tensor] = []
    for rank, partial in zip(ranks, partials, strict=True):
        sum_digests(partial, divided_names(config, rank), lambda values: sent.append(values.clone()))
    total = torch.stack(sent).sum(0)
    expected = {name: tensor_digest(tensor) for name, tensor in state.items()}
    for rank, partial in zip(ranks, partials, strict=True):
        assert sum_digests(partial, divided_names(config, rank), lambda values: values.copy_(total)) == expected


def test_cost():
    """1.1M float32 parameters in 200 tensors: a small part of the 40 ms that a push and its proof may take."""
    tensors = [matrix(64, 86, i) for i in range(200)]
    [tensor_digest(tensor) for tensor in tensors]
    times = []
    for _ in range(5):
        start = time.process_time()
        [tensor_digest(tensor) for tensor in tensors]
        times.append(time.process_time() - start)
    assert min(times) < 0.03
