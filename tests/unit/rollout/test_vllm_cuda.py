"""`platform.vllm_cuda` on a real vLLM model (see cuda_on_cpu.py): weights reloaded and rewritten, sleep at both levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from r1mega.errors import PlatformError
from r1mega.platform import groups, vllm_cuda
from r1mega.rollout.vllm_engine import VllmEngine
from r1mega.weights import verify
from r1mega.weights.layout import GeneratorRank, generator_layout, weight_dtype
from r1mega.weights.transfer import DigestTap, checkpoint_tensors
from tests.unit.rollout import cuda_on_cpu
from tests.unit.rollout.tiny_models import checkpoint, greedy_requests, hf_logits, prompt, sampled_requests, settings

pytestmark = pytest.mark.heavy

MODELS = [("deepseek", "float32"), ("deepseek", "bfloat16"), ("qwen3_tied", "float32"), ("qwen2", "bfloat16")]


@pytest.fixture(scope="module", autouse=True)
def process_group():
    groups.init_distributed()
    torch.set_num_threads(1)
    yield
    groups.destroy()


@pytest.fixture
def build(monkeypatch):
    """(engine, its allocator), by model, seed of its weights, and dtype."""
    engines = []

    def make(name: str, seed: int, dtype: str):
        allocator = cuda_on_cpu.install(monkeypatch)
        engines.append(VllmEngine(settings(name, seed, dtype=dtype, kv_cache_bytes=32 << 20)))
        return engines[-1], allocator

    yield make
    for engine in engines:
        engine.close()


def answers(engine: VllmEngine):
    """Prefill and decode, greedy and sampled: tokens and log-probs."""
    return engine.generate([*greedy_requests(3), *sampled_requests(3)])


def model_of(engine: VllmEngine) -> torch.nn.Module:
    return engine._worker.model_runner.get_model()


def addresses(engine: VllmEngine) -> dict[str, int]:
    """What a CUDA graph has captured: where parameters and buffers are."""
    tensors = (*model_of(engine).named_parameters(remove_duplicate=False), *model_of(engine).named_buffers())
    return {name: tensor.data_ptr() for name, tensor in tensors}


def gathered(engine: VllmEngine, seed: int) -> None:
    """Whole tensors through the loaders: begin_reload, load_weights, finish_reload."""
    tap = DigestTap(getattr(torch, engine.settings.dtype), engine.config)
    path = checkpoint(engine.settings.model_path.name.rpartition("_")[0], seed)
    engine.update_weights(tap(checkpoint_tensors(path)))
    verify.compare_digests(tap.digest, engine.weights_digest())


def written(engine: VllmEngine, seed: int, leave_out: str | None = None) -> None:
    """Shards into the parameters: begin_write, finish_write."""
    path = checkpoint(engine.settings.model_path.name.rpartition("_")[0], seed)
    tensors = dict(checkpoint_tensors(path))

    with engine.parameters_for_writing() as parameters, torch.no_grad():
        for place in generator_layout(engine.config, GeneratorRank()):
            if place.name != leave_out:
                value = tensors[place.name].to(weight_dtype(place.name, getattr(torch, engine.settings.dtype)))
                place.read(parameters).copy_(value[tuple(slice(*region) for region in place.source)])


@pytest.mark.parametrize(("name", "dtype"), MODELS)
def test_weights_dropped_and_pushed_equal_a_fresh_engine(build, name, dtype):
    """Both strategies, after a sleep that dropped the weights and after one that kept them, bit for bit; nothing that was
    made while the model was loaded keeps what the sleep left in it, and everything stays where a CUDA graph has it."""
    fresh = {}
    for seed in (0, 1):
        other, _ = build(name, seed, dtype)
        fresh[seed] = answers(other)
        other.close()
    assert fresh[0] != fresh[1]
    engine, allocator = build(name, 0, dtype)
    before = addresses(engine)
    for push, seed, keep in ((gathered, 1, False), (written, 0, False), (gathered, 1, True), (written, 0, True)):
        engine.sleep(keep_weights=keep)
        assert bool(allocator.unwritten(model_of(engine))) is not keep
        push(engine, seed)
        assert not allocator.unwritten(model_of(engine))
        engine.wake_up()
        assert not allocator.unwritten(model_of(engine))
        assert answers(engine) == fresh[seed]
        assert addresses(engine) == before
    engine.sleep()
    engine.wake_up()
    assert answers(engine) == fresh[0]
    if dtype == "float32":  # the stand-in's layers compute what they should
        sequence = prompt(30)
        expected = hf_logits(name, sequence)[:-1].log_softmax(-1)[range(len(sequence) - 1), sequence[1:]]
        assert np.abs(expected.numpy() - engine.prompt_log_probs([sequence])[0]).max() <= 2e-4


def test_what_a_push_or_a_wake_up_leaves_out_is_found(build, monkeypatch):
    """The check above can fail: a parameter that nobody writes, buffers that vLLM does not restore."""
    from vllm.v1.worker.gpu_worker import Worker

    engine, allocator = build("deepseek", 0, "float32")
    engine.sleep(keep_weights=False)
    written(engine, 0, leave_out="model.layers.1.self_attn.kv_b_proj.weight")
    lost = " ".join(allocator.unwritten(model_of(engine)))
    assert "layers.1.self_attn.kv_b_proj.weight" in lost and "W_UV" in lost and "layers.2" not in lost
    gathered(engine, 0)
    engine.wake_up()
    restore = Worker.wake_up

    def forgetful(self, tags=None):
        self._sleep_saved_buffers = {}
        restore(self, tags)

    monkeypatch.setattr(type(engine._worker), "wake_up", forgetful)
    engine.sleep(keep_weights=False)
    gathered(engine, 0)
    assert any("cos_sin_cache" in name for name in allocator.unwritten(model_of(engine)))


def test_a_derived_tensor_of_another_form_is_refused(build, monkeypatch):
    """A graph would go on with the old one."""
    engine, _ = build("deepseek", 0, "float32")
    attention = model_of(engine).model.layers[1].self_attn.mla_attn.mla_attn
    derive = type(attention).process_weights_after_loading

    def other(self, dtype):
        derive(self, dtype)
        self.W_UV = torch.nn.Parameter(self.W_UV.double(), requires_grad=False)

    monkeypatch.setattr(type(attention), "process_weights_after_loading", other)
    with pytest.raises(PlatformError, match="W_UV changed"):
        written(engine, 0)


def test_environment(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    vllm_cuda.prepare_environment()  # vLLM's pools switch them off by themselves
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(PlatformError, match="unset it"):
        vllm_cuda.prepare_environment()
