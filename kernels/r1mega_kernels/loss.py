"""The GRPO loss of packed tokens with its gradient and metrics in one pass over the tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from r1mega_kernels.library import LIBRARY, check_devices, kernels, looks_at_values, nothing, plain, uses_reference
from r1mega_kernels.log_prob import refuse_second_derivative, refuse_transforms


@dataclass(frozen=True, slots=True)
class GRPOMetrics:
    """Sums over the counted tokens: float64 scalars on the tokens' device, detached; add them up over microbatches and
    ranks (`mismatch_max`: take the largest) and divide by `num_tokens`.
    """

    sums: torch.Tensor
    """[8] float64: the loss, then what the properties name, in their order."""

    def with_ratios(self, clipped: torch.Tensor, ratio_sum: torch.Tensor) -> GRPOMetrics:
        """The same, but for what a loss of sequences finds itself."""
        sums = self.sums.clone()
        sums[2], sums[7] = clipped, ratio_sum
        return GRPOMetrics(sums)

    @property
    def num_tokens(self) -> torch.Tensor:
        """Tokens that are not masked."""
        return self.sums[1]

    @property
    def clipped(self) -> torch.Tensor:
        """Tokens whose policy gradient the (dual) clip cut (CISPO: whose ratio it bounded)."""
        return self.sums[2]

    @property
    def kl(self) -> torch.Tensor:
        """k3 to the reference."""
        return self.sums[3]

    @property
    def mismatch_sum(self) -> torch.Tensor:
        """|log pi - log sampler|."""
        return self.sums[4]

    @property
    def mismatch_max(self) -> torch.Tensor:
        """The largest of these."""
        return self.sums[5]

    @property
    def truncated(self) -> torch.Tensor:
        """Tokens whose importance weight exceeded the cap."""
        return self.sums[6]

    @property
    def ratio_sum(self) -> torch.Tensor:
        """pi / pi_old."""
        return self.sums[7]


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
        TypeError: sequence_ids that are no integers.
    """
    refuse_transforms()
    use_reference = uses_reference(log_probs, backend)
    count = log_probs.numel()
    optional = (old_log_probs, reference_log_probs, sampler_log_probs, mask, sequence_ids)
    _check_shapes((log_probs, *optional, *((advantages, weights) if sequence_ids is None else ())), count)
    check_devices(
        log_probs.device, advantages=advantages, weights=weights, old_log_probs=old_log_probs,
        reference_log_probs=reference_log_probs, sampler_log_probs=sampler_log_probs, mask=mask,
        sequence_ids=sequence_ids,
    )  # fmt: skip
    _check_options(
        surrogate, clip_low, clip_high, dual_clip, kl_coefficient, importance_cap, sapo_temperatures, kl_bias_correction,
        reference_log_probs is not None, sampler_log_probs is not None,
    )  # fmt: skip
    weights_per_sequence = False
    if sequence_ids is not None:
        if sequence_ids.is_floating_point():
            raise TypeError(f"sequence_ids must be integers, not {sequence_ids.dtype}")
        num_sequences = advantages.numel()
        weights_per_sequence = weights is not None and tuple(weights.shape) == (num_sequences,)
        if weights is not None and not weights_per_sequence and tuple(weights.shape) != (count,):
            raise ValueError(f"weights has shape {list(weights.shape)}, expected [{num_sequences}] or [{count}]")
        if use_reference or num_sequences == 0:  # else a CPU's operator looks itself
            _check_sequences(sequence_ids, num_sequences, mask)
        if num_sequences == 0:  # every token is masked; the kernel reads element 0 for those
            advantages, weights = log_probs.new_zeros(1), log_probs.new_zeros(1) if weights_per_sequence else weights
    wide = torch.promote_types(log_probs.dtype, torch.float32) if use_reference else torch.float32

    none = nothing(log_probs, wide)
    floats = (old_log_probs, reference_log_probs, sampler_log_probs, advantages, weights)
    inputs = (
        *[none if x is None else plain(x, wide) for x in floats],
        none if mask is None else mask.bool().view(torch.uint8).contiguous(),
        none if sequence_ids is None else plain(sequence_ids, torch.int64),
        weights_per_sequence, clip_low, clip_high, dual_clip or 0.0, kl_coefficient, importance_cap or 0.0,
        _SURROGATES[surrogate], *sapo_temperatures, kl_bias_correction, use_reference,
    )  # fmt: skip
    policy = log_probs if log_probs.dtype == wide and log_probs.is_contiguous() else log_probs.to(wide).contiguous()
    if torch.compiler.is_compiling():
        loss, _, sums = torch.ops.r1mega_kernels.token_loss(policy, *inputs)
        sums = sums.detach()
    else:
        found: list[torch.Tensor] = []
        loss = _TokenLoss.apply(policy, inputs, found)
        (sums,) = found
    return loss, GRPOMetrics(sums)


_NAMES = (
    "log_probs", "old_log_probs", "reference_log_probs", "sampler_log_probs", "mask", "sequence_ids", "advantages",
    "weights",
)  # fmt: skip


def _check_shapes(tensors: tuple[torch.Tensor | None, ...], count: int) -> None:
    """Of the first of `_NAMES`: [count] each."""
    for index, tensor in enumerate(tensors):
        if tensor is not None and (tensor.dim() != 1 or tensor.shape[0] != count):
            raise ValueError(f"{_NAMES[index]} has shape {list(tensor.shape)}, expected [{count}]")


def _check_options(
    surrogate, clip_low, clip_high, dual_clip, kl_coefficient, importance_cap, sapo_temperatures, kl_bias_correction, has_reference,
    has_sampler,
) -> None:  # fmt: skip
    if not (clip_low >= 0 and clip_high >= 0 and math.isfinite(kl_coefficient)):  # NaN is none of these
        raise ValueError(
            f"clip_low and clip_high must be >= 0 and kl_coefficient finite, not {clip_low}, {clip_high} and {kl_coefficient}"
        )
    if kl_coefficient != 0 and not has_reference:
        raise ValueError("kl_coefficient needs reference_log_probs")
    if (importance_cap is not None or kl_bias_correction) and not has_sampler:
        raise ValueError(
            f"{'kl_bias_correction' if importance_cap is None else 'importance_cap'} needs sampler_log_probs"
        )
    if surrogate not in _SURROGATES:
        raise ValueError(f"surrogate must be one of {list(_SURROGATES)}, not {surrogate!r}")
    if dual_clip is not None and surrogate != "clip":
        raise ValueError(f"dual_clip bounds the surrogate 'clip'; {surrogate!r} has no use for it")
    if not all(0 < temperature <= 50 for temperature in sapo_temperatures):  # exp(temperature) is a float32
        raise ValueError(f"sapo_temperatures must be > 0 and <= 50, not {sapo_temperatures}")
    if not (dual_clip is None or dual_clip > 1) or not (importance_cap is None or importance_cap > 0):
        raise ValueError(f"dual_clip must be > 1 and importance_cap > 0, not {dual_clip} and {importance_cap}")


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
    loss = sums.select(0, 0)
    return loss.to(log_probs.dtype, copy=loss.dtype == log_probs.dtype), grad, sums


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
        refuse_second_derivative()
        return ctx.saved_tensors[0] * grad_loss, None, None


LIBRARY.impl("token_loss", _token_loss, "CompositeExplicitAutograd")
torch.library.register_fake("r1mega_kernels::token_loss", _token_loss_fake, lib=LIBRARY)
torch.library.register_autograd("r1mega_kernels::token_loss", _token_loss_backward, setup_context=_save, lib=LIBRARY)
