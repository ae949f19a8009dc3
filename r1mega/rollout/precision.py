"""What an FP8 generator and the dtype of its KV cache ask of vLLM (0.32.0).

Weights are in DeepSeek-V3's published form, which vLLM's Fp8Config reads from config.json. Its Triton kernels for linear
layers and experts take weights and scales as they are in the checkpoint; DeepGEMM's, FlashInfer's and Marlin's reorder the
ones or the others after loading (model_executor/kernels/linear/scaled_mm, fused_moe/oracle/fp8.py), and could not be written
in place. So Triton's are asked for, and nothing has to be processed after a push but what attention derives of kv_b_proj.
"""

from __future__ import annotations

import os

from r1mega.checkpoint.fp8_blocks import CONFIG, check_config
from r1mega.config.model_files import HFConfig
from r1mega.errors import GenerationError, PlatformError
from r1mega.rollout.engine import EngineSettings


def model_overrides(settings: EngineSettings) -> dict[str, object]:
    """What config.json has to say for vLLM to build a model of this precision."""
    return {"quantization_config": CONFIG} if settings.quantization == "fp8" else {}


def engine_arguments(settings: EngineSettings) -> dict[str, object]:
    """Arguments of vLLM's EngineArgs."""
    arguments: dict[str, object] = {"kv_cache_dtype": settings.kv_cache_dtype}
    if settings.quantization == "fp8":
        arguments["linear_backend"] = "triton"
    return arguments


def check_precision(settings: EngineSettings, config: HFConfig) -> None:
    """Raises GenerationError for weights that this generator could not hold, CheckpointError for an unknown form of them,
    PlatformError for a variable of vLLM's with which they could not be written.
    """
    is_quantized = check_config(config) if settings.quantization == "fp8" else bool(config.get("quantization_config"))
    if settings.quantization is None and is_quantized:
        raise GenerationError(
            f"{settings.model_path}/config.json: quantization_config makes vLLM build a quantised model, which weights of "
            f"dtype {settings.dtype} do not fit. Generate from what `r1mega convert --to-megatron {settings.model_path} OUT` "
            "and `r1mega convert --to-hf OUT HF_DIR` make, which is in bfloat16 (it reads FP8 weights as DeepSeek-V3 is "
            "published, no others)"
        )
    if settings.quantization == "fp8" and settings.dtype != "bfloat16":
        raise GenerationError(
            f"quantization=fp8 with dtype={settings.dtype}: vLLM multiplies FP8 weights with bfloat16 activations; "
            "set model.dtype=bfloat16"
        )
    if settings.quantization == "fp8" and settings.weights == "checkpoint":
        raise GenerationError(
            "quantization=fp8 is of weights that a trainer pushes; a generator that reads them from a directory is in dtype"
        )
    if settings.quantization == "fp8" and (value := os.environ.get("VLLM_USE_DEEP_GEMM", "0")) != "0":
        raise PlatformError(
            f"VLLM_USE_DEEP_GEMM = {value} in the environment: DeepGEMM reorders the scales of FP8 weights, which are then no "
            "longer written in place; unset it, or leave rollout.quantization out"
        )
