"""The samples of a step reach the ranks that train on them, whole, once, at the lower bound of bytes."""

from __future__ import annotations

import pytest

from tests.dist import sample_policy_worker, samples_worker
from tests.dist.launch import launch

SEEDS = list(range(24))


@pytest.fixture(scope="module")
def measured():
    """Per rank: the results of the worker's functions; one set of processes runs all."""
    return launch(samples_worker.run_all, samples_worker.WORLD, SEEDS, timeout_seconds=120)


def test_samples_arrive_at_the_lower_bound(measured):
    bounds = []
    for number, seed in enumerate(SEEDS):
        assert [rank["exchanges"][number]["wrong"] for rank in measured] == [[]] * samples_worker.WORLD, seed
        bounds.append(samples_worker.lower_bound(samples_worker.draw(seed)))
        assert measured[0]["exchanges"][number]["sent"] == bounds[-1], seed
    assert sum(bound > 0 for bound in bounds) > len(SEEDS) // 2


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_response_of_the_samples_is_scored_once_a_generator(measured, tp):
    for first in range(0, samples_worker.WORLD, tp):
        ranks = [measured[rank]["scoring"][tp] for rank in range(first, first + tp)]
        scored = [texts for texts, _ in (rank["everywhere=False"] for rank in ranks)]
        assert sorted(text for texts in scored for text in texts) == list("abcdefg")
        assert max(map(len, scored)) - min(map(len, scored)) <= 1
        told = [[(float(first + place % tp), text) for place, text in enumerate("abcdefg")]] * tp
        assert [rewards for _, rewards in (rank["everywhere=False"] for rank in ranks)] == told
        assert [rank["everywhere=True"] for rank in ranks] == [
            (list("abcdefg"), [(float(first), text) for text in "abcdefg"])
        ] * tp
        assert [rank.get("error") for rank in ranks] == ["this one cannot be scored" if tp > 1 else None] * tp


def test_memory_of_the_samples_is_a_ranks_share():
    """Measured on 8 ranks, against what the planner says of as many."""
    for grown, estimate in launch(samples_worker.run_memory, samples_worker.WORLD, 8 * 24, 4000, 6):
        assert 0.75 * estimate < grown < 1.2 * estimate


LAYOUTS = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{layout: per-rank results}."""
    directory = tmp_path_factory.mktemp("classifier") / "hf"
    ranks = launch(sample_policy_worker.run_layouts, 2, list(LAYOUTS.values()), directory)
    return {name: [rank[place] for rank in ranks] for place, name in enumerate(LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_that_are_spread_train_as_those_that_all_ranks_have(trained, layout):
    """To the last bit, with the routed experts of a stage's own layers."""
    for rank in trained[layout]:
        assert rank["metrics"][True] == rank["metrics"][False]
        assert rank["sent"] > 0
        assert rank["scores"] == pytest.approx(rank["expected"], abs=1e-5)
    for name in ("scores", "expected"):
        assert trained[layout][0][name][4:] == trained[layout][1][name][:3]
