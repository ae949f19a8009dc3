"""The GRPO loss, its variants and their gradients against a float64 loop written from the papers' formulas."""

import functools
import itertools
import math

import pytest
import torch

from r1mega.algorithm.grpo import PolicyTokens, grpo_loss, token_weights
from r1mega_kernels import grpo_token_loss

LENGTHS = (3, 1, 6, 4)
MAX_TOKENS = 8


def make_case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)

    def noise(scale):
        return torch.randn(total, generator=generator, dtype=torch.float64) * scale

    log_probs = -noise(1).abs() - 0.1
    old = log_probs + noise(0.3)
    return dict(
        log_probs=log_probs,
        old=old,
        sampler=old + noise(0.4),
        reference=log_probs + noise(0.3),
        advantages=torch.repeat_interleave(
            torch.tensor([1.2, -0.7, 0.4, -1.1], dtype=torch.float64), torch.tensor(LENGTHS)
        ),
        sequence_ids=torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)),
    )


def brute_force(x, case, *, low, high, ratio, aggregation, beta, cap):
    """Loop over responses and tokens in Python floats, on torch scalars so that autograd gives the gradient."""
    total_tokens, loss, start = sum(LENGTHS), 0.0, 0
    for length in LENGTHS:
        span = range(start, start + length)
        start += length
        mean_log_ratio = sum(x[t] - case["old"][t] for t in span) / length
        for t in span:
            r = torch.exp(x[t] - case["old"][t]) if ratio == "token" else torch.exp(mean_log_ratio)
            a = case["advantages"][t]
            term = torch.min(r * a, torch.clamp(r, 1 - low, 1 + high) * a)
            if cap is not None:
                term = term * min(math.exp(case["old"][t] - case["sampler"][t]), cap)
            term = -term
            if beta is not None:
                d = case["reference"][t] - x[t]
                term = term + beta * (torch.exp(d) - d - 1)
            weight = {
                "sequence": 1 / (len(LENGTHS) * length),
                "token": 1 / total_tokens,
                "constant": 1 / (len(LENGTHS) * MAX_TOKENS),
            }[aggregation]
            loss = loss + weight * term
    return loss


@pytest.mark.parametrize(
    ("ratio", "aggregation", "beta", "cap", "high"),
    list(
        itertools.product(
            ["token", "sequence"], ["sequence", "token", "constant"], [None, 0.05], [None, 1.1], [0.2, 10.0]
        )
    ),
)
def test_loss_and_gradient_equal_brute_force(ratio, aggregation, beta, cap, high):
    case = make_case()
    weights = token_weights(torch.tensor(LENGTHS), aggregation, MAX_TOKENS)
    tokens = PolicyTokens(
        advantages=case["advantages"],
        old_log_probs=case["old"],
        sampler_log_probs=case["sampler"],
        reference_log_probs=case["reference"] if beta is not None else None,
        weights=weights[case["sequence_ids"]],
        sequence_ids=case["sequence_ids"],
        num_sequences=len(LENGTHS),
    )
    y = case["log_probs"].clone().requires_grad_()
    want = brute_force(y, case, low=0.2, high=high, ratio=ratio, aggregation=aggregation, beta=beta, cap=cap)
    want.backward()
    for backend, tolerance in (("reference", 1e-12), (None, 1e-5)):
        x = case["log_probs"].clone().requires_grad_()
        loss, stats = grpo_loss(
            x, tokens, clip_low=0.2, clip_high=high, ratio=ratio, kl_coefficient=beta or 0.0, importance_cap=cap,
            backend=backend,
        )  # fmt: skip
        loss.backward()
        torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(x.grad, y.grad, rtol=tolerance, atol=tolerance)
        assert stats.num_tokens == sum(LENGTHS)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_without_variants_it_is_the_kernel_alone_to_the_bit(ratio, backend):
    """GSPO: the kernel on sequence means that are put together here, and once more for the KL."""
    case = {name: value.float() if value.is_floating_point() else value for name, value in make_case(7).items()}
    ids = case["sequence_ids"]
    weights = token_weights(torch.tensor(LENGTHS), "sequence", MAX_TOKENS)[ids].float()
    tokens = PolicyTokens(
        case["advantages"], case["old"], case["sampler"], case["reference"], weights, ids, len(LENGTHS)
    )
    kernel = functools.partial(
        grpo_token_loss, old_log_probs=case["old"], sampler_log_probs=case["sampler"],
        reference_log_probs=case["reference"], weights=weights, clip_low=0.2, clip_high=0.28, importance_cap=1.1,
        backend=backend,
    )  # fmt: skip
    x, y = (case["log_probs"].clone().requires_grad_() for _ in range(2))
    if ratio == "token":
        want, metrics = kernel(x, case["advantages"], kl_coefficient=0.05)
    else:
        zeros = torch.zeros(len(LENGTHS))
        sums = zeros.index_add(0, ids, x - case["old"])
        means = (sums / zeros.index_add(0, ids, torch.ones(sum(LENGTHS))))[ids]
        surrogate, metrics = kernel(case["old"] + means, case["advantages"])
        want = surrogate + kernel(x, torch.zeros(sum(LENGTHS)), kl_coefficient=0.05)[0]
    loss, stats = grpo_loss(
        y, tokens, clip_low=0.2, clip_high=0.28, ratio=ratio, kl_coefficient=0.05, importance_cap=1.1, backend=backend
    )
    want.backward()
    loss.backward()
    assert torch.equal(loss, want) and torch.equal(y.grad, x.grad)
    assert stats.clipped == metrics.clipped and stats.ratio_sum == metrics.ratio_sum


def test_splitting_into_microbatches_adds_up():
    case = make_case(3)
    weights = token_weights(torch.tensor(LENGTHS), "sequence", MAX_TOKENS)[case["sequence_ids"]]

    def loss_of(rows):
        ids = case["sequence_ids"][rows]
        unique, local = torch.unique(ids, return_inverse=True)
        return grpo_loss(
            case["log_probs"][rows],
            PolicyTokens(
                case["advantages"][rows], case["old"][rows], case["sampler"][rows], case["reference"][rows],
                weights[rows], local, len(unique),
            ),
            clip_low=0.2, clip_high=0.28, ratio="sequence", kl_coefficient=0.01, backend="reference",
        )[0]  # fmt: skip

    whole = loss_of(torch.arange(sum(LENGTHS)))
    cut = sum(LENGTHS[:2])
    parts = loss_of(torch.arange(cut)) + loss_of(torch.arange(cut, sum(LENGTHS)))
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-9)


def test_clip_fraction_counts_tokens_without_policy_gradient():
    case = make_case(5)
    tokens = PolicyTokens(
        case["advantages"], case["old"], case["sampler"], None, torch.ones(sum(LENGTHS), dtype=torch.float64),
        case["sequence_ids"], len(LENGTHS),
    )  # fmt: skip
    x = case["log_probs"].clone().requires_grad_()
    loss, stats = grpo_loss(x, tokens, clip_low=0.2, clip_high=0.2)
    loss.backward()
    assert stats.clipped == (x.grad == 0).sum() > 0


def test_k3_is_unbiased_over_the_vocabulary():
    """E_{x ~ pi}[k3] is KL(pi || ref) exactly when summed over the whole vocabulary: the loss with A = 0, weights pi."""
    generator = torch.Generator().manual_seed(1)
    pi = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(-1)
    ref = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(-1)
    tokens = PolicyTokens(torch.zeros_like(pi), pi, pi, ref, pi.exp(), torch.zeros(50, dtype=torch.long), 1)
    loss, _ = grpo_loss(pi, tokens, clip_low=0.2, clip_high=0.2, kl_coefficient=1.0, backend="reference")
    torch.testing.assert_close(loss, (pi.exp() * (pi - ref)).sum())


def test_unknown_aggregation_is_an_error():
    with pytest.raises(ValueError, match="mean_of_means"):
        token_weights(torch.tensor([1, 2]), "mean_of_means", 4)
