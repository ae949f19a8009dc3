"""`r1mega plan --search`: of the layouts that a config could have, the fastest by the model of seconds that fit.

Seconds are arithmetic and known of every candidate that its parameters alone do not rule out; memory is measured, in order of
seconds, until nothing faster can come. What is measured bounds what is not: a layer's activations are the same in every pipeline.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from r1mega.config.layout import generator_problems, mtp_stage, stage_layers
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import MemoryConfig, ParallelConfig, Recompute, TrainingStage
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import SFTStage
from r1mega.config.validate import layout_problems
from r1mega.errors import ConfigError
from r1mega.model.families import architecture_of
from r1mega.plan.candidates import candidates, capacity, differences, divisors, memory_choices
from r1mega.plan.decoding import partial_seconds, rollout_seconds
from r1mega.plan.generator import GeneratorMemory, generator_memory, generator_memory_problems, of_generators
from r1mega.plan.gpu import GPU, NODE_BYTES, Efficiency
from r1mega.plan.memory import (
    PhaseMemory,
    StageRank,
    host_memory,
    in_flight,
    largest_parameter_bytes,
    moment_bytes,
    node_verdict,
    padded,
    phase_memory,
    stage_ranks,
)
from r1mega.plan.rank import LONGEST, Activations, Kind, RankMemory, Routes, Static, kind_of, measure
from r1mega.plan.samples import planned_samples
from r1mega.plan.seconds import (
    layer_parameters,
    moving_seconds,
    plan_seconds,
    reshard_seconds,
)
from r1mega.plan.workload import Lengths, Workload, replicas_work, workload

MOST_PROPOSED = 3
MOST_MEASURED = 60
"""Layouts whose memory is measured before a search ends; each takes about two seconds."""
SURE = 0.8
"""Activations a token of a layout not measured, over those of another that cuts no more of a layer: at the least."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """overrides: of the config that was given, as the command line wants them; fullest: the phase that takes most."""

    config: TrainingStage
    overrides: tuple[str, ...]
    seconds: float
    fullest: PhaseMemory


@dataclass(frozen=True, slots=True)
class Trained:
    """A layout, what it recomputes and how long its microbatches are; seconds: of everything but the generator, the reshard
    and what is moved between device and host; a_byte: seconds of the reshard for each byte of the generator's weights.
    """

    config: TrainingStage
    work: Workload
    seconds: float
    a_byte: float

    def beside(self, generated: Generated) -> float:
        """Seconds of a step but for what is moved between device and host."""
        resharded = 0.0 if generated.memory is None else generated.memory.weights * self.a_byte
        return self.seconds + generated.seconds + resharded


@dataclass(frozen=True, slots=True)
class Generated:
    """tp and ep of the generator; None: as in the config, of a stage that generates nothing."""

    tp: int | None
    memory: GeneratorMemory | None
    seconds: float


class _Chunk(NamedTuple):
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

    def share(self, other: _Chunk) -> float:
        """What a token of a rank takes in `other`, over what it takes here: at the least. SURE: where as much or more is
        gathered and sent to the fullest experts there, and no more tokens share the gradients of weights; 0: that is not known.
        """
        if self[:6] == other[:6]:
            return 1.0
        mine, others = self.tokens / (self.tp * self.cp), other.tokens / (other.tp * other.cp)
        same = (self.recompute, self.etp, self.ep == 1) == (other.recompute, other.etp, other.ep == 1)
        cuts = self.tp <= other.tp and self.cp <= other.cp and self.uneven <= other.uneven
        return SURE if same and cuts and mine >= others else 0.0

    def within(self, other: _Chunk) -> bool:
        """Whether what works here works there too."""
        inside = all(mine <= others for mine, others in zip(self.ends, other.ends, strict=True))
        return inside and set(self.kinds) <= set(other.kinds)


@dataclass
class Search:
    """Of one config on so many GPUs. say: is told of the progress, a line at a time; skipped: layouts that were not measured
    because as many as may be were.
    """

    config: TrainingStage
    hf: HFConfig
    gpus: int
    gpu: GPU
    lengths: Lengths
    imbalance: float
    per_node: int
    say: Callable[[str], None] = lambda line: None
    efficiency: Efficiency = Efficiency()
    node_bytes: float = NODE_BYTES
    measured: int = 0
    skipped: int = 0
    _ranks: dict[object, list[StageRank] | None] = field(default_factory=dict)
    _bounds: dict[object, tuple[int, list[StageRank] | None]] = field(default_factory=dict)
    _seen: dict[_Chunk, Activations] = field(default_factory=dict)
    _large: dict[ParallelConfig, bool] = field(default_factory=dict)
    _work: dict[object, Workload] = field(default_factory=dict)
    _whole: dict[ParallelConfig, float] = field(default_factory=dict)

    def run(self, *, most: int = MOST_PROPOSED, measured: int = MOST_MEASURED) -> list[Proposal]:
        """The fastest that fit, each of another layout; the config's own among the candidates. Empty: none was found.

        Raises ConfigError where nothing is left to measure.
        """
        generated = list(self.generated())
        trained = list(self.trained()) if generated else []
        if not trained:
            raise ConfigError(f"--search: nothing is left to measure; of the config itself: {self._refusal(generated)}")
        self.say(f"{len(trained):,} layouts by {len(generated)} of the generator; the fastest are measured first")
        self._learn(trained)
        pairs = sorted(itertools.product(trained, generated), key=lambda pair: pair[0].beside(pair[1]))
        found: dict[object, Proposal] = {}
        skipped: set[object] = set()
        for one, other in pairs:
            least = one.beside(other)
            best = sorted(proposal.seconds for proposal in found.values())
            if len(best) >= most and least >= best[most - 1]:
                break
            known = found.get(layout := (one.config.parallel, capacity(one.config)[1]))
            if known is not None and known.seconds <= least:
                continue
            own = one.config == self.config and other.tp in (None, getattr(self.config, "rollout", other).tp)
            if self.measured >= measured and _key(one) not in self._ranks and not own:
                skipped.add(_key(one))
                continue  # the config's own is looked at, however many were measured before
            proposal = self.fitting(one, other, best[most - 1] if len(best) >= most else math.inf)
            if proposal is not None and (known is None or proposal.seconds < known.seconds):
                found[layout] = proposal
        self.skipped = len(skipped)
        if skipped:
            self.say(f"cut off after {self.measured} measured: {self.skipped:,} layouts were not looked at")
        return sorted(found.values(), key=lambda proposal: proposal.seconds)[:most]

    def _refusal(self, generated: list[Generated]) -> str:
        """Why the config's own is none of what was to be measured."""
        config = self.config
        problems = list(layout_problems(config, dict(self.hf), self.gpus))
        if not generated:
            problems += generator_memory_problems(config, self.hf, self.gpu, self.gpus)
        if not problems:
            try:
                replicas_work(config, self.lengths, self.gpus)
            except ConfigError as error:
                problems.append(str(error))
        return "; ".join(problems) or "rollout.num_prompts are fewer than its generators: raise them or rollout.tp"

    def candidates(self) -> Iterator[TrainingStage]:
        """The config's own first."""
        return candidates(self.config, self.hf, self.gpus)

    def trained(self) -> Iterator[Trained]:
        """Candidates that parameters alone do not rule out. Of equally fast ones those that cut and recompute less are first."""
        for config in self.candidates():
            if config != self.config and self._too_large(config):
                continue
            if (work := self.workload(config)) is None:
                continue
            update = {"memory": MemoryConfig(), "optimizer": config.optimizer.model_copy(update={"cpu_offload": False})}
            seconds = plan_seconds(
                config.model_copy(update=update), self.hf, self.gpus, self.gpu, work, None,
                imbalance=self.imbalance, per_node=self.per_node, efficiency=self.efficiency,
            )  # fmt: skip
            a_byte = reshard_seconds(config.parallel, self.hf, self.gpus, self.gpu, self.per_node, self.efficiency)
            yield Trained(config, work, seconds.total, a_byte)

    def workload(self, config: TrainingStage) -> Workload | None:
        """None: the samples do not go into the microbatches, or some replica gets none."""
        p = config.parallel
        replicas, multiple = self.gpus // (p.tp * p.pp * p.cp), p.pp if (p.vpp or 1) > 1 else 1
        key = (replicas, multiple, p.pp, capacity(config)[1])
        if key not in self._work:
            try:
                self._work[key] = workload(config, self.lengths, replicas, multiple)
            except ConfigError:
                return None
        return self._work[key]

    def generated(self) -> Iterator[Generated]:
        """Those whose weights and longest response fit and that all get a prompt; the config's own first if it is one."""
        config = self.config
        if not isinstance(config, RLStage) or config.rollout.engine != "vllm":
            yield Generated(None, None, 0.0)
            return
        work, dtype = workload(config, self.lengths, 1), getattr(torch, config.model.dtype)
        for tp in dict.fromkeys((config.rollout.tp, *divisors(self.gpus))):
            rollout = config.rollout.model_copy(update=of_generators(config.rollout, tp))
            candidate = config.model_copy(update={"rollout": rollout})
            problems = itertools.chain(
                generator_problems(rollout, self.gpus, dict(self.hf)),
                generator_memory_problems(candidate, self.hf, self.gpu, self.gpus),
            )
            if rollout.num_prompts < self.gpus // tp or next(problems, None) is not None:
                continue
            memory = generator_memory(self.hf, dtype, rollout, self.gpu.memory_bytes)
            of = partial_seconds if rollout.partial.is_on else rollout_seconds
            seconds = of(rollout, dtype, self.hf, self.gpus, self.gpu, work, memory, self.efficiency, self.per_node)
            yield Generated(tp, memory, seconds)

    def fitting(self, one: Trained, other: Generated, limit: float = math.inf) -> Proposal | None:
        """With what takes least time of what makes it fit; None: nothing does, or not in less than `limit` seconds. Measured
        only where neither is known before.
        """
        if (least := self._bound(one)) is None:
            return None
        bound = self._cheapest(one, other, least)
        if bound is None or bound[0] >= limit or (ranks := self.ranks(one)) is None:
            return None
        if (found := self._cheapest(one, other, ranks)) is None:
            return None
        seconds, config, fullest = found
        return Proposal(config, tuple(differences(self.config, config)), seconds, fullest)

    def _cheapest(
        self, one: Trained, other: Generated, ranks: list[StageRank]
    ) -> tuple[float, TrainingStage, PhaseMemory] | None:
        """(seconds, config, fullest phase) with what `memory` and optimizer.cpu_offload have to move for it to fit."""
        found = []
        for config in memory_choices(one.config):
            if isinstance(config, RLStage) and other.tp is not None:
                rollout = config.rollout.model_copy(update=of_generators(config.rollout, other.tp))
                config = config.model_copy(update={"rollout": rollout})
            phases = tuple(self._phases(config, ranks, other.memory))
            if all(phase.verdict(self.gpu) == "fits" for phase in phases) and self._node_fits(
                config, one, other, ranks
            ):
                moving = moving_seconds(config, self.hf, self.gpus, self.gpu, one.work.minibatches, self.efficiency)
                fullest = max(phases, key=lambda phase: phase.total)
                found.append((one.beside(other) + moving, config, fullest))
        return min(found, key=lambda choice: choice[0], default=None)

    def _node_fits(self, config: TrainingStage, one: Trained, other: Generated, ranks: list[StageRank]) -> bool:
        samples = planned_samples(config, self.hf, self.gpus, one.work) if isinstance(config, RLStage) else None
        per_node = min(self.per_node, self.gpus)
        host = host_memory(config, tuple(ranks), other.memory, per_node, samples)
        return node_verdict(host, per_node, self.node_bytes) == "fits"

    def _bound(self, one: Trained) -> list[StageRank] | None:
        """The least that its fullest stages take by what was measured; None: no generator would leave room for it."""
        known = self._bounds.get(_key(one))
        if known is not None and (known[1] is None or known[0] == self.measured):  # what is measured only raises it
            return known[1]
        least = [self._least(one.config, stage, one.work) for stage in self._full(one.config.parallel)]
        found = least if self._fit(one.config, least) else None
        self._bounds[_key(one)] = self.measured, found
        return found

    def ranks(self, one: Trained) -> list[StageRank] | None:
        """One of every kind of stage; None when one of them does not fit without a generator, whatever moves."""
        if (key := _key(one)) not in self._ranks:
            self._ranks[key] = self._measured(one)
        return self._ranks[key]

    def _learn(self, trained: list[Trained]) -> None:
        """Activations of one layout for each recomputation: what cuts a layer least, with the fewest experts to run."""
        recomputed = dict.fromkeys(one.config.model.recompute for one in trained)
        for recompute in recomputed:
            those = [one for one in trained if one.config.model.recompute == recompute]

            def cut(one: Trained) -> tuple[int, ...]:
                p = one.config.parallel
                return p.tp * p.cp, p.vpp or 1, -p.ep, len(self._stages(p)[0]), -one.work.microbatch_tokens

            one = min(those, key=cut)
            p = one.config.parallel
            with contextlib.suppress(ConfigError):  # megatron-core's: it is said when a candidate is measured
                found = measure(
                    self.hf, one.config.model, p, None, world=self.gpus, rank=0,
                    imbalance=self.imbalance, tokens=padded(one.work.microbatch_tokens, p),
                    labels=isinstance(one.config, SFTStage),
                )  # fmt: skip
                self._remember(one, 0, found)

    def _fit(self, config: TrainingStage, ranks: list[StageRank]) -> bool:
        """Without a generator, when as little is on the device as can be."""
        least = {one.optimizer.cpu_offload: one for one in memory_choices(config)[1:]}.values()
        return any(
            all(phase.verdict(self.gpu) == "fits" for phase in self._phases(one, ranks, None))
            for one in (*least, config)
        )

    def _phases(
        self, config: TrainingStage, ranks: list[StageRank], generator: GeneratorMemory | None
    ) -> Iterator[PhaseMemory]:
        """A parameter is as large whatever `memory` moves."""
        if (layout := config.parallel) not in self._whole:
            self._whole[layout] = largest_parameter_bytes(self.hf, config)
        return phase_memory(config, self.hf, tuple(ranks), generator, self._whole[layout])

    def _measured(self, one: Trained) -> list[StageRank] | None:
        self.measured += 1
        ranks: list[StageRank] = []
        try:
            for rank in stage_ranks(one.config, self.hf, self.gpus, one.work, self.imbalance):
                ranks.append(rank)
                self._remember(one, rank.stage, rank.memory)
                if not self._fit(one.config, [rank]):
                    self._tell(one, f"stage {rank.stage} does not fit")
                    return None
        except ConfigError as error:  # of megatron-core, which knows more rules than config/layout.py
            self._tell(one, str(error))
            return None
        self._tell(one, "the trainer fits")
        return ranks

    def _tell(self, one: Trained, what: str) -> None:
        p, recompute = one.config.parallel, one.config.model.recompute
        parts = recompute if isinstance(recompute, str) else "+".join(recompute)
        layout = f"tp {p.tp} pp {p.pp} vpp {p.vpp or 1} ep {p.ep} cp {p.cp}, recompute {parts}"
        self.say(f"measured {self.measured}: {layout}, {one.seconds:,.0f} s to train: {what}")

    def _too_large(self, config: TrainingStage) -> bool:
        """By weights, gradients and optimizer state alone."""
        if (p := config.parallel) not in self._large:
            least = [self._least(config, stage, None) for stage in self._full(p)]
            self._large[p] = not self._fit(config, least)
        return self._large[p]

    def _least(self, config: TrainingStage, stage: int, work: Workload | None) -> StageRank:
        """No more than a rank of the stage takes: of its parameters all that tp could cut is cut; activations by what was
        measured. work: None: without activations.
        """
        p, itemsize = config.parallel, getattr(torch, config.model.dtype).itemsize
        numbers = [self._sizes[layer] for chunk in self._stages(p)[stage :: p.pp] for layer in chunk]
        dense, experts = sum(one for one, _ in numbers), sum(one for _, one in numbers) / (p.ep * p.etp)
        if stage == 0:
            dense += self.hf["vocab_size"] * self.hf["hidden_size"]
        dense /= p.tp
        both = int(dense + experts)
        updated = int(p.tp * p.pp * dense / self.gpus + p.ep * p.etp * p.pp * experts / self.gpus)
        gradients = 4 if config.optimizer.grad_reduce_in_fp32 else itemsize
        main = 0 if itemsize == 4 else 4 * updated
        first, second = (size * updated for size in moment_bytes(config.optimizer))
        static = Static(itemsize * both, gradients * both, main, first, second, both, int(experts), 0)
        kept, waiting = Activations(1, 0.0, 0.0, 0.0, {}), 0.0
        if work is not None:
            kept, waiting = (
                self._activations(config, stage, work),
                in_flight(p, stage, work.microbatches, model=config.model),
            )
        return StageRank(stage, RankMemory(static, (kept,)), waiting, 0.0)

    def _remember(self, one: Trained, stage: int, memory: RankMemory) -> None:
        for (chunk, _), activations in zip(self._chunks(one.config, stage, one.work), memory.activations, strict=True):
            self._seen[chunk] = activations

    def _activations(self, config: TrainingStage, stage: int, work: Workload) -> Activations:
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

    def _chunks(self, config: TrainingStage, stage: int, work: Workload) -> Iterator[tuple[_Chunk, Counter[Kind]]]:
        """Of a stage: (what a chunk's activations hang on; its layers by their kinds)."""
        p, model, stages = config.parallel, architecture_of(self.hf), self._stages(config.parallel)
        sent = min(padded(work.microbatch_tokens, p), LONGEST * p.tp * p.cp)
        uneven = Routes.of(self.hf, p, 0, self.imbalance).imbalance if model.experts is not None else 1.0
        for index in range(stage, len(stages), p.pp):
            counts = Counter(kind_of(layer, model, config.model) for layer in stages[index])
            ends = index == 0, index == len(stages) - 1, index == mtp_stage(p)
            kinds = tuple(sorted(counts))
            yield _Chunk(config.model.recompute, p.tp, p.cp, p.ep, p.etp, sent, kinds, ends, uneven), counts

    def _full(self, parallel: ParallelConfig) -> set[int]:
        """Stages one of which is the fullest: the first, with the most microbatches in flight, and that with the most weights."""
        stages = self._stages(parallel)
        weights = [
            sum(sum(self._sizes[layer]) for layer in itertools.chain(*stages[stage :: parallel.pp]))
            for stage in range(parallel.pp)
        ]
        return {0, weights.index(max(weights))}

    def _stages(self, parallel: ParallelConfig) -> tuple[range, ...]:
        return stage_layers(parallel, len(self._sizes))

    @cached_property
    def _sizes(self) -> list[tuple[float, float]]:
        return layer_parameters(self.hf)


def _key(one: Trained) -> object:
    return one.config.parallel, one.config.model.recompute, one.work.microbatches, one.work.microbatch_tokens
