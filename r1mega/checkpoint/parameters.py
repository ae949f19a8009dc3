"""Every parameter of a model, from its config.json alone: HF names and shapes, its place in a torch_dist checkpoint.

Pure: no Megatron model is built. Keys are those of Megatron's sharded state (megatron-core with its local
layers; `fit.py` finds the norms that Transformer Engine's layers name otherwise).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from r1mega.checkpoint.name_rules import EXPERT_RULES, RULES, TOP_RULES, Entry, ModelShape, Rule
from r1mega.errors import CheckpointError
from r1mega.model.hf_config import require

MLA_TYPES = ("deepseek_v3", "deepseek_v2")
DENSE_TYPES = ("llama", "qwen2", "qwen3")
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


def model_shape_of(hf: Mapping[str, Any], num_mtp_layers: int) -> ModelShape:
    """What slicing needs to know, from config.json."""
    layers, heads, vocabulary = require(hf, "num_hidden_layers", "num_attention_heads", "vocab_size")
    mla = hf.get("model_type") in MLA_TYPES
    groups = heads if mla else hf.get("num_key_value_heads") or heads
    return ModelShape(
        num_layers=layers,
        num_mtp_layers=num_mtp_layers,
        vocab_size=vocabulary,
        num_experts=(hf.get("n_routed_experts") or 0) if mla else 0,
        num_kv_groups=groups,
        queries_per_group=heads // groups,
        mla=mla,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def parameters(hf: Mapping[str, Any], num_mtp_layers: int = 0) -> Iterator[Parameter]:
    """All parameters in model order: embeddings, layers (experts last), final norm, head, MTP layers.

    num_mtp_layers: how many multi-token-prediction layers there are. CheckpointError for an unknown model_type.
    """
    if hf.get("model_type") not in MLA_TYPES + DENSE_TYPES:
        raise CheckpointError(
            f"config.json: model_type {hf.get('model_type')!r} cannot be converted, only "
            + ", ".join(MLA_TYPES + DENSE_TYPES)
        )
    model = model_shape_of(hf, num_mtp_layers)
    vocabulary, hidden = require(hf, "vocab_size", "hidden_size")
    table = {"embedding.word_embeddings.weight": (vocabulary, hidden), "decoder.final_layernorm.weight": (hidden,)}
    if not model.tied_embeddings:
        table["output_layer.weight"] = (vocabulary, hidden)

    def top(name: str) -> Parameter:
        rule = TOP_RULES[name]
        return Parameter(name, (), (), table[name], Entry(name, rule.hf, (table[name],), rule.form, rule.dim, None))

    yield top("embedding.word_embeddings.weight")
    for layer in range(model.num_layers):
        yield from (_mla_layer if model.mla else _dense_layer)(hf, layer, model)
    for name in list(table)[1:]:
        yield top(name)
    for k in range(num_mtp_layers):
        yield from _mtp_layer(hf, model, k)


def _mla_layer(hf: Mapping[str, Any], layer: int, model: ModelShape, start: str | None = None) -> Iterator[Parameter]:
    start = start or f"decoder.layers.{layer}."
    prefix = f"model.layers.{layer}."
    for suffix, shapes in (*_mla_attention(hf), *_feed_forward(hf, layer)):
        yield _parameter(start + suffix, _rule(suffix, model), prefix, shapes)
    if not _is_moe(hf, layer):
        return
    hidden, width = hf["hidden_size"], hf["moe_intermediate_size"]
    for expert in range(model.num_experts):
        for suffix, shapes in (
            ("linear_fc1.weight", ((width, hidden),) * 2),
            ("linear_fc2.weight", ((hidden, width),)),
        ):
            yield _parameter(
                f"{start}mlp.experts.experts.{suffix}", EXPERT_RULES[suffix], f"{prefix}mlp.experts.{expert}.", shapes,
                (expert,), (model.num_experts,), expert,
            )  # fmt: skip


def _dense_layer(hf: Mapping[str, Any], layer: int, model: ModelShape) -> Iterator[Parameter]:
    """All layers are alike, so Megatron stacks them: one tensor a parameter, with a first axis for the layer."""
    hidden, heads, width = require(hf, "hidden_size", "num_attention_heads", "intermediate_size")
    head = hf.get("head_dim") or hidden // heads
    queries, keys = heads * head, model.num_kv_groups * head
    qkv = "self_attention.linear_qkv."
    table: dict[str, tuple[Shape, ...]] = {
        f"{qkv}layer_norm_weight": ((hidden,),),
        f"{qkv}weight": ((queries, hidden), (keys, hidden), (keys, hidden)),
        "self_attention.linear_proj.weight": ((hidden, queries),),
        "mlp.linear_fc1.layer_norm_weight": ((hidden,),),
        "mlp.linear_fc1.weight": ((width, hidden),) * 2,
        "mlp.linear_fc2.weight": ((hidden, width),),
    }
    if hf["model_type"] == "qwen2":
        table[f"{qkv}bias"] = ((queries,), (keys,), (keys,))
    if hf["model_type"] == "qwen3":
        table |= {f"self_attention.{n}_layernorm.weight": ((head,),) for n in "qk"}
    for suffix, shapes in table.items():
        yield _parameter(
            f"decoder.layers.{suffix}", _rule(suffix, model), f"model.layers.{layer}.", shapes,
            (layer,), (model.num_layers,),
        )  # fmt: skip


def _mtp_layer(hf: Mapping[str, Any], model: ModelShape, k: int) -> Iterator[Parameter]:
    hidden, layer = hf["hidden_size"], model.num_layers + k
    for suffix, shape in (("enorm", (hidden,)), ("hnorm", (hidden,)), ("eh_proj", (hidden, 2 * hidden))):
        name = f"{suffix}.weight"
        yield _parameter(f"mtp.layers.{k}.{name}", RULES[name], f"model.layers.{layer}.", (shape,))
    yield from _mla_layer(hf, layer, model, f"mtp.layers.{k}.transformer_layer.")
    name = "final_layernorm.weight"
    yield _parameter(f"mtp.layers.{k}.{name}", RULES[name], f"model.layers.{layer}.", ((hidden,),))


def _mla_attention(hf: Mapping[str, Any]) -> Any:
    hidden, heads, rank, nope, rope, value = require(
        hf, "hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
    )
    queries, attention = heads * (nope + rope), "self_attention."
    table: dict[str, tuple[Shape, ...]] = {"input_layernorm.weight": ((hidden,),)}
    if q_rank := hf.get("q_lora_rank"):
        table |= {
            f"{attention}linear_q_down_proj.weight": ((q_rank, hidden),),
            f"{attention}q_layernorm.weight": ((q_rank,),),
            f"{attention}linear_q_up_proj.weight": ((queries, q_rank),),
        }
    else:
        table[f"{attention}linear_q_proj.weight"] = ((queries, hidden),)
    table |= {
        f"{attention}linear_kv_down_proj.weight": ((rank + rope, hidden),),
        f"{attention}kv_layernorm.weight": ((rank,),),
        f"{attention}linear_kv_up_proj.weight": ((heads * (nope + value), rank),),
        f"{attention}linear_proj.weight": ((hidden, heads * value),),
        "pre_mlp_layernorm.weight": ((hidden,),),
    }
    return table.items()


def _is_moe(hf: Mapping[str, Any], layer: int) -> bool:
    return layer >= hf["first_k_dense_replace"]


def _feed_forward(hf: Mapping[str, Any], layer: int) -> Any:
    """Of a DeepSeek layer, without the routed experts."""
    hidden, width, experts, moe_width = require(
        hf, "hidden_size", "intermediate_size", "n_routed_experts", "moe_intermediate_size"
    )

    def mlp(prefix: str, size: int) -> dict[str, tuple[Shape, ...]]:
        return {
            f"{prefix}linear_fc1.weight": ((size, hidden),) * 2,
            f"{prefix}linear_fc2.weight": ((hidden, size),),
        }

    if not _is_moe(hf, layer):
        return mlp("mlp.", width).items()
    table: dict[str, tuple[Shape, ...]] = {"mlp.router.weight": ((experts, hidden),)}
    if hf["model_type"] == "deepseek_v3":
        table["mlp.router.expert_bias"] = ((experts,),)
    if shared := hf.get("n_shared_experts"):
        table |= mlp("mlp.shared_experts.", shared * moe_width)
    return table.items()


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
