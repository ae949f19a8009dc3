"""The proof of a transfer in bfloat16: rounding and ties of routers stop no run, wrong weights do.

Pairs are vLLM and transformers, both in bfloat16. The weights are random and enlarged until log-probs spread as a
trained model's do; every judgement is made on many sets of sequences, so that both error rates are counted.
"""

from __future__ import annotations

import re

import pytest
import torch

from r1mega.errors import WeightSyncError
from r1mega.platform import groups
from r1mega.rollout.transformers_engine import TransformersEngine
from r1mega.rollout.vllm_engine import VllmEngine
from r1mega.weights import verify
from r1mega.weights.transfer import DigestTap, checkpoint_tensors
from tests.unit.rollout.tiny_models import MODELS, checkpoint, settings

pytestmark = pytest.mark.heavy

LIMIT, SETS = verify.PROBE_LIMITS[torch.bfloat16], 10
LAYER = "model.layers.2."


def spread_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Of the tiny DeepSeek model: experts and attention that matter, a head that is sure of some tokens."""
    factors = {
        r"lm_head\.weight": 16.0,
        r".*o_proj\.weight": 2.0,
        r".*mlp\.gate\.weight": 4.0,
        r".*experts\.\d+\.down_proj\.weight": 8.0,
    }
    return {
        name: tensor * next((factor for names, factor in factors.items() if re.fullmatch(names, name)), 1.0)
        for name, tensor in checkpoint_tensors(checkpoint("deepseek", seed))
    }


class Pair:
    """A generator and a trainer with the same weights; sets of sequences with the trainer's log-probs of them."""

    def __init__(self):
        self.engine = VllmEngine(settings("deepseek", dtype="bfloat16", kv_cache_bytes=32 << 20))
        self.trainer = TransformersEngine(settings("deepseek", dtype="bfloat16"))
        self.trainer.update_weights(spread_weights().items())
        lengths = [20 + i % 12 for i in range(verify.NUM_SEQUENCES[torch.bfloat16])]
        vocabulary = MODELS["deepseek"]["vocab_size"]
        self.sets = [verify.made_up_sequences(lengths, vocabulary, seed) for seed in range(SETS)]
        self.expected = [self.trainer.prompt_log_probs(sequences) for sequences in self.sets]

    def push(self, tensors: dict[str, torch.Tensor]) -> None:
        """Pushes and compares digests, as a transfer does."""
        tap = DigestTap(torch.bfloat16, self.engine.config)
        self.engine.update_weights(tap(tensors.items()))
        verify.compare_digests(tap.digest, self.engine.weights_digest())

    def refusals(self) -> int:
        """How many of the sets' probes fail."""
        count = 0
        for sequences, expected in zip(self.sets, self.expected, strict=True):
            try:
                verify.probe(self.engine, sequences, expected, LIMIT)
            except WeightSyncError:
                count += 1
        return count


@pytest.fixture(scope="module")
def pair():
    groups.init_distributed()
    torch.set_num_threads(1)
    made = Pair()
    yield made
    made.engine.close()
    groups.destroy()


def test_a_healthy_pair_is_never_stopped_though_routers_part(pair):
    pair.push(spread_weights())
    results = [verify.probe(pair.engine, *each, LIMIT) for each in zip(pair.sets, pair.expected, strict=True)]
    assert min(result.max_difference for result in results) > 0.6, "an expert is chosen differently in every set"
    assert max(result.outlier_fraction for result in results) < 0.06, results


def swap_experts(tensors):
    for kind in ("gate", "up", "down"):
        a, b = (f"{LAYER}mlp.experts.{expert}.{kind}_proj.weight" for expert in (1, 6))
        tensors[a], tensors[b] = tensors[b], tensors[a]


def miss_a_layer(tensors):
    """The layer keeps what it had before: here, another model's."""
    tensors.update({name: tensor for name, tensor in spread_weights(1).items() if name.startswith(LAYER)})


def permute_rows(tensors):
    name = "model.layers.0.self_attn.q_b_proj.weight"
    tensors[name] = tensors[name].roll(1, 0)


def transpose(tensors):
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].T.reshape(tensors[name].shape)


@pytest.mark.parametrize("fault", [swap_experts, miss_a_layer, permute_rows, transpose])
def test_a_wrong_export_is_found(pair, fault):
    """What is sent is wrong, and digested as it was sent: the bits agree, what is computed does not."""
    tensors = spread_weights()
    fault(tensors)
    pair.push(tensors)
    assert pair.refusals() == SETS


def test_a_layer_that_computes_with_old_weights_is_found(pair):
    """The parameters are read back while they are plain; what the kernels then use may be a packed copy."""
    pair.push(spread_weights(1))
    layer = pair.engine._worker.model_runner.model.model.layers[1].self_attn.o_proj
    product, weight = (
        layer.cpu_linear,
        layer.weight.detach().clone(),
    )  # empty where the packed copy is the product's own
    pair.push(spread_weights())
    layer.cpu_linear = product
    layer.weight.data.copy_(weight)
    assert pair.refusals() == SETS


@pytest.mark.parametrize("kind", ["W_UV", "W_UK_T"])
def test_a_matrix_that_was_not_derived_anew_is_found_by_its_bits(pair, kind, monkeypatch):
    """No digest is of it, and a small one may stay within what bfloat16 allows the probe."""
    pair.push(spread_weights(1))
    attention = pair.engine._worker.model_runner.model.model.layers[3].self_attn.mla_attn.mla_attn
    stale, finish = getattr(attention, kind).detach().clone(), pair.engine._target.platform.finish_reload

    def forgetting(worker):
        finish(worker)
        getattr(attention, kind).data.copy_(stale)

    with monkeypatch.context() as patch:
        patch.setattr(pair.engine._target.platform, "finish_reload", forgetting)
        with pytest.raises(WeightSyncError, match=rf"layers\.3\.self_attn\.mla_attn\.mla_attn\.{kind}$"):
            pair.push(spread_weights())
    pair.push(spread_weights())


def test_stale_matrices_of_decoding_are_found_by_decoding(pair):
    pair.push(spread_weights())
    attention = pair.engine._worker.model_runner.model.model.layers[1].self_attn.mla_attn.mla_attn
    attention.W_UV.data.mul_(-1)
    assert pair.refusals() == SETS
    pair.push(spread_weights())


def test_one_value_that_is_not_finite_is_a_fault(pair):
    pair.push(spread_weights())
    expected = [list(values) for values in pair.expected[0]]
    for value in (float("nan"), float("-inf")):
        expected[0][3] = value
        with pytest.raises(WeightSyncError, match="sequence 0, token 4"):
            verify.probe(pair.engine, pair.sets[0], expected, LIMIT, decode_tokens=0)
