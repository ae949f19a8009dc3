"""Runs code that nobody has read. See docs/sandbox.md for what is covered and what is not."""

from r1mega.sandbox.backend import Backend, LocalBackend
from r1mega.sandbox.launcher import Launcher
from r1mega.sandbox.policy import Limits, Policy
from r1mega.sandbox.probe import describe, ensure_safe, run_probe
from r1mega.sandbox.verdict import SandboxBreached, SandboxFailure, SandboxUnavailable, Verdict

__all__ = [
    "Backend",
    "Launcher",
    "Limits",
    "LocalBackend",
    "Policy",
    "SandboxBreached",
    "SandboxFailure",
    "SandboxUnavailable",
    "Verdict",
    "describe",
    "ensure_safe",
    "run_probe",
]
