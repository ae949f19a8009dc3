"""Starts programs in the sandbox, carries their bytes under caps, kills them in time and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait  # unlike select.select, for descriptors above 1023 too
from pathlib import Path

from r1mega.sandbox.cgroup import Group, GroupPool, find_hierarchy
from r1mega.sandbox.policy import INSTALL, Limits, Policy, Toolchain, command_line, find_toolchain
from r1mega.sandbox.process_tree import cpu_pressure_seconds, resident_bytes, scheduling
from r1mega.sandbox.seccomp import assemble
from r1mega.sandbox.verdict import Completed, SandboxFailure, SandboxUnavailable, Verdict

_CHUNK_BYTES = 1 << 16
_START_SECONDS = 30.0  # from spawn until the namespaces stand, of those in which a CPU was to be had
_POLL_SECONDS = 0.05


class Child:
    """One sandbox while it runs. Killing its pid 1 takes everything inside with it; bwrap outside then reaps and ends.

    wall_start: monotonic seconds at which the sandbox stood (None until then).
    """

    def __init__(
        self, process: subprocess.Popen, status_fd: int, limits: Limits, group: Group | None, kills: int
    ) -> None:
        self.limits = limits
        self.spawned = time.monotonic()
        self.wall_start: float | None = None
        self.stopped: Verdict | None = None
        self.finished = False
        self._closed = self.host_out_of_memory = False
        self._pressure = cpu_pressure_seconds()
        self.exit_code = -1
        self.peak_bytes: int | None = None
        self._process, self._status_fd, self._group, self._kills = process, status_fd, group, kills
        self._pidfd = os.pidfd_open(process.pid)
        self._status = b""
        self._init_pidfd: int | None = None
        self._outgoing = bytearray()
        self._close_when_sent = False
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("a sandbox's process has pipes for its three streams")
        self._stdin, self._outputs = process.stdin, (process.stdout, process.stderr)
        self.open_streams = {process.stdout.fileno(): "stdout", process.stderr.fileno(): "stderr"}
        self.stderr_tail = bytearray()
        for stream in (self._stdin, *self._outputs):
            os.set_blocking(stream.fileno(), False)

    def feed(self, data: bytes, close: bool = False) -> None:
        """Queue bytes for the program's standard input; `exchange` sends them as the program reads."""
        self._outgoing += data
        self._close_when_sent |= close
        self._send()

    def _send(self) -> None:
        if self._stdin.closed:
            return
        try:
            while self._outgoing:
                sent = os.write(self._stdin.fileno(), memoryview(self._outgoing)[:_CHUNK_BYTES])
                del self._outgoing[:sent]
        except BlockingIOError:
            return
        except BrokenPipeError:  # a program may end without reading its input
            self._outgoing.clear()
            self._close_when_sent = True
        if self._close_when_sent:
            self._stdin.close()

    def _read_status(self) -> None:
        data = os.read(self._status_fd, _CHUNK_BYTES)
        self._status += data
        if self.wall_start is None and b"child-pid" in self._status and b"\n" in self._status:
            self.wall_start, self._pressure = time.monotonic(), cpu_pressure_seconds()
            pid = json.loads(self._status.split(b"\n", 1)[0])["child-pid"]
            with contextlib.suppress(ProcessLookupError):
                self._init_pidfd = os.pidfd_open(pid)

    def over_time(self) -> bool:
        if self.wall_start is None:
            return False
        elapsed, allowed = time.monotonic() - self.wall_start, self.limits.wall_seconds
        return elapsed > allowed and elapsed - self.starved_seconds(allowed, self._pressure) > allowed

    def starved_seconds(self, allowed_seconds: float, pressure_before: float) -> float:
        """Seconds without a CPU to be had: an overloaded host must not turn a right answer into a time-out.

        0 for one whose processes together had the CPU for as long as allowed; at most 4 times that. On a host whose
        CPUs are all taken a sleeping program is given the benefit of the doubt. pressure_before: cpu_pressure_seconds
        at its start.
        """
        cpu_seconds, waited_seconds = scheduling(self._process.pid)
        if cpu_seconds >= allowed_seconds:
            return 0.0
        return min(max(waited_seconds, cpu_pressure_seconds() - pressure_before), 4 * allowed_seconds)

    def stuck_starting(self) -> bool:
        """Whether it had the time to come up, on a CPU, and did not."""
        elapsed = time.monotonic() - self.spawned
        if self.wall_start is not None or elapsed <= _START_SECONDS:
            return False
        return elapsed - self.starved_seconds(_START_SECONDS, self._pressure) > _START_SECONDS

    def over_memory(self) -> bool:
        """Whether the tree outgrew its limit; only asked where no cgroup enforces it."""
        return self._group is None and resident_bytes(self._process.pid) > self.limits.memory_bytes

    def stop(self, verdict: Verdict) -> None:
        """Kill everything inside, once, and remember why."""
        if self.stopped is None and not self.finished:
            self.stopped = verdict
            self._kill()

    def _kill(self) -> None:
        deadline = time.monotonic() + 1.0
        while self.wall_start is None and time.monotonic() < deadline:
            ready = wait([self._status_fd, self._pidfd], 0.1)
            if self._pidfd in ready:
                return
            if ready:
                self._read_status()
        # Killing pid 1 inside lets bwrap reap it, so that no zombie falls to the host's init; bwrap itself only if it never
        # got that far.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._init_pidfd if self._init_pidfd is not None else self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Kill if running, reap. Afterwards no process of this sandbox exists. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if not self.finished:
            self._kill()
            self._reap(block=True)
        for stream in (self._stdin, *self._outputs):
            stream.close()
        for descriptor in (self._status_fd, self._pidfd, self._init_pidfd):
            if descriptor is not None:
                os.close(descriptor)

    def _reap(self, block: bool) -> None:
        if block:
            wait([self._pidfd], 10.0)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        _, wait_status = os.waitpid(self._process.pid, 0)
        self.exit_code = self._process.returncode = os.waitstatus_to_exitcode(wait_status)
        self.finished = True
        if self._group is not None:
            self.peak_bytes = self._group.peak_bytes()
            if self._group.num_kills() > self._kills and self.stopped is None:
                # Far below its own limit it was the whole host that had no memory left.
                self.host_out_of_memory = (
                    self.peak_bytes is not None and self.peak_bytes < self.limits.memory_bytes // 2
                )
                self.stopped = Verdict.MEMORY_LIMIT

    def check_started(self) -> None:
        """Raises SandboxFailure if the sandbox ended without ever having run the program, or for want of host memory."""
        if self.host_out_of_memory:
            raise SandboxFailure("the host ran out of memory and the kernel killed the program")
        while data := os.read(self._status_fd, _CHUNK_BYTES):
            self._status += data
        if self.stopped is None and b"exit-code" not in self._status:
            tail = bytes(self.stderr_tail[-500:]).decode("utf-8", "replace").strip()
            raise SandboxFailure(f"sandbox did not start (status {self.exit_code}): {tail or 'no message'}")


def exchange(children: Sequence[Child], timeout_seconds: float) -> Iterator[tuple[Child, str, bytes]]:
    """Wait for what happens first and yield (child, 'stdout' | 'stderr', bytes) of everything read; b'' is the end.

    Also sends queued input, follows bwrap's status and reaps children that ended (`child.finished`).
    """
    poller, owners = select.poll(), {}
    for child in children:
        if not child.finished:
            poller.register(child._pidfd, select.POLLIN)
            owners[child._pidfd] = (child, "exit")
            if child.wall_start is None:
                poller.register(child._status_fd, select.POLLIN)
                owners[child._status_fd] = (child, "status")
        if child._outgoing and not child._stdin.closed:
            poller.register(child._stdin.fileno(), select.POLLOUT)
            owners[child._stdin.fileno()] = (child, "stdin")
        for descriptor, name in child.open_streams.items():
            poller.register(descriptor, select.POLLIN)
            owners[descriptor] = (child, name)
    for descriptor, _ in poller.poll(max(0.0, timeout_seconds) * 1000):
        child, name = owners[descriptor]
        if name == "exit":
            # The receiver of an earlier event may have waited for this child by an exchange of its own.
            if not child.finished:
                child._reap(block=False)
        elif name == "status":
            if child.wall_start is None:
                child._read_status()
        elif name == "stdin":
            child._send()
        elif descriptor in child.open_streams:
            try:
                data = os.read(descriptor, _CHUNK_BYTES)
            except BlockingIOError:  # likewise: already read
                continue
            if not data:
                del child.open_streams[descriptor]
            if name == "stderr":
                child.stderr_tail += data
                del child.stderr_tail[:-4096]
            yield child, name, data


class Launcher:
    """Starts sandboxes under one policy. Safe to share between threads; a forked process makes its own cgroups.

    Raises SandboxUnavailable when a tool is missing, or a memory cgroup that the policy asks for cannot be had.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.tools: Toolchain = find_toolchain(self.policy)
        if not hasattr(os, "pidfd_open"):
            raise SandboxUnavailable(f"sandbox: needs pidfd_open (Linux 5.3, Python 3.9); {INSTALL}")
        hierarchy = find_hierarchy()
        if hierarchy is None and self.policy.require_cgroup:
            raise SandboxUnavailable(
                "sandbox: no memory cgroup can be made here and the policy asks for one; delegate one to this user "
                "(v2: systemd-run --user -p Delegate=yes) or set require_cgroup to false"
            )
        self.groups = GroupPool(hierarchy) if hierarchy else None
        self._filter = assemble()

    @contextlib.contextmanager
    def start(
        self,
        program: Sequence[str],
        limits: Limits,
        files: Mapping[str, bytes] | None = None,
        *,
        executable_files: bool = False,
        with_compiler: bool = False,
    ) -> Iterator[Child]:
        """A running sandbox; leaving the block kills and reaps it. files: path inside -> contents, read-only there."""
        groups = self.groups
        group = groups.acquire() if groups else None
        descriptors: list[int] = []
        try:
            kills = group.prepare(limits.memory_bytes, limits.num_processes) if group else 0
            descriptors.append(filter_fd := _memory_file(self._filter))
            permissions = 0o555 if executable_files else 0o444
            inside = {}
            for path, contents in (files or {}).items():
                descriptors.append(descriptor := _memory_file(contents))
                inside[path] = (descriptor, permissions)
            status_read, status_write = os.pipe()
            descriptors.append(status_write)
            argv = command_line(
                self.tools,
                self.policy,
                limits,
                program,
                cgroups=group.paths if group else (),
                seccomp_fd=filter_fd,
                status_fd=status_write,
                files=inside,
                with_compiler=with_compiler,
            )
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd="/",
                pass_fds=descriptors,
                start_new_session=True,
                env={"PATH": "/usr/bin:/bin"},
            )
            for descriptor in descriptors:
                os.close(descriptor)
            descriptors.clear()
            child = Child(process, status_read, limits, group, kills)
            try:
                yield child
            finally:
                child.close()
        except OSError as error:
            raise SandboxFailure(f"sandbox could not be started: {error}") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            if groups and group:
                groups.release(group)

    def run(
        self,
        program: Sequence[str],
        limits: Limits | None = None,
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
        executable_files: bool = False,
        with_compiler: bool = False,
    ) -> Completed:
        """Run to the end or to a limit. Raises SandboxFailure if the sandbox itself could not do its work."""
        limits = limits or Limits()
        collected = {"stdout": bytearray(), "stderr": bytearray()}
        with self.start(
            program, limits, files, executable_files=executable_files, with_compiler=with_compiler
        ) as child:
            child.feed(stdin, close=True)
            while not child.finished or child.open_streams:
                for _, name, data in exchange([child], _POLL_SECONDS):
                    room = limits.output_bytes - sum(map(len, collected.values()))
                    collected[name] += data[:room]
                    if len(data) > room:
                        child.stop(Verdict.OUTPUT_LIMIT)
                enforce(child)
            child.check_started()
            wall = time.monotonic() - (child.wall_start or child.spawned)
            return Completed(
                child.exit_code,
                bytes(collected["stdout"]),
                bytes(collected["stderr"]),
                wall,
                child.peak_bytes,
                child.stopped,
            )

    def run_python(self, source: bytes, limits: Limits | None = None, stdin: bytes = b"") -> Completed:
        """Run `source` as a main program of the sandbox's Python."""
        runner = (Path(__file__).parent / "inside" / "program.py").read_text(encoding="utf-8")
        return self.run(self.python(runner), limits, stdin=stdin, files={"/box/answer.py": source})

    def python(self, source: str) -> list[str]:
        """argv for a trusted script of ours. No site-packages, no user site, no bytecode; arguments: library paths."""
        return [self.tools.python, "-s", "-S", "-B", "-c", source, *self.policy.library_paths]


def enforce(child: Child) -> None:
    """Stop a child that is over its time or memory. Raises SandboxFailure for one that never came up."""
    if child.finished:
        return
    if child.stuck_starting():
        raise SandboxFailure(
            f"sandbox did not come up within {_START_SECONDS:.0f} s with a CPU to be had: disk overloaded?"
        )
    if child.over_time():
        child.stop(Verdict.TIME_LIMIT)
    elif child.over_memory():
        child.stop(Verdict.MEMORY_LIMIT)


def _memory_file(contents: bytes) -> int:
    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC)
    view = memoryview(contents)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
