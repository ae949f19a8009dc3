"""What a GPU's layers keep from forward to backward, of the local ones: Transformer Engine's, its FP8, Megatron's fused ones.

`tests/te/test_plan.py` holds it against what Transformer Engine's own layers save.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol

import torch

from r1mega import platform

platform.prepare()  # before the first import of megatron

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402

from r1mega.config.schema import Fp8, ModelConfig  # noqa: E402
from r1mega.model.attention import CausalAttention  # noqa: E402
from r1mega.plan.offload import Offload  # noqa: E402
from r1mega.plan.shapes import FusedAttention  # noqa: E402

QUANTISED = torch.float8_e4m3fn
BLOCK = 128
"""Values that share a scale, with `blockwise`."""
Kept = Literal["quantised", "nothing"]
"""Of a linear layer's input: its copy in FP8, or nothing, where what came before it is computed again."""
_OF_ATTENTION = ("linear_qkv", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
_DOWN = ("linear_q_down_proj", "linear_kv_down_proj")


class Linear(Protocol):
    """What is asked of a linear layer of Megatron's."""

    weight: torch.Tensor
    forward: Callable[..., object]


def buildable(model: ModelConfig) -> ModelConfig:
    """As local layers can be built: without FP8, and without computing again what lies between grouped products."""
    recompute = model.recompute
    if not isinstance(recompute, str):
        recompute = tuple(name for name in recompute if name != "moe_act") or "none"
    without = {"fp8": "off", "fp8_skip_first_layers": 0, "fp8_skip_last_layers": 0, "recompute": recompute}
    without["offload_modules"] = ()  # plan/offload.py
    return model.model_copy(update=without)


def keep_as_on_gpu(chunk: GPTModel, model: ModelConfig, offload: Offload) -> None:
    """Make the layers of a chunk that was built of `buildable(model)` keep what those of `model` keep on a GPU, or `offload`
    takes.
    """
    for module in chunk.modules():
        if hasattr(module, "config"):
            module.config.bias_activation_fusion = True
        if isinstance(module, CausalAttention):
            module.forward = _attend  # type: ignore[method-assign]
    for layer, fp8 in _layers(chunk, model):
        if not hasattr(layer.mlp, "experts"):
            layer.recompute_pre_mlp_layernorm = False  # Transformer Engine's is one with the product behind it
        if hasattr(layer.self_attention, "linear_qkv"):
            layer.recompute_input_layernorm = False
        for linear, kept in _linears(layer, model, fp8):
            if kept is not None:
                linear.forward = functools.partial(_keeping, offload, linear, linear.forward, kept, fp8)
    for linear in _projections(chunk) if model.fp8 != "off" else ():
        linear.forward = functools.partial(_keeping, offload, linear, linear.forward, "quantised", model.fp8)


def quantised_bytes(chunk: GPTModel, model: ModelConfig) -> int:
    """Of the copies in FP8, of rows and of columns, that Transformer Engine keeps of a chunk's weights."""
    quantised = [(layer, fp8) for layer, fp8 in _layers(chunk, model) if fp8 != "off"]
    linears = [linear for layer, fp8 in quantised for linear, _ in _linears(layer, model, fp8)]
    linears += [] if model.fp8 == "off" else _projections(chunk)
    return sum(2 * linear.weight.numel() + _weight_scales(linear.weight.shape, model.fp8) for linear in linears)


def is_quantised(number: int, num_layers: int, model: ModelConfig) -> bool:
    """Whether the decoder layer of this number, from 1, of so many computes in FP8."""
    first, last = model.fp8_skip_first_layers, num_layers - model.fp8_skip_last_layers
    return model.fp8 != "off" and first < number <= last


def _layers(chunk: GPTModel, model: ModelConfig) -> Iterator[tuple[TransformerLayer, Fp8]]:
    """Layers of the decoder and of multi-token prediction, which skips no FP8."""
    further = set() if (mtp := getattr(chunk, "mtp", None)) is None else set(mtp.modules())
    for layer in chunk.modules():
        if isinstance(layer, TransformerLayer):
            quantised = layer in further or is_quantised(layer.layer_number, layer.config.num_layers, model)
            yield layer, model.fp8 if quantised else "off"


def _projections(chunk: GPTModel) -> list[Linear]:
    """Of multi-token prediction, from two hidden states to one."""
    mtp = getattr(chunk, "mtp", None)
    return [] if mtp is None else [layer.eh_proj for layer in mtp.layers]


def _linears(layer: TransformerLayer, model: ModelConfig, fp8: Fp8) -> Iterator[tuple[Linear, Kept | None]]:
    """Each linear layer of a layer, and what it keeps instead of its input: None where that stays as it is. In FP8 Megatron
    lets those keep it whose input others keep anyway, is computed again, or moved (`set_save_original_input`).
    """
    copied: Kept | None = None if fp8 == "off" else "quantised"
    attention, mlp = layer.self_attention, layer.mlp
    again = () if isinstance(model.recompute, str) else model.recompute
    moved = "expert_fc1" in model.offload_modules
    yield attention.linear_proj, None
    for name in (*_OF_ATTENTION, *_DOWN):
        if (linear := getattr(attention, name, None)) is not None:
            yield linear, None if name in _DOWN and "layernorm" in again else copied
    if not hasattr(mlp, "experts"):
        yield from ((mlp.linear_fc1, copied), (mlp.linear_fc2, copied))
        return
    for expert in mlp.experts.local_experts:
        yield expert.linear_fc1, None if moved else copied
        yield expert.linear_fc2, "nothing" if "moe_act" in again else copied
    if (shared := mlp.shared_experts) is not None:
        yield from ((shared.linear_fc1, copied if "shared_experts" in again else None), (shared.linear_fc2, copied))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return FusedAttention.apply(query, key, value).flatten(1)


def _keeping(
    offload: Offload,
    linear: Linear,
    forward: Callable[..., object],
    kept: Kept,
    fp8: Fp8,
    given: torch.Tensor,
    *rest: object,
) -> object:
    """A linear layer's `forward`, with `kept` instead of its input."""
    weight = linear.weight.untyped_storage()._cdata
    rows = _in_fp8(given, fp8) if kept == "quantised" else None  # for the product itself

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Packed:
        if tensor.untyped_storage()._cdata == weight:
            return tensor
        copy = _in_fp8(tensor, fp8) if kept == "quantised" else ()
        moves = [offload.takes and offload.take(part) for part in copy]
        return _Packed(tensor.shape, tensor.dtype, [part for part, move in zip(copy, moves, strict=True) if not move])

    def unpack(packed: torch.Tensor | _Packed) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else torch.empty(packed.shape, dtype=packed.dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = forward(given, *rest)
    del rows
    return result


class _Packed(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    copy: list[torch.Tensor]


def _in_fp8(tensor: torch.Tensor, fp8: Fp8) -> tuple[torch.Tensor, ...]:
    """A copy of an activation, with the scales of its columns."""
    values = torch.empty(tensor.numel(), dtype=QUANTISED)
    width = tensor.shape[-1]
    blocks = 0 if not width else math.ceil(tensor.numel() // width / BLOCK)
    count = blocks * _to_four(width) if fp8 == "blockwise" else 1
    return values, torch.empty(count, dtype=torch.float32)


def _weight_scales(shape: torch.Size, fp8: Fp8) -> int:
    """Bytes, of rows and of columns (Float8BlockQuantizer.get_scale_shape: padded to four)."""
    if fp8 != "blockwise":
        return 4
    rows, columns = (math.ceil(size / BLOCK) for size in shape)
    return 4 * (rows * _to_four(columns) + columns * _to_four(rows))


def _to_four(count: int) -> int:
    return -(-count // 4) * 4
