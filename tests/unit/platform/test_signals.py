"""Stop requests: the flag, its repetition, and the handlers afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from r1mega.platform.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_may_come_twice(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.agreed()
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.agreed()
        assert stop.agreed()
    assert signal.getsignal(number) == before


def test_no_signal_no_stop():
    with StopRequest() as stop:
        assert not stop.requested
        assert not stop.agreed()
