"""One rank of an exchange over gloo, on parameters that are arrays of element numbers. No Megatron, no vLLM."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from r1mega.errors import WeightSyncError
from r1mega.platform import groups
from r1mega.weights import transport
from r1mega.weights.exchange import Exchange
from r1mega.weights.layout import generator_layout
from r1mega.weights.plan import GeneratorLayout, Plan
from r1mega.weights.trainer_layout import TrainerLayout
from tests.unit.weights.brute_force import (
    empty_parameters,
    lower_bound,
    number_elements,
    trainer_parameters,
    wanted_parameters,
)


def run_exchanges(cases: list[tuple[dict[str, Any], TrainerLayout, GeneratorLayout, int]]) -> list[dict[str, Any]]:
    """For each (config, trainer, generator, bucket bytes): what is wrong on this rank, and its bytes."""
    groups.init_distributed()
    transport.in_batches = functools.partial(transport.in_batches, limit=2)  # of the six messages that a rank may have
    rank, results = dist.get_rank(), []
    for config, trainer, generator, bucket_bytes in cases:
        elements = number_elements(config, fp8=False, dtype=torch.float64)
        plan = Plan(config, trainer, generator, model_dtype=torch.float64, bucket_bytes=bucket_bytes)
        exchange, messages = (Exchange(plan.copies(rank), rank, torch.float64, shared_memory=shared)
                              for shared in (True, False))  # fmt: skip
        sources = {name: ids.double() for name, ids in trainer_parameters(config, trainer, rank, elements).items()}
        targets = {name: ids.double() for name, ids in empty_parameters(
            generator_layout(config, generator.place(rank))).items()}  # fmt: skip
        wanted = wanted_parameters(config, generator, rank, elements)
        wrong = []
        for scale, way in ((1, exchange), (-3, messages), (2, exchange), (5, messages)):  # each twice
            way.run({name: tensor * scale for name, tensor in sources.items()}, targets)
            wrong += [name for name, ids in wanted.items() if not torch.equal(targets[name], ids.double() * scale)]
        assert type(exchange._transport).__name__ == "SharedMemoryTransport" and messages._transport is None
        lost = dict(sources)
        name = next(iter(lost))
        lost[name] = lost[name][:-1]
        results.append({
            "wrong": wrong, "bytes": exchange.num_bytes, "refused": refusal(exchange, lost, targets), "lost": name,
            "bound": lower_bound(config, plan, elements, rank),
        })  # fmt: skip
    dist.barrier()
    groups.destroy()
    return results


def refusal(exchange: Exchange, sources: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> str:
    try:
        exchange._check(sources, targets)
    except WeightSyncError as error:
        return str(error)
    return ""
