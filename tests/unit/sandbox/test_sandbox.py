"""The launcher, the probe, and what happens where a part is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1mega.errors import RewardError
from r1mega.sandbox import (
    Launcher,
    Limits,
    LocalBackend,
    Policy,
    SandboxBreached,
    SandboxFailure,
    SandboxUnavailable,
    Verdict,
    describe,
    run_probe,
)
from r1mega.sandbox import launcher as launcher_module
from r1mega.sandbox import policy as policy_module
from r1mega.sandbox.probe import ensure_safe
from tests.unit.sandbox.conftest import own_children

pytestmark = pytest.mark.heavy

SMALL = Limits(wall_seconds=3.0, cpu_seconds=3, memory_bytes=96 << 20)


def python(launcher, source, limits=SMALL, stdin=b""):
    return launcher.run_python(source.encode(), limits, stdin)


def test_a_program_reads_and_writes(launcher):
    done = python(
        launcher, "import sys\nprint(input()[::-1])\nprint('note', file=sys.stderr)", stdin="héllo\n".encode()
    )
    assert (done.exit_code, done.stdout, done.stderr) == (0, "olléh\n".encode(), b"note\n")
    assert done.classify() is None and 0 < done.wall_seconds < 20


def test_large_input_and_output_pass_unharmed(launcher):
    data = os.urandom(300_000).hex().encode()
    assert python(launcher, "import sys; sys.stdout.write(sys.stdin.read())", stdin=data).stdout == data


def test_input_that_nobody_reads(launcher):
    assert python(launcher, "print(1)", stdin=b"x" * (1 << 22)).stdout == b"1\n"


def test_the_limits_are_each_named(launcher):
    assert python(launcher, "while True: pass").classify() is Verdict.TIME_LIMIT
    patient = Limits(wall_seconds=60.0, memory_bytes=96 << 20)
    assert (
        python(launcher, "x = [bytes([1]) * (1 << 20) for _ in range(999)]", patient).classify() is Verdict.MEMORY_LIMIT
    )
    output = python(launcher, "print('x' * (3 << 20))", patient)
    assert output.classify() is Verdict.OUTPUT_LIMIT and len(output.stdout) == SMALL.output_bytes
    assert python(launcher, "1 / 0", patient).classify() is Verdict.RUNTIME_ERROR
    assert python(launcher, "1 +", patient).classify() is Verdict.COMPILE_ERROR
    assert python(launcher, "import os; os.abort()", patient).classify() is Verdict.CRASHED
    quick = Limits(wall_seconds=60.0, cpu_seconds=1, memory_bytes=96 << 20)
    assert python(launcher, "while True: pass", quick).classify() is Verdict.TIME_LIMIT  # by the CPU's clock


def test_what_ordinary_programs_need_is_there(launcher):
    source = """
import asyncio, concurrent.futures, multiprocessing, sqlite3, subprocess, tempfile, threading, decimal, random, json
async def f(): await asyncio.sleep(0.01); return 1
assert asyncio.run(f()) == 1
with concurrent.futures.ThreadPoolExecutor(4) as pool: assert sum(pool.map(abs, range(-4, 0))) == 10
with multiprocessing.Pool(2) as pool: assert pool.map(abs, [-1, -2]) == [1, 2]
with tempfile.NamedTemporaryFile() as file: file.write(b"x")
assert subprocess.run(["/bin/echo", "hi"], capture_output=True).stdout == b"hi\\n"
assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
exit()
"""
    done = python(launcher, source, Limits(wall_seconds=10.0))
    assert done.exit_code == 0, done.stderr.decode()


def test_hash_seed_is_fixed(launcher):
    runs = {python(launcher, "print(hash('a'), list({'x', 'y', 'z', 'w'}))").stdout for _ in range(3)}
    assert len(runs) == 1


def test_many_at_once_and_no_process_or_cgroup_is_left(launcher):
    before = own_children()
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda n: python(launcher, f"print({n})", Limits()).stdout, range(24)))
    assert outputs == [f"{n}\n".encode() for n in range(24)]
    assert own_children() <= before


def test_cgroups_are_removed_at_exit(launcher):
    if launcher.groups is None:
        pytest.skip("no memory cgroup can be made here")
    program = (
        "from r1mega.sandbox import Launcher\nlauncher = Launcher()\nlauncher.run_python(b'print(1)')\n"
        "import os\nfor p in launcher.groups.acquire().paths: assert os.path.isdir(p); print(p)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    paths = done.stdout.split()
    assert paths and not any(os.path.exists(path) for path in paths)


def test_memory_of_the_whole_tree_is_held_by_the_cgroup(launcher):
    if launcher.groups is None:
        pytest.skip("no memory cgroup can be made here")
    source = "import os, time\nfor _ in range(4): os.fork()\nhoard = bytes([1]) * (30 << 20)\ntime.sleep(1)"
    done = python(launcher, source)
    assert done.classify() is Verdict.MEMORY_LIMIT
    if done.peak_bytes is not None:
        assert done.peak_bytes <= SMALL.memory_bytes


def test_without_a_cgroup_the_tree_is_polled(launcher, monkeypatch):
    monkeypatch.setattr(launcher_module, "find_hierarchy", lambda: None)
    bare = Launcher()
    source = "import os, time\nfor _ in range(3): os.fork()\nhoard = bytes([1]) * (40 << 20)\ntime.sleep(9)"
    done = python(bare, source, Limits(wall_seconds=8.0, memory_bytes=96 << 20))
    assert done.classify() is Verdict.MEMORY_LIMIT and done.wall_seconds < 5
    assert python(bare, "print(1)").stdout == b"1\n"
    with pytest.raises(SandboxUnavailable, match="cgroup"):
        Launcher(Policy(require_cgroup=True))


def test_libraries_are_bound_read_only(launcher, tmp_path_factory):
    library = tmp_path_factory.mktemp("library")
    (library / "gift.py").write_text("VALUE = 42\n")
    for directory in (library, *library.parents):
        if directory != Path("/") and not os.stat(directory).st_mode & 0o001:
            directory.chmod(0o755)
    reading = Launcher(Policy(libraries=(str(library),)))
    done = python(reading, "import gift; print(gift.VALUE)\nopen('/box/lib/0/x', 'w')")
    assert done.stdout == b"42\n" and b"Read-only file system" in done.stderr


def test_a_sandbox_that_cannot_start_is_no_verdict(launcher, monkeypatch):
    broken = Launcher()
    original = launcher_module.command_line
    monkeypatch.setattr(
        launcher_module,
        "command_line",
        lambda *a, **k: [x.replace("--proc", "--no-such-option") for x in original(*a, **k)],
    )
    with pytest.raises(SandboxFailure, match="no-such-option"):
        python(broken, "print(1)")


def test_missing_tools_are_refused_with_instructions(monkeypatch):
    monkeypatch.setattr(policy_module.shutil, "which", lambda *a, **k: None)
    with pytest.raises(RewardError, match="apt-get install -y bubblewrap") as refusal:
        LocalBackend()
    assert isinstance(refusal.value, SandboxUnavailable)
    assert describe() == [("sandbox", False, str(refusal.value))]


def test_private_interpreters_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    private = tmp_path / "bin" / "python3"
    private.parent.mkdir(mode=0o700)
    private.symlink_to(sys.executable)
    (tmp_path / "bin" / "real").write_bytes(b"")
    (tmp_path / "bin" / "real").chmod(0o700)
    with pytest.raises(SandboxUnavailable, match="readable|read"):
        policy_module.find_python(str(tmp_path / "bin" / "real"))


def test_works_without_root(launcher):
    """As an unprivileged user, where the uid cannot be changed and (mostly) no cgroup be made."""
    if os.geteuid() != 0:
        pytest.skip("runs as an unprivileged user already")
    interpreter = launcher.tools.python
    root = Path(launcher_module.__file__).parents[2]
    version = subprocess.run(
        [interpreter, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True
    )
    if version.stdout.strip() != "True" or not policy_module._readable_by_everyone(launcher_module.__file__):
        pytest.skip("needs a Python 3.11 and a checkout that every user can read")
    program = (
        "from r1mega.sandbox import Launcher, run_probe\nlauncher = Launcher()\n"
        "print([f.name for f in run_probe(launcher) if not f.held], launcher.run_python(b'print(6 * 7)').stdout)"
    )
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", interpreter, "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
    )
    assert done.stdout == "[] b'42\\n'\n", done.stderr


# --- the probe ------------------------------------------------------------------------------------------------------


def test_probe_holds_and_is_cached(launcher):
    findings = run_probe(launcher)
    assert [finding for finding in findings if not finding.held] == [] and len(findings) >= 40
    ensure_safe(launcher)
    start = time.monotonic()
    ensure_safe(launcher)
    assert time.monotonic() - start < 0.05


def without(*options):
    """A change of the command line that drops options (name and value)."""

    def change(argv):
        argv = list(argv)
        for name, width in options:
            while name in argv:
                index = argv.index(name)
                del argv[index : index + width]
        return argv

    return change


def shared_network(argv):
    index = argv.index("--unshare-all")
    return [
        *argv[:index],
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        *argv[index + 1 :],
    ]


def host_root(argv):
    index = argv.index("--proc")
    return [*argv[:index], "--ro-bind", "/etc", "/etc", "--dir", "/home", *argv[index:]]


@pytest.mark.parametrize(
    ("weaken", "expected"),
    [
        (without(("--seccomp", 2)), {"no system call filter", "memfd", "shared memory"}),
        (lambda argv: without(("--seccomp", 2))(shared_network(argv)), {"connect to a port", "abstract socket"}),
        (host_root, {"read /etc/passwd", "see home directories"}),
        (without(("--remount-ro", 2)), {"write the root"}),
        (without(("--size", 2)), {"fill /dev/shm"}),
        (without(("--as-pid-1", 1), ("--clearenv", 1)), {"environment"}),
    ],
    ids=["no-filter", "network", "host-files", "writable-root", "unbounded-tmpfs", "environment"],
)
def test_probe_finds_a_weakened_sandbox(launcher, monkeypatch, weaken, expected):
    """The probe is only worth something if it fails where a wall is missing."""
    monkeypatch.setattr("r1mega.sandbox.probe._limit_attacks", lambda launcher: [])
    original = launcher_module.command_line
    monkeypatch.setattr(launcher_module, "command_line", lambda *a, **k: weaken(original(*a, **k)))
    if "environment" in expected:
        popen = subprocess.Popen
        monkeypatch.setattr(launcher_module.subprocess, "Popen", lambda *a, **k: popen(*a, **{**k, "env": None}))
    weakened = Launcher(Policy(hash_seed=1))  # another policy: not what is cached
    with pytest.raises(SandboxBreached) as breach:
        ensure_safe(weakened)
    assert all(name in str(breach.value) for name in expected), breach.value
    assert "No code is scored" in str(breach.value)


# --- starved --------------------------------------------------------------------------------------------------------


def test_a_starved_answer_is_not_out_of_time(launcher):
    """Six busy processes beside it on one CPU: about a seventh of the CPU, and still the time that it was promised.

    Each in a session of its own, as the sandbox is: the kernel may share a CPU out by sessions.
    """
    everything = os.sched_getaffinity(0)
    cpu = min(everything)
    loop = [sys.executable, "-S", "-c", "while True: pass"]
    busy = [subprocess.Popen(loop, start_new_session=True) for _ in range(6)]
    try:
        for process in busy:
            os.sched_setaffinity(process.pid, {cpu})
        os.sched_setaffinity(0, {cpu})
        source = (
            "import time\nstart = time.process_time()\nwhile time.process_time() - start < 0.5: pass\nprint('done')"
        )
        runs = [python(launcher, source, Limits(wall_seconds=1.0)) for _ in range(4)]
    finally:
        os.sched_setaffinity(0, everything)
        for process in busy:
            process.kill()
            process.wait()
    assert all(run.stdout == b"done\n" for run in runs), runs
    assert max(run.wall_seconds for run in runs) > 1.0, runs  # the scheduler may favour one of them


@pytest.mark.parametrize(
    ("cpu_seconds", "waited_seconds", "stuck"), [(1.0, 0.0, True), (1.0, 15.0, False), (35.0, 99.0, True)]
)
def test_a_starved_start_is_waited_for(monkeypatch, cpu_seconds, waited_seconds, stuck):
    """40 seconds after its spawn: one that waited for a CPU for most of them goes on, one that had it does not."""
    monkeypatch.setattr(launcher_module, "scheduling", lambda pid: (cpu_seconds, waited_seconds))
    monkeypatch.setattr(launcher_module, "cpu_pressure_seconds", lambda: 0.0)
    child = launcher_module.Child.__new__(launcher_module.Child)
    child.wall_start, child.spawned, child._pressure = None, time.monotonic() - 40, 0.0
    child._process = SimpleNamespace(pid=1)
    assert child.stuck_starting() is stuck
