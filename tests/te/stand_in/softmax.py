"""Softmax of attention scores in 16 bits, which unfused attention calls at some shapes. Source: csrc/extensions/softmax.cpp."""

from __future__ import annotations

import torch

MASKED = -10000.0


def scaled_softmax_forward(input: torch.Tensor, scale_factor: float) -> torch.Tensor:  # noqa: A002 (its name there)
    """softmax(scale * scores [b, h, sq, sk]) over the last dimension."""
    return (input.float() * scale_factor).softmax(-1).to(input.dtype)


def scaled_masked_softmax_forward(input: torch.Tensor, mask: torch.Tensor, scale_factor: float) -> torch.Tensor:  # noqa: A002
    """The same where mask [1 or b, 1, sq, sk] is 0; a row without any such place is zeros."""
    hidden = mask.bool()
    scores = (input.float() * scale_factor).masked_fill(hidden, MASKED)
    return scores.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0).to(input.dtype)


def scaled_softmax_backward(
    output_grad_: torch.Tensor, softmax_results_: torch.Tensor, scale_factor: float
) -> torch.Tensor:
    """Gradient of the scores from that of their softmax."""
    gradient, probability = output_grad_.float(), softmax_results_.float()
    inner = gradient * probability
    return (scale_factor * (inner - probability * inner.sum(-1, keepdim=True))).to(output_grad_.dtype)


def scaled_masked_softmax_backward(
    output_grad_: torch.Tensor, softmax_results_: torch.Tensor, scale_factor: float
) -> torch.Tensor:
    """As without a mask: masked places have probability 0."""
    return scaled_softmax_backward(output_grad_, softmax_results_, scale_factor)
