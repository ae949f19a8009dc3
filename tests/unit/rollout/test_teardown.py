"""One engine after another in a process: what the first leaves behind, and a platform where that is not allowed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist

from r1mega.errors import FreshProcessNeeded, GenerationError
from r1mega.platform import groups, vllm_cpu
from r1mega.rollout.transformers_engine import TransformersEngine
from r1mega.rollout.vllm_engine import VllmEngine
from r1mega.weights import verify
from r1mega.weights.transfer import DigestTap, checkpoint_tensors
from tests.unit.rollout.tiny_models import checkpoint, prompt, sampled_requests, settings

pytestmark = pytest.mark.heavy

SEQUENCES = [prompt(20), prompt(30)]


@pytest.fixture(autouse=True)
def process_group():
    groups.init_distributed()
    torch.set_num_threads(1)
    yield
    groups.destroy()


def build(name: str, seed: int) -> VllmEngine:
    return VllmEngine(settings(name, seed, kv_cache_bytes=32 << 20, weights="empty"))


@pytest.mark.parametrize(("first", "second"), [("deepseek", "deepseek"), ("qwen3_tied", "deepseek")])
def test_build_push_probe_close_and_build_again(first, second):
    """Each pushed weights proven, the last with the first's answers; nothing of a closed engine is left but what the trainer
    had before."""
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.triton_utils import dispatcher

    said = {}
    for name, seed in ((first, 0), (second, 1), (first, 0)):
        engine = build(name, seed)
        tap = DigestTap(torch.float32, engine.config)
        engine.update_weights(tap(checkpoint_tensors(checkpoint(name, seed))))
        verify.compare_digests(tap.digest, engine.weights_digest())
        expected = TransformersEngine(settings(name, seed)).prompt_log_probs(SEQUENCES)
        verify.probe(engine, SEQUENCES, expected, verify.PROBE_LIMITS[torch.float32])
        answers = engine.generate(sampled_requests(2))
        assert said.setdefault((name, seed), answers) == answers
        model, runner = engine._worker.model_runner.model, engine._worker.model_runner
        held = [weakref.ref(thing) for thing in (model, runner, engine._worker, *model.parameters(), *runner.kv_caches)]
        del model, runner
        if (name, seed) == (second, 1):
            engine.sleep()  # what would undo it goes too
            gc.collect()
            gc.freeze()  # as the next engine does while this one is open
        engine.close()
        assert not [ref() for ref in held if ref() is not None]
        assert parallel_state._WORLD is None and not parallel_state.model_parallel_is_initialized() and not _ROPE_DICT
        total = torch.ones(1)
        dist.all_reduce(total)  # the trainer's default group
        assert total.item() == dist.get_world_size()
    originals = [original for original, _ in dispatcher._registry.values()]
    assert originals and not any(isinstance(original, dispatcher.KernelOverride) for original in originals)


def test_where_a_process_builds_one_engine_the_next_one_is_refused(monkeypatch):
    engine = build("qwen2", 0)
    monkeypatch.setattr(vllm_cpu, "SEVERAL_ENGINES_A_PROCESS", False)
    with pytest.raises(GenerationError, match="one engine a process") as raised:
        build("qwen2", 1)
    assert not isinstance(raised.value, FreshProcessNeeded), "one is open: to start anew would end it"
    engine.close()
    with pytest.raises(FreshProcessNeeded, match="in another process"):
        build("qwen2", 1)
