"""What a code task asks for, from one record of a data file.

Records, by their keys (as they are published, or as the harnesses of these sets pass them on):
    prompt, test, entry_point             HumanEval, LeetCode: the test defines check(candidate)
    test_list [, test_setup_code, test_imports]   MBPP: assert statements
    input_output: {"inputs", "outputs" [, "fn_name"]}   APPS, TACO: arguments are lists; lcb_runner: JSON, a line each
    public_test_cases, private_test_cases [, metadata: {"func_name"}]   LiveCodeBench's rows
    official_tests [, generated_checker]  Codeforces of open-r1; public_tests, private_tests: of code_contests
    tests: text or list of texts; {"functional": text}   assert statements, functions of KodCode
    tests: [{"input", "output" [, "testtype" or "type", "fn_name", "metadata"]}]   streams, or calls where it says so
    tests: {"inputs", "outputs" [, "fn_name"]}    as input_output
    tests: [{"arguments", "expected" [, "keywords"]}], entry_point   function calls
Any of these may be JSON (or a Python literal) in a text. Optional: language ("python" | "cpp"), time_limit (seconds a
case), memory_limit_mb (memory_limit, memory_limit_bytes), both also of a single test; checker (code_checker.py);
starter_code, whose ListNode and TreeNode are made of lists.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from r1mega.errors import DataError
from r1mega.reward.code_asserts import runnable_tests
from r1mega.reward.code_fences import LANGUAGES, outdented
from r1mega.reward.code_names import Nodes, nodes_of, with_names
from r1mega.reward.code_values import (
    arguments_of,
    as_data,
    as_text,
    is_given,
    json_value,
    megabytes,
    packed_tests,
    python_source,
    seconds,
    shown,
)  # fmt: skip
from r1mega.sandbox.inside.wire import MAX_DEPTH, Unsendable, encode
from r1mega.sandbox.policy import Language

_FUNCTION = re.compile(r"(?:[^\W\d]\w*(?:\(\))?\.)*[^\W\d]\w*")
FORMS = "'test' with 'entry_point' (HumanEval), 'test_list' (MBPP), 'tests', 'input_output' or 'public_test_cases'"
_ROWS = (
    ("public_test_cases", "private_test_cases"),
    ("official_tests",),
    ("public_tests", "private_tests", "generated_tests"),
)
_CPP = re.compile(r"^\s*#\s*include\b|\bint\s+main\s*\(|\busing\s+namespace\b", re.MULTILINE)
_MOST_NESTED = 200
_CALLS = ("functional", "function_call", "function", "call_based")
_STREAMS = ("stdin", "stdin_stdout", "stdio", "standard_input")
_LIMITS = ("time_limit", "memory_limit_mb", "memory_limit", "memory_limit_bytes")
_READ = {
    "input",
    "output",
    "arguments",
    "expected",
    "keywords",
    "testtype",
    "type",
    "fn_name",
    "entry_point",
    "metadata",
    *_LIMITS,
}
_OF_NO_EFFECT = set(
    "id _id uid idx index order test_id test_case_id name description explanation comment group tag source difficulty "
    "is_public public hidden is_hidden is_private visibility sample is_sample is_example weight points score size".split()
)


@dataclass(frozen=True, slots=True)
class CaseLimits:
    """Seconds and bytes that one test may take; None: what its task says, or else the reward."""

    time_limit: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StreamCase:
    """Standard input and the standard output that is expected for it."""

    stdin: str
    stdout: str
    limits: CaseLimits = CaseLimits()


@dataclass(frozen=True, slots=True)
class CallCase:
    """Arguments of one call and the value expected (as JSON holds them). wrapped: the only item of `expected` will do
    as well (APPS puts most results into a list of their own, and accepts either).
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    expected: Any
    wrapped: bool = False
    limits: CaseLimits = CaseLimits()


@dataclass(frozen=True, slots=True)
class AssertBlock:
    """context: trusted code that runs before the tests (a prompt's imports and helpers); tests: statements with
    asserts."""

    context: str
    tests: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One task. Exactly one of the three kinds of tests is there. prefix: what a completion continues.

    entry: the function under test (None: taken from the asserts). limits: of each case, None for the defaults of the
    reward. nodes: what of a call LeetCode's nodes are (code_names.nodes_of). checker: Python that judges an output where several are right (code_checker.py).
    """

    language: Language = "python"
    stream_cases: tuple[StreamCase, ...] = ()
    call_cases: tuple[CallCase, ...] = ()
    assertions: AssertBlock | None = None
    entry: str | None = None
    prefix: str = ""
    time_limit: float | None = None
    memory_bytes: int | None = None
    checker: str | None = None
    nodes: Nodes | None = None

    def program(self, code: str) -> str:
        """The whole source: a completion (first line indented) continues the prefix, a full program follows it; without a
        prefix it is no completion, and loses what its first line is indented. Before
        streams, calls and methods of `Solution` stands what their judges import; HumanEval and MBPP import nothing.
        """
        if self.prefix and not re.search(r"^from __future__ ", code, re.MULTILINE):
            first = next((line for line in code.splitlines() if line.strip()), "")
            code = self.prefix + ("" if first[:1] in " \t" else "\n\n") + code
        if not self.prefix and self.language == "python":
            code = outdented(code)
        if self.language != "python" or (self.assertions and not re.search(r"\bSolution\b", self.assertions.tests)):
            return code
        return with_names(code, self.nodes)


def problem_from(record: Mapping[str, object], where: str) -> Problem:
    """Raises DataError with `where` (file:line) when the record has no usable tests, or says what is not done here."""
    language = record.get("language") or "python"
    told = language.lower() if isinstance(language, str) else None
    known = next((name for name, labels in LANGUAGES.items() if told in labels), None)
    if known is None:
        raise DataError(f"{where}: language {shown(language)} is not supported; use 'python' or 'cpp'")
    files = [record.get(key) for key in ("input_file", "output_file")]
    if (
        any(record.get(key) not in (None, False, "") for key in ("interactive", "interaction_format"))
        or record.get("input_mode") not in (None, "stdio")
        or any(file not in (None, "", "stdin", "stdout", "standard input", "standard output") for file in files)
    ):
        raise DataError(f"{where}: interactive tasks, and tasks that read files, are not supported; leave the line out")
    limits = _limits(record, where)
    problem = _tests(record, where, _asked(record, where))
    problem = replace(problem, language=known, time_limit=limits.time_limit, memory_bytes=limits.memory_bytes)
    if problem.call_cases and isinstance(starter := record.get("starter_code"), str):
        try:
            nodes = nodes_of(starter, str(problem.entry).rpartition(".")[2])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        problem = replace(problem, nodes=nodes)
    checker = next((record[key] for key in ("checker", "generated_checker") if record.get(key) is not None), None)
    if checker is not None:
        if not problem.stream_cases:
            raise DataError(f"{where}: a checker is for tests of standard input and output")
        source = _checker(checker, where)
        problem = replace(problem, checker=source)
    if problem.language == "cpp" and not problem.stream_cases:
        raise DataError(
            f"{where}: C++ is tested by standard input and output only; give 'tests' of 'input' and 'output'"
        )
    return problem


def _checker(value: object, where: str) -> str:
    if isinstance(value, str) and _CPP.search(value):
        raise DataError(f"{where}: the checker is C++; a Python program is wanted. Leave the line out, or translate it")
    source = python_source(value, f"{where}: checker")
    body = ast.parse(source).body
    if not body:
        raise DataError(f"{where}: the checker is empty; leave the key out where there is none")
    if (
        len(body) == 1
        and isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, (ast.Name, ast.Constant, ast.Attribute))
    ):
        raise DataError(f"{where}: the checker {shown(value)} is no program; give its source, or leave the line out")
    return source


class _Asked(NamedTuple):
    """How a record, its columns or a test say that it is run, and the function that is called."""

    kind: Literal["call", "stream"] | None = None
    name: str | None = None


def _asked(values: Mapping[str, object], where: str, outer: _Asked | None = None) -> _Asked:
    """What these values say, or else the `outer` ones. Without a type, what names a function is a call, except for a
    record's `entry_point`: many have one that read standard input. LiveCodeBench has the name in the metadata.
    """
    metadata = as_data(values.get("metadata"))
    names = {"entry_point": values.get("entry_point"), "fn_name": values.get("fn_name")}
    if isinstance(metadata, Mapping):
        names["metadata.func_name"] = metadata.get("func_name")
    for key, value in names.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {key} must be a text, found {shown(value)}")
    calls = [name for key, name in names.items() if name and (outer or key != "entry_point")]
    kinds = {_type(values[key], where) for key in (("testtype", "type") if outer else ("testtype",)) if values.get(key)}
    if len(kinds) > 1:
        raise DataError(f"{where}: testtype and type contradict each other; leave one out")
    outer = outer or _Asked()
    kind = next(iter(kinds), None) or ("call" if calls else outer.kind)
    return _Asked(kind, next((str(name) for name in names.values() if name), outer.name))


def _type(said: object, where: str) -> Literal["call", "stream"]:
    told = said.lower() if isinstance(said, str) else None
    if told in _CALLS or told in _STREAMS:
        return "call" if told in _CALLS else "stream"
    raise DataError(f"{where}: type {shown(said)} is not known; use {_CALLS[0]!r} or {_STREAMS[0]!r}")


def _function(name: str, where: str) -> str:
    """The name, or the method of a new `Solution`. Raises DataError for what no program can define."""
    name = re.sub(r"^Solution(\(\))?\.", "Solution().", name)
    if not _FUNCTION.fullmatch(name) or keyword.iskeyword(name):
        raise DataError(f"{where}: entry_point {shown(name)} is no name of a function")
    return name


def _limits(record: Mapping[str, object], where: str) -> CaseLimits:
    time_limit = record.get("time_limit") if is_given(record.get("time_limit")) else None
    memory = None
    for key, scale in (("memory_limit_mb", 1 << 20), ("memory_limit", 1 << 20), ("memory_limit_bytes", 1)):
        if is_given(record.get(key)) and memory is None:
            memory = round(megabytes(record[key], 1e6 * (1 << 20) / scale, f"{where}: {key}") * scale)
    return CaseLimits(None if time_limit is None else seconds(time_limit, f"{where}: time_limit"), memory)


def _tests(record: Mapping[str, object], where: str, asked: _Asked) -> Problem:
    entry = asked.name
    if isinstance(record.get("test"), str) and entry:
        prompt = record.get("prompt") or ""
        if not isinstance(prompt, str):
            raise DataError(f"{where}: prompt must be a text, found {shown(prompt)}")
        return replace(_asserts(prompt, str(record["test"]), where, entry), prefix=prompt)
    if "test_list" in record:
        imports = _texts(record["test_imports"], f"{where}: test_imports") if record.get("test_imports") else []
        setup = record.get("test_setup_code") or ""
        lines = _texts(record["test_list"], f"{where}: test_list")
        return _asserts(
            "\n".join(imports), "\n".join([*_texts([setup], f"{where}: test_setup_code"), *lines]), where, entry
        )
    if record.get("input_output") is not None:
        return _input_output(as_data(record["input_output"]), f"{where}: input_output", asked)
    for names in _ROWS:
        if any(record.get(name) for name in names):
            wheres = {name: f"{where}: {name}" for name in names if record.get(name)}
            columns = [_columns(packed_tests(record[name], here), here) for name, here in wheres.items()]
            cases = [case for tests in columns for case in tests]
            return _cases(cases, where, asked)
    tests = as_data(record.get("tests"))
    if isinstance(tests, Mapping) and {"input", "output"} <= tests.keys():
        return _cases(_columns(tests, f"{where}: tests"), where, asked)
    if isinstance(tests, Mapping) and isinstance(tests.get("functional"), str):
        tests = tests["functional"]
    if isinstance(tests, Mapping):
        return _input_output(tests, f"{where}: tests", asked)
    if isinstance(tests, str):
        tests = [tests]
    if not isinstance(tests, list) or not tests:
        raise DataError(f"{where}: no tests; expected {FORMS}")
    tests = [as_data(test) for test in tests]
    texts = [test for test in tests if isinstance(test, str)]
    if len(texts) == len(tests):
        return _asserts("", "\n".join(texts), where, entry)
    return _cases(tests, where, asked)


def _columns(value: object, where: str) -> Iterable[object]:
    """Tests a row each; code_contests has them a column each."""
    if isinstance(value, Mapping) and all(isinstance(value.get(key), list) for key in ("input", "output")):
        if len(value["input"]) != len(value["output"]):
            raise DataError(f"{where} has {len(value['input'])} inputs and {len(value['output'])} outputs")
        pairs = zip(value["input"], value["output"], strict=True)
        return [{"input": given, "output": expected} for given, expected in pairs]
    if isinstance(value, list):
        return [as_data(test) for test in value]
    if isinstance(value, int):
        return []  # open-r1 counts its generated tests
    raise DataError(f"{where} must be a list of tests, found {shown(value)}")


def _cases(tests: Iterable[object], where: str, asked: _Asked) -> Problem:
    """Streams or calls, one kind for all."""
    streams: list[StreamCase] = []
    calls: list[CallCase] = []
    names: set[str | None] = set()
    for number, test in enumerate(tests, start=1):
        here = f"{where}: test {number}"
        values = _checked_keys(test, here)
        limits = _limits(values, here)
        said = _asked(values, here, asked)
        if "arguments" in values:
            if said.kind == "stream":
                raise DataError(f"{here}: has 'arguments', and a type that reads standard input")
            calls.append(_call(values["arguments"], values["expected"], values.get("keywords"), limits, here))
        elif said.kind == "call":
            calls.append(_call(values["input"], values["output"], None, limits, here, from_text=True))
        elif said.name and not isinstance(values["input"], str):
            raise DataError(f"{here}: a function call, or standard input? Add 'testtype': 'functional', or 'stdin'")
        else:
            stdin, stdout = (as_text(values[key], f"{here}: {key}") for key in ("input", "output"))
            streams.append(StreamCase(stdin, stdout, limits))
            continue
        if not said.name:
            raise DataError(f"{here}: function calls need 'entry_point', the name of the function")
        names.add(_function(said.name, here).removeprefix("Solution()."))
        if len(names) > 1:
            raise DataError(f"{here}: function calls need 'entry_point', one for all tests; found {shown(names)}")
    if streams and calls:
        raise DataError(f"{where}: some tests are function calls and some standard input; a task has one kind")
    if not streams and not calls:
        raise DataError(f"{where}: no tests; expected {FORMS}")
    if streams:
        return Problem(stream_cases=tuple(streams))
    return Problem(call_cases=_unwrapped(calls), entry=names.pop())


def _checked_keys(test: object, here: str) -> Mapping[str, object]:
    if isinstance(test, Mapping) and "expected_output" in test and "output" not in test:
        test = {("output" if key == "expected_output" else key): value for key, value in test.items()}
    if not isinstance(test, Mapping) or not (
        {"input", "output"} <= test.keys() or {"arguments", "expected"} <= test.keys()
    ):
        raise DataError(
            f"{here}: tests must all be texts, or objects with 'input' and 'output', or with 'arguments' and 'expected'"
        )
    if "arguments" in test and "input" in test:
        raise DataError(f"{here}: has 'arguments' and 'input'; leave one out")
    if unknown := sorted(map(str, test.keys() - _READ - _OF_NO_EFFECT)):
        raise DataError(
            f"{here}: {', '.join(unknown)} would be ignored; known are {', '.join(sorted(_READ))}. Remove what "
            "does not matter"
        )
    return test


def _input_output(value: object, where: str, asked: _Asked) -> Problem:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(key), list) for key in ("inputs", "outputs")):
        raise DataError(f"{where}: must be an object with lists 'inputs' and 'outputs', found {shown(value)}")
    inputs, outputs = value["inputs"], value["outputs"]
    if not inputs or len(inputs) != len(outputs):
        raise DataError(f"{where} has {len(inputs)} inputs and {len(outputs)} outputs")
    tests = [{"input": given, "output": expected} for given, expected in zip(inputs, outputs, strict=True)]
    return _cases(tests, where, _asked(value, where, asked))


def _call(
    arguments: object, expected: object, keywords: object, limits: CaseLimits, here: str, from_text: bool = False
) -> CallCase:
    """wrapped: as far as this one case tells."""
    if not isinstance(keywords, Mapping | None) or not all(isinstance(key, str) for key in keywords or ()):
        raise DataError(f"{here}: keywords must be an object, found {shown(keywords)}")
    if from_text:
        given = arguments_of(arguments, f"{here}: input")
    elif isinstance(arguments, list):
        given = tuple(arguments)
    else:
        raise DataError(f"{here}: arguments must be a list, found {shown(arguments)}")
    wrapped = False
    if from_text and isinstance(arguments, str) and isinstance(expected, str):
        expected = json_value(expected, f"{here}: output")
    elif from_text:
        wrapped = isinstance(expected, list) and len(expected) == 1
    case = CallCase(given, dict(keywords or {}), expected, wrapped, limits)
    try:
        encode([case.arguments, case.keywords, case.expected], _nothing, MAX_DEPTH - _MOST_NESTED)
    except (Unsendable, RecursionError) as error:
        raise DataError(f"{here}: values nested more than {_MOST_NESTED} deep, or that are not JSON's") from error
    return case


def _nothing(value: object) -> object:
    raise Unsendable(f"a {type(value).__name__}")


def _unwrapped(calls: list[CallCase]) -> tuple[CallCase, ...]:
    """Results stand in a list of their own only where all do."""
    if all(call.wrapped for call in calls):
        return tuple(calls)
    return tuple(replace(call, wrapped=False) for call in calls)


def _texts(value: object, where: str) -> list[str]:
    value = as_data(value)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where} must be a non-empty list of texts, found {shown(value)}")
    return value


def _asserts(context: str, tests: str, where: str, entry: str | None) -> Problem:
    context, tests = python_source(context, f"{where}: prompt or imports"), python_source(tests, f"{where}: tests")
    entry = _function(entry, where) if entry else None
    return Problem(assertions=AssertBlock(context, runnable_tests(tests, entry, where)), entry=entry)
