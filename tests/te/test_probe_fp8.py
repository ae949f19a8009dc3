"""The proof of a transfer beside a policy that computes in FP8: its rounding stops no run, wrong weights do.

Pairs are vLLM in bfloat16 and a Megatron policy in FP8 over the stand-in. The weights are random, and enlarged where the faults
are; every judgement is made on several sets of sequences. How often a trained model's faults are found: docs/fp8.md.
"""

from __future__ import annotations

import pytest

from tests.dist.launch import launch

RECIPES = ("tensorwise", "blockwise")
SETS = 4
FAULTS = ("experts exchanged", "layer not loaded", "shard of tp 2 missing", "stale W_UV")


def judge() -> dict[str, dict[str, int]]:
    from tests.te import probe_worker  # imports megatron, which must find Transformer Engine

    return probe_worker.judge(RECIPES, SETS)


@pytest.fixture(scope="module")
def found():
    return launch(judge, 1, preload="tests.te.preload", timeout_seconds=600)[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_healthy_pair_is_never_stopped_though_fp8_parts_it(found, recipe):
    assert found[recipe]["healthy"] == 0


def test_both_recipes_quantise(found):
    assert found["blockwise"]["not as the other recipe"] == SETS


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(found, recipe, fault):
    assert found[recipe][fault] == SETS


def test_the_limit_of_bfloat16_holds_where_fp8_takes_no_part():
    """Decoded tokens against the same as a prompt: both are the generator's."""
    import torch

    from r1mega.weights.verify import PROBE_LIMITS, probe_limit

    limit = probe_limit(torch.bfloat16, fp8=True)
    assert limit.of_decoding().tolerance == PROBE_LIMITS[torch.bfloat16].tolerance < limit.tolerance
    assert probe_limit(torch.bfloat16, 5.0, fp8=True).of_decoding().tolerance == 5.0
