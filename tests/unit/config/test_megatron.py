"""What the keys that are Megatron's want of the model and of one another."""

import json
from pathlib import Path

import pytest

from r1mega.config.load import load_config
from r1mega.config.megatron import dispatch_problems, exchange_problems, offload_problems, recompute_problems
from r1mega.config.validate import layout_problems

NANO = json.loads(Path("configs/nano/model/config.json").read_text())


@pytest.mark.parametrize(
    ("recompute", "family", "message"),
    [
        ("[mla_up_proj]", "qwen3", "mla_up_proj is of models with latent attention"),
        ("[moe_act]", "qwen3", "moe_act is of models with experts"),
        ("[shared_experts]", "qwen3_moe", "shared_experts is of models with shared experts"),
        ("[mlp]", "qwen3_moe", "mlp is of models with dense layers"),
    ],
)
def test_parts_that_the_layers_do_not_have_cannot_be_computed_again(recompute, family, message, tmp_path):
    """megatron-core passes over them, and the memory that was to be free is not."""
    config = load_config(Path("configs/nano/zero.yaml"), [f"model.recompute={recompute}"])
    hf = {"model_type": family} | ({"num_experts": 8} if family == "qwen3_moe" else {})
    assert [problem for problem in recompute_problems(config.model, hf) if message in problem]
    assert not list(recompute_problems(load_config(Path("configs/nano/zero.yaml"), ["model.recompute=full"]).model, hf))


@pytest.mark.parametrize(("chosen", "message"), [(2, "by its 4 best experts"), (4, None)])
def test_the_fused_router_is_for_groups_that_are_scored_by_two(chosen, message):
    config = load_config(Path("configs/nano/zero.yaml"), ["model.megatron.moe_router_fusion=true"])
    hf = {"n_routed_experts": 16, "n_group": 4, "topk_group": chosen, "num_experts_per_tok": 8}
    problems = list(dispatch_problems(config.model, config.parallel, hf))
    assert [message in problem for problem in problems] == ([True] if message else [])


@pytest.mark.parametrize(("coefficient", "further"), [(0, 1), (0.1, 0), (0.1, 1)])
def test_the_loss_is_apart_from_layers_that_are_there(coefficient, further):
    words = ["parallel.pp=2", "parallel.layers_per_stage=[3,0]", "parallel.mtp_standalone=true"]
    config = load_config(Path("configs/nano/sft.yaml"), [*words, f"model.mtp_loss_coefficient={coefficient}"])
    problems = list(layout_problems(config, NANO | {"num_nextn_predict_layers": further}, 2))
    said = "model.mtp_loss_coefficient = 0 builds no layers" if not coefficient else "the model has no layers"
    assert [said in problem for problem in problems] == [True] * (not (coefficient and further))
    unread = list(layout_problems(config, {}, 2))  # of a model that cannot be read nothing is said
    assert bool(unread) == (not coefficient)


@pytest.mark.parametrize(
    ("offload", "recompute", "message"),
    [
        ("[moe_act]", "full", r"with model.recompute = full nothing of a layer is kept"),
        ("[attn_proj]", "none", r"attn_proj frees nothing without core_attn"),
        ("[core_attn]", "[core_attn]", r"core_attn is computed again"),
        ("[qkv_linear,expert_fc1]", "[moe]", r"expert_fc1 is part of moe"),
        ("[core_attn,moe_act]", "[layernorm,mla_up_proj,moe_act]", None),
    ],
)
def test_what_is_computed_again_is_not_moved_to_host_memory(offload, recompute, message):
    words = [f"model.offload_modules={offload}", f"model.recompute={recompute}"]
    model = load_config(Path("configs/nano/zero.yaml"), words).model
    assert [message in problem for problem in offload_problems(model, NANO)] == [True] * (message is not None)


def test_parts_that_the_layers_do_not_have_cannot_be_moved():
    words = ["model.offload_modules=[attn_norm,mlp_norm,expert_fc1]"]
    model = load_config(Path("configs/nano/zero.yaml"), words).model
    assert [problem.split()[1] for problem in offload_problems(model, {"model_type": "qwen3"})] == [
        "expert_fc1", "mlp_norm", "attn_norm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], None),
        (["parallel.ep=1"], "wants experts and parallel.ep > 1"),
        (["parallel.pp=2"], "wants parallel.vpp > 1 in a pipeline"),
        (["parallel.pp=2", "parallel.vpp=2", "model.recompute=[layernorm]"], None),
        (["model.recompute=full"], "none or a list without moe"),
        (["model.recompute=[moe]"], "none or a list without moe"),
        (["model.megatron.moe_shared_expert_overlap=true"], "hide the same exchange"),
        (["model.dtype=float32"], "is for bfloat16"),
        (["model.mtp_loss_coefficient=0.1"], "set model.mtp_loss_coefficient=0"),
    ],
)
def test_what_hides_exchanges_of_experts_wants(words, message):
    key = "model.megatron.overlap_moe_expert_parallel_comm=true"
    config = load_config(Path("configs/nano/zero.yaml"), [key, "model.dtype=bfloat16", "parallel.ep=2", *words])
    found = list(exchange_problems(config.model, config.parallel, NANO))
    assert [message in problem for problem in found] == [True] * (message is not None)
