"""Corrections and loss variants are the same whatever cuts a response or packs it: ranks of one sequence, stages, replicas."""

from __future__ import annotations

import math

import pytest

from tests.dist.launch import launch
from tests.dist.loss_worker import KEPT, VARIANTS, run_variants

LAYOUTS = {"cp2": {"cp": 2}, "pp2": {"pp": 2}, "dp2": {}, "tp2": {"tp": 2}}
CORRECTS = {name for name, keys in VARIANTS.items() if keys.keys() & {"importance_cap", "off_policy"}}
EFFECTIVE, KEPT_IDS = "policy/effective_sample_fraction", "logprob/kept_ids"


@pytest.fixture(scope="module")
def alone():
    return launch(run_variants, 1, [{}])[0][0]


@pytest.fixture(scope="module")
def together():
    """{layout: per-rank results}."""
    ranks = launch(run_variants, 2, list(LAYOUTS.values()))
    return {name: [rank[place] for rank in ranks] for place, name in enumerate(LAYOUTS)}


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_taken_and_differ(alone, name):
    unlike = "grpo_recompute" if "old_log_probs" in VARIANTS[name] else "grpo"
    for metrics, plain in zip(alone[name], alone[unlike], strict=True):
        for key in ("policy/loss", "policy/kl", "policy/grad_norm"):
            assert math.isfinite(metrics[key]), key
        if name != unlike:
            assert abs(metrics["policy/loss"] - plain["policy/loss"]) > 1e-4
        absent = {key for key, value in metrics.items() if value is None}
        assert absent == {"expert/load_max_over_mean", KEPT_IDS} | (set() if name in CORRECTS else {EFFECTIVE})
        assert (metrics["policy/masked_fraction"] > 0) == ("off_policy" in VARIANTS[name])
        assert (metrics["policy/rejected_fraction"] > 0) == (name == "reject")
        assert metrics["policy/masked_fraction"] < 0.8


def test_kept_ids_count_and_one_pass_finds_what_two_do(alone):
    for name in KEPT:
        for metrics, whole in zip(alone[name], alone["tis"], strict=True):
            assert 3 < metrics[KEPT_IDS] < 7
            assert metrics["policy/entropy"] < whole["policy/entropy"] - 1
    for metrics, other in zip(alone["kept"], alone["kept_hidden"], strict=True):
        for key in ("policy/loss", "policy/grad_norm", "policy/entropy", "logprob/diff_mean", "policy/kl"):
            assert metrics[key] == pytest.approx(other[key], rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize(
    ("name", "layout"), [(n, x) for n in [*VARIANTS, *sorted(KEPT)] for x in LAYOUTS if n in KEPT or x != "tp2"]
)
def test_steps_equal_those_of_one_process(alone, together, layout, name):
    for rank in together[layout]:
        for metrics, expected in zip(rank[name], alone[name], strict=True):
            for key in expected.keys() - {"packing/fill_fraction"}:
                if expected[key] is None:
                    assert metrics[key] is None, key
                else:
                    assert metrics[key] == pytest.approx(expected[key], rel=2e-4, abs=2e-6), key
