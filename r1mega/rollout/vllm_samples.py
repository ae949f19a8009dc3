"""A sample in vLLM's engine core: what is asked of the core for it, and what the core's steps add to it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from r1mega.errors import GenerationError
from r1mega.rollout.kept import KeptLists, kept_ids, kept_width
from r1mega.rollout.open_groups import NEVER
from r1mega.rollout.stop_strings import StopStrings
from r1mega.types import Completion, GenerationRequest, Response, SamplingSettings

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest


@dataclass(slots=True)
class Sample:
    """A sample in flight. token_ids: with those that it goes on from; log_probs: of the others."""

    request_index: int
    sample_index: int
    sampling: SamplingSettings
    stop_candidates: frozenset[int]
    token_ids: list[int]
    log_probs: list[float] = field(default_factory=list)
    kept: KeptLists = field(default_factory=KeptLists)  # of the same tokens

    def completion(self, finish_reason: str, routed_experts: np.ndarray | None) -> Completion:
        new = tuple(self.token_ids[len(self.token_ids) - len(self.log_probs) :])
        kept = None if self.sampling.max_kept is None else self.kept.finished()
        response = Response(new, tuple(self.log_probs), finish_reason, routed_experts, kept=kept)
        return Completion(self.request_index, self.sample_index, response)

    def advance(self, output: Any, stop_strings: StopStrings, vocab_size: int) -> str | None:
        """Appends a step's tokens (vLLM's EngineCoreOutput); the finish reason if the sample is complete. GenerationError where vLLM
        ended it for another reason than a stop token or its length.
        """
        tokens = output.new_token_ids
        if output.new_logprobs is not None:
            log_probs = output.new_logprobs.logprobs[: len(tokens), 0].tolist()
        for place, (token, log_prob) in enumerate(zip(tokens, log_probs if tokens else (), strict=True)):
            self.token_ids.append(token)
            self.log_probs.append(log_prob)
            if self.sampling.max_kept is not None:
                likeliest = output.new_logprobs.logprob_token_ids[place, 1:], output.new_logprobs.logprobs[place, 1:]
                self.kept.add(kept_ids(*likeliest, self.sampling, vocab_size))
            may_stop = token in self.stop_candidates
            if may_stop and stop_strings.matches(self.token_ids, self.sampling.stop_strings):
                return "stop"
        if output.finish_reason is None:
            return None
        reason = str(output.finish_reason)
        if reason not in ("stop", "length"):
            raise GenerationError(
                f"vLLM ended request {self.request_index}, sample {self.sample_index} with "
                f"{reason!r} after {len(self.token_ids)} tokens"
            )
        return reason


def fewest_tokens(running: Mapping[str, Sample]) -> int:
    """New tokens of the sample with the fewest; NEVER without any."""
    return min((len(state.log_probs) for state in running.values()), default=NEVER)


def sampling_params(request: GenerationRequest, vocab_size: int) -> SamplingParams:
    """Those of each of its samples, without a seed."""
    from vllm import SamplingParams

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.most_kept or 0,
        min_p=sampling.min_p or 0.0,
        max_tokens=sampling.max_tokens - len(request.begun),
        stop_token_ids=list(sampling.stop_token_ids),
        logprobs=kept_width(sampling, vocab_size),
        detokenize=False,
    )


def core_request(identifier: str, prompt: list[int], params: SamplingParams) -> EngineCoreRequest:
    """One sample, or pass over a prompt, as the engine core takes it."""
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id=identifier,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=identifier,
    )
