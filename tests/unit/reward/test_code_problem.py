"""A program in a response, and the records that say by which tests it is judged."""

from __future__ import annotations

import json

import pytest

from r1mega.errors import DataError
from r1mega.reward.code_fences import code_in
from r1mega.reward.code_problem import AssertBlock, CallCase, Problem, StreamCase, problem_from
from tests.unit.reward.test_code import fenced

# --- the program in a response --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (fenced("print(1)"), "print(1)"),
        ("```python\na = 1\n```\nbetter:\n```python\na = 2\n```", "a = 2"),
        ("```python\na = 1\n```\noutput:\n```text\n1\n```", "a = 1"),
        ("```\na = 1\n```", "a = 1"),
        ("<think>```python\nx\n```</think><answer>```py\na = 1\n```</answer>", "a = 1"),
        ("<think>x</think> <answer>a = 1</answer>", "a = 1"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("```python\r\na = 1\r\nb = 2\r\n```", "a = 1\nb = 2"),
        ("```python\na = 1", "a = 1"),
        ("    return 1\n", "    return 1"),
        ("<think>```python\na = 1\n```</think>", None),
        ("", None),
        ("```python\n\n```", None),
    ],
)
def test_program_of_a_response(response, expected):
    assert code_in(response) == expected


def test_language_picks_the_block():
    text = "```python\nprint(1)\n```\n```cpp\nint main() {}\n```\n"
    assert code_in(text) == "print(1)" and code_in(text, "cpp") == "int main() {}"


def test_completions_continue_the_prompt_and_programs_follow_it():
    problem = Problem(
        prefix='import math\ndef f(x):\n    """doc"""\n', assertions=AssertBlock("", "assert f(1)"), entry="f"
    )
    for code in ("    return math.pi * x", "def f(x):\n    return math.pi * x"):
        namespace = {}
        exec(problem.program(code), namespace)
        assert namespace["f"](2) == pytest.approx(6.283185307)
    assert problem.program("from __future__ import annotations\n").startswith("from __future__")


# --- records --------------------------------------------------------------------------------------------------------


def test_forms_of_tests():
    streams = (StreamCase("1\n2", "3"),)
    assert problem_from({"tests": [{"input": "1\n2", "output": "3"}]}, "x").stream_cases == streams
    assert (
        problem_from({"input_output": json.dumps({"inputs": [["1", "2"]], "outputs": [["3"]]})}, "x").stream_cases
        == streams
    )
    calls = (CallCase((1, [2]), {}, 3),)
    assert (
        problem_from({"input_output": {"inputs": [[1, [2]]], "outputs": [3], "fn_name": "f"}}, "x").call_cases == calls
    )
    assert (
        problem_from({"tests": [{"arguments": [1, [2]], "expected": 3}], "entry_point": "f"}, "x").call_cases == calls
    )
    assert problem_from({"tests": "assert f(1)"}, "x").assertions.tests == "assert f(1)"
    limited = problem_from({"tests": "assert f(1)", "time_limit": 2, "memory_limit_mb": 64, "language": "py"}, "x")
    assert (limited.time_limit, limited.memory_bytes, limited.language) == (2.0, 64 << 20, "python")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "no tests"),
        ({"tests": []}, "no tests"),
        ({"test_list": ["f(1)"]}, "assert nothing"),
        ({"test_list": []}, "non-empty"),
        ({"tests": [{"input": "1"}]}, "must all be"),
        ({"tests": [{"arguments": [], "expected": 1}]}, "entry_point"),
        ({"tests": "assert f()", "language": "cobol"}, "cobol"),
        ({"tests": "assert f()", "language": "cpp"}, "standard input"),
        ({"tests": "assert f()", "time_limit": -1}, "time_limit"),
        ({"input_output": {"inputs": [1], "outputs": []}}, "1 inputs and 0 outputs"),
        ({"input_output": "{"}, "input_output"),
    ],
)
def test_unusable_records_are_named(record, message):
    with pytest.raises(DataError, match=message) as error:
        problem_from(record, "items.jsonl:7")
    assert str(error.value).startswith("items.jsonl:7: ")
