"""Weights and optimizer state that are put aside and come back: the reference, checkpoints whole, torn and of others."""

import pytest
import torch

from r1mega import platform
from r1mega.config.schema import ParallelConfig
from r1mega.config.stages.rl import AlgorithmConfig
from r1mega.platform import groups
from r1mega.train.packing import build_microbatch
from tests.unit.train.tiny_policy import (
    HF,
    PRECISION_AWARE,
    make_samples,
    make_trainer,
    run_update,
)

pytestmark = pytest.mark.heavy

platform.prepare()


DTYPES = [("float32", "logits"), ("bfloat16", "logits"), ("bfloat16", "hidden"), ("bfloat16", "reference")]


@pytest.mark.parametrize(("dtype", "log_probs"), DTYPES)
def test_reference_weights_are_swapped_in_and_out(one_rank, dtype, log_probs):
    trainer, samples = make_trainer(log_probs, dtype), make_samples()
    policy = trainer.policy
    batch = build_microbatch([s.token_ids.tolist() for s in samples], [s.prompt_length for s in samples], range(4))
    policy.take_reference()
    before = policy.log_probs([batch])[0]
    run_update(trainer, samples, [[0, 1, 2, 3]], AlgorithmConfig())
    after = policy.log_probs([batch])[0]
    assert not torch.equal(before, after)
    with policy.as_reference():
        assert torch.equal(policy.log_probs([batch])[0], before)
    assert torch.equal(policy.log_probs([batch])[0], after)


@pytest.mark.parametrize(
    ("dtype", "log_probs", "more"),
    [
        *((*pair, {}) for pair in DTYPES),
        *(("bfloat16", "logits", more) for more in ({"cpu_offload": True}, PRECISION_AWARE)),
    ],
)
def test_checkpoint_continues_bitwise(one_rank, tmp_path, dtype, log_probs, more):
    from r1mega.checkpoint.store import CheckpointStore, deciding_keys

    samples, packs, algorithm = make_samples(), [[0, 1], [2, 3]], AlgorithmConfig()
    trainer = make_trainer(log_probs, dtype, warmup_steps=3, **more)
    policy = trainer.policy
    policy.take_reference()
    run_update(trainer, samples, packs, algorithm)
    store = CheckpointStore(tmp_path, keep=2, architecture=deciding_keys(HF))
    path = store.save(1, trainer.sharded_state(is_loading=False), {"cursor": {"num_drawn": 4}})
    results = [run_update(trainer, samples, packs, algorithm) for _ in range(2)]
    weights = {name: value.clone() for name, value in policy.hf_tensors()}
    with policy.as_reference():
        reference = {name: value.clone() for name, value in policy.hf_tensors()}

    groups.destroy()
    groups.init_parallel(ParallelConfig(), seed=5)
    again = make_trainer(log_probs, dtype, warmup_steps=3, **more)
    again.policy.take_reference()
    assert store.latest() == path
    state, progress = store.load(path, again.sharded_state(is_loading=True))
    again.load_sharded_state(state)
    assert progress == {"step": 1, "cursor": {"num_drawn": 4}}
    for expected in results:
        result = run_update(again, samples, packs, algorithm)
        assert (result.grad_norm, result.lr) == (expected.grad_norm, expected.lr)
        assert [v for v, _ in result.statistics] == [v for v, _ in expected.statistics]
    assert all(torch.equal(value, weights[name]) for name, value in again.policy.hf_tensors())
    with again.policy.as_reference():
        assert all(torch.equal(value, reference[name]) for name, value in again.policy.hf_tensors())


def test_torn_and_foreign_checkpoints_are_refused(one_rank, tmp_path, caplog):
    from r1mega.checkpoint.store import CheckpointStore, deciding_keys
    from r1mega.errors import CheckpointError

    trainer = make_trainer()
    run_update(trainer, make_samples(), [[0, 1, 2, 3]], AlgorithmConfig())
    store = CheckpointStore(tmp_path, keep=2, architecture=deciding_keys(HF))
    first = store.save(1, trainer.sharded_state(is_loading=False), {})
    second = store.save(2, trainer.sharded_state(is_loading=False), {})
    victim = max(second.rglob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    victim.write_bytes(bytes(content))
    assert store.latest() == first
    assert victim.name in caplog.text
    assert "xxh3_128" in caplog.text
    store.save(3, trainer.sharded_state(is_loading=False), {})
    store.save(4, trainer.sharded_state(is_loading=False), {})
    left = sorted(p.name for p in store.directory.iterdir())
    assert left == ["step_000002.damaged", "step_000003", "step_000004"], "only `keep` are kept"
    other = CheckpointStore(tmp_path, keep=2, architecture=deciding_keys(HF | {"hidden_size": 64}))
    with pytest.raises(CheckpointError, match="hidden_size 48 there, 64 here"):
        other.load(store.latest(), trainer.sharded_state(is_loading=True))
