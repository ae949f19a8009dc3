"""Parameter counts of the large models, by the project's own Megatron build on tensors without storage.

Building all 61 layers takes a minute for nothing new: layers of a kind are equal, so one of each is built and multiplied.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from r1mega import platform
from r1mega.config.layout import num_experts
from r1mega.config.schema import ModelConfig, ParallelConfig
from r1mega.platform import groups

BILLION = 1e9


@pytest.fixture
def meta(monkeypatch):
    """A platform whose tensors have no storage."""
    here = dataclasses.replace(platform.current(), device=torch.device("meta"))
    groups.init_parallel(ParallelConfig(), seed=0)
    monkeypatch.setattr(platform, "current", lambda: here)
    with torch.device("meta"):
        yield
    groups.destroy()


def counts(name):
    """(all, routed experts', input embedding's) parameters of configs/NAME/model, without multi-token prediction."""
    from r1mega.model.build import build_model

    path = Path("configs") / name / "model"
    hf = json.loads((path / "config.json").read_text())
    dense = hf.get("first_k_dense_replace", 0)
    (model,) = build_model(hf | {"num_hidden_layers": dense + 1}, ParallelConfig(), ModelConfig(path=path))
    assert all(parameter.is_meta for parameter in model.parameters())
    repeated = hf["num_hidden_layers"] - dense  # mixture-of-experts layers, of which one was built
    total = routed = embedding = 0
    for key, parameter in model.named_parameters():
        times = repeated if f"decoder.layers.{dense}." in key else 1
        total += times * parameter.numel()
        routed += times * parameter.numel() if ".mlp.experts." in key else 0
        embedding += parameter.numel() if key.startswith("embedding.") else 0
    return hf, total, routed, embedding


def active(hf, total, routed):
    return total - routed + routed * hf["num_experts_per_tok"] / num_experts(hf)


def test_deepseek_v3_has_671_billion_parameters_of_which_a_token_meets_37(meta):
    """Published with the weights: 671B; active 36.6B, the output head counted, the input embedding (a lookup) not."""
    hf, total, routed, embedding = counts("deepseek_v3_671b")
    assert total == pytest.approx(671 * BILLION, rel=0.005)
    assert active(hf, total, routed) - embedding == pytest.approx(36.6 * BILLION, rel=0.005)


def test_moonlight_has_16_billion_parameters_of_which_a_token_meets_3(meta):
    """Published: 15.29B, active 2.24B, both without the embeddings of input and output."""
    hf, total, routed, embedding = counts("moonlight_16b")
    assert total - 2 * embedding == pytest.approx(15.29 * BILLION, rel=0.005)
    assert active(hf, total, routed) - 2 * embedding == pytest.approx(2.24 * BILLION, rel=0.005)


def test_qwen3_30b_a3b_has_30_billion_parameters_of_which_a_token_meets_3(meta):
    """Published: 30.5B, 29.9B of them without the embeddings of input and output; active 3.3B, with both of those."""
    hf, total, routed, embedding = counts("qwen3_30b_a3b")
    assert total == pytest.approx(30.5 * BILLION, rel=0.005)
    assert total - 2 * embedding == pytest.approx(29.9 * BILLION, rel=0.005)
    assert active(hf, total, routed) == pytest.approx(3.3 * BILLION, rel=0.02)


def test_kimi_k2_has_a_trillion_parameters_of_which_a_token_meets_32_billion(meta):
    """Published: 1T, active 32B."""
    hf, total, routed, embedding = counts("kimi_k2")
    assert 1000 * BILLION < total < 1050 * BILLION
    assert active(hf, total, routed) - embedding == pytest.approx(32 * BILLION, rel=0.02)
