"""What the generator takes on a GPU: weights from its layout, what vLLM's profile reserves, and the KV cache that is left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from r1mega.config.layout import generator_problems
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import Stage
from r1mega.model.architecture import LatentAttention
from r1mega.model.families import architecture_of
from r1mega.plan.gpu import GPU
from r1mega.platform.vllm_cuda import kv_block_tokens
from r1mega.weights.layout import GeneratorRank, generator_layout, weight_dtype

OTHER_BYTES = 1.5e9
"""CUDA graphs, cuBLAS workspaces and NCCL's buffers of a generator's rank. Estimated: no GPU was asked."""


MOST_UTILIZATION = 0.92
"""That is advised: some of a GPU is taken before a generator asks for its share."""


class GeneratorConfig(Protocol):
    """Keys of RolloutConfig that say what a generator takes."""

    tp: int
    ep: int
    dcp: int
    max_num_seqs: int
    max_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_bytes: int | None


@dataclass(frozen=True, slots=True)
class GeneratorMemory:
    """Bytes a GPU; kv_tokens: of one generator, in all of its ranks together; kv_bytes_per_token: that a rank keeps of each of them.

    profile: the most that one pass of max_batched_tokens takes beside weights and cache.
    """

    weights: float
    profile: float
    kv_cache: float
    kv_bytes_per_token: float

    @property
    def kv_tokens(self) -> int:
        return max(0, int(self.kv_cache / self.kv_bytes_per_token))


def of_generators(rollout: GeneratorConfig, tp: int) -> dict[str, int | None]:
    """The keys of another tp: experts as spread as they are, where that is a multiple of it; as many ranks that share a cache."""
    ep = rollout.ep if rollout.ep > rollout.tp and rollout.ep % tp == 0 else tp
    return {"tp": tp, "ep": ep if rollout.ep > 1 else 1, "dp": None, "dcp": math.gcd(rollout.dcp, tp)}


def generator_memory(
    hf: Mapping[str, Any], dtype: torch.dtype, config: GeneratorConfig, gpu_bytes: float
) -> GeneratorMemory:
    """By vLLM's rule: of gpu_memory_utilization of the GPU, what weights, profile and the rest leave is KV cache.

    A cache of less than nothing means that the engine would not start.
    """
    fp8 = getattr(config, "quantization", None) == "fp8"  # of a generator that is pushed to
    weights = weight_bytes(hf, dtype, config.tp, config.ep, fp8=fp8)
    profile = profile_bytes(hf, dtype, config)
    left = config.gpu_memory_utilization * gpu_bytes - weights - profile - OTHER_BYTES
    cache = left if config.kv_cache_bytes is None else config.kv_cache_bytes
    cached = dtype if getattr(config, "kv_cache_dtype", "auto") == "auto" else torch.float8_e4m3fn
    return GeneratorMemory(weights, profile, cache, kv_bytes_per_token(hf, cached, config.tp, config.dcp))


def weight_bytes(hf: Mapping[str, Any], dtype: torch.dtype, tp: int, ep: int, *, fp8: bool = False) -> float:
    """Of the generator's first rank, which holds as much as any, tensor by tensor of its layout (weights/layout.py).

    Layers of one kind hold the same: one of each kind is laid out.
    """
    model = architecture_of(hf)
    kinds: dict[bool, list[int]] = {}
    for layer in range(model.num_layers):
        kinds.setdefault(model.has_experts(layer), []).append(layer)
    rank = GeneratorRank(tp, 0, ep, 0, fp8)
    total = sum(_placed_bytes(hf, rank, dtype, [same[0]]) * len(same) for same in kinds.values())
    outside = _placed_bytes(hf, rank, dtype, [])
    return total - outside * (model.num_layers - 1)


def _placed_bytes(hf: Mapping[str, Any], rank: GeneratorRank, dtype: torch.dtype, layers: list[int]) -> int:
    return sum(
        math.prod(last - first for first, last in part.source) * weight_dtype(part.name, dtype, rank.fp8).itemsize
        for part in generator_layout(hf, rank, layers)
    )


def profile_bytes(hf: Mapping[str, Any], dtype: torch.dtype, config: GeneratorConfig) -> float:
    """Of a pass of max_batched_tokens: hidden states (four of [tokens, hidden] at once), the Triton experts' two workspaces
    of [tokens, chosen, hidden] (vllm 0.32.0, fused_moe/triton_moe.py: workspace_shapes) and the sampled rows' logits in
    float32, three times. Experts that ep / tp generators share get the tokens of all of them (all2all.py, AgRsAll2AllManager),
    and hold those, and what they make of them, besides.
    """
    model = architecture_of(hf)
    hidden = model.hidden_size * dtype.itemsize
    chosen = 0 if model.experts is None else model.experts.chosen
    tokens, generators = max(config.max_batched_tokens, config.max_num_seqs), max(1, config.ep // config.tp)
    gathered = 2 * chosen + (2 if generators > 1 else 0)
    return tokens * (4 + generators * gathered) * hidden + config.max_num_seqs * model.vocab_size * 4 * 3


def kv_bytes_per_token(hf: Mapping[str, Any], dtype: torch.dtype, tp: int, dcp: int = 1) -> float:
    """On each rank: the latent of MLA, else keys and values of its heads; of every dcp-th token (vllm 0.32.0, v1/kv_cache_interface.py,
    MLA and full attention alike), for dcp ranks hold the same otherwise.
    """
    model = architecture_of(hf)
    attention = model.attention
    if isinstance(attention, LatentAttention):
        width = attention.kv_rank + attention.rope_size
    else:
        width = 2 * max(1, attention.groups // tp) * attention.head_size
    return model.num_layers * width * dtype.itemsize / dcp


def generator_memory_problems(config: Stage, hf: HFConfig, gpu: GPU, gpus: int) -> Iterator[str]:
    """Of the generator alone: whether weights and one sequence fit. Light: nothing is built."""
    rollout: Any = getattr(config, "rollout", None)
    if rollout is None or rollout.engine != "vllm":
        return
    dtype = getattr(torch, config.model.dtype)
    memory = generator_memory(hf, dtype, rollout, gpu.memory_bytes)
    budget = rollout.gpu_memory_utilization * gpu.memory_bytes
    if memory.weights > budget:
        fitting = (
            tp for tp in range(rollout.tp, gpus + 1)
            if gpus % tp == 0 and memory.weights * rollout.tp / tp < 0.8 * budget
            and not list(generator_problems(rollout.model_copy(update={"tp": tp, "ep": 1, "dcp": 1}), gpus, hf))
        )  # fmt: skip
        least = next(fitting, None)
        advice = f"raise it to at least {least}" if least else "take more GPUs"
        needed = memory.weights + memory.profile + OTHER_BYTES + _longest(config, hf) * memory.kv_bytes_per_token
        if (share := math.ceil(100 * needed / gpu.memory_bytes) / 100) <= MOST_UTILIZATION:
            advice = f"set rollout.gpu_memory_utilization to at least {share:g}"
        yield (
            f"rollout.tp = {rollout.tp}: the generator's weights are {memory.weights / 1e9:,.1f} GB a GPU, and "
            f"rollout.gpu_memory_utilization = {rollout.gpu_memory_utilization:g} of {gpu.name} is {budget / 1e9:.1f}; "
            f"{advice}"
        )
        return
    longest = _longest(config, hf)
    least = math.ceil(longest * memory.kv_bytes_per_token)
    if memory.kv_cache >= least:
        return
    advice = "raise rollout.gpu_memory_utilization or rollout.tp, or lower rollout.max_batched_tokens"
    if rollout.kv_cache_bytes is not None:
        advice = f"raise rollout.kv_cache_bytes to at least {least}, or leave it out"
    yield f"rollout: the KV cache holds {memory.kv_tokens:,} tokens and one response needs {longest:,}; {advice}"


def _longest(config: Stage, hf: HFConfig) -> int:
    """Tokens of one response with its prompt, in whole blocks of the cache (rollout/vllm_arguments.py, check_settings)."""
    rollout, data = getattr(config, "rollout", None), getattr(config, "data", None)
    longest = getattr(data, "max_prompt_tokens", 0) + getattr(rollout, "max_response_tokens", 0) + 1
    block = kv_block_tokens(hf) * getattr(rollout, "dcp", 1)
    return -(-longest // block) * block
