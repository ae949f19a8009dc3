"""The launcher, the session between answer and grader, the probe, and what happens where a part is missing."""

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
from r1mega.sandbox import session as session_module
from r1mega.sandbox.probe import ensure_safe
from r1mega.sandbox.session import grade
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


# --- sessions -------------------------------------------------------------------------------------------------------


def asserts(launcher, source, tests, stop=True, **limits):
    spec = {"context": "", "tests": tests, "entry": None, "stop_at_failure": stop}
    return grade(launcher, source, spec, Limits(**limits), clock_per_call=False)


ROUND_TRIP = """
import collections, fractions, decimal
VALUES = [
    None, True, -5, 2**70, -2**70, 1.5, float('inf'), 'é\\ud800', b'x\\x00', bytearray(b'y'), (1, (2,)), [1, []],
    {1: 2, 'a': (3,)}, {1, 2}, frozenset({3}), 1j, range(1, 9, 2), collections.deque([1]), fractions.Fraction(1, 3),
    decimal.Decimal('0.10'), {'k': 1}.keys(), int, len, collections.OrderedDict(a=1), collections.Counter('aab'),
]
"""


def test_values_keep_their_types_on_the_way(launcher):
    source = (
        ROUND_TRIP
        + "def nth(n): return VALUES[n]\ndef same(n, value): return type(VALUES[n]).__name__, VALUES[n] == value"
    )
    tests = ROUND_TRIP + (
        "for n, value in enumerate(VALUES):\n"
        "    plain = dict if isinstance(value, dict) else type(value)\n"
        "    assert nth(n) == value and type(nth(n)) is plain, (n, value, nth(n))\n"
        "    assert same(n, value)[1] is True, (n, value)\n"
    )
    graded = asserts(launcher, source, tests, wall_seconds=20.0)
    assert graded.outcome["num_failed"] == 0 and graded.outcome["num_passed"] == 50, graded.outcome["first"]


def test_among_a_thousand_open_files(launcher, many_descriptors):
    graded = asserts(launcher, "def f(): return 1", "assert f() == 1", wall_seconds=20.0)
    assert graded.outcome["num_passed"] == 1, graded.outcome["first"]


def test_iterators_stay_iterators(launcher):
    source = "def f(): return map(abs, [-1, 2])\ndef g():\n    yield 1"
    graded = asserts(launcher, source, "assert f() != [1, 2]\nassert list(f()) == [1, 2]\nassert next(g()) == 1")
    assert graded.outcome["num_passed"] == 3


def test_objects_of_the_answer_are_used_from_afar(launcher):
    source = """
class Node:
    def __init__(self, value): self.value, self.next = value, None
    def double(self): return self.value * 2
    def __len__(self): return 7
    def __getitem__(self, key): return key + 1
    def __str__(self): return 'node'
def length(node): return 0 if node is None else 1 + length(node.next)
def apply(function, value): return function(value)
"""
    tests = """
a = Node(1); a.next = Node(2)
assert length(a) == 2 and a.next.value == 2 and a.next.double() == 4
assert len(a) == 7 and a[1] == 2 and str(a) == 'node' and list(a.next.__class__.__mro__ if False else [1]) == [1]
assert apply(length, a) == 2
"""
    graded = asserts(launcher, source, tests)
    assert graded.outcome["num_passed"] == 3, graded


def test_the_answer_never_sees_the_graders_nonce(launcher):
    """Both sides look for what they were given in the frames below them."""
    find = "\nimport sys\nf = sys._getframe()\nwhile %r not in f.f_locals: f = f.f_back\n"
    source = find % "request" + "seen = [f.f_locals['request']['number']]\ndef given():\n"
    source += "    g = sys._getframe()\n    while 'request' not in g.f_locals: g = g.f_back\n"
    source += "    seen.append(g.f_locals['request']['number'])\n    return seen"
    tests = find % "spec" + "nonce = f.f_locals['spec']['nonce']\nassert len(nonce) == 32\n"
    tests += "numbers = given() + given()\nassert len(set(map(str, numbers))) == 3\nassert nonce not in numbers"
    graded = asserts(launcher, source, tests)
    assert graded.ended is None and graded.outcome["num_failed"] == 0, graded


def test_exceptions_of_the_answer_reach_the_tests(launcher):
    source = (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    class Own(Exception): pass\n    raise Own('mine')"
    )
    tests = (
        "try:\n    f(-1)\n    assert False == True\nexcept ValueError as error:\n"
        "    assert 'negative' in str(error)\nf(1)"
    )
    graded = asserts(launcher, source, tests)
    assert graded.outcome["num_passed"] == 1 and graded.outcome["first"]["message"] == "Own: mine"


def test_a_builtin_is_the_graders_unless_it_is_all_that_is_called(launcher):
    lying = "def len(x): return 2\ndef sorted(x): return [1, 2]\ndef f(): return [9]"
    assert asserts(launcher, lying, "assert len(f()) == 2").outcome["num_passed"] == 0
    assert asserts(launcher, lying, "assert sorted(f()) == [1, 2]").outcome["num_passed"] == 0
    assert (
        asserts(
            launcher,
            "import math\nclass math: isclose = lambda *a: True\ndef f(): return 1",
            "assert math.isclose(f(), 2)",
        ).outcome["num_passed"]
        == 0
    )
    assert (
        asserts(launcher, "def sum(a, b): return a + b", "assert sum(10, 15) == 25\nassert sum(1, 2) == 3").outcome[
            "num_passed"
        ]
        == 2
    )


def test_the_graders_time_is_not_the_answers(launcher):
    tests = "import time\nassert f() == 1\ntime.sleep(1.2)\nassert f() == 1"
    graded = asserts(launcher, "def f(): return 1", tests, wall_seconds=1.0)
    assert graded.ended is None and graded.outcome["num_passed"] == 2


def test_time_of_all_calls_counts_together(launcher):
    source = "import time\ndef f():\n    time.sleep(0.4)\n    return 1"
    graded = asserts(launcher, source, "for _ in range(99):\n    assert f() == 1", wall_seconds=1.0)
    assert (
        graded.ended[0] is Verdict.TIME_LIMIT and 2 <= graded.outcome["num_passed"] <= 12
    )  # 12: a busy host gives up to 5 times


def test_tests_that_never_ask_are_not_the_answers_fault(launcher):
    spec = {"context": "import os; os._exit(3)", "tests": "assert f()", "entry": None, "stop_at_failure": True}
    with pytest.raises(SandboxFailure, match="before its first question"):
        grade(launcher, "def f(): return 1", spec, Limits(), clock_per_call=False)


def test_a_child_that_is_killed_for_memory_costs_the_answer(launcher):
    if launcher.groups is None:
        pytest.skip("no memory cgroup can be made here")
    source = (
        "import os\ndef f():\n    if os.fork() == 0:\n        x = [bytes([1]) * (1 << 20) for _ in range(999)]\n"
        "    os.wait()\n    return 1"
    )
    graded = asserts(launcher, source, "assert f() == 1", memory_bytes=96 << 20)
    assert graded.ended[0] is Verdict.MEMORY_LIMIT


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


@pytest.mark.parametrize("turn", ["start", "loading", "answer", "grader"])
def test_a_turn_is_longer_while_its_side_is_starved(monkeypatch, turn):
    """6 seconds over its time, one that had no CPU for 10 goes on: no answer is blamed for tests that wait. One that had it ends."""
    monkeypatch.setattr(session_module, "enforce", lambda child: None)
    owner, starved = "grader" if turn == "grader" else "answer", {"answer": 0.0, "grader": 0.0}

    def side(name):
        stub = SimpleNamespace(wall_start=None, stopped=None, stop=lambda verdict: None, feed=lambda data: None)
        stub.starved_seconds = lambda allowed, pressure: starved[name]
        return stub

    state = session_module._State("nonce", "1", turn=turn, call_seconds=[0.1])
    session = session_module._Session(side("answer"), side("grader"), state, SMALL, clock_per_call=True)
    session.turn_started -= session.budget["answer" if turn == "loading" else turn] + 6
    starved[owner] = 10.0
    session._keep_time()
    assert state.ended is None
    starved[owner] = 0.0
    if turn == "start":
        with pytest.raises(SandboxFailure, match="did not come up"):
            session._keep_time()
    else:
        session._keep_time()
        assert state.ended[0] is Verdict.TIME_LIMIT


def test_an_end_that_arrives_in_one_piece(launcher):
    """Both channels and the process end at once, in whatever order the kernel tells it."""
    for _ in range(20):
        graded = asserts(launcher, "import ctypes\ndef f(): ctypes.string_at(0)", "assert f() == 1", wall_seconds=20.0)
        assert graded.ended[0] is Verdict.CRASHED
