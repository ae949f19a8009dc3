"""The GRPO objective (DeepSeekMath, eq. 3; DeepSeek-R1, eq. 1) and its variants, over the tokens of packed responses."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from r1mega_kernels import GRPOMetrics, grpo_token_loss


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


def grpo_loss(
    log_probs: torch.Tensor,
    tokens: PolicyTokens,
    *,
    clip_low: float,
    clip_high: float,
    ratio: str = "token",
    kl_coefficient: float = 0.0,
    importance_cap: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, GRPOMetrics]:
    """Weighted sum over tokens of -min(r A, clip(r, 1 - low, 1 + high) A) * w_is + beta * KL; and its statistics.

    log_probs: [tokens] under the current policy, with gradient. ratio: 'token', or 'sequence' (GSPO, eq. 7: the
    length-normalised ratio of the token's response). importance_cap: truncated importance sampling, the detached weight
    min(pi_old / pi_sampler, cap), for a trainer whose old log-probs are not the sampler's (bf16, FP8). backend: of the
    kernels. The result is a minibatch's loss once the microbatches' results are added up.
    """
    loss = functools.partial(
        grpo_token_loss,
        old_log_probs=tokens.old_log_probs,
        sampler_log_probs=tokens.sampler_log_probs,
        reference_log_probs=tokens.reference_log_probs,
        weights=tokens.weights,
        clip_low=clip_low,
        clip_high=clip_high,
        importance_cap=importance_cap,
        backend=backend,
    )
    if ratio == "token":
        return loss(log_probs, tokens.advantages, kl_coefficient=kl_coefficient)
    # each token as if it had its sequence's mean log-ratio; KL and mismatch are of the true log-probs
    surrogate, clipping = loss(tokens.old_log_probs + sequence_log_ratio(log_probs, tokens), tokens.advantages)
    penalty, metrics = loss(log_probs, torch.zeros_like(tokens.advantages), kl_coefficient=kl_coefficient)
    return surrogate + penalty, dataclasses.replace(metrics, clipped=clipping.clipped, ratio_sum=clipping.ratio_sum)


def sequence_log_ratio(log_probs: torch.Tensor, tokens: PolicyTokens) -> torch.Tensor:
    """[tokens] mean over the token's sequence of log pi - log pi_old."""
    log_ratio_T = log_probs - tokens.old_log_probs
    zeros_S = torch.zeros(tokens.num_sequences, dtype=log_ratio_T.dtype, device=log_ratio_T.device)
    lengths_S = zeros_S.index_add(0, tokens.sequence_ids, torch.ones_like(log_ratio_T))
    mean_S = zeros_S.index_add(0, tokens.sequence_ids, log_ratio_T) / lengths_S.clamp(min=1)
    return mean_S[tokens.sequence_ids]
