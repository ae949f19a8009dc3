"""What megatron-core's local spec lacks for latent attention and tensor parallelism, and Transformer Engine has.

Source: megatron-core, extensions/transformer_engine.py (TELinear with parallel_mode 'duplicated', TENorm).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from r1mega.platform.marks import mark


class DuplicatedLinear(torch.nn.Module):
    """A linear layer whose weight [out, in] every tensor-parallel rank holds whole, for MLA's down-projections.

    Under sequence parallelism it sees this rank's tokens only, so that its gradient must be summed over the
    tensor-parallel ranks: `sequence_parallel` on the weight makes finalize_model_grads do it. (With the local spec's
    ColumnParallelLinear the key's rotary part gets a wrong gradient at TP 2.)
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool, **_kwargs: Any):
        super().__init__()
        if bias:
            raise ValueError("DuplicatedLinear has no bias")
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=_device(config))
        )
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                init_method(self.weight)
        mark(self.weight, sequence_parallel=config.sequence_parallel, allreduce=True)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[..., in] -> ([..., out], no bias)."""
        return torch.nn.functional.linear(hidden, self.weight), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, None, sharded_offsets)

    def backward_dw(self) -> None:
        """The weight gradient is never delayed."""


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient is summed over the tensor-parallel ranks under sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_kwargs: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_device(config))
        mark(self.weight, sequence_parallel=config.sequence_parallel)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


def _device(config: Any) -> torch.device:
    from r1mega import platform

    return torch.device("cpu") if config.use_cpu_initialization else platform.current().device
