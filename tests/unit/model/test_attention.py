"""Core attention against a float64 brute force, one sequence at a time; forward and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega import platform

platform.prepare()

from r1mega.model.attention import causal_attention, packed_attention, packing_index  # noqa: E402
from r1mega.model.context_parallel import zigzag_rows  # noqa: E402


def brute_force(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence, float64: [s, h, d] -> [s, h, d_v]."""
    shared = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k) * scale
    future = torch.ones(q.shape[0], q.shape[0], dtype=torch.bool).triu(1)
    return torch.einsum("hst,thd->shd", scores.masked_fill(future, -math.inf).softmax(-1), v)


SHAPES = [(4, 4, 20, 12), (4, 4, 8, 16), (6, 2, 8, 8)]  # latent attention, wider values, grouped queries


@pytest.mark.parametrize(("heads", "groups", "size", "value_size"), SHAPES)
@pytest.mark.parametrize("lengths", [[5], [3, 0, 31, 1, 30, 7, 7, 2], [16, 16, 16], [1, 1, 1]])
def test_packed_attention_and_its_gradients(heads, groups, size, value_size, lengths):
    torch.manual_seed(sum(lengths))
    total, scale = sum(lengths), 0.3
    shapes = [(total, heads, size), (total, groups, size), (total, groups, value_size)]
    exact = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    ours = [t.detach().float().requires_grad_() for t in exact]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    output = packed_attention(*ours, packing_index(cu_seqlens), scale)
    expected = torch.cat([brute_force(*t, scale) for t in zip(*(t.split(lengths) for t in exact), strict=True)])
    weights = torch.randn(total, heads * value_size, dtype=torch.float64)
    torch.testing.assert_close(output.double(), expected.flatten(1), rtol=1e-5, atol=1e-5)
    (output * weights.float()).sum().backward()
    (expected.flatten(1) * weights).sum().backward()
    for mine, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "groups", "size", "value_size"), SHAPES)
def test_default_scale_is_of_the_unpadded_head(heads, groups, size, value_size):
    q, k, v = (torch.randn(9, n, d) for n, d in ((heads, size), (groups, size), (groups, value_size)))
    output = causal_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), None)[0].transpose(0, 1)
    expected = brute_force(q.double(), k.double(), v.double(), size**-0.5)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any))
def test_packing_index_places_every_token_once(lengths):
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    index = packing_index(cu_seqlens)
    assert torch.equal(index.gather[index.scatter], torch.arange(sum(lengths)))
    assert sum(rows * length for rows, length in index.shapes) == len(index.gather)
    padded, real = len(index.gather), sum(lengths)
    assert padded <= real / 0.75 + 1e-9  # no row is filled to less than three quarters


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from([1, 2, 4]))
def test_zigzag_partitions_the_tokens_and_balances_causal_work(units, ranks):
    lengths = [2 * ranks * u for u in units]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    rows = [zigzag_rows(cu_seqlens, ranks, r) for r in range(ranks)]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(sum(lengths)))
    position = torch.cat([torch.arange(n) for n in lengths])
    assert len({int(position[r].sum()) for r in rows}) == 1
