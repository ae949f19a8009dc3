"""Optimizer steps over Transformer Engine's layers, held to what the local layers are held to (tests/dist).

Log-probs, loss, every gradient, their norm, the weights after two steps: GRPO against transformers and AdamW; labels (MTP,
auxiliary loss) against one process of the local layers. Grouped products, fused permutation, uneven and empty experts are in
every case. Context parallelism runs the project's own attention: Transformer Engine's needs cuDNN.
"""

from __future__ import annotations

import pytest

from tests.dist.launch import RankError, launch
from tests.dist.policy_cases import ALONE, BESIDE, large, write_expectations
from tests.dist.policy_worker import Case, run_cases

CASES = {
    1: [
        Case("grpo", {}),
        Case("grpo", {}, recompute=("core_attn", "mla_up_proj", "layernorm", "mlp", "moe_act", "shared_experts")),
        Case("grpo", {}, megatron={"gradient_accumulation_fusion": True}),
        Case("labels", {}, model="mtp", aux=0.1, recompute="full"),
    ],
    2: [
        Case("grpo", {"tp": 2}),
        Case("grpo", {"tp": 2, "ep": 2}, log_probs="hidden"),
        Case("grpo", {"tp": 2, "ep": 2}, recompute=("mla_up_proj", "layernorm", "moe_act")),
        Case("grpo", {"tp": 2, "sp": False}, model="qwen3_untied", log_probs="hidden"),
        Case("grpo", {"ep": 2}),
        Case("grpo", {"ep": 2}, dtype="bfloat16", megatron=BESIDE),
        Case("grpo", {"etp": 2}),
        Case("grpo", {"tp": 2, "etp": 2}),
        Case("grpo", {"pp": 2, "vpp": 2}, microbatch_tokens=100),
        Case("grpo", {"pp": 2}, model="qwen3"),
        Case("grpo", {"cp": 2}),
        Case("labels", {"tp": 2, "ep": 2}, model="mtp", aux=0.1, recompute="full"),
        Case("labels", {"pp": 2}, model="mtp", aux=0.1),
        Case("labels", {"pp": 2} | ALONE, model="mtp", aux=0.1, recompute="full"),
        Case("labels", {"cp": 2}, model="mtp", aux=0.1),
    ],
    4: [
        Case("grpo", {"ep": 2, "etp": 2}),
        Case("grpo", {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}),
        Case("grpo", {"tp": 2, "cp": 2, "ep": 2}),
    ],
}


@pytest.fixture(scope="module")
def expectations(tmp_path_factory):
    """A directory for what every case must reproduce."""
    return tmp_path_factory.mktemp("expected")


@pytest.fixture(scope="module")
def measured(expectations):
    """ranks -> per-rank results; one set of processes runs all layouts of as many ranks."""
    done = {}

    def get(ranks: int) -> list[dict]:
        if ranks not in done:
            write_expectations(expectations, CASES[ranks])
            try:
                done[ranks] = launch(
                    run_cases, ranks, expectations, CASES[ranks], timeout_seconds=600, preload="tests.te.preload"
                )
            except RankError as error:  # once a set, not once a layout
                done[ranks] = error
        if isinstance(done[ranks], RankError):
            raise done[ranks]
        return done[ranks]

    return get


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        pytest.param(ranks, case, id=f"{ranks}-{case.name}", marks=[pytest.mark.slow] if ranks == 4 else [])
        for ranks in CASES for case in CASES[ranks]
    ],
)  # fmt: skip
def test_steps_equal_those_of_the_local_layers(expectations, measured, ranks, case):
    for rank, results in enumerate(measured(ranks)):
        result = results[case.name]
        assert not large(expectations, case, result), (rank, result)
