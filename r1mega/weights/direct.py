"""Shard to shard: from Megatron's parameters straight into vLLM's, by a plan. No tensor is ever whole on the way.

On a CPU every parameter of vLLM takes part: prepacked layers (linear ones, experts) get their plain parameters back
first, are written in them, and are packed again by vLLM; embeddings, norms and router biases are written where they
live. Nothing goes through vLLM's loaders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from r1mega.checkpoint.hf_state import coordinates, local_entries, model_shape, unwrap
from r1mega.config.model_files import HFConfig
from r1mega.errors import WeightSyncError
from r1mega.types import WritableEngine
from r1mega.weights.digest import tensor_digest
from r1mega.weights.exchange import Exchange
from r1mega.weights.layout import Placement, tensor_shapes, weight_dtype
from r1mega.weights.plan import GeneratorLayout, Plan
from r1mega.weights.quantize import QuantizedParameters, quantized_parts
from r1mega.weights.trainer_layout import Holders, TrainerLayout


def local_parameters(chunks: Sequence[Any]) -> dict[str, torch.Tensor]:
    """This rank's trainer parameters by the names that a plan has for them: the first HF name of each."""
    return {entry.hf_names[0]: tensor for entry, tensor in local_entries(chunks)}


def measured_layout(chunks: Sequence[Any]) -> TrainerLayout:
    """The layout that the trainer really has, from Megatron's groups and from the layers that each rank holds.

    A collective call. Raises WeightSyncError when Megatron has numbered its ranks in another order than the plan does.
    """
    from megatron.core import parallel_state as ps

    place, shape = coordinates(), model_shape(chunks[0])
    layers = {layer.layer_number - 1 for chunk in chunks for layer in unwrap(chunk).decoder.layers}
    pp, stage = ps.get_pipeline_model_parallel_world_size(), ps.get_pipeline_model_parallel_rank()
    mine = (stage, layers, any(hasattr(unwrap(chunk), "mtp") for chunk in chunks))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    owner = {layer: theirs for theirs, held, _ in everyone for layer in held}
    layout = TrainerLayout(
        world=dist.get_world_size(), tp=place.tp, ep=place.ep, etp=place.etp, pp=pp,
        cp=ps.get_context_parallel_world_size(), stages=tuple(owner[layer] for layer in range(shape.num_layers)),
        embedding_on_last=shape.tied_embeddings, mtp_stage=next((theirs for theirs, _, has in everyone if has), None),
    )  # fmt: skip
    rank, per_stage = dist.get_rank(), layout.world // pp
    expected = (rank % place.tp, rank % place.etp, rank // place.etp % place.ep, rank // per_stage)
    found = (place.tp_rank, place.etp_rank, place.ep_rank, stage)
    if expected != found:
        raise WeightSyncError(
            f"rank {rank} is (tp, etp, ep, stage) {found} in Megatron's groups, {expected} by the "
            "order tp-cp-ep-dp-pp that the reshard plan counts on; build the groups in that order"
        )
    return layout


class DirectTransfer:
    """Strategy `direct`: plan, messages and digests of one trainer and one generator, made once for all pushes.

    chunks: gives the trainer's, with their weights whole; asked at each push and digest. generator: the layout of the engines in these processes. ranks_per_node: to prefer short ways. Collective.
    """

    def __init__(
        self,
        chunks: Callable[[], Sequence[Any]],
        engine: WritableEngine,
        hf_config: HFConfig,
        generator: GeneratorLayout,
        *,
        model_dtype: torch.dtype,
        bucket_bytes: int,
        ranks_per_node: int | None = None,
        shared_memory: bool = True,
    ):
        self._chunks, self._engine, self._dtype, self._fp8 = chunks, engine, model_dtype, generator.fp8
        self._cache_bytes = 2 * bucket_bytes  # of what is quantised: two buckets are packed from it
        trainer = measured_layout(chunks())
        self.plan = Plan(
            hf_config,
            trainer,
            generator,
            model_dtype=model_dtype,
            bucket_bytes=bucket_bytes,
            ranks_per_node=ranks_per_node,
        )
        rank = dist.get_rank()
        self.exchange = Exchange(
            self.plan.copies(rank), rank, model_dtype, fp8=self._fp8, shared_memory=shared_memory
        )  # fmt: skip
        shapes = tensor_shapes(hf_config, self._fp8)
        self._names = list(shapes)
        self._parts = quantized_parts(trainer, shapes, hf_config, rank)
        self._owned = owned_placements(trainer, shapes, hf_config, rank)
        self._digest: dict[str, int] | None = None

    def push(self) -> None:
        """Makes the generator the trainer's equal. A collective call."""
        with self._engine.parameters_for_writing() as parameters:
            self.write(parameters)

    def write(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Fills the generator's plain parameters on this rank. A collective call."""
        self.exchange.run(self._sources(), parameters)

    def _sources(self) -> Mapping[str, torch.Tensor]:
        """This rank's parameters, as they are sent."""
        parameters = local_parameters(self._chunks())
        return QuantizedParameters(parameters, self._parts, self._cache_bytes) if self._fp8 else parameters

    def digest(self, *, again: bool = False) -> dict[str, int]:
        """Of every HF tensor as the trainer sends it (in FP8: quantised anew): each rank digests its share of the shards. A
        collective call.

        again: the trainer's weights are what they were at the last call, the digest too: no byte is looked at. If they are not
        all the same, what the generator then holds differs from it.
        """
        if again and self._digest is not None:
            return self._digest
        sources = self._sources()
        partial = dict.fromkeys(self._names, 0)
        for placement in self._owned:
            held = placement.read(sources).to(weight_dtype(placement.name, self._dtype, self._fp8))
            partial[placement.name] += tensor_digest(held, placement.source)
        wrapped = [(value + (1 << 63)) % (1 << 64) - (1 << 63) for value in partial.values()]
        values = torch.tensor(wrapped, dtype=torch.int64, device=next(iter(sources.values())).device)
        dist.all_reduce(values)
        self._digest = {name: value % (1 << 64) for name, value in zip(self._names, values.tolist(), strict=True)}
        return self._digest


def owned_placements(
    trainer: TrainerLayout, shapes: Mapping[str, tuple[int, ...]], config: HFConfig, rank: int
) -> tuple[Placement, ...]:
    """The shards that a rank answers for: each shard has one such rank, the replicas take turns."""
    owned = []
    groups: dict[tuple[Holders, tuple[int, ...]], np.ndarray] = {}
    turn = 0
    for name in shapes:
        stages = trainer.holding_stages(name)
        for placement, holders in trainer.shards(name, shapes, config):
            key = (holders, stages)
            if key not in groups:
                groups[key] = trainer.ranks(holders, stages)
            turn += 1
            if groups[key][turn % len(groups[key])] == rank:
                owned.append(placement)
    return tuple(owned)
