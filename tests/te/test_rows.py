"""The stand-in's operations that move rows, of packed sequences and of experts, against loops in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.te.draws import close, normal

# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("sizes", [[3, 0, 5], [16, 16], [0, 0, 1]], ids=str)
def test_padding_between_experts(transformer_engine, sizes):
    from transformer_engine.pytorch.module.fp8_padding import Fp8Padding
    from transformer_engine.pytorch.module.fp8_unpadding import Fp8Unpadding

    values = normal(sum(sizes), 8).requires_grad_()
    padded, padded_sizes = Fp8Padding(len(sizes), align_size=16)(values, sizes)
    assert padded_sizes == [-(-size // 16) * 16 for size in sizes]
    start = place = 0
    for size, padded_size in zip(sizes, padded_sizes, strict=True):
        assert torch.equal(padded[place : place + size], values[start : start + size])
        assert padded[place + size : place + padded_size].eq(0).all()
        start, place = start + size, place + padded_size
    back = Fp8Unpadding(len(sizes), align_size=16)(padded, sizes)
    assert torch.equal(back, values)
    gradient = normal(*values.shape, seed=1)
    back.backward(gradient)
    assert torch.equal(values.grad, gradient)


@pytest.mark.parametrize("lengths", [[3, 5, 1], [4], [2, 0, 6]], ids=str)
def test_packed_sequences_to_rectangles(tex, lengths):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed = normal(sum(lengths) + 2, 2, 3)  # two rows behind the last sequence
    rectangle = tex.convert_thd_to_bshd(packed, bounds, len(lengths), 7)
    assert rectangle.shape == (len(lengths), 7, 2, 3)
    for i, length in enumerate(lengths):
        for j in range(7):
            expected = packed[int(bounds[i]) + j] if j < length else torch.zeros(2, 3)
            assert torch.equal(rectangle[i, j], expected)
    back = tex.convert_bshd_to_thd(rectangle, bounds, len(packed))
    assert torch.equal(back[: sum(lengths)], packed[: sum(lengths)])
    assert back[sum(lengths) :].eq(0).all()


# ---------------------------------------------------------------------- tokens and experts


def routing(tokens: int, experts: int, seed: int) -> torch.Tensor:
    """Tokens of no, one or many experts; the last expert has none."""
    routed = normal(tokens, experts, seed=seed) > 0.4
    routed[:, -1] = False
    return routed


@pytest.mark.parametrize("seed", range(4))
def test_permutation_with_probabilities(transformer_engine, seed):
    from transformer_engine.pytorch.permutation import moe_permute_with_probs, moe_unpermute

    tokens, experts, hidden = 11, 5, 6
    routed = routing(tokens, experts, seed)
    values = normal(tokens, hidden, seed=seed + 10).requires_grad_()
    probs = (normal(tokens, experts, seed=seed + 20).abs() + 0.1).mul(routed).requires_grad_()
    pairs = [(e, t) for e in range(experts) for t in range(tokens) if routed[t, e]]
    permuted, permuted_probs, row_id_map = moe_permute_with_probs(values, probs, routed, num_out_tokens=len(pairs))
    assert torch.equal(permuted, torch.stack([values[t] for _, t in pairs]))
    assert torch.equal(permuted_probs, torch.stack([probs[t, e] for e, t in pairs]))
    restored = moe_unpermute(permuted * permuted_probs[:, None], row_id_map, restore_shape=values.shape)
    close(restored, values.double() * probs.double().sum(1, keepdim=True))
    gradient = normal(tokens, hidden, seed=seed + 30)
    restored.backward(gradient)
    exact = [values.detach().double(), probs.detach().double(), gradient.double()]
    close(values.grad, exact[2] * exact[1].sum(1, keepdim=True))
    close(probs.grad, (exact[0] * exact[2]).sum(1, keepdim=True) * routed)


@pytest.mark.parametrize("seed", range(3))
def test_unpermutation_that_merges(transformer_engine, seed):
    from transformer_engine.pytorch.permutation import moe_permute, moe_unpermute

    tokens, experts, hidden = 9, 4, 5
    routed = routing(tokens, experts, seed)
    pairs = [(e, t) for e in range(experts) for t in range(tokens) if routed[t, e]]
    _, row_id_map = moe_permute(normal(tokens, hidden), routed, num_out_tokens=len(pairs), map_type="mask")
    rows = normal(len(pairs), hidden, seed=seed + 5).requires_grad_()
    probs = normal(tokens, experts, seed=seed + 6).mul(routed).requires_grad_()
    merged = moe_unpermute(rows, row_id_map, merging_probs=probs, restore_shape=torch.Size((tokens, hidden)))
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for row, (e, t) in zip(rows.detach().double(), pairs, strict=True):
        expected[t] += row * probs[t, e].double().item()
    close(merged, expected)
    gradient = normal(tokens, hidden, seed=seed + 7)
    merged.backward(gradient)
    close(rows.grad, torch.stack([gradient[t].double() * probs[t, e].double().item() for e, t in pairs]))
    of_probs = torch.zeros(tokens, experts, dtype=torch.float64)
    for row, (e, t) in zip(rows.detach().double(), pairs, strict=True):
        of_probs[t, e] = row @ gradient[t].double()
    close(probs.grad, of_probs)


def test_permutation_with_padding_between_experts(transformer_engine):
    from transformer_engine.pytorch.permutation import moe_permute_and_pad_with_probs, moe_unpermute

    tokens, experts, hidden, align = 11, 5, 6, 4
    routed = routing(tokens, experts, 0)
    values, probs = normal(tokens, hidden), normal(tokens, experts, seed=1).abs().add(0.1).mul(routed)
    sizes = routed.sum(0)
    permuted, permuted_probs, row_id_map, pad_offsets, padded = moe_permute_and_pad_with_probs(
        values, probs, routed, sizes, align
    )
    assert padded.tolist() == [-(-int(size) // align) * align for size in sizes]
    place = 0
    for e in range(experts):
        for t in range(tokens):
            if routed[t, e]:
                assert torch.equal(permuted[place], values[t])
                assert permuted_probs[place] == probs[t, e]
                place += 1
        while place % align:
            assert permuted[place].eq(0).all()
            place += 1
    restored = moe_unpermute(permuted, row_id_map, restore_shape=values.shape, pad_offsets=pad_offsets)
    close(restored, values.double() * routed.sum(1, keepdim=True))


@pytest.mark.parametrize("sizes", [[2, 3, 4], [0, 5, 0, 1]], ids=str)
def test_chunks_in_another_order(transformer_engine, sizes):
    from transformer_engine.pytorch.permutation import moe_sort_chunks_by_index_with_probs

    order = list(range(len(sizes)))[::-1]
    values, probs = normal(sum(sizes), 3).requires_grad_(), normal(sum(sizes), seed=1).requires_grad_()
    found, found_probs = moe_sort_chunks_by_index_with_probs(values, probs, torch.tensor(sizes), torch.tensor(order))
    starts = [0, *itertools.accumulate(sizes)]
    rows = [row for i in order for row in range(starts[i], starts[i + 1])]
    assert torch.equal(found, values[rows])
    assert torch.equal(found_probs, probs[rows])
    gradient = normal(sum(sizes), 3, seed=2)
    (found * gradient).sum().backward(retain_graph=True)
    found_probs.sum().backward()
    expected = torch.zeros(sum(sizes), 3)
    for place, row in enumerate(rows):
        expected[row] = gradient[place]
    assert torch.equal(values.grad, expected)
