"""The samples of a step reach the ranks that train on them, as far as they read them, once, at the lower bound of bytes."""

from __future__ import annotations

import itertools

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


def test_what_one_rank_has_wrong_is_refused_on_all(measured):
    (found,) = {tuple(rank["refusals"]) for rank in measured}
    assert "rank 5 chose expert -1 for a token" in found[0]
    assert [text.split(" have ")[0] for text in found[1:]] == [
        f"{fault}: the ranks 4, 5 of generator 2" for fault in ("token", "log-prob", "kept", "sample")
    ]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_response_of_the_samples_is_scored_once_a_generator(measured, tp):
    """By one rank, whatever the order in which a rank has them; two equal responses are two."""
    for first in range(0, samples_worker.WORLD, tp):
        ranks = [measured[rank]["scoring"][tp] for rank in range(first, first + tp)]
        scored = [texts for texts, _ in (rank["everywhere=False"] for rank in ranks)]
        assert sorted(text for texts in scored for text in texts) == list("aabcdefg")
        (told,) = {tuple(rewards) for _, rewards in (rank["everywhere=False"] for rank in ranks)}
        assert [text for _, text in told] == list("abcdefga")
        assert all(text in scored[int(rank) - first] for rank, text in told)
        assert [rank["everywhere=True"] for rank in ranks] == [
            (list("abcdefga"), [(float(first), text) for text in "abcdefga"])
        ] * tp


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_response_of_an_evaluation_is_graded_once_a_generator(measured, tp):
    """While others are still drawn, without a call for all at the end; every rank has all grades."""
    for first in range(0, samples_worker.WORLD, tp):
        graded = [measured[rank]["scoring"][tp]["evaluated"] for rank in range(first, first + tp)]
        assert sorted(text for texts, _ in graded for text in texts) == list("abcdefghijk")
        assert all(told == [(text, text) for text in "abcdefghijk"] for _, told in graded)


@pytest.mark.parametrize("tp", [2, 4])
def test_an_error_in_scoring_the_samples_is_one_of_all_ranks(measured, tp):
    """Of one rank alone where each scores everything, and another part wants all of them."""
    for everywhere in (False, True):
        for where in ("submit", "result"):
            found = {rank["scoring"][tp][f"{where}, everywhere={everywhere}"] for rank in measured}
            assert found == {f"RewardError: b cannot be scored, says {where}"}
    for case in ("unequal, everywhere=False", "unequal, everywhere=True", "order"):
        for rank, found in enumerate(measured):
            first = rank // tp * tp
            assert f"the ranks {first} to {first + tp - 1} of one generator" in found["scoring"][tp][case]


def test_memory_of_the_samples_is_a_ranks_share():
    """Measured on 8 ranks, against what the planner says of as many."""
    for grown, estimate in launch(samples_worker.run_memory, samples_worker.WORLD, 8 * 24, 4000, 6):
        assert 0.75 * estimate < grown < 1.2 * estimate


LAYOUTS = {
    "dp4": ({}, 1),
    "tp2, a generator of two": ({"tp": 2}, 2),
    "cp2 pp2, a generator of two": ({"cp": 2, "pp": 2}, 2),
    "vpp2": ({"pp": 2, "vpp": 2}, 1),
    "pp4": ({"pp": 4}, 1),
    "tp2 pp2, a generator of two": ({"tp": 2, "pp": 2}, 2),
}
"""Layout of four ranks, and ranks of a generator."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{layout: per-rank results}."""
    directory = tmp_path_factory.mktemp("classifier") / "hf"
    ranks = launch(sample_policy_worker.run_layouts, sample_policy_worker.WORLD, list(LAYOUTS.values()), directory)
    return {name: [rank[place] for rank in ranks] for place, name in enumerate(LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_that_are_spread_train_as_those_that_all_ranks_have(trained, layout):
    """To the last bit of metrics and weights after a step, with the routed experts of a stage's own layers."""
    for rank in trained[layout]:
        assert rank["metrics"][True] == rank["metrics"][False]
        assert rank["weights"][True] == rank["weights"][False] != rank["weights"][None]
        assert rank["scores"] == pytest.approx(rank["expected"], abs=1e-5)
    assert sum(rank["sent"] for rank in trained[layout]) > 0
    for name in ("scores", "expected"):
        for one, other in itertools.pairwise(trained[layout]):  # of the sequences that both have
            assert one[name][2:] == other[name][:3]
