"""What the policy is trained on in every layout, and what it must reproduce; for the layers of either platform."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.dist.launch import launch
from tests.dist.policy_worker import Case, one_rank
from tests.policy_reference import allowed, start, take_grpo_steps
from tests.reference import DEEPSEEK, DENSE, KIMI

ODD = {"vocab_size": 97}  # needs padding under TP 2
MTP = DEEPSEEK | ODD | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
EVERY = {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}  # nothing for a router to decide
MODELS = {
    "deepseek": DEEPSEEK | ODD,
    "kimi_k2": KIMI | ODD | {"n_routed_experts": 12},  # of 384 some get a gradient that is rounding alone
    "mtp": MTP,
    "mtp_deep": MTP | {"num_hidden_layers": 5},
    "mtp_every": MTP | EVERY,
    "qwen3": DENSE | ODD | {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "qwen3_untied": DENSE | ODD | {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": False},
}
BF16 = "bfloat16"
ALONE = {"layers_per_stage": (2, 0), "mtp_standalone": True}
ALONE_OF_8 = ALONE | {"layers_per_stage": (0, 1, 1, 1, 1, 1, 0, 0)}
BESIDE = {"overlap_moe_expert_parallel_comm": True}
CASES = {
    1: [
        Case("grpo", {}),
        Case("grpo", {}, ratio="sequence"),
        Case("grpo", {}, log_probs="hidden"),
        Case("grpo", {}, log_probs="hidden", kept=True),
        Case("labels", {}, model="mtp", aux=0.1, recompute="full"),
        Case("grpo", {}, dtype=BF16),
        Case("grpo", {}, log_probs="hidden", dtype=BF16),
        Case("grpo", {}, log_probs="reference", dtype=BF16),
        Case("grpo", {}, model="qwen3", dtype=BF16),
    ],
    2: [
        Case("grpo", {}),
        Case("grpo", {"tp": 2}),
        Case("grpo", {"ep": 2}),
        Case("grpo", {"tp": 2, "ep": 2}),
        Case("grpo", {"tp": 2, "ep": 2}, log_probs="hidden"),
        Case("grpo", {"tp": 2, "ep": 2}, recompute=("mla_up_proj", "layernorm", "moe")),
        Case("grpo", {"tp": 2, "ep": 2}, megatron={"moe_shared_expert_overlap": True}),
        Case("grpo", {"ep": 2}, megatron={"moe_shared_expert_overlap": True}, recompute="full", overlap=True),
        Case("grpo", {"cp": 2}, megatron={"cp_comm_type": "all_gather"}),
        Case("grpo", {"tp": 2, "ep": 2}, kept=True),
        Case("grpo", {"cp": 2}, kept=True, log_probs="hidden"),
        Case("grpo", {"pp": 2}, kept=True),
        Case("grpo", {}, overlap=True),
        Case("grpo", {}, log_probs="hidden", overlap=True),
        Case("grpo", {"ep": 2}, overlap=True, recompute="full"),
        Case("grpo", {"cp": 2}, overlap=True),
        Case("grpo", {"tp": 2, "sp": False}, model="qwen3_untied", log_probs="hidden"),
        Case("grpo", {"cp": 2}, log_probs="hidden"),
        Case("grpo", {"etp": 2}),
        Case("grpo", {"tp": 2, "etp": 2}),
        Case("grpo", {"pp": 2}),
        Case("grpo", {"pp": 2, "vpp": 2}, microbatch_tokens=100),
        Case("grpo", {"pp": 2, "layers_per_stage": (3, 1)}),
        Case("grpo", {"cp": 2}),
        Case("grpo", {"cp": 2}, ratio="sequence"),
        Case("grpo", {"tp": 2}, model="qwen3"),
        Case("grpo", {"tp": 2, "sp": False}, model="qwen3"),
        Case("grpo", {"pp": 2}, model="qwen3"),
        Case("labels", {"tp": 2, "ep": 2}, model="mtp", aux=0.1),
        Case("labels", {"pp": 2}, model="mtp", aux=0.1),
        Case("labels", {"cp": 2}, model="mtp", aux=0.1),
        Case("labels", {"pp": 2} | ALONE, model="mtp", aux=0.1, recompute="full"),
        Case("labels", {"pp": 2, "layers_per_stage": (2, 0)}, model="mtp", aux=0.1),
        Case("labels", {}, model="mtp", aux=0.1),
        Case("grpo", {}, dtype=BF16),
        Case("grpo", {"tp": 2, "ep": 2}, dtype=BF16),
        Case("grpo", {"tp": 2, "ep": 2}, log_probs="hidden", dtype=BF16),
        Case("grpo", {"tp": 2, "ep": 2}, log_probs="hidden", dtype=BF16, megatron=BESIDE),
        Case("grpo", {"tp": 2, "ep": 2}, log_probs="reference", dtype=BF16),
        Case("grpo", {"tp": 2, "sp": False}, model="qwen3_untied", log_probs="hidden", dtype=BF16),
        Case("grpo", {"pp": 2}, log_probs="hidden", dtype=BF16),
        Case("grpo", {"pp": 2, "vpp": 2}, microbatch_tokens=100, dtype=BF16),
        Case("grpo", {"cp": 2}, ratio="sequence", log_probs="hidden", dtype=BF16),
        Case("grpo", {"tp": 2, "etp": 2}, dtype=BF16),
        Case("grpo", {"tp": 2}, model="qwen3", dtype=BF16),
        Case("grpo", {"pp": 2}, model="qwen3", dtype=BF16),
        Case("labels", {"tp": 2, "ep": 2}, model="mtp_every", aux=0.1, dtype=BF16),
        Case("labels", {"pp": 2}, model="mtp_every", aux=0.1, dtype=BF16),
        Case("labels", {"cp": 2}, model="mtp_every", aux=0.1, dtype=BF16),
    ],
    4: [
        Case("grpo", {"ep": 2, "etp": 2}),
        Case("grpo", {"tp": 2, "ep": 2}),
        Case("grpo", {"tp": 2, "pp": 2, "ep": 2}),
        Case("grpo", {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}),
        Case("grpo", {"pp": 2, "vpp": 2}, microbatch_tokens=100, overlap=True),
        Case("grpo", {"pp": 2, "ep": 2}, dtype=BF16, overlap=True),
        Case("grpo", {"pp": 2, "cp": 2, "ep": 2}),
        Case("grpo", {"tp": 2, "cp": 2, "ep": 2}),
        Case("grpo", {"tp": 2, "pp": 2, "ep": 2}, model="kimi_k2"),
        Case("grpo", {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}, log_probs="hidden", dtype=BF16),
        Case("grpo", {"tp": 2, "cp": 2, "ep": 2}, dtype=BF16),
        Case("grpo", {"pp": 2, "vpp": 2, "ep": 2}, microbatch_tokens=100, dtype=BF16, megatron=BESIDE),
        Case("labels", {"tp": 2, "ep": 2, "pp": 2} | ALONE, model="mtp", aux=0.1),
        Case("labels", {"pp": 4, "layers_per_stage": (1, 1, 0, 0), "mtp_standalone": True}, model="mtp", aux=0.1),
        Case("labels", {"pp": 4, "vpp": 2} | ALONE_OF_8, model="mtp_deep"),
        Case("labels", {"pp": 2, "cp": 2} | ALONE, model="mtp_every", aux=0.1, dtype=BF16),
    ],
}


def write_expectations(directory: Path, cases: Iterable[Case]) -> None:
    """A file for every kind of case: from transformers, or, where it has no such part, from one process."""
    alone = {}
    for case in cases:
        path = directory / case.file
        if path.exists():
            continue
        further = mtp_state(MODELS[case.model]["num_hidden_layers"]) if case.model.startswith("mtp") else None
        expected = start(MODELS[case.model], further, case.dtype, case.ratio, case.kept)
        if case.kind == "grpo":
            take_grpo_steps(expected, case.ratio)
        else:
            alone[path] = dataclasses.replace(case, layout={}, recompute="none")
        torch.save(expected, path)
    if alone:
        launch(one_rank, 1, directory, list(alone.values()), timeout_seconds=600)


def mtp_state(layers: int) -> dict[str, torch.Tensor]:
    """Random weights of the multi-token-prediction layer behind so many, which transformers' model does not have."""
    torch.manual_seed(3)
    like = start(MTP | {"num_hidden_layers": 3}).state
    hidden = MTP["hidden_size"]
    own, prefix = "model.layers.2.", f"model.layers.{layers}."
    state = {prefix + n.removeprefix(own): t for n, t in like.items() if n.startswith(own)}
    state |= {f"{prefix}{n}.weight": 1 + 0.1 * torch.randn(hidden) for n in ("enorm", "hnorm", "shared_head.norm")}
    return state | {f"{prefix}eh_proj.weight": 0.06 * torch.randn(hidden, 2 * hidden)}


def large(directory: Path, case: Case, result: dict[str, Any]) -> dict[str, Any]:
    """Measured differences that are more than rounding."""
    limits = allowed(torch.load(directory / case.file, weights_only=False))
    return {key: value for key, value in result.items() if not key.startswith("worst") and not value <= limits[key]}
