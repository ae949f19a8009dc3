"""Trainer -> generator: shards written straight into vLLM give the bits that a checkpoint gives a fresh engine."""

from __future__ import annotations

import math

import pytest
import torch

from r1mega.checkpoint.hf import read_config
from r1mega.weights.layout import tensor_shapes, weight_dtype
from tests.dist.launch import launch
from tests.dist.reshard_worker import Case, run_cases
from tests.reference import Layout
from tests.unit.rollout.tiny_models import checkpoint

CASES = {
    2: [
        Case("deepseek", Layout(tp=2, ep=2), 1),
        Case("deepseek", Layout(etp=2), 1),
        Case("deepseek", Layout(pp=2, vpp=2), 1),
        Case("deepseek", Layout(pp=2), 2),
        Case("deepseek", Layout(ep=2), 2),
        Case("deepseek", Layout(tp=2), 2),
        Case("deepseek", Layout(etp=2), 2, ep=2),
        Case("deepseek", Layout(pp=2, layers_per_stage=(4, 0), mtp_standalone=True), 2, mtp=True),
        Case("deepseek", Layout(pp=2, layers_per_stage=(4, 0)), 2, mtp=True),  # the final norm on the first rank
        Case("qwen3_tied", Layout(pp=2), 2),
        Case("qwen2", Layout(tp=2), 1, "bfloat16"),
        Case("kimi_k2", Layout(tp=2, ep=2), 1),
        Case("kimi_k2", Layout(pp=2), 2, ep=2),
        Case("deepseek", Layout(pp=2), 1, ep=2),  # two generators with their own attention share the experts
        Case("qwen3_moe", Layout(tp=2, ep=2), 1),
        Case("qwen3_moe", Layout(pp=2, vpp=2), 1),
        Case("qwen3_moe", Layout(tp=2), 2, ep=2),
        Case("qwen3_moe", Layout(etp=2), 2, ep=2),
        Case("qwen3_moe", Layout(pp=2), 2, "bfloat16"),
        Case("deepseek", Layout(tp=2, ep=2), 2, "bfloat16", ep=2),
        Case("deepseek", Layout(pp=2, vpp=2), 2, "bfloat16", ep=2),
        Case("qwen3_tied", Layout(pp=2), 1, "bfloat16"),
    ],
    4: [
        Case("deepseek", Layout(tp=2, ep=2), 1, ep=2),  # twice two generators that share experts
        Case("deepseek", Layout(tp=2, pp=2, ep=2), 2),
        Case("deepseek", Layout(ep=2, etp=2), 2),
        Case("deepseek", Layout(pp=4, layers_per_stage=(2, 2, 0, 0), mtp_standalone=True), 2, mtp=True),
        Case("deepseek", Layout(pp=2, ep=2), 4),  # 96 words over 4 ranks in blocks of 32: the last rank has none
        Case("deepseek", Layout(tp=2, ep=2), 4, ep=4),
        Case("deepseek", Layout(tp=2, pp=2), 2, ep=4),
    ],
}


@pytest.fixture(scope="module")
def measured():
    """ranks -> per-rank results; one set of processes runs all cases of as many ranks."""
    done = {}

    def get(ranks: int) -> list[dict]:
        if ranks not in done:
            models = {case.model for case in CASES[ranks]}
            directories = {model: (checkpoint(model, 0), checkpoint(model, 1)) for model in models}
            done[ranks] = launch(
                run_cases, ranks, directories, CASES[ranks], timeout_seconds=600, preload="tests.dist.preload_vllm"
            )
        return done[ranks]

    return get


@pytest.mark.parametrize(("ranks", "case"), [
    pytest.param(ranks, case, id=f"{ranks}-{case.name}", marks=[pytest.mark.slow] if ranks == 4 else [])
    for ranks, cases in CASES.items() for case in cases
])  # fmt: skip
def test_both_strategies_give_the_bits_of_a_fresh_load(measured, ranks, case):
    results = [result[case.name] for result in measured(ranks)]
    for rank, result in enumerate(results):
        for push in ("direct", "gather", "direct again"):
            assert result[push] == [], (rank, push)
        assert result["alone"] <= 1e-4 or case.dtype == "bfloat16", rank
        assert result["senders_agree"], rank
        assert "tensors differ" in result["stale"], rank
    config = read_config(checkpoint(case.model, 0))
    whole = {name: math.prod(shape) * weight_dtype(name, getattr(torch, case.dtype)).itemsize
             for name, shape in tensor_shapes(config).items()}  # fmt: skip
    assert [sum(counts) for counts in zip(*(result["digested"] for result in results), strict=True)] == [
        sum(whole.values()), 0,
    ], "each byte of the model on one rank, and none of it again while it is the same"  # fmt: skip
    assert all("tensors differ" in result["moved meanwhile"] for result in results)
    assert sum(result["bytes"][0] for result in results) == sum(result["bytes"][1] for result in results) > 0
    for fault in ("one bit", "rows moved"):
        hit = results[0]["corrupted"][fault][0]
        assert f"{hit}: digest" in results[0]["corrupted"][fault][1]
    for result in results:
        received, message = result["corrupted"]["nothing unpacked"]
        assert (received in message) if received else True
