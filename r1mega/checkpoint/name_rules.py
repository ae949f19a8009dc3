"""HF names <-> Megatron parameters as data, and the pure functions that slice and join them for any layout.

`RULES` says which HF tensors one Megatron parameter is made of and how tensor parallelism cuts it; `make_entry` applies
them to one parameter of one rank. No processes, no model. No rotary permutation is needed in any family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from r1mega.errors import CheckpointError
from r1mega.model.reward_head import SCORE

Form = Literal["plain", "gate_up", "qkv", "vocabulary"]
"""How HF tensors make up the Megatron one: itself; gate, up stacked; q, k, v interleaved by KV group; rows padded."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Megatron suffix in a layer -> HF suffixes. dim: the dimension that tensor parallelism cuts (None: whole)."""

    megatron: str
    hf: tuple[str, ...]
    form: Form = "plain"
    dim: int | None = None


def _mlp_rules(megatron: str, hf: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{megatron}linear_fc1.weight", (f"{hf}gate_proj.weight", f"{hf}up_proj.weight"), "gate_up", 0),
        Rule(f"{megatron}linear_fc2.weight", (f"{hf}down_proj.weight",), "plain", 1),
    )


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_RULES = (
    Rule("input_layernorm.weight", ("input_layernorm.weight",)),
    Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    # multi-head latent attention
    Rule("self_attention.linear_q_proj.weight", ("self_attn.q_proj.weight",), "plain", 0),
    Rule("self_attention.linear_q_down_proj.weight", ("self_attn.q_a_proj.weight",)),
    Rule("self_attention.linear_q_up_proj.weight", ("self_attn.q_b_proj.weight",), "plain", 0),
    Rule("self_attention.linear_kv_down_proj.weight", ("self_attn.kv_a_proj_with_mqa.weight",)),
    Rule("self_attention.kv_layernorm.weight", ("self_attn.kv_a_layernorm.weight",)),
    Rule("self_attention.linear_kv_up_proj.weight", ("self_attn.kv_b_proj.weight",), "plain", 0),
    Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "plain", 1),
    # grouped-query attention
    Rule("self_attention.linear_qkv.weight", tuple(f"{n}.weight" for n in _QKV), "qkv", 0),
    Rule("self_attention.linear_qkv.bias", tuple(f"{n}.bias" for n in _QKV), "qkv", 0),
    Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
    # Transformer Engine fuses a norm into the linear layer after it
    Rule("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",)),
    Rule("self_attention.linear_q_up_proj.layer_norm_weight", ("self_attn.q_a_layernorm.weight",)),
    Rule("self_attention.linear_kv_up_proj.layer_norm_weight", ("self_attn.kv_a_layernorm.weight",)),
    Rule("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",)),
    # feed-forward, router, shared experts
    *_mlp_rules("mlp.", "mlp."),
    Rule("mlp.router.weight", ("mlp.gate.weight",)),
    Rule("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",)),
    *_mlp_rules("mlp.shared_experts.", "mlp.shared_experts."),
    # multi-token prediction (DeepSeek-V3 section 2.2): layer num_layers + k
    Rule("enorm.weight", ("enorm.weight",)),
    Rule("hnorm.weight", ("hnorm.weight",)),
    Rule("eh_proj.weight", ("eh_proj.weight",), "plain", 0),
    Rule("final_layernorm.weight", ("shared_head.norm.weight",)),
)
RULES: Mapping[str, Rule] = {rule.megatron: rule for rule in _RULES}
EXPERT_RULES: Mapping[str, Rule] = {rule.megatron: rule for rule in _mlp_rules("", "")}
TOP_RULES: Mapping[str, Rule] = {
    rule.megatron: rule
    for rule in (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary", 0),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
        Rule("output_layer.weight", ("lm_head.weight",), "vocabulary", 0),
    )
}
SCALAR_HEAD_RULE = Rule("output_layer.weight", (SCORE,))
LAYER_NAME = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.(?:transformer_layer\.|mtp_model_layer\.)?(.*)")
_SEQUENTIAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What slicing needs to know of a model. vocab_size: without padding; mla: latent attention, else grouped-query."""

    num_layers: int
    num_mtp_layers: int
    vocab_size: int
    num_experts: int
    num_kv_groups: int
    queries_per_group: int
    mla: bool
    tied_embeddings: bool
    scalar_head: bool = False


@dataclass(frozen=True, slots=True)
class Coordinates:
    """This rank's place in a layout. tp and ep cut dense parameters and experts; etp cuts inside an expert."""

    tp_rank: int
    tp: int
    etp_rank: int
    etp: int
    ep_rank: int
    ep: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One local parameter or buffer (Megatron name) and the HF tensors that it is a part of.

    hf_shapes: full shapes of the HF tensors; expert: global index of the expert, None for the rest.
    """

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    form: Form
    dim: int | None
    expert: int | None


def make_entry(name: str, shape: Sequence[int], layer: int | None, model: ModelShape, place: Coordinates) -> Entry:
    """The entry of one local parameter. layer: the global index of its layer, from 0 (None outside of layers).

    Pure. Raises CheckpointError for a name that no rule covers.
    """
    expert, prefix = None, ""
    if layer is None:
        rule = TOP_RULES.get(name)
        if name == "output_layer.weight" and model.tied_embeddings:
            rule = TOP_RULES["embedding.word_embeddings.weight"]
        if name == "output_layer.weight" and model.scalar_head:
            rule = SCALAR_HEAD_RULE
    else:
        match = LAYER_NAME.fullmatch(name)
        suffix, prefix = match[3] if match else name, f"model.layers.{layer}."
        sequential, grouped = _SEQUENTIAL_EXPERT.fullmatch(suffix), _GROUPED_EXPERT.fullmatch(suffix)
        if sequential or grouped:
            local, kind = (sequential[1], sequential[2]) if sequential else (grouped[2], grouped[1])
            expert = place.ep_rank * (model.num_experts // place.ep) + int(local)
            rule, prefix = EXPERT_RULES[kind], f"{prefix}mlp.experts.{expert}."
        elif suffix == "self_attention.q_layernorm.weight":  # the norm of the latent query, or of each head's query
            rule = Rule(suffix, ("self_attn.q_a_layernorm.weight" if model.mla else "self_attn.q_norm.weight",))
        else:
            rule = RULES.get(suffix)
    if rule is None:
        raise CheckpointError(f"parameter {name!r} has no HF name: add a rule to r1mega/checkpoint/name_rules.py")
    ranks = (place.etp if expert is not None else place.tp) if rule.dim is not None else 1
    whole = [size * (ranks if d == rule.dim else 1) for d, size in enumerate(shape)]
    shapes = _hf_shapes(rule.form, whole, model)
    return Entry(name, tuple(prefix + n for n in rule.hf), shapes, rule.form, rule.dim, expert)


def _hf_shapes(form: Form, whole: Sequence[int], model: ModelShape) -> tuple[tuple[int, ...], ...]:
    rows, rest = whole[0], tuple(whole[1:])
    if form == "gate_up":
        return ((rows // 2, *rest),) * 2
    if form == "vocabulary":
        return ((model.vocab_size, *rest),)
    if form == "qkv":
        head = _head_dim(rows, model)
        kv = model.num_kv_groups * head
        return ((rows - 2 * kv, *rest), (kv, *rest), (kv, *rest))
    return (tuple(whole),)


def _head_dim(rows: int, model: ModelShape) -> int:
    """Rows of the whole fused qkv = (queries per group + 2) * groups * head_dim."""
    return rows // model.num_kv_groups // (model.queries_per_group + 2)


def to_local(parts: Sequence[torch.Tensor], entry: Entry, model: ModelShape, rank: int, ranks: int) -> torch.Tensor:
    """This rank's slice, built from the full HF tensors `parts` (in the order of entry.hf_names). Pure."""
    if entry.form == "qkv":
        groups = model.num_kv_groups
        whole = torch.cat([p.reshape(groups, -1, *p.shape[1:]) for p in parts], dim=1)
        return whole.chunk(ranks)[rank].flatten(0, 1)
    if entry.form == "vocabulary":
        padded = -(-model.vocab_size // ranks) * ranks
        size = padded // ranks
        piece = parts[0][rank * size : (rank + 1) * size]
        missing = size - piece.shape[0]
        return torch.cat([piece, piece.new_zeros(missing, *piece.shape[1:])]) if missing else piece
    if entry.dim is None or ranks == 1:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    pieces = [p.chunk(ranks, entry.dim)[rank] for p in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def to_full(shards: Sequence[torch.Tensor], entry: Entry, model: ModelShape) -> tuple[torch.Tensor, ...]:
    """The full HF tensors of an entry from all ranks' slices, in rank order. Pure; views where one rank has all."""
    if entry.form == "gate_up":
        halves = [s.chunk(2) for s in shards]
        return tuple(_join([h[i] for h in halves], 0) for i in range(2))
    if entry.form == "qkv":
        fused = _join(list(shards), 0)
        head = _head_dim(fused.shape[0], model)
        groups = fused.view(model.num_kv_groups, -1, *fused.shape[1:])
        parts = groups.split([model.queries_per_group * head, head, head], dim=1)
        return tuple(p.reshape(-1, *fused.shape[1:]) for p in parts)
    whole = _join(list(shards), entry.dim or 0)
    return (whole[: model.vocab_size],) if entry.form == "vocabulary" else (whole,)


def _join(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


_TOP_ORDER = {
    "model.embed_tokens.weight": -1,
    "model.norm.weight": 1 << 30,
    "lm_head.weight": (1 << 30) + 1,
    SCORE: (1 << 30) + 1,
}
_RULE_ORDER = {name: i for i, rule in enumerate(_RULES) for name in rule.hf}


def model_order(entry: Entry) -> tuple[int, int, int, str]:
    """Sort key: embeddings, layers (experts last and ascending), final norm, head. The same in every layout."""
    name = entry.hf_names[0]
    if name in _TOP_ORDER:
        return (_TOP_ORDER[name], 0, 0, name)
    layer, suffix = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name).groups()
    if entry.expert is not None:
        return (int(layer), len(_RULE_ORDER), entry.expert, suffix)
    return (int(layer), _RULE_ORDER.get(suffix, 0), 0, suffix)
