"""Reward model losses against float64 formulas written out, and figures against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch

from r1mega.algorithm import pairwise


def test_pairwise_losses_and_gradients():
    rng = np.random.default_rng(0)
    chosen, rejected, margins = (rng.normal(size=50) * scale for scale in (3.0, 3.0, 1.0))
    tensors = [torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in (chosen, rejected)]
    losses = pairwise.pairwise_losses(*tensors, torch.tensor(margins, dtype=torch.float32))
    expected = [math.log1p(math.exp(-(c - r - m))) for c, r, m in zip(chosen, rejected, margins, strict=True)]
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=2e-6, atol=1e-7)
    losses.sum().backward()
    slope = 1 / (1 + np.exp(chosen - rejected - margins))
    np.testing.assert_allclose(tensors[0].grad.numpy(), -slope, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(tensors[1].grad.numpy(), slope, rtol=1e-5, atol=1e-7)


def test_pointwise_losses():
    scores, safe = np.array([-3.0, -0.5, 0.0, 2.0, 4.0]), np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    losses = pairwise.pointwise_losses(torch.tensor(scores), torch.tensor(safe))
    p = 1 / (1 + np.exp(-scores))
    np.testing.assert_allclose(losses.numpy(), -(safe * np.log(p) + (1 - safe) * np.log(1 - p)), rtol=1e-12)


def test_losses_of_extreme_scores_are_finite():
    far = torch.tensor([1e4, -1e4])
    assert pairwise.pairwise_losses(far, -far).tolist() == [0.0, 2e4]
    assert pairwise.pointwise_losses(far, torch.tensor([0.0, 1.0])).tolist() == [1e4, 1e4]


def test_accuracy_and_separation_against_counting():
    rng = np.random.default_rng(1)
    first, second = (torch.tensor(rng.integers(0, 4, size), dtype=torch.float64) for size in (40, 40))
    order = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert pairwise.accuracy(first, second) == pytest.approx(np.mean(order))
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(first.tolist(), second[:7].tolist())
    ]
    assert pairwise.separation(first, second[:7]) == pytest.approx(np.mean(pairs))
    assert math.isnan(pairwise.separation(first, second[:0])) and math.isnan(pairwise.accuracy(first[:0], second[:0]))


def test_a_length_detector_is_found_out():
    rng = np.random.default_rng(2)
    lengths = torch.tensor(rng.integers(5, 90, (200, 2)), dtype=torch.float64)
    chosen, rejected = lengths.unbind(1)
    detector = pairwise.length_bias(chosen, rejected, chosen, rejected)
    assert detector["length_correlation"] == pytest.approx(1.0)
    assert (detector["accuracy_shorter"], detector["accuracy_longer"]) == (0.0, 1.0)
    noise = torch.tensor(rng.normal(size=(200, 2)))
    fair = pairwise.length_bias(1 + noise[:, 0], noise[:, 1], chosen, rejected)
    values = torch.cat([1 + noise[:, 0], noise[:, 1]]).numpy()
    assert fair["length_correlation"] == pytest.approx(np.corrcoef(values, lengths.T.flatten().numpy())[0, 1])
    assert abs(fair["length_correlation"]) < 0.2 and min(fair["accuracy_shorter"], fair["accuracy_longer"]) > 0.6
    assert math.isnan(pairwise.correlation(torch.ones(3), torch.arange(3)))
