"""`r1mega plan --search`: of the layouts that a config could have, the fastest by the model of seconds that fit.

Seconds are arithmetic and known of every candidate; memory is measured, in order of seconds, until some fit. What is measured
bounds what is not: a candidate that could not fit by the activations of those seen before is passed over.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from r1mega.config.layout import generator_problems, num_experts, num_stages, stage_layers
from r1mega.config.megatron import recomputes_routing
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import MemoryConfig, ParallelConfig, Recompute, RecomputeModule, TrainingStage
from r1mega.config.stages.reward_model import RewardModelStage
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import SFTStage
from r1mega.config.validate import layout_problems
from r1mega.errors import ConfigError
from r1mega.model.architecture import LatentAttention
from r1mega.model.families import architecture_of
from r1mega.model.flops import Work, model_flops
from r1mega.plan.generator import GeneratorMemory, generator_memory, generator_memory_problems
from r1mega.plan.gpu import GPU
from r1mega.plan.memory import CONTEXT_BYTES, SPARE_BYTES, PhaseMemory, StageRank, in_flight, phase_memory, stage_ranks
from r1mega.plan.seconds import generation_seconds, part_flops, plan_seconds
from r1mega.plan.workload import Lengths, Workload, workload

MOST_PROPOSED = 3
MOST_MEASURED = 40
"""Layouts whose memory is measured before a search ends; each takes about two seconds."""
SURE = 0.8
"""Activations of a layout not measured, over those of the least one measured with the same recomputation: at the least."""
MEMORY = (
    MemoryConfig(),
    MemoryConfig(grad_offload=True),
    MemoryConfig(grad_offload=True, optimizer_offload="rollout"),
    MemoryConfig(grad_offload=True, optimizer_offload="rollout", param_offload=True),
    MemoryConfig(grad_offload=True, optimizer_offload="update", param_offload=True),
    MemoryConfig(grad_offload=True, optimizer_offload="update", param_offload=True, reference_swap=True),
)
"""From what moves least to what moves most; all take equally long in the model of seconds."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """overrides: of the config that was given, as the command line wants them; fullest: the phase that takes most."""

    config: TrainingStage
    overrides: tuple[str, ...]
    seconds: float
    fullest: PhaseMemory


@dataclass(frozen=True, slots=True)
class Trained:
    """A layout, what it recomputes and how long its microbatches are; seconds: of everything but the generator."""

    config: TrainingStage
    work: Workload
    seconds: float


@dataclass(frozen=True, slots=True)
class Generated:
    """tp and ep of the generator; None: as in the config, of a stage that generates nothing."""

    tp: int | None
    memory: GeneratorMemory | None
    seconds: float


@dataclass
class Search:
    """Of one config on so many GPUs. say: is told of the progress, a line at a time."""

    config: TrainingStage
    hf: HFConfig
    gpus: int
    gpu: GPU
    lengths: Lengths
    imbalance: float
    per_node: int
    say: Callable[[str], None] = lambda line: None
    measured: int = 0
    _ranks: dict[object, list[StageRank] | None] = field(default_factory=dict)
    _seen: dict[object, tuple[float, float]] = field(default_factory=dict)
    _work: dict[object, Workload] = field(default_factory=dict)

    def run(self, *, most: int = MOST_PROPOSED, measure: int = MOST_MEASURED) -> list[Proposal]:
        """The fastest that fit, each of another layout; the config's own among the candidates. Empty: none was found."""
        trained, generated = list(self.trained()), list(self.generated())
        pairs = sorted(itertools.product(trained, generated), key=lambda pair: pair[0].seconds + pair[1].seconds)
        self.say(f"{len(trained):,} layouts by {len(generated)} of the generator; the fastest are measured first")
        found: list[Proposal] = []
        for one, other in pairs:
            if len(found) == most:
                break
            if any(_layout(one.config) == _layout(proposal.config) for proposal in found):
                continue
            own = one.config == self.config and other.tp in (None, getattr(self.config, "rollout", other).tp)
            if self.measured >= measure and (found or not own):
                continue  # the config's own is looked at, however many were measured before
            if (proposal := self.fitting(one, other)) is not None:
                found.append(proposal)
        return found

    def trained(self) -> Iterator[Trained]:
        """The config's own first; of equally fast ones those that cut and recompute less."""
        for config in candidates(self.config, self.hf, self.gpus):
            work = self.workload(config)
            if work is None:
                continue
            seconds = plan_seconds(
                config, self.hf, self.gpus, self.gpu, work, None, imbalance=self.imbalance, per_node=self.per_node
            )  # fmt: skip
            yield Trained(config, work, seconds.total)

    def workload(self, config: TrainingStage) -> Workload | None:
        """None: the samples do not go into the microbatches, or some replica gets none."""
        p = config.parallel
        replicas, multiple = self.gpus // (p.tp * p.pp * p.cp), p.pp if (p.vpp or 1) > 1 else 1
        key = (replicas, multiple, p.pp, _capacity(config)[1])
        if key not in self._work:
            try:
                self._work[key] = workload(config, self.lengths, replicas, multiple)
            except ConfigError:
                return None
        return self._work[key]

    def generated(self) -> Iterator[Generated]:
        """The config's own first, whether its weights fit or not."""
        config = self.config
        if not isinstance(config, RLStage) or config.rollout.engine != "vllm":
            yield Generated(None, None, 0.0)
            return
        work, dtype = workload(config, self.lengths, 1), getattr(torch, config.model.dtype)
        for tp in dict.fromkeys((config.rollout.tp, *_divisors(self.gpus))):
            rollout = config.rollout.model_copy(update={"tp": tp, "ep": tp if config.rollout.ep > 1 else 1, "dp": None})
            candidate = config.model_copy(update={"rollout": rollout})
            problems = itertools.chain(
                generator_problems(rollout, self.gpus, dict(self.hf)),
                generator_memory_problems(candidate, self.hf, self.gpu, self.gpus),
            )
            if rollout.num_prompts < self.gpus // tp or next(problems, None) is not None:
                continue
            memory = generator_memory(self.hf, dtype, rollout, self.gpu.memory_bytes)
            seconds = generation_seconds(candidate, self.hf, self.gpus, self.gpu, work, memory)
            yield Generated(tp, memory, sum(seconds.values()))

    def fitting(self, one: Trained, other: Generated) -> Proposal | None:
        """With what moves least of what makes it fit; None: nothing does."""
        ranks = self.ranks(one)
        if ranks is None:
            return None
        for memory in self._memory():
            config = one.config.model_copy(update={"memory": memory})
            if isinstance(config, RLStage) and other.tp is not None:
                update = {"tp": other.tp, "ep": other.tp if config.rollout.ep > 1 else 1, "dp": None}
                config = config.model_copy(update={"rollout": config.rollout.model_copy(update=update)})
            phases = tuple(phase_memory(config, tuple(ranks), other.memory))
            if all(phase.verdict(self.gpu) == "fits" for phase in phases):
                fullest = max(phases, key=lambda phase: phase.total)
                return Proposal(config, tuple(differences(self.config, config)), one.seconds + other.seconds, fullest)
        return None

    def ranks(self, one: Trained) -> list[StageRank] | None:
        """One of every kind of stage; None when one of them does not fit without a generator, whatever moves."""
        key = (one.config.parallel, one.config.model.recompute, one.work.microbatches, one.work.microbatch_tokens)
        if key not in self._ranks:
            self._ranks[key] = None if self._hopeless(one) else self._measured(one)
        return self._ranks[key]

    def _memory(self) -> Iterator[MemoryConfig]:
        for memory in dict.fromkeys((self.config.memory, *MEMORY)):
            if not self.config.optimizer.cpu_offload or memory.optimizer_offload == "none":
                yield memory

    def _measured(self, one: Trained) -> list[StageRank] | None:
        self.measured += 1
        ranks: list[StageRank] = []
        try:
            for rank in stage_ranks(one.config, self.hf, self.gpus, one.work, self.imbalance):
                if not ranks:
                    self._remember(one, rank)
                ranks.append(rank)
                least = min(
                    (self._worst(one, rank, memory) for memory in self._memory()), key=lambda phase: phase.total
                )
                if least.verdict(self.gpu) != "fits":
                    self._tell(one, f"{least.phase} {least.total / 1e9:.1f} GB: does not fit")
                    return None
        except ConfigError as error:  # of megatron-core, which knows more rules than config/layout.py
            self._tell(one, str(error))
            return None
        self._tell(one, "the trainer fits")
        return ranks

    def _worst(self, one: Trained, rank: StageRank, memory: MemoryConfig) -> PhaseMemory:
        phases = phase_memory(one.config.model_copy(update={"memory": memory}), (rank,), None)
        return max(phases, key=lambda phase: phase.total)

    def _tell(self, one: Trained, what: str) -> None:
        p, recompute = one.config.parallel, one.config.model.recompute
        parts = recompute if isinstance(recompute, str) else "+".join(recompute)
        layout = f"tp {p.tp} pp {p.pp} vpp {p.vpp or 1} ep {p.ep} cp {p.cp}, recompute {parts}"
        self.say(f"measured {self.measured}: {layout}, {one.seconds:,.0f} s to train: {what}")

    def _remember(self, one: Trained, first: StageRank) -> None:
        """Bytes of activations for a token of a rank: kept of a layer, and at work."""
        p = one.config.parallel
        tokens = one.work.microbatch_tokens / (p.tp * p.cp)
        layers = max(1, _first_layers(p, architecture_of(self.hf).num_layers))
        kept = sum(chunk.kept for chunk in first.memory.activations) / layers / tokens
        working = max(chunk.working for chunk in first.memory.activations) / tokens
        key = (one.config.model.recompute, p.ep == 1)
        known = self._seen.get(key, (kept, working))
        self._seen[key] = (min(kept, known[0]), min(working, known[1]))

    def _hopeless(self, one: Trained) -> bool:
        """By the least that the update takes on the first two stages: weights and gradients, as if tp cut all but the
        experts, and activations as of what was measured.
        """
        p, layers = one.config.parallel, stage_layers(one.config.parallel, len(self._sizes))
        itemsize = getattr(torch, one.config.model.dtype).itemsize
        tokens = one.work.microbatch_tokens / (p.tp * p.cp)
        kept, working = self._seen.get((one.config.model.recompute, p.ep == 1), (0.0, 0.0))
        for stage in range(min(2, p.pp)):
            own = [self._sizes[layer] for index in range(stage, num_stages(p), p.pp) for layer in layers[index]]
            parameters = sum(dense / p.tp + experts / (p.ep * p.etp) for dense, experts in own)
            activations = SURE * tokens * (kept * len(own) * in_flight(p, stage, one.work.microbatches) + working)
            if CONTEXT_BYTES + parameters * (itemsize + 4) + activations > self.gpu.memory_bytes - SPARE_BYTES:
                return True
        return False

    @cached_property
    def _sizes(self) -> list[tuple[float, float]]:
        """Of each layer the parameters of its matrices: (all but the routed experts, the routed experts)."""
        model, token = architecture_of(self.hf), Work(1)
        parts = {part: flops / 2 for part, flops in part_flops(self.hf, token).items()}
        attention = model_flops(self.hf).forward(token) / 2 - parts["mlp"] - parts.get("moe", 0.0)
        dense, experts = attention / model.num_layers, 0.0
        if model.experts is not None:
            experts = 3.0 * model.hidden_size * model.experts.count * model.experts.size
        shared = 0 if model.experts is None else 3 * model.hidden_size * model.experts.shared_size
        sizes = []
        for layer in range(model.num_layers):
            if model.has_experts(layer):
                sizes.append((dense + shared, experts))
            else:
                sizes.append((dense + 3 * model.hidden_size * model.intermediate_size, 0.0))
        return sizes


def candidates(config: TrainingStage, hf: HFConfig, gpus: int) -> Iterator[TrainingStage]:
    """The config's own; then those that its checks let pass, from those that cut little to those that cut much."""
    if _legal(config, hf, gpus):
        yield config
    recomputed = dict.fromkeys((config.model.recompute, *_recompute(hf)))
    models = [config.model.model_copy(update={"recompute": recompute}) for recompute in recomputed]
    if isinstance(config, RLStage) and config.rollout.router_replay:
        models = [model for model in models if not recomputes_routing(model)]
    for parallel in _layouts(config.parallel, hf, gpus):
        if not _legal(config.model_copy(update={"parallel": parallel}), hf, gpus):
            continue
        for model, tokens in itertools.product(models, _capacities(config)):
            if (parallel, model, tokens) != (config.parallel, config.model, _capacity(config)[1]):
                yield _with_capacity(config.model_copy(update={"parallel": parallel, "model": model}), tokens)


def _legal(config: TrainingStage, hf: HFConfig, gpus: int) -> bool:
    return next(layout_problems(config, dict(hf), gpus), None) is None


def _layouts(own: ParallelConfig, hf: HFConfig, gpus: int) -> Iterator[ParallelConfig]:
    layers = architecture_of(hf).num_layers
    tps, cps = dict.fromkeys((1, 2, 4, 8, own.tp)), dict.fromkeys((1, 2, 4, 8, own.cp))
    eps = [ep for ep in _divisors(num_experts(dict(hf)) or 1) if gpus % ep == 0]
    pps = _divisors(gpus)
    for tp, cp, pp, ep, vpp in itertools.product(tps, cps, pps, eps, dict.fromkeys((None, 2, own.vpp))):
        if (
            gpus % (tp * cp * pp)
            or gpus % (ep * own.etp * pp)
            or ((vpp or 1) > 1 and pp == 1)
            or pp * (vpp or 1) > layers
        ):
            continue
        same = (pp, vpp) == (own.pp, own.vpp)
        stages = dict.fromkeys((uneven_stages(layers, pp * (vpp or 1)), *([own.layers_per_stage] if same else [])))
        for counts in stages:
            update = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "vpp": vpp, "layers_per_stage": counts, "dp": None}
            yield own.model_copy(update=update)


def uneven_stages(layers: int, stages: int) -> tuple[int, ...] | None:
    """Decoder layers of each stage; None: equally many. Where they do not divide, the last stage has one less for its output
    layer, and the first, which keeps most activations, is among the shorter ones.
    """
    if layers % stages == 0:
        return None
    least, more = divmod(layers + 1, stages)
    return *[least] * (stages - 1 - more), *[least + 1] * more, least - 1


def _recompute(hf: HFConfig) -> Iterator[Recompute]:
    """From none to all, for layers that this model has."""
    model = architecture_of(hf)
    latent: tuple[RecomputeModule, ...] = ("mla_up_proj",) if isinstance(model.attention, LatentAttention) else ()
    feed_forward: tuple[RecomputeModule, ...] = ("mlp",) if model.experts is None else ("moe",)
    yield "none"
    yield ("layernorm", *latent)
    yield feed_forward
    yield ("layernorm", *latent, *feed_forward)
    yield "full"


def _capacity(config: TrainingStage) -> tuple[int, int]:
    """(tokens of the longest sample, of a microbatch)."""
    if isinstance(config, RLStage):
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        return longest, config.update.microbatch_tokens
    if isinstance(config, SFTStage | RewardModelStage):
        return config.data.max_tokens, config.microbatch_tokens
    raise ConfigError(f"stage {config.stage} trains nothing that a search lays out")


def _capacities(config: TrainingStage) -> tuple[int, ...]:
    longest, own = _capacity(config)
    return tuple(dict.fromkeys((own, longest, 2 * longest)))


def _with_capacity(config: TrainingStage, tokens: int) -> TrainingStage:
    if isinstance(config, RLStage):
        return config.model_copy(update={"update": config.update.model_copy(update={"microbatch_tokens": tokens})})
    return config.model_copy(update={"microbatch_tokens": tokens})


def _first_layers(parallel: ParallelConfig, num_layers: int) -> int:
    return sum(len(stage) for stage in stage_layers(parallel, num_layers)[:: parallel.pp])


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _layout(config: TrainingStage) -> tuple[object, ...]:
    return config.parallel, _capacity(config)[1]


def differences(before: TrainingStage, after: TrainingStage) -> Iterator[str]:
    """Overrides of the command line that make `after` of `before`: keys of the sections that a search changes."""
    for section in ("parallel", "model", "memory", "rollout", "update"):
        one, other = getattr(before, section, None), getattr(after, section, None)
        if one is None or other is None:
            continue
        old, new = one.model_dump(mode="json"), other.model_dump(mode="json")
        for key in new:
            if new[key] != old[key]:
                yield f"{section}.{key}={_yaml(new[key])}"
    tokens = getattr(after, "microbatch_tokens", None)
    if tokens != getattr(before, "microbatch_tokens", None):
        yield f"microbatch_tokens={tokens}"


def _yaml(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return value if isinstance(value, str) else json.dumps(value)
