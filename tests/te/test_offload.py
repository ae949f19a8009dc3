"""Activations in host memory (`model.offload_modules`): over Transformer Engine's layers every bit is that without."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.dist.launch import launch
from tests.dist.policy_cases import MODELS, mtp_state
from tests.dist.policy_worker import Case, take_steps
from tests.policy_reference import start

PARTS = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act")
SMALL = {"min_offloaded_tensor_size": 64}
CASES = {
    1: [
        Case("grpo", {}, offload=PARTS, megatron=SMALL),
        Case("grpo", {}, recompute=("layernorm", "mla_up_proj", "moe_act"), offload=PARTS, megatron=SMALL),
    ],
    2: [
        Case("grpo", {"tp": 2, "ep": 2}, offload=PARTS, megatron=SMALL),
        Case("grpo", {"pp": 2, "vpp": 2}, microbatch_tokens=100, offload=PARTS, megatron=SMALL),
        Case("labels", {"pp": 2}, model="mtp", aux=0.1, offload=PARTS, megatron=SMALL),
    ],
}


def differences(cases: list[Case]) -> list[tuple[list[str], set[str]]]:
    """By case: (what of two optimizer steps, with log-probs before each, has other bits; the parts that moved something)."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler

    from r1mega.config.schema import ParallelConfig
    from r1mega.platform import groups

    moved: set[str] = set()
    offload = ChunkOffloadHandler.offload

    def told(self: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert type(tensor) is torch.Tensor, "a weight, or its copy in FP8"
        groups_here = [group for group in self._groups_to_offload if any(t is tensor for t in group._tensors.values())]
        moved.update(group._name for group in groups_here)
        return offload(self, tensor, *args, **kwargs)

    groups.init_distributed()
    ChunkOffloadHandler.offload, found = told, []
    for case in cases:
        groups.init_parallel(ParallelConfig(**case.layout), seed=0)
        expected = start(MODELS[case.model], mtp_state(2) if case.model == "mtp" else None)
        moved.clear()
        results = []
        for one in (case, dataclasses.replace(case, offload=())):
            groups.seed_all(0)
            steps, state = take_steps(one, expected, keep_gradients=True)
            results.append(list(tensors({"steps": steps, "weights": state})))
        different = [name for (name, a), (_, b) in zip(*results, strict=True) if not torch.equal(a, b)]
        found.append((different, set(moved)))
        groups.destroy_parallel()
    groups.destroy()
    return found


def tensors(value: Any, name: str = "") -> Any:
    """(name, tensor) of everything in nested lists and dicts."""
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(one, f"{name}.{key}")
    else:
        yield name, torch.as_tensor(value)


@pytest.mark.parametrize("ranks", CASES)
def test_steps_have_the_bits_of_those_without(ranks):
    found = launch(differences, ranks, CASES[ranks], preload="tests.te.preload")
    for case, *by_rank in zip(CASES[ranks], *found, strict=True):
        assert not any(different for different, _ in by_rank), (case.name, by_rank)
        assert set().union(*(moved for _, moved in by_rank)) == set(PARTS), case.name
