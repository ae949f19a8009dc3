"""The start-up probe: attacks the host from inside before the first answer does, once a process."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from r1mega.errors import RewardError
from r1mega.sandbox.launcher import Launcher
from r1mega.sandbox.policy import Limits, Policy
from r1mega.sandbox.verdict import Completed, SandboxBreached, SandboxFailure, Verdict

_LIMITS = Limits(wall_seconds=20.0, cpu_seconds=10, memory_bytes=256 << 20, output_bytes=1 << 16)
_SHORT = replace(_LIMITS, wall_seconds=1.5)
_ATTACKS = Path(__file__).parent / "inside" / "attacks.py"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing tried. held: whether the sandbox withstood it; note: what was seen."""

    name: str
    held: bool
    note: str


@contextlib.contextmanager
def _bait() -> Iterator[dict[str, str]]:
    """Things on the host that must not be reachable from inside: a readable file, a listening port, a socket, a
    variable."""
    secret = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as port,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as abstract,
    ):
        os.chmod(directory, 0o755)
        path = Path(directory) / "secret"
        path.write_text(secret, encoding="ascii")
        path.chmod(0o666)
        port.bind(("127.0.0.1", 0))
        port.listen()
        abstract.bind("\0" + secret)
        abstract.listen()
        os.environ["R1MEGA_SANDBOX_BAIT"] = secret
        try:
            yield {
                "file": str(path),
                "port": str(port.getsockname()[1]),
                "abstract": secret,
                "secret": secret,
                "pid": str(os.getpid()),
            }
        finally:
            del os.environ["R1MEGA_SANDBOX_BAIT"]
            if path.read_text(encoding="ascii") != secret:
                raise SandboxBreached("sandbox probe: a file of the host was changed from inside")


def _quick_attacks(launcher: Launcher) -> list[Finding]:
    """All attacks that end by themselves, in one run; each prints `name<TAB>what it saw`, `-` for nothing."""
    with _bait() as bait:
        arguments = [bait[key] for key in ("file", "port", "abstract", "pid")]
        done = launcher.run([*launcher.python(_ATTACKS.read_text(encoding="utf-8"))[:6], *arguments], _LIMITS)
        lines = [line.split("\t", 1) for line in done.stdout.decode("utf-8", "replace").splitlines()]
        findings = [Finding(name, note == "-", note) for name, note in (line for line in lines if len(line) == 2)]
        if done.classify() is not None or not findings or findings[-1].name != "all tried":
            tail = done.stderr[-300:].decode("utf-8", "replace")
            raise SandboxFailure(f"sandbox probe did not run to its end ({done.classify()}): {tail}")
        if bait["secret"].encode() in done.stdout + done.stderr:
            findings.append(Finding("secret", False, "the bait's secret was read"))
    return findings


def _limit_attacks(launcher: Launcher) -> list[Finding]:
    """Attacks on time, memory, output and processes: each must end by the limit named, a neighbour must not notice."""
    hoard = b"hoard = [bytes([1]) * (1 << 20) for _ in range(999)]\nprint('survived')"
    memory = b"import os\nfor _ in range(4): os.fork()\n" + hoard
    attacks = {
        "endless loop": (
            b"import signal\nfor n in range(1, 32):\n try: signal.signal(n, signal.SIG_IGN)\n"
            b" except (OSError, ValueError): pass\nwhile True: pass",
            Verdict.TIME_LIMIT,
        ),
        "endless output": (b"while True: print('x' * 9999)", Verdict.OUTPUT_LIMIT),
        "memory bomb": (memory, None),
        "fork bomb": (b"import os\nwhile True:\n try: os.fork()\n except OSError: pass", Verdict.TIME_LIMIT),
        "daemon": (
            b"import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(60)\nprint('parent out', flush=True)",
            None,
        ),
    }
    neighbour = (
        b"import threading\nt = [threading.Thread(target=int) for _ in range(4)]\n[x.start() for x in t]\nprint('well')"
    )
    done: dict[str, Completed] = {}

    def attempt(name: str, source: bytes) -> None:
        done[name] = launcher.run_python(source, _LIMITS if name == "neighbour" else _SHORT)

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(attempt, name, source) for name, (source, _) in attacks.items()]
        runs.append(pool.submit(attempt, "neighbour", neighbour))
        for run in runs:
            run.result()
    findings = []
    for name, (_, expected) in attacks.items():
        verdict = done[name].classify()
        held = b"survived" not in done[name].stdout and (expected is None or verdict is expected)
        findings.append(Finding(name, held, f"ended by {verdict or 'itself'}"))
    findings.append(
        Finding("neighbour of bombs", done["neighbour"].stdout == b"well\n", repr(done["neighbour"].stderr[-200:]))
    )
    return findings


def run_probe(launcher: Launcher) -> list[Finding]:
    """Try everything (about two seconds). Raises SandboxFailure if the probe itself cannot run."""
    return _quick_attacks(launcher) + _limit_attacks(launcher)


_lock = threading.Lock()
_passed: set[tuple[int, Policy]] = set()


def ensure_safe(launcher: Launcher) -> None:
    """Probe once for each process and policy. Raises SandboxBreached that names every attack that got through."""
    key = (os.getpid(), launcher.policy)
    with _lock:
        if key in _passed:
            return
        through = [f"{finding.name} ({finding.note})" for finding in run_probe(launcher) if not finding.held]
        if through:
            raise SandboxBreached(
                f"sandbox probe: {len(through)} attack(s) got through: {'; '.join(through)}. No code is scored here; "
                "mend the host (see docs/sandbox.md) or configure the remote backend"
            )
        _passed.add(key)


def describe(policy: Policy | None = None) -> list[tuple[str, bool, str]]:
    """(name, ok, note) lines for `r1mega doctor`; never raises."""
    try:
        launcher = Launcher(policy)
    except RewardError as error:
        return [("sandbox", False, str(error))]
    tools = launcher.tools
    lines = [
        ("sandbox tools", True, f"{tools.bwrap}, {tools.setpriv}, {tools.prlimit}"),
        ("sandbox python", True, tools.python),
    ]
    lines.append(
        ("sandbox C++", tools.compiler is not None, tools.compiler or "no /usr/bin/g++: C++ answers are refused")
    )
    root = os.geteuid() == 0
    lines.append(
        (
            "sandbox uid",
            root,
            "a fresh uid for each run" if root else "our own uid, mapped: not root, so it cannot be changed",
        )
    )
    if launcher.groups:
        hierarchy = launcher.groups.hierarchy
        lines.append(("sandbox memory cgroup", True, f"v{hierarchy.version} under {hierarchy.memory}"))
    else:
        lines.append(
            (
                "sandbox memory cgroup",
                False,
                "none can be made here: address space is limited per process, the tree's "
                "memory is polled 20 times a second, and a fast bomb may pass the limit for that long",
            )
        )
    try:
        findings = run_probe(launcher)
    except SandboxFailure as error:
        return [*lines, ("sandbox probe", False, str(error))]
    through = [finding.name for finding in findings if not finding.held]
    lines.append(
        (
            "sandbox probe",
            not through,
            f"{len(findings)} attacks" + (f", got through: {', '.join(through)}" if through else " held"),
        )
    )
    return lines
