"""Seconds of a generator's decoding: the bytes that a step reads, what its ranks send each other, and how long they wait for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from r1mega.config.model_files import HFConfig
from r1mega.config.schema import RolloutConfig
from r1mega.model.architecture import Architecture, LatentAttention
from r1mega.model.families import architecture_of
from r1mega.model.flops import Work, model_flops
from r1mega.plan.generator import GeneratorConfig, GeneratorMemory
from r1mega.plan.gpu import ASSUMED, GPU, Efficiency
from r1mega.plan.partial import BIN, played_steps
from r1mega.plan.workload import Workload

LAUNCH_SECONDS, HOP_SECONDS, NODE_HOP_SECONDS = 6.8e-6, 0.6e-6, 5.0e-6
"""Of a sum over ranks of a few bytes: to begin with, to the next rank over NVLink, to another node. NCCL's own, by which it chooses
between algorithms (src/graph/tuning.cc of 2.30.7: a tree with the protocol LL)."""
STRIDE = 64
"""At most so many tokens of each response between two looks at what ends and starts, and a sixteenth of the mean length."""
DCP_EXCHANGES = 3
"""Of a layer whose cache several ranks hold: queries are gathered, sums of the softmax too, outputs scattered."""


def rollout_seconds(
    rollout: GeneratorConfig,
    dtype: torch.dtype,
    hf: HFConfig,
    gpus: int,
    gpu: GPU,
    work: Workload,
    generator: GeneratorMemory,
    efficiency: Efficiency = ASSUMED,
    per_node: int = 8,
) -> float:
    """Decoding of a generator's share, played through. Of generators that share experts each has as many as the others."""
    generators = max(1, gpus // rollout.tp)
    ordered = sorted(work.responses)
    lengths = ordered[:: max(1, generators)] if len(ordered) > generators else ordered[-1:]
    decoding = _decoding(rollout, dtype, hf, gpu, generator, efficiency, per_node)
    waiting = [(length, 0) for length in np.random.default_rng(0).permutation(lengths).tolist()]
    stride = max(1, min(STRIDE, sum(lengths) // (16 * len(lengths))))
    running: list[tuple[int, int]] = []
    prompt, seconds = work.samples[0][0], 0.0
    while waiting or running:
        held = sum(prompt + made for _, made in running)
        while waiting and len(running) < rollout.max_num_seqs:
            started = prompt + waiting[-1][1]
            if running and held + started + stride * (len(running) + 1) > generator.kv_tokens:
                break
            running.append(waiting.pop())
            held += started
        passes = min(stride, max(length - made for length, made in running))
        while len(running) > 1 and held + passes * len(running) > generator.kv_tokens:  # vLLM puts the last one back
            waiting.append(running.pop())
            held -= prompt + waiting[-1][1]
        seconds += passes * decoding.step(len(running), held / len(running) + passes / 2)
        running = [(length, made + passes) for length, made in running if made + passes < length]
    return seconds


def partial_seconds(
    rollout: RolloutConfig,
    dtype: torch.dtype,
    hf: HFConfig,
    gpus: int,
    gpu: GPU,
    work: Workload,
    generator: GeneratorMemory,
    efficiency: Efficiency = ASSUMED,
    per_node: int = 8,
) -> float:
    """`rollout_seconds` of a step that leaves its longest responses to later ones (rollout.partial): the mean of steps that
    are played through. More responses than fit at once take turns; what goes on is read as a prompt again.
    """
    generators, prompt = max(1, gpus // rollout.tp), work.samples[0][0]
    steps = played_steps(rollout.partial, tuple(work.responses), rollout.num_prompts, rollout.group_size, 0)
    decoding = _decoding(rollout, dtype, hf, gpu, generator, efficiency, per_node)
    of_a_token = model_flops(hf).forward(Work(1)) / (gpus * gpu.bf16_flops * efficiency.matmul)
    seconds = 0.0
    for step in steps:
        seconds += step.carried * of_a_token
        for running, done in step.running:
            each, context = max(1.0, running / generators), prompt + done
            at_once = min(rollout.max_num_seqs, each, max(1.0, generator.kv_tokens / context))
            seconds += BIN * each / at_once * decoding.step(at_once, context)
    return seconds / len(steps)


def _decoding(
    rollout: GeneratorConfig,
    dtype: torch.dtype,
    hf: HFConfig,
    gpu: GPU,
    generator: GeneratorMemory,
    efficiency: Efficiency,
    per_node: int,
) -> _Decoding:
    return _Decoding(
        architecture_of(hf), generator.weights, dtype.itemsize, rollout.tp, rollout.ep, rollout.dcp, gpu, efficiency,
        generator.kv_bytes_per_token, per_node,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Decoding:
    model: Architecture
    weights: float
    itemsize: int
    tp: int
    ep: int
    dcp: int
    gpu: GPU
    efficiency: Efficiency
    kv_bytes: float
    per_node: int

    def step(self, sequences: float, context: float) -> float:
        """Seconds for one token of each: weights that are read, the cache that is read, the overhead, and what ranks
        that share a layer, experts or a cache send each other and wait for.
        """
        model, weights, ranks = self.model, self.weights, max(self.tp, self.ep)
        if (experts := model.experts) is not None:
            routed = sum(experts.layers) * experts.count * 3 * model.hidden_size * experts.size * self.itemsize / ranks
            asked = sequences * ranks / self.tp
            weights -= routed * (1 - experts.chosen / experts.count) ** asked  # experts that nobody chose
        read = (weights + sequences * context * self.kv_bytes) / (self.gpu.memory_bandwidth * self.efficiency.memory)
        waited = sum_latency(self.tp, self.per_node)  # after attention
        waited += sum_latency(ranks, self.per_node)  # after experts
        waited += DCP_EXCHANGES / 2 * sum_latency(self.dcp, self.per_node)  # one way each: half of a sum
        return self.efficiency.overhead_seconds + model.num_layers * waited + read + self._sent(sequences)

    def _sent(self, sequences: float) -> float:
        """Seconds. Hidden states are added up over tp, twice a layer; to a rank come the tokens of all generators that share
        experts, and what it made of them goes back; the queries of its dcp, and what each found for them.
        """
        model, attention, gpu = self.model, self.model.attention, self.gpu
        layers, hidden = model.num_layers, sequences * model.hidden_size * self.itemsize
        seconds, sums = 0.0, 2 * layers
        if self.ep > self.tp and model.experts is not None:
            sums -= sum(model.experts.layers)
            tokens = 2 * sum(model.experts.layers) * hidden * self.ep / self.tp
            seconds += self._exchange(tokens, self.ep)
        if self.tp > 1:  # scattered and gathered; a node's ranks share what leaves it
            node = min(self.tp, self.per_node)
            across = (1 - node / self.tp) / (node * gpu.network_bandwidth)
            seconds += sums * 2 * hidden * max((1 - 1 / node) / gpu.nvlink_bandwidth, across)
        if self.dcp > 1:
            if isinstance(attention, LatentAttention):
                width = 2 * attention.kv_rank + attention.rope_size
            else:
                width = 2 * attention.head_size
            heads = attention.heads / self.tp * self.dcp
            seconds += self._exchange(layers * sequences * heads * width * self.itemsize, self.dcp)
        return seconds / self.efficiency.network

    def _exchange(self, size: float, ranks: int) -> float:
        """Seconds at a link's peak, of bytes of so many ranks that follow one another, one's own among them: the share of the
        node over NVLink, while the rest comes over the network.
        """
        node = min(ranks, self.per_node)
        return size / ranks * max((node - 1) / self.gpu.nvlink_bandwidth, (ranks - node) / self.gpu.network_bandwidth)


def sum_latency(ranks: int, per_node: int) -> float:
    """Seconds of a sum of little over ranks that follow one another: up a tree and down again."""
    if ranks == 1:
        return 0.0
    nodes = max(1.0, ranks / per_node)
    return LAUNCH_SECONDS + 2 * ((ranks / nodes - 1) * HOP_SECONDS + math.log2(nodes) * NODE_HOP_SECONDS)
