"""Log-probs, entropies and logsumexps of chosen tokens from (vocabulary-parallel) logits, one read of each used row."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist

from r1mega_kernels.kept import KeptTokens, check_ends, check_kept, gradient_scratch
from r1mega_kernels.library import LIBRARY, check_devices, is_plain_cpu, kernels, looks_at_values, uses_reference

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


class LogProbs(NamedTuple):
    """All [N], float32 (float64 for float64 logits), differentiable. entropy: NaN where it was not asked for."""

    log_prob: torch.Tensor
    entropy: torch.Tensor
    logsumexp: torch.Tensor


def grouped_log_prob(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    rows: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    *,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    kept: KeptTokens | None = None,
    entropy: bool = True,
    grad_in_place: bool = False,
    backend: str | None = None,
) -> LogProbs:
    """log softmax(logits / temperature)[target], the entropy and the logsumexp of that distribution, of the chosen
    rows.

    logits: [T, V] (V / tp columns with `tp_group`), float32 or bfloat16, any row stride: slice padding columns off, or
    fill them with -inf. targets: [T] int64, ids in the whole vocabulary; only those of chosen rows are looked at.
    temperature: > 0, one for all or [T]. rows: [N] int64, strictly increasing indices into T (default all of it); the
    logits of other rows are never read and get zero gradients.
    tp_group: the ranks that hold the other columns. The rank's columns begin at `vocab_start` (default rank * width)
    and the vocabulary has `vocab_size` (default width * ranks) ids; columns beyond it are padding and never read. One
    all-gather of 16 bytes a token; every rank
    gets the same bits.
    kept: the ids over which each token's distribution is normalised, all T tokens' (top-p and top-k sampling); the logits of
    others are not read and get zero gradients. On every rank the same lists, of the whole vocabulary.
    entropy: False spares a fourth of the forward pass's arithmetic; the entropies are then NaN.
    grad_in_place: the gradient overwrites the logits, which nobody may use afterwards.
    backend: None the compiled kernels (on a CPU without them the torch reference, logged), 'native', 'reference'.

    A row of NaNs, of +inf, or with every column -inf gives NaN, as log_softmax does. The result of a row has the same
    bits whatever rows are computed beside it, and from run to run. No gradient reaches `temperature`.

    Raises:
        ValueError: shapes, rows, a temperature of 0 or less, infinite or NaN, or (on a CPU) a target outside the vocabulary.
        TypeError: a dtype that the kernels do not read.
        PlatformError: no compiled kernels for a GPU.
    """
    refuse_transforms()
    use_reference = uses_reference(logits, backend)
    inverse = inverse_temperature(temperature, logits)
    width = logits.shape[-1]
    start, size = vocabulary_range(width, tp_group, vocab_start, vocab_size)
    check_arguments(logits, targets, rows, use_reference)
    by_value = use_reference and looks_at_values(logits)  # a CPU's operator looks itself
    if by_value and rows is not None:
        check_rows(rows, logits.shape[0])
    kept_ids, kept_ranges = kept_lists(kept, targets, rows, size, by_value, use_reference)
    if start + width > size:
        logits = logits[:, : size - start]
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if grad_in_place and logits.stride(0) < logits.shape[1] and logits.shape[0] > 1:
        raise ValueError(
            f"grad_in_place: rows of these logits lie over each other (strides {logits.stride()}, an expanded tensor?) and "
            "their gradients would too; pass logits.contiguous()"
        )
    group_name = tp_group.group_name if tp_group is not None and dist.get_world_size(tp_group) > 1 else ""
    tensors = (targets.contiguous(), inverse, rows, kept_ids, kept_ranges)
    options = (start, size, group_name, entropy, grad_in_place, use_reference)
    # torch.compile sees one operator; in eager mode an operator registered from Python costs several calls' worth more
    if torch.compiler.is_compiling():
        return LogProbs(*torch.ops.r1mega_kernels.log_prob(logits, *tensors, *options)[0].unbind())
    return LogProbs(*_LogProb.apply(logits, (*tensors, *options)))


def vocabulary_range(
    width: int, tp_group: dist.ProcessGroup | None, vocab_start: int | None, vocab_size: int | None
) -> tuple[int, int]:
    """(first column of this rank, size of the vocabulary). ValueError when the rank holds none of it."""
    ranks, rank = (dist.get_world_size(tp_group), dist.get_rank(tp_group)) if tp_group is not None else (1, 0)
    start = rank * width if vocab_start is None else vocab_start
    size = ranks * width if vocab_size is None else vocab_size
    if width == 0 or start >= size:
        raise ValueError(
            f"no columns: the vocabulary is empty, or its {size} ids end before this rank's first, {start}"
        )
    return start, size


def inverse_temperature(temperature: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[1] or [T] 1 / temperature in the dtype of the statistics of `like`."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(temperature, torch.Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature: no gradient is computed for it; pass temperature.detach()")
        if temperature.numel() not in (1, like.shape[0]):
            raise ValueError(f"temperature has {temperature.numel()} values for {like.shape[0]} rows of logits")
        inverse = temperature.to(torch.float64).reciprocal().to(dtype).reshape(-1)
        usable = (inverse > 0) & inverse.isfinite()
        if looks_at_values(inverse) and not bool(usable.all()):
            found = float(temperature.reshape(-1)[~usable][0])
            raise ValueError(f"temperature must be > 0 and 1 / temperature a finite number above 0, found {found}")
        return inverse.to(like.device).contiguous()
    if is_plain_cpu(like):
        return _constant(temperature, dtype)
    return torch.full((1,), reciprocal(temperature, dtype), dtype=dtype, device=like.device)


def reciprocal(temperature: float, dtype: torch.dtype) -> float:
    """1 / temperature. ValueError where `dtype` has no such number, or it is not above 0."""
    limits = torch.finfo(dtype)
    if not (temperature > 0 and limits.tiny <= 1.0 / temperature <= limits.max):
        raise ValueError(
            f"temperature must be > 0 and 1 / temperature a finite number above 0, not {temperature} "
            "(greedy decoding has no log-probs to train on)"
        )
    return 1.0 / temperature


@functools.lru_cache(maxsize=64)
def _constant(temperature: float, dtype: torch.dtype) -> torch.Tensor:
    """[1] 1 / temperature, which nobody writes to: a temperature is met again at every call."""
    with torch.inference_mode(False):  # whatever the default device is at the first call
        return torch.full((1,), reciprocal(temperature, dtype), dtype=dtype, device="cpu")


def check_arguments(
    x: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None,
    use_reference: bool,
    dtypes: tuple[torch.dtype, ...] = NATIVE_DTYPES,
) -> None:
    """Raises ValueError or TypeError for what the kernels would read wrongly. The operators look at targets, on a CPU; on a
    GPU one outside the vocabulary gives NaN."""
    shape = x.shape
    if len(shape) != 2 or targets.dim() != 1 or targets.shape[0] != shape[0]:
        raise ValueError(f"expected [T, V] and targets [T], not {list(shape)} and {list(targets.shape)}")
    check_devices(x.device, targets=targets, rows=rows)
    if targets.dtype != torch.int64 or (rows is not None and rows.dtype != torch.int64):
        raise TypeError("targets and rows must be int64")
    if not use_reference and x.dtype not in dtypes:
        read = ", ".join(str(dtype)[6:] for dtype in dtypes)
        raise TypeError(f"the kernels read {read}, not {x.dtype}; convert, or use backend='reference'")
    if rows is not None and (rows.dim() != 1 or not rows.is_contiguous()):
        raise ValueError("rows must be a contiguous vector")


def check_rows(rows: torch.Tensor, count: int) -> None:
    """Raises ValueError where they are not strictly increasing indices of `count` tokens; reads them."""
    if rows.shape[0] and (int(rows[0]) < 0 or int(rows[-1]) >= count or not bool((rows[1:] > rows[:-1]).all())):
        raise ValueError(f"rows must be strictly increasing indices in [0, {count})")


def kept_lists(
    kept: KeptTokens | None,
    targets: torch.Tensor,
    rows: torch.Tensor | None,
    vocab_size: int,
    by_value: bool,
    use_reference: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(ids [M], ranges [T, 2]) of lists that were checked, also by_value if asked; nothing of none."""
    if kept is None:
        return None, None
    check_kept(kept, targets, rows, vocab_size, by_value)
    if use_reference or not looks_at_values(targets) or not targets.shape[0]:
        return kept.ids.contiguous(), kept.ranges()
    check_ends(kept)
    return kept.ids.contiguous(), kept.offsets.contiguous().unfold(0, 2, 1)  # a CPU's operator looks at each range


def refuse_transforms() -> None:
    """Raises RuntimeError within torch.func's transforms (grad, vmap, jvp): they cannot look into the kernels' functions, and
    a forward-mode derivative would silently be 0."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the functions of r1mega_kernels work with torch.autograd, not within torch.func's transforms (grad, vmap, jvp): "
            "call them outside of these"
        )


def gathered_stats(stats: torch.Tensor, group_name: str) -> torch.Tensor:
    """[ranks, N, 4] of [N, 4] statistics of every rank, in the order of the ranks."""
    if not group_name:
        return stats.unsqueeze(0)
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]  # a str all the same
    shards = stats.new_empty(dist.get_world_size(group), *stats.shape)
    dist.all_gather_into_tensor(shards.view(-1, 4), stats, group=group)
    return shards


LIBRARY.define(
    "log_prob(Tensor logits, Tensor targets, Tensor inverse_temperature, Tensor? rows, Tensor? kept_ids, "
    "Tensor? kept_ranges, int vocab_start, int vocab_size, str group, bool entropy, bool grad_in_place, bool reference) "
    "-> (Tensor results, Tensor stats)"
)


def _log_prob(
    logits, targets, inverse_temperature, rows, kept_ids, kept_ranges, vocab_start, vocab_size, group, entropy,
    grad_in_place, reference,
):  # fmt: skip
    count = logits.shape[0] if rows is None else rows.shape[0]
    stats, results = inverse_temperature.new_empty(count, 4), inverse_temperature.new_empty(3, count)
    stats_into(
        stats, logits, targets, inverse_temperature, rows, (kept_ids, kept_ranges), vocab_start, vocab_size, entropy,
        reference,
    )  # fmt: skip
    shards = gathered_stats(stats, group)
    if count:  # the merged statistics take this rank's place
        row_list = targets if rows is None else rows
        kernels(reference).log_prob_merge(shards, inverse_temperature, row_list, rows is not None, stats, results)
    return results, stats


def stats_into(
    stats, logits, targets, inverse, rows, kept, vocab_start, vocab_size, entropy, use_reference
) -> None:  # fmt: skip
    """stats [N, 4] <- of the chosen rows of logits [T, V]. kept: (ids, ranges [T, 2]), or (None, None).

    Raises:
        ValueError: (on a CPU, or by the reference where values are looked at) a target outside the vocabulary.
    """
    if not stats.shape[0]:
        return
    row_list, has_rows = targets if rows is None else rows, rows is not None
    arguments = (logits, targets, inverse, row_list, has_rows, vocab_start, vocab_size, entropy, stats)
    op = kernels(use_reference)
    if kept[0] is None:
        op.log_prob_stats(*arguments)
    else:
        op.kept_log_prob_stats(*arguments, *kept)


def _log_prob_fake(logits, targets, inverse_temperature, rows, *args):
    count = logits.shape[0] if rows is None else rows.shape[0]
    return inverse_temperature.new_empty(3, count), inverse_temperature.new_empty(count, 4)


def _save(ctx, inputs, output):
    logits, targets, inverse, rows, ids, ranges, vocab_start, _, _, _, grad_in_place, reference = inputs
    ctx.options = (rows is not None, ids is not None, vocab_start, grad_in_place, reference)
    given = [x for x in (rows, ids, ranges) if x is not None]
    # the whole output: a view of it would keep this node, and with it the logits, alive for ever
    ctx.save_for_backward(logits, targets, inverse, *output, *given)


def _log_prob_backward(ctx, grads, _grad_stats):
    return _gradient(ctx, ctx.saved_tensors, grads.contiguous()), *([None] * 11)


def _gradient(ctx, saved, grads: torch.Tensor) -> torch.Tensor:
    refuse_second_derivative()
    logits, targets, inverse, results, stats, *given = saved
    has_rows, has_kept, vocab_start, grad_in_place, use_reference = ctx.options
    if grad_in_place:
        torch.autograd.graph.increment_version(logits)  # another backward through these logits is an error
        grad_logits = logits.detach()
    else:
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = given[0] if has_rows else None
    kept = given[-2:] if has_kept else (None, None)
    backward_into(
        grad_logits, logits, targets, inverse, rows, kept, gradient_scratch(kept[0]), vocab_start, stats,
        results.select(0, 1), grads, use_reference,
    )  # fmt: skip
    return grad_logits


def put_together(grads, results: torch.Tensor) -> torch.Tensor:
    """[3, N] of the gradients of its rows, None of those that nobody used. results: [3, N]."""
    together = torch.zeros_like(results)
    for k, grad in enumerate(grads):
        if grad is not None:
            together.select(0, k).copy_(grad)
    return together


def refuse_second_derivative() -> None:
    """Raises RuntimeError in a backward pass that autograd records (create_graph=True): it would record nothing."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the kernels of r1mega_kernels have no second derivative: differentiate with create_graph=False, or compute "
            "this term in plain torch functions"
        )


def backward_into(
    grad_logits, logits, targets, inverse, rows, kept, scratch, vocab_start, stats, entropy, grads, use_reference
) -> None:
    """grad_logits <- the gradient of logits [T, V]; the two may be one tensor, or grad_logits their `narrow_rows`. grads:
    [3, N]; kept: as of `stats_into`; scratch: the `gradient_scratch` of its ids."""
    positions = targets
    if rows is not None:
        positions = torch.full((len(logits),), -1, dtype=torch.int32, device=logits.device)
        positions[rows] = torch.arange(len(rows), dtype=torch.int32, device=logits.device)
    if not logits.shape[0]:
        return
    op, has_rows = kernels(use_reference), rows is not None
    arguments = (logits, targets, inverse, positions, has_rows, vocab_start, stats, entropy, grads, grad_logits)
    if kept[0] is None:
        op.log_prob_backward(*arguments)
    else:
        op.kept_log_prob_backward(*arguments, *kept, scratch)


def narrow_rows(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, V] of a dtype of 16 bits in the place of contiguous fp32 logits [T, V]: the first half of each of their rows."""
    return logits.view(dtype)[:, : logits.shape[1]]


class _LogProb(torch.autograd.Function):
    """The operator without its registration: (logits, the other inputs) -> results. Each input and output of a Function
    costs a call something, whatever it is."""

    @staticmethod
    def forward(ctx, logits, rest):
        ctx.set_materialize_grads(False)
        inputs = (logits, *rest)
        output = _log_prob(*inputs)
        _save(ctx, inputs, output)
        return output[0].unbind()

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        return _gradient(ctx, saved, put_together(grads, saved[3])), None


LIBRARY.impl("log_prob", _log_prob, "CompositeExplicitAutograd")
torch.library.register_fake("r1mega_kernels::log_prob", _log_prob_fake, lib=LIBRARY)
torch.library.register_autograd("r1mega_kernels::log_prob", _log_prob_backward, setup_context=_save, lib=LIBRARY)
