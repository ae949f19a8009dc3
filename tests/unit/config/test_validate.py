"""Checks across keys: each names the number to change."""

import json
import re
from pathlib import Path

import pytest

from r1mega.config.layout import generator_problems
from r1mega.config.load import load_config
from r1mega.config.model_files import context_length
from r1mega.config.schema import RolloutConfig
from r1mega.config.stages.rl import AlgorithmConfig, RLStage, UpdateConfig
from r1mega.config.validate import validate
from r1mega.errors import ConfigError

NANO = json.loads(Path("configs/nano/model/config.json").read_text())


@pytest.fixture
def run(tmp_path):
    """A function that validates configs/nano/zero.yaml with overrides, over a model directory that looks complete."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(NANO))
    (tmp_path / "hf/model.safetensors").touch()
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 447}}}))
    (tmp_path / "data.jsonl").touch()
    given = [
        f"model.path={tmp_path}/hf",
        f"data.prompts=[{tmp_path}/data.jsonl]",
        f"evaluate.data={tmp_path}/data.jsonl",
    ]

    def check(*overrides, world=1):
        validate(load_config(Path("configs/nano/zero.yaml"), [*given, *overrides]), world)

    return check


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shipped_nano_config_is_valid(run, world):
    run(world=world)
    validate(load_config(Path("configs/nano/base.yaml")), world)


def test_shipped_nano_config_for_four_ranks_is_valid(run):
    parallel = load_config(Path("configs/nano/zero_tp2_ep2.yaml")).parallel
    run(f"parallel.tp={parallel.tp}", f"parallel.ep={parallel.ep}", world=4)


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["model.path=nowhere/hf"], 1, r"model\.path = nowhere/hf.*run the stage that makes it first"),
        (["data.prompts=[gone.jsonl]"], 1, r"data\.prompts: gone\.jsonl is missing"),
        (["evaluate.data=gone.jsonl"], 1, r"evaluate\.data: gone\.jsonl is missing"),
        (["parallel.tp=3"], 3, r"parallel\.tp = 3 does not divide the model's num_attention_heads = 4; 2 would"),
        (["parallel.ep=3"], 3, r"parallel\.ep = 3 does not divide the model's n_routed_experts = 8"),
        (
            ["parallel.pp=2"],
            2,
            r"parallel\.pp \* vpp = 2 does not divide the model's num_hidden_layers = 3; 1 would, or set parallel\.layers_per_stage",
        ),
        (["parallel.pp=2", "parallel.layers_per_stage=[2,2]"], 2, r"adds up to 4 layers.*is 3: take away 1"),
        (["parallel.pp=2", "parallel.layers_per_stage=[3]"], 2, r"has 1 numbers; parallel\.pp \* vpp = 2 \* 1 wants 2"),
        (["parallel.vpp=2"], 1, r"parallel\.vpp = 2 wants parallel\.pp > 1"),
        (["algorithm.router_replay=true", "rollout.router_replay=true"], 1, r"R2.*R3.*leave one of"),
        (["rollout.quantization=fp8"], 1, r"FP8 weights with bfloat16 activations; set model\.dtype=bfloat16"),
        (["rollout.quantization=fp8", "model.dtype=bfloat16"], 1, r"which cuts a block of 128 x 128"),
        (
            ["rollout.kv_cache_dtype=fp8"],
            1,
            r"part generator and policy by more than .* in float32.*model\.dtype=bfloat16",
        ),
        (
            ["rollout.kv_cache_dtype=fp8", "rollout.engine=transformers", "rollout.router_replay=false"],
            1,
            r"rollout\.kv_cache_dtype are vLLM's, and rollout\.engine = transformers",
        ),
        (
            ["algorithm.router_replay=true", "algorithm.old_log_probs=rollout", "rollout.router_replay=false"],
            1,
            r"the pass that algorithm\.old_log_probs=recompute makes",
        ),
        (
            ["algorithm.router_replay=true", "rollout.router_replay=false", "model.megatron.moe_router_fusion=true"],
            1,
            r"algorithm\.router_replay: the fused router takes no choices",
        ),
        (
            ["optimizer.overlap_param_gather=true"],
            1,
            r"buckets that optimizer\.overlap_grad_reduce makes; set both, or",
        ),
        (
            ["optimizer.overlap_grad_reduce=true", "model.mtp_loss_coefficient=0.1"],
            1,
            r"set model\.mtp_loss_coefficient=0",
        ),
        (["parallel.tp=2", "parallel.sp=false"], 2, r"needs sequence parallelism; leave sp out"),
        (
            ["model.mtp_loss_coefficient=0.1", "model.log_probs=hidden"],
            1,
            r"model\.log_probs = hidden wants .*no MTP loss",
        ),
        (
            ["model.log_probs=hidden", "model.dtype=bfloat16", "optimizer.grad_reduce_in_fp32=false"],
            1,
            r"model\.log_probs = hidden adds .*set optimizer\.grad_reduce_in_fp32=true, or",
        ),
        (
            ["model.fp8_skip_first_layers=1"],
            1,
            r"fp8_skip_first_layers = 1.*leave layers out of FP8, and model\.fp8 = off",
        ),
        (
            ["model.fp8=blockwise", "model.fp8_skip_first_layers=2", "model.fp8_skip_last_layers=1"],
            1,
            r"leave none of the model's 3 layers in FP8; set model\.fp8=off",
        ),
        (
            ["model.fp8=blockwise", "model.fp8_skip_last_layers=2", "parallel.pp=2", "parallel.layers_per_stage=[1,2]"],
            2,
            r"fp8_skip_last_layers = 2: Megatron takes at most num_hidden_layers // parallel\.pp = 1",
        ),
        (
            ["model.fp8=tensorwise", "parallel.etp=8"],
            8,
            r"moe_intermediate_size / parallel\.etp = 8 is 8.*want multiples of 16",
        ),
        (["parallel.tp=2"], 3, r"3 processes cannot be divided by tp \* pp \* cp = 2"),
        (["parallel.dp=3"], 2, r"parallel\.dp = 3.*wants 3 processes, there are 2"),
        (["rollout.tp=2"], 3, r"rollout\.tp = 2 does not divide the 3 processes"),
        (["rollout.tp=8"], 8, r"rollout\.tp = 8 does not divide the model's num_attention_heads = 4; 4 would"),
        (["rollout.dp=2"], 4, r"rollout\.dp = 2 with rollout\.tp = 1 wants 2 processes, there are 4; leave dp out"),
        (["rollout.tp=4", "rollout.ep=2"], 4, r"rollout\.ep = 2: .* it is 1 or a multiple of rollout\.tp = 4"),
        (["rollout.ep=4"], 6, r"rollout\.ep = 4 does not divide the 6 processes"),
        (["rollout.tp=2", "rollout.dcp=4"], 2, r"rollout\.dcp = 4 does not divide rollout\.tp = 2"),
        (
            ["rollout.tp=2", "rollout.dcp=2", "rollout.engine=transformers"],
            2,
            r"rollout\.dcp = 2 wants rollout\.engine",
        ),
        (["rollout.ep=2", "rollout.router_replay=true"], 2, r"router_replay: .* share experts \(rollout\.ep = 2"),
        (["rollout.tp=2", "rollout.dcp=2", "rollout.router_replay=true"], 2, r"router_replay: .*rollout\.dcp = 2\)"),
        (["rollout.ep=2", "reward.judge={weight: 1, engine: policy}"], 2, r"judge\.engine = policy .* rollout\.ep = 2"),
        (
            ["rollout.max_batched_tokens=255"],
            1,
            r"rollout\.max_batched_tokens = 255 is below rollout\.max_num_seqs = 256",
        ),
        (
            ["rollout.tp=2", "rollout.ep=2", "rollout.engine=transformers"],
            2,
            r"rollout\.ep = 2 wants rollout\.engine = vllm",
        ),
        (["rollout.num_prompts=2"], 4, r"raise it to at least 4"),
        (["update.num_minibatches=3"], 1, r"256 responses cannot be divided into update\.num_minibatches = 3"),
        (["rollout.max_response_tokens=1000"], 1, r"max_position_embeddings is 256; lower their sum to at most 255"),
        (
            ["update.microbatch_tokens=64", "data.max_prompt_tokens=30", "rollout.max_response_tokens=70"],
            1,
            r"microbatch_tokens = 64.*= 100; raise it",
        ),
        (["optimizer.precision_aware=true"], 1, r"set model\.dtype=bfloat16 or optimizer\.precision_aware=false"),
        (
            ["optimizer.precision_aware=true", "optimizer.cpu_offload=true", "model.dtype=bfloat16"],
            1,
            r"optimizer\.precision_aware stores the moments of an Adam on the device",
        ),
        (
            ["optimizer.precision_aware=true", "optimizer.beta2=0.999", "model.dtype=bfloat16"],
            1,
            r"optimizer\.beta2 = 0\.999 with exp_avg_sq_dtype = bfloat16.*set optimizer\.exp_avg_sq_dtype=float32$",
        ),
        (
            ["optimizer.precision_aware=true", "optimizer.beta1=0.9962", "model.dtype=bfloat16"],
            1,
            r"optimizer\.beta1 = 0\.9962 with exp_avg_dtype = bfloat16",
        ),
        (["optimizer.cpu_offload=true"], 1, r"set model\.dtype=bfloat16 or optimizer\.cpu_offload=false"),
        (
            ["optimizer.cpu_offload=true", "memory.optimizer_offload=update", "model.dtype=bfloat16"],
            1,
            r"memory\.optimizer_offload = update moves what optimizer\.cpu_offload keeps",
        ),
        (["algorithm.importance_cap=2"], 1, r"wants algorithm\.old_log_probs=recompute"),
        (
            ["rollout.top_k=2000"],
            1,
            r"rollout\.top_k = 2000.*max_kept_ids = 1024 ids.*raise max_kept_ids to at least top_k",
        ),
        (["rollout.top_k=1"], 1, r"rollout\.top_k = 1: .*raise top_k to at least 2"),
        (["rollout.top_p=0.9", "rollout.max_kept_ids=1"], 1, r"raise max_kept_ids to at least 2"),
        (["rollout.max_kept_ids=64"], 1, r"none of them is set; set one, or leave max_kept_ids out"),
        (
            ["algorithm.off_policy.mask=token"],
            1,
            r"off_policy\.mask corrects .* wants algorithm\.old_log_probs=recompute",
        ),
        (
            [
                "algorithm.old_log_probs=recompute",
                "algorithm.off_policy.mask=token",
                "algorithm.off_policy.mask_high=0.4",
            ],
            1,
            r"not between mask_low = 0\.5 and mask_high = 0\.4; set mask_low below 1",
        ),
        (
            [
                "algorithm.old_log_probs=recompute",
                "algorithm.off_policy.mask=geometric",
                "algorithm.off_policy.mask_low=1",
            ],
            1,
            r"not between mask_low = 1\.0 and mask_high = 5\.0",
        ),
        (
            ["algorithm.off_policy.mask_high=2"],
            1,
            r"set off_policy\.mask=token, sequence or geometric, or leave both out",
        ),
        (["algorithm.off_policy.reject_ratio=1"], 1, r"algorithm\.off_policy\.reject_ratio.*less than 1"),
        (["algorithm.sapo_temperatures=[1,51]"], 1, r"algorithm\.sapo_temperatures.*less than or equal to 50"),
        (
            ["algorithm.old_log_probs=recompute", "algorithm.off_policy.mask=token", "algorithm.surrogate=gmpo"],
            1,
            r"set mask=sequence or mask=geometric",
        ),
        (["algorithm.importance_level=sequence"], 1, r"set importance_cap, or leave importance_level out"),
        (["algorithm.surrogate=cispo", "algorithm.ratio=sequence"], 1, r"cispo takes .*set algorithm\.ratio=token"),
        (["rollout.partial.overdraw=2.5"], 1, r"set overdraw to at most 2, or raise max_staleness"),
        (["rollout.partial.overdraw=2", "rollout.partial.max_staleness=0"], 1, r"or leave rollout\.partial out"),
        (
            ["rollout.partial.overdraw=2", "rollout.partial.every_tokens=1", "rollout.max_response_tokens=1"],
            1,
            r"max_response_tokens = 1 .*leave rollout\.partial out",
        ),
        (["rollout.partial.overdraw=2", "rollout.durable=false"], 1, r"set durable=true"),
        (
            [
                "rollout.partial.overdraw=2",
                "algorithm.dynamic_sampling.enabled=true",
                "reward.judge.weight=1",
                "reward.judge.engine=policy",
            ],
            1,
            r"reward.judge takes the generator or all ranks; switch one of them off",
        ),
        (["rollout.partial.overdraw=2", "algorithm.old_log_probs=recompute"], 1, r"set algorithm\.importance_cap"),
        (
            ["rollout.partial.overdraw=2", "algorithm.old_log_probs=recompute", "algorithm.kl_bias_correction=true"],
            1,
            r"set algorithm\.importance_cap",
        ),
        (["rollout.partial.overdraw=2", "rollout.engine=transformers"], 1, r"set rollout\.engine=vllm"),
        (["rollout.partial.overdraw=2", "rollout.partial.every_tokens=100000"], 1, r"set every_tokens to less"),
        (["rollout.partial.on_stale=drop"], 1, r"raise overdraw, or leave them out"),
        (["algorithm.surrogate=sapo", "algorithm.dual_clip=3"], 1, r"leave dual_clip out"),
        (["algorithm.dual_clip=1.1"], 1, r"dual_clip = 1\.1 is below 1 \+ clip_high = 1\.2; raise it"),
        (["algorithm.whiten=true"], 1, r"whiten has no standard .* set algorithm\.normalize_std=false"),
        (["algorithm.baseline=none"], 1, r"baseline = none has no standard .* set algorithm\.normalize_std=false"),
        (["algorithm.kl_in=reward", "algorithm.kl_bias_correction=true"], 1, r"set algorithm\.kl_in=loss"),
        (["algorithm.kl_in=reward", "algorithm.mask_truncated=true"], 1, r"set mask_truncated=false or kl_in=loss"),
        (["algorithm.kl_in=reward"], 1, r"kl_in = reward.* of its noise; set algorithm\.normalize_std=false"),
        (
            ["algorithm.baseline=none", "algorithm.normalize_std=false", "algorithm.dynamic_sampling.enabled=true"],
            1,
            r"have advantages like others; set dynamic_sampling\.enabled=false$",
        ),
        (
            ["rollout.group_size=1"],
            1,
            r"at least 2 responses.* algorithm\.baseline=none and algorithm\.normalize_std=false",
        ),
        (["model.force_expert_balance=true"], 1, r"force_expert_balance.*bench_throughput.py --synthetic"),
    ],
)
def test_each_problem_is_named(run, overrides, world, message):
    with pytest.raises(ConfigError, match=message):
        run(*overrides, world=world)


@pytest.mark.parametrize(
    ("overrides", "world"),
    [
        (["parallel.tp=2", "model.log_probs=hidden"], 2), (["parallel.tp=2", "parallel.ep=2"], 4), (["parallel.cp=2", "parallel.ep=2"], 2),
        (["parallel.pp=3"], 3), (["parallel.pp=2", "parallel.layers_per_stage=[2,1]"], 4),
        (["parallel.pp=2", "parallel.vpp=2", "parallel.layers_per_stage=[1,1,1,0]"], 2), (["parallel.etp=2"], 2),
        (["rollout.tp=2", "rollout.ep=2", "rollout.dp=6", "parallel.pp=3"], 12), (["rollout.dp=4"], 4),
    ],
)  # fmt: skip
def test_layouts_that_fit(run, overrides, world):
    run(*overrides, world=world)


@pytest.mark.parametrize("recompute", ["full", "[layernorm,moe]", "none"])
@pytest.mark.parametrize("section", ["rollout", "algorithm"])
def test_router_replay_goes_with_recomputation(run, section, recompute):
    run(
        "rollout.router_replay=false", "algorithm.old_log_probs=recompute", f"{section}.router_replay=true",
        f"model.recompute={recompute}",
    )  # fmt: skip


@pytest.mark.parametrize("value", ["selective", "moe_act", "[moe_act,attention]", "true"])
def test_what_can_be_computed_again_is_named(value):
    with pytest.raises(
        ConfigError, match=r"^command line: model\.recompute = .* must be none, full, or a list of core_attn, "
    ):
        load_config(Path("configs/nano/zero.yaml"), [f"model.recompute={value}"])


COMMANDS = re.findall(
    r"^    r1mega train configs/nano/zero\.yaml (.*)$", Path("docs/losses.md").read_text().replace("\\\n", ""), re.M
)


@pytest.mark.parametrize("overrides", COMMANDS)
def test_the_losses_of_the_documentation_are_valid(run, overrides):
    run(*overrides.split())


@pytest.mark.parametrize("scale", ["nano", "moonlight_16b", "deepseek_v3_671b"])
def test_reasoning_rl_is_clipped_on_neither_side_as_the_paper_has_it(scale):
    algorithm = load_config(Path(f"configs/{scale}/reasoning_rl.yaml")).algorithm
    assert (algorithm.clip_low, algorithm.clip_high) == (0.99, 10)


def test_the_defaults_of_rl_are_one_run_of_the_paper():
    """Its figures: 8,192 responses a rollout, 512 a step, 10,400 steps, a new reference every 400."""
    config = RLStage.model_construct(rollout=RolloutConfig())
    responses, updates = config.rollout.num_prompts * config.rollout.group_size, UpdateConfig().num_minibatches
    assert (responses, responses / updates, updates * RLStage.model_fields["steps"].default) == (8192, 512, 10_400)
    assert updates * (AlgorithmConfig().reference_refresh_steps or 0) == 400


def test_what_the_errors_about_advantages_advise(run):
    run("rollout.group_size=1", "algorithm.baseline=none", "algorithm.normalize_std=false")
    run("algorithm.kl_in=reward", "algorithm.normalize_std=false")
    run("algorithm.kl_in=reward", "algorithm.kl_coefficient=0")


def test_what_the_errors_about_moments_advise(run):
    aware = ("optimizer.precision_aware=true", "model.dtype=bfloat16")
    run(*aware, "optimizer.beta2=0.999", "optimizer.exp_avg_sq_dtype=float32")
    run(*aware, "optimizer.beta1=0.996", "optimizer.beta2=0.996")  # 2^-8 is 0.0039


def test_what_the_errors_about_kept_ids_advise(run):
    run("rollout.top_k=2000", "rollout.max_kept_ids=2000", "rollout.min_p=0.05")
    run("rollout.top_p=0.9", "rollout.max_kept_ids=64", "algorithm.off_policy.max_divergence=1")
    run("rollout.top_p=0.9", "algorithm.old_log_probs=recompute", "algorithm.importance_cap=2")


def test_the_generators_layout_of_other_models():
    """What vLLM would assert or fail on in the midst of a start."""
    from types import SimpleNamespace

    def problems(hf, tp, ep=1, dcp=1, together=True):
        rollout = SimpleNamespace(engine="vllm", tp=tp, ep=ep, dp=None, dcp=dcp, max_num_seqs=1, max_batched_tokens=1)
        return "\n".join(generator_problems(rollout, max(tp, ep), hf, together=together))

    grouped = {
        "model_type": "qwen2",
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 1000,
    }
    assert problems(grouped, 2) == problems(grouped, 4) == ""  # two ranks hold a group each, or two share one
    assert "rollout.tp = 3 neither divides the model's num_key_value_heads = 2" in problems(grouped, 3)
    assert "rollout.ep = 2: a model without experts wants 1" in problems(grouped, 2, 2)
    experts = {
        "model_type": "deepseek_v3", "num_attention_heads": 12, "kv_lora_rank": 512, "num_key_value_heads": 1,
        "n_routed_experts": 16, "moe_intermediate_size": 20, "n_shared_experts": 2,
    }  # fmt: skip
    assert problems(experts, 4) == problems(experts, 4, 4) == problems(experts, 2, 16) == ""
    for model_type in ("deepseek_v2", "mixtral"):
        assert f"model_type {model_type!r} is not one of" in problems(experts | {"model_type": model_type}, 1)
    assert "rollout.tp = 12 does not divide the model's moe_intermediate_size = 20" in problems(experts, 12)
    assert "rollout.ep = 3 does not divide the model's n_routed_experts = 16; 2 would" in problems(experts, 3, 3)
    assert "n_shared_experts * moe_intermediate_size = 40" in problems(experts, 3, 3)
    assert "each samples at its own pace" in problems(experts, 2, 4, together=False) != problems(experts, 2, 4) == ""
    assert "rollout.tp = 3 does not divide the vocabulary, 1024 rows" in problems(
        grouped | {"num_key_value_heads": 3}, 3
    )


def test_all_problems_at_once(run):
    with pytest.raises(ConfigError) as caught:
        run("parallel.tp=3", "data.prompts=[gone.jsonl]", "update.num_minibatches=3", world=3)
    assert len(str(caught.value).splitlines()) >= 3


def test_tokenizer_must_be_there_and_fit_the_vocabulary(run, tmp_path):
    tokenizer = tmp_path / "hf/tokenizer.json"
    for content, message in (
        (
            {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 448, "content": "<x>"}]},
            r"ids up to 448.*vocab_size is 448",
        ),
        ({"model": {"vocab": [["a", 0.0]] * 449}}, r"ids up to 448"),
        ({"model": {"vocab": {"a": 448}}}, r"at most 448 tokens"),
    ):
        tokenizer.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            run()
    tokenizer.unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        run()


@pytest.mark.parametrize(
    ("hf", "context"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        # published configs: DeepSeek-V3, Qwen2.5 with the YaRN of its model card, Llama 3.1
        ({"max_position_embeddings": 163840,
          "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}}, 163840),
        ({"max_position_embeddings": 32768,
          "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 131072,
          "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072),
        ({}, None),
    ],
)  # fmt: skip
def test_context_length(hf, context):
    assert context_length(hf) == context


def test_partial_rollouts_and_kept_ids_are_of_reinforcement_learning():
    overrides = ["rollout.partial.overdraw=2", "rollout.top_p=0.9", "rollout.max_kept_ids=64"]
    problems = list(load_config(Path("configs/nano/cold_start.yaml"), overrides).problems(NANO, 1))
    for key, advice in (("partial", "leave it out"), ("max_kept_ids", "leave it out, or set rollout.top_k")):
        assert any(f"rollout.{key} is of RL" in problem and advice in problem for problem in problems)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["rollout.quantization=fp8"], "rollout.quantization = fp8 is of RL"),
        (["rollout.kv_cache_dtype=fp8", "rollout.engine=transformers"], "rollout.kv_cache_dtype are vLLM's"),
    ],
)
def test_data_are_not_made_in_another_precision_than_asked_for(overrides, problem):
    config = load_config(Path("configs/nano/cold_start.yaml"), overrides)
    assert any(problem in found for found in config.problems(NANO, 1))
