"""Both sides of a reshard, element by element: every element of every HF tensor is a number, every rank's parameters
are arrays of them. The trainer's are cut here, by torch's own chunks, without the regions that the program goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from r1mega.checkpoint.name_rules import EXPERT_RULES, RULES, TOP_RULES, Form, Rule
from r1mega.weights.layout import FP8_BLOCK, SCALE, GeneratorRank, generator_layout, weight_dtype
from r1mega.weights.plan import GeneratorLayout, Plan
from r1mega.weights.trainer_layout import TrainerLayout


def chunked(
    parts: Sequence[torch.Tensor], form: Form, dim: int | None, kv_groups: int, rank: int, ranks: int
) -> torch.Tensor:
    """One rank's part of what Megatron makes of the HF tensors `parts`."""
    if form == "qkv":  # [groups, (queries + 2) * head, ...], cut by groups
        whole = torch.cat([part.reshape(kv_groups, -1, *part.shape[1:]) for part in parts], dim=1)
        return whole.chunk(ranks)[rank].flatten(0, 1)
    if form == "vocabulary":
        padding = -len(parts[0]) % ranks
        padded = torch.cat([parts[0], parts[0].new_zeros(padding, *parts[0].shape[1:])])
        return padded.chunk(ranks)[rank]
    return torch.cat([part if dim is None else part.chunk(ranks, dim)[rank] for part in parts])


MOE = {
    "model_type": "deepseek_v3", "vocab_size": 70, "hidden_size": 8, "intermediate_size": 16,
    "moe_intermediate_size": 8, "num_hidden_layers": 4, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "num_attention_heads": 4, "n_shared_experts": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 3, "q_lora_rank": 5, "qk_rope_head_dim": 2, "v_head_dim": 2,
    "qk_nope_head_dim": 2, "tie_word_embeddings": False,
}  # fmt: skip
DENSE = {
    "model_type": "qwen2", "vocab_size": 70, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "deepseek": MOE,
    "deepseek without query rank": MOE | {"q_lora_rank": None},
    "qwen2": DENSE,
    "qwen3 tied": DENSE | {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 4},
    "qwen3 moe": DENSE
    | {
        "model_type": "qwen3_moe",
        "head_dim": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "mlp_only_layers": [1],
    },
}
BLOCKS = MOE | {
    "hidden_size": 320, "intermediate_size": 512, "moe_intermediate_size": 256, "q_lora_rank": 256, "kv_lora_rank": 130,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_shared_experts": 2,
    "n_routed_experts": 4, "num_hidden_layers": 2,
}  # fmt: skip
"""Large enough to be cut between FP8 blocks; the last blocks of some tensors are partial."""


@dataclass(frozen=True, slots=True)
class Elements:
    """ids: by HF name, [full shape] int64, all different; itemsize: bytes of each element by its id."""

    ids: dict[str, torch.Tensor]
    itemsize: torch.Tensor


def number_elements(config: Mapping[str, Any], fp8: bool, dtype: torch.dtype = torch.bfloat16) -> Elements:
    ids, sizes, start = {}, [torch.zeros(1, dtype=torch.int64)], 1  # 0 pads the trainer's vocabulary
    for placement in generator_layout(config, GeneratorRank(fp8=fp8)):
        count = torch.Size(placement.shape).numel()
        ids[placement.name] = torch.arange(start, start + count).view(placement.shape)
        sizes.append(torch.full((count,), weight_dtype(placement.name, dtype, fp8).itemsize))
        start += count
    return Elements(ids, torch.cat(sizes))


def trainer_parameters(
    config: Mapping[str, Any], layout: TrainerLayout, rank: int, elements: Elements
) -> dict[str, torch.Tensor]:
    """What a trainer rank holds, by the first HF name of each Megatron parameter."""
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]
    is_latent = "kv_lora_rank" in config
    per_stage = layout.world // layout.pp
    stage, place = divmod(rank, per_stage)
    tp_rank, etp_rank, ep_rank = place % layout.tp, place % layout.etp, place // layout.etp % layout.ep
    held: dict[str, torch.Tensor] = {}

    def add(rule: Rule, prefix: str, expert: int | None = None) -> None:
        names = tuple(prefix + name for name in rule.hf)
        if not all(name in elements.ids for name in names) or names[0] in held:
            return
        if rule.hf[0].startswith("self_attn.q_proj") and (rule.form == "qkv") == is_latent:
            return  # the name belongs to another family's rule
        parts = [elements.ids[name] for name in names]
        cut = (tp_rank, layout.tp) if expert is None else (etp_rank, layout.etp)
        held[names[0]] = chunked(parts, rule.form, rule.dim, groups, *cut)
        for name, part in zip(names, parts, strict=True):
            if name + SCALE in elements.ids:
                local = part if rule.dim is None else part.chunk(cut[1], rule.dim)[cut[0]]
                held[name + SCALE] = blocks_of(local, part, elements.ids[name + SCALE])

    for layer, owner in enumerate(layout.stages):
        if owner != stage:
            continue
        prefix = f"model.layers.{layer}."
        for rule in [*RULES.values(), Rule("", ("self_attn.q_norm.weight",))]:
            add(rule, prefix)
        num_experts = config.get("n_routed_experts") or config.get("num_experts", 0)
        for expert in range(num_experts):
            if expert // (num_experts // layout.ep) == ep_rank:
                for rule in EXPERT_RULES.values():
                    add(rule, f"{prefix}mlp.experts.{expert}.", expert)
    embedding, norm, head = TOP_RULES.values()
    last, further = layout.pp - 1, layout.mtp_stage
    if stage in (0, further) or (layout.embedding_on_last and stage == last):
        add(embedding, "")
    if stage == (last if further is None else layout.stages[-1]):
        add(norm, "")
    if stage == last:
        add(head, "")
    return held


def blocks_of(local: torch.Tensor, full: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The scales' ids of the blocks of a local part, by the place of each block's first element in the full tensor."""
    offset = local[::FP8_BLOCK, ::FP8_BLOCK] - int(full[0, 0])
    return scales[offset // full.shape[1] // FP8_BLOCK, offset % full.shape[1] // FP8_BLOCK]


def wanted_parameters(
    config: Mapping[str, Any], layout: GeneratorLayout, rank: int, elements: Elements
) -> dict[str, torch.Tensor]:
    """What a generator rank shall hold by its placements; -1 where nothing is placed."""
    placements = generator_layout(config, layout.place(rank))
    wanted = empty_parameters(placements)
    for p in placements:
        p.read(wanted).copy_(elements.ids[p.name][tuple(slice(a, b) for a, b in p.source)])
    return wanted


def empty_parameters(placements) -> dict[str, torch.Tensor]:
    sizes: dict[str, list[int]] = {}
    for p in placements:
        stops = [stop for _, stop in p.target]
        sizes[p.parameter] = [max(pair) for pair in zip(stops, sizes.get(p.parameter, stops), strict=True)]
    return {name: torch.full(size, -1) for name, size in sizes.items()}


@dataclass(frozen=True, slots=True)
class Outcome:
    """sent, received: [buckets, ranks] bytes between different ranks; problems: what was written wrongly."""

    sent: torch.Tensor
    received: torch.Tensor
    problems: list[str]


def execute(config: Mapping[str, Any], plan: Plan, elements: Elements) -> Outcome:
    """Carries out every copy on the arrays of ids and compares with what was wanted."""
    world = plan.trainer.world
    held = [trainer_parameters(config, plan.trainer, rank, elements) for rank in range(world)]
    wanted = [wanted_parameters(config, plan.generator, rank, elements) for rank in range(world)]
    found = [empty_parameters(generator_layout(config, plan.generator.place(rank))) for rank in range(world)]
    problems, copies = [], list(plan.copies())
    buckets = 1 + max((copy.bucket for copy in copies), default=0)
    sent, received = torch.zeros(buckets, world, dtype=torch.int64), torch.zeros(buckets, world, dtype=torch.int64)
    for copy in copies:
        overlap = copy.overlap
        values = held[copy.source][overlap.source_parameter][tuple(slice(a, b) for a, b in overlap.source)]
        region = found[copy.target][overlap.target_parameter][tuple(slice(a, b) for a, b in overlap.target)]
        if (region != -1).any():
            problems.append(f"{overlap.target_parameter}{overlap.target} on rank {copy.target} is written twice")
        region.copy_(values.reshape(region.shape))
        if int(elements.itemsize[values.reshape(-1)].sum()) != overlap.num_bytes:
            problems.append(f"{overlap}: not its bytes")
        if copy.source != copy.target:
            sent[copy.bucket, copy.source] += overlap.num_bytes
            received[copy.bucket, copy.target] += overlap.num_bytes
    for rank in range(world):
        wrong = [name for name, ids in wanted[rank].items() if not torch.equal(found[rank][name], ids)]
        problems += [f"{name} on rank {rank}" for name in wrong]
    return Outcome(sent, received, problems)


def lower_bound(config: Mapping[str, Any], plan: Plan, elements: Elements, rank: int) -> int:
    """Bytes that a rank wants and does not hold."""
    wants = torch.zeros(len(elements.itemsize), dtype=torch.bool)
    for ids in wanted_parameters(config, plan.generator, rank, elements).values():
        wants[ids[ids > 0]] = True
    for ids in trainer_parameters(config, plan.trainer, rank, elements).values():
        wants[ids.reshape(-1)] = False
    return int(elements.itemsize[wants].sum())
