"""How a generator is built, and what every one checks of its requests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1mega.config.schema import Dtype, KVCacheDtype, Quantization
from r1mega.errors import GenerationError
from r1mega.types import Completion, GenerationRequest, Response


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to build a generator. model_path: an HF directory (config.json; weights only if `weights` is 'checkpoint').

    weights: 'empty' waits for `update_weights`, 'checkpoint' loads those of model_path.
    max_model_len: tokens of prompt and response together. max_batched_tokens: of one pass, at least max_num_seqs; longer
    prompts take several passes. tokenizer_path: needed for stop strings only.
    return_routed_experts: responses carry the experts that were chosen for their tokens (`Response.routed_experts`).
    ep: 1: each expert is cut by tp; a multiple of tp: whole experts are spread over so many ranks, which are ep / tp attention
    groups with requests of their own and pass the model together. dcp: ranks of an attention group that share its KV cache.
    quantization: 'fp8': linear layers hold e4m3 blocks with their scales. kv_cache_dtype: vLLM's name; 'auto': `dtype`.
    """

    model_path: Path
    max_model_len: int
    dtype: Dtype = "float32"
    max_num_seqs: int = 256
    max_batched_tokens: int = 8192
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.8
    tp: int = 1
    weights: Literal["empty", "checkpoint"] = "empty"
    tokenizer_path: Path | None = None
    bucket_bytes: int = 512 * 2**20
    return_routed_experts: bool = False
    ep: int = 1
    quantization: Quantization | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    dcp: int = 1


def read_config(settings: EngineSettings) -> dict[str, Any]:
    """The model's config.json. Raises GenerationError when it is missing or not JSON."""
    path = settings.model_path / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise GenerationError(f"{path}: no such file; the generator needs an HF directory") from None
    except json.JSONDecodeError as error:
        raise GenerationError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None


def sample_seed(seed: int, sample_index: int) -> int:
    """Seed of one sample of a request, in [0, 2^63): a function of the two numbers alone, so that a response depends
    neither on the batch it is in nor on the rank that draws it. Neighbouring seeds give unrelated streams (splitmix64
    of both), where seed + index would make sample 1 of seed 0 equal to sample 0 of seed 1.
    """
    state = (_mix(seed) + sample_index) % 2**64
    return _mix(state) >> 1


def continued_seed(request: GenerationRequest, sample_index: int) -> int:
    """Seed of one sample of a request, of those from its first one on: `sample_seed`; where it goes on from tokens of an earlier
    step, one that their number changes, so that the position in a stream of random numbers needs not be kept.
    """
    seed = sample_seed(request.seed, sample_index)
    return sample_seed(seed, len(request.begun)) if request.begun else seed


def _mix(value: int) -> int:
    z = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def in_order(requests: Sequence[GenerationRequest], completions: Iterable[Completion]) -> list[tuple[Response, ...]]:
    """The responses to each request, by sample, of a stream of all of them: what `generate` returns."""
    responses: list[dict[int, Response]] = [{} for _ in requests]
    for completion in completions:
        responses[completion.request_index][completion.sample_index] = completion.response
    return [
        tuple(samples[r.first_sample + i] for i in range(r.num_samples))
        for r, samples in zip(requests, responses, strict=True)
    ]


def check_requests(
    requests: Sequence[GenerationRequest], max_model_len: int, vocab_size: int, has_tokenizer: bool
) -> None:
    """Raises GenerationError for the first request that no engine could serve."""
    for index, request in enumerate(requests):
        sampling = request.sampling
        length = len(request.prompt_token_ids)
        where = f"request {index}"
        if length == 0:
            raise GenerationError(f"{where}: the prompt has no tokens")
        if length >= max_model_len:
            raise GenerationError(
                f"{where}: the prompt has {length} tokens, which leaves no room for a response in "
                f"max_model_len={max_model_len}"
            )
        if length + sampling.max_tokens > max_model_len:
            raise GenerationError(
                f"{where}: {length} prompt tokens and max_tokens={sampling.max_tokens} exceed "
                f"max_model_len={max_model_len}; raise the engine's max_model_len"
            )
        if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < vocab_size:
            raise GenerationError(f"{where}: a prompt token is outside the vocabulary of {vocab_size}")
        if request.num_samples < 1 or sampling.max_tokens < 1:
            raise GenerationError(
                f"{where}: num_samples={request.num_samples}, max_tokens={sampling.max_tokens}; both must be at least 1"
            )
        if request.begun and not (request.num_samples == 1 and len(request.begun) < sampling.max_tokens):
            raise GenerationError(
                f"{where}: goes on from {len(request.begun)} tokens with num_samples={request.num_samples}, "
                f"max_tokens={sampling.max_tokens}; it must be one sample, and have room for a token more"
            )
        if request.begun and not 0 <= min(request.begun) <= max(request.begun) < vocab_size:
            raise GenerationError(f"{where}: a token that it goes on from is outside the vocabulary of {vocab_size}")
        if not 0 < sampling.top_p <= 1 or not (sampling.temperature == 0 or sampling.temperature >= 0.01):
            raise GenerationError(
                f"{where}: temperature={sampling.temperature}, top_p={sampling.top_p}; temperature "
                f"must be 0 (greedy) or at least 0.01, top_p in (0, 1]"
            )
        bounds = [bound for bound in (sampling.top_k, sampling.max_kept) if bound is not None]
        if min(bounds, default=1) < 1 or not 0 <= (sampling.min_p or 0) < 1:
            raise GenerationError(
                f"{where}: top_k={sampling.top_k}, min_p={sampling.min_p}, max_kept={sampling.max_kept}; top_k and max_kept must be "
                f"at least 1 or None, min_p in [0, 1) or None"
            )
        if sampling.stop_strings and not has_tokenizer:
            raise GenerationError(
                f"{where}: stop strings {list(sampling.stop_strings)} need an engine that was built "
                f"with a tokenizer_path"
            )
