"""What `r1mega plan` says that a rank holds, against ranks that hold it: every byte of weights, gradients and optimizer."""

from __future__ import annotations

import dataclasses

import pytest

from r1mega.config.schema import OptimizerConfig, ParallelConfig
from r1mega.plan.rank import measure
from tests.dist.launch import launch
from tests.dist.plan_worker import Case, run_cases
from tests.reference import DEEPSEEK

# all experts of a token are chosen, so that there is no imbalance to know of; a vocabulary that tp pads
MODEL = DEEPSEEK | {"vocab_size": 97, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
MODEL |= {"num_nextn_predict_layers": 1}
PRECISION_AWARE = OptimizerConfig(precision_aware=True, grad_reduce_in_fp32=False)
CASES = {
    2: [
        Case({}, dtype="bfloat16", recompute=("core_attn",)),
        Case({"ep": 2}, dtype="bfloat16", optimizer=PRECISION_AWARE),
        Case({"tp": 2, "ep": 2}),
        Case({"tp": 2, "ep": 2}, dtype="bfloat16", recompute="full", tokens=256),
        Case({"etp": 2}),
        Case({"cp": 2}),
        Case({"pp": 2, "vpp": 2}, recompute="full", tokens=256),
        Case({"pp": 2, "layers_per_stage": (3, 1)}),
        Case({"pp": 2, "layers_per_stage": (4, 0), "mtp_standalone": True}, mtp=True),
        Case({"pp": 2, "layers_per_stage": (3, 1)}, mtp=True),
    ],
    4: [
        Case({"tp": 2, "pp": 2, "ep": 2}, dtype="bfloat16"),
        Case({"pp": 2, "ep": 2, "cp": 2}),
        Case({"pp": 4, "layers_per_stage": (2, 2, 0, 0), "mtp_standalone": True}, dtype="bfloat16", mtp=True),
    ],
}
PARTS = ("weights", "gradients", "main_params", "exp_avg", "exp_avg_sq", "reference")


@pytest.mark.parametrize("ranks", CASES)
def test_a_rank_holds_what_is_planned(ranks):
    found = launch(run_cases, ranks, MODEL, CASES[ranks])
    for index, case in enumerate(CASES[ranks]):
        for rank in {0, ranks // 2, ranks - 1}:  # of the first, a middle and the last stage; of different shares
            plan = measure(
                MODEL, case.model, ParallelConfig(**case.layout), case.optimizer,
                world=ranks, rank=rank, tokens=case.tokens, labels=case.mtp, on_gpu=False,
            )  # fmt: skip
            real, planned = found[rank][index], dataclasses.asdict(plan.static)
            assert {part: planned[part] for part in PARTS} == {part: real[part] for part in PARTS}, (case, rank)
            kept = [activations.kept for activations in plan.activations]
            # checkpoints of layers also hold two integers a token, the places of packed tokens
            assert kept == pytest.approx(real["kept"], rel=0.05, abs=17 * case.tokens), (case, rank)
