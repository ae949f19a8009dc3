"""Parallel layouts against transformers on one process: logits, loss, every gradient, and the exported weights."""

from __future__ import annotations

import pytest
import torch

from tests.dist.launch import RankError, launch
from tests.dist.layout_worker import run_layouts
from tests.reference import DEEPSEEK, DENSE, Layout, make_reference

TWO_RANKS = [
    ("dp2", Layout(), False),
    ("ep2", Layout(ep=2), False),
    ("tp2", Layout(tp=2), False),
    ("tp2 ep2", Layout(tp=2, ep=2), True),
    ("etp2", Layout(etp=2), True),
    ("tp2 etp2", Layout(tp=2, etp=2), True),
    ("pp2", Layout(pp=2), True),
    ("pp2 vpp2", Layout(pp=2, vpp=2), False),
    ("cp2", Layout(cp=2), False),
    ("cp2 packed", Layout(cp=2, ep=2), True),
]
DENSE_TWO_RANKS = [("tp2", Layout(tp=2), True), ("pp2", Layout(pp=2), False), ("cp2 packed", Layout(cp=2), True)]
FOUR_RANKS = [
    ("ep2 etp2", Layout(ep=2, etp=2), True),
    ("tp2 ep2 dp2", Layout(tp=2, ep=2), False),
    ("tp2 pp2 ep2", Layout(tp=2, pp=2, ep=2), True),
]
JOBS = {  # vocabularies of 97 need padding under TP 2
    "deepseek": (DEEPSEEK, 2, TWO_RANKS),
    "qwen3 tied": (
        DENSE | {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True, "vocab_size": 97},
        2,
        DENSE_TWO_RANKS,
    ),
    "qwen2": (DENSE | {"model_type": "qwen2", "vocab_size": 97}, 2, DENSE_TWO_RANKS),
    "deepseek four": (DEEPSEEK | {"vocab_size": 97}, 4, FOUR_RANKS),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """job -> per-rank results; each job's processes run all its layouts."""
    done = {}

    def get(job: str) -> list[dict]:
        if job not in done:
            config, ranks, layouts = JOBS[job]
            path = tmp_path_factory.mktemp("reference") / "reference.pt"
            torch.save(make_reference(config), path)
            try:
                done[job] = launch(run_layouts, ranks, path, layouts)
            except RankError as error:  # once a job, not once a layout
                done[job] = error
        if isinstance(done[job], RankError):
            raise done[job]
        return done[job]

    return get


@pytest.mark.parametrize(("job", "layout"), [(job, layout[0]) for job in JOBS for layout in JOBS[job][2]])
def test_layout_equals_transformers(measured, job, layout):
    for rank, results in enumerate(measured(job)):
        result = results[layout]
        assert result["logits"] <= 1e-5, rank
        assert result.get("loss", 0.0) <= 1e-5, rank
        assert result["gradients"] <= 1e-5, (rank, result["worst"])
        assert result["export_names"] == []
        assert result["export_exact"], rank
    assert any("loss" in results[layout] for results in measured(job))
