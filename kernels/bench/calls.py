"""Single calls at a size where arithmetic costs nothing: the package's functions, and the least that could stand for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

import r1mega_kernels

TOKENS, COLUMNS, REPEATS = 8, 16, 300
_GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(TOKENS, COLUMNS, generator=_GENERATOR).requires_grad_()
TARGETS = torch.randint(0, COLUMNS, (TOKENS,), generator=_GENERATOR)
POLICY = torch.randn(TOKENS, generator=_GENERATOR).requires_grad_()
OLD, ADVANTAGES, UPSTREAM = torch.randn(3, TOKENS, generator=_GENERATOR).unbind()
ONE, NOTHING = torch.ones(1), torch.empty(0)


class RawLogProb(torch.autograd.Function):
    """`grouped_log_prob` without its checks, options and platforms."""

    @staticmethod
    def forward(ctx, logits, targets, inverse):
        op, stats, results = torch.ops.r1mega_kernels, torch.empty(TOKENS, 4), torch.empty(3, TOKENS)
        op.log_prob_stats(logits, targets, inverse, targets, False, 0, stats)
        op.log_prob_merge(stats[None], inverse, targets, False, stats, results)
        ctx.save_for_backward(logits, targets, inverse, stats, results)
        return results

    @staticmethod
    def backward(ctx, grads):
        logits, targets, inverse, stats, results = ctx.saved_tensors
        grad = torch.empty_like(logits)
        torch.ops.r1mega_kernels.log_prob_backward(
            logits, targets, inverse, targets, False, 0, stats, results[1], grads, grad
        )
        return grad, None, None


class RawLoss(torch.autograd.Function):
    """`grpo_token_loss` without its checks, options and platforms."""

    @staticmethod
    def forward(ctx, policy, old, advantages):
        grad, sums = torch.empty_like(policy), torch.zeros(8, dtype=torch.float64)
        torch.ops.r1mega_kernels.grpo_token_loss(
            policy, old, NOTHING, NOTHING, advantages, NOTHING, NOTHING, NOTHING, False, 0.2, 0.2, 0.0, 0.0, 0.0, 0,
            1.0, 1.05, False, grad, sums,
        )  # fmt: skip
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(sums)
        return sums[0].float(), sums

    @staticmethod
    def backward(ctx, grad_loss, _grad_sums):
        return ctx.saved_tensors[0] * grad_loss, None, None


def raw_loss() -> torch.Tensor:
    """The loss; the metrics are taken apart too."""
    loss, sums = RawLoss.apply(POLICY, OLD, ADVANTAGES)
    sums.unbind()
    return loss


def repeat(function: Callable[[], object]) -> None:
    """REPEATS calls."""
    for _ in range(REPEATS):
        function()


CONTESTANTS: dict[str, dict[str, Callable[[], object]]] = {
    "grouped_log_prob": {
        "kernel": lambda: torch.autograd.grad(
            r1mega_kernels.grouped_log_prob(LOGITS, TARGETS).log_prob, LOGITS, UPSTREAM
        ),
        "raw operators": lambda: torch.autograd.grad(
            RawLogProb.apply(LOGITS, TARGETS, ONE).unbind()[0], LOGITS, UPSTREAM
        ),
    },
    "grpo_token_loss": {
        "kernel": lambda: torch.autograd.grad(r1mega_kernels.grpo_token_loss(POLICY, ADVANTAGES, OLD)[0], POLICY),
        "raw operators": lambda: torch.autograd.grad(raw_loss(), POLICY),
    },
}
