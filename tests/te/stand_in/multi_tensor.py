"""Operations on lists of tensors: the optimizer's, and those of gradient clipping. Source: csrc/extensions/multi_tensor of 2.20.2."""

from __future__ import annotations

from collections.abc import Sequence

import torch

TensorLists = Sequence[Sequence[torch.Tensor]]


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One step of Adam on (gradients, parameters, first moments, second moments) and, if given, float32 masters, in place.

    mode 0: weight decay is added to the gradient (Kingma and Ba 2015); 1: decoupled (Loshchilov and Hutter 2019).
    """
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, first, second, *master in zip(*tensor_lists, strict=True):
        weight = master[0] if master else parameter.detach().float()
        g = gradient.float()
        if mode == 0:
            g = g + weight_decay * weight
        m = beta1 * first.float() + (1 - beta1) * g
        v = beta2 * second.float() + (1 - beta2) * g * g
        update = (m / correction1) / ((v / correction2).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * weight
        weight = weight - lr * update
        for target, value in ((first, m), (second, v), (parameter.detach(), weight), *((t, weight) for t in master)):
            target.copy_(value)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: TensorLists, per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Euclidean norm of all elements [1], norms of each tensor [n] or nothing), float32."""
    norms = torch.stack([t.detach().float().norm() for t in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: TensorLists, scale: float) -> None:
    """tensor_lists[1] = scale * tensor_lists[0]; noop_flag becomes 1 when an element is not finite."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source.float() * scale)
        if not source.isfinite().all():
            noop_flag.fill_(1)


def multi_tensor_scale_tensor(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: TensorLists, scale: torch.Tensor
) -> None:
    """multi_tensor_scale with the factor in a tensor [1]: megatron-core 0.19 clips gradients with it."""
    multi_tensor_scale(chunk_size, noop_flag, tensor_lists, float(scale))
