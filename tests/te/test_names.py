"""Transformer Engine's parameters under their names: HF export, checkpoint keys, what goes straight into the generator."""

from __future__ import annotations

import pytest
import torch

from r1mega.checkpoint.fit import alias
from r1mega.config.layout import num_experts
from tests.checkpoints import MTP, hub_state
from tests.dist.launch import launch
from tests.dist.reshard_worker import Case, run_cases
from tests.reference import DENSE, QWEN3_MOE, Layout
from tests.te.names_worker import describe
from tests.unit.rollout.tiny_models import checkpoint

MODELS = {
    "deepseek": MTP | {"vocab_size": 97},
    "qwen2": DENSE | {"model_type": "qwen2", "vocab_size": 97},
    "qwen3": DENSE | {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "qwen3_moe": QWEN3_MOE | {"mlp_only_layers": [1]},
}
LAYOUTS = [Layout(tp=2), Layout(ep=2)]
RESHARDS = [Case("deepseek", Layout(tp=2, ep=2), 1), Case("qwen2", Layout(tp=2), 1, "bfloat16")]


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """(Transformer Engine's, local) layers of every model in every layout, per rank."""
    directory = tmp_path_factory.mktemp("weights")
    for name, config in MODELS.items():
        torch.save(hub_state(config, torch.float32), directory / f"{name}.pt")
    return [
        launch(describe, 2, directory, MODELS, LAYOUTS, timeout_seconds=600, preload=preload)
        for preload in ("tests.te.preload", "tests.dist.preload")
    ]


CASES = [
    f"{name} {layout}" for name, config in MODELS.items() for layout in LAYOUTS if layout.ep == 1 or num_experts(config)
]


@pytest.mark.parametrize("case", CASES)
def test_exports_have_the_bits_that_were_loaded(described, case):
    for engine, local in zip(*described, strict=True):
        assert engine[case]["different"] == local[case]["different"] == []
        assert engine[case]["missing"] == local[case]["missing"]
        assert engine[case]["exported"] == local[case]["exported"] > 10


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_keys_are_those_of_the_local_layers_or_their_aliases(described, case):
    for engine, local in zip(*described, strict=True):
        theirs, ours = engine[case]["sharded"], local[case]["sharded"]
        assert {alias(key) if key not in ours else key: shape for key, shape in theirs.items()} == ours


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_norm_counts_the_same_parameters(described, case):
    """On every tensor-parallel rank what is cut, on one what all of them hold."""

    for engine, local in zip(*described, strict=True):
        assert engine[case]["counted"] == local[case]["counted"] != set()


@pytest.fixture(scope="module")
def resharded():
    models = {case.model for case in RESHARDS}
    directories = {model: (checkpoint(model, 0), checkpoint(model, 1)) for model in models}
    return launch(run_cases, 2, directories, RESHARDS, timeout_seconds=600, preload="tests.te.preload")


@pytest.mark.parametrize("case", RESHARDS, ids=lambda case: case.name)
def test_a_generator_gets_the_bits_of_a_fresh_load(resharded, case):
    for rank, results in enumerate(resharded):
        result = results[case.name]
        for push in ("direct", "gather", "direct again"):
            assert result[push] == [], (rank, push)
        assert result["senders_agree"], rank
        assert "tensors differ" in result["stale"], rank
