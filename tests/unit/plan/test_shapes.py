"""Tensors without memory count as tensors with memory do."""

from __future__ import annotations

import pytest
import torch

from r1mega.plan.shapes import ShapesOnly


def test_bytes_that_live_and_the_most_at_once():
    with ShapesOnly() as mode:
        first = torch.empty(1000, 10)
        second = first * 2
        assert mode.live_bytes == 2 * 40_000
        view = second.view(-1)[5:]
        del first, second
        assert mode.live_bytes == 40_000  # a view holds all of it
        del view
        assert mode.live_bytes == 0 and mode.peak_bytes == 80_000
        mode.restart_peak()
        assert mode.peak_bytes == 0


def test_a_terabyte_takes_no_memory():
    with ShapesOnly() as mode:
        weight = torch.nn.Linear(500_000, 500_000, bias=False).weight
        assert mode.live_bytes == 10**12 and weight.is_meta


def test_integers_are_computed():
    with ShapesOnly():
        bounds = torch.tensor([0, 3, 7])
        assert bounds.diff().tolist() == [3, 4]
        mask = torch.zeros_like(torch.empty(4, 2)).int().scatter(1, torch.tensor([[1], [0], [1], [1]]), 1).bool()
        assert mask.sum(0).tolist() == [1, 3]
        chosen = torch.empty(4, 2).masked_select(mask)
        assert chosen.is_meta and chosen.shape == (4,)
        assert torch.empty(4, 8)[mask[:, 1]].shape == (3, 8)


def test_what_a_top_k_chooses_is_given():
    with ShapesOnly(lambda rows, columns, k: torch.full((rows, k), columns - 1)):
        values, indices = torch.empty(3, 6).topk(2, dim=1)
    assert values.is_meta and indices.tolist() == [[5, 5]] * 3


@pytest.mark.parametrize("activation", [torch.sigmoid, torch.nn.functional.silu])
def test_autograd_keeps_what_it_keeps_of_real_tensors(activation):
    def kept() -> int:
        saved = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        layer = torch.nn.Linear(16, 32)
        given = torch.empty(8, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = activation(layer(given)).square()
        output.backward(torch.empty_like(output))
        assert layer.weight.grad is not None and layer.weight.grad.shape == layer.weight.shape
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    real = kept()
    with ShapesOnly():
        assert kept() == real


def test_fused_attention_keeps_no_scores():
    with ShapesOnly() as mode:
        query = torch.empty(1, 2, 4096, 64, requires_grad=True)
        output = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        assert output.shape == query.shape
        assert mode.live_bytes == 2 * query.numel() * 4 + 2 * 4096 * 4  # query, output, a float32 a row
