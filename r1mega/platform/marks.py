"""Marks on parameters: attributes that torch does not have, by which Megatron-core and Transformer Engine know how to treat them."""

from __future__ import annotations

import torch


def mark(parameter: torch.nn.Parameter, **marks: bool) -> None:
    """sequence_parallel: its gradient is summed over the tensor-parallel ranks; allreduce: over all data-parallel ones, where
    False stands for those of its own expert (megatron-core, distributed/finalize_model_grads.py, param_and_grad_buffer.py).
    """
    for name, value in marks.items():
        setattr(parameter, name, value)
