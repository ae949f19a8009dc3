"""The GRPO objective (DeepSeekMath, eq. 3; DeepSeek-R1, eq. 1) and its variants, over the tokens of packed responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What the loss needs of each response token of one microbatch; all [tokens] unless said.

    sequence_ids: [tokens] int, which response of the microbatch a token belongs to, in [0, num_sequences).
    weights: a token's share of the loss: they sum to 1 over the tokens of a minibatch (see `token_weights`).
    sampler_log_probs: as the generator reported them; reference_log_probs: None when there is no KL term.
    """

    advantages: torch.Tensor
    old_log_probs: torch.Tensor
    sampler_log_probs: torch.Tensor
    reference_log_probs: torch.Tensor | None
    weights: torch.Tensor
    sequence_ids: torch.Tensor
    num_sequences: int


@dataclass(frozen=True, slots=True)
class GRPOStats:
    """Sums over tokens, to be divided by `num_tokens` after adding microbatches and ranks up. Scalars, detached."""

    num_tokens: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor
    mismatch_sum: torch.Tensor
    mismatch_max: torch.Tensor


def token_weights(response_lengths: torch.Tensor, aggregation: str, max_tokens: int) -> torch.Tensor:
    """The weight of one token of each response of a minibatch: [responses] float64.

    aggregation: 'sequence' 1 / (responses * length) (GRPO), 'token' 1 / all tokens (DAPO, eq. 8), 'constant'
    1 / (responses * max_tokens) (Dr.GRPO). Responses of length 0 get 0.
    """
    lengths = response_lengths.to(torch.float64)
    if aggregation == "sequence":
        weights = torch.where(lengths > 0, 1.0 / (len(lengths) * lengths.clamp(min=1)), torch.zeros_like(lengths))
    elif aggregation == "token":
        weights = torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    elif aggregation == "constant":
        weights = torch.ones_like(lengths) / (len(lengths) * max_tokens)
    else:
        raise ValueError(f"unknown loss aggregation {aggregation!r}")
    return weights


def kl_k3(log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy || reference) for tokens drawn from the policy: exp(d) - d - 1 >= 0, d = ref - pi."""
    delta = reference_log_probs - log_probs
    return delta.exp() - delta - 1.0


def policy_ratio(log_probs: torch.Tensor, tokens: PolicyTokens, kind: str) -> torch.Tensor:
    """[tokens] pi / pi_old: of the token, or (GSPO, eq. 7) its sequence's length-normalised ratio."""
    log_ratio = log_probs - tokens.old_log_probs
    if kind == "token":
        return log_ratio.exp()
    zeros = torch.zeros(tokens.num_sequences, dtype=log_ratio.dtype, device=log_ratio.device)
    lengths = zeros.index_add(0, tokens.sequence_ids, torch.ones_like(log_ratio))
    means = zeros.index_add(0, tokens.sequence_ids, log_ratio) / lengths.clamp(min=1)
    return means.exp()[tokens.sequence_ids]


def grpo_loss(
    log_probs: torch.Tensor,
    tokens: PolicyTokens,
    *,
    clip_low: float,
    clip_high: float,
    ratio: str = "token",
    kl_coefficient: float = 0.0,
    importance_cap: float | None = None,
) -> tuple[torch.Tensor, GRPOStats]:
    """Weighted sum over tokens of -min(r A, clip(r, 1 - low, 1 + high) A) * w_is + beta * KL; and its statistics.

    log_probs: [tokens] under the current policy, with gradient. importance_cap: truncated importance sampling, the
    detached weight min(pi_old / pi_sampler, cap), for a trainer whose old log-probs are not the sampler's (bf16, FP8).
    The result is a minibatch's loss once the microbatches' results are added up.
    """
    ratios = policy_ratio(log_probs, tokens, ratio)
    clipped = ratios.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratios * tokens.advantages, clipped * tokens.advantages)
    if importance_cap is not None:
        surrogate = surrogate * (tokens.old_log_probs - tokens.sampler_log_probs).exp().clamp(max=importance_cap)
    loss = -surrogate
    kl = torch.zeros_like(log_probs)
    if tokens.reference_log_probs is not None:
        kl = kl_k3(log_probs, tokens.reference_log_probs)
        loss = loss + kl_coefficient * kl
    with torch.no_grad():
        mismatch = (log_probs - tokens.sampler_log_probs).abs()
        # clipped = the clip is what the minimum chose, so that the token's policy gradient is cut
        cut = (clipped * tokens.advantages) < (ratios * tokens.advantages)
        stats = GRPOStats(
            num_tokens=torch.tensor(float(log_probs.numel()), dtype=torch.float64),
            clipped=cut.sum().to(torch.float64),
            kl=kl.sum(dtype=torch.float64),
            mismatch_sum=mismatch.sum(dtype=torch.float64),
            mismatch_max=mismatch.max().to(torch.float64) if mismatch.numel() else torch.zeros((), dtype=torch.float64),
        )
    return (loss * tokens.weights).sum(), stats
