"""Stop requests: the flag, its repetition, and the handlers afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

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


HANGS = """
import ctypes, os, signal
from r1mega.platform.signals import StopRequest
with StopRequest() as stop:
    stop._agreed = {agreed}
    if (child := os.fork()) == 0:  # a fork's signals are its own
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7 if stop.requested else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    print("ready", flush=True)
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever, and no handler runs, as in a collective
"""


@pytest.mark.parametrize(("agreed", "needed"), [(False, 2), (True, 3)])
@pytest.mark.heavy
def test_sigterm_again_ends_a_process_that_hangs(agreed, needed):
    process = subprocess.Popen([sys.executable, "-c", HANGS.format(agreed=agreed)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        for number in range(needed):
            time.sleep(1.2 if number else 0.2)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
