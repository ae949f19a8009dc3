"""Dense decoders: Llama, Qwen2.5 (biases on q, k, v) and Qwen3 (norms on q and k). HF config -> Megatron's."""

from __future__ import annotations

from typing import Any

from r1mega.config.model_files import HFConfig
from r1mega.errors import ConfigError
from r1mega.model.architecture import Architecture, GroupedAttention, sizes
from r1mega.model.hf_config import refuse, require, rope

MODEL_TYPES = ("llama", "qwen2", "qwen3")


def architecture(hf: HFConfig) -> Architecture:
    """Raises ConfigError for missing keys."""
    kind, biased = hf["model_type"], bool(hf.get("attention_bias"))
    hidden, heads = require(hf, "hidden_size", "num_attention_heads")
    return Architecture(
        **sizes(hf),
        attention=GroupedAttention(
            heads,
            hf.get("num_key_value_heads") or heads,
            hf.get("head_dim") or hidden // heads,
            qkv_bias=kind == "qwen2" or biased,
            output_bias=kind != "qwen2" and biased,
            qk_norm=kind == "qwen3",
        ),
        mlp_bias=bool(hf.get("mlp_bias")),
    )


def megatron_arguments(hf: HFConfig, model: Any) -> dict[str, Any]:
    """Arguments of TransformerConfig that say what the model is. Raises ConfigError for what is not covered."""
    refuse(hf, mlp_bias=False, use_sliding_window=False)
    kind = hf["model_type"]
    if hf.get("attention_bias", False):
        raise ConfigError(f"config.json: attention_bias = true is not supported for model_type {kind!r}")
    hidden, heads = require(hf, "hidden_size", "num_attention_heads")
    return {
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or hidden // heads,
        "add_qkv_bias": kind == "qwen2",
        "qk_layernorm": kind == "qwen3",
        "moe_token_dispatcher_type": "alltoall",  # nothing is dispatched, but the default refuses variable lengths
    }


def position_arguments(hf: HFConfig) -> dict[str, Any]:
    """Arguments of GPTModel for rotary embeddings: default, or Llama 3's frequency scaling."""
    parameters = rope(hf)
    arguments = {"position_embedding_type": "rope", "rotary_base": parameters["rope_theta"]}
    if parameters["rope_type"] == "llama3":
        megatron = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        refuse(parameters, **megatron)
        return arguments | {"rope_scaling": True, "rope_scaling_factor": parameters["factor"]}
    if parameters["rope_type"] != "default":
        raise ConfigError(f"config.json: rope type {parameters['rope_type']!r} is not supported for dense models")
    return arguments
