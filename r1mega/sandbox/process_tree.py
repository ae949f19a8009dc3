"""What /proc says about a process and everything below it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> Iterator[tuple[Path, list[Path]]]:
    """(directory in /proc, directories of its threads) of the process and all its descendants that still run."""
    pending = [pid]
    while pending:
        directory = Path(f"/proc/{pending.pop()}")
        try:
            threads = list((directory / "task").iterdir())
            for thread in threads:
                pending += map(int, (thread / "children").read_text(encoding="ascii").split())
        except OSError:  # ended meanwhile
            continue
        yield directory, threads


def resident_bytes(pid: int) -> int:
    """Private memory of the tree, plus the largest share of shared memory in it (which others may be counting too)."""
    private = shared = 0
    for directory, _ in tree(pid):
        try:
            status = (directory / "status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        sizes = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))
        private += int(sizes.get("RssAnon", "0 kB").split()[0]) * 1024
        shared = max(shared, int(sizes.get("RssShmem", "0 kB").split()[0]) * 1024)
    return private + shared


def cpu_pressure_seconds() -> float:
    """Seconds since boot in which some ready thread of this host had no CPU (pressure stall information, Linux 4.20);
    0.0 in a kernel without it."""
    try:
        first = Path("/proc/pressure/cpu").read_text(encoding="ascii").splitlines()[0]
    except OSError:  # not configured, or switched off at boot
        return 0.0
    return int(first.rpartition("total=")[2]) / 1e6


def scheduling(pid: int) -> tuple[float, float]:
    """(CPU seconds of the tree, longest time that one of its threads was ready to run but had no CPU, in seconds)."""
    cpu_ticks, waited = 0, 0
    for directory, threads in tree(pid):
        try:
            # Fields 14 to 17: own time and that of reaped children; the name before them may hold spaces.
            fields = (directory / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            cpu_ticks += sum(map(int, fields[11:15]))
            for thread in threads:
                waited = max(waited, int((thread / "schedstat").read_text(encoding="ascii").split()[1]))
        except (OSError, IndexError):  # ended meanwhile, or a kernel without scheduling statistics
            continue
    return cpu_ticks / _TICKS_PER_SECOND, waited / 1e9
