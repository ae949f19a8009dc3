"""Names and slices: against hub names that transformers makes, and brute-force slicing of full tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.checkpoint.hf_state import export_hf, load_hf
from r1mega.checkpoint.name_rules import Coordinates, ModelShape, make_entry, to_full, to_local
from r1mega.errors import CheckpointError
from r1mega.model.build import build_model
from r1mega.platform import groups
from tests.reference import DEEPSEEK, Layout, ModelSettings, make_reference
from tests.unit.weights.brute_force import chunked

MTP = DEEPSEEK | {"num_nextn_predict_layers": 1, "num_hidden_layers": 2}


def shape_of(**changes) -> ModelShape:
    values = {
        "num_layers": 2,
        "num_mtp_layers": 0,
        "vocab_size": 13,
        "num_experts": 8,
        "num_kv_groups": 2,
        "queries_per_group": 3,
        "mla": False,
        "tied_embeddings": False,
    }
    return ModelShape(**(values | changes))


def place(rank: int, ranks: int, ep_rank: int = 0, ep: int = 1) -> Coordinates:
    return Coordinates(tp_rank=rank, tp=ranks, etp_rank=rank, etp=ranks, ep_rank=ep_rank, ep=ep)


@pytest.mark.parametrize(
    ("name", "layer", "hf_names"),
    [
        ("embedding.word_embeddings.weight", None, ("model.embed_tokens.weight",)),
        ("decoder.layers.0.self_attention.q_layernorm.weight", 5, ("model.layers.5.self_attn.q_norm.weight",)),
        (
            "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight",
            1,
            ("model.layers.1.mlp.experts.5.down_proj.weight",),
        ),
        (
            "decoder.layers.1.mlp.experts.linear_fc1.weight1",
            1,
            ("model.layers.1.mlp.experts.5.gate_proj.weight", "model.layers.1.mlp.experts.5.up_proj.weight"),
        ),
        (
            "decoder.layers.1.self_attention.linear_kv_up_proj.layer_norm_weight",
            1,
            ("model.layers.1.self_attn.kv_a_layernorm.weight",),
        ),
    ],
)
def test_names(name, layer, hf_names):
    assert make_entry(name, (8, 4), layer, shape_of(), place(0, 1, ep_rank=2, ep=4)).hf_names == hf_names


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(CheckpointError, match="linear_surprise"):
        make_entry("decoder.layers.0.mlp.linear_surprise.weight", (2, 2), 0, shape_of(), place(0, 1))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 3]),
    st.sampled_from([4, 8]),
    st.sampled_from(
        ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "self_attention.linear_qkv.weight", "input_layernorm.weight"]
    ),
)
def test_slices_join_to_the_whole(ranks, queries, kv_groups, suffix):
    model = shape_of(num_kv_groups=kv_groups, queries_per_group=queries)
    head, width = 2, 8
    rows = {"self_attention.linear_qkv.weight": (queries + 2) * kv_groups * head, "input_layernorm.weight": width}
    whole = [rows.get(suffix, 16), width] if "norm" not in suffix else [width]
    cut = 1 if suffix.endswith("fc2.weight") else 0
    local = [n // ranks if d == cut and "norm" not in suffix else n for d, n in enumerate(whole)]
    entries = [make_entry(f"decoder.layers.0.{suffix}", local, 0, model, place(r, ranks)) for r in range(ranks)]
    parts = [torch.randn(s) for s in entries[0].hf_shapes]
    shards = [to_local(parts, e, model, r, ranks) for r, e in enumerate(entries)]
    assert all(list(s.shape) == local for s in shards)
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, chunked(parts, entries[0].form, entries[0].dim, kv_groups, rank, ranks))
    joined = to_full(shards if entries[0].dim is not None else shards[:1], entries[0], model)
    assert all(torch.equal(a, b) for a, b in zip(joined, parts, strict=True))


def test_fused_qkv_is_grouped_as_attention_reads_it():
    """Brute force: local rows are, for each KV group, its query heads, then its key head, then its value head."""
    model, head = shape_of(num_kv_groups=4, queries_per_group=3), 2
    entry = make_entry("decoder.layers.0.self_attention.linear_qkv.bias", (20,), 0, model, place(1, 2))
    q, k, v = (torch.arange(n) + base for n, base in ((24, 0), (8, 100), (8, 200)))
    expected = []
    for group in (2, 3):
        for query in range(3):
            start = (group * 3 + query) * head
            expected += q[start : start + head].tolist()
        for tensor in (k, v):
            expected += tensor[group * head : (group + 1) * head].tolist()
    assert to_local([q, k, v], entry, model, 1, 2).tolist() == expected


def test_vocabulary_is_padded_with_zero_rows_and_cut_again():
    model = shape_of(vocab_size=13)
    entries = [make_entry("output_layer.weight", (4, 3), None, model, place(r, 4)) for r in range(4)]
    full = torch.randn(13, 3)
    shards = [to_local([full], e, model, r, 4) for r, e in enumerate(entries)]
    assert shards[3][1:].eq(0).all()
    assert all(torch.equal(s, chunked([full], "vocabulary", 0, 1, r, 4)) for r, s in enumerate(shards))
    assert torch.equal(to_full(shards, entries[0], model)[0], full)


@pytest.fixture(scope="module")
def one_process():
    groups.init_parallel(Layout(), seed=0)
    yield
    groups.destroy()


def test_every_misfit_is_listed_at_once(one_process):
    reference = make_reference(DEEPSEEK)
    (model,) = build_model(DEEPSEEK, Layout(), ModelSettings())
    state = dict(reference.state)
    del state["model.norm.weight"], state["model.layers.2.mlp.experts.5.up_proj.weight"]
    state["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(3, 3)
    state["model.layers.1.mlp.surprise.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        load_hf([model], state)
    message = str(caught.value)
    assert "4 tensors differ" in message
    for line in (
        "missing: model.norm.weight",
        "missing: model.layers.2.mlp.experts.5.up_proj.weight",
        "shape: model.layers.0.self_attn.o_proj.weight is [3, 3], the model wants [64, 96]",
        "unknown: model.layers.1.mlp.surprise.weight",
    ):
        assert line in message


def test_weights_are_nan_until_loaded(one_process):
    (model,) = build_model(DEEPSEEK, Layout(), ModelSettings())
    assert all(p.isnan().all() for p in model.parameters())


def test_bfloat16_keeps_the_expert_bias_in_float32(one_process):
    from megatron.core.transformer.module import Float16Module

    reference = make_reference(DEEPSEEK)
    (model,) = build_model(DEEPSEEK, Layout(), ModelSettings(dtype="bfloat16"))
    load_hf([Float16Module(model.config, model)], reference.state)
    exported = dict(export_hf([model]))
    for name, tensor in reference.state.items():
        expected = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        assert torch.equal(exported[name], expected), name


def mtp_state() -> dict[str, torch.Tensor]:
    """Hub names of a DeepSeek-V3 with one MTP layer: layer num_hidden_layers, a full decoder layer and four more."""
    state = make_reference(MTP | {"num_nextn_predict_layers": 0}).state
    last, extra = f"model.layers.{MTP['num_hidden_layers'] - 1}.", f"model.layers.{MTP['num_hidden_layers']}."
    generator = torch.Generator().manual_seed(5)
    hidden = MTP["hidden_size"]
    copies = {extra + n.removeprefix(last): t.clone() for n, t in state.items() if n.startswith(last)}
    own = {
        f"{extra}enorm.weight": torch.rand(hidden, generator=generator),
        f"{extra}hnorm.weight": torch.rand(hidden, generator=generator),
        f"{extra}eh_proj.weight": 0.06 * torch.randn(hidden, 2 * hidden, generator=generator),
        f"{extra}shared_head.norm.weight": torch.rand(hidden, generator=generator),
    }
    return state | copies | own


def test_multi_token_prediction_layers_go_in_and_out(one_process):
    state = mtp_state()
    (model,) = build_model(MTP, Layout(), ModelSettings(mtp_loss_coefficient=0.3))
    load_hf([model], state | {"model.layers.2.embed_tokens.weight": state["model.embed_tokens.weight"]})
    exported = dict(export_hf([model]))
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[n], t) for n, t in state.items())


def test_multi_token_prediction_layers_are_ignored_by_a_model_without(one_process):
    state = mtp_state()
    (model,) = build_model(MTP, Layout(), ModelSettings())
    load_hf([model], state)
    assert {n for n, _ in export_hf([model])} == {n for n in state if not n.startswith("model.layers.2.")}


def test_export_order_is_that_of_the_model(one_process):
    (model,) = build_model(DEEPSEEK, Layout(), ModelSettings(), init_std=0.02)
    names = [n for n, _ in export_hf([model])]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(n.split(".")[2]) for n in names[1:-2]]
    assert layers == sorted(layers)
