"""What FP8 wants of a model and a layout. Pure: no heavy imports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from r1mega.config.layout import Layout
from r1mega.config.model_files import HFConfig

SIZE_MULTIPLE = 16
"""Both sizes of a weight that FP8 matrix products take: rows of 8-bit numbers start at multiples of 16 bytes
(transformer_engine/pytorch/utils.py, assert_dim_for_fp8_exec; the gradient swaps the two sizes)."""


class Precision(Protocol):
    """The FP8 part of ModelConfig."""

    fp8_skip_first_layers: int
    fp8_skip_last_layers: int

    @property
    def fp8(self) -> str: ...


def fp8_problems(model: Precision, layout: Layout, hf: HFConfig) -> Iterator[str]:
    """Why a model with this config.json cannot be trained so in FP8; each names what to change."""
    first, last = model.fp8_skip_first_layers, model.fp8_skip_last_layers
    if model.fp8 == "off":
        if first or last:
            yield (
                f"model.fp8_skip_first_layers = {first}, model.fp8_skip_last_layers = {last} leave layers out of FP8, "
                "and model.fp8 = off; set model.fp8, or leave them out"
            )
        return
    layers = hf.get("num_hidden_layers")
    if layers is not None:
        if first + last >= layers:
            yield (
                f"model.fp8_skip_first_layers = {first} and model.fp8_skip_last_layers = {last} leave none of the model's "
                f"{layers} layers in FP8; set model.fp8=off, or lower them"
            )
        most = layers // layout.pp
        for key, count in (("first", first), ("last", last)):
            if most < count < layers:
                yield (
                    f"model.fp8_skip_{key}_layers = {count}: Megatron takes at most num_hidden_layers // parallel.pp = {most}"
                )
    for name, size in _weight_sizes(layout, hf):
        if size % SIZE_MULTIPLE:
            yield (
                f"model.fp8 = {model.fp8}: {name} is {size}, and FP8 matrix products want multiples of {SIZE_MULTIPLE}; "
                "set model.fp8=off, or cut the model otherwise"
            )


def _weight_sizes(layout: Layout, hf: HFConfig) -> Iterator[tuple[str, int]]:
    """(name, size) of everything that is a row or a column of a linear layer on one rank, as far as config.json has it."""
    tp, etp = layout.tp, layout.etp
    heads = hf.get("num_attention_heads") or 0
    for key in ("hidden_size", "q_lora_rank", "kv_lora_rank"):
        yield key, hf.get(key) or 0
    yield f"intermediate_size / parallel.tp = {tp}", (hf.get("intermediate_size") or 0) // tp
    expert = hf.get("moe_intermediate_size") or 0
    yield f"moe_intermediate_size / parallel.etp = {etp}", expert // etp
    yield (
        f"n_shared_experts * moe_intermediate_size / parallel.tp = {tp}",
        expert * (hf.get("n_shared_experts") or 0) // tp,
    )
    if hf.get("kv_lora_rank"):
        nope, rope, value = (hf.get(f"{key}_head_dim") or 0 for key in ("qk_nope", "qk_rope", "v"))
        yield "kv_lora_rank + qk_rope_head_dim", hf["kv_lora_rank"] + rope
        per_head = (("qk_nope_head_dim + qk_rope_head_dim", nope + rope), ("qk_nope_head_dim + v_head_dim", nope + value),
                    ("v_head_dim", value))  # fmt: skip
        for name, size in per_head:
            yield f"num_attention_heads / parallel.tp = {tp} times {name}", heads // tp * size
    elif heads:
        size = hf.get("head_dim") or (hf.get("hidden_size") or 0) // heads
        groups = hf.get("num_key_value_heads") or heads
        yield f"num_attention_heads / parallel.tp = {tp} times head_dim", heads // tp * size
        yield (
            f"(num_attention_heads + 2 num_key_value_heads) / parallel.tp = {tp} times head_dim",
            (heads + 2 * groups) // tp * size,
        )


BLOCK = 128
"""Rows and columns of a block that has a scale of its own, in DeepSeek-V3's published form (checkpoint/fp8_blocks.py)."""


class Generator(Protocol):
    """What RolloutConfig says of a generator's precision and layout."""

    tp: int
    ep: int

    @property
    def engine(self) -> str: ...
    @property
    def quantization(self) -> str | None: ...
    @property
    def kv_cache_dtype(self) -> str: ...


def vllm_precision_problems(generator: Generator) -> Iterator[str]:
    """Why a generator that is not vLLM cannot have a precision of its own."""
    if generator.engine != "vllm" and (generator.quantization, generator.kv_cache_dtype) != (None, "auto"):
        yield (
            f"rollout.quantization and rollout.kv_cache_dtype are vLLM's, and rollout.engine = {generator.engine}; leave them "
            "out"
        )


def generator_precision_problems(generator: Generator, dtype: str, layout: Layout, hf: HFConfig) -> Iterator[str]:
    """Why a generator cannot hold this model so. dtype, layout: the trainer's. Each names what to change."""
    yield from vllm_precision_problems(generator)
    if generator.kv_cache_dtype != "auto" and dtype == "float32":
        yield (
            f"rollout.kv_cache_dtype = {generator.kv_cache_dtype} with model.dtype = {dtype}: 8-bit keys and values part "
            "generator and policy by more than the proof of a push in float32 allows; set model.dtype=bfloat16, or leave "
            "kv_cache_dtype out"
        )
    if generator.quantization is None:
        return
    if dtype != "bfloat16":
        yield (
            f"rollout.quantization = {generator.quantization} with model.dtype = {dtype}: vLLM multiplies FP8 weights with "
            "bfloat16 activations; set model.dtype=bfloat16"
        )
    sizes = dict([*_generator_sizes(generator, hf), *_trainer_sizes(layout, hf)])
    for name, size in sizes.items():
        if size % BLOCK:
            yield (
                f"rollout.quantization = {generator.quantization}: {name} is {size}, which cuts a block of {BLOCK} x {BLOCK}, "
                "whose scale no rank could find alone; cut the model otherwise, or leave quantization out"
            )


def _generator_sizes(generator: Generator, hf: HFConfig) -> Iterator[tuple[str, int]]:
    """(name, size) of what is joined to others in vLLM's parameters, or cut from the rest."""
    tp, heads = generator.tp, hf.get("num_attention_heads") or 0
    yield from _feed_forward_sizes("rollout.tp", tp, ("rollout.tp", tp) if generator.ep == 1 else ("rollout.ep", 1), hf)
    if hf.get("kv_lora_rank"):
        nope, value = hf.get("qk_nope_head_dim") or 0, hf.get("v_head_dim") or 0
        yield "q_lora_rank", hf.get("q_lora_rank") or 0
        yield "kv_lora_rank", hf["kv_lora_rank"]
        # decoding multiplies with what kv_b_proj is dequantised to, in whole blocks
        yield (
            f"num_attention_heads / rollout.tp = {tp} times qk_nope_head_dim + v_head_dim",
            heads // tp * (nope + value),
        )
        yield from _head_sizes("rollout.tp", tp, hf)
    elif heads:
        size = hf.get("head_dim") or (hf.get("hidden_size") or 0) // heads
        yield f"num_attention_heads / rollout.tp = {tp} times head_dim", heads // tp * size
        yield f"num_key_value_heads / rollout.tp = {tp} times head_dim", max(1, _groups(hf) // tp) * size


def _trainer_sizes(layout: Layout, hf: HFConfig) -> Iterator[tuple[str, int]]:
    """The same of Megatron's, which are quantised tensor by tensor: what is whole on a rank is not cut."""
    tp, etp = layout.tp, layout.etp
    for name, size in _feed_forward_sizes("parallel.tp", tp, ("parallel.etp", etp), hf):
        if not name.endswith(" = 1"):
            yield name, size
    if hf.get("kv_lora_rank"):
        yield from _head_sizes("parallel.tp", tp, hf)
    elif (heads := hf.get("num_attention_heads") or 0) and _groups(
        hf
    ) > 1:  # queries, key, value of one group after another
        yield "head_dim", hf.get("head_dim") or (hf.get("hidden_size") or 0) // heads


def _feed_forward_sizes(key: str, tp: int, of_experts: tuple[str, int], hf: HFConfig) -> Iterator[tuple[str, int]]:
    expert = hf.get("moe_intermediate_size") or 0
    if not expert or hf.get("first_k_dense_replace") or hf.get("mlp_only_layers"):
        yield f"intermediate_size / {key} = {tp}", (hf.get("intermediate_size") or 0) // tp
    shared = expert * (hf.get("n_shared_experts") or 0)
    yield f"n_shared_experts * moe_intermediate_size / {key} = {tp}", shared // tp
    yield f"moe_intermediate_size / {of_experts[0]} = {of_experts[1]}", expert // of_experts[1]


def _head_sizes(key: str, tp: int, hf: HFConfig) -> Iterator[tuple[str, int]]:
    """Of latent attention, whose projections are cut by heads."""
    if tp == 1:
        return
    nope, rope, value = (hf.get(f"{part}_head_dim") or 0 for part in ("qk_nope", "qk_rope", "v"))
    for name, size in (
        ("qk_nope_head_dim + qk_rope_head_dim", nope + rope), ("qk_nope_head_dim + v_head_dim", nope + value),
        ("v_head_dim", value),
    ):  # fmt: skip
        yield f"num_attention_heads / {key} = {tp} times {name}", (hf.get("num_attention_heads") or 0) // tp * size


def _groups(hf: HFConfig) -> int:
    return hf.get("num_key_value_heads") or hf.get("num_attention_heads") or 1
