"""vLLM on CUDA: environment, weight reload and sleep. A `VllmPlatform` (generator.py), as `vllm_cpu` is. Written against vllm 0.32.0.

Every name used here is held against vLLM's own Python by tests/unit/platform/test_vllm_contract.py; reload, writes and sleep
run on real vLLM models by tests/unit/rollout/test_vllm_cuda.py, on a CPU, with plain parameters and NaN for what sleep drops.
What only a GPU runs, and no test has run: cumem_allocator's mapping and its copies, capture and replay of CUDA graphs and
their offloading, the Triton expert kernel, FLASH_ATTN and FLASH_ATTN_MLA with their workspaces, NCCL and custom all-reduce,
Worker.init_device, determine_available_memory and compile_or_warm_up_model.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from r1mega.config.layout import num_experts
from r1mega.config.model_files import HFConfig
from r1mega.errors import PlatformError
from r1mega.platform.vllm_version import DERIVED, check_version

PACKAGE = "vllm"
PARAMETERS_ARE_PLAIN_BEFORE_FINISH = False
"""During a layer-wise reload parameters are on the meta device; afterwards they are plain (see engine_arguments)."""
SEVERAL_ENGINES_A_PROCESS = False
"""vLLM asserts that sleep's pool of weights is empty before an engine loads its own (v1/worker/gpu_worker.py,
_maybe_get_memory_pool_context), and what is captured in CUDA graphs lives in a pool of the whole process (platforms/
interface.py, get_global_graph_pool), which `shutdown` leaves there: what an engine leaves behind depends on everything
that still refers to it."""
CUTS_KV_CACHE = True
DEFAULT_KV_CACHE_BYTES = None
"""vLLM measures what the device has left."""
RETURNS_ROUTED_EXPERTS = True

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: weights are pushed into it
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the runner whose log-probs and seeds the tests hold: a CPU has a subclass of it
    "VLLM_USE_DEEP_GEMM": "0",  # it reorders the scales of FP8 weights, which are then no longer written in place
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def prepare_environment() -> None:
    """Sets what vLLM reads at import. Raises PlatformError when an existing value contradicts.

    expandable_segments in PYTORCH_CUDA_ALLOC_CONF may stay: the pools that sleep maps switch them off while they are
    open (vllm/device_allocator/cumem.py, use_memory_pool).
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise PlatformError(
            "VLLM_ENABLE_V1_MULTIPROCESSING is not 0 in the environment: the generator runs in the "
            "trainer's process; unset it"
        )
    if os.environ.get("VLLM_DCP_Q_REPLICATE", "0") != "0":
        raise PlatformError(
            "VLLM_DCP_Q_REPLICATE is set in the environment: ranks would hold more rows of the queries' weights than resharding "
            "writes; unset it"
        )


def apply_patches() -> None:
    """No patch is needed on CUDA; checks the version that the reload and sleep calls were written for."""
    check_version(PACKAGE)


def engine_arguments(
    model_config: HFConfig, kv_cache_bytes: int | None, gpu_memory_utilization: float
) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs that only this platform needs.

    The Triton expert backend keeps w13/w2 in the plain layout that `weights.layout` reads the digest back from; the
    FlashInfer backends shuffle them. Asleep, the memory of CUDA graphs is on the host (a copy in and out a step, and
    vLLM's own all-reduce copies instead of registering graph buffers).
    """
    arguments: dict[str, Any] = {
        "enable_sleep_mode": True, "sleep_mode_offload_cudagraph": True, "gpu_memory_utilization": gpu_memory_utilization,
    }  # fmt: skip
    if kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes
    if num_experts(model_config):
        arguments["moe_backend"] = "triton"
    return arguments


def scheduler_arguments() -> dict[str, object]:
    """Nothing: vLLM's own hides its time behind the device's (async scheduling)."""
    return {}


def return_routed_experts() -> dict[str, object]:
    """`enable_return_routed_experts`, which only the second model runner has, on every rank of a generator.

    vllm/distributed/aux_output_connector/worker.py keeps the rows on the first rank of tp, whose outputs an executor of
    several processes reads; under the external launcher each rank reads its own, and vLLM's scheduler asserts on the others
    that they are there. Every rank's capturer has them (routers are not divided), and is made to keep them. Raises
    PlatformError for another vLLM.
    """
    from vllm.distributed.aux_output_connector import worker as output_worker

    if inspect.getsource(output_worker).count("get_tp_group().is_first_rank") != 1:
        raise PlatformError(
            "vllm keeps routed experts on other ranks than the first in another way: unknown vLLM build"
        )
    vars(output_worker)["get_tp_group"] = lambda: SimpleNamespace(is_first_rank=True)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    return {"enable_return_routed_experts": True}


def kv_block_tokens(model_config: HFConfig) -> int:
    """Tokens a KV-cache block."""
    return 64 if "kv_lora_rank" in model_config else 16


def check_model(model_config: HFConfig) -> str | None:
    """What keeps this model off the platform, or None."""
    return None


def begin_reload(worker: Any) -> None:
    """Opens vLLM's layer-wise reload (vllm/model_executor/model_loader/reload): loaders buffer a layer's tensors,
    process them when complete and copy the result into the old storage, so that CUDA graphs stay valid. A plain
    `load_weights` would leave what is derived from weights (MLA's W_UK_T and W_UV) stale."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(worker.model_runner.get_model())


def load_weights(worker: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Hands one bucket of (HF name, full tensor) to vLLM's loader of this model."""
    worker.model_runner.get_model().load_weights(named_tensors)


def finish_reload(worker: Any) -> None:
    """Closes the reload that `begin_reload` opened."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_config)


def begin_write(worker: Any) -> None:
    """Parameters are plain and stay where they are (see engine_arguments): they are written in place."""


def finish_write(worker: Any) -> None:
    """Derives again what vLLM's attention layers make of weights and options, as `finish_reload` does, in the old storage,
    so that CUDA graphs stay valid: W_UV and W_UK_T of latent attention (vllm/model_executor/layers/attention/
    mla_attention.py; views of kv_b_proj unless it is quantised), scales. Raises PlatformError when one changes its form."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    for name, layer in worker.model_runner.get_model().named_modules():
        if not is_deferred_attention_layer(layer):
            continue
        derived = {key: getattr(layer, key) for key in DERIVED if isinstance(getattr(layer, key, None), Tensor)}
        layer.process_weights_after_loading(worker.model_config.dtype)
        for key, old in derived.items():
            new = getattr(layer, key)
            if new.shape != old.shape or new.dtype != old.dtype:
                raise PlatformError(
                    f"vLLM's {name}.{key} changed from {old.dtype} {list(old.shape)} to {new.dtype} "
                    f"{list(new.shape)} when it was derived again; set weights.strategy=gather"
                )
            if new is not old:
                old.data.copy_(new)
                setattr(layer, key, old)


def wake_weights(llm_engine: Any, is_asleep: bool) -> None:
    """Maps the weights again, without the KV cache, so that they can be written."""
    if is_asleep:
        llm_engine.wake_up(["weights"])


def free_memory(llm_engine: Any, worker: Any, keep_weights: bool) -> Callable[[], None]:
    """vLLM's sleep: KV cache discarded, CUDA graphs to host memory; weights too (level 1), or dropped (level 2).

    Returns vLLM's waking up: weights back to the device (of level 2: buffers alone), KV cache mapped again (empty); what is
    awake already stays as it is.
    """
    llm_engine.sleep(1 if keep_weights else 2)

    def restore() -> None:
        llm_engine.wake_up()

    return restore
