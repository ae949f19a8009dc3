"""grpo_token_loss against the objective written out token by token in float64 Python."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from r1mega_kernels import grpo_token_loss


def brute_force(token, clip_low, clip_high, dual_clip, beta, cap):
    """(surrogate loss, clipped, k3, truncated) of one token: plain Python floats."""
    pi, old, reference, sampler, advantage = token
    ratio = math.exp(pi - old)
    plain, bounded = ratio * advantage, min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage
    surrogate, clipped = min(plain, bounded), bounded < plain
    if dual_clip is not None and advantage < 0 and surrogate < dual_clip * advantage:
        surrogate, clipped = dual_clip * advantage, True
    importance = math.exp(old - sampler)
    weight = 1.0 if cap is None else min(importance, cap)
    kl = math.exp(reference - pi) - (reference - pi) - 1
    return -weight * surrogate + beta * kl, clipped, kl, cap is not None and importance > cap


def random_tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy = -torch.rand(count, generator=generator, dtype=torch.float64) * 6
    noise = torch.randn(3, count, generator=generator, dtype=torch.float64) * torch.tensor([[0.4], [0.7], [0.2]])
    noise[1, : count // 3] *= 1e-3  # KL near 0, where exp(d) - d - 1 cancels
    advantages = torch.randn(count, generator=generator, dtype=torch.float64)
    advantages[::7] = 0
    weights = torch.rand(count, generator=generator, dtype=torch.float64)
    return policy, policy + noise[0], policy + noise[1], policy + noise[0] + noise[2], advantages, weights


OPTIONS = list(itertools.product([(0.2, 0.2), (0.2, 0.28), (1.0, 9.0)], [None, 2.0], [0.0, 0.1], [None, 1.1]))


@pytest.mark.parametrize(("clip", "dual_clip", "beta", "cap"), OPTIONS)
def test_against_the_written_out_objective(implementation, clip, dual_clip, beta, cap):
    tensors = [t.float() for t in random_tokens(531)]
    tokens = list(zip(*(t.tolist() for t in tensors), strict=True))
    options = (*clip, dual_clip, beta, cap)
    expected = [brute_force(token[:5], *options) for token in tokens]
    policy, old, reference, sampler, advantages, weights = tensors
    policy.requires_grad_()
    loss, metrics = grpo_token_loss(
        policy, advantages, old, reference_log_probs=reference, sampler_log_probs=sampler, weights=weights,
        clip_low=clip[0], clip_high=clip[1], dual_clip=dual_clip, kl_coefficient=beta, importance_cap=cap,
        backend=implementation,
    )  # fmt: skip
    total = math.fsum(e[0] * t[5] for e, t in zip(expected, tokens, strict=True))
    assert float(loss.detach()) == pytest.approx(total, rel=2e-6, abs=2e-5)
    assert metrics.num_tokens == 531 and metrics.clipped == sum(e[1] for e in expected)
    assert metrics.truncated == sum(e[3] for e in expected)
    assert float(metrics.kl) == pytest.approx(math.fsum(e[2] for e in expected), rel=2e-6)
    gaps = [abs(t[0] - t[3]) for t in tokens]
    assert float(metrics.mismatch_sum) == pytest.approx(math.fsum(gaps), rel=1e-5)
    assert float(metrics.mismatch_max) == pytest.approx(max(gaps), rel=1e-5)
    assert float(metrics.ratio_sum) == pytest.approx(math.fsum(math.exp(t[0] - t[1]) for t in tokens), rel=1e-6)
    loss.backward()
    step = 1e-6
    for index in range(0, 531, 5):
        token = tokens[index]
        up, down = ((token[0] + s, *token[1:5]) for s in (step, -step))
        if brute_force(up, *options)[1] != brute_force(down, *options)[1]:
            continue  # at a corner of the clip
        slope = (brute_force(up, *options)[0] - brute_force(down, *options)[0]) / (2 * step) * token[5]
        assert float(policy.grad[index]) == pytest.approx(slope, rel=1e-5, abs=2e-6)


def variant(pi, held, token, surrogate, corrected):
    """-(surrogate) w_is + 0.1 KL of one token, plain Python floats. held: the log-prob in what carries no gradient."""
    old, reference, sampler, advantage = token
    if surrogate == "cispo":
        value = min(max(math.exp(held - old), 0.8), 1.28) * advantage * pi
    else:
        tau = 1.5 if advantage > 0 else 2.0
        value = 4 / tau / (1 + math.exp(-tau * (math.exp(pi - old) - 1))) * advantage
    drift = math.exp(pi - sampler) if corrected else 1.0
    kl = math.exp(reference - pi) - (reference - pi) - 1
    return -value * min(math.exp(old - sampler), 1.1) + 0.1 * drift * kl


@pytest.mark.parametrize("surrogate", ["cispo", "sapo"])
@pytest.mark.parametrize("corrected", [False, True])
def test_variants_against_the_written_out_objective(implementation, surrogate, corrected):
    policy, old, reference, sampler, advantages, weights = (t.float() for t in random_tokens(531, seed=3))
    tokens = list(zip(*(t.tolist() for t in (policy, old, reference, sampler, advantages, weights)), strict=True))
    policy.requires_grad_()
    loss, metrics = grpo_token_loss(
        policy, advantages, old, reference_log_probs=reference, sampler_log_probs=sampler, weights=weights,
        clip_low=0.2, clip_high=0.28, kl_coefficient=0.1, importance_cap=1.1, surrogate=surrogate,
        sapo_temperatures=(1.5, 2.0), kl_bias_correction=corrected, backend=implementation,
    )  # fmt: skip
    loss.backward()
    total = math.fsum(variant(t[0], t[0], t[1:5], surrogate, corrected) * t[5] for t in tokens)
    assert float(loss.detach()) == pytest.approx(total, rel=5e-6, abs=2e-5)
    step = 1e-6
    for index, (pi, *token, weight) in enumerate(tokens):
        up, down = (variant(pi + s, pi, token, surrogate, corrected) for s in (step, -step))
        assert float(policy.grad[index]) == pytest.approx((up - down) / (2 * step) * weight, rel=2e-5, abs=2e-6)
    ratios = [(math.exp(t[0] - t[1]), t[4]) for t in tokens]
    bounded = sum(advantage != 0 and not 0.8 <= ratio <= 1.28 for ratio, advantage in ratios)
    assert metrics.clipped == (bounded if surrogate == "cispo" else 0)


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
def test_a_weight_may_be_multiplied_into_the_advantage(implementation, surrogate):
    policy, old, _, _, advantages, _ = (t.float() for t in random_tokens(60))
    factors = torch.rand(60) * (torch.arange(60) % 3 > 0)

    def gradient(advantages):
        leaf = policy.clone().requires_grad_()
        loss, _ = grpo_token_loss(leaf, advantages, old, surrogate=surrogate, backend=implementation)
        loss.backward()
        return leaf.grad

    torch.testing.assert_close(gradient(advantages * factors), gradient(advantages) * factors, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("surrogate", ["cispo", "sapo"])
def test_variants_of_an_overflowing_ratio(implementation, surrogate):
    policy = torch.tensor([100.0, 100.0, 100.0], requires_grad=True)
    loss, _ = grpo_token_loss(
        policy, torch.tensor([1.0, 0.0, -1.0]), torch.full((3,), -100.0), surrogate=surrogate, backend=implementation
    )
    loss.backward()
    if surrogate == "cispo":
        assert policy.grad.tolist() == pytest.approx([-1.2, 0, 1.2])
    else:
        assert policy.grad.tolist() == [0, 0, 0] and float(loss.detach()) == pytest.approx(-4 + 4 / 1.05, rel=1e-5)


def test_corrected_kl_has_the_gradient_of_the_kl():
    """The sampler's mean of its gradient is that of KL(pi || ref), summed over the whole vocabulary; without, it is not."""
    generator = torch.Generator().manual_seed(2)
    logits, sampler, reference = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    sampler, reference = sampler.log_softmax(-1), reference.log_softmax(-1)

    def gradient(value_of):
        leaf = logits.clone().requires_grad_()
        value_of(leaf.log_softmax(-1)).backward()
        return leaf.grad

    exact = gradient(lambda pi: (pi.exp() * (pi - reference)).sum())

    def penalty(corrected, pi):
        return grpo_token_loss(
            pi, torch.zeros(40), sampler, reference_log_probs=reference, sampler_log_probs=sampler,
            weights=sampler.exp(), kl_coefficient=1.0, kl_bias_correction=corrected, backend="reference",
        )[0]  # fmt: skip

    torch.testing.assert_close(gradient(functools.partial(penalty, True)), exact)
    assert (gradient(functools.partial(penalty, False)) - exact).abs().max() > 0.1 * exact.abs().max()


def test_the_default_is_the_objective_without_variants(implementation):
    """To the bit: the terms as torch takes them one by one, for the reference; for all, whatever the variants' settings."""
    policy, old, reference, sampler, advantages, weights = (t.float() for t in random_tokens(5000, seed=4))

    def run(**further):
        leaf = policy.clone().requires_grad_()
        loss, metrics = grpo_token_loss(
            leaf, advantages, old, reference_log_probs=reference, sampler_log_probs=sampler, weights=weights,
            clip_high=0.28, kl_coefficient=0.1, backend=implementation, **further,
        )  # fmt: skip
        loss.backward()
        return loss.detach(), leaf.grad, metrics.clipped, metrics.kl

    found = run()
    other = run(surrogate="clip", sapo_temperatures=(3.0, 7.0), kl_bias_correction=False)
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    if implementation == "reference":
        ratio = (policy - old).exp()
        plain = torch.where(advantages == 0, torch.zeros_like(ratio), ratio * advantages)
        bounded = ratio.clamp(1 - 0.2, 1 + 0.28) * advantages
        gap = reference - policy
        near = gap.abs() < 0.25
        series = gap * gap * (0.5 + gap * (1 / 6 + gap * (1 / 24 + gap * (1 / 120 + gap * (1 / 720 + gap / 5040)))))
        kl = torch.where(near, series, torch.where(near, torch.zeros_like(gap), gap).exp() - gap - 1)
        slope = torch.where(bounded < plain, torch.zeros_like(plain), plain)
        assert torch.equal(found[1], (-slope - 0.1 * (kl + gap)) * weights)
        total = ((0.1 * kl - torch.where(bounded < plain, bounded, plain)) * weights).sum(dtype=torch.float64)
        assert torch.equal(found[0], total.float())


def test_small_kl_keeps_its_digits(implementation):
    """fp32 exp(d) - d - 1 has no correct digit at d = 1e-4; its value is d^2 / 2."""
    policy = torch.full((100,), -1.0)
    reference = policy + 2.0**-13
    _, metrics = grpo_token_loss(
        policy, torch.zeros(100), reference_log_probs=reference, kl_coefficient=1.0, backend=implementation
    )
    d = 2.0**-13
    assert float(metrics.kl) == pytest.approx(100 * (math.expm1(d) - d), rel=1e-6)


def test_masked_tokens_may_hold_anything(implementation):
    policy, old, reference, sampler, advantages, weights = (t.float() for t in random_tokens(300))
    mask = torch.rand(300, generator=torch.Generator().manual_seed(5)) > 0.4

    def run(chosen, mask):
        leaf = chosen[0].clone().requires_grad_()
        loss, metrics = grpo_token_loss(
            leaf, chosen[4], chosen[1], reference_log_probs=chosen[2], sampler_log_probs=chosen[3], weights=chosen[5],
            kl_coefficient=0.1, importance_cap=2.0, mask=mask, backend=implementation,
        )  # fmt: skip
        loss.backward()
        return loss, metrics, leaf.grad

    everything = [policy, old, reference, sampler, advantages, weights]
    kept = run([t[mask] for t in everything], None)
    poisoned = [torch.where(mask, t, torch.full_like(t, math.nan)) for t in everything]
    masked = run(poisoned, mask)
    torch.testing.assert_close(masked[0], kept[0])
    assert masked[1].num_tokens == mask.sum() and masked[1].clipped == kept[1].clipped
    assert torch.equal(masked[2][mask], kept[2]) and (masked[2][~mask] == 0).all()


def test_advantages_and_weights_of_sequences(implementation):
    policy, old, *_ = (t.float() for t in random_tokens(50))
    lengths = torch.tensor([20, 0, 5, 25])
    ids = torch.repeat_interleave(torch.arange(4), lengths)
    advantages, weights = torch.tensor([1.0, 9.0, -2.0, 0.5]), torch.tensor([0.1, 9.0, 0.3, 0.2])
    grads = []
    for arguments in (
        {"advantages": advantages, "weights": weights, "sequence_ids": ids},
        {"advantages": advantages, "weights": weights[ids], "sequence_ids": ids},
        {"advantages": advantages[ids], "weights": weights[ids]},
    ):
        leaf = policy.clone().requires_grad_()
        loss, _ = grpo_token_loss(leaf, old_log_probs=old, backend=implementation, **arguments)
        (loss * 2).backward()
        grads.append((loss.detach(), leaf.grad))
    for other in grads[1:]:
        assert torch.equal(grads[0][0], other[0]) and torch.equal(grads[0][1], other[1])


def test_on_policy_has_ratio_one_and_its_gradient(implementation):
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, metrics = grpo_token_loss(policy, torch.tensor([3.0, -1.0]), backend=implementation)
    loss.backward()
    assert float(loss.detach()) == -2.0 and metrics.ratio_sum == 2 and policy.grad.tolist() == [-3.0, 1.0]


def test_overflowing_ratio(implementation):
    policy = torch.tensor([100.0, 100.0, 100.0], requires_grad=True)
    loss, metrics = grpo_token_loss(
        policy, torch.tensor([1.0, 0.0, 0.0]), torch.full((3,), -100.0), clip_high=0.5, backend=implementation
    )
    loss.backward()
    assert float(loss.detach()) == -1.5 and metrics.clipped == 1 and policy.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("further", [{"weights": torch.tensor([0.0, 1.0]), "kl_coefficient": 0.001}, {}])
@pytest.mark.parametrize("corrected", [False, True])
def test_a_kl_that_overflowed_is_not_in_what_does_not_count_it(implementation, further, corrected):
    """A token without weight, or every token where the coefficient is 0: k3 itself is infinite."""
    policy = torch.tensor([-100.0, -1.0], requires_grad=True)
    loss, metrics = grpo_token_loss(
        policy, torch.tensor([0.0, 1.0]), policy.detach(), reference_log_probs=torch.tensor([-2.0, -1.0]),
        sampler_log_probs=torch.tensor([-2.0, -1.0]), kl_bias_correction=corrected, backend=implementation, **further,
    )  # fmt: skip
    loss.backward()
    assert metrics.kl.isinf() and float(loss.detach()) == -1 and policy.grad.tolist() == [0, -1]


@pytest.mark.parametrize("distance", [20.0, 59.0, 61.0, 87.0, 98.0])
def test_corrected_kl_is_finite_where_its_value_is(implementation, distance):
    policy = torch.tensor([-2.0 - distance], requires_grad=True)
    loss, _ = grpo_token_loss(
        policy, torch.zeros(1), reference_log_probs=torch.tensor([-2.0]), sampler_log_probs=torch.tensor([-3.0]),
        kl_coefficient=1.0, kl_bias_correction=True, backend=implementation,
    )  # fmt: skip
    loss.backward()
    drift = math.exp(1 - distance)
    assert float(loss.detach()) == pytest.approx(math.e - drift * (distance + 1), rel=1e-5)
    assert float(policy.grad) == pytest.approx(-drift * distance, rel=1e-5, abs=1e-38)


def test_not_a_number_reaches_the_loss(implementation):
    policy = torch.full((40,), -1.0)
    policy[17] = math.nan
    loss, _ = grpo_token_loss(policy, torch.ones(40), torch.full((40,), -1.0), backend=implementation)
    assert loss.isnan()


def test_sum_does_not_depend_on_the_threads(native):
    policy, old, reference, _, advantages, weights = (t.float() for t in random_tokens(30000))
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        loss, metrics = grpo_token_loss(
            policy, advantages, old, reference_log_probs=reference, weights=weights, kl_coefficient=0.1
        )
        results.append((float(loss), float(metrics.kl), float(metrics.ratio_sum)))
    assert results[0] == results[1] == results[2]


def test_no_tokens(implementation):
    loss, metrics = grpo_token_loss(torch.empty(0, requires_grad=True), torch.empty(0), backend=implementation)
    loss.backward()
    assert float(loss.detach()) == 0 and metrics.num_tokens == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(4)}, "advantages has shape"),
        ({"kl_coefficient": 0.1}, "needs reference_log_probs"),
        ({"importance_cap": 2.0}, "needs sampler_log_probs"),
        ({"mask": torch.ones(3, dtype=torch.bool, device="meta")}, "mask is on meta, expected cpu"),
        ({"weights": torch.ones(3, device="meta")}, "weights is on meta, expected cpu"),
        ({"dual_clip": 0.9}, "dual_clip must be > 1"),
        ({"dual_clip": 3.0, "surrogate": "sapo"}, "'sapo' has no use for it"),
        ({"surrogate": "reinforce"}, r"one of \['clip', 'cispo', 'sapo'\], not 'reinforce'"),
        ({"sapo_temperatures": (1.0, 0.0)}, "sapo_temperatures must be > 0"),
        ({"sapo_temperatures": (51.0, 1.0)}, "sapo_temperatures must be > 0 and <= 50"),
        ({"kl_bias_correction": True}, "kl_bias_correction needs sampler_log_probs"),
        ({"sequence_ids": torch.tensor([0, 1, 3])}, r"sequence_ids must be in \[0, 3\)"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"log_probs": torch.zeros(3), "advantages": torch.zeros(3)} | change
    with pytest.raises(ValueError, match=message):
        grpo_token_loss(**arguments)


def test_operator_passes_torchs_own_checks(native):
    n, empty = torch.randn(20), torch.empty(0)
    arguments = (
        n.clone().requires_grad_(), n + 0.1, empty, empty, torch.randn(20), empty, torch.empty(0, dtype=torch.uint8),
        torch.empty(0, dtype=torch.int64), False, 0.2, 0.2, 0.0, 0.0, 0.0, 0, 1.0, 1.05, False, False,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.r1mega_kernels.token_loss.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
