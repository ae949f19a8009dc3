"""HF names <-> Megatron parameters: the mapping as data, and what it takes to slice and join them for any layout.

`RULES` says which HF tensors one Megatron parameter is made of and how tensor parallelism cuts it. Everything else is
derived: `local_entries` lists what this rank holds, `load_hf` copies an HF state in, `export_hf` streams it out.
No rotary permutation is needed in any family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from r1mega.errors import CheckpointError

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
_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.(?:transformer_layer\.|mtp_model_layer\.)?(.*)")
_SEQUENTIAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)")
_NOT_WEIGHTS = re.compile(r".*rotary_emb\.inv_freq")
_MTP_COPIES = re.compile(r"model\.layers\.(\d+)\.(embed_tokens|shared_head\.head)\.weight")


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


def make_entry(
    name: str, shape: Sequence[int], layer: int | None, model: ModelShape, place: Coordinates
) -> Entry:
    """The entry of one local parameter. layer: the global index of its layer, from 0 (None outside of layers).

    Pure. Raises CheckpointError for a name that no rule covers.
    """
    expert, prefix = None, ""
    if layer is None:
        rule = TOP_RULES.get(name)
        if name == "output_layer.weight" and model.tied_embeddings:
            rule = TOP_RULES["embedding.word_embeddings.weight"]
    else:
        match = _LAYER.fullmatch(name)
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
        raise CheckpointError(f"parameter {name!r} has no HF name: add a rule to r1mega/checkpoint/names.py")
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


def to_local(
    parts: Sequence[torch.Tensor], entry: Entry, model: ModelShape, rank: int, ranks: int
) -> torch.Tensor:
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


# ---------------------------------------------------------------------- this rank's part of a model


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside of Float16Module and DistributedDataParallel."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def model_shape(chunk: Any) -> ModelShape:
    """Of a GPTModel made by build_model (wrapped or not)."""
    model = unwrap(chunk)
    config = model.config
    groups = config.num_query_groups or config.num_attention_heads
    return ModelShape(
        num_layers=config.num_layers,
        num_mtp_layers=config.mtp_num_layers or 0,
        vocab_size=model.unpadded_vocab_size,
        num_experts=config.num_moe_experts or 0,
        num_kv_groups=groups,
        queries_per_group=config.num_attention_heads // groups,
        mla=config.multi_latent_attention,
        tied_embeddings=model.share_embeddings_and_output_weights,
    )


def coordinates() -> Coordinates:
    """Of this rank, in Megatron's groups."""
    from megatron.core import parallel_state as ps

    return Coordinates(
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp=ps.get_tensor_model_parallel_world_size(),
        etp_rank=ps.get_expert_tensor_parallel_rank(),
        etp=ps.get_expert_tensor_parallel_world_size(),
        ep_rank=ps.get_expert_model_parallel_rank(),
        ep=ps.get_expert_model_parallel_world_size(),
    )


def local_entries(chunks: Sequence[Any]) -> Iterator[tuple[Entry, torch.Tensor]]:
    """(entry, local tensor) of every parameter and of the routers' expert bias that this rank holds, in model order."""
    place = coordinates()
    for chunk in chunks:
        model, shape = unwrap(chunk), model_shape(chunk)
        for module in model.modules():
            if hasattr(module, "_maintain_float32_expert_bias"):  # Float16Module has rounded it, until the next forward
                module._maintain_float32_expert_bias()
        named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("expert_bias"))]
        for name, tensor in named:
            match = _LAYER.fullmatch(name)
            layer = None
            if match and match[1] == "decoder":
                layer = model.decoder.layers[int(match[2])].layer_number - 1
            elif match:
                layer = shape.num_layers + int(match[2])
            yield make_entry(name, tensor.shape, layer, shape, place), tensor.detach()


# ---------------------------------------------------------------------- HF state -> model


@torch.no_grad()
def load_hf(chunks: Sequence[Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy an HF state (hub names, one tensor per expert) into this rank's part of the model, in any layout.

    tensors: looked up by name, each tensor at most once more than the ranks need it; may read lazily. MTP tensors are
    ignored when the model has no MTP layers. A collective call: CheckpointError lists, on every rank, ALL tensors that
    are missing, unknown or of another shape on any rank; the model is then partly overwritten.
    """
    shape, place = model_shape(chunks[0]), coordinates()
    problems: set[str] = set()
    expected: set[str] = set()
    for entry, local in local_entries(chunks):
        expected.update(entry.hf_names)
        parts = [tensors[name] for name in entry.hf_names if name in tensors]
        problems.update(f"missing: {name}" for name in entry.hf_names if name not in tensors)
        if len(parts) < len(entry.hf_names):
            continue
        wrong = [
            f"shape: {name} is {list(part.shape)}, the model wants {list(want)}"
            for name, part, want in zip(entry.hf_names, parts, entry.hf_shapes, strict=True)
            if tuple(part.shape) != want
        ]
        problems.update(wrong)
        if not wrong:
            rank, ranks = (place.etp_rank, place.etp) if entry.expert is not None else (place.tp_rank, place.tp)
            local.copy_(to_local(parts, entry, shape, rank, ranks))
    for theirs_problems, theirs_expected in _gather_objects((problems, expected)):
        problems |= theirs_problems
        expected |= theirs_expected
    problems.update(f"unknown: {name}" for name in tensors if name not in expected and not _is_ignored(name, shape))
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise CheckpointError(
            f"the weights do not fit the model, {len(problems)} tensors differ; is config.json of another model?\n"
            f"  {listed}"
        )


def _is_ignored(name: str, shape: ModelShape) -> bool:
    """What checkpoints may have besides the model: MTP layers that were not built, copies of shared tensors."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= shape.num_layers + shape.num_mtp_layers:
        return True
    copies = shape.tied_embeddings and name == "lm_head.weight"
    return copies or bool(_NOT_WEIGHTS.fullmatch(name) or _MTP_COPIES.fullmatch(name))


def _gather_objects(mine: Any) -> list[Any]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


# ---------------------------------------------------------------------- model -> HF state


@torch.no_grad()
def export_hf(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, full tensor) for the whole model, on every rank, in the same order in every layout.

    A collective generator: every rank must exhaust it. It holds one parameter (all its slices) at a time; where one
    rank has the whole tensor it is yielded without a copy, so that it must not be changed. Order: embeddings, layers
    (experts ascending), final norm, head.
    """
    from megatron.core import parallel_state as ps

    shape = model_shape(chunks[0])
    held = {entry.hf_names: (entry, tensor) for entry, tensor in local_entries(chunks)}
    stage, stages = ps.get_pipeline_model_parallel_rank(), ps.get_pipeline_model_parallel_world_size()
    ep, ep_rank = ps.get_expert_model_parallel_world_size(), ps.get_expert_model_parallel_rank()
    for entry, dtype, owner in _manifest(held, stage, stages, ep, shape):
        full: tuple[torch.Tensor, ...] | None = None
        if owner == stage:
            if entry.expert is None:
                full = _gather_shards(held[entry.hf_names][1], entry, shape, ps.get_tensor_model_parallel_group())
            else:
                source = entry.expert // (shape.num_experts // ep)
                if source == ep_rank:
                    group = ps.get_expert_tensor_parallel_group()
                    full = _gather_shards(held[entry.hf_names][1], entry, shape, group)
                full = _broadcast(full, entry, dtype, source, ps.get_expert_model_parallel_group())
        full = _broadcast(full, entry, dtype, owner, ps.get_pipeline_model_parallel_group())
        yield from zip(entry.hf_names, full, strict=True)


def _manifest(
    held: Mapping[tuple[str, ...], tuple[Entry, torch.Tensor]], stage: int, stages: int, ep: int, shape: ModelShape
) -> list[tuple[Entry, torch.dtype, int]]:
    """(entry, dtype, pipeline stage that owns it) of the whole model, ordered; the same on every rank."""
    from megatron.core import parallel_state as ps

    mine: list[tuple[Entry, torch.dtype, int]] = []
    for entry, tensor in held.values():
        if entry.expert is None:
            mine.append((entry, tensor.dtype, stage))
            continue
        local = shape.num_experts // ep
        for other in range(entry.expert % local, shape.num_experts, local):  # the same expert of the other EP ranks
            names = tuple(n.replace(f".experts.{entry.expert}.", f".experts.{other}.") for n in entry.hf_names)
            mine.append(
                (Entry(entry.name, names, entry.hf_shapes, entry.form, entry.dim, other), tensor.dtype, stage)
            )
    everyone = [mine]
    if stages > 1:
        everyone = [[] for _ in range(stages)]
        dist.all_gather_object(everyone, mine, group=ps.get_pipeline_model_parallel_group())
    first: dict[tuple[str, ...], tuple[Entry, torch.dtype, int]] = {}
    for stage_entries in everyone:  # embeddings may live on the last stage too: the first one owns them
        for item in stage_entries:
            first.setdefault(item[0].hf_names, item)
    return sorted(first.values(), key=lambda item: _order(item[0]))


_TOP_ORDER = {"model.embed_tokens.weight": -1, "model.norm.weight": 1 << 30, "lm_head.weight": (1 << 30) + 1}
_RULE_ORDER = {name: i for i, rule in enumerate(_RULES) for name in rule.hf}


def _order(entry: Entry) -> tuple[int, int, int, str]:
    name = entry.hf_names[0]
    if name in _TOP_ORDER:
        return (_TOP_ORDER[name], 0, 0, name)
    layer, suffix = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name).groups()
    if entry.expert is not None:
        return (int(layer), len(_RULE_ORDER), entry.expert, suffix)
    return (int(layer), _RULE_ORDER.get(suffix, 0), 0, suffix)


def _gather_shards(
    local: torch.Tensor, entry: Entry, shape: ModelShape, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    if entry.dim is None or group.size() == 1:
        return to_full([local], entry, shape)
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local.contiguous(), group=group)
    return to_full(shards, entry, shape)


def _broadcast(
    full: tuple[torch.Tensor, ...] | None, entry: Entry, dtype: torch.dtype, source: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """The tensors of `source` (a rank of the group) on every rank of the group."""
    if group.size() == 1:
        return full
    if group.rank() != source:
        from r1mega import platform

        device = platform.current().device
        full = tuple(torch.empty(size, dtype=dtype, device=device) for size in entry.hf_shapes)
    full = tuple(t.contiguous() for t in full)
    for tensor in full:
        dist.broadcast(tensor, dist.get_global_rank(group, source), group=group)
    return full
