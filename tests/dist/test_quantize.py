"""Megatron's own parameters into an FP8 generator's, in several layouts."""

from __future__ import annotations

from tests.dist import quantize_worker
from tests.dist.launch import launch


def test_megatrons_shards_arrive_as_the_blocks_of_whole_tensors():
    """What was sent, what arrived and whole exported tensors, quantised, have one digest."""
    cases = [({"tp": 2}, 2, 2), ({"pp": 2}, 2, 1), ({"ep": 2}, 1, 1)]
    assert launch(quantize_worker.run, 2, cases) == [[[]] * len(cases)] * 2
