"""Imports without collections of garbage."""

import gc

import pytest

from r1mega.loading import uncollected


@pytest.mark.parametrize("before", [True, False])
def test_nothing_is_collected_inside_and_afterwards_it_is_as_before(before):
    found = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(ImportError), uncollected():
            with uncollected():
                pass
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == before
    finally:
        (gc.enable if found else gc.disable)()
