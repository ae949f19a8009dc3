"""Router replay where layers are recomputed: the backward pass takes the experts of the forward pass."""

from __future__ import annotations

import pytest

from r1mega.config.schema import Recompute
from tests.dist import replay_worker
from tests.dist.launch import launch

CASES: list[tuple[dict[str, int], Recompute, str]] = [
    ({"pp": 2}, "full", "given"),
    ({"pp": 2, "vpp": 2}, ("moe",), "given"),
    ({"pp": 2, "vpp": 2}, "full", "recorded"),
    ({"tp": 2}, "full", "recorded"),
    ({"tp": 2}, ("moe",), "free"),
]


@pytest.fixture(scope="module")
def updates():
    """By case, by rank: [without recomputation, with it]."""
    return list(zip(*launch(replay_worker.run, 2, CASES), strict=True))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: " ".join(map(str, CASES[case])))
def test_gradients_of_recomputed_routers_are_those_without(updates, case):
    """Also in a pipeline, where other microbatches begin before one's backward pass, and with one that only fills up."""
    for plain, again in updates[case]:
        assert again["log_probs"] == plain["log_probs"]
        assert again["runs"] == 2 * plain["runs"] > 0  # each router routed once more
        assert again["kinds"] == plain["kinds"]  # and the same as before
        assert again["difference"] <= 1e-6


def test_choices_make_a_difference(updates):
    given, recorded, free = (updates[case][1][0] for case in (0, 3, 4))
    assert len({str(one["log_probs"]) for one in (given, recorded, free)}) == 3
