"""Logits and every gradient against transformers, float32, one process."""

from __future__ import annotations

import pytest
import torch

from r1mega.checkpoint.hf_state import export_hf, load_hf, local_entries, model_shape
from r1mega.checkpoint.name_rules import to_full
from r1mega.model.build import build_model, packed_seq_params
from r1mega.platform import groups
from tests.reference import DEEPSEEK, DENSE, KIMI, QWEN3_MOE, YARN, Layout, ModelSettings, Reference, make_reference

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
V2_LITE = {k: v for k, v in DEEPSEEK.items() if k not in ("n_group", "topk_group")} | {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.5,
    "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
CASES = {
    "deepseek": DEEPSEEK,
    "deepseek_yarn": DEEPSEEK | {"rope_parameters": YARN},
    "deepseek_no_q_lora": DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4},
    "deepseek_v2_lite": V2_LITE,
    "kimi_k2": KIMI,
    "llama": DENSE | {"model_type": "llama"},
    "llama3_rope": DENSE | {"model_type": "llama", "rope_parameters": LLAMA3},
    "qwen2": DENSE | {"model_type": "qwen2"},
    "qwen2_tied": DENSE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": DENSE | {"model_type": "qwen3", "head_dim": 24},
    "qwen3_tied": DENSE | {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_tied": QWEN3_MOE | {"tie_word_embeddings": True, "mlp_only_layers": [1], "norm_topk_prob": False},
    "qwen3_moe_every_other": QWEN3_MOE | {"decoder_sparse_step": 2, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "llama_tied": DENSE | {"model_type": "llama", "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    groups.init_parallel(Layout(), seed=0)
    yield
    groups.destroy()


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[Reference, torch.nn.Module]:
    reference = make_reference(CASES[request.param])
    (model,) = build_model(reference.config, Layout(), ModelSettings())
    load_hf([model], reference.state)
    return reference, model


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def gradients_by_hf_name(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    shape, gradients = model_shape(model), {}
    parameters = dict(model.named_parameters())
    for entry, _ in local_entries([model]):
        if entry.name in parameters:
            gradients.update(zip(entry.hf_names, to_full([parameters[entry.name].grad], entry, shape), strict=True))
    return gradients


def test_logits_and_all_gradients_equal_transformers(case):
    reference, model = case
    model.zero_grad()
    positions = torch.arange(reference.tokens.shape[1])[None].expand_as(reference.tokens)
    logits = model(reference.tokens, positions, None)
    assert relative_difference(logits, reference.logits) <= 1e-5
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), reference.labels.flatten()).backward()
    ours = gradients_by_hf_name(model)
    assert ours.keys() == reference.gradients.keys()
    worst = {name: relative_difference(ours[name], theirs) for name, theirs in reference.gradients.items()}
    assert max(worst.values()) <= 1e-5, sorted(worst.items(), key=lambda i: -i[1])[:3]


def test_packed_equals_unpacked(case):
    """Sequences of different lengths in one row: each token's logits as if its sequence stood alone."""
    reference, model = case
    lengths = [32, 7, 20, 1]
    tokens = torch.cat([reference.tokens[i, :n] for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    with torch.no_grad():
        logits = model(tokens, positions, None, packed_seq_params=packed_seq_params(bounds))[0]
    expected = torch.cat([reference.logits[i, :n] for i, n in enumerate(lengths)])
    assert relative_difference(logits, expected) <= 1e-5


def test_export_returns_what_was_loaded(case):
    reference, model = case
    exported = dict(export_hf([model]))
    assert exported.keys() == reference.state.keys()
    for name, tensor in reference.state.items():
        assert torch.equal(exported[name], tensor), name
