"""Where each HF tensor lives inside the generator's (vLLM's) fused, sharded and padded parameters.

Pure: from an HF config and one rank's place in the generator's layout to a list of placements; nothing here imports
vLLM or touches a tensor, except `read`. `trainer_layout.py` is the same for the trainer. Written from vllm 0.32.0
model_executor/models (deepseek_v2, llama, qwen2, qwen3, qwen3_moe) and layers (linear, vocab_parallel_embedding),
independently of the loaders that write the parameters, so that reading back through it proves what they wrote. A family
says which tensors there are (model/architecture.py); how vLLM fuses and cuts them is said here, once for all families. Regions are in global
coordinates of the HF tensor: a plan from any shard to any shard can be built on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from r1mega.checkpoint.fp8_blocks import BLOCK as FP8_BLOCK
from r1mega.checkpoint.fp8_blocks import SCALE, is_quantized
from r1mega.checkpoint.name_rules import Region
from r1mega.config.layout import GENERATED_MODEL_TYPES, VOCABULARY_PADDING, expert_key
from r1mega.config.model_files import HFConfig
from r1mega.errors import ConfigError
from r1mega.model.architecture import Experts, GroupedAttention, LatentAttention
from r1mega.model.families import architecture_of

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class GeneratorRank:
    """One rank's place in the generator. With ep > 1 experts are spread over `ep` ranks instead of cut by tp: those of
    one attention group of tp ranks, or of ep / tp such groups.

    fp8: linear layers hold e4m3 weights with a float32 scale for each 128 x 128 block.
    """

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0
    fp8: bool = False

    @property
    def splits_tokens(self) -> bool:
        """Whether each rank of an attention group has a part of its tokens in layers of experts, whose shared ones it then holds
        whole (vllm/config/parallel.py, use_sequence_parallel_moe)."""
        return self.ep > self.tp > 1


@dataclass(frozen=True, slots=True)
class Placement:
    """`parameter[target]` holds `tensor[source]` of the HF tensor `name` (of full shape `shape`).

    target has one more dimension than source for stacked experts (of extent 1). replica: 0 on exactly one of the ranks
    that hold the same source region. Example: rows 48..624 of fused_qkv_a_proj.weight hold kv_a_proj_with_mqa.weight.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    target: Region
    source: Region
    replica: int = 0

    @property
    def is_whole(self) -> bool:
        return all(stop - start == size for (start, stop), size in zip(self.source, self.shape, strict=True))

    def read(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A view of this rank's part of the tensor, shaped like `source`. Raises KeyError, IndexError as torch does."""
        return self._held(parameters).reshape([stop - start for start, stop in self.source])

    def write(self, parameters: Mapping[str, torch.Tensor], part: torch.Tensor) -> None:
        """Put this rank's part of the tensor, shaped like `source`, where it belongs."""
        held = self._held(parameters)
        held.copy_(part.reshape(held.shape))

    def _held(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parameters[self.parameter][tuple(slice(start, stop) for start, stop in self.target)]


def weight_dtype(name: str, model_dtype: torch.dtype, fp8: bool = False) -> torch.dtype:
    """The dtype in which the generator holds a tensor: the router's expert bias and scales are always float32. fp8: linear layers
    are in e4m3, not router, norms, embeddings, head.
    """
    if name.endswith(("e_score_correction_bias", SCALE)):
        return torch.float32
    return torch.float8_e4m3fn if fp8 and is_quantized(name) else model_dtype


def is_ignored(name: str, config: HFConfig) -> bool:
    """Tensors of an HF checkpoint that the generator does not use: MTP layers, a tied head, rotary tables."""
    if "rotary_emb.inv_freq" in name:
        return True
    if name == "lm_head.weight":
        return bool(config.get("tie_word_embeddings"))
    prefix, _, rest = name.partition("model.layers.")
    return not prefix and rest.split(".")[0].isdigit() and int(rest.split(".")[0]) >= config["num_hidden_layers"]


def generator_layout(
    config: HFConfig, rank: GeneratorRank = GeneratorRank(), layers: Sequence[int] | None = None
) -> tuple[Placement, ...]:
    """Placements of every HF tensor on one generator rank; of the decoder layers only `layers` when given.

    config: the dictionary of an HF config.json. Raises ConfigError for a model family that is not known, or not in the
    generator, and for a layout that does not divide.
    """
    if (model_type := config.get("model_type")) not in GENERATED_MODEL_TYPES:
        raise ConfigError(f"no generator layout for model_type {model_type!r}")
    layers = range(config["num_hidden_layers"]) if layers is None else layers
    placements = _LayoutBuilder(config, rank).placements(layers)
    return tuple(part for whole in placements for part in (_with_scales(whole) if rank.fp8 else (whole,)))


def tensor_shapes(config: HFConfig, fp8: bool = False) -> dict[str, tuple[int, ...]]:
    """Full shape of every HF tensor that the generator holds, on whichever of its ranks; in FP8 with the scales."""
    return {placement.name: placement.shape for placement in generator_layout(config, GeneratorRank(fp8=fp8))}


def divided_names(config: HFConfig, rank: GeneratorRank) -> list[str]:
    """The HF tensors that a generator's ranks hold together and not each for itself; the same list on each of them.

    Besides what tp cuts: the vocabulary, of which the last ranks may have no row (and a small one lies on the first
    alone), and with ep > 1 experts, which are whole on one rank and on the others not at all.
    """
    own = {placement.name: placement for placement in generator_layout(config, rank)}
    return [
        name for name in tensor_shapes(config, rank.fp8)
        if name in VOCABULARY or (rank.ep > 1 and ".mlp.experts." in name) or not own[name].is_whole
    ]  # fmt: skip


def block_region(region: Region, shape: Sequence[int]) -> Region | None:
    """The same region in units of 128 x 128 blocks; None when it cuts through a block (the last may be partial)."""
    if any(
        start % FP8_BLOCK or (stop % FP8_BLOCK and stop != size)
        for (start, stop), size in zip(region, shape, strict=True)
    ):
        return None
    return tuple((start // FP8_BLOCK, -(-stop // FP8_BLOCK)) for start, stop in region)


def _with_scales(weight: Placement) -> tuple[Placement, ...]:
    if not is_quantized(weight.name):
        return (weight,)
    blocks = block_region(weight.source, weight.shape)
    lead = len(weight.target) - len(weight.source)
    if blocks is None or any(start % FP8_BLOCK for start, _ in weight.target[lead:]):
        raise ConfigError(
            f"{weight.name}: the generator's layout has rows and columns {weight.source} of it at {weight.target[lead:]} of "
            f"{weight.parameter}, which cuts FP8 blocks of {FP8_BLOCK} x {FP8_BLOCK}; choose another rollout.tp, or leave "
            "rollout.quantization out"
        )
    starts = [start // FP8_BLOCK for start, _ in weight.target[lead:]]
    target = tuple((start, start + last - first) for start, (first, last) in zip(starts, blocks, strict=True))
    shape = tuple(-(-size // FP8_BLOCK) for size in weight.shape)
    return weight, replace(
        weight,
        name=weight.name + SCALE,
        shape=shape,
        parameter=weight.parameter + SCALE,
        target=weight.target[:lead] + target,
        source=blocks,
    )


class _LayoutBuilder:
    def __init__(self, config: HFConfig, rank: GeneratorRank):
        self.model = architecture_of(config)
        self.expert_key = expert_key(config)
        self.rank = rank
        self.hidden = self.model.hidden_size
        self.heads = self.model.attention.heads
        self._divide(self.heads, rank.tp, "num_attention_heads")

    def placements(self, layers: Sequence[int]) -> Iterator[Placement]:
        model = self.model
        yield from self._vocabulary("model.embed_tokens.weight")
        for layer in layers:
            prefix = f"model.layers.{layer}."
            yield self._whole(prefix + "input_layernorm.weight", (self.hidden,))
            yield self._whole(prefix + "post_attention_layernorm.weight", (self.hidden,))
            if isinstance(model.attention, LatentAttention):
                yield from self._latent_attention(prefix + "self_attn.", model.attention)
            else:
                yield from self._grouped_attention(prefix + "self_attn.", model.attention)
            if model.experts is not None and model.has_experts(layer):
                yield from self._experts(prefix + "mlp.", model.experts)
            else:
                yield from self._mlp(prefix + "mlp.", model.intermediate_size, model.mlp_bias)
        yield self._whole("model.norm.weight", (self.hidden,))
        if not model.tied_embeddings:
            yield from self._vocabulary("lm_head.weight")

    def _vocabulary(self, name: str) -> Iterator[Placement]:
        """Rows padded to a multiple of 64, then cut evenly: the last ranks may hold padding only."""
        size, tp = self.model.vocab_size, self.rank.tp
        per_rank = self._divide(-(-size // VOCABULARY_PADDING) * VOCABULARY_PADDING, tp, "padded vocab_size")
        start = min(self.rank.tp_rank * per_rank, size)
        stop = min(start + per_rank, size)
        if stop > start:
            yield Placement(
                name,
                (size, self.hidden),
                name,
                ((0, stop - start), (0, self.hidden)),
                ((start, stop), (0, self.hidden)),
            )

    def _latent_attention(self, prefix: str, attention: LatentAttention) -> Iterator[Placement]:
        query_rank, latent, rope = attention.query_rank, attention.kv_rank, attention.rope_size
        query_size = self.heads * (attention.nope_size + rope)
        if query_rank:
            fused = prefix + "fused_qkv_a_proj.weight"
            yield self._rows(prefix + "q_a_proj.weight", (query_rank, self.hidden), fused, 0)
            yield self._rows(prefix + "kv_a_proj_with_mqa.weight", (latent + rope, self.hidden), fused, query_rank)
            yield self._whole(prefix + "q_a_layernorm.weight", (query_rank,))
            yield self._column(prefix + "q_b_proj.weight", (query_size, query_rank))
        else:
            yield self._column(prefix + "q_proj.weight", (query_size, self.hidden))
            yield self._whole(prefix + "kv_a_proj_with_mqa.weight", (latent + rope, self.hidden))
        yield self._whole(prefix + "kv_a_layernorm.weight", (latent,))
        yield self._column(
            prefix + "kv_b_proj.weight", (self.heads * (attention.nope_size + attention.value_size), latent)
        )
        yield self._row_parallel(prefix + "o_proj.weight", (self.hidden, self.heads * attention.value_size))

    def _grouped_attention(self, prefix: str, attention: GroupedAttention) -> Iterator[Placement]:
        """q, k and v of this rank's heads stacked in qkv_proj; KV heads repeated where there are fewer than ranks."""
        tp, tp_rank, size, kv_heads = self.rank.tp, self.rank.tp_rank, attention.head_size, attention.groups
        query_rows = self.heads // tp * size
        copies = max(1, tp // kv_heads)
        if tp > kv_heads and tp % kv_heads:
            raise ConfigError(
                f"rollout.tp = {tp} is not a multiple of num_key_value_heads = {kv_heads}; choose another"
            )
        kv_rows = (self._divide(kv_heads, tp, "num_key_value_heads") if copies == 1 else 1) * size
        starts = {
            "q": (0, query_rows, tp_rank, 0, self.heads * size),
            "k": (query_rows, kv_rows, tp_rank // copies, tp_rank % copies, kv_heads * size),
            "v": (query_rows + kv_rows, kv_rows, tp_rank // copies, tp_rank % copies, kv_heads * size),
        }
        if attention.qk_norm and attention.output_bias:
            raise ConfigError(
                "attention_bias with norms on q and k: vLLM's model has no bias in o_proj and would drop it"
            )
        for kind, (offset, rows, index, replica, full_rows) in starts.items():
            parts = {"weight": (self.hidden,)} | ({"bias": ()} if attention.qkv_bias else {})
            for part, columns in parts.items():
                rest = tuple((0, column) for column in columns)
                yield Placement(
                    f"{prefix}{kind}_proj.{part}",
                    (full_rows, *columns),
                    f"{prefix}qkv_proj.{part}",
                    ((offset, offset + rows), *rest),
                    ((index * rows, (index + 1) * rows), *rest),
                    replica,
                )
        yield self._row_parallel(prefix + "o_proj.weight", (self.hidden, self.heads * size))
        if attention.output_bias:
            yield self._whole(prefix + "o_proj.bias", (self.hidden,))
        if attention.qk_norm:
            yield self._whole(prefix + "q_norm.weight", (size,))
            yield self._whole(prefix + "k_norm.weight", (size,))

    def _mlp(self, prefix: str, size: int, has_bias: bool, is_whole: bool = False) -> Iterator[Placement]:
        """is_whole: on every rank, instead of cut by tp."""
        place, replica = (0, self.rank.tp_rank) if is_whole else (self.rank.tp_rank, 0)
        rows = self._divide(size, 1 if is_whole else self.rank.tp, f"the intermediate size of {prefix.rstrip('.')}")
        start = place * rows
        parts = {"weight": ((0, self.hidden),)} | ({"bias": ()} if has_bias else {})
        for part, rest in parts.items():
            shape = (size, *(stop for _, stop in rest))
            for index, kind in enumerate(("gate", "up")):
                yield Placement(
                    f"{prefix}{kind}_proj.{part}",
                    shape,
                    f"{prefix}gate_up_proj.{part}",
                    ((index * rows, (index + 1) * rows), *rest),
                    ((start, start + rows), *rest),
                    replica,
                )
        down = self._whole if is_whole else self._row_parallel
        yield down(prefix + "down_proj.weight", (self.hidden, size))
        if has_bias:
            yield self._whole(prefix + "down_proj.bias", (self.hidden,))

    def _experts(self, prefix: str, experts: Experts) -> Iterator[Placement]:
        """Router, shared experts as one MLP, routed experts stacked in w13 (gate above up) and w2."""
        rank, size = self.rank, experts.size
        yield self._whole(prefix + "gate.weight", (experts.count, self.hidden))
        if experts.router_bias:
            yield self._whole(prefix + "gate.e_score_correction_bias", (experts.count,))
        if experts.shared_size:
            yield from self._mlp(prefix + "shared_experts.", experts.shared_size, False, rank.splits_tokens)
        local = self._divide(experts.count, rank.ep, self.expert_key, "rollout.ep")
        cut, cut_rank = (1, 0) if rank.ep > 1 else (rank.tp, rank.tp_rank)
        rows = self._divide(size, cut, "moe_intermediate_size")
        mine, hidden = (cut_rank * rows, (cut_rank + 1) * rows), (0, self.hidden)
        w13, w2 = prefix + "experts.routed_experts.w13_weight", prefix + "experts.routed_experts.w2_weight"
        for slot in range(local):
            expert = f"{prefix}experts.{rank.ep_rank * local + slot}."
            at = (slot, slot + 1)
            for index, kind in enumerate(("gate", "up")):
                half = (index * rows, (index + 1) * rows)
                name = f"{expert}{kind}_proj.weight"
                yield Placement(name, (size, self.hidden), w13, (at, half, hidden), (mine, hidden))
            name = f"{expert}down_proj.weight"
            yield Placement(name, (self.hidden, size), w2, (at, hidden, (0, rows)), (hidden, mine))

    def _whole(self, name: str, shape: tuple[int, ...]) -> Placement:
        region = tuple((0, size) for size in shape)
        return Placement(name, shape, name, region, region, self.rank.tp_rank)

    def _rows(self, name: str, shape: tuple[int, int], parameter: str, offset: int) -> Placement:
        """A whole tensor as a block of rows of a fused, replicated parameter."""
        rest = (0, shape[1])
        target = ((offset, offset + shape[0]), rest)
        return Placement(name, shape, parameter, target, ((0, shape[0]), rest), self.rank.tp_rank)

    def _column(self, name: str, shape: tuple[int, int]) -> Placement:
        rows = shape[0] // self.rank.tp
        start, rest = self.rank.tp_rank * rows, (0, shape[1])
        return Placement(name, shape, name, ((0, rows), rest), ((start, start + rows), rest))

    def _row_parallel(self, name: str, shape: tuple[int, int]) -> Placement:
        columns = self._divide(shape[1], self.rank.tp, f"the input size of {name}")
        start, rest = self.rank.tp_rank * columns, (0, shape[0])
        return Placement(name, shape, name, (rest, (0, columns)), (rest, (start, start + columns)))

    @staticmethod
    def _divide(size: int, parts: int, what: str, key: str = "rollout.tp") -> int:
        if size % parts:
            raise ConfigError(
                f"the generator's layout does not divide the model: {what} = {size} over {parts} ranks; "
                f"choose another {key}"
            )
        return size // parts
