"""Every parameter of a model, from its config.json alone: HF names and shapes, its place in a torch_dist checkpoint.

Pure: no Megatron model is built. Keys are those of Megatron's sharded state (megatron-core with its local
layers; `fit.py` finds the norms that Transformer Engine's layers name otherwise).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from r1mega.checkpoint.name_rules import EXPERT_RULES, RULES, TOP_RULES, Entry, ModelShape, Rule
from r1mega.config.model_files import HFConfig
from r1mega.errors import CheckpointError
from r1mega.model.architecture import Architecture, GroupedAttention, LatentAttention
from r1mega.model.families import FAMILIES, architecture_of

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter (or the router's expert bias) of the whole model.

    key: of the tensor in a torch_dist checkpoint; prefix and prefix_shape: this parameter's index in the leading axes
    that the tensor has for layers or experts, and their sizes; shape: of the parameter itself, with the vocabulary
    unpadded; entry: the HF tensors that it is made of.
    """

    key: str
    prefix: Shape
    prefix_shape: Shape
    shape: Shape
    entry: Entry


def model_shape_of(hf: HFConfig, num_mtp_layers: int) -> ModelShape:
    """What slicing needs to know, from config.json."""
    return _model_shape(architecture_of(hf), num_mtp_layers)


def _model_shape(model: Architecture, num_mtp_layers: int) -> ModelShape:
    attention = model.attention
    groups = attention.groups if isinstance(attention, GroupedAttention) else attention.heads
    return ModelShape(
        num_layers=model.num_layers,
        num_mtp_layers=num_mtp_layers,
        vocab_size=model.vocab_size,
        num_experts=model.experts.count if model.experts is not None else 0,
        num_kv_groups=groups,
        queries_per_group=attention.heads // groups,
        mla=isinstance(attention, LatentAttention),
        tied_embeddings=model.tied_embeddings,
    )


def parameters(hf: HFConfig, num_mtp_layers: int = 0) -> Iterator[Parameter]:
    """All parameters in model order: embeddings, layers (experts last), final norm, head, MTP layers.

    num_mtp_layers: how many multi-token-prediction layers there are. CheckpointError for an unknown model_type and for
    biases that no trained model has.
    """
    if hf.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type {hf.get('model_type')!r} cannot be converted, only " + ", ".join(FAMILIES)
        )
    model = architecture_of(hf)
    if model.mlp_bias or (isinstance(model.attention, GroupedAttention) and model.attention.output_bias):
        raise CheckpointError(
            "config.json: attention_bias or mlp_bias: of biases only those of q, k and v are converted"
        )
    shape = _model_shape(model, num_mtp_layers)
    vocabulary, hidden = model.vocab_size, model.hidden_size
    table = {"embedding.word_embeddings.weight": (vocabulary, hidden), "decoder.final_layernorm.weight": (hidden,)}
    if not model.tied_embeddings:
        table["output_layer.weight"] = (vocabulary, hidden)

    def top(name: str) -> Parameter:
        rule = TOP_RULES[name]
        return Parameter(name, (), (), table[name], Entry(name, rule.hf, (table[name],), rule.form, rule.dim, None))

    yield top("embedding.word_embeddings.weight")
    for layer in range(model.num_layers):
        yield from _layer(model, shape, layer, f"decoder.layers.{layer}.")
    for name in list(table)[1:]:
        yield top(name)
    for k in range(num_mtp_layers):
        yield from _mtp_layer(model, shape, k)


def _layer(model: Architecture, shape: ModelShape, layer: int, start: str) -> Iterator[Parameter]:
    """start: of the keys. Where no layer has experts all are alike, and Megatron stacks them: one tensor a parameter, with a
    first axis for the layer."""
    prefix, experts = f"model.layers.{layer}.", model.experts
    if experts is None:
        for suffix, shapes in _plain_parameters(model, layer).items():
            yield _parameter(
                f"decoder.layers.{suffix}", _rule(suffix, shape), prefix, shapes, (layer,), (model.num_layers,)
            )
        return
    for suffix, shapes in _plain_parameters(model, layer).items():
        yield _parameter(start + suffix, _rule(suffix, shape), prefix, shapes)
    if not model.has_experts(layer):
        return
    for expert in range(experts.count):
        for suffix, shapes in _mlp("", experts.size, model.hidden_size).items():
            yield _parameter(
                f"{start}mlp.experts.experts.{suffix}", EXPERT_RULES[suffix], f"{prefix}mlp.experts.{expert}.", shapes,
                (expert,), (experts.count,), expert,
            )  # fmt: skip


def _mtp_layer(model: Architecture, shape: ModelShape, k: int) -> Iterator[Parameter]:
    hidden, layer = model.hidden_size, model.num_layers + k
    for suffix, size in (("enorm", (hidden,)), ("hnorm", (hidden,)), ("eh_proj", (hidden, 2 * hidden))):
        name = f"{suffix}.weight"
        yield _parameter(f"mtp.layers.{k}.{name}", RULES[name], f"model.layers.{layer}.", (size,))
    yield from _layer(model, shape, layer, f"mtp.layers.{k}.transformer_layer.")
    name = "final_layernorm.weight"
    yield _parameter(f"mtp.layers.{k}.{name}", RULES[name], f"model.layers.{layer}.", ((hidden,),))


Table = dict[str, tuple[Shape, ...]]
"""Megatron suffix -> the shapes of the HF tensors of that parameter."""


def _plain_parameters(model: Architecture, layer: int) -> Table:
    """Of one layer, without the routed experts."""
    attention, feed_forward = model.attention, _feed_forward(model, layer)
    if isinstance(attention, LatentAttention):
        return {**_latent_attention(attention, model.hidden_size), **feed_forward}
    return {**_grouped_attention(attention, model.hidden_size), **feed_forward, **_additions(attention)}


def _latent_attention(attention: LatentAttention, hidden: int) -> Table:
    heads, rank, value = attention.heads, attention.kv_rank, attention.value_size
    queries, prefix = heads * (attention.nope_size + attention.rope_size), "self_attention."
    table: Table = {"input_layernorm.weight": ((hidden,),)}
    if attention.query_rank:
        table |= {
            f"{prefix}linear_q_down_proj.weight": ((attention.query_rank, hidden),),
            f"{prefix}q_layernorm.weight": ((attention.query_rank,),),
            f"{prefix}linear_q_up_proj.weight": ((queries, attention.query_rank),),
        }
    else:
        table[f"{prefix}linear_q_proj.weight"] = ((queries, hidden),)
    return table | {
        f"{prefix}linear_kv_down_proj.weight": ((rank + attention.rope_size, hidden),),
        f"{prefix}kv_layernorm.weight": ((rank,),),
        f"{prefix}linear_kv_up_proj.weight": ((heads * (attention.nope_size + value), rank),),
        f"{prefix}linear_proj.weight": ((hidden, heads * value),),
        "pre_mlp_layernorm.weight": ((hidden,),),
    }


def _grouped_attention(attention: GroupedAttention, hidden: int) -> Table:
    """Megatron saves the norms of these layers under the names that they have where they are fused."""
    queries, keys = attention.heads * attention.head_size, attention.groups * attention.head_size
    return {
        "self_attention.linear_qkv.layer_norm_weight": ((hidden,),),
        "self_attention.linear_qkv.weight": ((queries, hidden), (keys, hidden), (keys, hidden)),
        "self_attention.linear_proj.weight": ((hidden, queries),),
        "mlp.linear_fc1.layer_norm_weight": ((hidden,),),
    }


def _additions(attention: GroupedAttention) -> Table:
    """What only some families have in grouped-query attention."""
    queries, keys = attention.heads * attention.head_size, attention.groups * attention.head_size
    table: Table = {}
    if attention.qkv_bias:
        table["self_attention.linear_qkv.bias"] = ((queries,), (keys,), (keys,))
    if attention.qk_norm:
        table |= {f"self_attention.{n}_layernorm.weight": ((attention.head_size,),) for n in "qk"}
    return table


def _feed_forward(model: Architecture, layer: int) -> Table:
    hidden, experts = model.hidden_size, model.experts
    if experts is None or not model.has_experts(layer):
        return _mlp("mlp.", model.intermediate_size, hidden)
    table: Table = {"mlp.router.weight": ((experts.count, hidden),)}
    if experts.router_bias:
        table["mlp.router.expert_bias"] = ((experts.count,),)
    if experts.shared_size:
        table |= _mlp("mlp.shared_experts.", experts.shared_size, hidden)
    return table


def _mlp(prefix: str, size: int, hidden: int) -> Table:
    return {f"{prefix}linear_fc1.weight": ((size, hidden),) * 2, f"{prefix}linear_fc2.weight": ((hidden, size),)}


def _rule(suffix: str, model: ModelShape) -> Rule:
    if suffix == "self_attention.q_layernorm.weight":  # the norm of the latent query, or of each head's query
        return Rule(suffix, ("self_attn.q_a_layernorm.weight" if model.mla else "self_attn.q_norm.weight",))
    return RULES[suffix]


def _parameter(
    key: str, rule: Rule, prefix: str, shapes: tuple[Shape, ...], index: Shape = (), axes: Shape = (),
    expert: int | None = None,
) -> Parameter:  # fmt: skip
    entry = Entry(key, tuple(prefix + n for n in rule.hf), shapes, rule.form, rule.dim, expert)
    rows = sum(shape[0] for shape in shapes)  # gate and up, or q, k and v, lie above each other
    return Parameter(key, index, axes, (rows, *shapes[0][1:]), entry)
