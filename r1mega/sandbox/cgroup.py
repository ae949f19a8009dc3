"""Memory (and process count) cgroups, v1 and v2, kept in a small pool: one group holds one sandbox at a time."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import threading
import time
from dataclasses import dataclass

_PREFIX = "r1mega-sandbox-"
_MOUNTS = "/proc/self/mountinfo"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups can be made. version: 1 or 2; memory, pids: parent directories (v2: the same one; pids None: no
    limit)."""

    version: int
    memory: str
    pids: str | None


@dataclass(frozen=True, slots=True)
class Group:
    """One reusable cgroup. `paths` are the directories that a process joins."""

    hierarchy: Hierarchy
    name: str

    @property
    def memory(self) -> str:
        return os.path.join(self.hierarchy.memory, self.name)

    @property
    def paths(self) -> tuple[str, ...]:
        if self.hierarchy.version == 2 or self.hierarchy.pids is None:
            return (self.memory,)
        return (self.memory, os.path.join(self.hierarchy.pids, self.name))

    def prepare(self, memory_bytes: int, num_processes: int) -> int:
        """Create if need be, set the limits; returns the count of kills so far, to compare with afterwards. Raises
        OSError."""
        if self.hierarchy.version == 2:
            with contextlib.suppress(OSError):  # a new directory starts with a peak of 0, which v2 cannot reset
                os.rmdir(self.memory)
        for path in self.paths:
            os.makedirs(path, exist_ok=True)
        if self.hierarchy.version == 1:
            # The pair must never cross: memory + swap >= memory at every moment.
            with contextlib.suppress(OSError):  # no swap accounting in this kernel
                _write(self.memory, "memory.memsw.limit_in_bytes", -1)
            _write(self.memory, "memory.limit_in_bytes", memory_bytes)
            with contextlib.suppress(OSError):
                _write(self.memory, "memory.memsw.limit_in_bytes", memory_bytes)
            _write(self.memory, "memory.max_usage_in_bytes", 0)
        else:
            _write(self.memory, "memory.max", memory_bytes)
            with contextlib.suppress(OSError):  # no swap in this kernel
                _write(self.memory, "memory.swap.max", 0)
        if self.hierarchy.pids is not None:
            # bwrap, the shells and prlimit live in the group as well.
            _write(self.paths[-1], "pids.max", num_processes + 8)
        return self.num_kills()

    def num_kills(self) -> int:
        """How often the out-of-memory killer struck in this group."""
        name = "memory.oom_control" if self.hierarchy.version == 1 else "memory.events"
        found = re.search(r"^oom_kill (\d+)$", _read(self.memory, name), re.MULTILINE)
        return int(found[1]) if found else 0

    def peak_bytes(self) -> int | None:
        """Most memory charged since `prepare` (v2: only on Linux 5.19 and later)."""
        name = "memory.max_usage_in_bytes" if self.hierarchy.version == 1 else "memory.peak"
        try:
            return int(_read(self.memory, name))
        except OSError:
            return None

    def remove(self) -> None:
        """Remove the directories; a group whose last process is just being torn down takes a moment."""
        for path in self.paths:
            for _ in range(50):
                try:
                    os.rmdir(path)
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)
                else:
                    break


def _write(directory: str, name: str, value: int) -> None:
    with open(os.path.join(directory, name), "w", encoding="ascii") as handle:
        handle.write(str(value))


def _read(directory: str, name: str) -> str:
    with open(os.path.join(directory, name), encoding="ascii") as handle:
        return handle.read()


def _own_groups() -> dict[str, str]:
    """Controller -> path of our group within its hierarchy; '' is the v2 hierarchy."""
    groups = {}
    with open("/proc/self/cgroup", encoding="utf-8") as handle:
        for line in handle:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            for controller in controllers.split(","):
                groups[controller] = path
    return groups


def _mount_points() -> dict[str, tuple[str, str]]:
    """Controller -> (mount point, root of the mount within the hierarchy); '' is v2."""
    points: dict[str, tuple[str, str]] = {}
    with open(_MOUNTS, encoding="utf-8") as handle:
        for line in handle:
            fields = line.split()
            separator = fields.index("-")
            kind, options = fields[separator + 1], fields[separator + 3]
            for controller in options.split(",") if kind == "cgroup" else [""] if kind == "cgroup2" else []:
                points.setdefault(controller, (fields[4], fields[3]))
    return points


def _usable_parent(controller: str, marker: str) -> str | None:
    """The nearest group at or above ours in which a child with the file `marker` can be made."""
    own, point = _own_groups().get(controller), _mount_points().get(controller)
    if own is None or point is None:
        return None
    mount_point, root = point
    relative = os.path.relpath(own, root) if own.startswith(root) else "."
    parent = os.path.normpath(os.path.join(mount_point, relative)) if not relative.startswith("..") else mount_point
    while parent.startswith(mount_point):
        trial = os.path.join(parent, f"{_PREFIX}{os.getpid()}-trial")
        try:
            os.mkdir(trial)
        except OSError:
            parent = os.path.dirname(parent)
            continue
        works = os.access(os.path.join(trial, marker), os.W_OK)
        os.rmdir(trial)
        if works:
            return parent
        parent = os.path.dirname(parent)
    return None


def find_hierarchy() -> Hierarchy | None:
    """Where this process may make memory groups; None if it may not (then memory is limited per process and polled)."""
    if (parent := _usable_parent("memory", "memory.limit_in_bytes")) is not None:
        return Hierarchy(1, parent, _usable_parent("pids", "pids.max"))
    if (parent := _usable_parent("", "memory.max")) is not None:
        trial = Group(Hierarchy(2, parent, None), f"{_PREFIX}{os.getpid()}-trial")
        os.mkdir(trial.memory)
        has_pids = os.path.exists(os.path.join(trial.memory, "pids.max"))
        trial.remove()
        return Hierarchy(2, parent, parent if has_pids else None)
    return None


class GroupPool:
    """Hands out groups, one to a running sandbox; groups are reused, and removed when the process ends.

    Groups that a killed process left behind are removed when the next pool starts.
    """

    def __init__(self, hierarchy: Hierarchy) -> None:
        self.hierarchy = hierarchy
        self._lock = threading.Lock()
        self._owner, self._token = 0, ""
        self._free: list[Group] = []
        self._all: list[Group] = []

    def _adopt(self) -> None:
        """Groups belong to one process: a forked child starts its own."""
        self._owner = os.getpid()
        self._token = secrets.token_hex(4)  # two containers may share a hierarchy and have the same process ids
        self._free, self._all = [], []
        atexit.register(self._remove_all, self._owner)
        for name in os.listdir(self.hierarchy.memory):
            pid = name.removeprefix(_PREFIX).split("-")[0]
            if name.startswith(_PREFIX) and not os.path.exists(f"/proc/{pid}"):
                Group(self.hierarchy, name).remove()

    def acquire(self) -> Group:
        with self._lock:
            if self._owner != os.getpid():
                self._adopt()
            if self._free:
                return self._free.pop()
            group = Group(self.hierarchy, f"{_PREFIX}{self._owner}-{self._token}-{len(self._all)}")
            self._all.append(group)
            return group

    def release(self, group: Group) -> None:
        with self._lock:
            self._free.append(group)

    def _remove_all(self, owner: int) -> None:
        if owner == os.getpid() == self._owner:
            for group in self._all:
                group.remove()
