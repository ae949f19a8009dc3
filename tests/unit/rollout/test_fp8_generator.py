"""A generator in FP8 (vLLM's own Fp8Config, parameters and loaders, see cuda_on_cpu.py): what a push leaves in it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from r1mega.checkpoint.fp8_blocks import SCALE, dequantize
from r1mega.errors import GenerationError, PlatformError, WeightSyncError
from r1mega.platform import groups
from r1mega.rollout.precision import check_precision
from r1mega.rollout.vllm_arguments import check_settings
from r1mega.rollout.vllm_engine import VllmEngine
from r1mega.weights import verify
from r1mega.weights.exchange import Exchange
from r1mega.weights.layout import tensor_shapes, weight_dtype
from r1mega.weights.plan import GeneratorLayout, Plan
from r1mega.weights.quantize import QuantizedParameters, quantized_parts, quantized_tensors
from r1mega.weights.trainer_layout import TrainerLayout
from r1mega.weights.transfer import DigestTap, checkpoint_tensors
from tests.unit.rollout import cuda_on_cpu
from tests.unit.rollout.tiny_models import checkpoint, greedy_requests, prompt, settings
from tests.unit.weights.brute_force import Elements, trainer_parameters

pytestmark = pytest.mark.heavy

MODEL = "deepseek_blocks"
FP8 = {"dtype": "bfloat16", "quantization": "fp8", "weights": "empty", "kv_cache_bytes": 32 << 20}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    groups.init_distributed()
    torch.set_num_threads(1)
    yield
    groups.destroy()


@pytest.fixture
def built(monkeypatch):
    """Of a tiny model's name: (engine, its allocator)."""
    allocator, engines = cuda_on_cpu.install_fp8(monkeypatch), []

    def make(name: str) -> tuple[VllmEngine, cuda_on_cpu.Allocator]:
        engines.append(VllmEngine(settings(name, **FP8)))
        return engines[-1], allocator

    yield make
    for engine in engines:
        engine.close()


def trained(engine: VllmEngine, seed: int) -> dict[str, torch.Tensor]:
    """A trainer's weights of that model by HF names."""
    name = engine.settings.model_path.name.removesuffix("_0")
    return {
        key: tensor.to(weight_dtype(key, torch.bfloat16)) for key, tensor in checkpoint_tensors(checkpoint(name, seed))
    }


def direct(engine: VllmEngine, seed: int) -> None:
    """Blocks quantised in the trainer's parameters and written into vLLM's."""
    config, trainer = engine.config, TrainerLayout(1, 1, 1, 1, 1, 1, (0,) * engine.config["num_hidden_layers"])
    plan = Plan(config, trainer, GeneratorLayout(1, fp8=True), model_dtype=torch.bfloat16, bucket_bytes=1 << 18)
    exchange = Exchange(plan.copies(0), 0, torch.bfloat16, fp8=True)
    parameters = trainer_parameters(config, trainer, 0, Elements(trained(engine, seed), torch.zeros(0)))
    parts = quantized_parts(trainer, tensor_shapes(config, fp8=True), config, 0)
    with engine.parameters_for_writing() as targets:
        exchange.run(QuantizedParameters(parameters, parts, 1 << 18), targets)


def loaded(engine: VllmEngine, seed: int) -> dict[str, int]:
    """What the FP8 checkpoint in its published form holds, through vLLM's loader; its digest."""
    tap = DigestTap(torch.bfloat16, engine.config, fp8=True)
    engine.update_weights(tap(trained(engine, seed).items()))
    return tap.digest


def held(engine: VllmEngine) -> dict[str, bytes]:
    """Every parameter, by its bits."""
    named = engine._worker.model_runner.get_model().named_parameters(remove_duplicate=False)
    return {name: value.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, value in named}


@pytest.mark.parametrize("name", [MODEL, "qwen3_blocks"])
def test_a_push_equals_loading_the_published_form(built, name):
    """By both strategies, after a sleep that dropped the weights: parameters, scales, W_UV and W_UK_T bit for bit, digests,
    answers; what it computes is what transformers computes with the dequantised weights.
    """
    engine, allocator = built(name)
    addresses = {name: value.data_ptr() for name, value in engine._worker.model_runner.get_model().named_parameters()}
    states, answers, digest = [], [], {}
    for push in (loaded, direct):
        engine.sleep(keep_weights=False)
        digest = push(engine, 0) or digest
        engine.wake_up()
        unwritten = allocator.unwritten(engine._worker.model_runner.get_model())
        assert all(lost.endswith("_scale_cpu") for lost in unwritten)  # in host memory on a GPU too: sleep leaves them
        verify.compare_digests(digest, engine.weights_digest())
        states.append(held(engine))
        answers.append(engine.generate(greedy_requests(2)))
    assert states[0] == states[1] and answers[0] == answers[1]
    kinds = {name.rpartition(".")[2] for name in states[0]}
    latent = {"w13_weight_scale_inv", "w2_weight_scale_inv", "W_UV", "W_UK_T"}
    assert {"weight_scale_inv", *(latent if name == MODEL else ())} <= kinds
    now = engine._worker.model_runner.get_model().named_parameters()
    assert {name: value.data_ptr() for name, value in now} == addresses
    sequence = prompt(30)
    found = np.array(engine.prompt_log_probs([sequence])[0])
    expected = reference_log_probs(engine, sequence)
    assert np.quantile(np.abs(found - expected), 0.9) <= 0.15
    direct(engine, 1)
    engine.wake_up()
    other = np.array(engine.prompt_log_probs([sequence])[0])
    assert np.quantile(np.abs(other - expected), 0.9) > 0.3
    if name == MODEL:
        refused_without_derivation(engine)


def refused_without_derivation(engine: VllmEngine) -> None:
    """Decoding matrices that are not those of the quantised kv_b_proj."""
    (layer, *_) = (m for m in engine._worker.model_runner.get_model().modules() if getattr(m, "W_UV", None) is not None)
    kind, finish = type(layer), type(layer).process_weights_after_loading
    kind.process_weights_after_loading = lambda self, dtype: None
    try:
        with pytest.raises(WeightSyncError, match="W_UV"):
            direct(engine, 0)
    finally:
        kind.process_weights_after_loading = finish


@torch.no_grad()
def reference_log_probs(engine: VllmEngine, sequence) -> np.ndarray:
    """By transformers, in float32, with the weights that FP8 blocks stand for."""
    published = dict(quantized_tensors(trained(engine, 0).items()))
    plain = {
        name: dequantize(value, published[name + SCALE], torch.empty(value.shape))
        if name + SCALE in published
        else value.float()
        for name, value in published.items()
        if not name.endswith(SCALE)
    }
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(engine.settings.model_path / "config.json", directory)
        save_file({name: value.contiguous() for name, value in plain.items()}, Path(directory) / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        logits = model(torch.tensor([list(sequence)])).logits[0]
    return logits[:-1].log_softmax(-1)[range(len(sequence) - 1), sequence[1:]].double().numpy()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "set model.dtype=bfloat16"),
        ({"weights": "checkpoint"}, "weights that a trainer pushes"),
    ],
)
def test_what_an_fp8_generator_cannot_be(changes, message):
    chosen = settings(MODEL, **FP8 | changes)
    with pytest.raises(GenerationError, match=message):
        check_settings(chosen, {}, cuda_on_cpu.PLATFORM)


def test_deep_gemm_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "1")
    check_precision(settings(MODEL, **FP8 | {"quantization": None}), {})  # which it does not touch
    with pytest.raises(PlatformError, match="reorders the scales of FP8 weights.*unset it"):
        check_precision(settings(MODEL, **FP8), {})
