"""The least that a layout takes: of its parameters by arithmetic, of its activations by what was measured of other layouts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from r1mega.config.layout import mtp_stage, stage_layers
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import ParallelConfig, Recompute, TrainingStage
from r1mega.model.families import architecture_of
from r1mega.plan.memory import StageRank, in_flight, moment_bytes, padded
from r1mega.plan.rank import LONGEST, Activations, Kind, RankMemory, Routes, Static, kind_of
from r1mega.plan.seconds import layer_parameters
from r1mega.plan.workload import Workload

SURE = 0.8
"""Activations a token of a layout not measured, over those of another that cuts no more of a layer: at the least."""


class Chunk(NamedTuple):
    """What the activations of a chunk hang on, beside how many layers it has. kinds: of its layers; ends: whether
    it is the model's first, its last, and that of multi-token prediction; tokens: of a microbatch that were sent through;
    uneven: tokens of the experts of the fullest rank over the mean.
    """

    recompute: Recompute
    tp: int
    cp: int
    ep: int
    etp: int
    tokens: int
    kinds: tuple[Kind, ...] = ()
    ends: tuple[bool, bool, bool] = (False, False, False)
    uneven: float = 1.0

    def share(self, other: Chunk) -> float:
        """What a token of a rank takes in `other`, over what it takes here: at the least. SURE: where as much or more is
        gathered and sent to the fullest experts there, and no more tokens share the gradients of weights; 0: that is not known.
        """
        if self[:6] == other[:6]:
            return 1.0
        mine, others = self.tokens / (self.tp * self.cp), other.tokens / (other.tp * other.cp)
        same = (self.recompute, self.etp, self.ep == 1) == (other.recompute, other.etp, other.ep == 1)
        cuts = self.tp <= other.tp and self.cp <= other.cp and self.uneven <= other.uneven
        return SURE if same and cuts and mine >= others else 0.0

    def within(self, other: Chunk) -> bool:
        """Whether what works here works there too."""
        inside = all(mine <= others for mine, others in zip(self.ends, other.ends, strict=True))
        return inside and set(self.kinds) <= set(other.kinds)


@dataclass
class Bounds:
    """Of the layouts of one model on so many GPUs."""

    hf: HFConfig
    gpus: int
    imbalance: float
    _seen: dict[Chunk, Activations] = field(default_factory=dict)
    _of_stages: dict[object, list[tuple[Chunk, Counter[Kind]]]] = field(default_factory=dict)

    def least(self, config: TrainingStage, work: Workload | None) -> list[StageRank]:
        """No more than a rank of each of the stages takes one of which is the fullest: of its parameters all that tp could cut
        is cut; activations by what was measured. work: None: without activations.
        """
        return [self.least_of(config, stage, work) for stage in self._full(config.parallel)]

    def least_of(self, config: TrainingStage, stage: int, work: Workload | None) -> StageRank:
        """`least` of one stage."""
        kept, waiting = Activations(1, 0.0, 0.0, 0.0, {}), 0.0
        if work is not None:
            kept = self.activations(config, stage, work)
            waiting = in_flight(config.parallel, stage, work.microbatches, model=config.model)
        return StageRank(stage, RankMemory(self._static(config, stage), (kept,)), waiting, 0.0)

    def activations(self, config: TrainingStage, stage: int, work: Workload) -> Activations:
        """At the least, of all chunks of a stage."""
        p, kept, working = config.parallel, 0.0, 0.0
        mine = padded(work.microbatch_tokens, p) / (p.tp * p.cp)
        for chunk, counts in self._chunks(config, stage, work):
            layers: dict[Kind, float] = {}
            for other, seen in self._seen.items():
                if times := other.share(chunk) * mine * other.tp * other.cp / seen.tokens:
                    for kind, one in seen.layers.items():
                        layers[kind] = max(times * one, layers.get(kind, 0.0))
                    if other.tp == chunk.tp and other.within(chunk):
                        working = max(working, times * seen.working)
            kept += sum(count * layers.get(kind, 0.0) for kind, count in counts.items())
        return Activations(1, kept, working, 0.0, {})

    def remember(self, config: TrainingStage, work: Workload, stage: int, memory: RankMemory) -> None:
        """What was measured of a rank of this stage."""
        for (chunk, _), activations in zip(self._chunks(config, stage, work), memory.activations, strict=True):
            self._seen[chunk] = activations

    def stages(self, parallel: ParallelConfig) -> tuple[range, ...]:
        """The decoder layers of each."""
        return stage_layers(parallel, len(self._sizes))

    def _static(self, config: TrainingStage, stage: int) -> Static:
        p, itemsize = config.parallel, getattr(torch, config.model.dtype).itemsize
        numbers = [self._sizes[layer] for chunk in self.stages(p)[stage :: p.pp] for layer in chunk]
        dense, experts = sum(one for one, _ in numbers), sum(one for _, one in numbers) / (p.ep * p.etp)
        if stage == 0:
            dense += self.hf["vocab_size"] * self.hf["hidden_size"]
        dense /= p.tp
        both = int(dense + experts)
        updated = int(p.tp * p.pp * dense / self.gpus + p.ep * p.etp * p.pp * experts / self.gpus)
        gradients = 4 if config.optimizer.grad_reduce_in_fp32 else itemsize
        main = 0 if itemsize == 4 else 4 * updated
        first, second = (size * updated for size in moment_bytes(config.optimizer))
        return Static(itemsize * both, gradients * both, main, first, second, both, int(experts), 0)

    def _chunks(self, config: TrainingStage, stage: int, work: Workload) -> list[tuple[Chunk, Counter[Kind]]]:
        """Of a stage: (what a chunk's activations hang on; its layers by their kinds)."""
        sent = min(padded(work.microbatch_tokens, config.parallel), LONGEST * config.parallel.tp * config.parallel.cp)
        key = (config.parallel, config.model.recompute, sent, stage)
        if key not in self._of_stages:
            self._of_stages[key] = list(self._chunks_of(config, stage, sent))
        return self._of_stages[key]

    def _chunks_of(self, config: TrainingStage, stage: int, sent: int) -> Iterator[tuple[Chunk, Counter[Kind]]]:
        p, model, stages = config.parallel, architecture_of(self.hf), self.stages(config.parallel)
        uneven = Routes.of(self.hf, p, 0, self.imbalance).imbalance if model.experts is not None else 1.0
        for index in range(stage, len(stages), p.pp):
            counts = Counter(kind_of(layer, model, config.model) for layer in stages[index])
            ends = index == 0, index == len(stages) - 1, index == mtp_stage(p)
            kinds = tuple(sorted(counts))
            yield Chunk(config.model.recompute, p.tp, p.cp, p.ep, p.etp, sent, kinds, ends, uneven), counts

    def _full(self, parallel: ParallelConfig) -> set[int]:
        """Stages one of which is the fullest: the first, with the most microbatches in flight, and that with the most weights."""
        stages = self.stages(parallel)
        weights = [
            sum(sum(self._sizes[layer]) for layer in itertools.chain(*stages[stage :: parallel.pp]))
            for stage in range(parallel.pp)
        ]
        return {0, weights.index(max(weights))}

    @cached_property
    def _sizes(self) -> list[tuple[float, float]]:
        return layer_parameters(self.hf)
