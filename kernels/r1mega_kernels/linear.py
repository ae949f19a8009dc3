"""Log-probs from hidden states and the output weight, without ever holding the logits of all tokens.

Forward: blocks of tokens through one reused buffer. Backward: blocks of the vocabulary, whose logits are computed
again; a block's weight gradient is the sum over all tokens in one matrix product, so it is added once, in fp32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from r1mega_kernels.library import check_devices, kernels, uses_reference
from r1mega_kernels.log_prob import (
    LogProbs,
    backward_into,
    check_arguments,
    gathered_stats,
    inverse_temperature,
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
    buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    reduce_hidden_grad: bool = True,
    backend: str | None = None,
) -> LogProbs:
    """`grouped_log_prob(hidden @ weight.T, ...)` with a logits buffer of at most about `buffer_bytes` bytes.

    hidden: [T, H]; weight: [V, H] (V / tp rows with `tp_group`), of the same dtype, float32 or bfloat16. The other
    arguments are those of `grouped_log_prob`.

    Gradients: that of `hidden` is accumulated in fp32, summed over `tp_group` when `reduce_hidden_grad` (leave it to
    the layer below by False, as for Megatron's ColumnParallelLinear input), then cast once. That of `weight` is added
    to `weight.main_grad` (fp32) if there is one, with Megatron's `grad_added_to_main_grad` set where the weight has
    it; else it is returned in the weight's dtype. Two backward passes through one result are an error.

    Raises:
        ValueError, TypeError, PlatformError: as `grouped_log_prob`.
    """
    use_reference = uses_reference(hidden.device, backend)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [T, H] and weight [V, H], not {list(hidden.shape)} and {list(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight is {weight.dtype}")
    check_devices(hidden.device, weight=weight)
    start, size = vocabulary_range(weight.shape[0], tp_group, vocab_start, vocab_size)
    check_arguments(hidden, targets, rows, size, use_reference)
    inverse = inverse_temperature(temperature, hidden)
    if rows is not None:  # prompt rows never reach the matrix products
        hidden, targets = hidden.index_select(0, rows), targets[rows]
        inverse = inverse[rows] if inverse.numel() > 1 else inverse
    group = tp_group if tp_group is not None and dist.get_world_size(tp_group) > 1 else None
    columns = min(weight.shape[0], size - start)
    results = _LinearLogProb.apply(
        hidden, weight, columns, targets.contiguous(), inverse, start, group, buffer_bytes, reduce_hidden_grad,
        use_reference,
    )  # fmt: skip
    return LogProbs(*results.unbind())


def block_size(other: int, element_size: int, buffer_bytes: int) -> int:
    """How many rows (or columns) of `other` elements fit the buffer: a multiple of 128, at least 128."""
    return max(128, buffer_bytes // max(1, other * element_size) // 128 * 128)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, width, targets, inverse, vocab_start, group, buffer_bytes, reduce_grad, use_reference
    ):
        """[3, T]: log-prob, entropy and logsumexp, by blocks of rows whose logits fit the buffer."""
        op = kernels(use_reference)
        count = hidden.shape[0]
        step = min(max(1, count), block_size(width, hidden.element_size(), buffer_bytes))
        buffer = hidden.new_empty(step, width)
        stats = torch.empty(count, 4, dtype=inverse.dtype, device=hidden.device)
        for begin in range(0, count, step):
            part = slice(begin, min(begin + step, count))
            logits = torch.mm(hidden[part], weight[:width].t(), out=buffer[: part.stop - begin])
            scale = inverse[part] if inverse.numel() > 1 else inverse
            op.log_prob_stats(logits, targets[part], scale, targets, False, vocab_start, stats[part])
        shards = gathered_stats(stats, group.group_name if group is not None else "")
        merged = torch.empty_like(stats)
        results = torch.empty(3, count, dtype=stats.dtype, device=hidden.device)
        if count:
            op.log_prob_merge(shards, inverse, targets, False, merged, results)
        # ctx.weight: the parameter itself, whose main_grad the backward pass fills
        ctx.save_for_backward(hidden, weight, targets, inverse, merged, results[1].clone())
        ctx.weight, ctx.width, ctx.group, ctx.vocab_start = weight, width, group, vocab_start
        ctx.buffer_bytes, ctx.reduce_grad, ctx.use_reference = buffer_bytes, reduce_grad, use_reference
        return results

    @staticmethod
    def backward(ctx, grads):
        """Gradients of hidden and weight, by blocks of the vocabulary; the weight's goes into main_grad if it has one."""
        hidden, weight, targets, inverse, stats, entropy = ctx.saved_tensors
        count, width = hidden.shape[0], ctx.width
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
        target_grad, returned = _weight_grad_target(ctx.weight, wide, ctx.needs_input_grad[1])
        step = min(width, block_size(max(1, count), hidden.element_size(), ctx.buffer_bytes))
        buffer = hidden.new_empty(count * step)
        grads = grads.contiguous()
        for begin in range(0, width, step) if count else ():
            part = slice(begin, min(begin + step, width))
            logits = buffer[: count * (part.stop - begin)].view(count, -1)
            torch.mm(hidden, weight[part].t(), out=logits)
            backward_into(
                logits,
                logits,
                targets,
                inverse,
                None,
                ctx.vocab_start + begin,
                stats,
                entropy,
                grads,
                ctx.use_reference,
            )
            _add_product(grad_hidden, logits, weight[part])
            if target_grad is not None:
                _add_product(target_grad[part], logits.t(), hidden)
        if ctx.group is not None and ctx.reduce_grad:
            dist.all_reduce(grad_hidden, group=ctx.group)
        if returned is not None and target_grad is returned:
            returned = returned.to(weight.dtype)
        return grad_hidden.to(hidden.dtype), returned, *([None] * 8)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (fp32) += a @ b, accumulated and added in fp32 whatever the factors' dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # CPU matrix products have no out_dtype
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _weight_grad_target(
    weight: torch.Tensor, dtype: torch.dtype, needed: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(where the weight's gradient is added up, what autograd is given)."""
    if not needed:
        return None, None
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        return total, total
    if main_grad.dtype != dtype:
        raise TypeError(f"weight.main_grad is {main_grad.dtype}; the gradient is accumulated in {dtype}")
    if hasattr(weight, "grad_added_to_main_grad"):
        # Megatron's hook runs only when autograd hands over a gradient, which it then ignores
        weight.grad_added_to_main_grad = True
        return main_grad, torch.zeros_like(weight)
    return main_grad, None
