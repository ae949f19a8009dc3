"""The trainer's parts on their way between device and host memory, by the plan of a phase (`train.phases`).

Gradient buffers leave by Megatron's own hook. Its hooks for weights and optimizer (`_ParamAndGradBuffer.offload_to_cpu`,
`MegatronOptimizer.offload_to_cpu`) are not used: they want CUDA, the optimizer's host memory is not pinned, and it gives
float32 weights and the optimizer's view of them two memories. Here a part's storages are emptied and filled again, so that
every view of them stays one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from r1mega import platform

platform.prepare()  # before the first import of megatron

from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.optimizer import DistributedOptimizer  # noqa: E402

from r1mega.train.phases import HOST_BLOCK, Part, Phase, PhasePlan  # noqa: E402

_COMPUTING: tuple[Phase, ...] = ("logprob", "reference", "update")


class HostCopy:
    """Storages of a device that go to host memory together and come back; the host memory is kept for the next time.

    It is in blocks, of a power of two of bytes: torch rounds what it pins up to one.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._away: list[tuple[torch.UntypedStorage, int]] = []

    def take(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Copy them to the host and free their memory. Those that are away already must not be among them."""
        self._away = [(storage, storage.nbytes()) for storage in storages]
        for held, kept in self._pieces():
            kept.copy_(held, non_blocking=True)
        for storage, _ in self._away:
            storage.resize_(0)  # the copies before it on the stream are done before its memory is used again

    def give_back(self) -> None:
        """Undo `take`: the same storages, with the same bits."""
        for storage, num_bytes in self._away:
            storage.resize_(num_bytes)
        for held, kept in self._pieces():
            held.copy_(kept, non_blocking=True)
        self._away = []

    def _pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(bytes on the device, their place on the host), of all that is away."""
        start = 0
        for storage, num_bytes in self._away:
            held = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            first = 0
            while first < num_bytes:
                block, offset = divmod(start + first, HOST_BLOCK)
                if block == len(self._blocks):
                    pinned = storage.device.type == "cuda"
                    self._blocks.append(torch.empty(HOST_BLOCK, dtype=torch.uint8, pin_memory=pinned))
                last = min(num_bytes, first + HOST_BLOCK - offset)
                yield held[first:last], self._blocks[block][offset : offset + last - first]
                first = last
            start += num_bytes


class TrainerMemory:
    """Weights, gradients and optimizer state of this rank, where the plan of the present phase wants them."""

    def __init__(
        self,
        plan: PhasePlan,
        ddp_chunks: Sequence[DistributedDataParallel],
        optimizers: Sequence[DistributedOptimizer],
    ):
        """optimizers: their state may come into being later. All is on the device at first."""
        self.plan = plan
        self._chunks, self._optimizers = ddp_chunks, optimizers
        self._buffers = [b for chunk in ddp_chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        weights, state = HostCopy(), HostCopy()
        self._parts: dict[Part, tuple[Callable[[], None], Callable[[], None]]] = {
            "weights": (lambda: weights.take(b.param_data.untyped_storage() for b in self._buffers), weights.give_back),
            "gradients": (self._free_gradients, self._restore_gradients),
            "exp_avg": (lambda: state.take(self._state_storages()), state.give_back),  # and all that is the optimizer's
        }
        if all(places["exp_avg"] == "host" for places in plan.places.values()):
            del self._parts["exp_avg"]  # CPU Adam's
        self._present = list(self._parts)

    def enter(self, phase: Phase) -> None:
        """Move what the phase wants elsewhere: what leaves goes first. Nothing for a phase that wants what is there."""
        if phase not in _COMPUTING:
            self._drop_quantised()
        places = self.plan.places[phase]
        wanted = [part for part in self._parts if places[part] == "device"]
        leaving = [part for part in self._present if part not in wanted]
        for part in leaving:
            self._parts[part][0]()
        if leaving and platform.current().name == "cuda":
            torch.cuda.empty_cache()  # vLLM maps memory past torch's allocator
        for part in wanted:
            if part not in self._present:
                self._parts[part][1]()
        self._present = wanted

    def _drop_quantised(self) -> None:
        """Copies of weights in FP8 (Transformer Engine's, two bytes a number). A pass's first microbatch makes them anew
        anyway, where there are some and where there are none.
        """
        for module in (module for chunk in self._chunks for module in chunk.modules()):
            if (copies := getattr(module, "_fp8_workspaces", None)) is not None:
                copies.clear()

    def _free_gradients(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()  # the optimizer's gradients are views or copies of the buffers
        for chunk in self._chunks:
            chunk.offload_grad_buffers()

    def _restore_gradients(self) -> None:
        for chunk in self._chunks:
            chunk.restore_grad_buffers()

    def _state_storages(self) -> list[torch.UntypedStorage]:
        """Of main parameters and moments, without those of weights that are their own main parameters."""
        found = {}
        for inner in (part.optimizer for part in self._optimizers if part.optimizer is not None):
            for param in (param for group in inner.param_groups for param in group["params"]):
                for tensor in (param, *inner.state.get(param, {}).values()):
                    if isinstance(tensor, torch.Tensor) and tensor.device == self._buffers[0].param_data.device:
                        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        for buffer in self._buffers:
            found.pop(buffer.param_data.untyped_storage()._cdata, None)
        return list(found.values())
