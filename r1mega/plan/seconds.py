"""Seconds of the phases of an RL step, and of an optimizer step. A model with four constants (plan/gpu.py); everything else is counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from r1mega.config.layout import mtp_stage, num_stages, stage_layers
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import ParallelConfig, TrainingStage
from r1mega.config.stages.reward_model import RewardModelStage
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import SFTStage
from r1mega.model.architecture import Architecture, LatentAttention
from r1mega.model.families import architecture_of
from r1mega.model.flops import ModelFlops, Work, model_flops
from r1mega.plan.decoding import partial_seconds, rollout_seconds
from r1mega.plan.generator import GeneratorMemory
from r1mega.plan.gpu import ASSUMED, GPU, Efficiency
from r1mega.plan.memory import in_flight, moment_bytes
from r1mega.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one step, by phase; flops: model FLOPs of it (model/flops.py); tokens: that are trained on."""

    phases: Mapping[str, float]
    flops: float
    tokens: int

    @property
    def total(self) -> float:
        return sum(self.phases.values())

    def mfu(self, gpus: int, gpu: GPU) -> float:
        """Model FLOPs of the step over what the GPUs could do in its time, in bfloat16."""
        return self.flops / (self.total * gpus * gpu.bf16_flops)

    def tokens_per_gpu(self, gpus: int) -> float:
        """Tokens a second and GPU."""
        return self.tokens / self.total / gpus


def plan_seconds(
    config: TrainingStage,
    hf: HFConfig,
    gpus: int,
    gpu: GPU,
    work: Workload,
    generator: GeneratorMemory | None,
    *,
    imbalance: float,
    per_node: int,
    efficiency: Efficiency = ASSUMED,
    moved: float = 0.0,
) -> Seconds:
    """work: of one step; generator: None where nothing is generated; moved: MemoryPlan.moved_a_token. Saves and evaluations
    are not in it.
    """
    model = model_flops(hf)
    costs = _Costs(config, hf, gpus, gpu, work, imbalance, per_node, efficiency, architecture_of(hf), model, moved)
    updates = optimizer_steps(config, work.minibatches)
    flops = model.training(work.whole, mtp_loss=trains_mtp(config)) * updates / work.minibatches
    phases: dict[str, float] = {}
    if isinstance(config, RLStage):
        if generator is not None:
            dtype = getattr(torch, config.model.dtype)
            of = partial_seconds if config.rollout.partial.is_on else rollout_seconds
            phases["rollout"] = of(config.rollout, dtype, hf, gpus, gpu, work, generator, efficiency, per_node)
        passes = (config.algorithm.old_log_probs == "recompute") + (config.algorithm.kl_coefficient > 0)
        phases["logprob"] = passes * costs.pipelined(work.minibatches * work.microbatches, costs.forward())
        flops += passes * model.forward(work.whole)
    stepping = optimizer_seconds(config, hf, gpus, gpu, per_node, efficiency)
    phases["update"] = updates * (costs.pipelined(work.microbatches, costs.both()) + stepping)
    if isinstance(config, RLStage) and generator is not None:
        a_byte = reshard_seconds(config.parallel, hf, gpus, gpu, per_node, efficiency)
        phases["reshard"] = generator.weights * a_byte
    if moving := moving_seconds(config, hf, gpus, gpu, work.minibatches, efficiency):
        phases["offload"] = moving
    return Seconds(phases, flops, work.tokens)


@dataclass(frozen=True, slots=True)
class _Costs:
    """Of one microbatch of average size on the slowest pipeline stage."""

    config: TrainingStage
    hf: HFConfig
    gpus: int
    gpu: GPU
    work: Workload
    imbalance: float
    per_node: int
    efficiency: Efficiency
    model: Architecture
    flops: ModelFlops
    moved: float

    def pipelined(self, microbatches: int, seconds: float) -> float:
        """So many, one after the other, with the pipeline's filling and draining."""
        p = self.config.parallel
        return (microbatches + (p.pp - 1) / (p.vpp or 1)) * seconds

    def forward(self) -> float:
        return self._slowest(1, 1, 1)

    def both(self) -> float:
        """What is moved to host memory goes there beside the forward pass and comes back beside the backward pass: what takes
        longer counts. Back comes at first what the layer moved last, which nothing hides.
        """
        products, exchanges = self._again()
        seconds = self._slowest(3 + products, 3, 2 + exchanges, hidden=self._overlapped())
        if not self.moved:
            return seconds
        p, forward = self.config.parallel, self.forward()
        copy = self.moved * self._tokens() * p.tp * p.cp / (self.gpu.host_bandwidth * self.efficiency.network)
        last = copy / max(1.0, *self._layers())
        return max(forward, copy) + max(seconds - forward, copy) + last

    def _overlapped(self) -> float:
        """Share of the microbatches whose exchanges with experts go on while another computes: all but those that fill the
        pipeline and drain it.
        """
        p, m = self.config.parallel, self.work.microbatches
        if not self.config.model.megatron.overlap_moe_expert_parallel_comm:
            return 0.0
        return 1 - in_flight(p, 0, m) / m  # the first stage's, which has the most

    def _again(self) -> tuple[float, float]:
        """What of a forward pass's matrix products and of its exchanges model.recompute does a second time."""
        recompute = self.config.model.recompute
        if isinstance(recompute, str):
            return (1.0, 1.0) if recompute == "full" else (0.0, 0.0)
        whole = self.work.whole
        parts = part_flops(self.hf, Work(whole.tokens, whole.pairs, 0))
        products = sum(parts.get(part, 0.0) for part in recompute)
        return products / self.flops.forward(Work(whole.tokens, whole.pairs, 0)), float("moe" in recompute)

    def _slowest(self, products: float, heads: float, exchanges: float, hidden: float = 0.0) -> float:
        """Seconds on the rank of the pipeline that takes longest: so many passes through its layers' matrix products, through
        the output layer, which the last one has, and of its layers' exchanges. hidden: share of those with experts, forward
        and backward, that goes on beside the products, as far as there is that much to compute.
        """
        layer, head = self._layer_flops(), self._head_flops()
        a_product = self._tokens() / (self.gpu.bf16_flops * self.efficiency.matmul)
        sent, gathered, counts = self._exchanged(), self._gathered(), self._layers()

        def seconds(rank: int, count: float) -> float:
            computed = a_product * (products * count * layer + heads * (rank == len(counts) - 1) * head)
            return computed + exchanges * count * (sent + gathered) - hidden * min(2 * count * sent, computed)

        return max(seconds(rank, count) for rank, count in enumerate(counts))

    def _layers(self) -> list[float]:
        """Of each rank of the pipeline; those of multi-token prediction are as dear as others."""
        p, layers = self.config.parallel, self.model.num_layers
        counts = list(p.layers_per_stage or [layers / num_stages(p)] * num_stages(p))
        counts[mtp_stage(p)] += self._mtp_layers
        return [sum(counts[rank :: p.pp]) for rank in range(p.pp)]

    @property
    def _mtp_layers(self) -> int:
        return self.model.num_mtp_layers if trains_mtp(self.config) else 0

    def _layer_flops(self) -> float:
        """Forward FLOPs of a token in an average layer, of the rank that has most to do: others wait for its experts."""
        whole, experts = self.work.whole, self.model.experts
        flops = self.flops.forward(Work(whole.tokens, whole.pairs, 0)) / whole.tokens
        if experts is not None:
            routed = 2.0 * 3 * self.model.hidden_size * experts.chosen * experts.size * sum(experts.layers)
            flops += (self._uneven() - 1) * routed
        return flops / self.model.num_layers

    def _head_flops(self) -> float:
        """Of a token, if as many are scored as in the step on average; multi-token prediction scores them once more a layer."""
        whole = self.work.whole
        if isinstance(self.config, RewardModelStage):
            return 0.0
        return (1 + self._mtp_layers) * self.flops.forward(Work(0, 0, whole.scored)) / whole.tokens

    def _uneven(self) -> float:
        """Tokens of the fullest rank's experts over the mean, as far as the chosen experts of every token allow."""
        experts = self.model.experts
        return 1.0 if experts is None else min(self.imbalance, self.config.parallel.ep, experts.count / experts.chosen)

    def _tokens(self) -> float:
        """Of an average microbatch on one rank of tp and cp."""
        p = self.config.parallel
        replicas = self.gpus // (p.tp * p.pp * p.cp)
        return self.work.tokens / (self.work.minibatches * self.work.microbatches * replicas) / (p.tp * p.cp)

    def _exchanged(self) -> float:
        """Of an average layer, one way through it: tokens to their experts and back, of the fullest rank. The ranks of ep * etp
        follow one another; the share for one's own node goes over NVLink while the rest goes over the network. alltoall sends a
        token once for each of its experts; deep_ep's dispatchers once to a node, where NVLink takes it on.
        """
        experts, p = self.model.experts, self.config.parallel
        if experts is None or (ranks := p.ep * p.etp) == 1:
            return 0.0
        node = min(ranks, self.per_node)
        within, across = experts.chosen * (node - 1) / ranks, experts.chosen * (ranks - node) / ranks
        if self.config.model.dispatcher != "alltoall":
            within = experts.chosen * (node - 1) / node
            across = nodes_of_a_token(self.hf, experts.chosen, ranks / node) * (ranks - node) / ranks
        a_copy = 2 * self._tokens() * self.model.hidden_size * 2 * self._uneven()
        seconds = a_copy * max(within / self.gpu.nvlink_bandwidth, across / self.gpu.network_bandwidth)
        return seconds / self.efficiency.network * sum(experts.layers) / self.model.num_layers

    def _gathered(self) -> float:
        """Of a layer, one way through it: tp gathers and scatters hidden states, around attention and around the feed-forward
        part; cp sends keys and values round its ranks.
        """
        p, model = self.config.parallel, self.model
        attention = model.attention
        if isinstance(attention, LatentAttention):
            width = attention.heads * (attention.nope_size + attention.rope_size + attention.value_size)
        else:
            width = 2 * attention.groups * attention.head_size
        links = self.gpu.nvlink_bandwidth, self.gpu.network_bandwidth
        seconds = 0.0
        for ranks, values, span in ((p.tp, 4 * model.hidden_size, p.tp), (p.cp, width, p.tp * p.cp)):
            bandwidth = links[span > self.per_node] * self.efficiency.network
            seconds += (ranks - 1) * self._tokens() * values * 2 / bandwidth
        return seconds


def nodes_of_a_token(hf: HFConfig, chosen: int, nodes: float) -> float:
    """That have one of its experts, on average, if every node is as likely as the others and holds experts that follow one
    another. n_group and topk_group: all are of so many groups of experts (DeepSeek-V3 report, section 2.1.2).
    """
    groups, limit = hf.get("n_group") or 1, hf.get("topk_group") or 1
    possible = nodes
    if groups > 1:
        missed = max(0.0, 1 - limit / groups) ** (groups / nodes) if nodes < groups else 1 - limit / groups
        possible = nodes * (1 - missed)
    return possible * (1 - (1 - 1 / max(1.0, possible)) ** chosen)


def trains_mtp(config: TrainingStage) -> bool:
    """Whether layers of multi-token prediction run: where labels are known."""
    return isinstance(config, SFTStage) and config.model.mtp_loss_coefficient > 0


def optimizer_steps(config: TrainingStage, minibatches: int) -> int:
    """Of a step: an RL stage goes through its minibatches update.num_epochs times."""
    return minibatches * config.update.num_epochs if isinstance(config, RLStage) else minibatches


def optimizer_seconds(
    config: TrainingStage, hf: HFConfig, gpus: int, gpu: GPU, per_node: int, efficiency: Efficiency = ASSUMED
) -> float:
    """Of one, on the pipeline stage that takes longest: gradients are added up over data-parallel ranks, each to the one that updates it, Adam reads and writes its state,
    and weights are handed round again. Nothing of it is hidden; what Adam on the CPU takes is in `moving_seconds`. Ranks of a
    pipeline stage follow one another, those of tp and cp, of ep and etp first; a group has a link to other nodes for each
    of its ranks in a node.
    """
    p, itemsize = config.parallel, getattr(torch, config.model.dtype).itemsize
    gradient = 4 if config.optimizer.grad_reduce_in_fp32 else itemsize
    stage = gpus / p.pp
    adam = gradient + itemsize + 2 * (4 + sum(moment_bytes(config.optimizer)))

    def seconds(numbers: float, cut: int) -> float:
        ranks = stage / cut
        sent = (gradient + itemsize) * numbers / cut * (1 - 1 / ranks)
        across = 0.0 if stage <= per_node else 1 / (max(1.0, per_node / cut) * gpu.network_bandwidth)
        took = sent * max(1 / gpu.nvlink_bandwidth, across) / efficiency.network
        updated = 0.0 if config.optimizer.cpu_offload else adam * numbers / stage
        return took + updated / (gpu.memory_bandwidth * efficiency.memory)

    return max(seconds(dense, p.tp) + seconds(experts, p.ep * p.etp) for dense, experts in stage_parameters(config, hf))


def moving_seconds(
    config: TrainingStage, hf: HFConfig, gpus: int, gpu: GPU, minibatches: int, efficiency: Efficiency = ASSUMED
) -> float:
    """Of a step, for what `memory` moves between device and host, and for Adam on the CPU: its weights and state of 28 bytes
    a number go through host memory, taken as fast as the link. The reference takes the weights' place only where RL asks it. Of
    the pipeline stage that has most to move. Nothing of it is hidden behind anything.
    """
    p, memory, itemsize = config.parallel, config.memory, getattr(torch, config.model.dtype).itemsize
    updates = optimizer_steps(config, minibatches)
    swapped = memory.reference_swap and isinstance(config, RLStage) and config.algorithm.kl_coefficient > 0
    state = 4 + sum(moment_bytes(config.optimizer))
    a_number = 2 * state * {"none": 0, "rollout": 1, "update": updates}[memory.optimizer_offload]
    if config.optimizer.cpu_offload:
        a_number += updates * (4 + itemsize + 28)

    def moved(dense: float, experts: float) -> float:
        weights = itemsize * (dense / p.tp + experts / (p.ep * p.etp))
        updated = (dense + experts) * p.pp / gpus  # numbers whose optimizer state is this rank's
        return 2 * weights * (memory.param_offload + swapped) + a_number * updated

    most = max(moved(dense, experts) for dense, experts in stage_parameters(config, hf))
    return most / (gpu.host_bandwidth * efficiency.network)


def stage_parameters(config: TrainingStage, hf: HFConfig) -> list[tuple[float, float]]:
    """Of each rank of the pipeline what `layer_parameters` says of its layers, with the tables of words: the embedding is on
    the first one, the output layer on the last (none in a reward model; the same table where they are tied on one rank).
    Layers of multi-token prediction have an embedding of their own where the first is another rank.
    """
    p, layers = config.parallel, layer_parameters(hf)
    table, stages = float(hf["vocab_size"] * hf["hidden_size"]), stage_layers(p, len(layers))
    further = architecture_of(hf).num_mtp_layers if config.model.mtp_loss_coefficient > 0 else 0
    held = []
    for rank in range(p.pp):
        own = [layers[layer] for chunk in stages[rank :: p.pp] for layer in chunk]
        tables = table * (rank == 0)
        if rank == p.pp - 1:
            tied = bool(hf.get("tie_word_embeddings")) and p.pp == 1
            tables += table * (not tied and not isinstance(config, RewardModelStage))
        if rank == mtp_stage(p) % p.pp and further:
            own += [layers[-1]] * further
            tables += 2.0 * hf["hidden_size"] ** 2 * further + table * (rank > 0)
        held.append((tables + sum(dense for dense, _ in own), sum(experts for _, experts in own)))
    return held


def layer_parameters(hf: HFConfig) -> list[tuple[float, float]]:
    """Of each layer the parameters of its matrices: (all but the routed experts, the routed experts)."""
    model, token = architecture_of(hf), Work(1)
    parts = {part: flops / 2 for part, flops in part_flops(hf, token).items()}
    attention = model_flops(hf).forward(token) / 2 - parts["mlp"] - parts.get("moe", 0.0)
    dense, experts, shared = attention / model.num_layers, 0.0, 0
    if model.experts is not None:
        experts = 3.0 * model.hidden_size * model.experts.count * model.experts.size
        shared = 3 * model.hidden_size * model.experts.shared_size
    without = (dense + 3 * model.hidden_size * model.intermediate_size, 0.0)
    return [(dense + shared, experts) if model.has_experts(layer) else without for layer in range(model.num_layers)]


def part_flops(hf: HFConfig, work: Work) -> dict[str, float]:
    """FLOPs of a forward pass through the parts of the decoder that model.recompute names; norms and activations: none."""
    model = architecture_of(hf)
    experts, attention, hidden = model.experts, model.attention, model.hidden_size
    sparse = 0 if experts is None else sum(experts.layers)
    parts = {"mlp": (model.num_layers - sparse) * 3 * hidden * model.intermediate_size}
    if experts is not None:
        parts["shared_experts"] = sparse * 3 * hidden * experts.shared_size
        parts["moe"] = parts["shared_experts"] + sparse * hidden * (3 * experts.chosen * experts.size + experts.count)
    if isinstance(attention, LatentAttention):
        up = attention.kv_rank * (attention.nope_size + attention.value_size)
        up += (attention.query_rank or 0) * (attention.nope_size + attention.rope_size)
        parts["mla_up_proj"] = model.num_layers * attention.heads * up
    products = {part: 2.0 * size * work.tokens for part, size in parts.items()}
    return products | {"core_attn": model_flops(hf).forward(Work(0, work.pairs, 0))}


def reshard_seconds(
    p: ParallelConfig, hf: HFConfig, gpus: int, gpu: GPU, per_node: int, efficiency: Efficiency = ASSUMED
) -> float:
    """Of each byte of weights that a rank of the generator has: of what it wants, the part that the trainer's layout put on
    itself is there, the part that its node holds comes inside of the node, and only the rest over the network, both at once
    (`weights/plan.py`, which prefers near sources; buckets are packed and written while others are on their way). The ranks
    of a pipeline stage follow one another, and in them those of tp and of ep * etp. The proof is not in it.
    """
    dense, experts = (sum(sizes) for sizes in zip(*layer_parameters(hf), strict=True))
    dense += 2 * hf["vocab_size"] * hf["hidden_size"]

    def held(ranks: int) -> float:
        """By so many that follow one another, as a share of all weights."""
        stages = max(1, ranks * p.pp // gpus) / p.pp
        cut = dense * min(1, ranks / p.tp) + experts * min(1, ranks / (p.ep * p.etp))
        return stages * cut / (dense + experts)

    node = held(min(gpus, per_node))
    slowest = max((node - held(1)) / gpu.nvlink_bandwidth, (1 - node) / gpu.network_bandwidth)
    return slowest / efficiency.network


def gpu_hours(seconds: float, steps: int, gpus: int) -> float:
    """Of a stage of so many steps, without saves and evaluations."""
    return math.ceil(seconds * steps * gpus / 3600)
