"""Parallel layouts against transformers on one process: logits, loss, every gradient, and the exported weights."""

from __future__ import annotations

import pytest
import torch

from tests.dist.launch import RankError, launch
from tests.dist.layout_worker import Case, run_layouts
from tests.reference import DEEPSEEK, DENSE, KIMI, QWEN3_MOE, Layout, make_reference

MODELS = {  # vocabularies of 97 need padding under TP 2
    "deepseek": DEEPSEEK,
    "deepseek 97": DEEPSEEK | {"vocab_size": 97},
    "deepseek aux": DEEPSEEK,
    "qwen3": DENSE | {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True, "vocab_size": 97},
    "qwen2": DENSE | {"model_type": "qwen2", "vocab_size": 97},
    "qwen3 moe": QWEN3_MOE | {"vocab_size": 97, "mlp_only_layers": [1]},
    "qwen3 moe aux": QWEN3_MOE,
    "kimi k2": KIMI,
}
CASES = {  # test_policy_layouts.py has the packed ones
    2: [
        Case("deepseek", Layout()),
        Case("deepseek 97", Layout(tp=2)),
        Case("deepseek", Layout(tp=2, ep=2), packed=True),
        Case("deepseek", Layout(pp=2, vpp=2)),
        Case("deepseek", Layout(cp=2)),
        Case("deepseek aux", Layout()),
        Case("deepseek aux", Layout(tp=2)),
        Case("deepseek aux", Layout(cp=2, ep=2)),
        Case("qwen3", Layout(pp=2)),
        Case("qwen3", Layout(cp=2), packed=True),
        Case("qwen2", Layout(tp=2)),
        Case("qwen2", Layout(pp=2), packed=True),
        Case("qwen3 moe", Layout()),
        Case("qwen3 moe", Layout(tp=2)),
        Case("qwen3 moe", Layout(ep=2)),
        Case("qwen3 moe", Layout(tp=2, ep=2), packed=True),
        Case("qwen3 moe", Layout(etp=2)),
        Case("qwen3 moe", Layout(tp=2, etp=2)),
        Case("qwen3 moe", Layout(pp=2)),
        Case("qwen3 moe", Layout(pp=2, vpp=2), packed=True),
        Case("qwen3 moe", Layout(pp=2, layers_per_stage=(3, 1))),
        Case("qwen3 moe", Layout(cp=2)),
        Case("qwen3 moe", Layout(cp=2, ep=2), packed=True),
        Case("qwen3 moe aux", Layout(tp=2, ep=2)),
        Case("qwen3 moe aux", Layout(cp=2)),
        Case("kimi k2", Layout()),
        Case("kimi k2", Layout(tp=2, ep=2), packed=True),
        Case("kimi k2", Layout(ep=2)),
        Case("kimi k2", Layout(tp=2, etp=2)),
        Case("kimi k2", Layout(pp=2)),
        Case("kimi k2", Layout(cp=2)),
    ],
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """ranks -> per-rank results; one set of processes runs all layouts of as many ranks."""
    done = {}

    def get(ranks: int) -> list[dict]:
        if ranks not in done:
            directory = tmp_path_factory.mktemp("references")
            for name in {case.model for case in CASES[ranks]}:
                reference = make_reference(MODELS[name], aux_coefficient=0.5 if name.endswith("aux") else 0.0)
                torch.save(reference, directory / f"{name}.pt")
            try:
                done[ranks] = launch(run_layouts, ranks, directory, CASES[ranks], timeout_seconds=600)
            except RankError as error:  # once a set, not once a layout
                done[ranks] = error
        if isinstance(done[ranks], RankError):
            raise done[ranks]
        return done[ranks]

    return get


@pytest.mark.parametrize(
    ("ranks", "case"),
    [pytest.param(ranks, case, id=f"{ranks}-{case.name}") for ranks in CASES for case in CASES[ranks]],
)
def test_layout_equals_transformers(measured, ranks, case):
    for rank, results in enumerate(measured(ranks)):
        result = results[case.name]
        assert result["logits"] <= 1e-5, rank
        assert result.get("loss", 0.0) <= 1e-5, rank
        assert result["gradients"] <= 1e-5, (rank, result["worst"])
        assert result["export_names"] == []
        assert result["export_exact"], rank
    assert any("loss" in results[case.name] for results in measured(ranks))
