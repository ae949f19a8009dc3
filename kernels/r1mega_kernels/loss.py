"""The GRPO loss of packed tokens with its gradient and metrics in one pass over the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1mega_kernels.library import LIBRARY, check_devices, kernels, uses_reference
from r1mega_kernels.log_prob import looks_at_values, refuse_second_derivative


@dataclass(frozen=True, slots=True)
class GRPOMetrics:
    """Sums over the counted tokens: float64 scalars on the tokens' device, detached; add them up over microbatches and
    ranks (`mismatch_max`: take the largest) and divide by `num_tokens`.

    clipped: tokens whose policy gradient the (dual) clip cut (CISPO: whose ratio it bounded). kl: k3 to the reference.
    mismatch: |log pi - log sampler|. truncated: tokens whose importance weight exceeded the cap. ratio_sum: pi / pi_old.
    """

    num_tokens: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor
    mismatch_sum: torch.Tensor
    mismatch_max: torch.Tensor
    truncated: torch.Tensor
    ratio_sum: torch.Tensor


def grpo_token_loss(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor | None = None,
    *,
    reference_log_probs: torch.Tensor | None = None,
    sampler_log_probs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coefficient: float = 0.0,
    importance_cap: float | None = None,
    surrogate: str = "clip",
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    kl_bias_correction: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, GRPOMetrics]:
    """Sum over tokens of weight * (-w_is * min(r A, clip(r, 1 - low, 1 + high) A) + beta * k3); and its metrics.

    DeepSeekMath, eq. 3, with clip-higher (DAPO), dual clip (Ye et al. 2020: for A < 0 the surrogate is at least c A)
    and truncated importance sampling, w_is = min(pi_old / pi_sampler, cap), detached.
    surrogate: 'clip', the min above; 'cispo' (MiniMax-M1), detached clip(r, 1 - low, 1 + high) * A * log pi;
    'sapo' (Gao et al. 2025), sigmoid(tau (r - 1)) * 4 / tau * A, tau = sapo_temperatures[0] for A > 0, else [1].
    kl_bias_correction: k3 times pi / pi_sampler, with its gradient (DeepSeek-V3.2, section 3.1: then an unbiased
    gradient of the KL).

    log_probs: [N] of the policy, the only input with a gradient; N response tokens, packed. advantages: [N], or [S]
    with `sequence_ids` [N] int64, the token's sequence. weights: [N] or, with sequence_ids, [S]; None is 1 each (not 1
    / N).
    old_log_probs: [N]; None: on-policy, r = 1 with its gradient. mask: [N] bool; a token where it is False counts
    nowhere and its values may be anything. An advantage of 0 makes a token's surrogate 0 even if its ratio overflowed,
    a weight of 0 its whole term, a kl_coefficient of 0 the KL's.
    reference_log_probs: [N], needed when kl_coefficient is not 0; sampler_log_probs: [N], needed by importance_cap and
    kl_bias_correction. Every surrogate is a multiple of |A|, so that a weight of one's own may be multiplied into A.
    The loss is a float32 scalar, summed in double in a fixed order.

    Raises:
        ValueError: shapes that do not fit, an option without the log-probs that it needs, or a bad value.
    """
    use_reference = uses_reference(log_probs.device, backend)
    count = log_probs.numel()
    optional = {
        "old_log_probs": old_log_probs,
        "reference_log_probs": reference_log_probs,
        "sampler_log_probs": sampler_log_probs,
        "mask": mask,
        "sequence_ids": sequence_ids,
    }
    by_token = {"advantages": advantages, "weights": weights} if sequence_ids is None else {}
    for name, tensor in {"log_probs": log_probs, **optional, **by_token}.items():
        if tensor is not None and tuple(tensor.shape) != (count,):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{count}]")
    check_devices(log_probs.device, advantages=advantages, weights=weights, **optional)
    if kl_coefficient != 0 and reference_log_probs is None:
        raise ValueError("kl_coefficient needs reference_log_probs")
    if (importance_cap is not None or kl_bias_correction) and sampler_log_probs is None:
        raise ValueError(
            f"{'kl_bias_correction' if importance_cap is None else 'importance_cap'} needs sampler_log_probs"
        )
    if surrogate not in _SURROGATES:
        raise ValueError(f"surrogate must be one of {list(_SURROGATES)}, not {surrogate!r}")
    if dual_clip is not None and surrogate != "clip":
        raise ValueError(f"dual_clip bounds the surrogate 'clip'; {surrogate!r} has no use for it")
    if min(sapo_temperatures) <= 0 or max(sapo_temperatures) > 50:  # exp(temperature) is a float32
        raise ValueError(f"sapo_temperatures must be > 0 and <= 50, not {sapo_temperatures}")
    if (dual_clip is not None and dual_clip <= 1) or (importance_cap is not None and importance_cap <= 0):
        raise ValueError(f"dual_clip must be > 1 and importance_cap > 0, not {dual_clip} and {importance_cap}")
    weights_per_sequence = False
    if sequence_ids is not None:
        num_sequences = advantages.numel()
        weights_per_sequence = weights is not None and tuple(weights.shape) == (num_sequences,)
        if weights is not None and not weights_per_sequence and tuple(weights.shape) != (count,):
            raise ValueError(f"weights has shape {list(weights.shape)}, expected [{num_sequences}] or [{count}]")
        _check_sequences(sequence_ids, num_sequences, mask)
        if num_sequences == 0:  # every token is masked; the kernel reads element 0 for those
            advantages, weights = log_probs.new_zeros(1), log_probs.new_zeros(1) if weights_per_sequence else weights
    wide = torch.promote_types(log_probs.dtype, torch.float32) if use_reference else torch.float32

    nothing = log_probs.new_empty(0, dtype=wide)  # stands for a tensor that is not given

    def given(x: torch.Tensor | None, dtype: torch.dtype = wide) -> torch.Tensor:
        if x is None:
            return nothing
        if x.dtype == dtype and not x.requires_grad and x.is_contiguous():  # three calls less
            return x
        return x.detach().to(dtype).contiguous()

    inputs = (
        given(old_log_probs), given(reference_log_probs), given(sampler_log_probs), given(advantages), given(weights),
        nothing if mask is None else mask.bool().view(torch.uint8).contiguous(), given(sequence_ids, torch.int64),
        weights_per_sequence, clip_low, clip_high, dual_clip or 0.0, kl_coefficient, importance_cap or 0.0,
        _SURROGATES[surrogate], *sapo_temperatures, kl_bias_correction, use_reference,
    )  # fmt: skip
    policy = log_probs.to(wide).contiguous()
    if torch.compiler.is_compiling():
        loss, _, sums = torch.ops.r1mega_kernels.token_loss(policy, *inputs)
        sums = sums.detach()
    else:
        found: list[torch.Tensor] = []
        loss = _TokenLoss.apply(policy, inputs, found)
        (sums,) = found
    return loss, GRPOMetrics(*sums.unbind()[1:])


def _check_sequences(sequence_ids: torch.Tensor, num_sequences: int, mask: torch.Tensor | None) -> None:
    if not looks_at_values(sequence_ids) or not sequence_ids.numel():
        return
    low, high = (int(v) for v in sequence_ids.aminmax())
    if mask is not None and (low < 0 or high >= num_sequences):  # masked tokens may hold anything
        used = sequence_ids[mask.bool()]
        low, high = (int(v) for v in used.aminmax()) if used.numel() else (0, -1)
    if low < 0 or high >= num_sequences:
        raise ValueError(f"sequence_ids must be in [0, {num_sequences}), found {low} to {high}")


_SURROGATES = {"clip": 0, "cispo": 1, "sapo": 2}
_TOKENS_PER_BLOCK = 2048  # of the CUDA kernel, whose blocks leave partial sums, and their number, after the 8 sums
_INPUTS = ("log_probs", "old", "reference_log_probs", "sampler", "advantages", "weights", "mask", "sequence_ids")
LIBRARY.define(
    f"token_loss({', '.join(f'Tensor {name}' for name in _INPUTS)}, bool weights_per_sequence, float clip_low, "
    "float clip_high, float dual_clip, float kl_coefficient, float importance_cap, int surrogate, "
    "float sapo_positive, float sapo_negative, bool kl_bias_correction, bool reference) "
    "-> (Tensor loss, Tensor grad, Tensor sums)"
)


def _token_loss(*args):
    *inputs, use_reference = args
    log_probs = inputs[0]
    grad = torch.empty_like(log_probs)
    blocks = -(-log_probs.numel() // _TOKENS_PER_BLOCK) if log_probs.is_cuda else 0
    totals = torch.zeros(8 + 8 * blocks + (blocks > 0), dtype=torch.float64, device=log_probs.device)
    if log_probs.numel():
        kernels(use_reference).grpo_token_loss(*inputs, grad, totals)
    sums = totals[:8] if blocks else totals
    return sums[0].to(log_probs.dtype, copy=True), grad, sums


def _token_loss_fake(log_probs, *args):
    return log_probs.new_empty(()), torch.empty_like(log_probs), log_probs.new_empty(8, dtype=torch.float64)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1])


def _token_loss_backward(ctx, grad_loss, _grad_grad, _grad_sums):
    refuse_second_derivative()
    return ctx.saved_tensors[0] * grad_loss, *([None] * 18)


class _TokenLoss(torch.autograd.Function):  # as _LogProb: cheaper to call than the operator
    @staticmethod
    def forward(ctx, log_probs, rest, found):
        loss, grad, sums = _token_loss(log_probs, *rest)
        ctx.save_for_backward(grad)
        found.append(sums)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return _token_loss_backward(ctx, grad_loss, None, None)[0], None, None


LIBRARY.impl("token_loss", _token_loss, "CompositeExplicitAutograd")
torch.library.register_fake("r1mega_kernels::token_loss", _token_loss_fake, lib=LIBRARY)
torch.library.register_autograd("r1mega_kernels::token_loss", _token_loss_backward, setup_context=_save, lib=LIBRARY)
