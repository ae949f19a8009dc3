"""Weights pushed into a running vLLM engine: exact, complete, and every fault found by the digest or the probe."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from r1mega.config.schema import WeightsConfig
from r1mega.errors import ConfigError, GenerationError, WeightSyncError
from r1mega.platform import groups
from r1mega.rollout.transformers_engine import TransformersEngine
from r1mega.rollout.vllm_engine import VllmEngine
from r1mega.weights import verify
from r1mega.weights.layout import generator_layout, is_ignored
from r1mega.weights.sync import WeightSync
from r1mega.weights.transfer import DigestTap, bucketed, build_transfer, checkpoint_tensors
from tests.unit.rollout.tiny_models import checkpoint, greedy_requests, prompt, sampled_requests, settings

pytestmark = pytest.mark.heavy

FAMILIES = ["deepseek", "qwen3_tied", "qwen3_moe", "llama", "qwen2"]
STRICT = verify.PROBE_LIMITS[torch.float32]
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def engines():
    groups.init_distributed()
    torch.set_num_threads(1)
    built = {}

    def get(name: str, seed: int = 0, **changes) -> VllmEngine:
        key = (name, seed, *changes.items())
        if key not in built:
            built[key] = VllmEngine(settings(name, seed, kv_cache_bytes=32 << 20, **changes))
        return built[key]

    yield get
    for engine in built.values():
        engine.close()
    groups.destroy()


def weights(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(checkpoint_tensors(checkpoint(name, seed)))


def push(engine: VllmEngine, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Pushes and compares digests; the sender's."""
    tap = DigestTap(torch.float32, engine.config)
    engine.update_weights(tap(tensors.items()))
    verify.compare_digests(tap.digest, engine.weights_digest())
    return tap.digest


def answers(engine: VllmEngine):
    """Prefill and decode, greedy and sampled, tokens and log-probs."""
    return engine.generate([*greedy_requests(3), *sampled_requests(3)])


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_exact(engines, name):
    """A -> B -> A -> B in one engine gives bitwise what two fresh engines give."""
    engine = engines(name)
    fresh = {seed: answers(VllmEngineOnce(name, seed)) for seed in (0, 1)}
    assert fresh[0] != fresh[1]
    for seed in (1, 0, 1, 0):
        push(engine, weights(name, seed))
        assert answers(engine) == fresh[seed]


class VllmEngineOnce:
    """An engine that lives for one call of `generate`."""

    def __init__(self, name: str, seed: int):
        self._settings = settings(name, seed, kv_cache_bytes=32 << 20)

    def generate(self, requests):
        engine = VllmEngine(self._settings)
        try:
            return engine.generate(requests)
        finally:
            engine.close()


@pytest.mark.parametrize("name", [*FAMILIES, "kimi_k2"])
def test_layout_names_vllms_own_parameters(engines, name):
    """Placements fit inside parameters as vLLM made them, and together fill all of them but vocabulary padding."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    engine, covered = engines(name), {}
    model = engine._worker.model_runner.model
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters() if "mla_attn.mla_attn" not in key}
    for prefix, module in model.named_modules():  # the shapes that packed parameters had
        for key, meta in get_layerwise_info(module).restore_metadata[0].items():
            shapes[f"{prefix}.{key}"] = tuple(meta.shape)
    for p in generator_layout(engine.config):
        assert all(stop <= size for (_, stop), size in zip(p.target, shapes[p.parameter], strict=True)), p
        covered[p.parameter] = covered.get(p.parameter, 0) + torch.Size([b - a for a, b in p.target]).numel()
    tied = {"lm_head.weight"} if name == "qwen3_tied" else set()
    assert set(covered) == set(shapes) - tied
    padded = {key for key in covered if torch.Size(shapes[key]).numel() != covered[key]}
    assert padded <= {"model.embed_tokens.weight", "lm_head.weight"}


def test_bucket_size_order_and_dtype_do_not_matter(engines):
    engine, tensors = engines("deepseek"), weights("deepseek", 1)
    expected = push(engine, tensors)
    small = engines("deepseek", bucket_bytes=5000)
    assert push(small, dict(reversed(tensors.items()))) == expected
    assert answers(small) == answers(engine)
    assert push(small, {name: tensor.double() for name, tensor in tensors.items()}) == expected


def test_buckets_are_bounded_and_drawn_lazily():
    drawn = []

    def source():
        for i, size in enumerate([4, 4, 4, 40, 1, 1]):
            drawn.append(i)
            yield str(i), torch.zeros(size, dtype=torch.float32)

    buckets = bucketed(source(), 40)
    assert [name for name, _ in next(buckets)] == ["0", "1"]
    assert drawn == [0, 1, 2]  # one ahead, no more
    assert [[name for name, _ in bucket] for bucket in buckets] == [["2"], ["3"], ["4", "5"]]


def test_tensors_that_the_generator_does_not_use_are_skipped(engines):
    tensors = weights("deepseek")
    extra = {
        "model.layers.4.eh_proj.weight": torch.ones(64, 128),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    assert all(is_ignored(name, engines("deepseek").config) for name in extra)
    assert push(engines("deepseek"), tensors | extra) == push(engines("deepseek"), tensors)


def faults() -> dict[str, object]:
    """What can go wrong between the sender's digest and the generator, by the names that must be reported."""
    experts = "model.layers.2.mlp.experts."
    square = "model.layers.1.self_attn.o_proj.weight"

    def swap(tensors):
        a, b = f"{experts}1.up_proj.weight", f"{experts}6.up_proj.weight"
        tensors[a], tensors[b] = tensors[b], tensors[a]
        return a, b

    def permute(tensors):
        name = "model.layers.0.self_attn.q_b_proj.weight"
        tensors[name] = tensors[name].roll(1, 0)
        return (name,)

    def transpose(tensors):
        tensors[square] = tensors[square].T.reshape(tensors[square].shape)
        return (square,)

    def flip_bit(tensors):
        name = "lm_head.weight"
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.int32)[95, 63] ^= 1
        return (name,)

    def drop_bias(tensors):
        tensors[BIAS] = torch.zeros_like(tensors[BIAS])
        return (BIAS,)

    def swap_halves(tensors):
        a, b = f"{experts}3.gate_proj.weight", f"{experts}3.up_proj.weight"
        tensors[a], tensors[b] = tensors[b], tensors[a]
        return a, b

    return {
        "swapped experts": swap,
        "permuted rows": permute,
        "transposed": transpose,
        "one bit": flip_bit,
        "lost expert bias": drop_bias,
        "gate and up exchanged": swap_halves,
    }


@pytest.mark.parametrize("kind", faults())
def test_digest_names_the_faulty_tensors(engines, kind):
    """The fault happens after the sender's tap, on the way into the generator."""
    engine, tensors = engines("deepseek"), weights("deepseek")
    tap = DigestTap(torch.float32, engine.config)
    sent = dict(tap(tensors.items()))
    names = faults()[kind](sent)
    engine.update_weights(sent.items())
    with pytest.raises(WeightSyncError) as raised:
        verify.compare_digests(tap.digest, engine.weights_digest())
    assert all(name in str(raised.value) for name in names)
    assert f"{len(names)} of {len(tensors)} tensors" in str(raised.value)
    push(engine, tensors)


@pytest.mark.parametrize("kind", [kind for kind in faults() if kind != "one bit"])
def test_probe_sees_a_wrong_export(engines, kind):
    """The fault is in what the sender digests too, so that only the computed log-probs can tell."""
    engine, tensors = engines("deepseek"), weights("deepseek")
    faults()[kind](tensors)
    push(engine, tensors)
    sequences = [prompt(20), prompt(30)]
    with pytest.raises(WeightSyncError, match="sequence"):
        verify.probe(engine, sequences, trainer_log_probs("deepseek", sequences), STRICT)


def trainer_log_probs(name: str, sequences):
    trainer = TransformersEngine(settings(name))
    return trainer.prompt_log_probs(sequences)


def test_a_stale_generator_fails_both_proofs(engines):
    engine = engines("deepseek")
    push(engine, weights("deepseek", 1))
    tap = DigestTap(torch.float32, engine.config)
    list(tap(weights("deepseek").items()))  # the trainer moved on, nothing was pushed
    with pytest.raises(WeightSyncError, match="digest"):
        verify.compare_digests(tap.digest, engine.weights_digest())
    sequences = [prompt(20)]
    with pytest.raises(WeightSyncError, match="sequence 0, token"):
        verify.probe(engine, sequences, trainer_log_probs("deepseek", sequences), STRICT)


def test_probe_sees_what_is_stale_in_decoding_only(engines):
    """MLA decodes with matrices derived from kv_b_proj; prompts never read them."""
    engine = engines("deepseek")
    push(engine, weights("deepseek"))
    sequences = [prompt(20)]
    expected = trainer_log_probs("deepseek", sequences)
    assert verify.probe(engine, sequences, expected, STRICT).decode_difference <= 2e-4
    attention = engine._worker.model_runner.model.model.layers[1].self_attn.mla_attn.mla_attn
    attention.W_UV.data.mul_(1.5)
    assert verify.probe(engine, sequences, expected, STRICT, decode_tokens=0).max_difference <= 2e-4
    with pytest.raises(WeightSyncError, match="decoded"):
        verify.probe(engine, sequences, expected, STRICT)
    push(engine, weights("deepseek"))
    verify.probe(engine, sequences, expected, STRICT)


def test_probe_does_not_take_nan_for_agreement(engines):
    engine = engines("deepseek")
    push(engine, weights("deepseek"))
    expected = [list(values) for values in trainer_log_probs("deepseek", [prompt(20)])]
    expected[0][3] = float("nan")
    with pytest.raises(WeightSyncError, match="token 4"):
        verify.probe(engine, [prompt(20)], expected, STRICT)


def test_incomplete_and_misshapen_updates_are_all_named_and_leave_no_usable_engine(engines):
    engine, tensors = engines("deepseek"), weights("deepseek")
    norm, up = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.experts.0.up_proj.weight"
    bad = dict(tensors) | {up: tensors[up].T.contiguous(), "model.layers.0.mlp.bogus": torch.ones(2)}
    bad.pop(norm)
    with pytest.raises(WeightSyncError) as raised:
        engine.update_weights([*bad.items(), ("lm_head.weight", tensors["lm_head.weight"])])
    text = str(raised.value)
    for part in (f"{norm}: missing", f"{up}: shape [64, 32], expected [32, 64]", "bogus", "lm_head.weight: sent twice"):
        assert part in text
    assert text.count("missing") == 1
    with pytest.raises(GenerationError, match="no weights"):
        engine.generate(greedy_requests(1))
    push(engine, tensors)
    assert answers(engine) == answers(engines("deepseek", 0, bucket_bytes=1 << 20))


def test_a_write_that_fails_leaves_a_generator_without_weights(engines):
    engine, tensors = engines("deepseek"), weights("deepseek")
    push(engine, tensors)
    expected = answers(engine)
    with pytest.raises(RuntimeError, match="half-way"), engine.parameters_for_writing() as parameters:
        parameters["model.norm.weight"].data.zero_()
        raise RuntimeError("half-way")
    with pytest.raises(GenerationError, match="no weights"):
        engine.generate(greedy_requests(1))
    push(engine, tensors)
    assert answers(engine) == expected


def test_direct_into_an_engine_that_cannot_be_written_is_refused():
    engine, config = TransformersEngine(settings("qwen3_tied")), WeightsConfig(strategy="direct")
    with pytest.raises(ConfigError, match="set rollout.engine=vllm, or gather"):
        build_transfer(SimpleNamespace(dtype=torch.float32), engine, config, engine.config)


def test_compare_names_both_sides_of_a_missing_tensor():
    with pytest.raises(WeightSyncError) as raised:
        verify.compare_digests({"a": 1, "b": 2}, {"b": 2, "c": 3})
    assert "c: the trainer did not send it" in str(raised.value) and "a: the generator does not" in str(raised.value)


@pytest.mark.parametrize("name", ["deepseek", "qwen3_tied"])
def test_transformers_engine_proves_its_weights_too(name):
    engine = TransformersEngine(settings(name))
    tap = DigestTap(torch.float32, engine.config)
    engine.update_weights(tap(weights(name, 1).items()))
    verify.compare_digests(tap.digest, engine.weights_digest())
    broken = weights(name, 1)
    del broken["model.norm.weight"]
    with pytest.raises(WeightSyncError, match="model.norm.weight: missing"):
        engine.update_weights(broken.items())


def test_cost_of_a_push_and_its_digests(engines):
    """0.8M parameters, 127 tensors: at most a quarter of a second of CPU time, digests of both sides included."""
    engine, tensors = engines("deepseek"), weights("deepseek")
    assert sum(tensor.numel() for tensor in tensors.values()) > 500_000
    times = []
    for _ in range(5):
        start = time.thread_time()  # gloo's threads wake up beside it
        push(engine, tensors)
        times.append(time.thread_time() - start)
    assert min(times) <= 0.25, times  # 25 to 50 ms on a quiet machine, 115 where other tests share the core


class Bfloat16Policy:
    """What a push asks of a policy, by transformers; with a head that is surer of its tokens."""

    dtype, fp8, chunks = torch.bfloat16, False, ()

    def __init__(self, name: str):
        given = weights(name).items()
        self._weights = {key: (value * (2 if key == "lm_head.weight" else 1)).to(self.dtype) for key, value in given}
        self._model = TransformersEngine(settings(name, dtype="bfloat16"))
        self._model.update_weights(self._weights.items())

    def hf_tensors(self):
        return self._weights.items()

    def sequence_log_probs(self, sequences):
        return self._model.prompt_log_probs(sequences)


def test_a_push_beside_an_8_bit_cache_is_proved(engines):
    """Its log-probs are further from the policy's than bfloat16's; those of another model are refused."""
    policy, engine = Bfloat16Policy("llama"), engines("llama", dtype="bfloat16", kv_cache_dtype="fp8")
    config, prompts = WeightsConfig(strategy="gather"), [prompt(30)] * 32
    sync = WeightSync(policy, engine, config, engine.config, prompts)
    assert 0.15 < sync.push()["weights/probe_diff_max"] < 1.5
    assert sync._limit == verify.ProbeLimit(0.4, share=0.9, beyond=4.0)  # of both of the generator's paths
    with pytest.raises(WeightSyncError, match=r"differ by more than 0\.15, where 10% may"):
        verify.probe(engine, sync._sequences, sync._log_probs[0], verify.PROBE_LIMITS[torch.bfloat16])
    policy.sequence_log_probs = TransformersEngine(settings("llama", 1, dtype="bfloat16")).prompt_log_probs
    with pytest.raises(WeightSyncError, match=r"differ by more than 0\.4, where 10% may"):
        WeightSync(policy, engine, config, engine.config, prompts).push()
