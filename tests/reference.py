"""transformers models as references: tiny configs, random weights, hub-style names, logits and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from r1mega.config.schema import MegatronConfig

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "qk_nope_head_dim": 32,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
KIMI = DEEPSEEK | {  # more experts than a byte counts, one group, YaRN without a ramp
    "model_type": "kimi_k2",
    "num_hidden_layers": 2,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "moe_intermediate_size": 16,
    "rope_parameters": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "rope_theta": 50000.0},
}
DENSE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
QWEN3_MOE = DENSE | {
    "model_type": "qwen3_moe",
    "head_dim": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The fields of ModelConfig that building a model reads."""

    dtype: str = "float32"
    fp8: str = "off"
    fp8_skip_first_layers: int = 0
    fp8_skip_last_layers: int = 0
    expert_bias_update_rate: float = 0.0
    sequence_aux_loss_coefficient: float = 0.0
    mtp_loss_coefficient: float = 0.0
    recompute: str | tuple[str, ...] = "none"
    offload_modules: tuple[str, ...] = ()
    dispatcher: str = "alltoall"
    megatron: MegatronConfig = MegatronConfig()
    force_expert_balance: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields of ParallelConfig."""

    tp: int = 1
    sp: bool | None = None
    ep: int = 1
    etp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    dp: int | None = None
    layers_per_stage: tuple[int, ...] | None = None
    mtp_standalone: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """config: config.json; state: hub-style tensors; tokens, labels: [b, s]; logits: [b, s, vocabulary];
    loss: mean cross entropy; gradients: of it plus the auxiliary loss, by hub-style names."""

    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    tokens: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]
    aux_coefficient: float = 0.0


def make_hf_model(config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """transformers' model in float32 with random weights in every parameter (norms and biases too)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    kind = "deepseek_v3" if config["model_type"] == "kimi_k2" else config["model_type"]
    hf = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
    hf._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Norms around 1; biases (q, k, v, and the routers' e_score_correction_bias) around 0."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            tensor.copy_(1 + 0.1 * torch.randn_like(tensor))
        elif name.endswith("bias"):
            tensor.copy_(0.05 * torch.randn_like(tensor))


def sequence_aux_loss(logits: torch.Tensor, top_k: int, softmax: bool) -> torch.Tensor:
    """Router logits [b, s, experts] -> mean over sequences of sum_i f_i P_i (DeepSeek-V3 report, equations 17-20).

    softmax: scores are the softmax of the logits, else their sigmoid.
    """
    scores = logits.float().softmax(-1) if softmax else logits.float().sigmoid()
    chosen = torch.zeros_like(scores).scatter(2, scores.topk(top_k, dim=2).indices, 1.0)
    fractions = chosen.mean(dim=1) * scores.shape[2] / top_k
    probabilities = (scores / scores.sum(dim=2, keepdim=True)).mean(dim=1)
    return (fractions * probabilities).sum(dim=1).mean()


def make_reference(
    config: dict[str, Any], *, batch: int = 4, length: int = 32, seed: int = 0, aux_coefficient: float = 0.0
) -> Reference:
    """One forward and backward pass of transformers; the auxiliary loss by hooks on its routers."""
    model = make_hf_model(config, seed)
    router_logits: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(
                lambda module, inputs, _: router_logits.append(
                    torch.nn.functional.linear(inputs[0], module.weight).view(batch, length, -1)
                )
            )
    tokens = torch.randint(0, config["vocab_size"], (batch, length))
    labels = torch.roll(tokens, -1, 1)
    logits = model(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    top_k = config.get("num_experts_per_tok")
    softmax = config["model_type"] == "qwen3_moe"
    auxiliary = sum((sequence_aux_loss(r, top_k, softmax) for r in router_logits), torch.zeros(()))
    (loss + aux_coefficient * auxiliary).backward()
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return Reference(
        config,
        unfuse(state),
        tokens,
        labels,
        logits.detach(),
        float(loss.detach()),
        unfuse(gradients),
        aux_coefficient,
    )


def unfuse(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 fuses the experts of a layer in memory; checkpoints have one tensor per expert."""
    result = {}
    for name, tensor in state.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for i, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                result[f"{prefix}{i}.gate_proj.weight"], result[f"{prefix}{i}.up_proj.weight"] = gate, up
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            result.update({f"{prefix}{i}.down_proj.weight": expert for i, expert in enumerate(tensor)})
        else:
            result[name] = tensor
    return result
