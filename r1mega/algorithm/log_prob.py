"""Log-probs and entropies of given tokens from (vocabulary-parallel) logits: the reference implementation."""

from __future__ import annotations

import torch
import torch.distributed as dist


class _VocabParallelLogProb(torch.autograd.Function):
    """log softmax(logits / T)[target] and entropy where each rank of `group` holds [V / tp] columns of the logits."""

    @staticmethod
    def forward(ctx, logits, targets, temperature, group):  # noqa: D102 (autograd protocol)
        size, rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
        scaled = logits.float() / temperature
        row_max = scaled.max(dim=-1).values
        if size > 1:
            dist.all_reduce(row_max, dist.ReduceOp.MAX, group=group)
        scaled = scaled - row_max[:, None]
        width = logits.shape[-1]
        local = targets - rank * width
        held = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        target_logit = torch.where(held, scaled.gather(1, local[:, None])[:, 0], torch.zeros_like(row_max))
        probs = scaled.exp()
        sums = torch.stack([probs.sum(-1), (probs * scaled).sum(-1), target_logit])
        if size > 1:
            dist.all_reduce(sums, group=group)
        total, weighted, target_logit = sums
        log_total = total.log()
        probs.div_(total[:, None])
        ctx.save_for_backward(probs, local, held)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        entropy = log_total - weighted / total
        ctx.mark_non_differentiable(entropy)
        return target_logit - log_total, entropy

    @staticmethod
    def backward(ctx, grad_log_prob, _grad_entropy):  # noqa: D102
        probs, local, held = ctx.saved_tensors
        grad = probs * (-grad_log_prob / ctx.temperature)[:, None]
        grad.scatter_add_(1, local[:, None], torch.where(held, grad_log_prob / ctx.temperature, 0.0)[:, None])
        return grad.to(ctx.dtype), None, None, None


def token_log_probs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log_probs, entropies), both [tokens] float32, of softmax(logits / temperature).

    logits: [tokens, V / tp] of any float dtype; targets: [tokens] int64 in [0, V); group: the tensor-parallel group, or
    None when the whole vocabulary is here. Gradients flow through log_probs only; entropies are for observation.
    """
    return _VocabParallelLogProb.apply(logits, targets, temperature, group)
