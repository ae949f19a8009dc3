"""FP8 in a whole model: every packed length, padding that changes nothing, recomputed log-probs, bounds against float32."""

from __future__ import annotations

import pytest

from tests.dist.launch import launch
from tests.te import stand_in

RECIPES = ("tensorwise", "blockwise")


def one_rank():
    from tests.te import fp8_worker

    return fp8_worker.one_rank()


@pytest.fixture(scope="module")
def found():
    return launch(one_rank, 1, prepare=stand_in.install, timeout_seconds=500)[0]


def test_print(found):
    import pprint

    pprint.pprint(found, width=150)
    assert 0
