"""Log-probs from hidden states and the output weight, without ever holding the logits of all tokens.

Logits are made in fp32, by square blocks of tokens and vocabulary, in both directions: bf16 would put a logit
of 40 up to 0.125 off. The weight's gradient is added up in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from r1mega_kernels.kept import KeptTokens, gradient_scratch
from r1mega_kernels.library import NATIVE, check_devices, kernels, looks_at_values, uses_reference
from r1mega_kernels.log_prob import (
    NATIVE_DTYPES,
    LogProbs,
    backward_into,
    check_arguments,
    check_rows,
    gathered_stats,
    inverse_temperature,
    kept_lists,
    narrow_rows,
    put_together,
    refuse_second_derivative,
    refuse_transforms,
    stats_into,
    vocabulary_range,
)

DEFAULT_BUFFER_BYTES = 128 << 20


def linear_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    rows: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    *,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    kept: KeptTokens | None = None,
    softcap: float | None = None,
    entropy: bool = True,
    buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    reduce_hidden_grad: bool = True,
    backend: str | None = None,
) -> LogProbs:
    """`grouped_log_prob` of the fp32 logits hidden @ weight.T, with a logits buffer of at most about `buffer_bytes` bytes.

    hidden: [T, H]; weight: [V, H] (V / tp rows with `tp_group`), of the same dtype, float32, bfloat16 or float16.
    softcap: the logits are softcap * tanh(x / softcap) of the products x (Gemma 2); the backward pass then takes twice
    the buffer, or two and a half times. kept: it takes 4 bytes a kept id beside the buffer. The other arguments are those of `grouped_log_prob`.

    Gradients: that of `hidden` is accumulated in fp32, summed over `tp_group` when `reduce_hidden_grad` (leave it to
    the layer below by False, as for Megatron's ColumnParallelLinear input), then cast once. That of `weight` is added
    to `weight.main_grad` (fp32) if there is one, with Megatron's `grad_added_to_main_grad` set where the weight has
    it; else it is returned in the weight's dtype. On a GPU the gradient of the logits has the dtype of `hidden` from the
    first, in the logits' place, for its two products. A second derivative is an error.

    Raises:
        ValueError, TypeError, PlatformError: as `grouped_log_prob`.
    """
    head, hidden, tokens = output_layer(
        hidden, weight, targets, temperature, rows, tp_group, vocab_start, vocab_size, kept, softcap, entropy,
        reduce_hidden_grad, backend,
    )  # fmt: skip
    return LogProbs(*_LinearLogProb.apply(hidden, weight, (head, tokens, buffer_bytes)))


class Tokens(NamedTuple):
    """What the kernels are told of the rows of a block: targets [t], inverse temperature [t] or [1], and (None of none) the
    ids that they keep, kept_ranges [t, 2] into kept_ids [M]."""

    targets: torch.Tensor
    inverse: torch.Tensor
    kept_ids: torch.Tensor | None
    kept_ranges: torch.Tensor | None

    def part(self, row: slice) -> Tokens:
        """Of some of the rows."""
        if row.stop - row.start == self.targets.shape[0]:
            return self
        ranges = None if self.kept_ranges is None else self.kept_ranges[row]
        inverse = self.inverse[row] if self.inverse.numel() > 1 else self.inverse
        return Tokens(self.targets[row], inverse, self.kept_ids, ranges)


class OutputLayer(NamedTuple):
    """The output weight of this rank and what its logits need. width: rows of the weight that are no padding; vocab_size: of
    all ranks."""

    weight: torch.Tensor
    width: int
    vocab_start: int
    vocab_size: int
    group: dist.ProcessGroup | None
    softcap: float | None
    entropy: bool
    reduce_hidden_grad: bool
    use_reference: bool
    dtype: torch.dtype
    """Of logits and of the sums of gradients."""

    def factor(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as the matrix products take it: as it is on a GPU, in `dtype` on a CPU, whose products give what they take."""
        return x if x.dtype == self.dtype or widens(x) else x.to(self.dtype)

    def product(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """a @ b in `dtype`, whatever the factors', in `out` if that is given."""
        kind = "cuda" if a.is_cuda else "cpu"
        if out is None and torch.is_autocast_enabled(kind):  # it casts factors where there is no place for a result
            out = a.new_empty(a.shape[0], b.shape[1], dtype=self.dtype)
        if a.dtype == self.dtype:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=self.dtype, out=out)

    def added(self, total: torch.Tensor | None, like: torch.Tensor, part: slice, a, b) -> torch.Tensor:
        """`total` (in `dtype`, of the shape of `like`; None: nothing yet), to rows `part` of which a @ b is added in `dtype`."""
        if total is None:
            if part.stop - part.start == like.shape[0]:
                return self.product(a, b)
            total = like.new_zeros(like.shape, dtype=self.dtype)
        rows = piece(total, part)
        if a.dtype == self.dtype:
            rows.addmm_(a, b)
        else:
            torch.addmm(rows, a, b, out_dtype=self.dtype, out=rows)
        return total

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[t, v] of factors [t, H] and [v, H], in `out` if that is given."""
        out = self.product(hidden, weight.t(), out)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def stats_into(self, stats, logits, tokens: Tokens, first_column: int) -> None:
        """stats [t, 4] <- of logits [t, v], whose columns begin at `first_column` of this rank's."""
        targets, inverse, *kept = tokens
        start = self.vocab_start + first_column
        stats_into(
            stats, logits, targets, inverse, None, kept, start, self.vocab_size, self.entropy, self.use_reference
        )

    def merged(self, merged: torch.Tensor, shards: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """[3, t] log-prob, entropy and logsumexp of statistics [blocks, t, 4], over all ranks; merged [t, 4] <- theirs, which may
        be the only block's."""
        merge, count = kernels(self.use_reference).log_prob_merge, shards.shape[1]
        results = shards.new_empty(3, count)
        if self.group is not None:
            if count:
                merge(shards, inverse, merged, False, merged, results)
            shards = gathered_stats(merged.clone(), self.group.group_name)
        if count:
            merge(shards, inverse, merged, False, merged, results)
        return results

    def gradient_of(self, logits, tokens: Tokens, scratch, first_column, stats, entropy, grads) -> torch.Tensor:
        """The gradient of the products, in the place of contiguous logits, from `grads` [3, t]; a factor of further products:
        on a GPU of the weight's dtype. scratch: the `gradient_scratch` of the kept ids, one for all blocks."""
        is_narrow = self.weight.dtype != logits.dtype and widens(logits)
        slope = None if self.softcap is None else 1 - (logits / self.softcap).square_()
        grad = narrow_rows(logits, self.weight.dtype) if is_narrow and slope is None else logits
        targets, inverse, *kept = tokens
        start = self.vocab_start + first_column
        backward_into(
            grad, logits, targets, inverse, None, kept, scratch, start, stats, entropy, grads.contiguous(),
            self.use_reference,
        )  # fmt: skip
        if slope is None:
            return grad
        return logits.mul_(slope).to(self.weight.dtype) if is_narrow else logits.mul_(slope)  # rounded once

    def is_short(self, tokens: Tokens) -> bool:
        """Whether logits of all columns at once are a plain product, their statistics all that there is to know of them, and
        their gradient in their place a factor as it is: `short_results` and `short_gradient` then serve, whose few lines are what
        a call of few tokens takes its time for."""
        weight = self.weight
        return (
            weight.is_cpu and weight.dtype == self.dtype and weight.shape[0] == self.width and self.softcap is None
            and self.group is None and tokens.kept_ids is None and not self.use_reference
            and not torch.is_autocast_enabled("cpu")
        )  # fmt: skip

    def short_results(self, logits: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """([t, 4] statistics, [3, t] results) of logits of all columns, where `is_short`."""
        targets, inverse = tokens.targets, tokens.inverse
        stats, results = logits.new_empty(logits.shape[0], 4), logits.new_empty(3, logits.shape[0])
        NATIVE.log_prob_stats(
            logits, targets, inverse, targets, False, self.vocab_start, self.vocab_size, self.entropy, stats
        )
        NATIVE.log_prob_merge(stats.unsqueeze(0), inverse, targets, False, stats, results)
        return stats, results

    def short_gradient(self, logits: torch.Tensor, tokens: Tokens, stats, results, grads: torch.Tensor) -> None:
        """The gradient of these logits in their place, from `grads` [3, t]."""
        targets, entropy = tokens.targets, results.select(0, 1)
        NATIVE.log_prob_backward(
            logits, targets, tokens.inverse, targets, False, self.vocab_start, stats, entropy, grads, logits
        )

    def reduced(self, grad_hidden: torch.Tensor) -> torch.Tensor:
        """The gradient of the hidden states over all ranks, in their dtype."""
        if self.group is not None and self.reduce_hidden_grad:
            dist.all_reduce(grad_hidden, group=self.group)
        return self.narrowed(grad_hidden)

    def narrowed(self, x: torch.Tensor) -> torch.Tensor:
        """In the dtype of the weight."""
        return x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)


def output_layer(
    hidden, weight, targets, temperature, rows, tp_group, vocab_start, vocab_size, kept, softcap, entropy,
    reduce_hidden_grad, backend,
) -> tuple[OutputLayer, torch.Tensor, Tokens]:  # fmt: skip
    """(the layer, the chosen rows of hidden states, what else is said of them); raises as `linear_log_prob`."""
    refuse_transforms()
    use_reference = uses_reference(hidden, backend)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [T, H] and weight [V, H], not {list(hidden.shape)} and {list(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight is {weight.dtype}")
    if softcap is not None and not (0 < softcap < math.inf):
        raise ValueError(f"softcap must be a finite number above 0, not {softcap}")
    check_devices(hidden.device, weight=weight)
    start, size = vocabulary_range(weight.shape[0], tp_group, vocab_start, vocab_size)
    check_arguments(hidden, targets, rows, use_reference, (*NATIVE_DTYPES, torch.float16))
    by_value = (rows is not None or kept is not None) and looks_at_values(hidden)
    if by_value and rows is not None:
        check_rows(rows, hidden.shape[0])
    kept_ids, kept_ranges = kept_lists(kept, targets, rows, size, by_value, use_reference)
    inverse = inverse_temperature(temperature, hidden)
    if rows is not None:  # prompt rows never reach the matrix products
        hidden, targets = hidden.index_select(0, rows), targets[rows]
        inverse = inverse[rows] if inverse.numel() > 1 else inverse
        kept_ranges = None if kept_ranges is None else kept_ranges[rows]
    group = tp_group if tp_group is not None and dist.get_world_size(tp_group) > 1 else None
    width = min(weight.shape[0], size - start)
    head = OutputLayer(
        weight, width, start, size, group, softcap, entropy, reduce_hidden_grad, use_reference, inverse.dtype
    )
    return head, hidden, Tokens(targets.contiguous(), inverse, kept_ids, kept_ranges)


def widens(x: torch.Tensor) -> bool:
    """Whether matrix products on the device of `x` give fp32 of factors of 16 bits."""
    return x.is_cuda


def block_shape(rows: int, columns: int, element_size: int, buffer_bytes: int) -> tuple[int, int]:
    """Rows and columns of blocks that fit the buffer: multiples of 128, at least 128, as nearly square as the whole
    allows. The backward pass reads and writes the gradients of hidden states and weight once for each block beside them:
    squares do so least often.
    """
    elements = buffer_bytes // element_size
    if 0 < rows * columns <= elements:
        return rows, columns
    side = math.isqrt(max(1, elements))

    def rounded(limit: int, length: int) -> int:
        return max(1, length) if length <= limit else max(128, limit // 128 * 128)

    short = min(rows, columns)
    if short < side:  # the whole of one side, as much as fits of the other
        side = elements // max(1, short)
    return (rounded(side, rows), rounded(side, columns))


def piece(x: torch.Tensor, part: slice) -> torch.Tensor:
    """x[part]; of all of it, itself, which costs nothing."""
    return x if part.stop - part.start == x.shape[0] else x[part]


def parts(length: int, step: int) -> Iterator[slice]:
    """[0, length) in slices of `step`, the last one shorter."""
    return (slice(begin, min(begin + step, length)) for begin in range(0, length, step))


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, rest):
        """Log-probs, entropies and logsumexps, [T] each. The blocks of the vocabulary are merged as shards of it are."""
        ctx.set_materialize_grads(False)
        head, tokens, buffer_bytes = rest
        count = hidden.shape[0]
        height, width = block = block_shape(count, head.width, head.dtype.itemsize, buffer_bytes)
        ctx.head, ctx.block, ctx.is_whole = head, block, block == (count, head.width)
        if ctx.is_whole and head.is_short(tokens):
            stats, results = head.short_results(torch.mm(hidden, weight.t()), tokens)
            ctx.save_for_backward(hidden, weight, stats, results, *tokens)
            return results.unbind()
        buffer = _buffer(head, count, block)
        stats = tokens.inverse.new_empty(count, 4)
        shards = stats.unsqueeze(0) if width == head.width else stats.new_empty(-(-head.width // width), count, 4)
        for number, column in enumerate(parts(head.width, width)):
            shard = stats if width == head.width else shards[number]
            factor = head.factor(piece(weight, column))
            for row in parts(count, height):
                logits = head.logits(head.factor(piece(hidden, row)), factor, _block(buffer, row, column))
                head.stats_into(piece(shard, row), logits, tokens.part(row), column.start)
        results = head.merged(stats, shards, tokens.inverse)
        ctx.save_for_backward(hidden, weight, stats, results, *tokens)
        return results.unbind()

    @staticmethod
    def backward(ctx, *grads):
        """Gradients of hidden and weight: the logits of each block again, overwritten by their gradient."""
        refuse_second_derivative()
        hidden, weight, stats, results, *rest = ctx.saved_tensors
        head, together, tokens = ctx.head, put_together(grads, results), Tokens(*rest)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        if ctx.is_whole and head.is_short(tokens) and (not needs_weight or main_grad(head) is None):
            logits = torch.mm(hidden, weight.t())
            head.short_gradient(logits, tokens, stats, results, together)
            return (
                torch.mm(logits, weight) if needs_hidden else None,
                torch.mm(logits.t(), hidden) if needs_weight else None,
                None,
            )
        all_rows, count, (height, width) = (stats, results.select(0, 1), together), hidden.shape[0], ctx.block
        _, entropy, _ = all_rows
        buffer = _buffer(head, count, ctx.block)
        grad_hidden, grad_weight = None, main_grad(head) if needs_weight else None
        scratch = gradient_scratch(tokens.kept_ids)
        for column in parts(head.width, width):
            factor = head.factor(piece(weight, column))
            for row in parts(count, height):
                states = head.factor(piece(hidden, row))
                logits = head.logits(states, factor, _block(buffer, row, column))
                of_rows = all_rows if height >= count else (stats[row], entropy[row], together[:, row])
                grad = head.gradient_of(logits, tokens.part(row), scratch, column.start, *of_rows)
                if needs_hidden:
                    grad_hidden = head.added(grad_hidden, hidden, row, grad, factor)
                if needs_weight:
                    grad_weight = head.added(grad_weight, weight, column, grad.t(), states)
        if needs_hidden:
            grad_hidden = head.reduced(or_zeros(grad_hidden, hidden, head.dtype))
        return grad_hidden, handed_over(head, or_zeros(grad_weight, weight, head.dtype)) if needs_weight else None, None


def _buffer(head: OutputLayer, count: int, block: tuple[int, int]) -> torch.Tensor | None:
    """For logits of blocks of `count` rows; None for a single block, which is a product's own."""
    return None if block == (count, head.width) else head.weight.new_empty(block, dtype=head.dtype)


def _block(buffer: torch.Tensor | None, row: slice, column: slice) -> torch.Tensor | None:
    """[rows, columns], contiguous, in the beginning of the buffer."""
    if buffer is None:
        return None
    height, width = row.stop - row.start, column.stop - column.start
    if (height, width) == tuple(buffer.shape):
        return buffer
    return buffer.view(-1)[: height * width].view(height, width)


def or_zeros(total: torch.Tensor | None, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A sum of `OutputLayer.added`; zeros of one to which nothing was added."""
    return like.new_zeros(like.shape, dtype=dtype) if total is None else total


def main_grad(head: OutputLayer) -> torch.Tensor | None:
    """[V, H] where the weight has its gradient added up, if it has. TypeError where that is of another dtype than the sum."""
    found = getattr(head.weight, "main_grad", None)
    if found is not None and found.dtype != head.dtype:
        raise TypeError(f"weight.main_grad is {found.dtype}; the gradient is accumulated in {head.dtype}")
    return found


def handed_over(head: OutputLayer, grad_weight: torch.Tensor) -> torch.Tensor | None:
    """What autograd is given for the weight: its gradient in its dtype; zeros or nothing where that is in main_grad."""
    weight = head.weight
    if getattr(weight, "main_grad", None) is None:
        return head.narrowed(grad_weight)
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
        # Megatron's hook wants a gradient, which it ignores (tied: autograd adds the embedding's to it). It is returned, for
        # without one autograd may run the hook in another thread, and overlap_grad_reduce then deadlocks.
        return torch.zeros_like(weight)
    return None
