"""Corrections and loss variants are the same whatever cuts a response or packs it: ranks of one sequence, stages, replicas."""

from __future__ import annotations

import math

import pytest

from tests.dist.launch import launch
from tests.dist.loss_worker import VARIANTS, run_variants

LAYOUTS = {"cp2": {"cp": 2}, "pp2": {"pp": 2}, "dp2": {}}
CORRECTS = {name for name, keys in VARIANTS.items() if keys.keys() & {"importance_cap", "off_policy"}}
EFFECTIVE = "policy/effective_sample_fraction"


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
        assert absent == {"expert/load_max_over_mean"} | (set() if name in CORRECTS else {EFFECTIVE})
        assert (metrics["policy/masked_fraction"] > 0) == ("off_policy" in VARIANTS[name])
        assert (metrics["policy/rejected_fraction"] > 0) == (name == "reject")
        assert metrics["policy/masked_fraction"] < 0.8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_equal_those_of_one_process(alone, together, layout, name):
    for rank in together[layout]:
        for metrics, expected in zip(rank[name], alone[name], strict=True):
            for key in expected.keys() - {"packing/fill_fraction"}:
                if expected[key] is None:
                    assert metrics[key] is None, key
                else:
                    assert metrics[key] == pytest.approx(expected[key], rel=2e-4, abs=2e-6), key
