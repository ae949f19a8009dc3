"""The short way of decoding steps against vLLM's own scheduler: the same requests and tokens, step by step."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from r1mega.platform import groups
from r1mega.platform.vllm_scheduler import SteadyDecoding
from r1mega.rollout.vllm_engine import VllmEngine
from tests.unit.rollout.tiny_models import settings

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def core():
    """vLLM's engine core of a tiny model, with blocks of 16 tokens: its configs are those that schedulers are made with."""
    groups.init_distributed()
    torch.set_num_threads(1)
    engine = VllmEngine(settings("deepseek", weights="empty", kv_cache_bytes=1 << 24))
    yield engine._core.engine_core
    engine.close()


def scheduler_of(core, kind, num_blocks, is_caching):
    """One of its own for so many blocks of the KV cache; is_caching: of prefixes, as models without latent attention have it."""
    known = core.scheduler
    vllm_config = copy.copy(known.vllm_config)
    vllm_config.cache_config = copy.copy(known.cache_config)
    vllm_config.cache_config.enable_prefix_caching = is_caching
    return kind(
        vllm_config=vllm_config,
        kv_cache_config=replace(known.kv_cache_config, num_blocks=num_blocks),
        structured_output_manager=core.structured_output_manager,
        block_size=known.block_size,
        hash_block_size=known.hash_block_size,
    )


def drive(scheduler, seed):
    """Every step's plan and answers while prompts of all lengths come, are sampled, end by token or length, or are given up."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
    from vllm.v1.request import Request, RequestStatus

    rng, seen, made, hasher = random.Random(seed), [], 0, None
    if scheduler.cache_config.enable_prefix_caching:
        init_none_hash(sha256)
        hasher = get_request_block_hasher(scheduler.hash_block_size, sha256)
    for turn in range(3000):
        if made < 14 and rng.random() < 0.2:
            prompt = [rng.randrange(2, 90) for _ in range(rng.choice((3, 20, 60)))]
            params = SamplingParams(max_tokens=rng.randrange(1, 60), stop_token_ids=[1], logprobs=0, detokenize=False)
            for _ in range(rng.randrange(1, 4)):
                made += 1
                scheduler.add_request(
                    Request(str(made), prompt, params, None, arrival_time=float(made), block_hasher=hasher)
                )
        if not scheduler.has_requests():
            if made >= 14:
                break
            continue
        if scheduler.running and rng.random() < 0.01:
            scheduler.finish_requests(rng.choice(scheduler.running).request_id, RequestStatus.FINISHED_ABORTED)
        plan = scheduler.schedule(throttle_prefills=rng.random() < 0.2)
        cached = plan.scheduled_cached_reqs
        names = list(plan.num_scheduled_tokens)
        unfinished = {name for name in names if scheduler.requests[name].is_prefill_chunk}
        tokens = {
            name: [] if name in unfinished else [1 if rng.random() < 0.01 else rng.randrange(2, 90)] for name in names
        }
        scores = LogprobsLists(*(np.full((len(names), 1), turn, dtype=np.float32),) * 2, np.zeros(len(names)))
        answer = scheduler.update_from_output(
            plan,
            ModelRunnerOutput(
                req_ids=names, req_id_to_index={name: row for row, name in enumerate(names)},
                sampled_token_ids=[tokens[name] for name in names], logprobs=scores, prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )  # fmt: skip
        seen.append(
            (
                plan.num_scheduled_tokens, plan.total_num_scheduled_tokens, plan.finished_req_ids,
                [(new.req_id, new.block_ids, new.num_computed_tokens) for new in plan.scheduled_new_reqs],
                cached.req_ids, cached.resumed_req_ids, cached.all_token_ids, cached.new_block_ids,
                cached.num_computed_tokens, cached.num_output_tokens,
                [
                    (out.request_id, out.new_token_ids, str(out.finish_reason), out.stop_reason, out.new_logprobs.logprobs.tolist())
                    for outputs in answer.values() for out in outputs.outputs
                ],
                scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
                [(r.request_id, r.num_computed_tokens, r.num_in_flight_tokens, len(r.block_hashes)) for r in scheduler.running],
            )
        )  # fmt: skip
    assert made >= 14 and not scheduler.has_unfinished_requests()
    return seen


@pytest.mark.parametrize("seed", random.Random().sample(range(10**6), 2))
def test_steps_are_those_of_vllms_scheduler(core, seed, monkeypatch):
    """Also with a cache that runs full, so that samples are put back and begin again, and with one that keeps prefixes."""
    from vllm.v1.core.sched.scheduler import Scheduler

    ways = []
    new_blocks = SteadyDecoding._new_blocks

    def counted(self):
        blocks = new_blocks(self)
        ways.append(blocks is not None)
        return blocks

    monkeypatch.setattr(SteadyDecoding, "_new_blocks", counted)
    kind = type(core.scheduler)
    assert issubclass(kind, SteadyDecoding)
    for size in itertools.product((12, 200), (False, True)):
        expected = drive(scheduler_of(core, Scheduler, *size), seed)
        assert drive(scheduler_of(core, kind, *size), seed) == expected, f"seed {seed}, {size}"
    assert 0.3 < sum(ways) / len(ways) < 1, "both ways are taken"
