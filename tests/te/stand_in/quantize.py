"""FP8 of the compiled module, for Transformer Engine's quantizers of current scaling: a scale a tensor, or a block.

Values are really rounded to 8 bits. Source: csrc/quantizer.cpp, common/recipe/recipe_common.cuh (scale from the largest
magnitude) and common/transpose/quantize_transpose_{vector,square}_blockwise.cu of 2.20.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from tests.te.stand_in.enums import TORCH_DTYPES

BLOCK = 128


def scale_of(
    largest: torch.Tensor, fp8: torch.dtype, power_of_two: bool, epsilon: float, if_infinite: float
) -> torch.Tensor:
    """The factors that bring magnitudes of at most `largest` to fp8's range: its maximum / largest, or the power of two below.

    1 where largest is 0 or not finite; `if_infinite` where the factor is none of float32's.
    """
    largest = largest.float().clamp(min=epsilon)
    scale = torch.tensor(torch.finfo(fp8).max) / largest
    scale = scale.where(~scale.isinf(), torch.tensor(if_infinite))
    if power_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)  # the mantissa's bits cleared
    return scale.where(largest.isfinite() & (largest != 0), torch.ones(()))


def to_fp8(values: torch.Tensor, fp8: torch.dtype) -> torch.Tensor:
    """Rounded to the nearest 8-bit number, too large ones to the largest; its bytes."""
    limit = torch.finfo(fp8).max
    return values.clamp(-limit, limit).to(fp8).view(torch.uint8)


def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, pin_memory: bool = False
) -> Any:
    """An uninitialised tensor of the quantizer's kind, from what the quantizer itself says of its parts."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage

    parts = quantizer.alloc_tensors(shape, device=device)
    described = quantizer.create_metadata(shape, dtype=dtype)
    return QuantizedTensorStorage.__tensor_unflatten__(parts, described, shape, None)


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None) -> Any:
    """`tensor` in the quantizer's format, into `output` if given. Raises NotImplementedError for formats without a stand-in."""
    if noop is not None and noop.item():
        return output
    tensor = tensor.detach()
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype, tensor.device)
    kind = type(quantizer).__name__
    if kind == "Float8CurrentScalingQuantizer":
        _fill_tensorwise(tensor, quantizer, output)
    elif kind == "Float8BlockQuantizer":
        _fill_blockwise(tensor, quantizer, output)
    else:
        raise NotImplementedError(f"tex.quantize with {kind} has no stand-in")
    return output


def _fill_tensorwise(tensor: torch.Tensor, quantizer: Any, output: Any) -> None:
    fp8 = TORCH_DTYPES[quantizer.dtype]
    values = tensor.float()
    largest = values.abs().max() if values.numel() else torch.zeros(())
    if quantizer.with_amax_reduction:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    scale = scale_of(largest, fp8, quantizer.force_pow_2_scales, quantizer.amax_epsilon, torch.finfo(torch.float32).max)
    data = to_fp8(values * scale, fp8)
    output._scale_inv.copy_(1 / scale)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        output._transpose.copy_(fp8_transpose(data, quantizer.dtype))
        output._transpose_invalid = False


def _fill_blockwise(tensor: torch.Tensor, quantizer: Any, output: Any) -> None:
    matrix = tensor.reshape(-1, tensor.shape[-1])
    square = quantizer.block_scaling_dim == 2
    if square:
        data, inverse = _blocks(matrix, quantizer, BLOCK)
        found = {"rowwise": (data, inverse), "columnwise": (data.T, inverse.T)}
    else:  # scales lie [blocks, rows]: of the matrix, and of its transpose
        found = {}
        for usage, oriented in (("rowwise", matrix), ("columnwise", matrix.T)):
            if getattr(output, f"_{usage}_data") is not None:
                data, inverse = _blocks(oriented, quantizer, 1)
                found[usage] = (data, inverse.T)
    for usage, (data, inverse) in found.items():
        target, scales = getattr(output, f"_{usage}_data"), getattr(output, f"_{usage}_scale_inv")
        if target is not None:
            target.copy_(data.reshape(target.shape))
            scales.zero_()[: inverse.shape[0], : inverse.shape[1]] = inverse


def _blocks(matrix: torch.Tensor, quantizer: Any, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes [rows, columns], inverse scales [rows / height, columns / 128]) with a scale for each height x 128 block."""
    rows, columns = matrix.shape
    fp8 = TORCH_DTYPES[quantizer.dtype]
    padded = pad(matrix.float(), (0, -columns % BLOCK, 0, -rows % height))
    tiles = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height))  # [rows, height, columns, block]
    largest = tiles.abs().amax((1, 3), keepdim=True)
    scale = scale_of(largest, fp8, quantizer.force_pow_2_scales, quantizer.amax_epsilon, torch.finfo(matrix.dtype).max)
    data = to_fp8(tiles * scale, fp8).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return data, (1 / scale)[:, 0, :, 0]


def split_quantize(
    tensor: torch.Tensor,
    split_sections: Sequence[int],
    quantizer_list: Sequence[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    """Consecutive groups of rows, each quantized on its own."""
    parts = torch.split(tensor, list(split_sections))
    return [quantize(part, quantizer) for part, quantizer in zip(parts, quantizer_list, strict=True)]


def bgrad_quantize(grad_output: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    """(gradient of a bias: the sum over rows, grad_output quantized)."""
    rows = grad_output.reshape(-1, grad_output.shape[-1])
    return rows.float().sum(0).to(grad_output.dtype), quantize(grad_output, quantizer)


def fp8_transpose(input: torch.Tensor, dtype: int, *, out: torch.Tensor | None = None) -> torch.Tensor:  # noqa: A002
    """Bytes [..., columns] -> [columns, ...]."""
    turned = input.movedim(-1, 0)
    return turned.contiguous() if out is None else out.copy_(turned)
