"""A zero run in bfloat16 end to end: policy, vLLM and the proof between them, interrupted and gone on."""

from __future__ import annotations

import math
import signal

import pytest

from r1mega.checkpoint.hf import HFTensors
from tests.e2e.runs import metrics, r1mega, run_until_step, without_times, zero_arguments


@pytest.fixture(scope="module")
def arguments(nano_base):
    """Of a run as a large model wants it: hidden states, recomputed old log-probs, truncated importance sampling."""
    further = ("model.log_probs=hidden", "algorithm.old_log_probs=recompute", "algorithm.importance_cap=2.0")
    return lambda run_dir: zero_arguments(nano_base, run_dir, "model.dtype=bfloat16", *further)


@pytest.fixture(scope="module")
def whole_run(arguments, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("bfloat16") / "run"
    r1mega(*arguments(run_dir), real=True)
    return run_dir


def test_steps_are_finite_and_trainer_and_sampler_as_far_apart_as_rounding_leaves_them(whole_run):
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        for name in ("policy/loss", "policy/kl", "policy/grad_norm", "policy/entropy", "reward/mean"):
            assert math.isfinite(line[name]), name
        assert 1e-4 < line["logprob/diff_mean"] < 0.05, "float32 would give 1e-6, wrong weights 1 and more"
        assert line["logprob/outlier_fraction"] < 0.05
        assert 0 <= line["policy/importance_capped_fraction"] < 0.05
        assert line["weights/probe_outlier_fraction"] < 0.05
    assert lines[1]["policy/kl"] > 0, "the reference is another model after the first update"


def test_the_export_is_bfloat16_with_a_float32_router_bias(whole_run):
    for name, tensor in HFTensors(whole_run / "hf").items():
        assert str(tensor.dtype) == ("torch.float32" if name.endswith("correction_bias") else "torch.bfloat16"), name


def test_an_interrupted_run_equals_an_uninterrupted_one_bitwise(whole_run, arguments, tmp_path):
    """On a CPU; on a GPU sampling is not repeatable by default."""
    run_dir = tmp_path / "run"
    assert run_until_step(2, run_dir, signal.SIGTERM, *arguments(run_dir)) == 85
    r1mega(*arguments(run_dir))
    assert without_times(metrics(run_dir)) == without_times(metrics(whole_run))
    shard = "hf/model.safetensors"
    assert (run_dir / shard).read_bytes() == (whole_run / shard).read_bytes()
