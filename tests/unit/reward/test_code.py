"""Code reward: the forms of tests, verdicts, partial credit; HumanEval and MBPP.

The samples in tests/data are from HumanEval (MIT) and MBPP (CC-BY-4.0). With the whole files in R1MEGA_SHARED_DATA
every R1MEGA_CODE_STRIDE-th problem is run as well (default 16; 1 for all).
"""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1mega.cli import app
from r1mega.errors import DataError, RewardError
from r1mega.reward.code import CodeReward, read_items, same_output, score_stream
from r1mega.reward.code_problem import AssertBlock, CallCase, Problem, StreamCase, problem_from
from r1mega.sandbox import Launcher, Limits, LocalBackend, SandboxFailure, Verdict
from r1mega.types import RewardStatus
from tests.machine import shared_data

pytestmark = pytest.mark.heavy

HERE = Path(__file__).parents[2] / "data"
STRIDE = int(os.environ.get("R1MEGA_CODE_STRIDE", "16"))
MUTANT = """
def __mutant(value):
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float, complex)): return value + 1
    if isinstance(value, str): return value + "x"
    if isinstance(value, (list, tuple)): return type(value)([*value, 0])
    return None if value is not None else 0
"""


@pytest.fixture(scope="module")
def backend():
    if shutil.which("bwrap") is None:
        pytest.skip("bwrap missing: apt-get install -y bubblewrap util-linux")
    return LocalBackend(Launcher(), probe=False)


@pytest.fixture(scope="module")
def reward(backend):
    return CodeReward(backend, Limits(wall_seconds=30.0))


@pytest.fixture(scope="module")
def partial(backend):
    return CodeReward(backend, Limits(wall_seconds=30.0, cpu_seconds=30), partial_credit=True)


def fenced(code, label="python"):
    return f"<think>maybe\n```python\nwrong\n```\n</think>Here:\n```{label}\n{code}\n```\nDone."


# --- published data -------------------------------------------------------------------------------------------------


def canonical(record):
    """(what a model would have to say, the problem)."""
    return record.get("canonical_solution") or record["code"], problem_from(record, str(record["task_id"]))


def mutated(solution, problem):
    """The solution with another value in every return of the function under test."""
    tree = ast.parse(problem.program(solution.replace("\r\n", "\n")))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    called = [
        n.func.id
        for n in ast.walk(ast.parse(problem.assertions.tests))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    entry = problem.entry or next(name for name in called if name in {function.name for function in functions})
    for function in functions:
        if function.name == entry:
            inner = {
                id(n)
                for f in ast.walk(function)
                if isinstance(f, ast.FunctionDef) and f is not function
                for n in ast.walk(f)
            }
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None and id(node) not in inner:
                    node.value = ast.parse(f"__mutant({ast.unparse(node.value)})", mode="eval").body
    return ast.unparse(ast.fix_missing_locations(tree)) + MUTANT


def records(*paths):
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def check(reward, items):
    solutions = [canonical(record) for record in items]
    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(lambda item: reward.score(*item), solutions))
        wrong = list(pool.map(lambda item: reward.score(mutated(*item), item[1]), solutions))
    ids = [record["task_id"] for record in items]
    assert {name: r.reason for name, r in zip(ids, right, strict=True) if r.value != 1.0} == {}
    assert {name: r.reason for name, r in zip(ids, wrong, strict=True) if r.value != 0.0} == {}


def test_samples_pass_and_their_mutants_fail(reward):
    items = records(HERE / "humaneval_sample.jsonl", HERE / "mbpp_sample.jsonl")
    assert len(items) == 14
    check(reward, items)


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_published_solutions_pass_and_their_mutants_fail(reward, name):
    check(reward, records(shared_data(f"{name}.jsonl"))[::STRIDE])


def test_a_prompts_helpers_are_the_tests_own(reward):
    """HumanEval/32 tests with the prompt's `poly`; an answer that redefines it must gain nothing."""
    record = next(r for r in records(HERE / "humaneval_sample.jsonl") if r["task_id"] == "HumanEval/32")
    problem = problem_from(record, "x")
    cheat = "def poly(xs, x):\n    return 0.0\n\ndef find_zero(xs):\n    return 0.0\n"
    assert reward.score(cheat, problem).value == 0.0
    assert reward.score(fenced(record["prompt"] + record["canonical_solution"]), problem).value == 1.0


# --- cases ----------------------------------------------------------------------------------------------------------

ADD = Problem(stream_cases=(StreamCase("1 2\n", "3\n"), StreamCase("5 6\n", "11\n"), StreamCase("0 0\n", "0\n")))


def test_streams_and_partial_credit(reward, partial):
    right = "a, b = map(int, input().split())\nprint(a + b)"
    half = "a, b = map(int, input().split())\nprint(a + b if a else 'none')"
    assert reward.score(fenced(right), ADD).value == 1.0
    assert reward.score(half, ADD).value == 0.0
    scored = partial.grade(half, ADD)
    assert scored.fraction == pytest.approx(2 / 3) and scored.verdict is Verdict.WRONG_ANSWER
    assert [case.verdict for case in scored.cases] == [Verdict.PASSED, Verdict.PASSED, Verdict.WRONG_ANSWER]
    assert scored.reason == "case 3 of 3: printed 'none\\n', expected '0\\n'"


def test_every_case_has_its_own_verdict_time_and_memory(partial):
    source = """
import sys, time
mode = input()
if mode == "sleep": time.sleep(30)
if mode == "hoard": x = bytes([1]) * (1 << 30)
if mode == "fill": x = bytes([1]) * (30 << 20)
if mode == "fail": sys.exit(3)
if mode == "crash":
    import ctypes; ctypes.string_at(0)
if mode == "print": print("x" * (5 << 20))
print("ok")
"""
    modes = ["fine", "sleep", "hoard", "fill", "fail", "crash", "print", "fine"]
    problem = Problem(
        stream_cases=tuple(StreamCase(mode, "ok") for mode in modes), time_limit=3.0, memory_bytes=128 << 20
    )
    result = partial.grade(source, problem)
    names = [case.verdict.value for case in result.cases]
    assert names == [
        "passed",
        "time_limit",
        "memory_limit",
        "passed",
        "runtime_error",
        "crashed",
        "output_limit",
        "passed",
    ]
    assert result.fraction == 3 / 8 and result.verdict is Verdict.TIME_LIMIT
    assert result.cases[1].wall_seconds >= 3.0
    if result.cases[0].peak_bytes is not None:
        assert result.cases[3].peak_bytes > result.cases[0].peak_bytes + (25 << 20)


def test_calls(partial):
    def score(source, *cases):
        return partial.grade(source, Problem(call_cases=tuple(CallCase(*case) for case in cases), entry="f"))

    assert score("def f(a, b=0): return (a, [b])", ((1,), {}, [1, [0]]), ((1,), {"b": 2}, [1, [2]])).fraction == 1.0
    assert score("def f(x): return {1: x}", ((2,), {}, {"1": 2})).fraction == 1.0
    assert score("def f(): return 0.1 + 0.2", ((), {}, 0.3)).fraction == 1.0
    apps = problem_from({"input_output": {"fn_name": "f", "inputs": [[2], [3]], "outputs": [[4], [9]]}}, "here")
    powers = {power: partial.grade(f"def f(x): return x ** {power}", apps).fraction for power in (1, 2)}
    assert powers == {1: 0.0, 2: 1.0} and partial.grade("def f(x): return [x * x]", apps).fraction == 1.0
    assert score("def f(): return 1e15 + 2", ((), {}, 10**15)).fraction == 0.0
    assert score("def f(): return 1", ((), {}, True)).fraction == 0.0
    assert score("def f(): return '1'", ((), {}, 1)).fraction == 0.0
    assert score("class Solution:\n    def f(self, x): return x", ((5,), {}, 5)).fraction == 1.0
    assert score("f = None", ((), {}, None)).verdict is Verdict.RUNTIME_ERROR
    missing = score("g = 1", ((), {}, None))
    assert missing.verdict is Verdict.RUNTIME_ERROR and "not defined" in missing.reason


def test_a_case_that_ends_the_process_does_not_end_the_others(partial, reward):
    source = """
import os
def f(mode):
    if mode == "exit": os._exit(0)
    if mode == "loop":
        while True: pass
    if mode == "raise": raise ValueError(mode)
    return mode
"""
    modes = ["a", "exit", "b", "loop", "raise", "c"]
    problem = Problem(call_cases=tuple(CallCase((mode,), {}, mode) for mode in modes), entry="f", time_limit=1.5)
    result = partial.grade(source, problem)
    names = [case.verdict.value for case in result.cases]
    assert names == ["passed", "early_exit", "passed", "time_limit", "runtime_error", "passed"]
    assert result.fraction == 0.5 and result.reason.startswith("case 2 of 6")
    assert len(reward.grade(source, problem).cases) == 2


def test_a_program_that_does_not_load_fails_all_calls_at_once(partial):
    problem = Problem(call_cases=tuple(CallCase((n,), {}, n) for n in range(50)), entry="f")
    result = partial.grade("def f(n) return n", problem)
    assert result.verdict is Verdict.COMPILE_ERROR and result.fraction == 0.0 and len(result.cases) == 1


def test_assertions_and_partial_credit(partial, reward):
    problem = problem_from(
        {"test_list": ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9", "assert f(4) == 16"]}, "x"
    )
    assert partial.grade("def f(x): return x * x", problem).fraction == 1.0
    result = partial.grade("def f(x): return x * x if x < 4 else 0", problem)
    assert result.fraction == 0.75 and "assert f(4) == 16" in result.reason
    assert reward.score("def f(x): return x * x if x < 4 else 0", problem).value == 0.0
    dead = partial.grade("import os\ndef f(x):\n    if x == 3: os._exit(0)\n    return x * x", problem)
    assert dead.fraction == 0.5 and dead.verdict is Verdict.EARLY_EXIT


def test_unreached_assertions_are_not_a_pass(reward, partial):
    problem = Problem(assertions=AssertBlock("", "for x in f():\n    assert x == 1\n"))
    for graded in (reward, partial):
        result = graded.grade("def f(): return []", problem)
        assert result.verdict is Verdict.WRONG_ANSWER and result.fraction == 0.0 and "no assertion" in result.reason
    constant = Problem(assertions=AssertBlock("", "assert True\nassert f() == 1"))
    assert partial.grade("def f(): return 2", constant).fraction == 0.0


def test_failing_assertions_that_end_the_tests_never_score_whole(partial):
    problem = Problem(assertions=AssertBlock("", "assert f() == 1\nx = f() / 0"))
    result = partial.grade("def f(): return 1", problem)
    assert result.verdict is Verdict.WRONG_ANSWER and 0.0 < result.fraction < 1.0


CPP = Problem(language="cpp", stream_cases=(StreamCase("3\n", "9\n"), StreamCase("4\n", "16\n")))


@pytest.mark.skipif(not os.access("/usr/bin/g++", os.X_OK), reason="g++ missing: apt-get install -y g++")
@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("std::cout << a * a;", "passed"),
        ("std::cout << a * 3;", "wrong_answer"),
        ("std::cout << b;", "compile_error"),
        ("int* p = nullptr; std::cout << *p;", "crashed"),
        ("for (;;) {}", "time_limit"),
        ("std::vector<char*> v; for (;;) { v.push_back(new char[1 << 24]()); }", "memory_limit"),
        ('for (;;) std::puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");', "output_limit"),
        ("return 3;", "runtime_error"),
    ],
)
def test_cpp(backend, body, verdict):
    limits = Limits(wall_seconds=2.0 if verdict == "time_limit" else 60.0, memory_bytes=128 << 20)
    source = (
        "#include <cstdio>\n#include <iostream>\n#include <vector>\nint main() { long a; std::cin >> a; " + body + " }"
    )
    result = CodeReward(backend, limits).grade(fenced(source, "cpp"), CPP)
    assert result.verdict.value == verdict, result.reason


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \r\n3\n\n", "1 2\n3", True),
        ("1\n2", "1 2", False),
        ("0.3000000000000001", "0.3", True),
        ("0.31", "0.3", False),
        ("1", "1.0", True),
        ("10", "1e1", True),
        ("2", "1", False),
        ("1.0", "1", True),
        ("1.5", "1", False),
        ("nan", "1.5", False),
        ("inf", "1.5", False),
        ("", "", True),
        ("x", "", False),
        ("1" * 100000 + ".0", "1.5", False),
    ],
)
def test_outputs(actual, expected, same):
    assert same_output(actual, expected) is same


# --- failures of the infrastructure ---------------------------------------------------------------------------------


class Flaky:
    """A backend that fails its first `failures` sessions, then hands over to the real one."""

    def __init__(self, backend, failures):
        self.backend, self.failures = backend, failures

    def grade(self, *arguments, **keywords):
        self.failures -= 1
        if self.failures >= 0:
            raise SandboxFailure("host out of memory")
        return self.backend.grade(*arguments, **keywords)


def test_a_failure_is_retried_once_and_never_scored(backend):
    problem = Problem(assertions=AssertBlock("", "assert f() == 1"))
    assert CodeReward(Flaky(backend, 1), Limits(wall_seconds=30.0)).score("def f(): return 1", problem).value == 1.0
    scored = CodeReward(Flaky(backend, 2)).score("def f(): return 1", problem)
    assert scored.value is None and scored.status is RewardStatus.FAILED and "host out of memory" in scored.reason


def test_tests_that_cannot_be_carried_out_are_no_verdict(reward):
    problem = Problem(assertions=AssertBlock("", "class Local: pass\nassert f(Local()) == 1"))
    scored = reward.score("def f(x): return 1", problem)
    assert scored.status is RewardStatus.FAILED and "cannot be sent" in scored.reason


def test_no_sandbox_no_reward(monkeypatch):
    monkeypatch.setattr("r1mega.sandbox.policy.shutil.which", lambda *a, **k: None)
    with pytest.raises(RewardError, match="apt-get install -y bubblewrap"):
        CodeReward()


# --- command line ---------------------------------------------------------------------------------------------------


def test_stream_keeps_the_order(reward):
    tests = ["assert f(2) == 4"]
    lines = [
        json.dumps({"prediction": f"def f(x): return x * {factor}", "test_list": tests}) + "\n"
        for factor in (2, 3, 2, 1)
    ]
    sink = io.StringIO()
    assert score_stream([*lines, "\n"], sink, reward=reward, num_workers=3) == 4
    written = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert [line["value"] for line in written] == [1.0, 0.0, 1.0, 0.0]
    assert all(line.keys() == {"value", "status", "reason"} and line["status"] == "ok" for line in written)


def test_partial_credit_is_a_switch_of_the_command(backend):
    item = {"prediction": "print(abs(int(input())))", "tests": [{"input": n, "output": n} for n in ("1", "-2", "3")]}
    for switches, value in (([], 0.0), (["--partial-credit"], 2 / 3)):
        result = CliRunner().invoke(app, ["reward", "code", *switches], input=json.dumps(item))
        assert json.loads(result.stdout)["value"] == pytest.approx(value), result.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[1]", "expected an object"),
        ('{"tests": "assert f()"}', "'prediction' must be a text"),
        ('{"prediction": "x"}', "no tests"),
        ("[" * 100000, "not JSON"),
    ],
)
def test_malformed_lines_are_named(line, message):
    good = json.dumps({"prediction": "x", "tests": "assert f()"})
    with pytest.raises(DataError, match=message) as error:
        list(read_items([good, "", line], "items.jsonl"))
    assert str(error.value).startswith("items.jsonl:3: ")
