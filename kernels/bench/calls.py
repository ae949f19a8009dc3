"""Single calls at a size where arithmetic costs nothing: the package's functions, and the least that could stand for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

import r1mega_kernels

TOKENS, COLUMNS = 8, 16
_GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(TOKENS, COLUMNS, generator=_GENERATOR).requires_grad_()
TARGETS = torch.randint(0, COLUMNS, (TOKENS,), generator=_GENERATOR)
POLICY = torch.randn(TOKENS, generator=_GENERATOR).requires_grad_()
OLD, ADVANTAGES, UPSTREAM = torch.randn(3, TOKENS, generator=_GENERATOR).unbind()
ONE, NOTHING, NOTHING_MASKED = torch.ones(1), torch.empty(0), torch.empty(0, dtype=torch.uint8)
HIDDEN, WEIGHT = (torch.randn(n, 16, generator=_GENERATOR).requires_grad_() for n in (TOKENS, COLUMNS))
KEPT = r1mega_kernels.KeptTokens(TARGETS.int(), torch.arange(TOKENS + 1))
REWARDS, GROUPS = torch.randn(TOKENS, generator=_GENERATOR), torch.tensor([0, TOKENS // 2, TOKENS])


def raw_results(logits, targets, inverse):
    """([T, 4] statistics, [3, T] results) by the operators alone."""
    op, stats, results = torch.ops.r1mega_kernels, torch.empty(TOKENS, 4), torch.empty(3, TOKENS)
    op.log_prob_stats(logits, targets, inverse, targets, False, 0, COLUMNS, True, stats)
    op.log_prob_merge(stats[None], inverse, targets, False, stats, results)
    return stats, results


def put_together(grads, results):
    """[3, T] of the gradients of three results, some of which nobody used."""
    together = torch.zeros_like(results)
    for k, one in enumerate(grads):
        if one is not None:
            together.select(0, k).copy_(one)
    return together


class RawLogProb(torch.autograd.Function):
    """`grouped_log_prob` without its checks, options and platforms; in the form that costs autograd least: no gradients made
    for results that nobody uses, results taken apart inside."""

    @staticmethod
    def forward(ctx, logits, targets, inverse):
        ctx.set_materialize_grads(False)
        stats, results = raw_results(logits, targets, inverse)
        ctx.save_for_backward(logits, targets, inverse, stats, results)
        return results.unbind()

    @staticmethod
    def backward(ctx, *grads):
        logits, targets, inverse, stats, results = ctx.saved_tensors
        together, grad = put_together(grads, results), torch.empty_like(logits)
        torch.ops.r1mega_kernels.log_prob_backward(
            logits, targets, inverse, targets, False, 0, stats, results.select(0, 1), together, grad
        )
        return grad, None, None


class RawKept(torch.autograd.Function):
    """`grouped_log_prob` over kept ids, alike."""

    @staticmethod
    def forward(ctx, logits, targets, inverse, ids, offsets):
        ctx.set_materialize_grads(False)
        op, stats, results = torch.ops.r1mega_kernels, torch.empty(TOKENS, 4), torch.empty(3, TOKENS)
        ranges = torch.stack([offsets[:-1], offsets[1:]], 1)
        op.kept_log_prob_stats(logits, targets, inverse, targets, False, 0, COLUMNS, True, stats, ids, ranges)
        op.log_prob_merge(stats[None], inverse, targets, False, stats, results)
        ctx.save_for_backward(logits, targets, inverse, stats, results, ids, ranges)
        return results.unbind()

    @staticmethod
    def backward(ctx, *grads):
        logits, targets, inverse, stats, results, ids, ranges = ctx.saved_tensors
        together, grad = put_together(grads, results), torch.empty_like(logits)
        scratch = torch.empty(ids.shape)
        torch.ops.r1mega_kernels.kept_log_prob_backward(
            logits,
            targets,
            inverse,
            targets,
            False,
            0,
            stats,
            results.select(0, 1),
            together,
            grad,
            ids,
            ranges,
            scratch,
        )
        return grad, None, None, None, None


class RawLinear(torch.autograd.Function):
    """`linear_log_prob` alike: the products of all tokens and columns at once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, inverse):
        ctx.set_materialize_grads(False)
        stats, results = raw_results(torch.mm(hidden, weight.t()), targets, inverse)
        ctx.save_for_backward(hidden, weight, targets, inverse, stats, results)
        return results.unbind()

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight, targets, inverse, stats, results = ctx.saved_tensors
        logits, together = torch.mm(hidden, weight.t()), put_together(grads, results)
        torch.ops.r1mega_kernels.log_prob_backward(
            logits, targets, inverse, targets, False, 0, stats, results.select(0, 1), together, logits
        )
        return logits @ weight, logits.t() @ hidden, None, None


class RawLinearLoss(torch.autograd.Function):
    """`linear_grpo_loss` alike, of a function of the caller's, whose gradient goes on."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, inverse, token_loss):
        logits = torch.mm(hidden, weight.t())
        stats, results = raw_results(logits, targets, inverse)
        leaf = results[0].detach().requires_grad_()
        with torch.enable_grad():
            loss = token_loss(leaf)
        together = put_together((torch.autograd.grad(loss, leaf)[0],), results)
        torch.ops.r1mega_kernels.log_prob_backward(
            logits, targets, inverse, targets, False, 0, stats, results[1], together, logits
        )
        ctx.save_for_backward(logits @ weight, logits.t() @ hidden)
        return loss.detach()

    @staticmethod
    def backward(ctx, grad_loss):
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden * grad_loss, of_weight * grad_loss, None, None, None


def raw_loss_into(policy, old, advantages, grad, sums):
    """grad [T] and sums [8] <- of the loss, by its operator alone."""
    torch.ops.r1mega_kernels.grpo_token_loss(
        policy, old, NOTHING, NOTHING, advantages, NOTHING, NOTHING, NOTHING, False, 0.2, 0.2, 0.0, 0.0, 0.0, 0,
        1.0, 1.05, False, grad, sums,
    )  # fmt: skip


class RawLoss(torch.autograd.Function):
    """`grpo_token_loss` without its checks, options and platforms; the sums go to a list, for a second output costs more."""

    @staticmethod
    def forward(ctx, policy, old, advantages, found):
        grad, sums = torch.empty_like(policy), torch.zeros(8, dtype=torch.float64)
        raw_loss_into(policy, old, advantages, grad, sums)
        ctx.save_for_backward(grad)
        found.append(sums)
        return sums[0].float()

    @staticmethod
    def backward(ctx, grad_loss):
        return ctx.saved_tensors[0] * grad_loss, None, None, None


def raw_loss(policy: torch.Tensor) -> torch.Tensor:
    """The loss; the metrics' sums are found too."""
    return RawLoss.apply(policy, OLD, ADVANTAGES, [])


def raw_advantage() -> torch.Tensor:
    """[R]."""
    advantages = torch.empty(TOKENS)
    torch.ops.r1mega_kernels.group_advantage(REWARDS.double(), GROUPS, NOTHING_MASKED, 0, 1, 1e-6, advantages)
    return advantages


def one_pass() -> torch.Tensor:
    """The loss from hidden states."""
    return r1mega_kernels.linear_grpo_loss(
        HIDDEN, WEIGHT, TARGETS, lambda scores, part: r1mega_kernels.grpo_token_loss(scores.log_prob, ADVANTAGES, OLD)
    )[0]


def _of_logits(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(), LOGITS, UPSTREAM)


def _of_hidden(function: Callable[[], torch.Tensor], upstream: torch.Tensor | None = None) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(), (HIDDEN, WEIGHT), upstream)


CONTESTANTS: dict[str, dict[str, Callable[[], object]]] = {
    "grouped_log_prob": {
        "kernel": _of_logits(lambda: r1mega_kernels.grouped_log_prob(LOGITS, TARGETS).log_prob),
        "raw operators": _of_logits(lambda: RawLogProb.apply(LOGITS, TARGETS, ONE)[0]),
    },
    "grouped_log_prob over kept ids": {
        "kernel": _of_logits(lambda: r1mega_kernels.grouped_log_prob(LOGITS, TARGETS, kept=KEPT).log_prob),
        "raw operators": _of_logits(lambda: RawKept.apply(LOGITS, TARGETS, ONE, *KEPT)[0]),
    },
    "linear_log_prob": {
        "kernel": _of_hidden(lambda: r1mega_kernels.linear_log_prob(HIDDEN, WEIGHT, TARGETS).log_prob, UPSTREAM),
        "raw operators": _of_hidden(lambda: RawLinear.apply(HIDDEN, WEIGHT, TARGETS, ONE)[0], UPSTREAM),
    },
    "linear_grpo_loss": {
        "kernel": _of_hidden(one_pass),
        "raw operators": _of_hidden(lambda: RawLinearLoss.apply(HIDDEN, WEIGHT, TARGETS, ONE, raw_loss)),
    },
    "grpo_token_loss": {
        "kernel": lambda: torch.autograd.grad(r1mega_kernels.grpo_token_loss(POLICY, ADVANTAGES, OLD)[0], POLICY),
        "raw operators": lambda: torch.autograd.grad(raw_loss(POLICY), POLICY),
    },
    "group_advantage": {
        "kernel": lambda: r1mega_kernels.group_advantage(REWARDS, GROUPS),
        "raw operators": raw_advantage,
    },
}
