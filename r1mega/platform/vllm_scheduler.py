"""vLLM's scheduler (0.32.0, vllm/v1/core/sched/scheduler.py) with a short way for steps in which every sample gets one token.

Reason: with 256 samples of a small model on a CPU its two loops over the requests, which ask each for drafts, images, prefixes
and more, make a rollout up to a quarter slower (docs/performance.md). Where none of that is there and nothing waits, what they
find is known: one token for each, a new block of the KV cache for those that begin one. Everything else (prompts, waiting
samples, a full cache, samples that end) goes vLLM's own way, by `super()`; what comes out is the same in either way
(tests/unit/rollout/test_vllm_scheduler.py). vLLM takes it as `scheduler_cls`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from typing import TYPE_CHECKING

from r1mega.errors import PlatformError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
else:
    Scheduler = object


class SteadyDecoding(Scheduler):
    """A base before vLLM's Scheduler; see `scheduler_class`."""

    running: list[Request]

    def __init__(self, *positional, **named):
        super().__init__(*positional, **named)
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._block_tokens = managers[0].block_size if len(managers) == 1 else 0
        self._is_plain = (
            len(managers) == 1
            and isinstance(managers[0].kv_cache_spec, FullAttentionSpec)
            and managers[0].kv_cache_spec.sliding_window is None
            and self._block_tokens == self.hash_block_size
            and not (self.num_spec_tokens or self.num_lookahead_tokens or self.use_pp or self.use_v2_model_runner)
            and not (self.log_stats or self.defer_block_free or self.return_sampling_mask or self.lora_config)
            and not self.scheduler_config.async_scheduling
            and self.num_sampled_tokens_per_step == 1
            and not self.needs_kv_cache_zeroing
            and self.dcp_world_size == 1
            and all(part is None for part in (self.connector, self.ec_connector, self.aux_output_connector))
        )

    def add_request(self, request: Request) -> None:
        """vLLM's; after a request with more than a prompt and seeds all steps go vLLM's way."""
        params = request.sampling_params
        self._is_plain = (
            self._is_plain
            and params is not None
            and params.repetition_detection is None
            and not (request.use_structured_output or request.mm_features or request.resumable)
            and request.trace_headers is None
        )
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's, which finds nothing to run on the short way; what runs is entered into what it says."""
        blocks = self._new_blocks()
        if blocks is None:
            return super().schedule(throttle_prefills)
        running, self.running = self.running, []
        known = set(self.prev_step_scheduled_req_ids)
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self.running = running
        cached = output.scheduled_cached_reqs
        cached.new_block_ids = blocks
        for request in running:
            name = request.request_id
            output.num_scheduled_tokens[name] = 1
            cached.req_ids.append(name)
            cached.num_computed_tokens.append(request.num_computed_tokens)
            cached.num_output_tokens.append(request.num_output_tokens)
            if name not in known:
                cached.all_token_ids[name] = request.all_token_ids.copy()
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
        output.total_num_scheduled_tokens = len(running)
        self.prev_step_scheduled_req_ids.update(output.num_scheduled_tokens)
        return output

    def _new_blocks(self) -> list[tuple[list[int], ...] | None] | None:
        """New blocks of each running request for its next token; None: not this way. Blocks are taken only where all can be."""
        running, size = self.running, self._block_tokens
        limit = min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)
        if not self._is_plain or not 0 < len(running) <= limit or self.get_request_counts()[1] or self._pause_state:
            return None
        edges = num_begun = 0
        for request in running:
            computed = request.num_computed_tokens
            if request.is_prefill_chunk or request.num_tokens != computed + 1 or request.num_stale_output_tokens:
                return None
            edges += (computed + 1) % size < 2
            num_begun += computed % size == 0
        if not edges:
            return [None] * len(running)
        if num_begun > self.kv_cache_manager.block_pool.get_num_free_blocks():
            return None
        blocks: list[tuple[list[int], ...] | None] = []
        for request in running:
            taken = None
            if (request.num_computed_tokens + 1) % size < 2:  # begins a block, or fills one, which is remembered then
                slots = self.kv_cache_manager.allocate_slots(request, 1)
                if slots is None:
                    raise PlatformError("vLLM has no block of the KV cache for a token, and said that it had")
                taken = slots.get_block_ids(allow_none=True)
            blocks.append(taken)
        return blocks

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's, for the samples that end or have more than a token of it; the others get theirs here."""
        ran = model_runner_output
        if not self._is_plain or ran.pooler_output or ran.num_nans_in_logits or ran.prompt_logprobs_dict:
            return super().update_from_output(scheduler_output, model_runner_output)
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

        rest: dict[str, int] = {}
        outputs: dict[int, list[EngineCoreOutput]] = defaultdict(list)
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self.requests.get(name)
            row = ran.req_id_to_index[name]
            tokens = ran.sampled_token_ids[row] if ran.sampled_token_ids else []
            if request is None or count != 1 or len(tokens) != 1 or self._ends_or_is_new(request, tokens[0]):
                rest[name] = count
                continue
            request.num_in_flight_tokens -= 1
            request._output_token_ids.append(tokens[0])
            request._all_token_ids.append(tokens[0])
            if request.num_tokens % self._block_tokens == 0:
                request.update_block_hashes()
            scores = None
            if request.sampling_params.num_logprobs is not None and ran.logprobs:
                scores = ran.logprobs.slice_request(row, 1)
            outputs[request.client_index].append(EngineCoreOutput(name, tokens, scores))
        remaining = dataclasses.replace(scheduler_output, num_scheduled_tokens=rest)
        answered = super().update_from_output(remaining, model_runner_output)
        for client, own in outputs.items():
            if client in answered:
                answered[client].outputs[:0] = own
            else:
                answered[client] = EngineCoreOutputs(outputs=own)
        return answered

    def _ends_or_is_new(self, request: Request, token: int) -> bool:
        """Whether vLLM has more to do with this token than to add it."""
        params = request.sampling_params
        return (
            token == params.eos_token_id
            or token in (params.stop_token_ids or ())
            or request.num_tokens + 1 >= self.max_model_len
            or request.num_output_tokens + 1 >= request.max_tokens
            or request.prefill_stats is not None
            or request.is_finished()
            or request.num_stale_output_tokens > 0
        )


@functools.cache
def scheduler_class() -> type:
    """vLLM's Scheduler with the short way. Raises PlatformError for a vLLM whose scheduler is another."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    wanted = ("schedule", "update_from_output", "add_request", "get_request_counts")
    missing = [name for name in wanted if not callable(getattr(Scheduler, name, None))]
    missing += [name for name in ("append_output_token_ids", "update_block_hashes") if not hasattr(Request, name)]
    if missing:
        raise PlatformError(f"vllm Scheduler and Request have no {', '.join(missing)}: unknown vLLM build")
    return type("SteadyScheduler", (SteadyDecoding, Scheduler), {})
