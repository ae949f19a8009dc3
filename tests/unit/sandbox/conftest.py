"""The sandbox under test, and a host with things on it that no answer may reach."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from r1mega.reward.code import CodeReward
from r1mega.sandbox import Launcher, Limits, LocalBackend

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


def pytest_collection_modifyitems(items):
    missing = [tool for tool in ("bwrap", "setpriv", "prlimit") if shutil.which(tool) is None]
    for item in items:
        if missing and "launcher" in getattr(item, "fixturenames", ()):
            item.add_marker(
                pytest.mark.skip(reason=f"{', '.join(missing)} missing: apt-get install -y bubblewrap util-linux")
            )


@pytest.fixture(scope="session")
def launcher() -> Launcher:
    return Launcher()


@pytest.fixture(scope="session")
def code_reward(launcher) -> CodeReward:
    limits = Limits(wall_seconds=60.0, memory_bytes=128 << 20)
    return CodeReward(LocalBackend(launcher, probe=False), limits)


def own_children() -> set[tuple[str, str]]:
    """(process id, start time) of every child of this process, zombies included.

    Only those that were not there before belong to a test: multiprocessing's resource tracker and the like outlive the
    test that started them.
    """
    found = set()
    try:
        for task in Path("/proc/self/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # reaped meanwhile
                    found.add((child, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[19]))
    except (FileNotFoundError, ProcessLookupError):  # a thread ended: its children are another thread's now
        return own_children()
    return found


@dataclass
class Host:
    """Bait on the host, and the questions whether anything happened to it."""

    mark: str
    file: Path
    port: socket.socket
    abstract: socket.socket
    gold: str
    core_pattern: str = field(default_factory=CORE_PATTERN.read_text)
    children: set[tuple[str, str]] = field(default_factory=own_children)

    def marked_files(self) -> list[str]:
        places = ("/", "/tmp", "/dev/shm", "/dev", "/var/tmp", "/usr/bin", "/run", "/box", os.getcwd())
        return [f"{place}/{self.mark}" for place in places if os.path.lexists(f"{place}/{self.mark}")]

    def marked_processes(self) -> list[str]:
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    if Path(f"/proc/{entry}/comm").read_text().strip() == self.mark:
                        found.append(entry)
                except OSError:
                    continue
        return found

    def assert_untouched(self) -> None:
        assert self.file.read_text() == self.gold
        assert CORE_PATTERN.read_text() == self.core_pattern
        assert self.marked_files() == []
        assert self.marked_processes() == []
        assert own_children() <= self.children, "a sandbox was not reaped"
        for listener in (self.port, self.abstract):
            with pytest.raises(BlockingIOError):
                listener.accept()


@pytest.fixture
def host(tmp_path_factory, monkeypatch):
    mark, gold = "sbx" + secrets.token_hex(5), "GOLD" + secrets.token_hex(16)
    file = Path("/tmp") / f"secret-{mark}"
    file.write_text(gold)
    file.chmod(0o666)
    monkeypatch.setenv("HOST_SECRET", gold)
    port, abstract = socket.socket(), socket.socket(socket.AF_UNIX)
    port.bind(("127.0.0.1", 0))
    abstract.bind("\0" + mark)
    for listener in (port, abstract):
        listener.listen()
        listener.setblocking(False)
    yield Host(mark, file, port, abstract, gold)
    port.close()
    abstract.close()
    file.unlink()
