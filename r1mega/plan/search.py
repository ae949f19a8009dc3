"""`r1mega plan --search`: of the layouts that a config could have, the fastest by the model of seconds that fit.

Seconds are arithmetic and known of every candidate that its parameters alone do not rule out; memory is measured, in order of
seconds, until nothing faster can come. What is measured bounds what is not: a layer's activations are the same in every pipeline.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from pydantic import BaseModel

from r1mega.config.layout import generator_problems
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import MemoryConfig, ParallelConfig, RolloutConfig, TrainingStage
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import SFTStage
from r1mega.config.validate import layout_problems
from r1mega.errors import ConfigError
from r1mega.plan.bounds import Bounds
from r1mega.plan.candidates import candidates, capacity, differences, divisors, memory_choices
from r1mega.plan.decoding import partial_seconds, rollout_seconds
from r1mega.plan.generator import GeneratorMemory, generator_memory, generator_memory_problems, of_generators
from r1mega.plan.gpu import GPU, NODE_BYTES, Efficiency
from r1mega.plan.memory import (
    PhaseMemory,
    StageRank,
    host_memory,
    node_verdict,
    padded,
    phase_memory,
    stage_ranks,
)
from r1mega.plan.parameters import largest_parameter_bytes
from r1mega.plan.rank import measure
from r1mega.plan.samples import planned_samples
from r1mega.plan.seconds import moving_seconds, plan_seconds, reshard_seconds
from r1mega.plan.workload import Lengths, Workload, replicas_work, workload

MOST_PROPOSED = 3
MOST_MEASURED = 60
"""Layouts whose memory is measured before a search ends; each takes about two seconds."""


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
    """rollout: the section with keys of this generator; None: as in the config, of a stage that generates nothing."""

    rollout: RolloutConfig | None
    memory: GeneratorMemory | None
    seconds: float


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
    _least: dict[object, tuple[int, list[StageRank] | None]] = field(default_factory=dict)
    _large: dict[ParallelConfig, bool] = field(default_factory=dict)
    _work: dict[object, Workload | None] = field(default_factory=dict)
    _whole: dict[ParallelConfig, float] = field(default_factory=dict)
    _moving: dict[object, list[tuple[float, TrainingStage]]] = field(default_factory=dict)

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
        own_tp = self.config.rollout.tp if isinstance(self.config, RLStage) else None
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
            own = one.config == self.config and (other.rollout is None or other.rollout.tp == own_tp)
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
            self._work[key] = None
            with contextlib.suppress(ConfigError):
                self._work[key] = workload(config, self.lengths, replicas, multiple)
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
            yield Generated(rollout, memory, seconds)

    def fitting(self, one: Trained, other: Generated, limit: float = math.inf) -> Proposal | None:
        """With what takes least time of what makes it fit; None: nothing does, or not in less than `limit` seconds. Measured
        only where neither is known before.
        """
        if (least := self._bound(one)) is None or self._cheapest(one, other, least, limit) is None:
            return None
        if (ranks := self.ranks(one)) is None or (found := self._cheapest(one, other, ranks, limit)) is None:
            return None
        seconds, config, fullest = found
        return Proposal(config, tuple(differences(self.config, config)), seconds, fullest)

    def _cheapest(
        self, one: Trained, other: Generated, ranks: list[StageRank], limit: float
    ) -> tuple[float, TrainingStage, PhaseMemory] | None:
        """(seconds, config, fullest phase) with what `memory` and optimizer.cpu_offload have to move for it to fit."""
        rollout = {} if other.rollout is None else {"rollout": other.rollout}
        for moving, choice in self._moves(one):
            if (seconds := one.beside(other) + moving) >= limit:
                return None
            config = one.config.model_copy(update=_moved(choice) | rollout)
            phases = self._fitting_phases(config, ranks, other.memory)
            if phases and self._node_fits(config, one, other, ranks):
                return seconds, config, max(phases, key=lambda phase: phase.total)
        return None

    def _moves(self, one: Trained) -> list[tuple[float, TrainingStage]]:
        """(seconds of what is moved, the config with this choice of `memory`), the quickest first."""
        if (key := (one.config.parallel, one.work.minibatches)) not in self._moving:
            found = []
            for choice in self._choices:
                config = one.config.model_copy(update=_moved(choice))
                seconds = moving_seconds(config, self.hf, self.gpus, self.gpu, one.work.minibatches, self.efficiency)
                found.append((seconds, choice))
            self._moving[key] = sorted(found, key=lambda choice: choice[0])
        return self._moving[key]

    @cached_property
    def _choices(self) -> list[TrainingStage]:
        """Of `memory` and optimizer.cpu_offload, in which candidates do not differ."""
        return memory_choices(self.config)

    def _node_fits(self, config: TrainingStage, one: Trained, other: Generated, ranks: list[StageRank]) -> bool:
        samples = planned_samples(config, self.hf, self.gpus, one.work) if isinstance(config, RLStage) else None
        per_node = min(self.per_node, self.gpus)
        host = host_memory(config, tuple(ranks), other.memory, per_node, samples)
        return node_verdict(host, per_node, self.node_bytes) == "fits"

    def _bound(self, one: Trained) -> list[StageRank] | None:
        """The least that its fullest stages take by what was measured; None: no generator would leave room for it."""
        known = self._least.get(_key(one))
        if known is not None and (known[1] is None or known[0] == self.measured):  # what is measured only raises it
            return known[1]
        least = self.bounds.least(one.config, one.work)
        found = least if self._fit(one.config, least) else None
        self._least[_key(one)] = self.measured, found
        return found

    @cached_property
    def bounds(self) -> Bounds:
        """What was measured of layouts says of others."""
        return Bounds(self.hf, self.gpus, self.imbalance)

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
                return p.tp * p.cp, p.vpp or 1, -p.ep, len(self.bounds.stages(p)[0]), -one.work.microbatch_tokens

            one = min(those, key=cut)
            p = one.config.parallel
            with contextlib.suppress(ConfigError):  # megatron-core's: it is said when a candidate is measured
                found = measure(
                    self.hf, one.config.model, p, None, world=self.gpus, rank=0,
                    imbalance=self.imbalance, tokens=padded(one.work.microbatch_tokens, p),
                    labels=isinstance(one.config, SFTStage),
                )  # fmt: skip
                self.bounds.remember(one.config, one.work, 0, found)

    def _fit(self, config: TrainingStage, ranks: list[StageRank]) -> bool:
        """Without a generator, when as little is on the device as can be."""
        least = {one.optimizer.cpu_offload: one for one in self._choices[1:]}.values()
        of_least = (config.model_copy(update=_moved(choice)) for choice in least)
        return any(self._fitting_phases(one, ranks, None) for one in itertools.chain(of_least, [config]))

    def _fitting_phases(
        self, config: TrainingStage, ranks: list[StageRank], generator: GeneratorMemory | None
    ) -> list[PhaseMemory]:
        """All phases, if they fit. A parameter is as large whatever `memory` moves."""
        if (layout := config.parallel) not in self._whole:
            self._whole[layout] = largest_parameter_bytes(self.hf, config)
        phases = []
        for phase in phase_memory(config, self.hf, tuple(ranks), generator, self._whole[layout]):
            if phase.verdict(self.gpu) != "fits":
                return []
            phases.append(phase)
        return phases

    def _measured(self, one: Trained) -> list[StageRank] | None:
        self.measured += 1
        ranks: list[StageRank] = []
        try:
            for rank in stage_ranks(one.config, self.hf, self.gpus, one.work, self.imbalance):
                ranks.append(rank)
                self.bounds.remember(one.config, one.work, rank.stage, rank.memory)
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
            self._large[p] = not self._fit(config, self.bounds.least(config, None))
        return self._large[p]


def _moved(choice: TrainingStage) -> dict[str, BaseModel]:
    """The sections in which choices of `memory` differ."""
    return {"memory": choice.memory, "optimizer": choice.optimizer}


def _key(one: Trained) -> object:
    return one.config.parallel, one.config.model.recompute, one.work.microbatches, one.work.microbatch_tokens
