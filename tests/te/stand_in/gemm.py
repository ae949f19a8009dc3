"""Matrix products of the compiled module: D = op(B) @ op(A), with cuBLAS's letters in the order of Transformer Engine.

Source: transformer_engine/pytorch/csrc/extensions/gemm.cpp of 2.20.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.te.stand_in.enums import TORCH_DTYPES


def operand(tensor: Any, columnwise: bool) -> torch.Tensor:
    """[rows, columns] float32 values of one side of a product.

    A quantized tensor may hold its values twice, with scales along its rows and along its columns. They differ when a
    scale covers part of a row, so that it matters which of them a product reads. Raises ValueError when it is not there.
    """
    if isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter):
        values = tensor
    else:
        values = _dequantized(tensor, columnwise)
    return values.detach().reshape(-1, values.shape[-1]).float()


def _dequantized(tensor: Any, columnwise: bool) -> torch.Tensor:
    if not hasattr(tensor, "_columnwise_data"):  # one scale a tensor: the transposed copy has the same values
        return tensor.dequantize(dtype=torch.float32)
    wanted = "_columnwise" if columnwise else "_rowwise"
    if getattr(tensor, f"{wanted}_data") is None:
        raise ValueError(f"{type(tensor).__name__} has no {wanted[1:]} data, which this product reads")
    other = "_rowwise" if columnwise else "_columnwise"
    kept = {name: getattr(tensor, name) for name in (f"{other}_data", f"{other}_scale_inv")}
    try:
        for name in kept:
            setattr(tensor, name, None)
        return tensor.dequantize(dtype=torch.float32)
    finally:
        for name, value in kept.items():
            setattr(tensor, name, value)


def generic_gemm(
    A: Any,  # noqa: N803 (the names that its callers use)
    transa: bool,
    B: Any,  # noqa: N803
    transb: bool,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: int | None,
    bias: torch.Tensor | None,
    bias_dtype: int,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, torch.Tensor | None, None, Any]:
    """(D, gradient of the bias or None, None, extra_output).

    TN: A [n, k], B [..., k] -> B A^T; NN: A [k, n], B [..., k] -> B A; NT: A [m, k], B [m, n] -> B^T A. With `grad` the
    bias is not added: its gradient, B's sum over rows, is returned. `accumulate` adds to `out` (beta of it).
    """
    if gelu or comm_overlap is not None:
        raise NotImplementedError("generic_gemm with a fused GELU or overlapped communication has no stand-in")
    if out is None and out_dtype is None and isinstance(B, torch.Tensor):
        out_dtype = next(number for number, dtype in TORCH_DTYPES.items() if dtype == B.dtype)
    a, b = operand(A, columnwise=not transa), operand(B, columnwise=transb)
    product = alpha * ((b.T if transb else b) @ (a.T if transa else a))
    bias_gradient = None
    if bias is not None and bias.numel():
        if grad:
            bias_gradient = b.sum(0).to(bias.dtype)
        else:
            product = product + bias.float()
    if out is not None:
        shaped = product.view(out.shape)
        out.copy_(out.float() * (1.0 if beta is None else beta) + shaped if accumulate else shaped)
        result = out
    else:
        result = product.to(TORCH_DTYPES[out_dtype])
        if not transb:
            result = result.view(*B.shape[:-1], result.shape[-1])
    return result if quantizer is None else quantizer(result), bias_gradient, None, extra_output


def te_general_grouped_gemm(
    A: Sequence[Any],  # noqa: N803
    transa: bool,
    B: Sequence[Any],  # noqa: N803
    transb: bool,
    out: Sequence[torch.Tensor],
    out_dtype: int,
    m_splits: Sequence[int],
    bias: Sequence[torch.Tensor],
    bias_dtype: int,
    single_output: bool,
    gelu_in: Sequence[torch.Tensor],
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Sequence[torch.Tensor]:
    """A product for every expert; single_output: into consecutive rows of out[0], `m_splits` of them each.

    An expert without tokens gives zeros, or leaves what is there when it is to be added to. Returns the biases
    (with `grad` their gradients, written in place).
    """
    if any(t.numel() for t in gelu_in):
        raise NotImplementedError("te_general_grouped_gemm with a fused GELU has no stand-in")
    outputs = torch.split(out[0], list(m_splits)) if single_output else out
    for a, b, target, b_bias in zip(A, B, outputs, bias, strict=True):
        if 0 in a.shape or 0 in b.shape:
            if not accumulate:
                target.zero_()
            if grad:
                b_bias.zero_()
            continue
        gradient = generic_gemm(
            a, transa, b, transb, target, None, None, b_bias, bias_dtype, False, None, grad, None, 0, accumulate, True
        )[1]
        if gradient is not None:
            b_bias.copy_(gradient)
    return bias
