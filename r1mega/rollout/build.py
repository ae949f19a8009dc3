"""The generator that a config asks for."""

from __future__ import annotations

from r1mega.config.schema import ModelConfig, RolloutConfig, WeightsConfig
from r1mega.rollout.engine import EngineSettings
from r1mega.types import GenerationEngine


def build_engine(
    rollout: RolloutConfig,
    model: ModelConfig,
    weights: WeightsConfig,
    max_prompt_tokens: int,
    *,
    load_weights: bool = False,
    return_routed_experts: bool = False,
) -> GenerationEngine:
    """An engine for prompts and responses of at most the configured lengths, without weights yet, or with those of
    model.path.
    """
    settings = EngineSettings(
        model_path=model.path,
        max_model_len=max_prompt_tokens + rollout.max_response_tokens + 1,
        dtype=model.dtype,
        max_num_seqs=rollout.max_num_seqs,
        max_batched_tokens=rollout.max_batched_tokens,
        kv_cache_bytes=rollout.kv_cache_bytes,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        tp=rollout.tp,
        ep=rollout.ep,
        tokenizer_path=model.path,
        bucket_bytes=weights.bucket_bytes,
        weights="checkpoint" if load_weights else "empty",
        return_routed_experts=return_routed_experts,
    )
    if rollout.engine == "transformers":
        from r1mega.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(settings)
    from r1mega.rollout.vllm_engine import VllmEngine

    return VllmEngine(settings)
