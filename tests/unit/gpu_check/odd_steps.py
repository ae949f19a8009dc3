"""Steps that end in every way a step can end. Run in processes of their own by test_gpu_check.py."""

import atexit
import os
import signal
import subprocess
import sys
import time


def fine(context, findings):
    findings.figure("device", context.device)


def raises(_context, findings):
    findings.figure("measured before", 1.0)
    raise RuntimeError("the third layer is upside down")


def does_not_hold(_context, findings):
    findings.at_most("error", float("nan"), 1.0)


def short_of_goal(_context, findings):
    findings.goal("share", 0.5, 0.9)


def hangs(context, findings):
    """With a process in a session of its own that a request for its stack does not end, as a rank is."""
    waits = "import signal, time; signal.signal(signal.SIGUSR1, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", waits], start_new_session=True)
    (context.work / "child").write_text(str(child.pid))
    findings.figure("measured before", 7.0)
    time.sleep(600)


def crashes(_context, findings):
    findings.figure("measured before", 2.0)
    os.kill(os.getpid(), signal.SIGSEGV)


def crashes_at_its_end(_context, findings):
    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)


def leaves(_context, findings):
    os._exit(3)


def describes(_context, findings):
    findings.figures["abilities"] = {"wood": "", "stone": "no stone"}
