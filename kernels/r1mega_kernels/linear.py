"""Log-probs from hidden states and the output weight, without ever holding the logits of all tokens.

Logits are made in fp32, by square blocks of tokens and vocabulary, in both directions: bf16 would put a logit
of 40 up to 0.125 off. The weight's gradient is added up in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from r1mega_kernels.kept import KeptTokens, gradient_scratch
from r1mega_kernels.library import check_devices, kernels, uses_reference
from r1mega_kernels.log_prob import (
    NATIVE_DTYPES,
    LogProbs,
    backward_into,
    check_arguments,
    check_rows,
    gathered_stats,
    inverse_temperature,
    kept_lists,
    looks_at_values,
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
    return LogProbs(*_LinearLogProb.apply(hidden, weight, head, tokens, buffer_bytes))


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


@dataclass(frozen=True, slots=True)
class OutputLayer:
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

    def logits_into(self, out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """out [t, v] <- the logits of factors [t, H] and [v, H]."""
        if hidden.dtype == out.dtype:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def stats_into(self, stats, logits, tokens: Tokens, first_column: int) -> None:
        """stats [t, 4] <- of logits [t, v], whose columns begin at `first_column` of this rank's."""
        targets, inverse, *kept = tokens
        start = self.vocab_start + first_column
        stats_into(
            stats, logits, targets, inverse, None, kept, start, self.vocab_size, self.entropy, self.use_reference
        )

    def merged(self, shards: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([t, 4] statistics, [3, t] log-prob, entropy and logsumexp) of statistics [blocks, t, 4], over all ranks."""
        merge, count = kernels(self.use_reference).log_prob_merge, shards.shape[1]
        merged, results = shards.new_empty(count, 4), shards.new_empty(3, count)
        if self.group is not None:
            if count:
                merge(shards, inverse, merged, False, merged, results)
            shards = gathered_stats(merged.clone(), self.group.group_name)
        if count:
            merge(shards, inverse, merged, False, merged, results)
        return merged, results

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

    def reduced(self, grad_hidden: torch.Tensor) -> torch.Tensor:
        """The gradient of the hidden states over all ranks, in their dtype."""
        if self.group is not None and self.reduce_hidden_grad:
            dist.all_reduce(grad_hidden, group=self.group)
        return grad_hidden.to(self.weight.dtype)


def output_layer(
    hidden, weight, targets, temperature, rows, tp_group, vocab_start, vocab_size, kept, softcap, entropy,
    reduce_hidden_grad, backend,
) -> tuple[OutputLayer, torch.Tensor, Tokens]:  # fmt: skip
    """(the layer, the chosen rows of hidden states, what else is said of them); raises as `linear_log_prob`."""
    refuse_transforms()
    use_reference = uses_reference(hidden.device, backend)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [T, H] and weight [V, H], not {list(hidden.shape)} and {list(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight is {weight.dtype}")
    if softcap is not None and not (0 < softcap < math.inf):
        raise ValueError(f"softcap must be a finite number above 0, not {softcap}")
    check_devices(hidden.device, weight=weight)
    start, size = vocabulary_range(weight.shape[0], tp_group, vocab_start, vocab_size)
    check_arguments(hidden, targets, rows, use_reference, (*NATIVE_DTYPES, torch.float16))
    by_value = looks_at_values(hidden)
    if by_value and rows is not None:
        check_rows(rows, hidden.shape[0])
    kept_ids, kept_ranges = kept_lists(kept, targets, rows, size, by_value, use_reference)
    inverse = inverse_temperature(temperature, hidden)
    if rows is not None:  # prompt rows never reach the matrix products
        hidden, targets = hidden.index_select(0, rows), targets[rows]
        inverse = inverse[rows] if inverse.numel() > 1 else inverse
        kept_ranges = None if kept_ranges is None else kept_ranges[rows]
    group = tp_group if tp_group is not None and dist.get_world_size(tp_group) > 1 else None
    width, dtype = min(weight.shape[0], size - start), torch.promote_types(weight.dtype, torch.float32)
    head = OutputLayer(weight, width, start, size, group, softcap, entropy, reduce_hidden_grad, use_reference, dtype)
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
    def forward(ctx, hidden, weight, head, tokens, buffer_bytes):
        """Log-probs, entropies and logsumexps, [T] each. The blocks of the vocabulary are merged as shards of it are."""
        ctx.set_materialize_grads(False)
        count = hidden.shape[0]
        ctx.block = height, width = block_shape(count, head.width, head.dtype.itemsize, buffer_bytes)
        columns = list(parts(head.width, width))
        buffer = hidden.new_empty(height, width, dtype=head.dtype)
        shards = tokens.inverse.new_empty(len(columns), count, 4)
        for number, column in enumerate(columns):
            shard = shards.select(0, number)
            factor = head.factor(piece(weight, column))
            for row in parts(count, height):
                logits = head.logits_into(_block(buffer, row, column), head.factor(piece(hidden, row)), factor)
                head.stats_into(piece(shard, row), logits, tokens.part(row), column.start)
        merged, results = head.merged(shards, tokens.inverse)
        ctx.save_for_backward(hidden, weight, merged, results, *tokens)
        ctx.head = head
        return results.unbind()

    @staticmethod
    def backward(ctx, *grads):
        """Gradients of hidden and weight: the logits of each block again, overwritten by their gradient."""
        refuse_second_derivative()
        hidden, weight, stats, results, *rest = ctx.saved_tensors
        entropy, together, tokens = results.select(0, 1), put_together(grads, results), Tokens(*rest)
        head, (height, width) = ctx.head, ctx.block
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        buffer = hidden.new_empty(height, width, dtype=head.dtype)
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=head.dtype) if needs_hidden else None
        grad_weight = weight_grad(head) if needs_weight else None
        scratch = gradient_scratch(tokens.kept_ids)
        for column in parts(head.width, width):
            factor = head.factor(piece(weight, column))
            for row in parts(hidden.shape[0], height):
                states = head.factor(piece(hidden, row))
                logits = head.logits_into(_block(buffer, row, column), states, factor)
                of_rows = (
                    piece(stats, row),
                    piece(entropy, row),
                    together[:, row] if height < len(hidden) else together,
                )
                grad = head.gradient_of(logits, tokens.part(row), scratch, column.start, *of_rows)
                if grad_hidden is not None:
                    add_product(piece(grad_hidden, row), grad, factor)
                if grad_weight is not None:
                    add_product(piece(grad_weight, column), grad.t(), states)
        if grad_hidden is not None:
            grad_hidden = head.reduced(grad_hidden)
        return grad_hidden, handed_over(head, grad_weight), None, None, None


def _block(buffer: torch.Tensor, row: slice, column: slice) -> torch.Tensor:
    """[rows, columns], contiguous, in the beginning of the buffer."""
    height, width = row.stop - row.start, column.stop - column.start
    if (height, width) == tuple(buffer.shape):
        return buffer
    return buffer.view(-1)[: height * width].view(height, width)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (fp32) += a @ b, accumulated and added in fp32 whatever the factors' dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def weight_grad(head: OutputLayer) -> torch.Tensor:
    """[V, H] where the weight's gradient is added up: its main_grad, or zeros."""
    main_grad = getattr(head.weight, "main_grad", None)
    if main_grad is None:
        return torch.zeros(head.weight.shape, dtype=head.dtype, device=head.weight.device)
    if main_grad.dtype != head.dtype:
        raise TypeError(f"weight.main_grad is {main_grad.dtype}; the gradient is accumulated in {head.dtype}")
    return main_grad


def handed_over(head: OutputLayer, grad_weight: torch.Tensor | None) -> torch.Tensor | None:
    """What autograd is given for the weight: its gradient in its dtype; zeros or nothing where that is in main_grad."""
    weight = head.weight
    if grad_weight is None:
        return None
    if getattr(weight, "main_grad", None) is None:
        return grad_weight.to(weight.dtype)
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
        # Megatron's hook wants a gradient, which it ignores (tied: autograd adds the embedding's to it). It is returned, for
        # without one autograd may run the hook in another thread, and overlap_grad_reduce then deadlocks.
        return torch.zeros_like(weight)
    return None
