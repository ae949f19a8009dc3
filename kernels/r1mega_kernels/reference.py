"""The operators as torch functions: what the compiled kernels are tested against, and what runs where none is built.

The same signatures and formulas as the compiled operators. Computed in the dtype of the statistics: float32, or float64
for float64 logits. Names end in their shape where sizes mix; the letters: CONTRIBUTING.md.
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


def _exponents(logits_NV: torch.Tensor, row_max_N: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """(x - max) / temperature in units of log2; -inf becomes a finite number whose power of two is 0."""
    base_N = torch.where(row_max_N == -math.inf, torch.zeros_like(row_max_N), row_max_N)
    return ((logits_NV - base_N[:, None]) * (scale_N * LOG2E)[:, None]).clamp(min=-3e3)


def _check_targets(targets: torch.Tensor, vocab_size: int) -> None:
    """As the operators of a CPU; on a GPU, or traced by torch.compile, values are not looked at."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or not targets.numel():
        return
    low, high = (int(v) for v in targets.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"targets must be in [0, {vocab_size}), found {low} to {high}")


def log_prob_stats(
    logits, targets, inverse_temperature, rows, has_rows, vocab_start, vocab_size, entropy, stats
) -> None:
    """stats[N, 4] <- (max, sum 2^t, sum 2^t t or without the entropy NaN, target's logit or NaN) of the rows of logits [T, V]."""
    _check_targets(_selected(targets, rows, has_rows), vocab_size)
    x_NV = _selected(logits, rows, has_rows).to(stats.dtype)
    scale_N = _row_scale(inverse_temperature, rows, has_rows, stats.dtype).expand(x_NV.shape[0])
    row_max_N = x_NV.amax(dim=-1)
    t_NV = _exponents(x_NV, row_max_N, scale_N)
    powers_NV = t_NV.exp2()
    column_N = _selected(targets, rows, has_rows) - vocab_start
    held_N = (column_N >= 0) & (column_N < x_NV.shape[1])
    target_N = x_NV.gather(1, column_N.clamp(0, x_NV.shape[1] - 1)[:, None])[:, 0]
    stats[:, 0] = row_max_N
    stats[:, 1] = powers_NV.sum(-1)
    stats[:, 2] = (powers_NV * t_NV).sum(-1) if entropy else math.nan
    stats[:, 3] = torch.where(held_N, target_N, torch.full_like(target_N, math.nan))


def log_prob_merge(shards, inverse_temperature, rows, has_rows, stats, results) -> None:
    """stats[N, 4] <- shards[ranks, N, 4] merged; results[3, N] <- log-prob, entropy, logsumexp."""
    scale_N = _row_scale(inverse_temperature, rows, has_rows, stats.dtype).expand(stats.shape[0])
    row_max_N = shards[..., 0].amax(dim=0)
    shift_KN = ((shards[..., 0] - row_max_N) * (scale_N * LOG2E)).nan_to_num(nan=-3e3, neginf=-3e3).clamp(min=-3e3)
    factor_KN = torch.where(shards[..., 1] == 0, torch.zeros_like(shift_KN), shift_KN.exp2())
    target_KN = shards[..., 3]
    merged_N = target_KN[0]
    for shard_N in target_KN[1:]:
        merged_N = torch.where(shard_N.isnan(), merged_N, shard_N)
    stats[:, 0] = row_max_N
    stats[:, 1] = (factor_KN * shards[..., 1]).sum(0)
    stats[:, 2] = (factor_KN * (shards[..., 2] + shards[..., 1] * shift_KN)).sum(0)
    stats[:, 3] = merged_N
    log_sum_N = stats[:, 1].log()
    results[0] = (merged_N - row_max_N) * scale_N - log_sum_N
    results[1] = (log_sum_N - math.log(2) * stats[:, 2] / stats[:, 1]).clamp(min=0)
    results[2] = row_max_N * scale_N + log_sum_N


def log_prob_backward(
    logits, targets, inverse_temperature, positions, has_positions, vocab_start, stats, entropy, grads, grad_logits
) -> None:
    """grad_logits[T, V] <- the gradient, from grads[3, N] of the results; 0 in rows not selected."""
    rows_N = (positions >= 0).nonzero()[:, 0] if has_positions else positions
    order_N = positions[rows_N].long() if has_positions else torch.arange(len(logits), device=logits.device)
    x_NV = _selected(logits, rows_N, has_positions).to(stats.dtype)
    scale_N = _row_scale(inverse_temperature, rows_N, has_positions, stats.dtype).expand(x_NV.shape[0])
    stats_N4, entropy_N, (g_N, h_N, l_N) = stats[order_N], entropy[order_N], grads[:, order_N]
    t_NV = _exponents(x_NV, stats_N4[:, 0], scale_N)
    of_entropy_N = torch.where(h_N == 0, 0.0, h_N * (entropy_N - stats_N4[:, 1].log()))  # one not asked for is NaN
    slope_N = -h_N * math.log(2)
    grad_NV = (
        t_NV.exp2()
        * ((l_N - g_N - of_entropy_N)[:, None] + slope_N[:, None] * t_NV)
        * (scale_N / stats_N4[:, 1])[:, None]
    )
    column_N = _selected(targets, rows_N, has_positions) - vocab_start
    held_N = (column_N >= 0) & (column_N < x_NV.shape[1])
    at_target_N = torch.where(held_N, g_N * scale_N, torch.zeros_like(g_N))
    grad_NV.scatter_add_(1, column_N.clamp(0, x_NV.shape[1] - 1)[:, None], at_target_N[:, None])
    untouched_N = (g_N == 0) & (h_N == 0) & (l_N == 0)
    grad_NV = torch.where(untouched_N[:, None], torch.zeros_like(grad_NV), grad_NV).to(grad_logits.dtype)
    if has_positions:
        grad_logits.zero_()
        grad_logits[rows_N] = grad_NV
    else:
        grad_logits.copy_(grad_NV)


def _of_kept(logits, vocab_start, kept_ids, kept_ranges) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [T, V], -inf where an id is not kept; [T, V] whether it is). An empty list keeps every id."""
    begins_T, ends_T = kept_ranges.unbind(1)
    lengths_T = ends_T - begins_T
    owner_M = torch.repeat_interleave(lengths_T)
    within_M = torch.arange(len(owner_M), device=logits.device) - (lengths_T.cumsum(0) - lengths_T)[owner_M]
    column_M = kept_ids[begins_T[owner_M] + within_M].long() - vocab_start
    held_M = (column_M >= 0) & (column_M < logits.shape[1])
    kept_TV = (lengths_T == 0)[:, None].repeat(1, logits.shape[1])
    kept_TV[owner_M[held_M], column_M[held_M]] = True
    return logits.masked_fill(~kept_TV, -math.inf), kept_TV


def kept_log_prob_stats(
    logits, targets, inverse_temperature, rows, has_rows, vocab_start, vocab_size, entropy, stats, kept_ids, kept_ranges
) -> None:
    """As `log_prob_stats`, over the columns that each token keeps; no target's logit where it is not kept."""
    masked_TV, kept_TV = _of_kept(logits, vocab_start, kept_ids, kept_ranges)
    log_prob_stats(masked_TV, targets, inverse_temperature, rows, has_rows, vocab_start, vocab_size, entropy, stats)
    column_T = (targets - vocab_start).clamp(0, logits.shape[1] - 1)
    missing_T = ~kept_TV.gather(1, column_T[:, None])[:, 0]
    stats[:, 3].masked_fill_(_selected(missing_T, rows, has_rows), math.nan)


def kept_log_prob_backward(
    logits, targets, inverse_temperature, positions, has_positions, vocab_start, stats, entropy, grads, grad_logits,
    kept_ids, kept_ranges, scratch,
) -> None:  # fmt: skip
    """As `log_prob_backward`; 0 in columns that a token does not keep."""
    masked_TV, kept_TV = _of_kept(logits, vocab_start, kept_ids, kept_ranges)
    log_prob_backward(
        masked_TV, targets, inverse_temperature, positions, has_positions, vocab_start, stats, entropy, grads,
        grad_logits,
    )  # fmt: skip
    grad_logits.masked_fill_(~kept_TV, 0)


def group_advantage(rewards, offsets, mask, baseline, scale, epsilon, advantages) -> None:
    """advantages[R] <- from rewards[R] (float64) of groups offsets[g]:offsets[g + 1]; 0 where masked or no signal."""
    ends = offsets.tolist() if offsets.device.type == "cpu" and not torch.compiler.is_compiling() else None
    if ends is not None and (ends[0] != 0 or ends[-1] != len(rewards) or ends != sorted(ends)):
        raise ValueError(f"group_offsets must rise from 0 to {len(rewards)}, not {ends[:8]}...")
    counted_R = mask.bool() if mask.numel() else torch.ones_like(rewards, dtype=torch.bool)
    num_groups = offsets.numel() - 1
    index_R = torch.repeat_interleave(torch.arange(num_groups, device=rewards.device), offsets.diff())
    values_R = torch.where(counted_R, rewards, torch.zeros_like(rewards))

    def per_group(x_R: torch.Tensor) -> torch.Tensor:
        return torch.zeros(num_groups, dtype=x_R.dtype, device=x_R.device).index_add_(0, index_R, x_R)

    count_G = per_group(counted_R.to(rewards.dtype))
    mean_G = per_group(values_R) / count_G.clamp(min=1)
    centred_R = torch.where(counted_R, rewards - mean_G[index_R], torch.zeros_like(rewards))
    infinite_G = torch.full((num_groups,), math.inf, dtype=rewards.dtype, device=rewards.device)
    low_G = infinite_G.scatter_reduce(0, index_R[counted_R], rewards[counted_R], "amin")
    high_G = (-infinite_G).scatter_reduce(0, index_R[counted_R], rewards[counted_R], "amax")
    has_signal_G = (high_G > low_G) | ~mean_G.isfinite()
    factor_G = torch.ones_like(mean_G)
    if baseline == 1:
        factor_G = factor_G * count_G / (count_G - 1).clamp(min=1)
    if scale == 1:
        factor_G = factor_G / ((per_group(centred_R**2) / count_G.clamp(min=1)).sqrt() + epsilon)
    elif scale == 2:
        factor_G = factor_G / (rewards[counted_R].std(correction=0) + epsilon if counted_R.any() else 1.0)
    advantages.copy_(torch.where(has_signal_G[index_R], centred_R * factor_G[index_R], torch.zeros_like(centred_R)))


def _exp_minus_linear(d: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1; near 0 by its series, which keeps the digits that the difference loses."""
    series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
    near = d.abs() < (0.25 if d.dtype == torch.float32 else 1e-3)
    return torch.where(near, series, torch.where(near, torch.zeros_like(d), d).exp() - d - 1)


def grpo_token_loss(
    log_probs, old, reference, sampler, advantages, weights, mask, sequence_ids, weights_per_sequence,
    clip_low, clip_high, dual_clip, kl_coefficient, importance_cap, surrogate_kind, sapo_positive, sapo_negative,
    kl_bias_correction, grad, sums,
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
    if surrogate_kind == 1:  # CISPO
        slope = torch.where(adv == 0, zero, bounded)
        surrogate = torch.where(adv == 0, zero, bounded * policy)
        cut = (adv != 0) & ((ratio < 1 - clip_low) | (ratio > 1 + clip_high))
    elif surrogate_kind == 2:  # SAPO
        tau = torch.where(adv > 0, torch.full_like(adv, sapo_positive), torch.full_like(adv, sapo_negative))
        tail = (tau * (1 - ratio)).exp()
        gate = 1 / (1 + tail)
        surrogate = torch.where(adv == 0, zero, gate * adv * 4 / tau)
        slope = torch.where(tail == 0, zero, tail * ratio) * gate * gate * adv * 4
        slope, cut = torch.where(adv == 0, zero, slope), torch.zeros_like(cut)
    truncated = zero
    if importance_cap > 0:
        importance = (behaviour - kept(sampler)).exp()
        truncated = (importance > importance_cap).to(adv.dtype)
        surrogate, slope = (x * importance.clamp(max=importance_cap) for x in (surrogate, slope))
    gap = kept(reference) - policy if reference.numel() else zero
    kl = _exp_minus_linear(gap)
    penalty, penalty_slope = kl, kl + gap  # d(k3) / d(log_prob) = 1 - exp(gap)
    if kl_bias_correction:  # d(w k3) / d(log_prob) = w (k3 + 1 - exp(gap)) = -w gap
        drift = (policy - kept(sampler)).exp()
        # exp(gap) may overflow where drift exp(gap) does not
        apart = (gap + policy - kept(sampler)).exp() - drift * (gap + 1)
        penalty, penalty_slope = torch.where(gap > 60, apart, drift * kl), drift * gap
    loss, policy_grad = -surrogate, -slope
    if kl_coefficient != 0:  # 0 times a KL that overflowed is not 0
        loss, policy_grad = kl_coefficient * penalty - surrogate, policy_grad - kl_coefficient * penalty_slope
    # no weight, no term: not even of what overflowed
    loss, policy_grad = (torch.where(weight == 0, zero, x * weight) for x in (loss, policy_grad))
    loss = loss.sum(dtype=torch.float64)
    mismatch = (policy - kept(sampler)).abs() if sampler.numel() else zero
    grad.zero_()
    grad[counted] = policy_grad
    totals = (loss, counted.sum(), cut.sum(), kl.sum(), mismatch.sum(), None, truncated.sum(), ratio.sum())
    for k, total in enumerate(totals):
        sums[k] = mismatch.max() if total is None and len(mismatch) else 0.0 if total is None else total
