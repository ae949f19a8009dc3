"""The GRPO objective (DeepSeekMath, eq. 3; DeepSeek-R1, eq. 1) and its variants, over the tokens of packed responses."""

from __future__ import annotations

import functools
import math
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
    surrogate: str = "clip",
    dual_clip: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    kl_coefficient: float = 0.0,
    kl_bias_correction: bool = False,
    importance_cap: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, GRPOMetrics]:
    """Weighted sum over tokens of -min(r A, clip(r, 1 - low, 1 + high) A) * w_is + beta * KL; and its statistics.

    log_probs: [tokens] under the current policy, with gradient. ratio: 'token', or 'sequence' (GSPO, eq. 7: the
    length-normalised ratio of the token's response). surrogate: 'clip', the min above, with `dual_clip` at most c |A| of
    a token with A < 0 (two-sided clipping); 'cispo' and 'sapo': see `grpo_token_loss`; 'gmpo' (Zhao et al. 2025):
    r A, r the geometric mean over the response of ratios that are clipped where the clip bounds the objective.
    kl_bias_correction: the KL term times pi / pi_sampler (DeepSeek-V3.2). importance_cap: truncated importance sampling,
    the detached weight min(pi_old / pi_sampler, cap), for a trainer whose old log-probs are not the sampler's (bf16, FP8).
    backend: of the kernels. The result is a minibatch's loss once the microbatches' results are added up.

    A microbatch has whole responses, so that what is of a sequence is computed where its tokens are.

    Raises:
        ValueError: a surrogate that does not go with the ratio, or what `grpo_token_loss` refuses.
    """
    _check_surrogate(surrogate, ratio, dual_clip)
    is_gmpo = surrogate == "gmpo"  # its ratios are clipped one by one, before their mean
    loss = functools.partial(
        grpo_token_loss,
        old_log_probs=tokens.old_log_probs,
        sampler_log_probs=tokens.sampler_log_probs,
        reference_log_probs=tokens.reference_log_probs,
        weights=tokens.weights,
        clip_low=1.0 if is_gmpo else clip_low,
        clip_high=math.inf if is_gmpo else clip_high,
        dual_clip=dual_clip,
        surrogate="clip" if is_gmpo else surrogate,
        sapo_temperatures=sapo_temperatures,
        importance_cap=importance_cap,
        backend=backend,
    )
    penalised = functools.partial(loss, kl_coefficient=kl_coefficient, kl_bias_correction=kl_bias_correction)
    if ratio == "token" and not is_gmpo:
        return penalised(log_probs, tokens.advantages)
    # each token as if it had its sequence's mean log-ratio; KL and mismatch are of the true log-probs
    log_ratio_T = kept_T = log_probs - tokens.old_log_probs
    if is_gmpo:
        kept_T = _clipped_log_ratio(log_ratio_T, tokens.advantages, clip_low, clip_high)
    value, clipping = loss(tokens.old_log_probs + sequence_mean(kept_T, tokens), tokens.advantages)
    further, metrics = penalised(log_probs, torch.zeros_like(tokens.advantages))
    clipped = clipping.clipped + ((kept_T != log_ratio_T) & (tokens.advantages != 0)).sum()
    return value + further, metrics.with_ratios(clipped, clipping.ratio_sum)


def _check_surrogate(surrogate: str, ratio: str, dual_clip: float | None) -> None:
    if ratio != "token" and surrogate in ("cispo", "gmpo"):
        raise ValueError(f"the surrogate {surrogate!r} takes the ratios of tokens, not ratio = {ratio!r}")
    if dual_clip is not None and surrogate != "clip":
        raise ValueError(f"dual_clip bounds the surrogate 'clip'; {surrogate!r} has no use for it")


def _clipped_log_ratio(
    log_ratio_T: torch.Tensor, advantages_T: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """[tokens] that which the min of the clipped objective takes: bounded from above for A > 0, from below for A < 0."""
    above_T, below_T = log_ratio_T.clamp(max=math.log1p(clip_high)), log_ratio_T.clamp(min=math.log1p(-clip_low))
    return torch.where(advantages_T > 0, above_T, torch.where(advantages_T < 0, below_T, log_ratio_T))


def sequence_sum(values_T: torch.Tensor, tokens: PolicyTokens) -> torch.Tensor:
    """[sequences] sums of the values of each sequence's tokens."""
    zeros_S = torch.zeros(tokens.num_sequences, dtype=values_T.dtype, device=values_T.device)
    return zeros_S.index_add(0, tokens.sequence_ids, values_T)


def sequence_mean(values_T: torch.Tensor, tokens: PolicyTokens) -> torch.Tensor:
    """[tokens] mean of the values over the token's sequence."""
    lengths_S = sequence_sum(torch.ones_like(values_T), tokens)
    return (sequence_sum(values_T, tokens) / lengths_S.clamp(min=1))[tokens.sequence_ids]
