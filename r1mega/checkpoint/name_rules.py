"""HF names <-> Megatron parameters as data, and the pure functions that slice and join them for any layout.

`RULES` says which HF tensors one Megatron parameter is made of and how tensor parallelism cuts it; `make_entry` applies
them to one parameter of one rank. No processes, no model. No rotary permutation is needed in any family.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from r1mega.errors import CheckpointError
from r1mega.model.reward_head import SCORE

Form = Literal["plain", "gate_up", "qkv", "vocabulary"]
"""How HF tensors make up the Megatron one: itself; gate, up stacked; q, k, v interleaved by KV group; rows padded."""


Region = tuple[tuple[int, int], ...]
"""Half-open [start, stop) along each dimension."""


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
        found = (sequential[1], sequential[2]) if sequential else (grouped[2], grouped[1]) if grouped else None
        if found is not None:
            local, kind = found
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


def regions(
    form: Form, dim: int | None, index: int, shape: Sequence[int], heads: tuple[int, int], rank: int, ranks: int
) -> Iterator[tuple[Region, Region]]:
    """(region of the local parameter, region of the HF tensor) of one rank's part of a rule's tensor `index`: everything
    that cuts, joins, saves, plans or pushes a tensor of the trainer follows from these. Pure; sizes must divide.

    shape: of the whole HF tensor. heads: (KV groups, queries a group), of the form qkv alone. Example: gate (0) and up (1) of
    [8, 4] on rank 1 of 2 are rows 0..4 and 4..8 of the parameter, and rows 4..8 of each tensor.
    """
    whole = tuple((0, size) for size in shape)
    if form == "vocabulary":  # rows are padded to a multiple of the ranks
        size = -(-shape[0] // ranks)
        start, stop = min(rank * size, shape[0]), min((rank + 1) * size, shape[0])
        if stop > start:
            yield ((0, stop - start), *whole[1:]), ((start, stop), *whole[1:])
    elif form == "qkv":  # by KV group: its queries, its key, its value
        groups, queries = heads
        rows = shape[0] // groups  # of one group in this tensor
        head = rows // queries if index == 0 else rows
        local = groups // ranks
        for slot in range(local):
            start = (slot * (queries + 2) + (0, queries, queries + 1)[index]) * head
            first = (rank * local + slot) * rows
            yield ((start, start + rows), *whole[1:]), ((first, first + rows), *whole[1:])
    else:
        cut = 0 if dim is None else dim
        size = shape[cut] // (1 if dim is None else ranks)
        offset, first = (index * size if form == "gate_up" else 0), (0 if dim is None else rank * size)
        yield (
            (*whole[:cut], (offset, offset + size), *whole[cut + 1 :]),
            (*whole[:cut], (first, first + size), *whole[cut + 1 :]),
        )


def pieces(form: Form, dim: int | None, shape: Sequence[int], ranks: int) -> list[Region]:
    """What Megatron's sharded state is made of: the parts of a whole parameter (that of one rank without parallelism, of this
    shape) that the ranks hold. The vocabulary's padding stands out of the last one; gate and up are parts of their own.
    """
    whole = tuple((0, size) for size in shape)
    if dim is None or (ranks == 1 and form != "gate_up"):
        return [whole]
    halves = 2 if form == "gate_up" else 1
    size = -(-shape[dim] // (halves * ranks))
    return [(*whole[:dim], (i * size, (i + 1) * size), *whole[dim + 1 :]) for i in range(halves * ranks)]


def _entry_regions(entry: Entry, model: ModelShape, rank: int, ranks: int) -> Iterator[tuple[int, Region, Region]]:
    """`regions` of every HF tensor of an entry, each with the tensor's index."""
    heads = (model.num_kv_groups, model.queries_per_group)
    for index, shape in enumerate(entry.hf_shapes):
        for local, source in regions(entry.form, entry.dim, index, shape, heads, rank, ranks):
            yield index, local, source


def _at(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)


def to_local(parts: Sequence[torch.Tensor], entry: Entry, model: ModelShape, rank: int, ranks: int) -> torch.Tensor:
    """This rank's slice, built from the full HF tensors `parts` (in the order of entry.hf_names); what pads the vocabulary is
    zero. Pure; a view where it is a part of one tensor.
    """
    shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]]
    if entry.dim is not None:
        shape[entry.dim] = -(-shape[entry.dim] // ranks)
    found = list(_entry_regions(entry, model, rank, ranks))
    if len(found) == 1 and found[0][1] == tuple((0, size) for size in shape):
        return parts[0][_at(found[0][2])]
    local = parts[0].new_zeros(shape)
    for index, target, source in found:
        local[_at(target)] = parts[index][_at(source)]
    return local


def to_full(shards: Sequence[torch.Tensor], entry: Entry, model: ModelShape) -> tuple[torch.Tensor, ...]:
    """The full HF tensors of an entry from all ranks' slices, in rank order. Pure; views where one rank has all."""
    found: list[list[tuple[torch.Tensor, Region]]] = [[] for _ in entry.hf_names]
    for rank, shard in enumerate(shards):
        for index, local, source in _entry_regions(entry, model, rank, len(shards)):
            found[index].append((shard[_at(local)], source))
    full = []
    for shape, parts in zip(entry.hf_shapes, found, strict=True):
        tensor = parts[0][0] if len(parts) == 1 else shards[0].new_empty(shape)
        for part, source in parts if len(parts) > 1 else ():
            tensor[_at(source)] = part
        full.append(tensor)
    return tuple(full)


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
    layer, suffix = name.removeprefix("model.layers.").split(".", 1)
    if entry.expert is not None:
        return (int(layer), len(_RULE_ORDER), entry.expert, suffix)
    return (int(layer), _RULE_ORDER.get(suffix, 0), 0, suffix)
