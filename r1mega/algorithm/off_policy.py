"""Corrections for samples of a policy that is not the one they update: importance weights, masks, rejection.

Three policies: the sampler's (behaviour), whose log-probs came with the tokens; the old one (proximal), which the clipped
ratio is taken to: the trainer's weights before the step's updates, or the sampler's itself; and the one that is trained.
The formulas, and whose they are: docs/losses.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from r1mega.algorithm.grpo import PolicyTokens, sequence_mean, sequence_sum


@dataclass(frozen=True, slots=True)
class OffPolicyRules:
    """Ratios are pi_old / pi_sampler: 'token' each token's, 'sequence' the product over its response, 'geometric' their
    geometric mean. None: no such rule.

    importance_cap: the policy term of a token times min(ratio, cap), detached, of the level importance_level.
    mask: no policy term where the ratio of this level is outside [mask_low, mask_high].
    max_divergence: no policy term in responses with a negative advantage whose mean log pi_sampler - log pi exceeds it.
    reject_ratio, reject_kl: responses with a token's ratio below it, or with a mean k3 of pi_sampler to pi_old above it,
    have neither policy nor KL term.
    """

    importance_cap: float | None = None
    importance_level: str = "token"
    mask: str | None = None
    mask_low: float = 0.5
    mask_high: float = 5.0
    max_divergence: float | None = None
    reject_ratio: float | None = None
    reject_kl: float | None = None

    @property
    def is_on(self) -> bool:
        rules = (self.importance_cap, self.mask, self.max_divergence, self.reject_ratio, self.reject_kl)
        return any(rule is not None for rule in rules)


@dataclass(frozen=True, slots=True)
class OffPolicyMetrics:
    """Sums over tokens, float64 scalars: add them up over microbatches and ranks.

    masked: without a policy term by a mask or by rejection; rejected: of rejected responses; capped: whose weight exceeded
    the cap; weights, squares: of the weights applied, 0 where masked: weights^2 / (tokens * squares) is the effective
    sample size as a share.
    """

    masked: torch.Tensor
    rejected: torch.Tensor
    capped: torch.Tensor
    weights: torch.Tensor
    squares: torch.Tensor


def corrected(
    tokens: PolicyTokens, log_probs: torch.Tensor, rules: OffPolicyRules
) -> tuple[PolicyTokens, OffPolicyMetrics]:
    """What `grpo_loss` is to be given in place of `tokens`, by the rules. log_probs: [tokens] of the policy in training.

    Weights and masks are multiplied into the advantages, for every surrogate is a multiple of |A|; a rejected response has
    weight 0. What the others' weights sum to stays as it was. The weights of single tokens are left to `grpo_loss` and
    its importance_cap.
    """
    gap_T = (tokens.old_log_probs - tokens.sampler_log_probs).double()
    weight_T, capped_T = torch.ones_like(gap_T), torch.zeros_like(gap_T, dtype=torch.bool)
    if rules.importance_cap is not None:
        log_ratio_T = _at_level(rules.importance_level, gap_T, tokens)
        capped_T = log_ratio_T > math.log(rules.importance_cap)
        weight_T = log_ratio_T.exp().clamp(max=rules.importance_cap)
    rejected_T = _rejected(gap_T, tokens, rules)
    kept_T = _within_bounds(gap_T, tokens, rules) & ~_diverged(log_probs, tokens, rules) & ~rejected_T
    applied_T = torch.where(kept_T, weight_T, torch.zeros_like(weight_T))
    factor_T = kept_T if rules.importance_level == "token" else applied_T
    metrics = (~kept_T, rejected_T, capped_T, applied_T, applied_T**2)
    return dataclasses.replace(
        tokens,
        advantages=tokens.advantages * factor_T.to(tokens.advantages.dtype),
        weights=torch.where(rejected_T, torch.zeros_like(tokens.weights), tokens.weights),
    ), OffPolicyMetrics(*(values.sum(dtype=torch.float64) for values in metrics))


def _at_level(level: str, gap_T: torch.Tensor, tokens: PolicyTokens) -> torch.Tensor:
    """[tokens] log of the ratio that a level takes of each token's."""
    if level == "token":
        return gap_T
    if level == "sequence":
        return sequence_sum(gap_T, tokens)[tokens.sequence_ids]
    if level == "geometric":
        return sequence_mean(gap_T, tokens)
    raise ValueError(f"unknown level of a ratio {level!r}: token, sequence or geometric")


def _within_bounds(gap_T: torch.Tensor, tokens: PolicyTokens, rules: OffPolicyRules) -> torch.Tensor:
    if rules.mask is None:
        return torch.ones_like(gap_T, dtype=torch.bool)
    log_ratio_T = _at_level(rules.mask, gap_T, tokens)
    low = math.log(rules.mask_low) if rules.mask_low > 0 else -math.inf
    return (log_ratio_T >= low) & (log_ratio_T <= math.log(rules.mask_high))


def _diverged(log_probs: torch.Tensor, tokens: PolicyTokens, rules: OffPolicyRules) -> torch.Tensor:
    """DeepSeek-V3.2, section 3.1: 'off-policy sequence masking'."""
    if rules.max_divergence is None:
        return torch.zeros_like(tokens.advantages, dtype=torch.bool)
    gap_T = (tokens.sampler_log_probs - log_probs.detach()).double()
    return (tokens.advantages < 0) & (sequence_mean(gap_T, tokens) > rules.max_divergence)


def _rejected(gap_T: torch.Tensor, tokens: PolicyTokens, rules: OffPolicyRules) -> torch.Tensor:
    rejected_T = torch.zeros_like(gap_T, dtype=torch.bool)
    if rules.reject_ratio is not None:
        below_T = (gap_T < math.log(rules.reject_ratio)).double()
        rejected_T |= sequence_sum(below_T, tokens)[tokens.sequence_ids] > 0
    if rules.reject_kl is not None:
        rejected_T |= sequence_mean(gap_T.exp() - gap_T - 1, tokens) > rules.reject_kl
    return rejected_T
