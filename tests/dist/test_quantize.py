"""Megatron's own parameters into an FP8 generator's, in several layouts."""

from __future__ import annotations

import json

from tests.dist import quantize_worker
from tests.dist.launch import launch


def test_megatrons_shards_arrive_as_the_blocks_of_whole_tensors():
    """What was sent, what arrived and whole exported tensors, quantised, have one digest."""
    cases = [({"tp": 2}, 2, 2), ({"pp": 2}, 2, 1), ({"ep": 2}, 1, 1)]
    assert launch(quantize_worker.run, 2, cases) == [[[]] * len(cases)] * 2


def test_a_push_over_two_ranks_equals_vllms_own_loading_of_the_exported_checkpoint(tmp_path):
    """Parameters and scales bit for bit, digests: experts cut, and whole ones spread over both ranks."""
    (tmp_path / "config.json").write_text(json.dumps(quantize_worker.OF_VLLM))
    cases = [({"tp": 2}, 1), ({"pp": 2}, 2)]
    found = launch(quantize_worker.run_in_vllm, 2, tmp_path, cases, preload="tests.dist.preload_vllm")
    assert found == [[[]] * len(cases)] * 2
