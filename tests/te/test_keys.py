"""Keys that megatron-core takes as they are: every shipped config for GPUs, and every key, by megatron-core's own checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist.launch import launch

CONFIGS = sorted(
    str(path) for path in Path("configs").rglob("*.yaml") if not {"nano", "smollm2"} & set(path.parts)
)  # fmt: skip
DEEPSEEK, MOONLIGHT = "configs/deepseek_v3_671b/zero.yaml", "configs/moonlight_16b/zero.yaml"
KEYS = {
    "every part": [
        DEEPSEEK, "model.recompute=[core_attn,mla_up_proj,layernorm,mlp,moe,moe_act,shared_experts]",
        "model.megatron.moe_shared_expert_overlap=false",
    ],
    "deepep": [DEEPSEEK, "model.dispatcher=deepep", "model.megatron.moe_shared_expert_overlap=false"],
    "hybridep": [DEEPSEEK, "model.dispatcher=hybridep", "model.megatron.moe_shared_expert_overlap=false"],
    "rope": [DEEPSEEK, "model.megatron.apply_rope_fusion=true"],
    "router": [DEEPSEEK, "model.megatron.moe_router_fusion=true"],
    "attention": [DEEPSEEK, "model.megatron.attention_backend=flash", "model.megatron.cp_comm_type=a2a"],
    "offload": [
        DEEPSEEK, "model.offload_modules=[attn_norm,qkv_linear,core_attn,attn_proj,mlp_norm,expert_fc1,moe_act]",
    ],
    "exchange": [
        DEEPSEEK, "model.megatron.overlap_moe_expert_parallel_comm=true",
        "model.megatron.moe_shared_expert_overlap=false", "model.recompute=[mla_up_proj]", "parallel.vpp=2",
        "parallel.layers_per_stage=[1,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,0]",
    ],
    "accumulation": [MOONLIGHT, "model.megatron.gradient_accumulation_fusion=true"],
}  # fmt: skip
REFUSED = {
    "exchange": (
        [DEEPSEEK, "model.megatron.overlap_moe_expert_parallel_comm=true"],
        "virtual_pipeline_model_parallel_size must be",
    ),
    "offload": ([DEEPSEEK, "model.offload_modules=[attn_proj]"], "attn_proj cannot be set to offload_modules alone"),
    "rope": ([MOONLIGHT, "model.megatron.apply_rope_fusion=true"], "only works with YARN"),
    "overlap and deepep": (
        [DEEPSEEK, "model.dispatcher=deepep", "model.megatron.moe_shared_expert_overlap=true"],
        "only works with alltoall",
    ),
    "overlap and recomputation": (
        [MOONLIGHT, "model.megatron.moe_shared_expert_overlap=true", "model.recompute=[shared_experts]"],
        "shared_experts recompute cannot work",
    ),
}


def checked(cases: dict[str, list[str]]) -> list[dict[str, Any]]:
    """[{case: what megatron-core's config has of the keys, or why it refuses}]."""
    import warnings

    from r1mega.config.load import load_config
    from r1mega.config.schema import TrainingStage
    from r1mega.errors import ConfigError
    from r1mega.model.build import megatron_config

    warnings.simplefilter("ignore")
    found = {}
    for name, (path, *overrides) in cases.items():
        config = load_config(Path(path), overrides)
        if not isinstance(config, TrainingStage):
            continue
        student = Path(path).parent / "student"
        directory = student if config.stage == "distill" else Path(path).parent / "model"
        hf = json.loads((directory / "config.json").read_text())
        try:
            built = megatron_config(hf, config.parallel, config.model)
        except ConfigError as error:
            found[name] = str(error)
        else:
            found[name] = {key: getattr(built, key) for key in KNOWN}
            found[name]["attention_backend"] = built.attention_backend.name
    return [found]


KNOWN = (
    "recompute_granularity", "recompute_modules", "moe_token_dispatcher_type", "moe_flex_dispatcher_backend",
    "apply_rope_fusion", "moe_router_fusion", "cp_comm_type", "gradient_accumulation_fusion",
    "moe_shared_expert_overlap", "fine_grained_activation_offloading", "offload_modules",
    "overlap_moe_expert_parallel_comm",
)  # fmt: skip


@pytest.fixture(scope="module")
def found():
    cases = {path: [path] for path in CONFIGS if not path.endswith("r1.yaml")}
    cases |= {f"key {name}": case for name, case in KEYS.items()}
    cases |= {f"refused {name}": case for name, (case, _) in REFUSED.items()}
    ((result,),) = launch(checked, 1, cases, timeout_seconds=300, preload="tests.te.preload")
    return result


def test_megatron_takes_every_shipped_config(found):
    shipped = {name: value for name, value in found.items() if name.startswith("configs/")}
    assert len(shipped) >= 15
    assert {name: value for name, value in shipped.items() if isinstance(value, str)} == {}
    assert shipped[MOONLIGHT]["recompute_modules"] == ["moe_act", "mla_up_proj", "layernorm"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("every part", {"recompute_granularity": "selective"}),
        ("deepep", {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}),
        ("hybridep", {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}),
        ("rope", {"apply_rope_fusion": True}),
        ("router", {"moe_router_fusion": True}),
        ("attention", {"attention_backend": "flash", "cp_comm_type": "a2a"}),
        ("exchange", {"overlap_moe_expert_parallel_comm": True}),
        ("offload", {"fine_grained_activation_offloading": True}),
        ("accumulation", {"gradient_accumulation_fusion": True}),
    ],
)
def test_megatron_takes_the_key(found, name, expected):
    result = found[f"key {name}"]
    assert not isinstance(result, str), result
    assert {key: result[key] for key in expected} == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_refuses_is_told_before_anything_starts(found, name):
    assert REFUSED[name][1] in found[f"refused {name}"]
