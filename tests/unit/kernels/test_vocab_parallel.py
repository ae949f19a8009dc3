"""Two gloo ranks, each with a part of the vocabulary, against float64 on the whole of it."""

from __future__ import annotations

import functools

import pytest
import torch

import r1mega_kernels
from r1mega_kernels import LogProbs
from tests.dist.launch import launch
from tests.unit.kernels.test_kept import exact_kept
from tests.unit.kernels.vocab_parallel_worker import PADDING, VOCABULARY, case, kept_case, run, token_loss

pytestmark = pytest.mark.heavy


@functools.cache
def launched():
    native = [] if r1mega_kernels.backend("cpu") == "reference" else ["native"]
    return launch(run, 2, ["reference", *native])


def two_ranks(backend):
    return [{k: torch.from_numpy(v) for k, v in result[backend].items()} for result in launched()]


def test_two_ranks(implementation):
    first, second = two_ranks(implementation)
    hidden, weight, targets, rows, upstream = case()
    leaf_h, leaf_w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = leaf_h @ leaf_w.t()
    logits.retain_grad()
    log_probs = (logits / 0.9)[rows].log_softmax(-1)
    chosen = log_probs.gather(1, targets[rows][:, None])[:, 0]
    expected = torch.stack([chosen, -(log_probs.exp() * log_probs).sum(-1), (logits / 0.9)[rows].logsumexp(-1)])
    (expected * upstream).sum().backward()

    assert torch.equal(first["results"], second["results"]) and torch.equal(first["linear"], second["linear"])
    assert torch.equal(first["grad_hidden"], second["grad_hidden"])
    close = {"rtol": 2e-6, "atol": 4e-6}
    torch.testing.assert_close(first["results"].double(), expected.detach(), **close)
    torch.testing.assert_close(first["linear"].double(), expected.detach(), **close)
    grad_logits = torch.cat([first["grad_logits"], second["grad_logits"]], dim=1)
    assert grad_logits.shape[1] == VOCABULARY + PADDING and (grad_logits[:, VOCABULARY:] == 0).all()
    torch.testing.assert_close(grad_logits[:, :VOCABULARY].double(), logits.grad, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(first["grad_hidden"].double(), leaf_h.grad, rtol=1e-5, atol=2e-5)
    grad_weight = torch.cat([first["grad_weight"], second["grad_weight"]])
    assert (grad_weight[VOCABULARY:] == 0).all()
    torch.testing.assert_close(grad_weight[:VOCABULARY].double(), leaf_w.grad, rtol=1e-5, atol=2e-5)


def test_loss_in_one_pass(implementation):
    """Chunks of 5 rows on two ranks, each with a part of the vocabulary, against float64 on all of it."""
    first, second = two_ranks(implementation)
    hidden, weight, targets, rows, _ = case()
    leaf_h, leaf_w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_probs = (leaf_h @ leaf_w.t() / 0.9)[rows].log_softmax(-1).gather(1, targets[rows][:, None])[:, 0]
    loss, _ = token_loss(LogProbs(log_probs, log_probs, log_probs), slice(0, len(rows)))
    (loss * 3).backward()
    assert torch.equal(first["loss"], second["loss"]) and torch.equal(first["loss_hidden"], second["loss_hidden"])
    torch.testing.assert_close(first["loss"].double(), loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first["loss_hidden"].double(), leaf_h.grad, rtol=1e-5, atol=1e-5)
    grad_weight = torch.cat([first["loss_weight"], second["loss_weight"]])
    assert (grad_weight[VOCABULARY:] == 0).all()
    torch.testing.assert_close(grad_weight[:VOCABULARY].double(), leaf_w.grad, rtol=1e-5, atol=1e-5)


def test_a_rank_whose_columns_are_all_masked(implementation):
    first, second = two_ranks(implementation)
    hidden, weight, targets, *_ = case()
    tail = (hidden @ weight.t())[:, 200:501].double().log_softmax(-1)
    chosen = tail.gather(1, targets.clamp(min=4, max=300)[:, None] - 4)[:, 0]
    torch.testing.assert_close(first["masked"][0].double(), chosen, rtol=2e-6, atol=4e-6)
    assert torch.equal(first["masked"], second["masked"])


def test_kept_ids(implementation):
    """Lists of the whole vocabulary, of which one token's lies on one rank alone and one keeps every id."""
    first, second = two_ranks(implementation)
    hidden, weight, targets, rows, upstream = case()
    expected, leaf = exact_kept(hidden @ weight.t(), targets, kept_case()[0], torch.full((len(targets),), 0.9), rows)
    (expected * upstream).sum().backward()
    assert torch.equal(first["kept"], second["kept"])
    torch.testing.assert_close(first["kept"].double(), expected.detach(), rtol=2e-6, atol=4e-6)
    grad = torch.cat([first["kept_logits"], second["kept_logits"]], dim=1)
    assert (grad[:, VOCABULARY:] == 0).all()
    torch.testing.assert_close(grad[:, :VOCABULARY].double(), leaf.grad, rtol=1e-5, atol=2e-6)
