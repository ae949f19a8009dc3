"""What users hand to the kernels and nobody meant: refused by name, or computed as float64 torch does."""

from __future__ import annotations

import math

import pytest
import torch

from r1mega_kernels import (
    KeptTokens,
    group_advantage,
    grouped_log_prob,
    grpo_token_loss,
    linear_grpo_loss,
    linear_log_prob,
)
from tests.unit.kernels.test_log_prob import exact, random_case

POLICY = torch.linspace(-3, -1, 6)


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 129281])
@pytest.mark.parametrize("layout", ["strided columns", "expanded rows", "rows that overlap"])
def test_layouts(implementation, vocabulary, layout):
    logits, targets = random_case(4, vocabulary, torch.float32, seed=vocabulary)
    if layout == "strided columns":
        logits = torch.stack([logits, logits], 2).view(4, -1)[:, ::2]
    elif layout == "expanded rows":
        logits = logits[:1].expand(4, vocabulary)
    else:
        logits = torch.cat([logits.view(-1), torch.zeros(8)]).as_strided((4, vocabulary), (2, 1))
    leaf = logits.detach().requires_grad_()
    found = torch.stack(grouped_log_prob(leaf, targets, backend=implementation))
    expected, wide = exact(logits, targets, 1.0)
    torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), leaf)[0].double(),
        torch.autograd.grad(expected.sum(), wide)[0],
        rtol=1e-5,
        atol=3e-6,
    )


def test_infinities_are_torchs(implementation):
    """-inf throughout, a lone column, a target at -inf, NaN, +inf: values, and which rows' gradients are NaN."""
    logits, targets = random_case(6, 40, torch.float32)
    logits[0], logits[1, 1:], logits[2, targets[2]], logits[3, 0], logits[4, 0] = *[-math.inf] * 3, math.nan, math.inf
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    found = grouped_log_prob(leaf, targets, backend=implementation).log_prob
    expected = other.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected, equal_nan=True)
    found.sum().backward(), expected.sum().backward()
    assert torch.equal(leaf.grad.isnan().any(1), other.grad.isnan().any(1))


def test_gradients_in_the_place_of_rows_that_share_memory_are_refused(implementation):
    logits = torch.randn(1, 40).expand(6, 40)
    with pytest.raises(ValueError, match="rows of these logits lie over each other"):
        grouped_log_prob(logits, torch.zeros(6, dtype=torch.int64), grad_in_place=True, backend=implementation)


def test_ignored_labels_are_named(implementation):
    targets = torch.full((6,), -100)
    for call in (
        lambda: grouped_log_prob(torch.zeros(6, 40), targets, backend=implementation),
        lambda: linear_log_prob(torch.zeros(6, 4), torch.zeros(40, 4), targets, backend=implementation),
    ):
        with pytest.raises(ValueError, match=r"targets must be in \[0, 40\), found -100 to -100"):
            call()
    rows = torch.tensor([2, 5])
    targets[rows] = 3
    assert grouped_log_prob(torch.zeros(6, 40), targets, rows=rows, backend=implementation).log_prob.shape == (2,)


def test_nothing_in_every_way(implementation):
    targets, kept = torch.zeros(0, dtype=torch.int64), KeptTokens(torch.zeros(0, dtype=torch.int32), torch.tensor([0]))
    logits = torch.zeros(0, 40).requires_grad_()
    grouped_log_prob(logits, targets, kept=kept, backend=implementation).log_prob.sum().backward()
    assert logits.grad.shape == (0, 40)
    loss, _ = linear_grpo_loss(
        torch.zeros(0, 4), torch.zeros(40, 4), targets, lambda scores, part: (scores.log_prob.sum(), None), kept=kept,
        backend=implementation,
    )  # fmt: skip
    assert loss == 0
    assert group_advantage(torch.zeros(0), torch.tensor([0, 0]), backend=implementation).shape == (0,)
    with pytest.raises(ValueError, match="must rise from 0 to 0"):
        group_advantage(torch.zeros(0), torch.tensor([0, 1]), backend=implementation)
    masked, metrics = grpo_token_loss(
        POLICY, torch.full((6,), math.nan), mask=torch.zeros(6, dtype=torch.bool), backend=implementation
    )
    assert masked == 0 and metrics.num_tokens == 0 and metrics.mismatch_max == 0


@pytest.mark.parametrize(
    "options",
    [
        {"clip_low": math.nan},
        {"clip_high": -1.0},
        {"kl_coefficient": math.nan, "reference_log_probs": POLICY},
        {"dual_clip": math.nan},
        {"importance_cap": math.nan, "sampler_log_probs": POLICY},
        {"surrogate": "sapo", "sapo_temperatures": (math.nan, 1.0)},
    ],
)
def test_options_that_are_no_numbers_are_refused(options):
    """A comparison with NaN is False: such a bound was no bound."""
    with pytest.raises(
        ValueError, match=f"{'clip_low' if 'clip_high' in options else list(options)[-1]}|{list(options)[0]}"
    ):
        grpo_token_loss(POLICY, torch.ones(6), POLICY - 1, **options)


def test_indices_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match="sequence_ids must be integers"):
        grpo_token_loss(POLICY, torch.ones(2), sequence_ids=torch.tensor([0.0, 0, 0, 1, 1, 1.9]))
    with pytest.raises(TypeError, match="group_offsets must be integers"):
        group_advantage(torch.ones(2), torch.tensor([0.0, 2.0]))
    for epsilon in (math.nan, -0.5, math.inf):
        with pytest.raises(ValueError, match="epsilon must be a finite number"):
            group_advantage(torch.ones(2), torch.tensor([0, 2]), epsilon=epsilon)


@pytest.mark.parametrize("returned", [torch.zeros(6), 1.0])
def test_a_token_loss_that_is_no_scalar_is_refused(implementation, returned):
    hidden = torch.randn(6, 4).requires_grad_()
    with pytest.raises(TypeError, match="token_loss must return .a scalar tensor, anything."):
        linear_grpo_loss(
            hidden, torch.randn(40, 4), torch.zeros(6, dtype=torch.int64), lambda scores, part: (returned, None),
            backend=implementation,
        )  # fmt: skip


def test_transforms_of_torch_func_are_refused():
    targets, hidden, weight = torch.zeros(6, dtype=torch.int64), torch.randn(6, 4), torch.randn(40, 4)
    transformed = (
        lambda: torch.func.grad(lambda x: grouped_log_prob(x, targets).log_prob.sum())(torch.randn(6, 40)),
        lambda: torch.func.jvp(lambda x: grouped_log_prob(x, targets).log_prob, (hidden,), (hidden,)),
        lambda: torch.func.vmap(lambda x: linear_log_prob(x, weight, targets).log_prob)(hidden[None]),
        lambda: torch.func.grad(lambda x: grpo_token_loss(x, torch.ones(6))[0])(POLICY),
    )
    for call in transformed:
        with pytest.raises(RuntimeError, match="not within torch.func's transforms"):
            call()


def test_autocast_changes_nothing():
    targets = torch.arange(6)
    results = []
    for enabled in (False, True):
        leaves = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (6, 40)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, _ = linear_grpo_loss(
                *leaves, targets, lambda scores, part: grpo_token_loss(scores.log_prob, torch.ones(6)[part])
            )
            loss = loss + linear_log_prob(*leaves, targets).log_prob.sum()
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)
