"""vLLM's CUDA side on a CPU: `platform.vllm_cuda`'s own functions on a real model and engine of vLLM.

What is vLLM's own here: the model, its loaders, the layer-wise reload, `LLMEngine.sleep`, the executor, the CuMemBackend
(which tags a level drops), `gpu_worker.Worker.sleep` and `wake_up` (buffers saved and restored; on a CPU vLLM replaces
both by warnings, which are taken away), and which parts of a start are inside of which pool. What is stood in for:

- layouts: linear layers and experts keep their plain parameters, as on CUDA with moe_backend="triton"; linear layers are
  torch's, experts a loop.
- the allocator: `sleep` fills what its level drops with NaN (integers: -7; the KV cache with 1000, for vLLM's attention on a
  CPU multiplies what it masks by 0), and once more at wake-up, so that what was written in between is lost as it would
  be. It knows what has a tensor in Python.

Not covered: CUDA's memory and graphs (addresses are compared instead), NCCL, kernels, the second model runner, which needs
Triton, and what vLLM allocates on CUDA only (workspaces, an attention backend's own buffers).
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import pytest
import torch

from r1mega.platform import vllm_cpu, vllm_cuda
from r1mega.rollout import vllm_engine

_OF_THE_CPU = (
    "PACKAGE", "DEFAULT_KV_CACHE_BYTES", "SEVERAL_ENGINES_A_PROCESS", "prepare_environment", "apply_patches",
    "engine_arguments", "kv_block_tokens", "check_model",
)  # fmt: skip
PLATFORM = SimpleNamespace(**(vars(vllm_cuda) | {name: getattr(vllm_cpu, name) for name in _OF_THE_CPU}))
"""Reload, write and sleep of `vllm_cuda`; what builds an engine of `vllm_cpu`."""


class Allocator:
    """Stands in for vLLM's CuMemAllocator (vllm/device_allocator/cumem.py): the tensors made inside of each pool."""

    def __init__(self):
        self._pools: dict[str, list[weakref.ref[torch.Tensor]]] = {}
        self._dropped: set[str] = set()

    @contextlib.contextmanager
    def use_memory_pool(self, tag: str) -> Iterator[None]:
        if tag not in ("weights", "kv_cache"):  # what no level drops
            yield
            return
        before = _live_tensors()
        yield
        made = [tensor for key, tensor in _live_tensors().items() if key not in before and not tensor.is_meta]
        self._pools.setdefault(tag, []).extend(map(weakref.ref, made))

    def sleep(self, offload_tags: tuple[str, ...]) -> None:
        self._dropped = set(self._pools) - set(offload_tags)
        self._discard(self._dropped)

    def wake_up(self, tags: list[str] | None) -> None:
        from vllm.device_allocator import DEFERRABLE_TAGS

        mapped = {tag for tag in self._dropped if tags is None or tag in tags or tag not in DEFERRABLE_TAGS}
        self._discard(mapped)
        self._dropped -= mapped

    def unwritten(self, model: torch.nn.Module) -> list[str]:
        """The tensors made while the model was loaded that hold, or partly hold, what `sleep` left in them."""
        names = {id(value): f"{name}.{key}" for name, module in model.named_modules() for key, value in
                 (*vars(module).items(), *module._parameters.items(), *module._buffers.items())}  # fmt: skip
        lost = set()
        for tensor in self._tensors("weights"):
            if tensor.element_size() == 1 and tensor.is_floating_point():
                tensor = tensor.float()
            if bool(tensor.isnan().any() if tensor.is_floating_point() else (tensor == -7).any()):
                lost.add(names.get(id(tensor), f"a {tensor.dtype} tensor of shape {list(tensor.shape)}"))
        return sorted(lost)

    @torch.inference_mode()  # some tensors were made in it
    def _discard(self, tags: Iterable[str]) -> None:
        for tag in tags:
            lost = float("nan") if tag == "weights" else 1000.0
            for tensor in self._tensors(tag):
                tensor.data.fill_(lost if tensor.is_floating_point() else -7)

    def _tensors(self, tag: str) -> list[torch.Tensor]:
        return [tensor for ref in self._pools.get(tag, ()) if (tensor := ref()) is not None]


def _live_tensors() -> dict[int, torch.Tensor]:
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}


def install_fp8(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """`install`, for a generator in FP8: vLLM's choice of kernels is that of CUDA, by the arguments that r1mega gives, and its own
    code makes and finishes parameters for the Triton kernels; their products are of dequantised weights.
    """
    allocator = install(monkeypatch)
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.triton import TritonFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.quantization import fp8
    from vllm.platforms import PlatformEnum

    def product(self, layer, x, bias=None, **others):
        return torch.nn.functional.linear(x, _plain(layer.weight, layer.weight_scale_inv, x.dtype), bias)

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS
    platform = SimpleNamespace(**(vars(PLATFORM) | {"engine_arguments": _fp8_engine_arguments}))
    monkeypatch.setattr(vllm_engine, "vllm_platform", lambda: platform)
    monkeypatch.setitem(kernels, PlatformEnum.CPU, kernels[PlatformEnum.CUDA])
    monkeypatch.setattr(
        TritonFp8BlockScaledMMKernel, "is_supported", classmethod(lambda cls, capability=None: (True, None))
    )
    monkeypatch.setattr(TritonFp8BlockScaledMMKernel, "apply_weights", product)
    monkeypatch.setattr(TritonExperts, "is_supported_config", staticmethod(lambda *_: (True, None)))
    monkeypatch.setattr(fp8, "make_fp8_moe_kernel", lambda *, moe_quant_config, **_: _Fp8Experts(moe_quant_config))
    return allocator


def _fp8_engine_arguments(*arguments):
    return vllm_cpu.engine_arguments(*arguments) | {"moe_backend": "triton"}


def _plain(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    spread = scales.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return (weight.float() * spread).to(dtype)


class _Fp8Experts:
    """A kernel of vLLM's experts: a loop."""

    is_monolithic = can_overlap_shared_experts = False
    prepare_finalize = SimpleNamespace(topk_indices_dtype=lambda: None)
    fused_experts = SimpleNamespace(consumes_expert_mask=False)

    def __init__(self, quant_config):
        self._config = quant_config

    def output_is_reduced(self) -> bool:
        return False

    def apply(self, hidden_states, w1, w2, topk_weights, topk_ids, **others):
        output = torch.zeros_like(hidden_states)
        for expert in range(len(w1)):
            rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
            first = _plain(w1[expert], self._config.w1_scale[expert], hidden_states.dtype)
            second = _plain(w2[expert], self._config.w2_scale[expert], hidden_states.dtype)
            gate, up = torch.nn.functional.linear(hidden_states[rows], first).chunk(2, dim=-1)
            down = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, second)
            output.index_add_(0, rows, down * topk_weights[rows, slots, None].to(down.dtype))
        return output


def install(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """The engine that is built next is such, with this allocator."""
    vllm_cpu.prepare_environment()
    import vllm.device_allocator
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    def keep_plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    def experts(self, *, output, hidden_states, w1, w2, topk_weights, topk_ids, expert_map, **others):
        output.zero_()
        for expert in range(len(w1)):
            rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = torch.nn.functional.linear(hidden_states[rows], w1[expert]).chunk(2, dim=-1)
            down = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2[expert])
            output.index_add_(0, rows, down * topk_weights[rows, slots, None].to(down.dtype))

    allocator = Allocator()
    monkeypatch.setattr(vllm_engine, "vllm_platform", lambda: PLATFORM)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep_plain)
    monkeypatch.setattr(CPUUnquantizedExperts, "process_weights_after_loading", lambda self, layer: None)
    monkeypatch.setattr(CPUUnquantizedExperts, "apply", experts)
    monkeypatch.setattr(CPUWorker, "sleep", Worker.sleep)
    monkeypatch.setattr(CPUWorker, "wake_up", Worker.wake_up)
    monkeypatch.setattr(Worker, "_maybe_get_memory_pool_context", lambda self, tag: allocator.use_memory_pool(tag))
    monkeypatch.setattr(vllm.device_allocator, "get_mem_allocator_instance", lambda: allocator)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *_: (0, 0))
    return allocator
