"""HF states in and out of a Megatron model in any layout, by the rules of `name_rules.py`.

`local_entries` lists what this rank holds, `load_hf` copies an HF state in, `export_hf` streams it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from r1mega.checkpoint.name_rules import (
    LAYER_NAME,
    Coordinates,
    Entry,
    ModelShape,
    make_entry,
    model_order,
    to_full,
    to_local,
)
from r1mega.errors import CheckpointError

_NOT_WEIGHTS = re.compile(r".*rotary_emb\.inv_freq")
_MTP_COPIES = re.compile(r"model\.layers\.(\d+)\.(embed_tokens|shared_head\.head)\.weight")


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
        scalar_head=getattr(model, "scalar_head", False),
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
            match = LAYER_NAME.fullmatch(name)
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
    problems.update(f"unknown: {name}" for name in tensors if name not in expected and not is_ignored(name, shape))
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise CheckpointError(
            f"the weights do not fit the model, {len(problems)} tensors differ; is config.json of another model?\n"
            f"  {listed}"
        )


def is_ignored(name: str, shape: ModelShape) -> bool:
    """What checkpoints may have besides the model: MTP layers that were not built, copies of shared tensors,
    the output layer that a scalar head stands in for."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= shape.num_layers + shape.num_mtp_layers:
        return True
    copies = (shape.tied_embeddings or shape.scalar_head) and name == "lm_head.weight"
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
            mine.append((Entry(entry.name, names, entry.hf_shapes, entry.form, entry.dim, other), tensor.dtype, stage))
    everyone = [mine]
    if stages > 1:
        everyone = [[] for _ in range(stages)]
        dist.all_gather_object(everyone, mine, group=ps.get_pipeline_model_parallel_group())
    first: dict[tuple[str, ...], tuple[Entry, torch.dtype, int]] = {}
    for stage_entries in everyone:  # embeddings may live on the last stage too: the first one owns them
        for item in stage_entries:
            first.setdefault(item[0].hf_names, item)
    return sorted(first.values(), key=lambda item: model_order(item[0]))


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
    if group.rank() != source:
        from r1mega import platform

        device = platform.current().device
        full = tuple(torch.empty(size, dtype=dtype, device=device) for size in entry.hf_shapes)
    if full is None:
        raise ValueError(f"{entry.name}: rank {source} of the group has no tensors to send")
    if group.size() == 1:
        return full
    full = tuple(t.contiguous() for t in full)
    for tensor in full:
        dist.broadcast(tensor, dist.get_global_rank(group, source), group=group)
    return full
