"""What the planner says that a GPU's layers keep, against what Transformer Engine's save; copies of weights in FP8, to the byte."""

from __future__ import annotations

import pytest

from r1mega.config.schema import ParallelConfig
from r1mega.plan.rank import measure
from tests.dist.launch import launch
from tests.reference import DEEPSEEK
from tests.te.plan_worker import Case, run_cases

# sizes of whole blocks of FP8; all experts of a token are chosen, so that there is no imbalance to know of
MODEL = DEEPSEEK | {
    "vocab_size": 97, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "kv_lora_rank": 128,
    "q_lora_rank": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts_per_tok": 8,
    "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
LISTS = ("none", ("moe_act",), ("core_attn", "layernorm"), ("mla_up_proj", "layernorm", "moe_act"))
PARTS = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act")
CASES = {
    1: [
        *(Case({}, fp8, recompute) for fp8 in ("off", "blockwise") for recompute in LISTS),
        Case({}, "off", ("mlp", "shared_experts")),
        Case({}, "off", ("moe",)),
        Case({}, "tensorwise", ("mlp", "shared_experts")),
        Case({}, "tensorwise", ("moe", "layernorm")),
        Case({}, "blockwise", "full"),
        Case({}, "blockwise", skip=(1, 1)),
        Case({}, mtp=True),
        Case({}, offload=PARTS),
        Case({}, recompute=("mla_up_proj", "layernorm", "moe_act"), offload=PARTS[2:], mtp=True),
        Case({}, "blockwise", offload=PARTS),
        Case({}, "tensorwise", mtp=True),
    ],
    2: [
        Case({"tp": 2, "ep": 2}, "tensorwise"),
        Case({"ep": 2}, "blockwise"),
        Case({"tp": 2, "etp": 2}, "tensorwise", ("mla_up_proj", "layernorm", "moe_act")),
        Case({"pp": 2, "vpp": 2}, "blockwise"),
        Case({"pp": 2, "vpp": 2}, "blockwise", ("moe_act",), offload=("core_attn", "attn_proj", "moe_act")),
        Case({"tp": 2, "ep": 2}, offload=PARTS),
        Case({"pp": 2}, "tensorwise", mtp=True),
        Case({"cp": 2}),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_transformer_engines_layers_keep_what_is_planned(ranks):
    found = launch(run_cases, ranks, MODEL, CASES[ranks], preload="tests.te.preload")
    wrong = []
    for index, case in enumerate(CASES[ranks]):
        for rank in {0, ranks - 1}:
            plan = measure(
                MODEL, case.model, ParallelConfig(**case.layout), None,
                world=ranks, rank=rank, tokens=case.tokens, labels=case.mtp,
            )  # fmt: skip
            real, kept = found[rank][index], [activations.kept for activations in plan.activations]
            moved = [activations.moved for activations in plan.activations if case.offload]
            for chunk, (planned, kept_here) in enumerate(zip(kept, real["kept"], strict=True)):
                both = kept_here + (real["moved"][chunk] if case.offload else 0)
                if planned != pytest.approx(kept_here, abs=0.05 * both):
                    wrong.append((case, rank, kept, real["kept"]))
            if moved != pytest.approx(real["moved"], rel=0.05) or bool(case.offload) != any(moved):
                wrong.append((case, rank, moved, real["moved"]))
            if case.recompute == "none" and plan.static.quantised != real["quantised"]:  # with gradients of all of them
                wrong.append((case, rank, plan.static.quantised, real["quantised"]))
            if not case.mtp and real["asked"] != pytest.approx(plan.static.quantised / 2, rel=0.001):  # rows alone
                wrong.append((case, rank, plan.static.quantised / 2, real["asked"]))
            assert bool(real["quantised"]) == (case.fp8 != "off") and not real["left"], (case, rank)
    assert not wrong, "\n".join(map(str, wrong))
