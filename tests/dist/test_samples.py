"""The samples of a step reach the ranks that train on them, whole, once, at the lower bound of bytes."""

from __future__ import annotations

import pytest

from tests.dist import samples_worker
from tests.dist.launch import launch

SEEDS = list(range(24))


@pytest.fixture(scope="module")
def measured():
    """Per rank: a result of each drawn case; one set of processes runs all."""
    return launch(samples_worker.run_exchanges, samples_worker.WORLD, SEEDS, timeout_seconds=120)


def test_samples_arrive_at_the_lower_bound(measured):
    bounds = []
    for number, seed in enumerate(SEEDS):
        assert [rank[number]["wrong"] for rank in measured] == [[]] * samples_worker.WORLD, seed
        bounds.append(samples_worker.lower_bound(samples_worker.draw(seed)))
        assert measured[0][number]["sent"] == bounds[-1], seed
    assert sum(bound > 0 for bound in bounds) > len(SEEDS) // 2
