"""The generator layout against brute force (coverage, disjointness). Against vLLM itself: test_reload.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from r1mega.config.layout import GENERATED_MODEL_TYPES
from r1mega.errors import ConfigError
from r1mega.model.families import FAMILIES
from r1mega.weights.layout import GeneratorRank, generator_layout, is_ignored, weight_dtype
from tests.reference import DEEPSEEK, DENSE, KIMI, QWEN3_MOE, make_reference

CONFIGS = {
    "deepseek": DEEPSEEK,
    "deepseek_no_q_lora": DEEPSEEK | {"q_lora_rank": None},
    "kimi_k2": KIMI | {"n_routed_experts": 12},
    "llama_biased": DENSE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2_tied": DENSE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": DENSE | {"model_type": "qwen3", "head_dim": 24},
    "qwen3_moe": QWEN3_MOE | {"mlp_only_layers": [1]},
}
RANKS = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 4), (1, 4), (2, 4)]


def all_ranks(tp: int, ep: int) -> list[GeneratorRank]:
    return [GeneratorRank(tp, rank % tp, ep, rank % ep) for rank in range(max(tp, ep))]


def cells(region) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(start, stop) for start, stop in region)))


def test_what_is_trained_is_generated_but_for_one():
    assert set(FAMILIES) - set(GENERATED_MODEL_TYPES) == {"deepseek_v2"}
    assert set(GENERATED_MODEL_TYPES) < set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name):
    state = make_reference(CONFIGS[name], batch=1, length=2).state
    layout = generator_layout(CONFIGS[name])
    assert {p.name: p.shape for p in layout} == {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert len({p.name for p in layout}) == len(layout)


@pytest.mark.parametrize(("tp", "ep"), RANKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_element_has_one_owner(name, tp, ep):
    """Summed over the ranks, the owners' source regions cover each tensor exactly once: experts over all of them, the rest over
    those of each attention group."""
    covered: dict[str, torch.Tensor] = {}
    for place, rank in enumerate(all_ranks(tp, ep)):
        for p in generator_layout(CONFIGS[name], rank):
            count = covered.setdefault(p.name, torch.zeros(p.shape, dtype=torch.int32))
            if p.replica == 0 and (place < tp or (ep > 1 and ".mlp.experts." in p.name)):
                count[tuple(slice(start, stop) for start, stop in p.source)] += 1
    assert all(bool((count == 1).all()) for count in covered.values())


@pytest.mark.parametrize(("tp", "ep"), RANKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_targets_do_not_overlap_and_match_their_sources(name, tp, ep):
    for rank in all_ranks(tp, ep):
        taken: dict[str, torch.Tensor] = {}
        layout = generator_layout(CONFIGS[name], rank)
        extents: dict[str, list[int]] = {}
        for p in layout:
            stops = [stop for _, stop in p.target]
            extents[p.parameter] = [max(pair) for pair in zip(stops, extents.get(p.parameter, stops), strict=True)]
        for p in layout:
            taken.setdefault(p.parameter, torch.zeros(extents[p.parameter], dtype=torch.int32))
            taken[p.parameter][tuple(slice(start, stop) for start, stop in p.target)] += 1
            sizes = [stop - start for start, stop in p.target]
            assert sizes[len(sizes) - len(p.source) :] == [stop - start for start, stop in p.source]
        assert all(bool((count == 1).all()) for count in taken.values())  # no hole either


def test_vocabulary_padding_leaves_the_last_rank_with_less():
    """96 rows padded to 128: 64 + 32."""
    regions = [{p.name: p for p in generator_layout(DEEPSEEK, rank)}["lm_head.weight"] for rank in all_ranks(2, 1)]
    assert [p.source[0] for p in regions] == [(0, 64), (64, 96)]
    assert [p.target[0] for p in regions] == [(0, 64), (0, 32)]


def test_what_is_ignored_and_kept_in_float32():
    config = DEEPSEEK | {"tie_word_embeddings": True}
    assert is_ignored("model.layers.4.eh_proj.weight", DEEPSEEK)  # the multi-token-prediction layer
    assert is_ignored("lm_head.weight", config) and not is_ignored("lm_head.weight", DEEPSEEK)
    assert not is_ignored("model.layers.3.mlp.gate.weight", DEEPSEEK)
    assert weight_dtype("model.layers.3.mlp.gate.e_score_correction_bias", torch.bfloat16) == torch.float32
    assert weight_dtype("model.layers.3.mlp.gate.weight", torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "rank", "message"),
    [
        (DEEPSEEK | {"model_type": "gpt2"}, GeneratorRank(), "gpt2"),
        (DEEPSEEK, GeneratorRank(tp=3), "num_attention_heads = 4 over 3"),
        (DEEPSEEK, GeneratorRank(ep=3), "n_routed_experts = 8 over 3"),
        (QWEN3_MOE, GeneratorRank(ep=3), "num_experts = 8 over 3"),
        (DENSE | {"model_type": "qwen3", "attention_bias": True}, GeneratorRank(), "attention_bias"),
    ],
)
def test_impossible_layouts_say_which_number(config, rank, message):
    with pytest.raises(ConfigError, match=message):
        generator_layout(config, rank)
