"""The two FP8 recipes by their definition, in float64: what layers that quantise must give.

tensorwise (Transformer Engine's Float8CurrentScaling, format hybrid): a scale a tensor, largest FP8 number / largest magnitude;
activations and weights in e4m3, gradients in e5m2.
blockwise (DeepSeek-V3 report, section 3.3; Float8BlockScaling, format e4m3): a scale for 128 neighbours of an activation or a
gradient, along what a product sums over, and for 128 x 128 of a weight; here the largest power of two that brings the
largest magnitude into range. All e4m3.
Scales are float32, and a product is summed up without rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK = 128


@dataclass(frozen=True, slots=True)
class Format:
    """mantissa: its bits; least: exponent of the smallest normal number; largest: number."""

    mantissa: int
    least: int
    largest: float

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """To the nearest number of this format, ties to even; beyond the largest: the largest."""
        exponent = (torch.frexp(values).exponent - 1).clamp(min=self.least)  # frexp: mantissa in [0.5, 1)
        step = torch.exp2((exponent - self.mantissa).double())
        return (torch.round(values / step) * step).clamp(-self.largest, self.largest)


E4M3, E5M2 = Format(3, -6, 448.0), Format(2, -14, 57344.0)


def tensorwise(values: torch.Tensor, form: Format) -> torch.Tensor:
    """[...] float64 as the product sees it."""
    largest = values.abs().max() if values.numel() else torch.zeros((), dtype=torch.float64)
    if largest == 0:
        return values
    scale = (form.largest / largest).float().double()
    return form.round((values * scale).float().double()) * (1 / scale).float().double()


def blockwise(values: torch.Tensor, height: int, width: int, form: Format = E4M3) -> torch.Tensor:
    """[rows, columns] float64, with a scale for each height x width block, counted from the first row and column."""
    result = values.clone()
    for top in range(0, values.shape[0], height):
        for left in range(0, values.shape[1], width):
            block = values[top : top + height, left : left + width]
            if (largest := block.abs().max()) > 0:
                exponent = torch.floor(torch.log2(form.largest / largest))
                scale = torch.exp2(exponent)
                assert largest * scale <= form.largest < 2 * largest * scale
                result[top : top + height, left : left + width] = form.round(block * scale) / scale
    return result


def linear(recipe: str, x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(y [t, out], dx [t, in], dweight [out, in]) of y = x weight^T, from x [t, in], weight [out, in], gradient [t, out]."""
    if recipe == "tensorwise":
        x_TI, w_OI, g_TO = tensorwise(x, E4M3), tensorwise(weight, E4M3), tensorwise(gradient, E5M2)
        return x_TI @ w_OI.T, g_TO @ w_OI, g_TO.T @ x_TI
    w_OI = blockwise(weight, BLOCK, BLOCK)
    y_TO = blockwise(x, 1, BLOCK) @ w_OI.T
    dx_TI = blockwise(gradient, 1, BLOCK) @ w_OI
    return y_TO, dx_TI, blockwise(gradient, BLOCK, 1).T @ blockwise(x, BLOCK, 1)


def grouped_linear(
    recipe: str, x: torch.Tensor, weights: Sequence[torch.Tensor], gradient: torch.Tensor, splits: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The same for experts with `splits` consecutive rows each, every one quantised by itself."""
    parts = zip(torch.split(x, list(splits)), weights, torch.split(gradient, list(splits)), strict=True)
    results = [linear(recipe, *part) for part in parts]
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results]), [r[2] for r in results]


def norm_linear(
    recipe: str, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    """(y, dx, dscale, dweight) of a linear layer of RMSNorm(x) * scale, whose result is float32 before it is quantised."""
    x = x.detach().requires_grad_()
    scale = scale.detach().requires_grad_()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale
    y, dnormed, dweight = linear(recipe, normed.detach().float().double(), weight, gradient)
    dx, dscale = torch.autograd.grad(normed, (x, scale), dnormed)
    return y, dx, dscale, dweight
