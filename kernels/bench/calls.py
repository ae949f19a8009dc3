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
    """`grouped_log_prob` without its checks, options and platforms; in the form that costs autograd least: no gradients made
    for results that nobody uses, results taken apart inside."""

    @staticmethod
    def forward(ctx, logits, targets, inverse):
        ctx.set_materialize_grads(False)
        op, stats, results = torch.ops.r1mega_kernels, torch.empty(TOKENS, 4), torch.empty(3, TOKENS)
        op.log_prob_stats(logits, targets, inverse, targets, False, 0, True, stats)
        op.log_prob_merge(stats[None], inverse, targets, False, stats, results)
        ctx.save_for_backward(logits, targets, inverse, stats, results)
        return results.unbind()

    @staticmethod
    def backward(ctx, *grads):
        logits, targets, inverse, stats, results = ctx.saved_tensors
        together, grad = torch.zeros_like(results), torch.empty_like(logits)
        for k, one in enumerate(grads):
            if one is not None:
                together.select(0, k).copy_(one)
        torch.ops.r1mega_kernels.log_prob_backward(
            logits, targets, inverse, targets, False, 0, stats, results.select(0, 1), together, grad
        )
        return grad, None, None


class RawLoss(torch.autograd.Function):
    """`grpo_token_loss` without its checks, options and platforms; the sums go to a list, for a second output costs more."""

    @staticmethod
    def forward(ctx, policy, old, advantages, found):
        grad, sums = torch.empty_like(policy), torch.zeros(8, dtype=torch.float64)
        torch.ops.r1mega_kernels.grpo_token_loss(
            policy, old, NOTHING, NOTHING, advantages, NOTHING, NOTHING, NOTHING, False, 0.2, 0.2, 0.0, 0.0, 0.0, 0,
            1.0, 1.05, False, grad, sums,
        )  # fmt: skip
        ctx.save_for_backward(grad)
        found.append(sums)
        return sums[0].float()

    @staticmethod
    def backward(ctx, grad_loss):
        return ctx.saved_tensors[0] * grad_loss, None, None, None


def raw_loss() -> torch.Tensor:
    """The loss; the metrics are taken apart too."""
    found: list[torch.Tensor] = []
    loss = RawLoss.apply(POLICY, OLD, ADVANTAGES, found)
    found[0].unbind()
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
        "raw operators": lambda: torch.autograd.grad(RawLogProb.apply(LOGITS, TARGETS, ONE)[0], LOGITS, UPSTREAM),
    },
    "grpo_token_loss": {
        "kernel": lambda: torch.autograd.grad(r1mega_kernels.grpo_token_loss(POLICY, ADVANTAGES, OLD)[0], POLICY),
        "raw operators": lambda: torch.autograd.grad(raw_loss(), POLICY),
    },
}
