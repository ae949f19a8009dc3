"""What the keys that megatron-core takes as they are want of a model. Pure: no heavy imports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from r1mega.config.layout import num_experts
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig


def overlap_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    """What Megatron's training script refuses, and its library does not."""
    if optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce:
        yield (
            "optimizer.overlap_param_gather gathers by the buckets that optimizer.overlap_grad_reduce makes; set both, or "
            "neither"
        )


def recompute_problems(model: ModelConfig, hf: Mapping[str, object]) -> Iterator[str]:
    """Parts in model.recompute that the layers of this config.json do not have: megatron-core would pass over most of them."""
    if isinstance(model.recompute, str) or not hf:
        return
    dense = hf.get("first_k_dense_replace") or hf.get("mlp_only_layers")
    has = {
        "mla_up_proj": (hf.get("kv_lora_rank"), "latent attention"),
        "mlp": (not num_experts(hf) or dense, "dense layers"),
        "moe": (num_experts(hf), "experts"),
        "moe_act": (num_experts(hf), "experts"),
        "shared_experts": (hf.get("n_shared_experts"), "shared experts"),
    }
    for part in model.recompute:
        there, what = has.get(part, (True, ""))
        if not there:
            yield f"model.recompute: {part} is of models with {what}, and this one has none; leave it out"


def offload_problems(model: ModelConfig, hf: Mapping[str, object]) -> Iterator[str]:
    """What of model.offload_modules does not go with model.recompute, or with the layers of this config.json."""
    asked, again = model.offload_modules, model.recompute
    if not asked:
        return
    if again == "full":
        yield "model.offload_modules: with model.recompute = full nothing of a layer is kept that could be moved; leave one out"
    if "attn_proj" in asked and "core_attn" not in asked:
        yield "model.offload_modules: attn_proj frees nothing without core_attn, whose backward pass wants it; add that"
    if "core_attn" in asked and "core_attn" in again:
        yield "model.offload_modules: core_attn is computed again (model.recompute) and keeps nothing; leave one of them out"
    inside = [part for part in ("expert_fc1", "moe_act") if part in asked]
    if inside and "moe" in again:
        yield f"model.offload_modules: {inside[0]} is part of moe, which model.recompute computes again; leave one of them out"
    if hf and not num_experts(hf) and inside:
        yield f"model.offload_modules: {inside[0]} is of models with experts, and this one has none; leave it out"
    if hf and not num_experts(hf) and "mlp_norm" in asked:
        yield (
            "model.offload_modules: mlp_norm is one with the product behind it where a layer has no experts; leave it out"
        )
    if hf and not hf.get("kv_lora_rank") and "attn_norm" in asked:
        yield (
            "model.offload_modules: attn_norm is one with the product behind it but for latent attention; set qkv_linear"
        )


def dispatch_problems(model: ModelConfig, layout: ParallelConfig, hf: Mapping[str, object]) -> Iterator[str]:
    """What of the keys about experts does not go with this config.json, layout, or each other."""
    if not hf:
        return
    for key in ("moe_shared_expert_overlap", "moe_router_fusion"):
        if getattr(model.megatron, key) and not num_experts(hf):
            yield f"model.megatron.{key} is of models with experts, and this one has none; leave it out"
    if model.megatron.moe_shared_expert_overlap and num_experts(hf) and not hf.get("n_shared_experts"):
        yield "model.megatron.moe_shared_expert_overlap: this model has no shared experts; leave it out"
    if model.megatron.moe_shared_expert_overlap and model.dispatcher != "alltoall":
        yield (
            f"model.megatron.moe_shared_expert_overlap wants model.dispatcher = alltoall, not {model.dispatcher}; set it to false"
        )
    if model.dispatcher != "alltoall" and layout.ep * layout.etp == 1:
        yield (
            f"model.dispatcher = {model.dispatcher} sends tokens between ranks, and parallel.ep * parallel.etp = 1; "
            "leave it out"
        )
    per_token, groups, chosen = (_count(hf, key) for key in ("num_experts_per_tok", "n_group", "topk_group"))
    scored_by = per_token // max(chosen, 1)
    if model.megatron.moe_router_fusion and groups > 1 and scored_by != 2:
        yield (
            f"model.megatron.moe_router_fusion scores a group by its {scored_by} best experts (num_experts_per_tok / "
            "topk_group), and this model's groups are scored by 2; leave it out"
        )


def exchange_problems(model: ModelConfig, layout: ParallelConfig, hf: Mapping[str, object]) -> Iterator[str]:
    """What model.megatron.overlap_moe_expert_parallel_comm does not go with."""
    key = "model.megatron.overlap_moe_expert_parallel_comm"
    if not model.megatron.overlap_moe_expert_parallel_comm:
        return
    if hf and not num_experts(hf) or layout.ep == 1:
        yield f"{key} hides what experts' ranks send each other: it wants experts and parallel.ep > 1; leave it out"
    if layout.pp > 1 and (layout.vpp or 1) == 1:
        yield f"{key} wants parallel.vpp > 1 in a pipeline: with one chunk a rank no two microbatches are at work at once"
    if model.recompute == "full" or "moe" in model.recompute:
        yield f"{key}: model.recompute may be none or a list without moe, whose parts the schedule runs apart"
    if model.megatron.moe_shared_expert_overlap:
        yield f"{key} and model.megatron.moe_shared_expert_overlap hide the same exchange; leave one of them out"
    if model.dtype != "bfloat16":
        yield f"{key} is for bfloat16; set model.dtype=bfloat16, or leave it out"
    if model.mtp_loss_coefficient:
        yield f"{key} runs the layers of multi-token prediction in passes without labels too; set model.mtp_loss_coefficient=0"


def _count(hf: Mapping[str, object], key: str) -> int:
    value = hf.get(key)
    return value if isinstance(value, int) else 0
