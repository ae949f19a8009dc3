"""Routed experts that vLLM returns by itself, as on a GPU: its scheduler's and worker's connectors, its capturer and store.

Stood in for is the second model runner, which needs Triton: what it does around a pass (vllm/v1/worker/gpu/model_runner.py
and async_utils.py) is done around one of the first runner's.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r1mega.errors import GenerationError
from r1mega.platform import groups, vllm_cpu, vllm_cuda
from r1mega.rollout import vllm_engine
from r1mega.rollout.routing import ReturnedRouting
from r1mega.rollout.vllm_engine import VllmEngine
from r1mega.types import GenerationRequest, SamplingSettings
from tests.unit.rollout.tiny_models import MODELS, prompt, reference_routing, settings

pytestmark = pytest.mark.heavy


class SecondRunner:
    """Around the passes of an engine's runner."""

    def __init__(self, engine: VllmEngine):
        from vllm.distributed.aux_output_connector.worker import get_aux_output_connector

        self._runner = runner = engine._worker.model_runner
        self._connector = get_aux_output_connector(runner.model, runner.vllm_config, runner.kv_cache_config)
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        runner.execute_model, runner.sample_tokens = self.execute_model, self.sample_tokens

    def execute_model(self, scheduled, *arguments, **options):
        self._connector.begin_step(scheduled.aux_output_connector_metadata)
        again = scheduled.scheduled_cached_reqs
        self._starts = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        self._starts |= dict(zip(again.req_ids, again.num_computed_tokens, strict=True))
        self._counts = scheduled.num_scheduled_tokens
        return self._execute(scheduled, *arguments, **options)

    def sample_tokens(self, grammar_output):
        names = [name for name in self._runner.input_batch.req_ids if self._counts.get(name)]
        batch = SimpleNamespace(
            req_ids=names, num_computed_tokens_np=np.array([self._starts[name] for name in names]),
            query_start_loc_np=np.cumsum([0, *(self._counts[name] for name in names)]),
        )  # fmt: skip
        pending = self._connector.prepare_output(batch)
        output = self._sample(grammar_output)
        sampled = [len(output.sampled_token_ids[output.req_id_to_index[name]]) for name in names]
        pending.enqueue_cpu_copy(np.array(sampled), np.zeros(len(names), np.int64))
        output.aux_output_connector_output = pending.process_output()
        return output


@pytest.fixture
def build(monkeypatch):
    """An engine of that model whose runner is the stand-in."""
    engines = []

    def make(name: str, **changes) -> VllmEngine:
        vllm_cpu.prepare_environment()
        from vllm.config import VllmConfig
        from vllm.distributed.aux_output_connector import worker

        group = SimpleNamespace(is_first_rank=False)  # what a later rank of tp finds
        monkeypatch.setattr(worker, "get_tp_group", lambda: group)

        def arguments():
            asked = vllm_cuda.return_routed_experts()
            monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
            return asked

        platform = vars(vllm_cpu) | {"RETURNS_ROUTED_EXPERTS": True, "return_routed_experts": arguments}
        monkeypatch.setattr(vllm_engine, "vllm_platform", lambda: SimpleNamespace(**platform))
        monkeypatch.setattr(VllmConfig, "_verify_aux_output_compatibility", lambda self: None)
        engines.append(VllmEngine(settings(name, return_routed_experts=True, **changes)))
        SecondRunner(engines[-1])
        return engines[-1]

    groups.init_distributed()
    torch.set_num_threads(1)
    yield make
    for engine in engines:
        engine.close()
    groups.destroy()


def test_what_vllm_returns_equals_transformers(build):
    """From the prefix cache, of prompts in several passes, after preemptions, of responses ended from outside, on a rank that is
    not the first; and again after the cache was dropped.
    """
    engine = build("deepseek", max_num_seqs=16, max_batched_tokens=16, max_model_len=72, kv_cache_bytes=3 << 20)
    ended = engine._stop_strings = SimpleNamespace(candidates=lambda _: frozenset(range(96)), matches=None)
    shared = prompt(30)  # 35 tokens: two blocks of the cache
    requests = [
        GenerationRequest((*shared, *prompt(i)[: 1 + i]), 2, i, SamplingSettings(max_tokens=24)) for i in range(4)
    ]
    for ended.matches in (lambda *_: False, lambda ids, _: len(ids) == 7):
        for request, responses in zip(requests, engine.generate(requests), strict=True):
            for response in responses:
                tokens = (*request.prompt_token_ids, *response.token_ids)
                assert response.routed_experts.dtype == np.uint8
                assert np.array_equal(np.sort(response.routed_experts), reference_routing("deepseek", tokens[:-1]))
    assert {len(response.token_ids) for responses in engine.generate(requests) for response in responses} == {7}


def test_rows_that_are_missing_are_told():
    config = MODELS["deepseek"]
    routing = ReturnedRouting(config)
    rows = np.zeros((3, config["num_hidden_layers"], 3), np.uint8)
    routing.add("a", rows)
    routing.add("a", None)
    with pytest.raises(GenerationError, match="of 3 positions of request a, not of 4"):
        routing.take("a", 4)
    routing.add("a", rows)
    routing.add("a", rows + 1)
    assert routing.take("a", 5).shape == (5, config["num_hidden_layers"] - 1, 3)
    given = np.arange(40 * config["num_hidden_layers"] * 3, dtype=np.uint16).reshape(40, -1, 3)
    for rows in (given[:3], given[3:4], given[4:]):
        step = rows.copy()
        routing.add("b", step[:])
        step[:] = 0  # the array of a step's tokens is another request's, or nobody's
        assert routing._rows["b"].array.base is None
    assert np.array_equal(found := routing.take("b", 39), given[:39, 1:]) and found.base is None
    with pytest.raises(GenerationError, match="no experts"):
        ReturnedRouting(MODELS["llama"])
