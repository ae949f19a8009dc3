"""What the keys that megatron-core takes as they are want of a model. Pure: no heavy imports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from r1mega.config.layout import num_experts
from r1mega.config.schema import ModelConfig, OptimizerConfig


def recomputes_routing(model: ModelConfig) -> bool:
    """Whether routers choose a second time in the backward pass."""
    return model.recompute == "full" or "moe" in model.recompute


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
