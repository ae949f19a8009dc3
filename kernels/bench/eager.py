"""What a trainer writes without kernels: torch's own functions, one after the other."""

from __future__ import annotations

import torch


def log_prob_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log_softmax + gather + entropy of logits [T, V], in fp32."""
    log_probs = torch.log_softmax(logits.float(), -1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def log_prob(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log_softmax + gather, without entropy: the least that a policy update needs."""
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def group_advantage(rewards: torch.Tensor, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(r - mean) / (std + 1e-6) of groups of any size, by index_add; 0 in groups without signal."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(num_groups, dtype=x.dtype, device=x.device).index_add_(0, groups, x)
        count = torch.zeros(num_groups, dtype=x.dtype, device=x.device).index_add_(0, groups, torch.ones_like(x))
        return (total / count.clamp(min=1))[groups]

    centred = rewards - mean(rewards)
    std = mean(centred**2).sqrt()
    return torch.where(std > 0, centred / (std + 1e-6), torch.zeros_like(centred))


def grpo_token_loss(
    log_probs, advantages, old, reference, sampler, weights, mask, sequence_ids,
    clip_low=0.2, clip_high=0.28, kl_coefficient=0.001, importance_cap=2.0,
):  # fmt: skip
    """The loss and the metrics of `r1mega_kernels.grpo_token_loss`, as autograd sees them."""
    advantage, weight = advantages[sequence_ids], weights[sequence_ids] * mask
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    importance = (old - sampler).exp()
    delta = reference - log_probs
    kl = delta.exp() - delta - 1
    loss = ((kl_coefficient * kl - surrogate * importance.clamp(max=importance_cap)) * weight).sum()
    with torch.no_grad():
        mismatch = (log_probs - sampler).abs() * mask
        cut = (clipped * advantage < ratio * advantage) & mask
        metrics = torch.stack(
            [mask.sum().float(), cut.sum().float(), (kl * mask).sum(), mismatch.sum(), mismatch.max(),
             ((importance > importance_cap) & mask).sum().float(), (ratio * mask).sum()]
        )  # fmt: skip
    return loss, metrics
