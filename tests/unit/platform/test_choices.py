"""What the platform decides: layers, FP8, process groups; and what it refuses."""

from __future__ import annotations

import pytest
import torch

from r1mega import platform
from r1mega.errors import ConfigError, PlatformError
from r1mega.model.build import check_layout, family_of, megatron_config
from r1mega.platform import Platform, groups, libraries
from tests.reference import DEEPSEEK, DENSE, Layout, ModelSettings

MTP = DEEPSEEK | {"num_nextn_predict_layers": 1}
QWEN = DENSE | {"model_type": "qwen2"}


def with_engine() -> Platform:
    return Platform("cuda", torch.device("cuda", 0), "nccl", has_transformer_engine=True, has_apex=False)


def test_this_machine_uses_local_layers_on_gloo():
    here = platform.current()
    if here.name != "cpu":
        pytest.skip("this is a GPU")
    assert here.distributed_backend == "gloo"
    config = megatron_config(DEEPSEEK, Layout(), ModelSettings())
    assert config.transformer_impl == "local"
    assert not config.moe_grouped_gemm
    assert config.fp8 is None


def test_a_platform_is_chosen_before_megatron_is_patched():
    here = platform.prepare()
    with pytest.raises(PlatformError, match="before prepare"):
        platform.use(with_engine())
    assert platform.current() is here


@pytest.mark.parametrize(("rank", "device", "chosen"), [("5", 5, True), (None, 0, False)])
def test_a_rank_chooses_its_device_before_libraries_look_for_one(monkeypatch, rank, device, chosen):
    """Which library works is found out by importing it: its context would be on every rank's first device."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda found: seen.append(found))
    for name in ("transformer_engine", "apex"):
        monkeypatch.setattr(libraries, name, lambda: seen.append("library") or libraries.Library("", "missing"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    here = platform.current.__wrapped__()
    assert here.device == torch.device("cuda", device)
    assert seen == [torch.device("cuda", device)] * chosen + ["library"] * 2


def test_a_rank_that_does_not_see_its_gpu_says_what_hides_it(monkeypatch):
    """As with srun's --gpus-per-task: one GPU a process, which is always number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(
        PlatformError,
        match=r"LOCAL_RANK is 3, and this process on .+ sees 1 GPUs: .*without --gpus-per-task.*nvidia-smi -L",
    ):
        platform.current.__wrapped__()


def test_fp8_without_transformer_engine_is_refused():
    with pytest.raises(PlatformError, match="model.fp8 = 'blockwise' needs Transformer Engine"):
        megatron_config(DEEPSEEK, Layout(), ModelSettings(fp8="blockwise"))


@pytest.mark.parametrize(
    ("fp8", "form", "recipe"),
    [("off", None, None), ("tensorwise", "hybrid", "tensorwise"), ("blockwise", "e4m3", "blockwise")],
)
def test_transformer_engine_brings_grouped_gemm_and_fp8(monkeypatch, fp8, form, recipe):
    from r1mega.model import build

    monkeypatch.setattr(build.platform, "current", with_engine)
    arguments = build._platform_arguments(fp8) | build._fp8_arguments(ModelSettings(fp8=fp8))
    assert arguments["transformer_impl"] == "transformer_engine"
    assert arguments["moe_grouped_gemm"]
    assert (arguments.get("fp8"), arguments.get("fp8_recipe")) == (form, recipe)
    assert build._layout_arguments(Layout(pp=2))["deallocate_pipeline_outputs"]


@pytest.mark.parametrize(
    ("hf", "layout", "message"),
    [
        (DEEPSEEK, Layout(tp=3), "parallel.tp = 3 does not divide the model's num_attention_heads = 4"),
        (DEEPSEEK, Layout(ep=3), "parallel.ep = 3 does not divide the model's n_routed_experts = 8"),
        (DEEPSEEK, Layout(pp=3), "parallel.pp * vpp = 3 does not divide the model's num_hidden_layers = 4"),
        (DEEPSEEK, Layout(pp=2, vpp=4), "parallel.pp * vpp = 8 does not divide"),
        (DEEPSEEK, Layout(vpp=2), "parallel.vpp = 2 wants parallel.pp > 1"),
        (DEEPSEEK, Layout(tp=2, sp=False), "needs sequence parallelism"),
        (DEEPSEEK, Layout(etp=64), "parallel.etp = 64 does not divide the model's moe_intermediate_size = 32"),
        (QWEN, Layout(tp=4), "parallel.tp = 4 does not divide the model's num_key_value_heads = 2"),
        (QWEN, Layout(ep=2), "a model without experts wants 1"),
        (
            DEEPSEEK,
            Layout(pp=2, layers_per_stage=(3, 2)),
            "adds up to 5 layers, the model's num_hidden_layers is 4: take away 1",
        ),
        (DEEPSEEK, Layout(pp=2, layers_per_stage=(3,)), "has 1 numbers; parallel.pp * vpp = 2 * 1 wants 2"),
        (DEEPSEEK, Layout(pp=4, layers_per_stage=(0, 4, 0, 0)), "stage 2 holds nothing"),
        (MTP, Layout(pp=4, layers_per_stage=(4, 0, 0, 0), mtp_standalone=True), "stage 1 holds nothing"),
        (MTP, Layout(mtp_standalone=True), "parallel.mtp_standalone wants parallel.pp > 1"),
        (MTP, Layout(pp=2, mtp_standalone=True), "parallel.layers_per_stage is not set; end it in 0"),
        (
            MTP,
            Layout(pp=2, layers_per_stage=(3, 1), mtp_standalone=True),
            "parallel.layers_per_stage ends in 1; end it in 0",
        ),
        (
            MTP,
            Layout(pp=2, vpp=2, layers_per_stage=(2, 2, 0, 0), mtp_standalone=True),
            "on the first rank, which would hold the embedding twice; set pp to 3 or more",
        ),
        (
            DEEPSEEK,
            Layout(pp=2, layers_per_stage=(4, 0), mtp_standalone=True),
            "has no layers of multi-token prediction",
        ),
        (
            MTP | {"tie_word_embeddings": True},
            Layout(pp=2, layers_per_stage=(4, 0), mtp_standalone=True),
            "tied embeddings (tie_word_embeddings) they would be in three stages",
        ),
    ],
)
def test_layouts_that_do_not_divide_are_named(hf, layout, message):
    with pytest.raises(ConfigError) as caught:
        check_layout(hf, layout)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "last"),
    [
        (Layout(pp=16, layers_per_stage=(4,) * 15 + (1,)), ["decoder", "mtp", "loss"]),
        (Layout(pp=16, vpp=2, layers_per_stage=(1,) + (2,) * 30 + (0,)), ["mtp", "loss"]),
        (
            Layout(pp=16, vpp=2, layers_per_stage=(3,) + (2,) * 29 + (0, 0), mtp_standalone=True),
            ["loss"],
        ),  # "Et*3|(tt|)*29,m|L"
    ],
)
def test_sixty_one_layers_fit_sixteen_stages(layout, last):
    """DeepSeek-V3's depth; Megatron's own check of the layout passes, and every layer is in the stage that was asked."""
    hf = DEEPSEEK | {"num_hidden_layers": 61, "num_nextn_predict_layers": 1}
    stages = megatron_config(hf, layout, ModelSettings(mtp_loss_coefficient=0.1)).pipeline_model_parallel_layout
    chunks = [[kind.name for kind in stages.layout[s % 16][s // 16]] for s in range(len(layout.layers_per_stage))]
    assert [chunk.count("decoder") for chunk in chunks] == list(layout.layers_per_stage)
    assert chunks[0][0] == "embedding"
    assert chunks[-1] == last
    if layout.mtp_standalone:
        assert chunks[-2] == ["mtp"]
        with pytest.raises(ConfigError, match=r"mtp_loss_coefficient = 0 builds no layers.*leave it out"):
            megatron_config(hf, layout, ModelSettings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not one of"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'linear'"),
        ({"n_group": 8}, "needs 2 or more a group"),
        ({"n_group": 4, "topk_group": 1}, "hold fewer than 3 experts"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_models_that_are_not_covered_are_refused(change, message):
    with pytest.raises(ConfigError) as caught:
        megatron_config(DEEPSEEK | change, Layout(), ModelSettings())
    assert message in str(caught.value)


def test_missing_keys_are_all_named():
    config = {k: v for k, v in DEEPSEEK.items() if k not in ("kv_lora_rank", "v_head_dim")}
    with pytest.raises(ConfigError, match="kv_lora_rank, v_head_dim"):
        megatron_config(config, Layout(), ModelSettings())


def test_published_spelling_of_yarn_is_read():
    """rope_theta and rope_scaling (transformers 4, the published checkpoint) as well as rope_parameters."""
    config = {k: v for k, v in DEEPSEEK.items() if k != "rope_parameters"} | {
        "rope_theta": 50000,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
    }  # fmt: skip
    megatron = megatron_config(config, Layout(), ModelSettings())
    assert (megatron.rope_type, megatron.rotary_base, megatron.rotary_scaling_factor) == ("yarn", 50000, 40)
    assert "deepseek_v3" in family_of(config).MODEL_TYPES


def test_one_process_gets_groups_of_its_own_and_gives_them_back(monkeypatch):
    groups.destroy()  # what an earlier test in this process may have left
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    import torch.distributed as dist

    for _ in range(2):
        groups.init_parallel(Layout(), seed=3)
        assert dist.get_world_size() == 1
        with pytest.raises(ConfigError, match="1 processes cannot be divided by tp"):
            groups.init_parallel(Layout(tp=2), seed=3)
        groups.destroy()
        assert not dist.is_initialized()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    groups.destroy()
