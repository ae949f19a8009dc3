"""Qwen3-MoE (30B-A3B, 235B-A22B): the attention of Qwen3, a mixture of experts with a softmax router and no shared experts.

Source: Qwen3 technical report, section 2, and transformers' models/qwen3_moe. Deviation: the router computes in float32,
where transformers has the model's dtype up to the softmax.
"""

from __future__ import annotations

from typing import Any

from r1mega.config.layout import num_experts
from r1mega.config.model_files import HFConfig
from r1mega.errors import ConfigError
from r1mega.model.architecture import Architecture, Experts, GroupedAttention, sizes
from r1mega.model.families import dense
from r1mega.model.hf_config import refuse, require

MODEL_TYPES = ("qwen3_moe",)


def architecture(hf: HFConfig) -> Architecture:
    """Raises ConfigError for missing keys. `num_experts` is `num_local_experts` where transformers 5 wrote the config."""
    return Architecture(**sizes(hf), attention=_attention(hf), experts=_experts(hf))


def _attention(hf: HFConfig) -> GroupedAttention:
    hidden, heads = require(hf, "hidden_size", "num_attention_heads")
    groups, head_size = hf.get("num_key_value_heads") or heads, hf.get("head_dim") or hidden // heads
    biased = bool(hf.get("attention_bias"))
    return GroupedAttention(heads, groups, head_size, qkv_bias=biased, output_bias=biased, qk_norm=True)


def _experts(hf: HFConfig) -> Experts:
    layers, chosen, size = require(hf, "num_hidden_layers", "num_experts_per_tok", "moe_intermediate_size")
    count = num_experts(hf)
    if not count:
        raise ConfigError("config.json lacks num_experts (model_type 'qwen3_moe')")
    plain, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step") or 1
    sparse = tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(layers))
    return Experts(count, chosen, size, sparse)


def megatron_arguments(hf: HFConfig, model: Any) -> dict[str, Any]:
    """Arguments of TransformerConfig that say what the model is.

    model: ModelConfig (sequence_aux_loss_coefficient, force_expert_balance). Raises ConfigError for missing keys and for
    what is not covered.
    """
    refuse(hf, attention_bias=False, use_sliding_window=False)
    if model.expert_bias_update_rate:
        raise ConfigError("model.expert_bias_update_rate: the routers of qwen3_moe have no bias; set it to 0")
    attention, experts = _attention(hf), _experts(hf)
    normalised = bool(hf.get("norm_topk_prob", False))
    if normalised and experts.chosen == 1:
        raise ConfigError("config.json: norm_topk_prob with num_experts_per_tok = 1 leaves the router no gradient")
    return {
        "num_query_groups": attention.groups,
        "kv_channels": attention.head_size,
        "qk_layernorm": True,
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.size,
        "moe_layer_freq": [int(has_experts) for has_experts in experts.layers],
        "moe_router_topk": experts.chosen,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not normalised,  # over the chosen: what normalising their probabilities gives
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": model.sequence_aux_loss_coefficient,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_force_load_balancing": model.force_expert_balance,
    }


def position_arguments(hf: HFConfig) -> dict[str, Any]:
    """As Qwen3's."""
    return dense.position_arguments(hf)
