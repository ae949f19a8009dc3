"""What an engine of vLLM (0.32.0) is built with, and what of the settings it would only fail on much later."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from r1mega.config.model_files import HFConfig
from r1mega.errors import GenerationError
from r1mega.platform.generator import VllmPlatform
from r1mega.platform.groups import timeout
from r1mega.rollout import precision
from r1mega.rollout.engine import EngineSettings
from r1mega.weights.layout import GeneratorRank, generator_layout

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


def check_settings(settings: EngineSettings, config: HFConfig, platform: VllmPlatform) -> None:
    """Finds what vLLM would fail on much later, and says it plainly. Raises GenerationError or ConfigError."""
    precision.check_precision(settings, config)
    if settings.ep > 1 and settings.ep % settings.tp:
        raise GenerationError(
            f"ep={settings.ep}: experts are spread over whole attention groups; ep is 1 or a multiple of tp={settings.tp}"
        )
    if settings.tp % settings.dcp:
        raise GenerationError(
            f"dcp={settings.dcp}: the ranks of an attention group share its cache; dcp divides tp={settings.tp}"
        )
    if settings.dcp > 1 and not platform.CUTS_KV_CACHE:
        raise GenerationError(
            f"dcp={settings.dcp}: {platform.PACKAGE} has no attention over a KV cache that ranks share; set dcp=1"
        )
    if settings.return_routed_experts and (settings.ep > settings.tp or settings.dcp > 1):
        raise GenerationError(
            "return_routed_experts: choices are not recorded where generators share experts or ranks a KV cache"
        )
    fp8 = settings.quantization == "fp8"
    placements = generator_layout(config, GeneratorRank(settings.tp, ep=settings.ep, fp8=fp8))
    reason = platform.check_model(config)
    if reason is not None:
        raise GenerationError(f"{settings.model_path}: {reason}")
    positions = config.get("max_position_embeddings")
    if positions is not None and settings.max_model_len > positions:
        raise GenerationError(
            f"max_model_len={settings.max_model_len} exceeds the model's max_position_embeddings={positions}"
        )
    num_bytes = settings.kv_cache_bytes or platform.DEFAULT_KV_CACHE_BYTES
    if num_bytes is None:
        return
    block = platform.kv_block_tokens(config)
    needed = -(-settings.max_model_len // (block * settings.dcp)) * block * kv_bytes_per_token(settings, config)
    if num_bytes < needed:
        raise GenerationError(
            f"kv_cache_bytes={num_bytes} is too small: one sequence of max_model_len="
            f"{settings.max_model_len} needs {needed} bytes; raise rollout.kv_cache_bytes or shorten "
            f"the sequences ({len(placements)} tensors, dtype {settings.dtype})"
        )


def vllm_arguments(settings: EngineSettings, config: HFConfig, platform: VllmPlatform) -> EngineArgs:
    """Of such a generator. Attention groups that share experts are its data-parallel ranks."""
    from vllm.engine.arg_utils import EngineArgs

    overrides = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"} if "kv_lora_rank" in config else {}
    return EngineArgs(
        model=str(settings.model_path),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        hf_overrides=overrides | precision.model_overrides(settings),
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_batched_tokens,
        seed=0,  # longer prompts take several passes
        tensor_parallel_size=settings.tp,
        enable_expert_parallel=settings.ep > 1,
        data_parallel_size=max(1, settings.ep // settings.tp),
        decode_context_parallel_size=settings.dcp,
        dcp_q_replicate=False,  # with it each rank has more rows of the queries' weights than weights/layout.py knows of
        cpu_distributed_timeout_seconds=math.ceil(timeout("rollout").total_seconds())
        if settings.ep > settings.tp
        else None,
        distributed_executor_backend="external_launcher",
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        generation_config="vllm",
        **precision.engine_arguments(settings),
        **platform.scheduler_arguments(),
        **(platform.return_routed_experts() if settings.return_routed_experts else {}),
        **platform.engine_arguments(config, settings.kv_cache_bytes, settings.gpu_memory_utilization),
    )


def kv_bytes_per_token(settings: EngineSettings, config: HFConfig) -> int:
    """KV-cache bytes that one token takes on a rank that keeps it: the latent of MLA, keys and values otherwise."""
    if "kv_lora_rank" in config:
        width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        width = 2 * max(1, heads // settings.tp) * size
    itemsize = getattr(torch, settings.dtype).itemsize if settings.kv_cache_dtype == "auto" else 1
    return config["num_hidden_layers"] * width * itemsize


def keep_config_classes_apart() -> None:
    """vLLM (0.32.0, transformers_utils/config.py) reads kimi_k2 with transformers' DeepseekV3Config and renames that class:
    transformers then loads no DeepSeek-V3 in this process any more. A class of its own takes the name instead."""
    from transformers import DeepseekV3Config
    from vllm.transformers_utils import config

    if (known := config._CONFIG_REGISTRY.get("kimi_k2")) is None:
        raise GenerationError("this vLLM has no kimi_k2 among its configs; generate with another version of it")
    if not isinstance(known, type):  # a name, of the class that is to stay as it is
        config._CONFIG_REGISTRY["kimi_k2"] = type("KimiK2Config", (DeepseekV3Config,), {})
