"""Steps that end in every way a step can end. Run in processes of their own by test_gpu_check.py."""

import os
import signal
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


def hangs(_context, findings):
    print("about to hang", flush=True)
    time.sleep(600)


def crashes(_context, findings):
    os.kill(os.getpid(), signal.SIGSEGV)


def describes(_context, findings):
    findings.figures["abilities"] = {"wood": "", "stone": "no stone"}
