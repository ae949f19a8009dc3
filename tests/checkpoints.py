"""Small HF directories with random weights, of every family: what the checkpoint tests convert."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.reference import DEEPSEEK, DENSE, KIMI, QWEN3_MOE, make_hf_model, unfuse

MTP = DEEPSEEK | {"num_nextn_predict_layers": 1}
FAMILIES = {
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3_mtp": MTP,
    "moonlight": DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4},
    "deepseek_v2_lite": {k: v for k, v in DEEPSEEK.items() if k not in ("n_group", "topk_group")}
    | {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
    },
    "kimi_k2": KIMI | {"n_routed_experts": 12},
    "llama": DENSE | {"model_type": "llama", "vocab_size": 97},
    "qwen2": DENSE | {"model_type": "qwen2"},
    "qwen2_tied": DENSE | {"model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": 97},
    "qwen3": DENSE | {"model_type": "qwen3", "head_dim": 24},
    "qwen3_tied": DENSE | {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "qwen3_moe": QWEN3_MOE | {"vocab_size": 97, "mlp_only_layers": [1]},
}
ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def hub_state(config: dict, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors as on the hub: one an expert, MTP layers with their copies of embedding and head, tied heads left out."""
    state = unfuse({n: t.detach().clone() for n, t in make_hf_model(config, seed).state_dict().items()})
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    if config.get("num_nextn_predict_layers"):
        state |= _mtp_layer(config, state)
    wide = ("e_score_correction_bias",)
    return {n: t.contiguous().to(torch.float32 if n.endswith(wide) else dtype) for n, t in state.items()}


def _mtp_layer(config: dict, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, start = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    generator = torch.Generator().manual_seed(5)
    layer = {start + n.removeprefix(last): 1.5 * t for n, t in state.items() if n.startswith(last)}
    return layer | {
        f"{start}enorm.weight": torch.rand(hidden, generator=generator),
        f"{start}hnorm.weight": torch.rand(hidden, generator=generator),
        f"{start}eh_proj.weight": 0.06 * torch.randn(hidden, 2 * hidden, generator=generator),
        f"{start}shared_head.norm.weight": torch.rand(hidden, generator=generator),
        f"{start}embed_tokens.weight": state["model.embed_tokens.weight"].clone(),
        f"{start}shared_head.head.weight": state["lm_head.weight"].clone(),
    }


def write_hub_directory(directory: Path, config: dict, state: dict[str, torch.Tensor], shards: int = 3) -> Path:
    """Written by the safetensors library: shards with an index, config.json, a tokenizer file."""
    directory.mkdir(parents=True)
    names, weight_map = list(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        held = names[i::shards]
        save_file({n: state[n] for n in held}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    described = config | {"architectures": [ARCHITECTURES[config["model_type"]]], "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(described))
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    return directory
