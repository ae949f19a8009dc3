"""Memory of a stage, phase by phase: on a GPU of the fullest pipeline stage, on a node, on disk; whether it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from r1mega.config.layout import generator_problems, mtp_stage, num_stages, stage_layers
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, Stage, TrainingStage
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import SFTStage
from r1mega.config.validate import layout_problems
from r1mega.errors import ConfigError
from r1mega.model.families import architecture_of
from r1mega.plan.candidates import differences, memory_choices
from r1mega.plan.generator import OTHER_BYTES, GeneratorMemory, generator_memory, generator_memory_problems
from r1mega.plan.gpu import GPU, NODE_BYTES
from r1mega.plan.parameters import checkpoint_bytes, has_reference, largest_parameter_bytes
from r1mega.plan.rank import RankMemory, kind_of, measure
from r1mega.plan.residency import TRAINER, residency
from r1mega.plan.samples import SampleMemory, planned_samples
from r1mega.plan.workload import Workload
from r1mega.train.phases import HOST_BLOCK, Part, Phase
from r1mega_kernels.linear_loss import DEFAULT_CHUNK_TOKENS

CONTEXT_BYTES = 2.5e9
"""CUDA's context and NCCL's buffers of the trainer's groups. Estimated: no GPU was asked."""
SPARE_BYTES = 5e9
"""What must be left for a plan to fit, of a GPU and, for each of its ranks, of a node: fragmentation, the programs themselves, and
what no plan knows of."""
HEAD_BUFFER_BYTES = 128 * 2**20
"""Logits that `model.log_probs: hidden` has at a time (r1mega_kernels.linear)."""

Verdict = Literal["fits", "at risk", "does not fit"]


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """parts: bytes on a GPU by what takes them; stage: the pipeline stage that has the most."""

    phase: Phase
    parts: Mapping[str, float]
    stage: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def verdict(self, gpu: GPU) -> Verdict:
        if self.total > gpu.memory_bytes:
            return "does not fit"
        return "at risk" if self.total > gpu.memory_bytes - SPARE_BYTES else "fits"


@dataclass(frozen=True, slots=True)
class StageRank:
    """A rank of a pipeline stage; in_flight: microbatches whose activations it keeps at once."""

    stage: int
    memory: RankMemory
    in_flight: float
    head_bytes: float

    @property
    def host_bytes(self) -> float:
        """Of activations that wait in host memory."""
        return self.in_flight * sum(chunk.pinned for chunk in self.memory.activations)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """phases: the fullest rank of each; ranks: one of every kind of pipeline stage (none where nothing is trained).

    host_bytes: of a node, in its worst phase, by what takes them, and node: what of it is left of a node; checkpoint_bytes: of one
    save; starts: whether the generator can.
    """

    phases: tuple[PhaseMemory, ...]
    ranks: tuple[StageRank, ...]
    generator: GeneratorMemory | None
    host_bytes: Mapping[str, float]
    node: Verdict
    checkpoint_bytes: float
    starts: bool
    problems: tuple[str, ...]

    @property
    def moved_a_token(self) -> float:
        """Bytes of activations that go to host memory and back, of a token of a microbatch, on the rank that moves the most."""
        chunks = [rank.memory.activations for rank in self.ranks]
        return max((sum(chunk.moved / chunk.tokens for chunk in each) for each in chunks), default=0.0)


def plan_memory(
    config: Stage, hf: HFConfig, gpus: int, gpu: GPU, work: Workload | None, *, imbalance: float, per_node: int,
    node_bytes: float = NODE_BYTES,
) -> MemoryPlan:  # fmt: skip
    """work: None for a stage that trains nothing; node_bytes: host memory of a node. Raises ConfigError for a layout that does not
    divide.
    """
    rollout = getattr(config, "rollout", None)
    problems: list[str] = []
    if isinstance(config, RLStage):
        problems = list(config.generator_problems(hf, gpus))
    elif rollout is not None:
        problems = list(generator_problems(rollout, gpus, hf, together=False))
    if isinstance(config, TrainingStage):
        problems = [*layout_problems(config, dict(hf), gpus), *problems]
    if config.model.fp8 != "off" and gpu.fp8_flops is None:
        problems.append(f"model.fp8 = {config.model.fp8}: {gpu.name} has no FP8; set model.fp8=off, or another --gpu")
    if problems:
        raise ConfigError("\n".join(problems))
    dtype = getattr(torch, config.model.dtype)
    generator = None
    if rollout is not None and rollout.engine == "vllm":
        generator = generator_memory(hf, dtype, rollout, gpu.memory_bytes)
    ranks: tuple[StageRank, ...] = ()
    if isinstance(config, TrainingStage) and work is not None:
        ranks = tuple(stage_ranks(config, hf, gpus, work, imbalance))
    samples = planned_samples(config, hf, gpus, work) if isinstance(config, RLStage) and work is not None else None
    whole = largest_parameter_bytes(hf, config) if isinstance(config, TrainingStage) else 0.0
    at = _Placed(hf, gpu, gpus, ranks, generator, min(per_node, gpus), node_bytes, samples, whole)
    phases, host = tuple(at.phases(config)), at.host(config)
    node = node_verdict(host, at.per_node, node_bytes)
    saved = checkpoint_bytes(config, hf) if isinstance(config, TrainingStage) else 0.0
    unable = () if generator is None else tuple(generator_memory_problems(config, hf, gpu, gpus))
    problems = [*unable, *at.problems(config, starts=not unable)]
    return MemoryPlan(phases, ranks, generator, host, node, saved, not unable, tuple(problems))


def stage_ranks(
    config: TrainingStage, hf: Mapping[str, Any], gpus: int, work: Workload, imbalance: float
) -> Iterator[StageRank]:
    """One rank of every kind of pipeline stage: the first of those that hold the same."""
    parallel, model = config.parallel, architecture_of(hf)
    layers = stage_layers(parallel, model.num_layers)
    optimizer = config.optimizer.model_copy(update={"cpu_offload": False})  # as many bytes, in another place
    seen = set()
    for stage in range(parallel.pp):
        chunks = [layers[index] for index in range(stage, num_stages(parallel), parallel.pp)]
        kinds = tuple(tuple(kind_of(layer, model, config.model) for layer in chunk) for chunk in chunks)
        kind = (kinds, stage in {0, mtp_stage(parallel) % parallel.pp, parallel.pp - 1} and stage)
        if kind in seen:
            continue
        seen.add(kind)
        rank = stage * gpus // parallel.pp
        memory = measure(
            hf, config.model, parallel, optimizer, world=gpus, rank=rank, imbalance=imbalance,
            tokens=padded(work.microbatch_tokens, parallel), labels=isinstance(config, SFTStage),
        )  # fmt: skip
        head = _head_bytes(config, hf, work.microbatch_tokens / parallel.cp) if stage == parallel.pp - 1 else 0.0
        yield StageRank(stage, memory, in_flight(parallel, stage, work.microbatches, model=config.model), head)


def padded(tokens: int, parallel: ParallelConfig) -> int:
    """To what every rank of tp and cp gets an equal part of."""
    multiple = parallel.tp * 2 * parallel.cp
    return -(-max(1, tokens) // multiple) * multiple


def in_flight(parallel: ParallelConfig, stage: int, microbatches: int, *, model: ModelConfig | None = None) -> float:
    """Microbatches between their forward and their backward pass on this stage, each with all chunks of the rank. With
    `model.megatron.overlap_moe_expert_parallel_comm` a chunk goes forward beside the backward pass of another: one more.
    """
    chunks, more = parallel.vpp or 1, model is not None and model.megatron.overlap_moe_expert_parallel_comm
    if chunks == 1:
        return min(parallel.pp - stage + more, microbatches)
    warm_up = 2 * (parallel.pp - stage - 1) + (chunks - 1) * parallel.pp + 1 + more  # megatron's interleaved schedule
    return min(warm_up, microbatches * chunks) / chunks


def _head_bytes(config: TrainingStage, hf: Mapping[str, Any], rows: float) -> float:
    """Beside the last stage's layers: for `hidden` the rows, their gradient in float32 and two buffers of logits. Where the
    loss is found in one pass, what takes most of: a chunk's logits, in whose place their gradient is written, the output
    weight's gradient in float32 and those rows; and in the backward pass, which has no logits, that gradient, and the rows' once more in float32
    and in their type, or zeros of the weight's size in its type.
    """
    if config.model.log_probs != "hidden":
        return 0.0  # logits are a layer's output, and counted there
    hidden = hf["hidden_size"]
    if not (isinstance(config, RLStage | SFTStage) and config.parallel.cp == 1):
        return 2.0 * HEAD_BUFFER_BYTES + rows * hidden * (4 + 2)
    vocabulary, chunk = hf["vocab_size"] / config.parallel.tp, min(rows, DEFAULT_CHUNK_TOKENS)
    forward = vocabulary * chunk * 4
    backward = hidden * max(rows * (4 + 2), rows * 2 + vocabulary * 2)  # r1mega_kernels.linear_loss, linear.handed_over
    return vocabulary * hidden * 4 + rows * hidden * (4 + 2) + max(forward, backward)


def phase_memory(
    config: Stage,
    hf: HFConfig,
    ranks: tuple[StageRank, ...],
    generator: GeneratorMemory | None,
    whole: float | None = None,
) -> Iterator[PhaseMemory]:
    """Of each phase of a step, in their order, the rank that has the most of these. whole: `largest_parameter_bytes`, if known."""
    if not isinstance(config, TrainingStage):
        if generator is not None:
            yield PhaseMemory("rollout", _generator_parts(generator) | {"context": CONTEXT_BYTES}, 0)
        return
    plan, phases = residency(config)
    whole = largest_parameter_bytes(hf, config) if whole is None else whole
    for phase in phases:
        places = plan.places[phase]
        candidates = []
        for rank in ranks:
            sizes = _sizes(rank.memory, generator)
            parts = {"trainer": 0.0, "reference": 0.0, "generator": 0.0, "KV cache": 0.0}
            names = dict.fromkeys(TRAINER, "trainer") | {
                "reference": "reference", "generator_weights": "generator", "kv_cache": "KV cache",
            }  # fmt: skip
            for part, place in places.items():
                parts[names[part]] += sizes[part] if place == "device" else 0.0
            parts |= _passing(config, phase, rank, whole) | {"context": CONTEXT_BYTES}
            candidates.append(PhaseMemory(phase, {name: size for name, size in parts.items() if size}, rank.stage))
        yield max(candidates, key=lambda candidate: candidate.total)


def _sizes(memory: RankMemory, generator: GeneratorMemory | None) -> dict[Part, float]:
    """Bytes of each part. The KV cache is with what a generator needs to run: its profile and graphs."""
    static = memory.static
    awake = {} if generator is None else _generator_parts(generator)
    return {
        "weights": static.weights,
        "gradients": static.gradients,
        "main_params": static.main_params,
        "exp_avg": static.exp_avg,
        "exp_avg_sq": static.exp_avg_sq,
        "reference": static.weights,
        "generator_weights": awake.get("generator", 0.0),
        "kv_cache": awake.get("KV cache", 0.0),
    }


def _host_sizes(config: TrainingStage, memory: RankMemory, generator: GeneratorMemory | None) -> dict[Part, float]:
    """`_sizes` as they are in host memory."""
    sizes, static = _sizes(memory, generator), memory.static
    sizes["reference"] = static.reference
    if config.optimizer.cpu_offload:
        sizes["main_params"] += static.cpu_adam
    else:
        state = static.main_params + static.exp_avg + static.exp_avg_sq
        sizes["main_params"] += -state % HOST_BLOCK
    sizes["weights"] += -static.weights % HOST_BLOCK
    return sizes


def moment_bytes(optimizer: OptimizerConfig) -> tuple[int, int]:
    """Of an element of `exp_avg` and of `exp_avg_sq`."""
    if not optimizer.precision_aware:
        return 4, 4
    return getattr(torch, optimizer.exp_avg_dtype).itemsize, getattr(torch, optimizer.exp_avg_sq_dtype).itemsize


def _generator_parts(generator: GeneratorMemory) -> dict[str, float]:
    return {
        "generator": generator.weights, "KV cache": max(0.0, generator.kv_cache) + generator.profile + OTHER_BYTES
    }  # fmt: skip


def _passing(config: TrainingStage, phase: Phase, rank: StageRank, whole: float) -> dict[str, float]:
    """What comes and goes within a phase. A pass without gradients wants copies in FP8 of weights' rows alone. whole: of the
    largest parameter, which the export of the last save holds, and a push by `gather`.
    """
    if phase == "save":
        return {"a whole parameter": whole}
    chunks, quantised = rank.memory.activations, rank.memory.static.quantised
    if phase == "update":
        kept = sum(chunk.kept for chunk in chunks) * rank.in_flight
        working = max(chunk.working for chunk in chunks) + rank.head_bytes
        return {"activations": kept + working, "weights in FP8": quantised}
    if phase in ("logprob", "reference"):
        activations = max(chunk.forward for chunk in chunks) + rank.head_bytes
        return {"activations": activations, "weights in FP8": quantised / 2}
    optimizer = config.optimizer
    if phase == "step" and optimizer.precision_aware and optimizer.exp_avg_dtype != optimizer.exp_avg_sq_dtype:
        # Transformer Engine 2.20, fused_adam.py: its kernel takes moments of one type, bfloat16 is copied to float32 before it
        return {"a moment in float32": rank.memory.static.main_params}
    if phase == "step" and not (optimizer.grad_reduce_in_fp32 or optimizer.precision_aware):
        return {"gradients in float32": rank.memory.static.main_params}
    if phase == "score":
        return {"reward model": rank.memory.static.weights + max(chunk.forward for chunk in chunks)}
    if phase == "reshard" and isinstance(config, RLStage):
        if config.weights.strategy == "gather" or (config.weights.strategy is None and config.rollout.engine != "vllm"):
            return {"a whole parameter": whole, "buckets": float(config.weights.bucket_bytes)}
        return {"buckets": 4.0 * config.weights.bucket_bytes}  # two, sent and received
    return {}


def host_memory(
    config: Stage,
    ranks: tuple[StageRank, ...],
    generator: GeneratorMemory | None,
    per_node: int,
    samples: SampleMemory | None = None,
) -> dict[str, float]:
    """Bytes of a node by what takes them, in the phase that has most; {} for a stage that trains nothing."""
    if not ranks or not isinstance(config, TrainingStage):
        return {}
    rank = max((rank.memory for rank in ranks), key=lambda memory: memory.static.total)
    plan, phases = residency(config)
    sizes = _host_sizes(config, rank, generator)
    names = dict.fromkeys(TRAINER, "trainer") | {"generator_weights": "generator"}
    names |= {"reference": "reference"} if has_reference(config) else {}
    found = []
    for phase in phases:
        host: dict[str, float] = {}
        for part, name in names.items():
            if size := per_node * plan.host_bytes(phase, {part: sizes[part]}):
                host[name] = host.get(name, 0.0) + size
        if phase == "save":
            # what a rank writes: float32 main parameters and moments of its share (train/optimizer.py: shard_state), two thirds
            # of them twice (the first layers of feed-forwards, docs/checkpoints.md); weights. A copy to be written in the background
            elements = rank.static.exp_avg / moment_bytes(config.optimizer)[0]
            copied = 12.0 if config.checkpoint.async_save else 0.0
            host["save"] = per_node * ((20.0 + copied) * elements + rank.static.weights)
        if phase == "update" and (moved := max(rank.host_bytes for rank in ranks)):
            host["activations"] = per_node * moved
        if samples is not None:  # until the next step's are there
            trained = phase in ("logprob", "reference", "update", "step", "reshard")
            host["samples"] = per_node * (samples.peak if trained else samples.made)
        found.append(host)
    return max(found, key=lambda host: sum(host.values()))


def node_verdict(host: Mapping[str, float], per_node: int, node_bytes: float) -> Verdict:
    """Of what `host_memory` says, on nodes of so many bytes."""
    left = node_bytes - sum(host.values())
    if left < 0:
        return "does not fit"
    return "at risk" if host and left < per_node * SPARE_BYTES else "fits"


@dataclass(frozen=True, slots=True)
class _Placed:
    """What was measured of a config, which other choices of `memory` put in other places."""

    hf: HFConfig
    gpu: GPU
    gpus: int
    ranks: tuple[StageRank, ...]
    generator: GeneratorMemory | None
    per_node: int
    node_bytes: float
    samples: SampleMemory | None
    whole: float

    def phases(self, config: Stage) -> Iterator[PhaseMemory]:
        return phase_memory(config, self.hf, self.ranks, self.generator, self.whole)

    def host(self, config: Stage) -> dict[str, float]:
        return host_memory(config, self.ranks, self.generator, self.per_node, self.samples)

    def problems(self, config: Stage, *, starts: bool = True) -> Iterator[str]:
        """What does not fit, and the number to change. starts: whether the generator can; if not, that has been said of its rollout."""
        change = self._change(config)
        for phase in self.phases(config):
            if phase.verdict(self.gpu) != "fits" and (starts or phase.phase != "rollout"):
                advice = change or self._less_cache(config, phase) or _advice(config, phase)
                over = phase.total - (self.gpu.memory_bytes - SPARE_BYTES)
                yield f"{phase.phase}: {phase.total / 1e9:.1f} GB, {over / 1e9:.1f} too many; {advice}"
        if not self._node_fits(config):
            taken, programs = sum(self.host(config).values()), self.per_node * SPARE_BYTES
            more = (
                f"take nodes of {math.ceil((taken + programs) / 1e9):,} GB at least, or more GPUs, each of which has a smaller "
                "share of the optimizer state"
            )
            yield (
                f"host: {taken / 1e9:,.0f} GB a node, {(taken + programs - self.node_bytes) / 1e9:,.0f} too many beside "
                f"{SPARE_BYTES / 1e9:.0f} of each rank's programs (--host-memory, {self.node_bytes / 1e9:,.0f}); {change or more}"
            )

    def _node_fits(self, config: Stage) -> bool:
        return node_verdict(self.host(config), self.per_node, self.node_bytes) == "fits"

    def _change(self, config: Stage) -> str | None:
        """The keys of `memory`, `optimizer` and `checkpoint` with which all of it fits, if there are."""
        if not isinstance(config, TrainingStage):
            return None
        quiet = config.checkpoint.model_copy(update={"async_save": False})
        for one in (*memory_choices(config), *memory_choices(config.model_copy(update={"checkpoint": quiet}))):
            if all(phase.verdict(self.gpu) == "fits" for phase in self.phases(one)) and self._node_fits(one):
                return "set " + " ".join(differences(config, one))
        return None

    def _less_cache(self, config: Stage, phase: PhaseMemory) -> str | None:
        """The share of the GPU that leaves a generator which can still start; None: there is none."""
        rollout = getattr(config, "rollout", None)
        if phase.phase != "rollout" or rollout is None or rollout.kv_cache_bytes is not None:
            return None
        over = (phase.total - (self.gpu.memory_bytes - SPARE_BYTES)) / self.gpu.memory_bytes
        share = math.floor(100 * (rollout.gpu_memory_utilization - over)) / 100
        if share <= 0:
            return None
        less = config.model_copy(update={"rollout": rollout.model_copy(update={"gpu_memory_utilization": share})})
        if next(generator_memory_problems(less, self.hf, self.gpu, self.gpus), None) is not None:
            return None
        return f"set rollout.gpu_memory_utilization={share:g}"


def _advice(config: Stage, phase: PhaseMemory) -> str:
    """The number to change where `memory` has none: recomputation first, which costs a third of the update's time and no GPU."""
    largest = max(phase.parts, key=lambda name: phase.parts[name])
    if isinstance(config, TrainingStage) and phase.phase == "update":
        if config.model.recompute != "full":
            beside = {
                "model.offload_modules": bool(config.model.offload_modules),
                "model.megatron.overlap_moe_expert_parallel_comm": config.model.megatron.overlap_moe_expert_parallel_comm,
            }
            refused = " and ".join(key for key, on in beside.items() if on)
            return "set model.recompute=full" + (f", and leave {refused} out" if refused else "")
        if largest == "activations":
            return "raise parallel.cp or parallel.tp, which cut a microbatch's tokens"
    if largest in ("generator", "KV cache"):
        return "raise rollout.tp, which cuts the generator's weights"
    return "raise parallel.ep or parallel.pp: the trainer's weights, gradients and optimizer state take the most"
