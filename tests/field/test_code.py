"""Code rewards: faults that people met, by kind, on inputs of our own.

Reports that the kinds were modelled on: C1 LiveCodeBench/LiveCodeBench#133 and #129, NVIDIA-NeMo/Gym#2956; C5
NVIDIA-NeMo/Gym#2956. The others were found by reading what lcb_runner, APPS, TACO, rllm (DeepCoder) and open-r1 make of
their records.
"""

from __future__ import annotations

import pytest

from r1mega.errors import DataError
from r1mega.reward.code import CodeReward, read_items, same_output
from r1mega.reward.code_fences import code_in
from r1mega.reward.code_problem import CaseLimits, Problem, problem_from
from r1mega.sandbox import Limits, SandboxFailure, Verdict
from tests.field.programs import verdict

LONG = "1" + "0" * 5000


# --- C1: floating-point output, C9: blank lines -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("0.333333", "0.333333333333", True),
        ("1000000.5", "1000000.75", True),
        ("2.000000", "2", True),
        ("2", "2.0000001", True),
        ("1e-07", "0.0000001", True),
        ("1e+06", "1000000", True),
        ("Case #1: 0.333333", "Case #1: 0.33333333", True),
        ("[0.333333, (1.5)]", "[0.3333333, (1.50)]", True),
        ("-0", "0", True),
        ("-0.000", "0.0", True),
        ("0." + "3" * 200, "0.333333", True),
        ("0.33333", "0.333333333333", False),
        ("1000000.5", "1000003.5", False),
        ("2.1", "2", False),
        ("50000000000000001.0", "50000000000000000", False),
        ("1e+15", "1000000000000002", False),
        ("5000000", "5000000.5", False),
        ("011", "11", False),
        ("1e400", "1e500", False),
        ("0.5.0", "0.5", False),
        ("[0.5]", "0.5", False),
        ("\n\n7\n", "7", True),
        (" \t\n7", "7\n", True),
        ("7", "\n7\n", True),
        ("\r\n7\r\n", "7", True),
        ("1\n\n2", "1\n2", False),
        ("[" + ",".join(["0.3333333"] * 600) + "]", "[" + ",".join(["0.33333333"] * 600) + "]", True),
        ("٣", "3", False),
        ("\n", "7", False),
    ],
)
def test_outputs_as_judges_compare_them(actual, expected, same):
    assert same_output(actual, expected) is same


def test_results_of_calls_as_judges_compare_them(reward):
    def passes(value, expected):
        tests = [{"arguments": [], "expected": expected}]
        return verdict(reward, f"def f(): return {value}", tests=tests, entry_point="f") is Verdict.PASSED

    assert passes("[1 / 3, {'x': (2 / 3,)}]", [0.333333, {"x": [0.6666666]}])
    assert passes("4 / 2", 2) and not passes("1e15", 10**15 + 2) and not passes("2.1", 2)
    assert not passes("float('inf')", 3) and not passes("1 / 3", 0.3334)


# --- C4: names that the harnesses provide -------------------------------------------------------------------------------


def test_names_of_the_harnesses_are_there(reward):
    call = {"entry_point": "f", "tests": [{"arguments": [[3, 1, 1]], "expected": 14}]}
    program = """class Solution:
    def f(self, xs: Optional[List[int]]) -> int:
        heapify(xs)
        count: DefaultDict[int, int] = defaultdict(int)
        for x in xs:
            count[x] += 1
        return max(Counter(xs).values()) + math.gcd(8, 12) + reduce(add, accumulate(xs[:2])) + (5 if inf > 9 else 0)"""
    assert verdict(reward, program, **call) is Verdict.PASSED
    stream = [{"input": "2 2 3", "output": "3 5050"}]
    program = """@cache
def depth(n): return n and n + depth(n - 1)
print(len(deque(stdin.read().split())), depth(100))"""
    assert verdict(reward, program, tests=stream) is Verdict.PASSED
    program = f"'''doc'''\nfrom __future__ import annotations\nimport heapq\n{program}"
    assert verdict(reward, program, tests=stream) is Verdict.PASSED
    deep = "def depth(n): return n and 1 + depth(n - 1)\nprint(depth(5000))"
    assert verdict(reward, deep, tests=[{"input": "", "output": "5000"}]) is Verdict.PASSED
    leetcode = {"tests": {"functional": "def check(f):\n    assert f(xs=[2, 3]) == 5\n\ncheck(Solution().f)"}}
    assert (
        verdict(reward, "class Solution:\n    def f(self, xs: List[int]): return sum(xs)", **leetcode) is Verdict.PASSED
    )


def test_docstrings_and_imports_of_the_future_come_first(reward):
    for head, said in (
        ("from __future__ import (\n    annotations,\n)\n", "None"),
        ("from __future__ import annotations; x = [\n1]\n", "None"),
        ("# note\n'''doc\ntwo'''\n\nfrom __future__ import division\nfrom __future__ import annotations\n", "doc two"),
        ("'doc'; import math\n", "doc"),
        ('"""doc"""\n' + f"n = {LONG}\n", "doc"),
    ):
        program = head + "y: List[int] = []\nprint(gcd(4, 6), *str(__doc__).split())"
        assert verdict(reward, program, tests=[{"input": "", "output": f"2 {said}"}]) is Verdict.PASSED


def test_an_answers_own_names_win_and_other_forms_have_none(reward):
    program = "def gcd(a, b): return 7\nclass Counter: total = 8\nprint(gcd(2, 4), Counter.total)"
    assert verdict(reward, program, tests=[{"input": "", "output": "7 8"}]) is Verdict.PASSED
    assert "NameError" in verdict(reward, "def f(x: List[int]): return x", test_list=["assert f([1]) == [1]"])


# --- C5, C6: what the test asks for can be said -------------------------------------------------------------------------


def test_integers_of_any_length(reward):
    assert (
        verdict(reward, f"print(int(input()) + {LONG})", tests=[{"input": LONG, "output": "2" + LONG[1:]}])
        is Verdict.PASSED
    )
    line = f'{{"prediction": "x", "tests": [{{"arguments": [{LONG}], "expected": {LONG}1}}], "entry_point": "f"}}'
    ((_, problem),) = read_items([line], "items.jsonl")
    assert reward.grade("def f(n): return int(str(n) + '1')", problem).verdict is Verdict.PASSED
    assert reward.grade("def f(n): return n * 10", problem).verdict is Verdict.WRONG_ANSWER
    tests = f"assert str(f()) == '{LONG}'\nassert f() == {LONG}"
    assert verdict(reward, "def f(): return 10**5000", tests=tests) is Verdict.PASSED


def test_the_output_limit_follows_the_test(reward):
    small = CodeReward(reward.backend, Limits(wall_seconds=30.0, output_bytes=1000, message_bytes=1000))
    text = "x" * 200_000
    assert verdict(small, "print('x' * 200000)", tests=[{"input": "", "output": text}]) is Verdict.PASSED
    call = {"tests": [{"arguments": [], "expected": [1] * 100_000}], "entry_point": "f"}
    assert verdict(small, "def f(): return [1] * 100000", **call) is Verdict.PASSED
    floats = {"tests": [{"input": "", "output": "0.333333\n" * 20_000}]}
    assert verdict(small, "for _ in range(20000): print(format(1 / 3, '.30f'))", **floats) is Verdict.PASSED
    endless = "while True: print('x' * 1000)"
    assert verdict(small, endless, tests=[{"input": "", "output": text}]) is Verdict.OUTPUT_LIMIT


def test_limits_follow_the_task_and_the_test(reward):
    tests = [{"input": "", "output": "1", "time_limit": "500 ms", "memory_limit_mb": 64}, {"input": "", "output": "1"}]
    problem = problem_from({"tests": tests, "time_limit": "2.5 seconds", "memory_limit": "256.0 megabytes"}, "x")
    assert problem.stream_cases[0].limits == CaseLimits(0.5, 64 << 20)
    assert (problem.time_limit, problem.memory_bytes) == (2.5, 256 << 20)
    assert problem_from({"tests": tests, "time_limit": {"seconds": 1, "nanos": 500000000}}, "x").time_limit == 1.5
    used = []

    class Recording:
        def run_cases(self, language, source, inputs, limits):
            used.append((len(inputs), limits.wall_seconds, limits.cpu_seconds))
            return reward.backend.run_cases(language, source, inputs, limits)

    tests = [{"input": n, "output": n, "time_limit": seconds} for n, seconds in (("1", 40), ("2", 50.5), ("3", 50.5))]
    recording = CodeReward(Recording(), Limits(wall_seconds=30.0))
    assert recording.grade("print(input())", problem_from({"tests": tests}, "x")).verdict is Verdict.PASSED
    assert used == [(1, 40, 41), (2, 50.5, 52)]


def test_asserts_that_nobody_calls_are_called(reward):
    """Without check(candidate), and as functions for pytest: an answer was blamed for what never ran."""
    for record in (
        {"test": "assert f(2) == 4", "entry_point": "f", "prompt": ""},
        {
            "tests": "from solution import f\n\ndef test_two():\n    assert f(2) == 4\n\ndef test_three():\n    assert f(3) == 6"
        },
        {"tests": "from solution import (\n    f as h,\n)\n\ndef test_two() -> None:\n    assert h(2) == 4"},
        {"tests": "def test_two(n=2):\n    from solution import f\n    assert f(n) == 4"},
        {"tests": {"functional": "def check(g):\n    assert g(2) == 4"}, "entry_point": "f"},
    ):
        assert verdict(reward, "def f(x): return 2 * x", **record) is Verdict.PASSED
        assert verdict(reward, "def f(x): return x", **record) is Verdict.WRONG_ANSWER


# --- C8: fences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response",
    [
        "1. Solution:\n\n   ```python\n   if 1:\n       print(2)\n   ```\n",
        "- a\n  - b\n\n    ```python\n    if 1:\n        print(2)\n    ```\n- c",
        "1. ```python\n   if 1:\n       print(2)\n   ```",
        "\t```python\n\tif 1:\n\t    print(2)\n\t```",
        "> So:\n> ```python\n> if 1:\n>     print(2)\n> ```\n",
        "   ~~~~py\n   if 1:\n       print(2)\n   ~~~~~\n",
        "   ```python\n   if 1:\n\n       print(2)\n\n   ```",
        "   ```python\nif 1:\n    print(2)\n```",
        "Solution: ```python\nif 1:\n    print(2)\n```",
        "- ```python\n      if 1:\n          print(2)\n  ```",
    ],
)
def test_a_block_in_a_list_item_loses_its_indentation(response):
    code = Problem().program(code_in(response)).partition("\n")[2]
    assert [line for line in code.split("\n") if line.strip()] == ["if 1:", "    print(2)"]


def test_texts_in_a_block_lose_only_white_space():
    assert code_in('   ```python\n   s = """a\nb"""\n   print(s)\n   ```') == 's = """a\nb"""\nprint(s)'
    assert code_in("Run `x` or ```text\nand\n```python\na = 1\n```") == "a = 1"


def test_a_completion_keeps_its_indentation():
    assert code_in("```python\n    return 1\n```") == "    return 1"


# --- checkers -----------------------------------------------------------------------------------------------------------

CHECKER = """
import sys
given, right, answer = (open(path).read().split() for path in sys.argv[1:4])
print(int(len(right) == len(answer) and sum(map(int, answer)) == int(given[0])))
"""


def test_a_checker_decides_where_several_outputs_are_right(reward):
    record = {"official_tests": [{"input": "9\n", "output": "4 5\n"}], "generated_checker": CHECKER}
    assert verdict(reward, "print(2, 7)", **record) is Verdict.PASSED
    assert verdict(reward, "print(2, 8)", **record) is Verdict.WRONG_ANSWER
    assert verdict(reward, "print('two', 7)", **record) is Verdict.WRONG_ANSWER
    assert verdict(reward, "print(2, 7)", **(record | {"generated_checker": "print(0)"})) is Verdict.WRONG_ANSWER


def test_an_answer_cannot_break_a_good_checker_and_a_bad_one_blames_no_answer(reward):
    tests = [{"input": "", "output": "[4, 5]"}]
    evaluates = "import ast, sys\nprint(int(sum(ast.literal_eval(open(sys.argv[3]).read())) == 9))"
    record = {"tests": tests, "checker": evaluates}
    assert verdict(reward, "print([2, 7])", **record) is Verdict.PASSED
    assert verdict(reward, "print('(')", **record) is Verdict.WRONG_ANSWER
    with pytest.raises(SandboxFailure, match=r"(?s)fails on the expected output as well.*numpyx"):
        verdict(reward, "print([2, 7])", tests=tests, checker="import numpyx\nprint(1)")


@pytest.mark.parametrize(
    ("checker", "message"),
    [
        ('#include "testlib.h"\nint main() {}', r"the checker is C\+\+"),
        ("// compares\nusing namespace std;\nint main(int argc, char **argv) {}", r"the checker is C\+\+"),
        ("#include <bits/stdc++.h>", r"the checker is C\+\+"),
        ("wcmp", "the checker 'wcmp' is no program"),
        ("false", "the checker 'false' is no program"),
        ("'std::ncmp'", "is no program"),
    ],
)
def test_checkers_that_cannot_run_are_refused_before(checker, message):
    with pytest.raises(DataError, match=f"f:3: .*{message}"):
        problem_from({"tests": [{"input": "1", "output": "1"}], "checker": checker}, "f:3")


def test_a_checker_that_says_no_number_blames_no_answer(reward):
    tests = [{"input": "9\n", "output": "4 5\n"}]
    for checker in ("def check(*paths):\n    return True", "print('ok')", "print('1\\n1')"):
        with pytest.raises(SandboxFailure, match="no number"):
            verdict(reward, "print(2, 7)", tests=tests, checker=checker)


# --- tests as pytest has them ---------------------------------------------------------------------------------------------

IDENTITY = "def f(x):\n    return x"


@pytest.mark.parametrize(
    ("tests", "passing", "failing"),
    [
        ("class TestF:\n    def test_a(self):\n        assert f(1) == 1\n    def test_b(self):\n        assert f(2) == 2", IDENTITY, "def f(x): return 1"),
        ("class TestF:\n    def setup_method(self):\n        self.n = 3\n    def test_a(self):\n        assert f(self.n) == 3", IDENTITY, "def f(x): return 1"),
        ("class TestF(object):\n    N = 2\n    def test_a(self):\n        assert f(self.N) == 2", IDENTITY, "def f(x): return 1"),
        ("import pytest\n\ndef test_a():\n    assert f(1) == 1", IDENTITY, "def f(x): return 2"),
    ],
)  # fmt: skip
def test_classes_of_tests_are_run_as_pytest_runs_them(reward, tests, passing, failing):
    assert verdict(reward, passing, tests=tests) is Verdict.PASSED
    assert verdict(reward, failing, tests=tests) is Verdict.WRONG_ANSWER


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(1), 1)", "class T needs .*unittest.TestCase"),
        ("class T:\n    def __init__(self):\n        pass\n    def test_a(self):\n        assert f(1) == 1", "class T needs .*__init__"),
        ("class T:\n    def test_a(self, tmp_path):\n        assert f(1) == 1", "class T needs .*test_a"),
        ("import pytest\ndef test_a():\n    with pytest.raises(ValueError):\n        assert f(1)", "use pytest.raises, which is not there"),
        ("from pytest import approx\nassert f(1) == approx(1)", "use from pytest, which is not there"),
    ],
)  # fmt: skip
def test_what_needs_pytest_or_unittest_is_refused_by_name(tests, message):
    with pytest.raises(DataError, match=f"f:3: .*{message}"):
        problem_from({"tests": tests}, "f:3")


def test_tests_that_import_what_is_not_there_blame_no_answer(reward):
    for name in ("numpyx", "hypothesisx.strategies", "pandasx"):
        with pytest.raises(SandboxFailure, match="cannot be carried out: ModuleNotFoundError"):
            verdict(reward, IDENTITY, tests=f"import {name}\nassert f(1) == 1")
    assert "ModuleNotFoundError" in verdict(reward, "def f(x):\n    import numpyx", tests="assert f(1) == 1")


# --- LeetCode's nodes -----------------------------------------------------------------------------------------------------

REVERSED = """def f(self, head):
        before = None
        while head:
            head.next, before, head = before, head, head.next
        return before"""


@pytest.mark.parametrize(
    ("head", "body", "cases"),
    [
        ("head: Optional[ListNode]) -> Optional[ListNode]", REVERSED, [([[1, 2, 3]], [3, 2, 1]), ([[]], []), ([[]], None)]),
        ("a: ListNode, k: int) -> ListNode", "def f(self, a, k): return a and ListNode(a.val * k, a.next)", [([[1, 2], 3], [3, 2])]),
        ("lists: List[Optional[ListNode]]) -> List[int]", "def f(self, lists): return [one.val for one in lists if one]", [([[[1, 5], [2], []]], [1, 2])]),
        ("root: Optional[TreeNode]) -> int", "def f(self, root): return 1 + max(self.f(root.left), self.f(root.right)) if root else 0", [([[3, 9, 20, None, None, 15]], 3)]),
        (
            "root: 'TreeNode | None') -> 'TreeNode | None'",
            "def f(self, root): return root and TreeNode(root.val, self.f(root.right), self.f(root.left))",
            [([[1, 2, 3, None, 4]], [1, 3, 2, None, None, 4]), ([[]], [])],
        ),
        ("n: int) -> List[Optional[TreeNode]]", "def f(self, n): return [TreeNode(n), None, TreeNode(0, None, TreeNode(n))]", [([4], [[4], [], [0, None, 4]])]),
    ],
)  # fmt: skip
def test_lists_are_nodes_where_the_starter_code_has_them(reward, head, body, cases):
    starter = f"# class ListNode: ...\nclass Solution:\n    def f(self, {head}:\n        "
    record = {"starter_code": starter, "entry_point": "f"}
    record["tests"] = [{"arguments": arguments, "expected": expected} for arguments, expected in cases]
    assert verdict(reward, f"class Solution:\n    {body}", **record) is Verdict.PASSED
    record["tests"][0]["expected"] = [7, 7]
    assert verdict(reward, f"class Solution:\n    {body}", **record) is Verdict.WRONG_ANSWER


def test_nodes_that_go_round_are_wrong_and_answers_may_bring_their_own(reward):
    starter = "class Solution:\n    def f(self, head: ListNode) -> ListNode:\n"
    record = {"starter_code": starter, "entry_point": "f", "tests": [{"arguments": [[1, 2]], "expected": [1, 2]}]}
    own = "class ListNode:\n    def __init__(self, x):\n        self.val, self.next = x, None\n"
    assert verdict(reward, own + "class Solution:\n    def f(self, head): return head", **record) is Verdict.PASSED
    round_ = "class Solution:\n    def f(self, head):\n        head.next.next = head\n        return head"
    assert verdict(reward, round_, **record) is Verdict.WRONG_ANSWER
    with pytest.raises(DataError, match="f changes its nodes in place"):
        problem_from(record | {"starter_code": "def f(head: ListNode) -> None: ..."}, "here")
