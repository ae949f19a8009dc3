"""vLLM's scheduler (0.32.0, vllm/v1/core/sched/scheduler.py) with a short way for steps in which every sample gets one token.

Reason: with 256 samples of a small model on a CPU its loop over the requests, which asks each for drafts, images, prefixes
and more, is a tenth of a rollout (docs/performance.md). Where none of that is there and nothing waits, what it finds is known:
one token for each, a new block of the KV cache for those that begin one. Everything else (prompts, waiting samples, a full
cache) goes vLLM's own way, by `super()`, and so do the answers; what comes out is the same in either way
(tests/unit/rollout/test_vllm_scheduler.py). vLLM takes it as `scheduler_cls`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from r1mega.errors import PlatformError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
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
            and not (self.defer_block_free or self.lora_config)
            and not self.scheduler_config.async_scheduling
            and self.num_sampled_tokens_per_step == 1
            and not self.needs_kv_cache_zeroing
            and self.dcp_world_size == 1
            and all(part is None for part in (self.connector, self.ec_connector, self.aux_output_connector))
        )

    def add_request(self, request: Request) -> None:
        """vLLM's; after a request of which its loop has more to ask all steps go vLLM's way."""
        self._is_plain &= not (request.use_structured_output or request.mm_features or request.resumable)
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
            if request.is_prefill_chunk or request.num_tokens != computed + 1:
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


@functools.cache
def scheduler_class() -> type:
    """vLLM's Scheduler with the short way."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return type("SteadyScheduler", (SteadyDecoding, Scheduler), {})
