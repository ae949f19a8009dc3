"""Tiny HF checkpoints on disk, one per family and seed, and the requests that the generator tests share."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from r1mega.rollout.engine import EngineSettings
from r1mega.types import GenerationRequest, SamplingSettings
from tests.reference import DEEPSEEK, DENSE, KIMI, QWEN3_MOE, YARN, make_reference

LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}  # what vLLM's CPU kernel exists for
WIDE = DENSE | {"hidden_size": 128, "initializer_range": 0.1}  # heads of 32: vLLM's CPU kernels have no smaller ones
MODELS = {
    "deepseek": DEEPSEEK | LATENT,
    "deepseek_yarn": DEEPSEEK | LATENT | {"rope_parameters": YARN, "q_lora_rank": None},
    "deepseek_blocks": DEEPSEEK
    | LATENT
    | {
        "hidden_size": 192,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "num_hidden_layers": 2,
    },  # cut between FP8 blocks, some of which are partial
    "kimi_k2": KIMI | LATENT,
    "llama": WIDE | {"model_type": "llama"},
    "qwen2": WIDE | {"model_type": "qwen2"},
    "qwen3_tied": WIDE | {"model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True},
    "qwen3_blocks": WIDE
    | {
        "model_type": "qwen3",
        "hidden_size": 192,
        "head_dim": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
    },  # queries, keys and values are joined, blocks and scales
    "qwen3_moe": WIDE | QWEN3_MOE | {"hidden_size": 128, "head_dim": 64, "initializer_range": 0.1},
}
ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
MAX_MODEL_LEN = 128


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="r1mega_tiny_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def checkpoint(name: str, seed: int = 0) -> Path:
    """An HF directory (config.json, model.safetensors) with random float32 weights; made once a process."""
    config = MODELS[name]
    directory = _root() / f"{name}_{seed}"
    if directory.exists():
        return directory
    directory.mkdir()
    reference = make_reference(config, seed=seed, batch=1, length=4)
    save_file({key: value.contiguous() for key, value in reference.state.items()}, directory / "model.safetensors")
    described = {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}} if name == "kimi_k2" else {}
    full = config | described | {"architectures": [ARCHITECTURES[config["model_type"]]]}
    (directory / "config.json").write_text(json.dumps(full))
    return directory


def settings(name: str, seed: int = 0, **changes) -> EngineSettings:
    """An engine on that checkpoint, with a small KV cache."""
    return EngineSettings(
        checkpoint(name, seed),
        **(
            {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 64, "kv_cache_bytes": 256 << 20, "weights": "checkpoint"}
            | changes
        ),
    )


@functools.cache
def hf_model(name: str, seed: int = 0) -> torch.nn.Module:
    """transformers' own model of the checkpoint, eager attention."""
    directory = checkpoint(name, seed)
    if name == "kimi_k2":  # which transformers does not know by this name
        settings = {key: value for key, value in MODELS[name].items() if key != "model_type"}
        config = AutoConfig.for_model("deepseek_v3", **settings, attn_implementation="eager")
    else:
        config = AutoConfig.from_pretrained(directory, attn_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32).eval()


@torch.no_grad()
def hf_logits(name: str, tokens, seed: int = 0) -> torch.Tensor:
    """[tokens, vocabulary] float64 logits of one sequence."""
    return hf_model(name, seed)(torch.tensor([list(tokens)])).logits[0].double()


def reference_routing(name: str, tokens) -> np.ndarray:
    """[tokens, MoE layers, top-k] sorted experts that transformers' routers choose."""
    chosen = []
    gates = [layer.mlp.gate for layer in hf_model(name, 0).model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda _module, _inputs, outputs: chosen.append(outputs[2])) for gate in gates]
    hf_logits(name, tokens)
    for hook in hooks:
        hook.remove()
    return np.sort(torch.stack([c.reshape(len(tokens), -1) for c in chosen], dim=1).numpy())


def prompt(index: int) -> tuple[int, ...]:
    """A prompt of 5 + index tokens."""
    return tuple((7 * index + j * j) % 90 + 3 for j in range(5 + index))


def greedy_requests(count: int = 6, max_tokens: int = 24) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt(i), 1, 0, SamplingSettings(temperature=0.0, max_tokens=max_tokens))
        for i in range(count)
    ]


def sampled_requests(count: int = 4, num_samples: int = 3, seed: int = 0, **sampling) -> list[GenerationRequest]:
    sampling = SamplingSettings(**({"max_tokens": 24} | sampling))
    return [GenerationRequest(prompt(i), num_samples, seed + i, sampling) for i in range(count)]


def reference_log_probs(name: str, request: GenerationRequest, tokens) -> np.ndarray:
    """float64 log-probs of the response tokens under temperature and nucleus, from transformers' logits."""
    sampling, start = request.sampling, len(request.prompt_token_ids)
    logits = hf_logits(name, (*request.prompt_token_ids, *tokens))[start - 1 : -1]
    result = []
    for row, token in zip((logits / (sampling.temperature or 1)).softmax(-1).numpy(), tokens, strict=True):
        order = np.argsort(-row, kind="stable")
        kept = order[: 1 + np.searchsorted(np.cumsum(row[order]), sampling.top_p)] if sampling.top_p < 1 else order
        assert token in kept
        result.append(np.log(row[token] / row[kept].sum()))
    return np.array(result)


def reference_kept(row: np.ndarray, sampling: SamplingSettings) -> tuple[set[int], set[int]]:
    """(ids that are kept, ids that are only just kept or not) of probabilities in float64, by the definition of each rule."""
    order = [int(i) for i in np.argsort(-row, kind="stable")]
    near = {i for i in order if abs(row[i] / row[order[0]] / (sampling.min_p or 1e-9) - 1) < 1e-3}
    kept = [i for i in order if row[i] >= (sampling.min_p or 0) * row[order[0]]]
    kept = kept[: sampling.most_kept]
    mass, last = row[kept].sum(), len(kept)
    for place in range(len(kept)):
        if (before := row[kept[:place]].sum() / mass) >= sampling.top_p:
            last = min(last, place)
        if abs(before - sampling.top_p) < 1e-4:
            near.add(kept[place])
    return set(kept[:last]), near
