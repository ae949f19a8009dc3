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
    ({}, "full", "late"),
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
        assert again["taken"] == again["again"] == plain["taken"] and not any(plain["again"])  # once more, the same
        assert any(again["taken"])
        assert again["difference"] <= 1e-6
        assert plain["held"] == [0, 0] and again["held"][0] == 0  # choices that no backward pass asks for


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: " ".join(map(str, CASES[case])))
def test_an_update_takes_what_it_is_asked_to(updates, case):
    """What was given, or what routers took before an optimizer step; free ones take something else after the same step."""
    for result in (one for pair in updates[case] for one in pair):
        assert any(result["asked"])
        assert (result["found"] == result["asked"]) == (CASES[case][2] != "free")
