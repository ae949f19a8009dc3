"""Stop requests: the flag, its repetition, and the handlers afterwards."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
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


def code_of(*, handler, decide, hangs=False):
    """(exit code, what it said) of a process that is asked to stop once its request is closed. hangs: in a library."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.dup2(writing, 2)
            for number in (signal.SIGTERM, signal.SIGUSR2):
                signal.signal(number, handler)
            with StopRequest() as stop:
                decide(stop)
            if hangs:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
                mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
                libc.alarm(60)
                libc.pthread_mutex_lock(mutex)
                libc.pthread_mutex_lock(mutex)  # for ever, and no handler runs, as in a collective
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os._exit(99)
    os.close(writing)
    with open(reading) as said:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read()


def test_asked_to_stop_once_its_end_is_known_a_process_ends_as_it_would():
    def again(*_):
        os._exit(85)

    assert code_of(handler=again, decide=lambda stop: None) == (85, ""), "saved: it is to be started again"
    assert code_of(handler=again, decide=lambda stop: stop.decide(0)) == (0, "")
    for hangs in (False, True):
        assert code_of(handler=again, decide=lambda stop: stop.decide(9, "inf\n"), hangs=hangs) == (9, "inf\n")
    assert code_of(handler=signal.SIG_DFL, decide=lambda stop: stop.decide(0)) == (-signal.SIGTERM, "")


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
