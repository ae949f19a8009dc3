"""A plan carried out over gloo on four ranks: every element arrives, in every bucket size, again and again."""

from __future__ import annotations

import pytest

from r1mega.weights.plan import GeneratorLayout
from r1mega.weights.trainer_layout import TrainerLayout
from tests.dist.exchange_worker import run_exchanges
from tests.dist.launch import launch
from tests.unit.weights.brute_force import MODELS

NO_QUERY_RANK = "deepseek without query rank"
SPREAD = TrainerLayout(4, 2, 2, 1, 1, 1, (0,) * 4)
CASES = {
    "TP2 EP2 to TP1": ("deepseek", SPREAD, GeneratorLayout(4), 1 << 20),
    "TP2 EP2 to TP2, small buckets": ("deepseek", SPREAD, GeneratorLayout(4, 2), 700),
    "uneven PP4 to TP4": ("deepseek", TrainerLayout(4, 1, 1, 1, 4, 1, (1, 1, 2, 3)), GeneratorLayout(4, 4), 3000),
    "VPP2 PP2 EP2 to EP4": ("deepseek", TrainerLayout(4, 1, 2, 1, 2, 1, (0, 1, 0, 1)), GeneratorLayout(4, 2, 4), 3000),
    "EP2 ETP2 to TP2 EP2": ("deepseek", TrainerLayout(4, 1, 2, 2, 1, 1, (0,) * 4), GeneratorLayout(4, 2, 2), 5000),
    "CP2 PP2 to TP2": (NO_QUERY_RANK, TrainerLayout(4, 1, 1, 1, 2, 2, (0, 0, 0, 1)), GeneratorLayout(4, 2), 5000),
    "TP4 to TP2": ("qwen2", TrainerLayout(4, 4, 1, 1, 1, 1, (0,) * 4), GeneratorLayout(4, 2), 900),
    "PP2 TP2 tied to TP4": ("qwen3 tied", TrainerLayout(4, 2, 1, 1, 2, 1, (0, 0, 1, 1), True),
                            GeneratorLayout(4, 4), 900),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    """Per rank: {name: result}; one set of processes runs all."""
    cases = [(MODELS[model], *rest) for model, *rest in CASES.values()]
    return [dict(zip(CASES, results, strict=True)) for results in launch(run_exchanges, 4, cases, timeout_seconds=120)]


@pytest.mark.parametrize("name", CASES)
def test_every_element_arrives_at_the_lower_bound(measured, name):
    for rank, results in enumerate(measured):
        result = results[name]
        assert result["wrong"] == [], rank
        assert result["bytes"][1] == result["bound"]
        assert result["lost"] in result["refused"]
    sent, received = (sum(results[name]["bytes"][i] for results in measured) for i in (0, 1))
    assert sent == received > 0
