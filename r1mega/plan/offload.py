"""Inputs of parts of a layer that wait in host memory (`model.offload_modules`), on tensors without memory.

Megatron's own layers say when a part begins, which tensors it gives away and when; here those are counted and forgotten.
`tests/te/test_plan.py` holds it against what Megatron's offloading moves over Transformer Engine's layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from r1mega import platform

platform.prepare()  # before the first import of megatron

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402

from r1mega.config.schema import OffloadModule  # noqa: E402
from r1mega.train.phases import pinned_bytes  # noqa: E402


class _Moved(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype


class Offload:
    """Stands where Megatron's manager and its handler of a chunk do. moved: bytes that went to host memory so far; pinned:
    what they take there, each tensor rounded up by torch.
    """

    def __init__(self, minimum: int = 0):
        """minimum: numbers of the smallest tensor that is moved (`model.megatron.min_offloaded_tensor_size`)."""
        self.moved = self.pinned = 0
        self.takes = False
        """Whether what is kept now is moved."""
        self._minimum, self._pieces = minimum, 1
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    @contextlib.contextmanager
    def part(self, takes: bool, pieces: int) -> Iterator[None]:
        """What is kept inside is moved, or stays. pieces: a GPU has so many of the tensors in one."""
        before = self.takes, self._pieces
        self.takes, self._pieces = takes, pieces
        try:
            with saved_tensors_hooks(self._pack, self._unpack) if takes else saved_tensors_hooks(_same, _same):
                yield
        finally:
            self.takes, self._pieces = before

    def take(self, tensor: torch.Tensor) -> bool:
        """Whether it is moved; then it is counted."""
        whole = tensor.numel() * self._pieces
        weight = isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
        if weight or not whole or whole < self._minimum:
            return False
        self.moved += tensor.numel() * tensor.itemsize
        self.pinned += pinned_bytes(whole * tensor.itemsize) // self._pieces
        return True

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Moved:
        return _Moved(tensor.shape, tensor.dtype) if self.take(tensor) else tensor

    def _unpack(self, packed: torch.Tensor | _Moved) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else torch.empty(packed.shape, dtype=packed.dtype)

    # What Megatron's layers ask: the manager's part ...

    def pop_forward_chunk(self, name: str | None = None) -> Offload:
        """See Megatron's PipelineOffloadManager."""
        return self

    def cur_forward_chunk(self) -> Offload:
        """See Megatron's PipelineOffloadManager."""
        return self

    def __enter__(self) -> None:
        self.takes = True
        self._hooks.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self.takes = False

    # ... and the handler's

    def on_group_start_forward(self, name: str) -> None:
        """See Megatron's ChunkOffloadHandler."""

    def on_group_start_backward(self) -> None:
        """See Megatron's ChunkOffloadHandler."""

    def on_group_commit_backward(self, name: str) -> None:
        """See Megatron's ChunkOffloadHandler."""

    def on_group_commit_forward(self, *given: str | list[torch.Tensor]) -> None:
        """The last of `given`: tensors whose memory is freed now, whoever holds them."""
        for tensor in given[-1]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self._minimum:
                tensor.untyped_storage().resize_(0)


@contextlib.contextmanager
def offloading(chunks: Sequence[GPTModel], modules: Sequence[OffloadModule], offload: Offload) -> Iterator[None]:
    """In the block, inputs of `modules` go to `offload`. After `keep_as_on_gpu`, whose layers keep copies of these."""
    asked = set(modules)
    for layer in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerLayer)):
        attention, sparse = layer.self_attention, hasattr(layer.mlp, "experts")
        # where Transformer Engine's norm is one with the product behind it there is none to offload
        layer.offload_attn_norm = "attn_norm" in asked and not hasattr(attention, "linear_qkv")
        layer.offload_mlp_norm = "mlp_norm" in asked and sparse
        attention.offload_qkv_linear = "qkv_linear" in asked
        attention.offload_core_attention = "core_attn" in asked
        attention.offload_attn_proj = "attn_proj" in asked
        if sparse and asked & {"expert_fc1", "moe_act"}:
            experts = layer.mlp.experts.local_experts
            for expert in experts:
                for module, takes in (
                    (expert, "moe_act" in asked), (expert.linear_fc1, "expert_fc1" in asked), (expert.linear_fc2, False)
                ):  # fmt: skip
                    module.forward = functools.partial(_run, offload, takes, len(experts), module.forward)
    before, PipelineOffloadManager.OFFLOAD_MGR = PipelineOffloadManager.OFFLOAD_MGR, offload
    try:
        yield
    finally:
        PipelineOffloadManager.OFFLOAD_MGR = before


def _run(
    offload: Offload, takes: bool, pieces: int, forward: Callable[..., object], *args: object, **kwargs: object
) -> object:
    with offload.part(takes, pieces):
        return forward(*args, **kwargs)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
