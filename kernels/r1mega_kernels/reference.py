"""The operators as torch functions: what the compiled kernels are tested against, and what runs where none is built.

The same signatures and formulas as the compiled operators. Computed in the dtype of the statistics: float32, or float64
for float64 logits.
"""

from __future__ import annotations

import math

import torch

LOG2E = math.log2(math.e)


def _selected(x: torch.Tensor, rows: torch.Tensor, has_rows: bool) -> torch.Tensor:
    return x.index_select(0, rows) if has_rows else x


def _row_scale(
    inverse_temperature: torch.Tensor, rows: torch.Tensor, has_rows: bool, dtype: torch.dtype
) -> torch.Tensor:
    """[N] or [1] 1 / temperature of the selected rows."""
    per_token = inverse_temperature.numel() > 1
    return (_selected(inverse_temperature, rows, has_rows) if per_token else inverse_temperature).to(dtype)


def _exponents(logits: torch.Tensor, row_max: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[N, V] (x - max) / temperature in units of log2; -inf becomes a finite number whose power of two is 0."""
    base = torch.where(row_max == -math.inf, torch.zeros_like(row_max), row_max)
    return ((logits - base[:, None]) * (scale * LOG2E)[:, None]).clamp(min=-3e3)


def log_prob_stats(logits, targets, inverse_temperature, rows, has_rows, vocab_start, stats) -> None:
    """stats[N, 4] <- (max, sum 2^t, sum 2^t t, target's logit or NaN) of the rows of logits [T, V]."""
    x = _selected(logits, rows, has_rows).to(stats.dtype)
    scale = _row_scale(inverse_temperature, rows, has_rows, stats.dtype).expand(x.shape[0])
    row_max = x.amax(dim=-1)
    t = _exponents(x, row_max, scale)
    powers = t.exp2()
    column = _selected(targets, rows, has_rows) - vocab_start
    held = (column >= 0) & (column < x.shape[1])
    target = x.gather(1, column.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
    stats[:, 0] = row_max
    stats[:, 1] = powers.sum(-1)
    stats[:, 2] = (powers * t).sum(-1)
    stats[:, 3] = torch.where(held, target, torch.full_like(target, math.nan))


def log_prob_merge(shards, inverse_temperature, rows, has_rows, stats, results) -> None:
    """stats[N, 4] <- shards[ranks, N, 4] merged; results[3, N] <- log-prob, entropy, logsumexp."""
    scale = _row_scale(inverse_temperature, rows, has_rows, stats.dtype).expand(stats.shape[0])
    row_max = shards[..., 0].amax(dim=0)
    shift = ((shards[..., 0] - row_max) * (scale * LOG2E)).nan_to_num(nan=-3e3, neginf=-3e3).clamp(min=-3e3)
    factor = torch.where(shards[..., 1] == 0, torch.zeros_like(shift), shift.exp2())
    target = shards[..., 3]
    merged = target[0]
    for shard in target[1:]:
        merged = torch.where(shard.isnan(), merged, shard)
    stats[:, 0] = row_max
    stats[:, 1] = (factor * shards[..., 1]).sum(0)
    stats[:, 2] = (factor * (shards[..., 2] + shards[..., 1] * shift)).sum(0)
    stats[:, 3] = merged
    log_sum = stats[:, 1].log()
    results[0] = (merged - row_max) * scale - log_sum
    results[1] = (log_sum - math.log(2) * stats[:, 2] / stats[:, 1]).clamp(min=0)
    results[2] = row_max * scale + log_sum


def log_prob_backward(
    logits, targets, inverse_temperature, positions, has_positions, vocab_start, stats, entropy, grads, grad_logits
) -> None:
    """grad_logits[T, V] <- the gradient, from grads[3, N] of the results; 0 in rows not selected."""
    rows = (positions >= 0).nonzero()[:, 0] if has_positions else positions
    order = positions[rows].long() if has_positions else torch.arange(len(logits), device=logits.device)
    x = _selected(logits, rows, has_positions).to(stats.dtype)
    scale = _row_scale(inverse_temperature, rows, has_positions, stats.dtype).expand(x.shape[0])
    stats, entropy, (g, h, l) = stats[order], entropy[order], grads[:, order]
    t = _exponents(x, stats[:, 0], scale)
    log_sum = stats[:, 1].log()
    slope = -h * math.log(2)
    grad = t.exp2() * ((l - g - h * (entropy - log_sum))[:, None] + slope[:, None] * t) * (scale / stats[:, 1])[:, None]
    column = _selected(targets, rows, has_positions) - vocab_start
    held = (column >= 0) & (column < x.shape[1])
    at_target = torch.where(held, g * scale, torch.zeros_like(g))
    grad.scatter_add_(1, column.clamp(0, x.shape[1] - 1)[:, None], at_target[:, None])
    untouched = (g == 0) & (h == 0) & (l == 0)
    grad = torch.where(untouched[:, None], torch.zeros_like(grad), grad).to(grad_logits.dtype)
    if has_positions:
        grad_logits.zero_()
        grad_logits[rows] = grad
    else:
        grad_logits.copy_(grad)


def group_advantage(rewards, offsets, mask, baseline, scale, epsilon, advantages) -> None:
    """advantages[R] <- from rewards[R] (float64) of groups offsets[g]:offsets[g + 1]; 0 where masked or no signal."""
    counted = mask.bool() if mask.numel() else torch.ones_like(rewards, dtype=torch.bool)
    num_groups = offsets.numel() - 1
    index = torch.repeat_interleave(torch.arange(num_groups, device=rewards.device), offsets.diff())
    values = torch.where(counted, rewards, torch.zeros_like(rewards))

    def per_group(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(num_groups, dtype=x.dtype, device=x.device).index_add_(0, index, x)

    count = per_group(counted.to(rewards.dtype))
    mean = per_group(values) / count.clamp(min=1)
    centred = torch.where(counted, rewards - mean[index], torch.zeros_like(rewards))
    infinite = torch.full((num_groups,), math.inf, dtype=rewards.dtype, device=rewards.device)
    low = infinite.scatter_reduce(0, index[counted], rewards[counted], "amin")
    high = (-infinite).scatter_reduce(0, index[counted], rewards[counted], "amax")
    has_signal = (high > low) | ~mean.isfinite()
    factor = torch.ones_like(mean)
    if baseline == 1:
        factor = factor * count / (count - 1).clamp(min=1)
    if scale == 1:
        factor = factor / ((per_group(centred**2) / count.clamp(min=1)).sqrt() + epsilon)
    elif scale == 2:
        factor = factor / (rewards[counted].std(correction=0) + epsilon if counted.any() else 1.0)
    advantages.copy_(torch.where(has_signal[index], centred * factor[index], torch.zeros_like(centred)))


def _exp_minus_linear(d: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1; near 0 by its series, which keeps the digits that the difference loses."""
    series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
    near = d.abs() < (0.25 if d.dtype == torch.float32 else 1e-3)
    return torch.where(near, series, torch.where(near, torch.zeros_like(d), d).exp() - d - 1)


def grpo_token_loss(
    log_probs, old, reference, sampler, advantages, weights, mask, sequence_ids, weights_per_sequence,
    clip_low, clip_high, dual_clip, kl_coefficient, importance_cap, grad, sums,
) -> None:  # fmt: skip
    """grad[N] and sums[8] <- weighted loss, its gradient and the metrics of N tokens (see `loss.grpo_token_loss`)."""
    counted = mask.bool() if mask.numel() else torch.ones_like(log_probs, dtype=torch.bool)

    def kept(x: torch.Tensor, by_sequence: bool = False) -> torch.Tensor:
        return (x[sequence_ids] if by_sequence and sequence_ids.numel() else x)[counted].to(log_probs.dtype)

    policy, adv = log_probs[counted], kept(advantages, True)
    weight = kept(weights, weights_per_sequence) if weights.numel() else torch.ones_like(policy)
    behaviour = kept(old) if old.numel() else policy
    zero = torch.zeros_like(adv)
    ratio = (policy - behaviour).exp()
    plain = torch.where(adv == 0, zero, ratio * adv)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * adv
    cut = bounded < plain
    surrogate = torch.where(cut, bounded, plain)
    if dual_clip > 0:
        dual = (adv < 0) & (surrogate < adv * dual_clip)
        surrogate, cut = torch.where(dual, adv * dual_clip, surrogate), cut | dual
    slope = torch.where(cut, zero, plain)  # d(ratio A) / d(log_prob) = ratio A
    truncated = zero
    if importance_cap > 0:
        importance = (behaviour - kept(sampler)).exp()
        truncated = (importance > importance_cap).to(adv.dtype)
        surrogate, slope = (x * importance.clamp(max=importance_cap) for x in (surrogate, slope))
    gap = kept(reference) - policy if reference.numel() else zero
    kl = _exp_minus_linear(gap)
    loss = ((kl_coefficient * kl - surrogate) * weight).sum(dtype=torch.float64)
    policy_grad = (-slope - kl_coefficient * (kl + gap)) * weight  # d(k3) / d(log_prob) = 1 - exp(gap)
    mismatch = (policy - kept(sampler)).abs() if sampler.numel() else zero
    grad.zero_()
    grad[counted] = policy_grad
    totals = (loss, counted.sum(), cut.sum(), kl.sum(), mismatch.sum(), None, truncated.sum(), ratio.sum())
    for k, total in enumerate(totals):
        sums[k] = mismatch.max() if total is None and len(mismatch) else 0.0 if total is None else total
