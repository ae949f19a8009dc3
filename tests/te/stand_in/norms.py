"""RMSNorm of the compiled module. Source: transformer_engine/pytorch/csrc/extensions/normalization.cpp of 2.20.2."""

from __future__ import annotations

from typing import Any

import torch

from tests.te.stand_in.enums import TORCH_DTYPES


def rmsnorm_fwd(
    input: torch.Tensor,  # noqa: A002 (its name there)
    weight: torch.Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: int,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, torch.Tensor]:
    """(x / sqrt(mean(x^2) + eps) * weight in `otype`, then quantized; None; 1 / sqrt(...) [rows] float32)."""
    x = input.detach().float()
    inverse = torch.rsqrt(x.pow(2).mean(-1) + eps)
    output = (x * inverse[..., None] * _gain(weight, zero_centered_gamma)).to(TORCH_DTYPES[otype])
    if quantizer is not None:
        output = quantizer.quantize(output, out=ln_out)
    elif ln_out is not None:
        output = ln_out.copy_(output)
    return output, None, inverse.flatten()


def rmsnorm_bwd(
    dz: torch.Tensor,
    x: torch.Tensor,
    rsigma: torch.Tensor,
    gamma: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x, gradient of the weight), from the gradient of the output."""
    values, gradient = x.detach().float(), dz.float()
    inverse = rsigma.reshape(*values.shape[:-1], 1)
    normalized = values * inverse
    inner = gradient * _gain(gamma, zero_centered_gamma)
    of_x = inverse * (inner - normalized * (inner * normalized).mean(-1, keepdim=True))
    of_gamma = (gradient * normalized).reshape(-1, values.shape[-1]).sum(0)
    return of_x.to(x.dtype), of_gamma.to(gamma.dtype)


def _gain(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight.detach().float() + (1.0 if zero_centered else 0.0)
