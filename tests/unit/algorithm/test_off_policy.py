"""Corrections and loss variants, value and gradient, against loops over responses and tokens written from their papers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from r1mega.algorithm.grpo import PolicyTokens, grpo_loss
from r1mega.algorithm.off_policy import OffPolicyRules, corrected

LENGTHS = (3, 1, 6, 4, 5)
ADVANTAGES = (1.2, -0.7, 0.4, -1.1, -0.3)
LOW, HIGH, BETA = 0.2, 0.28, 0.05


def make_tokens(seed=0):
    """(log-probs of the policy, the rest) in float64; every rule of the tests finds something to do and something to leave."""
    generator = torch.Generator().manual_seed(seed)
    total, lengths = sum(LENGTHS), torch.tensor(LENGTHS)

    def noise(scale):
        return torch.randn(total, generator=generator, dtype=torch.float64) * scale

    log_probs = -noise(1).abs() - 0.1
    old = log_probs + noise(0.5)
    shift = torch.repeat_interleave(torch.tensor([0.0, 0.3, -0.1, 0.4, -0.2], dtype=torch.float64), lengths)
    return log_probs, PolicyTokens(
        advantages=torch.repeat_interleave(torch.tensor(ADVANTAGES, dtype=torch.float64), lengths),
        old_log_probs=old,
        sampler_log_probs=old + shift + noise(0.3),
        reference_log_probs=log_probs + noise(0.3),
        weights=torch.rand(total, generator=generator, dtype=torch.float64),
        sequence_ids=torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths),
        num_sequences=len(LENGTHS),
    )


def spans():
    start = 0
    for length in LENGTHS:
        yield range(start, start + length)
        start += length


def level_of(ratios, level):
    """[one for each token] of a response's ratios, which are plain floats."""
    product = math.prod(ratios)
    return {
        "token": ratios,
        "sequence": [product] * len(ratios),
        "geometric": [product ** (1 / len(ratios))] * len(ratios),
    }[level]


def brute_force(x, tokens, rules, *, surrogate="clip", ratio="token", dual_clip=None, kl_bias_correction=False):
    """(loss, masked, rejected, capped tokens, weights applied): Python loops on torch scalars, so that autograd differentiates."""
    loss, masked, rejected, capped, applied = 0.0, 0, 0, 0, []
    for span in spans():
        old, sampler = ([values[t].item() for t in span] for values in (tokens.old_log_probs, tokens.sampler_log_probs))
        ratios = [math.exp(o - s) for o, s in zip(old, sampler, strict=True)]
        advantage = tokens.advantages[span[0]].item()
        drop = rules.reject_ratio is not None and min(ratios) < rules.reject_ratio
        drop |= rules.reject_kl is not None and sum(r - math.log(r) - 1 for r in ratios) / len(ratios) > rules.reject_kl
        keep = [
            rules.mask is None or rules.mask_low <= r <= rules.mask_high
            for r in level_of(ratios, rules.mask or "token")
        ]
        if rules.max_divergence is not None and advantage < 0:
            gap = sum(s - x[t].item() for s, t in zip(sampler, span, strict=True)) / len(span)
            keep = [k and gap <= rules.max_divergence for k in keep]
        importance = level_of(ratios, rules.importance_level)
        for place, t in enumerate(span):
            on = keep[place] and not drop
            weight = 1.0 if rules.importance_cap is None else min(importance[place], rules.importance_cap)
            capped += rules.importance_cap is not None and importance[place] > rules.importance_cap
            masked, rejected = masked + (not on), rejected + drop
            applied.append(weight if on else 0.0)
            term = -policy_term(x, tokens, span, t, surrogate, ratio, dual_clip) * weight if on else 0.0
            if not drop:
                d = tokens.reference_log_probs[t] - x[t]
                drift = torch.exp(x[t] - tokens.sampler_log_probs[t]) if kl_bias_correction else 1.0
                term = term + BETA * drift * (torch.exp(d) - d - 1)
            loss = loss + tokens.weights[t] * term
    return loss, masked, rejected, capped, applied


def policy_term(x, tokens, span, t, surrogate, ratio, dual_clip):
    """What is to be made large, of one token."""
    a = tokens.advantages[t]
    log_ratios = [x[u] - tokens.old_log_probs[u] for u in span]
    if surrogate == "gmpo":
        product = 1.0
        for log_ratio in log_ratios:
            r = torch.exp(log_ratio)
            product = product * (torch.clamp(r, max=1 + HIGH) if a > 0 else torch.clamp(r, min=1 - LOW))
        return product ** (1 / len(span)) * a
    r = torch.exp(log_ratios[t - span[0]] if ratio == "token" else sum(log_ratios) / len(span))
    if surrogate == "cispo":
        return torch.clamp(r, 1 - LOW, 1 + HIGH).detach() * a * x[t]
    if surrogate == "sapo":
        tau = 1.0 if a > 0 else 1.05
        return torch.sigmoid(tau * (r - 1)) * 4 / tau * a
    if dual_clip is not None:  # as INTELLECT-2 writes two-sided clipping
        return torch.min(torch.clamp(r, max=dual_clip) * a, torch.clamp(r, 1 - LOW, 1 + HIGH) * a)
    return torch.min(r * a, torch.clamp(r, 1 - LOW, 1 + HIGH) * a)


RULES = {
    "tis": OffPolicyRules(importance_cap=1.1),
    "sequence_tis": OffPolicyRules(importance_cap=1.1, importance_level="sequence"),
    "geometric_tis": OffPolicyRules(importance_cap=0.9, importance_level="geometric"),
    "icepop": OffPolicyRules(importance_cap=1.3, mask="token", mask_low=0.7, mask_high=1.3),
    "mis": OffPolicyRules(
        importance_cap=3.0, importance_level="sequence", mask="sequence", mask_low=0.0, mask_high=3.0
    ),
    "geometric_mask": OffPolicyRules(mask="geometric", mask_low=0.8, mask_high=1.2),
    "geometric_mask_token_tis": OffPolicyRules(importance_cap=1.1, mask="geometric", mask_low=0.8, mask_high=1.2),
    "sequence_masking": OffPolicyRules(max_divergence=0.2),
    "veto": OffPolicyRules(reject_ratio=0.6),
    "reject_kl": OffPolicyRules(reject_kl=0.068, importance_cap=1.2),
}


def check(rules, backend, tolerance, **variant):
    """The loss, its gradient and the metrics equal the loop's; what the rules did, and the loss."""
    log_probs, tokens = make_tokens()
    y = log_probs.clone().requires_grad_()
    want, masked, rejected, capped, applied = brute_force(y, tokens, rules, **variant)
    want.backward()
    x = log_probs.clone().requires_grad_()
    given, metrics = corrected(tokens, x, rules)
    loss, _ = grpo_loss(
        x, given, clip_low=LOW, clip_high=HIGH, kl_coefficient=BETA, backend=backend, **variant,
        importance_cap=rules.importance_cap if rules.importance_level == "token" else None,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad, y.grad, rtol=tolerance, atol=tolerance)
    assert (int(metrics.masked), int(metrics.rejected), int(metrics.capped)) == (masked, rejected, capped)
    assert float(metrics.weights) == pytest.approx(math.fsum(applied))
    assert float(metrics.squares) == pytest.approx(math.fsum(w * w for w in applied))
    return masked, rejected, capped, loss.detach()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("backend", "tolerance"), [("reference", 1e-12), (None, 1e-5)])
def test_rules_equal_the_loop(name, backend, tolerance):
    masked, rejected, capped, loss = check(RULES[name], backend, tolerance)
    assert masked + capped > 0 and masked < sum(LENGTHS), "the rule does nothing, or leaves nothing"
    assert (rejected > 0) == ("reject" in name or name == "veto")
    assert loss != check(OffPolicyRules(), backend, tolerance)[3]


VARIANTS = {
    "gspo": {"ratio": "sequence"},
    "cispo": {"surrogate": "cispo"},
    "sapo": {"surrogate": "sapo"},
    "sapo_of_sequences": {"surrogate": "sapo", "ratio": "sequence"},
    "gmpo": {"surrogate": "gmpo"},
    "two_sided": {"dual_clip": 1.3},
    "two_sided_gspo": {"dual_clip": 1.3, "ratio": "sequence"},
    "kl_bias_correction": {"kl_bias_correction": True},
    "kl_bias_correction_gspo": {"kl_bias_correction": True, "ratio": "sequence"},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rules", ["none", "sequence_tis", "mis", "reject_kl"])
def test_variants_equal_the_loop(name, rules):
    chosen = RULES.get(rules, OffPolicyRules())
    for backend, tolerance in (("reference", 1e-12), (None, 1e-5)):
        *_, loss = check(chosen, backend, tolerance, **VARIANTS[name])
        assert loss != check(chosen, backend, tolerance)[3]


def test_decoupled_objective():
    """Behaviour, proximal and trained policy apart (AReaL's decoupled objective): where nothing is capped or clipped, the gradient is that
    of plain importance sampling from the behaviour policy, whatever the proximal policy is.
    """
    log_probs, tokens = make_tokens()
    gradients = []
    for shift in (0.0, 0.3):
        moved = dataclasses.replace(tokens, old_log_probs=tokens.old_log_probs + shift)
        x = log_probs.clone().requires_grad_()
        loss, _ = grpo_loss(x, moved, clip_low=1 - 1e-9, clip_high=1e9, importance_cap=1e9, backend="reference")
        loss.backward()
        gradients.append(x.grad)
    ratio = (log_probs - tokens.sampler_log_probs).exp()
    for gradient in gradients:
        torch.testing.assert_close(gradient, -tokens.weights * ratio * tokens.advantages)


def test_a_level_without_a_cap_looks_at_no_sequence():
    """The tokens may be part of a microbatch: AlgorithmConfig.is_of_tokens says that the loss adds up over parts."""
    log_probs, tokens = make_tokens()
    unknown = dataclasses.replace(tokens, sequence_ids=tokens.sequence_ids + 99)
    rules = OffPolicyRules(importance_level="sequence", mask="token", mask_low=0.7, mask_high=1.3)
    given, metrics = corrected(unknown, log_probs, rules)
    want, of_level_token = corrected(tokens, log_probs, dataclasses.replace(rules, importance_level="token"))
    assert torch.equal(given.advantages, want.advantages) and float(metrics.weights) == float(of_level_token.weights)


def test_no_rule_leaves_the_tokens_as_they_are():
    log_probs, tokens = make_tokens()
    assert not OffPolicyRules().is_on
    given, metrics = corrected(tokens, log_probs, OffPolicyRules())
    assert torch.equal(given.advantages, tokens.advantages) and torch.equal(given.weights, tokens.weights)
    assert metrics.masked == metrics.rejected == metrics.capped == 0
    assert metrics.weights == metrics.squares == sum(LENGTHS)


def test_products_over_long_responses_do_not_overflow():
    count = 30_000
    zeros = torch.zeros(count)
    tokens = PolicyTokens(
        advantages=torch.ones(count), old_log_probs=zeros + 0.1, sampler_log_probs=zeros, reference_log_probs=None,
        weights=torch.ones(count), sequence_ids=torch.zeros(count, dtype=torch.long), num_sequences=1,
    )  # fmt: skip
    given, metrics = corrected(tokens, zeros, OffPolicyRules(importance_cap=2.0, importance_level="sequence"))
    assert (given.advantages == 2).all() and metrics.capped == count
    _, metrics = corrected(tokens, zeros, OffPolicyRules(mask="sequence", mask_low=0.0, mask_high=5.0))
    assert metrics.masked == count


@pytest.mark.parametrize("variant", [*VARIANTS.values(), {}])
@pytest.mark.parametrize("rules", ["mis", "geometric_mask_token_tis", "sequence_masking", "reject_kl"])
def test_any_packing_of_whole_responses_adds_up(variant, rules):
    log_probs, tokens = make_tokens(3)

    def loss_of(members):
        rows = torch.cat([(tokens.sequence_ids == s).nonzero()[:, 0] for s in members])
        ids = torch.cat([torch.full((LENGTHS[s],), place) for place, s in enumerate(members)])
        x = log_probs[rows].requires_grad_()
        part = PolicyTokens(
            tokens.advantages[rows], tokens.old_log_probs[rows], tokens.sampler_log_probs[rows],
            tokens.reference_log_probs[rows], tokens.weights[rows], ids, len(members),
        )  # fmt: skip
        given, metrics = corrected(part, x, RULES[rules])
        cap = RULES[rules].importance_cap if RULES[rules].importance_level == "token" else None
        loss, _ = grpo_loss(
            x, given, clip_low=LOW, clip_high=HIGH, kl_coefficient=BETA, importance_cap=cap, backend="reference",
            **variant,
        )  # fmt: skip
        loss.backward()
        gradient = torch.zeros_like(log_probs).index_copy(0, rows, x.grad)
        return loss.detach(), gradient, torch.stack([metrics.masked, metrics.rejected, metrics.capped, metrics.squares])

    whole = loss_of([0, 1, 2, 3, 4])
    parts = [loss_of(members) for members in ([3, 0], [4], [2, 1])]
    for place, expected in enumerate(whole):
        torch.testing.assert_close(sum(part[place] for part in parts), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"surrogate": "gmpo", "ratio": "sequence"}, "'gmpo' takes the ratios of tokens"),
        ({"surrogate": "cispo", "ratio": "sequence"}, "'cispo' takes the ratios of tokens"),
        ({"surrogate": "gmpo", "dual_clip": 2.0}, "'gmpo' has no use for it"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    log_probs, tokens = make_tokens()
    with pytest.raises(ValueError, match=message):
        grpo_loss(log_probs, tokens, clip_low=LOW, clip_high=HIGH, **arguments)


def test_unknown_level():
    log_probs, tokens = make_tokens()
    with pytest.raises(ValueError, match="unknown level of a ratio 'turn'"):
        corrected(tokens, log_probs, OffPolicyRules(mask="turn"))
