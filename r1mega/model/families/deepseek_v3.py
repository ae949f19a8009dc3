"""DeepSeek-V3 (and R1, Moonlight), Kimi-K2 (the same under another name), DeepSeek-V2-Lite: HF config -> Megatron's MLATransformerConfig.

Source: DeepSeek-V3 technical report, sections 2.1 (latent attention, mixture of experts) and 2.2 (MTP).
Deviations, both Megatron's: the sequence auxiliary loss takes a packed row for one sequence; the norms of the latent
query and key use rms_norm_eps as vLLM does, while transformers has 1e-6 there (equal in DeepSeek-V3 itself).
"""

from __future__ import annotations

from typing import Any

from r1mega.config.model_files import HFConfig
from r1mega.errors import ConfigError
from r1mega.model.architecture import Architecture, Experts, LatentAttention, sizes
from r1mega.model.hf_config import refuse, require, rope

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "kimi_k2")


def architecture(hf: HFConfig) -> Architecture:
    """Raises ConfigError for missing keys."""
    heads, kv_rank, nope, rope_size, value = require(
        hf, "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
    )
    layers, experts, chosen, intermediate, dense = require(
        hf,
        "num_hidden_layers",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "first_k_dense_replace",
    )
    frequency = hf.get("moe_layer_freq") or 1
    return Architecture(
        **sizes(hf),
        attention=LatentAttention(heads, hf.get("q_lora_rank"), kv_rank, nope, rope_size, value),
        experts=Experts(
            experts,
            chosen,
            intermediate,
            layers=tuple(layer >= dense and layer % frequency == 0 for layer in range(layers)),
            shared_size=intermediate * (hf.get("n_shared_experts") or 0),
            router_bias=hf["model_type"] != "deepseek_v2",
        ),
        num_mtp_layers=hf.get("num_nextn_predict_layers") or 0,
    )


def megatron_arguments(hf: HFConfig, model: Any) -> dict[str, Any]:
    """Arguments of MLATransformerConfig that say what the model is.

    hf: config.json; model: ModelConfig (expert_bias_update_rate, sequence_aux_loss_coefficient, mtp_loss_coefficient,
    force_expert_balance). Raises ConfigError for missing keys and for what this implementation does not cover.
    """
    refuse(hf, attention_bias=False, moe_layer_freq=1, hidden_act="silu", rope_interleave=True)
    router = _v2_router(hf) if hf["model_type"] == "deepseek_v2" else _v3_router(hf)
    layers, experts, intermediate, dense = require(
        hf, "num_hidden_layers", "n_routed_experts", "moe_intermediate_size", "first_k_dense_replace"
    )
    num_mtp = hf.get("num_nextn_predict_layers") or 0
    return {
        **_attention(hf),
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": intermediate,
        "moe_layer_freq": [0] * dense + [1] * (layers - dense),
        "moe_shared_expert_intermediate_size": intermediate * (hf.get("n_shared_experts") or 0) or None,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": hf.get("routed_scaling_factor", 1.0),
        **router,
        "moe_router_bias_update_rate": model.expert_bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": model.sequence_aux_loss_coefficient,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_force_load_balancing": model.force_expert_balance,
        "mtp_num_layers": num_mtp if num_mtp and model.mtp_loss_coefficient > 0 else None,
        "mtp_loss_scaling_factor": model.mtp_loss_coefficient,
    }


def _attention(hf: HFConfig) -> dict[str, Any]:
    kv_rank, nope, rope_dim, value_dim = require(
        hf, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
    )
    arguments = {
        "q_lora_rank": hf.get("q_lora_rank"),
        "kv_lora_rank": kv_rank,
        "qk_head_dim": nope,
        "qk_pos_emb_head_dim": rope_dim,
        "v_head_dim": value_dim,
        "qk_layernorm": True,
    }
    parameters = rope(hf)
    arguments["rotary_base"] = parameters["rope_theta"]
    if parameters["rope_type"] == "default":
        return arguments | {"rope_type": "rope"}
    if parameters["rope_type"] != "yarn":
        raise ConfigError(f"config.json: rope type {parameters['rope_type']!r} is not supported, only 'yarn'")
    return arguments | {
        "rope_type": "yarn",
        "rotary_scaling_factor": parameters["factor"],
        "original_max_position_embeddings": parameters["original_max_position_embeddings"],
        "beta_fast": parameters.get("beta_fast") or 32,
        "beta_slow": parameters.get("beta_slow") or 1,
        "mscale": parameters.get("mscale") or 1.0,
        "mscale_all_dim": parameters.get("mscale_all_dim") or 0.0,
    }


def _v2_router(hf: HFConfig) -> dict[str, Any]:
    """Softmax scores, the best k of all (V2-Lite). V2's own limit to the best groups is not covered."""
    refuse(hf, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)
    (top_k,) = require(hf, "num_experts_per_tok")
    return {"moe_router_topk": top_k, "moe_router_score_function": "softmax"}


def _v3_router(hf: HFConfig) -> dict[str, Any]:
    """Sigmoid scores, normalised over the chosen; choice by score + bias, in the best groups; float32 throughout."""
    refuse(hf, scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True)
    experts, top_k = require(hf, "n_routed_experts", "num_experts_per_tok")
    groups, group_top_k = hf.get("n_group") or 1, hf.get("topk_group") or 1
    limited = groups > 1
    if limited and (experts % groups or experts // groups < 2):
        raise ConfigError(f"config.json: n_routed_experts = {experts} over n_group = {groups}: needs 2 or more a group")
    if limited and group_top_k * (experts // groups) < top_k:
        raise ConfigError(f"config.json: topk_group = {group_top_k} groups hold fewer than {top_k} experts")
    return {
        "moe_router_topk": top_k,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": groups if limited else None,
        "moe_router_group_topk": group_top_k if limited else None,
    }


def position_arguments(hf: HFConfig) -> dict[str, Any]:
    """Arguments of GPTModel: latent attention makes its own rotary embeddings."""
    return {"position_embedding_type": "rope"}
