"""Optimizer steps of the policy in every layout: log-probs, loss, gradients, their norm, weights, the next step.

GRPO steps (packed, with KL and the update of the routers' bias) against transformers and AdamW; steps with labels
(multi-token prediction, auxiliary loss), which transformers does not have, against one process.
"""

from __future__ import annotations

import pytest

from tests.dist.launch import RankError, launch
from tests.dist.policy_cases import CASES, large, write_expectations
from tests.dist.policy_worker import run_cases


@pytest.fixture(scope="module")
def expectations(tmp_path_factory):
    """A directory with what every case must reproduce."""
    directory = tmp_path_factory.mktemp("expected")
    write_expectations(directory, [case for cases in CASES.values() for case in cases])
    return directory


@pytest.fixture(scope="module")
def measured(expectations):
    """ranks -> per-rank results; one set of processes runs all layouts of as many ranks."""
    done = {}

    def get(ranks: int) -> list[dict]:
        if ranks not in done:
            try:
                done[ranks] = launch(run_cases, ranks, expectations, CASES[ranks], timeout_seconds=600)
            except RankError as error:  # once a set, not once a layout
                done[ranks] = error
        if isinstance(done[ranks], RankError):
            raise done[ranks]
        return done[ranks]

    return get


@pytest.mark.parametrize(
    ("ranks", "case"),
    [pytest.param(ranks, case, id=f"{ranks}-{case.name}") for ranks in CASES for case in CASES[ranks]],
)
def test_steps_equal_those_of_one_process(expectations, measured, ranks, case):
    for rank, results in enumerate(measured(ranks)):
        result = results[case.name]
        assert not large(expectations, case, result), (rank, result)
