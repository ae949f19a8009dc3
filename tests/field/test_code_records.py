"""Tasks for programs in the forms that others have them in: what is read, what is refused before anything runs.

The kinds are those of test_code.py.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import sys
import zlib

import pytest

from r1mega.errors import DataError
from r1mega.reward.code import read_items, score_stream
from r1mega.reward.code_problem import CallCase, StreamCase, problem_from
from r1mega.sandbox import Verdict
from tests.field.programs import verdict

# --- C2, C3: LiveCodeBench's input_output and rows; keys of a test that say how it is run -------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"input_output": json.dumps({"fn_name": "f", "inputs": ['[1, 2]\n"a b"\n'], "outputs": ['{"k": null}']})},
        {"tests": [{"input": '[1, 2]\n"a b"', "output": '{"k": null}', "testtype": "functional"}], "entry_point": "f"},
        {"tests": [{"input": '[1, 2]\n"a b"', "output": '{"k": null}', "metadata": {"func_name": "f"}}]},
        {"tests": {"fn_name": "f", "inputs": [[[1, 2], "a b"]], "outputs": [{"k": None}]}},
        {"tests": [{"type": "function_call", "fn_name": "f", "input": [[1, 2], "a b"], "output": {"k": None}}]},
        {"tests": [{"arguments": [[1, 2], "a b"], "expected": {"k": None}}], "entry_point": "Solution().f"},
        {
            "public_test_cases": json.dumps([{"input": '[1, 2]\n"a b"', "output": '{"k": null}', "testtype": "functional"}]),
            "metadata": '{"func_name": "f"}',
        },
    ],
)  # fmt: skip
def test_forms_of_calls(record):
    problem = problem_from(record, "here")
    assert problem.call_cases == (CallCase(([1, 2], "a b"), {}, {"k": None}),) and problem.entry == "f"


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(value)))).decode()


@pytest.mark.parametrize(
    "record",
    [
        {"input_output": {"fn_name": None, "inputs": ["3\n", ["4", "5"]], "outputs": ["7", 9]}},
        {"tests": [{"input": "3\n", "output": "7", "type": "stdin_stdout"}, {"input": "4\n5", "output": "9", "testtype": "stdin"}]},
        {
            "public_test_cases": '[{"input": "3\\n", "output": "7", "testtype": "stdin"}]',
            "private_test_cases": packed([{"input": "4\n5", "output": "9", "testtype": "stdin"}]),
        },
        {"public_tests": {"input": ["3\n"], "output": ["7"]}, "private_tests": {"input": ["4\n5"], "output": ["9"]}},
        {"official_tests": [{"input": "3\n", "output": "7"}, {"input": "4\n5", "output": "9"}], "generated_tests": 17},
    ],
)  # fmt: skip
def test_forms_of_streams(record):
    assert problem_from(record, "here").stream_cases == (StreamCase("3\n", "7"), StreamCase("4\n5", "9"))


def test_apps_keys_are_integers_and_its_results_stand_in_a_list(reward):
    record = {"input_output": {"fn_name": "f", "inputs": [[{"1": 2, "-3": 4}]], "outputs": [[6]]}}
    assert problem_from(record, "x").call_cases[0].arguments == ({1: 2, -3: 4},)
    assert verdict(reward, "def f(d): return sum(d[k] for k in (1, -3))", **record) is Verdict.PASSED


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"testtype": "interactive"}, "type 'interactive' is not known; use 'functional' or 'stdin'"),
        ({"checker": "print(1)"}, "checker would be ignored"),
        ({"testtype": "functional"}, "need 'entry_point'"),
        ({"fn_name": 5}, "fn_name must be a text"),
        ({"testtype": "stdin", "type": "functional"}, "contradict each other"),
        ({"arguments": [3], "expected": 7}, "'arguments' and 'input'"),
        *(({key: 1}, f"{key} would be ignored") for key in ("timeout", "stdin", "files", "exit_code", "truncated")),
    ],
)
def test_keys_of_a_test_are_never_ignored(test, message):
    with pytest.raises(DataError, match=message):
        problem_from({"tests": [{"input": "3", "output": "7", **test}]}, "here")


def test_keys_that_describe_a_test_are_of_no_effect():
    keys = "weight points score comment test_id uid _id idx order group tag source difficulty is_sample visibility size"
    test = {"input": "3", "expected_output": "7", **dict.fromkeys(keys.split(), 1), "type": "STDIN"}
    for tests in ([test], {"input": ["3"], "output": ["7"]}):
        assert problem_from({"tests": tests}, "here").stream_cases == (StreamCase("3", "7"),)


def test_a_record_with_an_entry_point_may_still_read_standard_input():
    record = {"tests": [{"input": "3", "output": "4"}], "entry_point": "main"}
    assert problem_from(record, "here").stream_cases == (StreamCase("3", "4"),)
    called = problem_from(record | {"testtype": "Functional", "entry_point": "Solution.f"}, "here")
    assert called.call_cases == (CallCase((3,), {}, 4),) and called.entry == "f"
    with pytest.raises(DataError, match="Add 'testtype': 'functional', or 'stdin'"):
        problem_from(record | {"tests": [{"input": [3], "output": 4}]}, "here")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"testtype": "functional"}, "need 'entry_point'"),
        ({"testtype": "functional", "entry_point": "a b"}, "no name of a function"),
        ({"fn_name": "class"}, "no name of a function"),
        ({"interactive": True}, "interactive tasks"),
        ({"input_file": "in.txt"}, "tasks that read files"),
        ({"tests": [{"arguments": [1], "expected": 1, "type": "stdin"}], "entry_point": "f"}, "reads standard input"),
        ({"tests": "def check(f): assert f()"}, r"check\(\) is never called"),
        ({"tests": "import solution\ndef test_a(): assert solution.f()"}, "write 'from solution import'"),
        ({"tests": "def test_a(tmp_path): assert f()"}, "takes arguments"),
    ],
)
def test_records_that_would_blame_an_answer_are_refused(record, message):
    with pytest.raises(DataError, match=message):
        problem_from({"tests": [{"input": "3", "output": "7"}], **record}, "here")


def test_a_task_has_one_kind_of_tests():
    tests = [{"input": "3", "output": "7", "testtype": kind} for kind in ("stdin", "functional")]
    with pytest.raises(DataError, match="some tests are function calls"):
        problem_from({"tests": tests, "entry_point": "f"}, "here")


# --- C7: malformed records ----------------------------------------------------------------------------------------------

DEEP = json.loads("[" * 450 + "]" * 450)


@pytest.mark.parametrize(
    "record",
    [
        {"input_output": {"fn_name": "f", "inputs": [int("9" * 4000) ** 2], "outputs": [5]}},
        {"tests": [int("9" * 4000) ** 2]},
        *({"tests": "assert f()", key: int("9" * 4000) ** 2} for key in ("time_limit", "language", "prediction")),
        {"test": "assert f()", "entry_point": int("9" * 4000) ** 2},
        {"tests": "assert f()", "language": ["python"]},
        {"tests": [{"input": "1", "output": "1"}], "checker": " # none"},
        {"input_output": {"fn_name": "f", "inputs": [5], "outputs": [5]}},
        {"input_output": {"fn_name": "f", "inputs": ["x y"], "outputs": ["1"]}},
        {"input_output": {"fn_name": "f", "inputs": ["1"], "outputs": ["x"]}},
        {"input_output": {"fn_name": 5, "inputs": [[5]], "outputs": [5]}},
        {"input_output": {"inputs": 5, "outputs": "x"}},
        {"input_output": {"inputs": [None], "outputs": [None]}},
        {"input_output": {"inputs": [{"a": 1}], "outputs": ["x"]}},
        {"input_output": "[" * 100_000},
        {"input_output": {"fn_name": "f", "inputs": [DEEP], "outputs": ["x"]}},
        {"input_output": ""},
        {"tests": [5]},
        {"tests": [{"input": "1", "output": "1"}, None]},
        {"tests": {"a": 1}},
        {"tests": 5},
        {"tests": [{"arguments": 5, "expected": 5}], "entry_point": "f"},
        {"tests": [{"arguments": [], "expected": 5, "keywords": [1]}], "entry_point": "f"},
        {"tests": "assert f( == 1"},
        {"tests": [{"input": "1", "output": "1"}], "checker": "def"},
        {"tests": [{"input": "1", "output": "1"}], "checker": 5},
        {"tests": [{"input": "1", "output": "1"}], "time_limit": "soon"},
        {"tests": [{"input": "1", "output": "1"}], "interaction_format": "ask"},
        {"test": "def check(f): assert f()", "entry_point": "f", "prompt": 5},
        {"test": "def check(f): assert f()", "entry_point": 5},
        {"test_list": ["assert f()"], "test_imports": 5},
        {"test_list": ["assert f()"], "test_setup_code": 5},
        {"test_list": {"a": 1}},
        {"private_test_cases": "nonsense"},
        {"official_tests": {"a": 1}},
        {"public_tests": {"input": ["1"], "output": []}},
    ],
)
def test_malformed_records_are_named_before_anything_runs(record):
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    lines = [json.dumps({"prediction": "x", "tests": "assert f()"}), json.dumps({"prediction": "x", **record})]
    sys.set_int_max_str_digits(limit)
    with pytest.raises(DataError, match=r"^items\.jsonl:2: "):
        list(read_items(lines, "items.jsonl"))


def test_bytes_that_are_no_text_and_marks_of_order():
    good = json.dumps({"prediction": "x", "tests": "assert f()"})
    assert len(list(read_items(["\ufeff" + good], "x"))) == 1
    with pytest.raises(DataError, match=r"^x:2: not JSON"):
        list(read_items([good, good.replace("x", b"\xff".decode(errors="surrogateescape"))], "x"))


def test_an_answer_that_says_half_a_character_does_not_end_the_command(reward):
    tests = [{"arguments": [], "expected": 1}]
    item = {"prediction": "def f(): raise ValueError(chr(0xd800))", "tests": tests, "entry_point": "f"}
    sink = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    score_stream([json.dumps(item)], sink, reward=reward)
    sink.flush()
    assert json.loads(sink.buffer.getvalue())["value"] == 0.0


# --- C10: tests in a text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tests",
    [
        '[{"input": "3", "output": "4"}]',
        json.dumps('[{"input": "3", "output": "4"}]'),
        "[{'input': '3', 'output': '4'}]",
        ['{"input": "3", "output": "4"}'],
        ' {"inputs": ["3"], "outputs": ["4"]}',
        '\ufeff[{"input": "3", "output": "4"}]',
    ],
)
def test_tests_in_a_text(tests):
    assert problem_from({"tests": tests}, "here").stream_cases == (StreamCase("3", "4"),)


def test_rows_as_python_literals_and_limits_as_tables_have_them():
    rows = "[{'input': '3', 'output': '4', 'testtype': 'stdin'}]"
    for key in ("public_test_cases", "official_tests"):
        assert problem_from({key: rows}, "here").stream_cases == (StreamCase("3", "4"),)
    tests = [{"input": "3", "output": "4"}]
    for said, limit in (("", None), ("None", None), ('{"seconds": 2}', 2.0), ("1.5 seconds per test", 1.5)):
        assert problem_from({"tests": tests, "time_limit": said}, "here").time_limit == limit


def test_blank_lines_between_arguments():
    record = {"input_output": {"fn_name": "f", "inputs": ["1\n\n2\n"], "outputs": ["3"]}}
    assert problem_from(record, "here").call_cases[0].arguments == (1, 2)


def test_asserts_in_a_text():
    for record in (
        {"tests": '["assert f(1)"]'},
        {"test_list": '["assert f(1)"]'},
        {"tests": '{"functional": "assert f(1)"}'},
    ):
        assert problem_from(record, "here").assertions.tests.strip() == "assert f(1)"
