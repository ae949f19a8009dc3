"""The session between answer and grader: values and objects on their way, time, and how each side ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from r1mega.sandbox import (
    Limits,
    SandboxFailure,
    Verdict,
)
from r1mega.sandbox import session as session_module
from r1mega.sandbox.session import grade

pytestmark = pytest.mark.heavy

SMALL = Limits(wall_seconds=3.0, cpu_seconds=3, memory_bytes=96 << 20)


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
