"""A loss of log-probs, and its gradient, from hidden states in one pass: three matrix products instead of four.

The gradient of a token's loss is known as soon as its own log-prob is. So a chunk's logits are made once, and turned into
their gradient where they lie; the backward pass only scales what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from r1mega_kernels.kept import KeptTokens, gradient_scratch
from r1mega_kernels.linear import OutputLayer, handed_over, main_grad, or_zeros, output_layer, parts, piece, widens
from r1mega_kernels.log_prob import LogProbs, put_together, refuse_second_derivative

S = TypeVar("S")
TokenLoss = Callable[[LogProbs, slice], tuple[torch.Tensor, S]]

DEFAULT_CHUNK_TOKENS = 4096
_WIDENED_COLUMNS = 4096  # of a weight that a CPU converts first, at a time


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_loss: TokenLoss[S],
    temperature: float | torch.Tensor = 1.0,
    rows: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    *,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    kept: KeptTokens | None = None,
    softcap: float | None = None,
    entropy: bool = True,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    sequence_offsets: Sequence[int] | None = None,
    reduce_hidden_grad: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, list[S]]:
    """(the sum of token_loss over chunks, what else it returned of each) of `linear_log_prob(hidden, ...)`, with gradients.

    token_loss: (log-probs, entropies and logsumexps [n] of the chosen rows in a slice, that slice) -> (a scalar, anything):
    `grpo_token_loss` with its further arguments sliced, or any other sum over tokens of a function of each alone; with
    `sequence_offsets` a sum over sequences of a function of each (GSPO's and GMPO's ratios). No gradient reaches anything else that token_loss reads. float16 on a GPU: scale inside token_loss and divide afterwards; scaling the
    returned loss comes too late, for the gradients are rounded by then.
    chunk_tokens: rows at a time, in chunks of nearly one size. Their fp32 logits [chunk_tokens, V / tp] are held, and for
    each chunk the weight's fp32 gradient is read and written once: less than some thousands is slow on a GPU.
    sequence_offsets: [S + 1] from 0 to N, rising: sequence s has the chosen rows [sequence_offsets[s], sequence_offsets[s + 1]).
    Every chunk then holds whole sequences: as many as fit chunk_tokens, or one that is longer, whose logits are all held.
    The other arguments are those of `linear_log_prob`. Without rows `token_loss` is called once, with none.

    Gradients: as of `linear_log_prob`; those of hidden states and weight are held in fp32 from here to the backward pass,
    which multiplies them by the loss's own. Where no gradient is wanted (`torch.no_grad()`) none is computed.

    Raises:
        ValueError, TypeError, PlatformError: as `grouped_log_prob`; TypeError too where `token_loss` returns no scalar.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be 1 or more, not {chunk_tokens}")
    head, hidden, tokens = output_layer(
        hidden, weight, targets, temperature, rows, tp_group, vocab_start, vocab_size, kept, softcap, entropy,
        reduce_hidden_grad, backend,
    )  # fmt: skip
    chunks = chunks_of(hidden.shape[0], chunk_tokens, sequence_offsets)
    found: list[S] = []
    wanted = (hidden.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else (False, False)

    def of_chunk(results: Sequence[torch.Tensor], part: slice) -> torch.Tensor:
        loss, further = token_loss(LogProbs(*results), part)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            shape = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise TypeError(f"token_loss must return (a scalar tensor, anything): the sum over its tokens, not {shape}")
        found.append(further)
        return loss

    loss = _LinearLoss.apply(hidden, weight, (head, tokens, of_chunk, chunks, wanted))
    return loss, found


def chunks_of(count: int, chunk_tokens: int, sequence_offsets: Sequence[int] | None = None) -> list[slice]:
    """[0, count) in slices of nearly one size, `chunk_tokens` at most; with offsets, of whole sequences (see
    `linear_grpo_loss`). One empty slice of nothing.

    Raises:
        ValueError: offsets that do not rise from 0 to `count`.
    """
    if sequence_offsets is None:
        height = -(-count // max(1, -(-count // chunk_tokens)))
        return list(parts(count, max(1, height))) or [slice(0, 0)]
    offsets = [int(offset) for offset in sequence_offsets]
    if not offsets or offsets[0] != 0 or offsets[-1] != count or offsets != sorted(offsets):
        raise ValueError(f"sequence_offsets must rise from 0 to {count}, not {offsets[:8]}...")
    chunks, begin = [], 0
    for end, after in zip(offsets, [*offsets[1:], None], strict=True):
        if end > begin and (after is None or after - begin > chunk_tokens):
            chunks.append(slice(begin, end))
            begin = end
    return chunks or [slice(0, 0)]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, rest):
        """The loss; both gradients for a loss's own of 1 are kept for the backward pass."""
        ctx.head, tokens, token_loss, chunks, wanted = rest
        if len(chunks) == 1 and hidden.shape[0] and ctx.head.is_short(tokens):
            return _short_loss(ctx, hidden, weight, tokens, token_loss, chunks[0], wanted)
        head = ctx.head
        (needs_hidden, needs_weight), grad_hidden, grad_weight = wanted, None, None
        scratch = gradient_scratch(tokens.kept_ids) if any(wanted) else None
        losses, columns, buffer = [], _columns(head), None
        if len(chunks) > 1 or len(columns) > 1:
            height = max(part.stop - part.start for part in chunks)
            buffer = hidden.new_empty(height, head.width, dtype=head.dtype)
        for part in chunks:
            place = None if buffer is None else piece(buffer, slice(0, part.stop - part.start))
            states, of_part = head.factor(piece(hidden, part)), tokens.part(part)
            logits = _logits(head, states, columns, place)
            stats, results = _statistics(head, logits, of_part)
            loss, grads = _loss_and_gradient(token_loss, results, part, any(wanted))
            losses.append(loss)
            if grads is None or not len(states):
                continue
            grad = head.gradient_of(logits, of_part, scratch, 0, stats, results.select(0, 1), grads)
            for column in columns:
                of_column = _of_columns(grad, column)
                if needs_hidden:  # what is widened has no name here: it is gone before the next is
                    grad_hidden = head.added(grad_hidden, hidden, part, of_column, head.factor(piece(weight, column)))
                if needs_weight:
                    grad_weight = head.added(grad_weight, weight, column, of_column.t(), states)
            del grad, of_column  # copies, on a GPU: not beside the next chunk's
        ctx.save_for_backward(
            or_zeros(grad_hidden, hidden, head.dtype) if needs_hidden else None,
            or_zeros(grad_weight, weight, head.dtype) if needs_weight else None,
        )
        if len(losses) > 1:
            losses = [torch.stack([loss.to(hidden.device, torch.float64) for loss in losses]).sum()]
        return losses[0].to(hidden.device, head.dtype, copy=True)  # apart from the caller's own

    @staticmethod
    def backward(ctx, grad_loss):
        """Both gradients times the loss's own."""
        refuse_second_derivative()
        grad_hidden, grad_weight = ctx.saved_tensors
        head = ctx.head
        if grad_hidden is not None:
            grad_hidden = head.reduced(grad_hidden * grad_loss)
        if grad_weight is not None:
            total = main_grad(head)
            if total is None:
                grad_weight = grad_weight * grad_loss
            else:
                grad_weight = total.addcmul_(grad_weight, grad_loss.to(head.dtype))
            grad_weight = handed_over(head, grad_weight)
        return grad_hidden, grad_weight, None


def _short_loss(ctx, hidden, weight, tokens, token_loss, part, wanted) -> torch.Tensor:
    """The loss of a single chunk where the head `is_short`; leaves `ctx` what its backward pass needs."""
    head, (needs_hidden, needs_weight), grad_hidden, grad_weight = ctx.head, wanted, None, None
    logits = torch.mm(hidden, weight.t())
    stats, results = head.short_results(logits, tokens)
    loss, grads = _loss_and_gradient(token_loss, results, part, needs_hidden or needs_weight)
    if grads is not None:
        head.short_gradient(logits, tokens, stats, results, grads)
        grad_hidden = torch.mm(logits, weight) if needs_hidden else None
        grad_weight = torch.mm(logits.t(), hidden) if needs_weight else None
    ctx.save_for_backward(
        or_zeros(grad_hidden, hidden, head.dtype) if needs_hidden else None,
        or_zeros(grad_weight, weight, head.dtype) if needs_weight else None,
    )
    return loss.to(hidden.device, head.dtype, copy=True)


def _columns(head: OutputLayer) -> list[slice]:
    """All of the weight where products take it as it is, else as much as is converted at a time."""
    as_it_is = widens(head.weight) or head.weight.dtype == head.dtype
    return list(parts(head.width, head.width if as_it_is else _WIDENED_COLUMNS))


def _logits(head: OutputLayer, states, columns: list[slice], place: torch.Tensor | None) -> torch.Tensor:
    """[n, width] of a chunk, in `place`; None: of all columns at once, in a tensor of the product's own."""
    if place is None:
        return head.logits(states, head.factor(piece(head.weight, columns[0])))
    for column in columns:
        head.logits(states, head.factor(piece(head.weight, column)), _of_columns(place, column))
    return place


def _of_columns(x: torch.Tensor, column: slice) -> torch.Tensor:
    return x if column.stop - column.start == x.shape[1] else x[:, column]


def _statistics(head, logits, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """([n, 4] statistics, [3, n] results) of a chunk's logits, over all ranks."""
    stats = tokens.inverse.new_empty(len(logits), 4)
    head.stats_into(stats, logits, tokens, 0)
    return stats, head.merged(stats, stats.unsqueeze(0), tokens.inverse)


def _loss_and_gradient(token_loss, results, part, needed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(a chunk's loss, its gradient [3, n] by the results, or None)."""
    if not needed:
        return token_loss(results.unbind(), part).detach(), None
    leaves = [row.requires_grad_() for row in results.unbind()]  # apart: nothing to stack in the backward pass
    with torch.enable_grad():
        loss = token_loss(leaves, part)
    if not loss.requires_grad:  # it depends on none of them
        return loss.detach(), None
    return loss.detach(), put_together(torch.autograd.grad(loss, leaves, allow_unused=True), results)
