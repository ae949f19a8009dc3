"""What a generator keeps of a GPU, against arithmetic that is written down here and what the engine itself refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from r1mega.config.load import load_config
from r1mega.errors import ConfigError, GenerationError
from r1mega.plan.generator import (
    GeneratorMemory,
    generator_memory,
    generator_memory_problems,
    kv_bytes_per_token,
    weight_bytes,
)
from r1mega.plan.given import read_model
from r1mega.plan.gpu import gpu_kind
from r1mega.plan.memory import (
    MemoryPlan,
    PhaseMemory,
    plan_memory,
)
from r1mega.plan.report import verdict
from r1mega.platform import vllm_cuda
from r1mega.rollout.build import engine_settings
from r1mega.rollout.vllm_arguments import check_settings

CONFIGS = Path(__file__).parents[3] / "configs"
DEEPSEEK = json.loads((CONFIGS / "deepseek_v3_671b/model/config.json").read_text())
HIDDEN, EXPERT = 7168, 3 * 7168 * 2048


def test_generator_weights_are_the_layouts():
    total = 671.0e9  # parameters, without multi-token prediction
    assert weight_bytes(DEEPSEEK, torch.bfloat16, 1, 1) == pytest.approx(2 * total, rel=0.001)
    replicated = 61 * HIDDEN * (1536 + 576) + 58 * 256 * HIDDEN
    expected = 2 * (replicated + (total - replicated) / 64)
    assert weight_bytes(DEEPSEEK, torch.bfloat16, 64, 1) == pytest.approx(expected, rel=0.001)
    assert kv_bytes_per_token(DEEPSEEK, torch.bfloat16, 64) == 61 * 576 * 2
    halves = weight_bytes(DEEPSEEK, torch.bfloat16, 1, 1, fp8=True) / (
        2 * total
    )  # embeddings, head and routers are not in FP8
    assert 0.5 < halves < 0.504
    dense = (
        3 * 3 * HIDDEN * 18432
    )  # of the first three layers; routed experts are whole, 8 a rank, and the shared one is on each
    shared, routed = 58 * 3 * HIDDEN * 2048, 58 * 256 * 3 * HIDDEN * 2048
    attention = total - replicated - dense - shared - routed - 2 * HIDDEN * 129280
    expected = replicated + shared + routed / 32 + (dense + attention + 2 * HIDDEN * 129280) / 4
    assert weight_bytes(DEEPSEEK, torch.bfloat16, 4, 32) == pytest.approx(2 * expected, rel=0.002)


def test_ranks_that_share_a_cache_hold_more_tokens():
    path = CONFIGS / "deepseek_v3_671b/zero.yaml"

    def memory(*keys: str) -> GeneratorMemory:
        rollout = load_config(path, list(keys)).rollout
        return generator_memory(DEEPSEEK, torch.bfloat16, rollout, gpu_kind("h100-80").memory_bytes)

    whole, cut = memory(), memory("rollout.dcp=8")
    assert cut.kv_cache == whole.kv_cache and cut.kv_tokens // 8 == whole.kv_tokens
    # eight generators share experts: each rank's have the tokens of all
    few = memory("rollout.tp=4", "rollout.ep=32", "rollout.max_batched_tokens=1024")
    assert few.profile == 1024 * (4 + 8 * (16 + 2)) * HIDDEN * 2 + 256 * 129280 * 4 * 3


def test_a_generator_that_no_gpu_holds_is_refused_with_the_number():
    path = CONFIGS / "deepseek_v3_671b/zero.yaml"
    config = load_config(path, ["rollout.tp=1"])
    (problem,) = generator_memory_problems(config, read_model(config, path), gpu_kind("h100-80"), 512)
    assert "rollout.tp = 1" in problem and "1,342.1 GB" in problem and "at least 32" in problem
    shipped = load_config(path, [])
    assert not list(generator_memory_problems(shipped, read_model(shipped, path), gpu_kind("h100-80"), 512))


@pytest.mark.parametrize("keys", [(), ("rollout.tp=4", "rollout.dcp=4")])
def test_a_cache_of_a_given_size_is_told_how_large_it_has_to_be(keys):
    """And a byte less is what the engine refuses too, which counts in whole blocks."""
    path, gpu = CONFIGS / "moonlight_16b/zero.yaml", gpu_kind("h100-80")
    keys = [*keys, "rollout.max_response_tokens=5000"]
    shipped = load_config(path, keys)
    hf, longest = read_model(shipped, path), shipped.data.max_prompt_tokens + 5001

    def plans(size: int) -> list[str]:
        config = load_config(path, [*keys, f"rollout.kv_cache_bytes={size}"])
        return list(generator_memory_problems(config, hf, gpu, 8))

    def starts(size: int) -> bool:
        rollout = shipped.rollout.model_copy(update={"kv_cache_bytes": size})
        try:
            check_settings(engine_settings(path, "bfloat16", longest, rollout), hf, vllm_cuda)
        except GenerationError:
            return False
        return True

    (said,) = plans(1000)
    least = int(said.partition("kv_cache_bytes to at least ")[2].partition(",")[0])
    assert [(not plans(size), starts(size)) for size in (least - 1, least)] == [(False, False), (True, True)]


def test_what_cannot_start_does_not_fit():
    """Whatever else is at risk."""
    gpu = gpu_kind("h100-80")
    tight = PhaseMemory("update", {"trainer": gpu.memory_bytes - 1e9}, 0)
    for starts, said in ((True, "at risk"), (False, "does not fit")):
        assert verdict(MemoryPlan((tight,), (), None, {}, "fits", 0.0, starts, ("rollout: no",)), gpu) == said


def test_a_share_too_small_for_the_weights_is_told_what_it_has_to_be():
    path, gpu = CONFIGS / "moonlight_16b/zero.yaml", gpu_kind("h100-80")
    hf, key = read_model(load_config(path), path), "rollout.gpu_memory_utilization"
    (said,) = generator_memory_problems(load_config(path, [f"{key}=0.05"]), hf, gpu, 8)
    least = said.rpartition(" to at least ")[2]
    assert f"set {key} to at least {least}" in said and 0.4 < float(least) < 0.5
    assert not list(generator_memory_problems(load_config(path, [f"{key}={least}"]), hf, gpu, 8))


def test_longer_passes_leave_less_cache():
    path = CONFIGS / "deepseek_v3_671b/zero.yaml"
    sizes = []
    for tokens in (8192, 33793):
        rollout = load_config(path, [f"rollout.max_batched_tokens={tokens}"]).rollout
        sizes.append(generator_memory(DEEPSEEK, torch.bfloat16, rollout, gpu_kind("h100-80").memory_bytes))
    # two workspaces of [tokens, 8, hidden] and four of [tokens, hidden]
    assert sizes[0].kv_cache - sizes[1].kv_cache == pytest.approx((33793 - 8192) * 20 * HIDDEN * 2)


def test_generators_that_cannot_share_experts_are_refused_as_by_the_stage():
    wide = ["rollout.tp=32", "rollout.ep=64", "rollout.max_batched_tokens=1024"]
    for name, keys, message in (
        ("evaluate", [], "each samples at its own pace"),
        ("zero", ["rollout.router_replay=true"], "choices of experts are not recorded"),
        ("zero", ["reward.judge.engine=policy", "reward.judge.weight=1"], "asks each generator for itself"),
    ):
        config = load_config(CONFIGS / f"deepseek_v3_671b/{name}.yaml", wide + keys)
        with pytest.raises(ConfigError, match=message):
            plan_memory(config, DEEPSEEK, 512, gpu_kind("h100-80"), None, imbalance=1.0, per_node=8)
