"""What a code task asks for, from one record of a data file; and the program in a response.

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
case), memory_limit_mb (memory_limit, memory_limit_bytes), both also of a single test; checker (code_checker.py).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from r1mega.errors import DataError
from r1mega.reward.code_names import with_names
from r1mega.reward.code_values import (
    arguments_of,
    as_data,
    as_text,
    json_value,
    megabytes,
    packed_tests,
    python_source,
    given,
    seconds,
    shown,
)  # fmt: skip
from r1mega.sandbox.inside.wire import MAX_DEPTH, Unsendable, encode
from r1mega.sandbox.policy import Language

_FENCE = re.compile(
    r"^(?P<lead>[ \t]*(?:(?:>|[-*+]|\d{1,9}[.)])[ \t]+|>)*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<label>[\w+#.-]*)[^\n]*$",
    re.MULTILINE,
)
_FROM_SOLUTION = re.compile(r"^from solution import .*$", re.MULTILINE)  # KodCode's; the sandbox gives the names itself
_TEST_FUNCTION = re.compile(r"^def (test_\w+)\(\s*\)", re.MULTILINE)
_LANGUAGES: Mapping[Language, tuple[str, ...]] = {
    "python": ("python", "py", "python3"),
    "cpp": ("cpp", "c++", "cc", "cxx", "c"),
}
FORMS = "'test' with 'entry_point' (HumanEval), 'test_list' (MBPP), 'tests', 'input_output' or 'public_test_cases'"
_ROWS = (
    ("public_test_cases", "private_test_cases"),
    ("official_tests",),
    ("public_tests", "private_tests", "generated_tests"),
)
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
_OF_NO_EFFECT = {"id", "name", "index", "description", "explanation", "is_public", "public", "hidden", "is_hidden"}


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
    reward. checker: Python that judges an output where several are right (code_checker.py).
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

    def program(self, code: str) -> str:
        """The whole source: a completion (first line indented) continues the prefix, a full program follows it. Before
        streams, calls and methods of `Solution` stands what their judges import; HumanEval and MBPP import nothing.
        """
        if self.prefix and not re.search(r"^from __future__ ", code, re.MULTILINE):
            first = next((line for line in code.splitlines() if line.strip()), "")
            code = self.prefix + ("" if first[:1] in " \t" else "\n\n") + code
        if self.language != "python" or (self.assertions and not re.search(r"\bSolution\b", self.assertions.tests)):
            return code
        return with_names(code)


def problem_from(record: Mapping[str, object], where: str) -> Problem:
    """Raises DataError with `where` (file:line) when the record has no usable tests, or says what is not done here."""
    language = record.get("language") or "python"
    told = language.lower() if isinstance(language, str) else None
    known = next((name for name, labels in _LANGUAGES.items() if told in labels), None)
    if known is None:
        raise DataError(f"{where}: language {shown(language)} is not supported; use 'python' or 'cpp'")
    if record.get("interaction_format") or record.get("input_mode") not in (None, "stdio"):
        raise DataError(f"{where}: interactive tasks, and tasks that read files, are not supported; leave the line out")
    limits = _limits(record, where)
    problem = _tests(record, where, _entry(record, where))
    problem = replace(problem, language=known, time_limit=limits.time_limit, memory_bytes=limits.memory_bytes)
    checker = next((record[key] for key in ("checker", "generated_checker") if record.get(key) is not None), None)
    if checker is not None:
        if not problem.stream_cases:
            raise DataError(f"{where}: a checker is for tests of standard input and output")
        source = python_source(checker, f"{where}: checker")
        if not ast.parse(source).body:
            raise DataError(f"{where}: the checker is empty; leave the key out where there is none")
        problem = replace(problem, checker=source)
    if problem.language == "cpp" and not problem.stream_cases:
        raise DataError(
            f"{where}: C++ is tested by standard input and output only; give 'tests' of 'input' and 'output'"
        )
    return problem


def _entry(record: Mapping[str, object], where: str) -> str | None:
    """The function under test, by any of its names. LiveCodeBench has it in the metadata."""
    metadata = as_data(record.get("metadata"))
    values = {"entry_point": record.get("entry_point"), "fn_name": record.get("fn_name")}
    if isinstance(metadata, Mapping):
        values["metadata.func_name"] = metadata.get("func_name")
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {name} must be a text, found {shown(value)}")
        if value:
            return value
    return None


def _limits(record: Mapping[str, object], where: str) -> CaseLimits:
    time_limit = record.get("time_limit") if given(record.get("time_limit")) else None
    memory = None
    for key, scale in (("memory_limit_mb", 1 << 20), ("memory_limit", 1 << 20), ("memory_limit_bytes", 1)):
        if given(record.get(key)) and memory is None:
            memory = round(megabytes(record[key], 1e6 * (1 << 20) / scale, f"{where}: {key}") * scale)
    return CaseLimits(None if time_limit is None else seconds(time_limit, f"{where}: time_limit"), memory)


def _tests(record: Mapping[str, object], where: str, entry: str | None) -> Problem:
    if isinstance(record.get("test"), str) and entry:
        prompt = record.get("prompt") or ""
        if not isinstance(prompt, str):
            raise DataError(f"{where}: prompt must be a text, found {shown(prompt)}")
        test = str(record["test"])
        if re.search(r"\bcheck\b", test):
            test = f"{test}\n\ncheck({entry})\n"
        return replace(_asserts(prompt, test, where, entry), prefix=prompt)
    if "test_list" in record:
        imports = _texts(record["test_imports"], f"{where}: test_imports") if record.get("test_imports") else []
        setup = record.get("test_setup_code") or ""
        lines = _texts(record["test_list"], f"{where}: test_list")
        return _asserts(
            "\n".join(imports), "\n".join([*_texts([setup], f"{where}: test_setup_code"), *lines]), where, entry
        )
    if record.get("input_output") is not None:
        return _input_output(as_data(record["input_output"]), f"{where}: input_output", entry)
    for names in _ROWS:
        if any(record.get(name) for name in names):
            wheres = {name: f"{where}: {name}" for name in names if record.get(name)}
            columns = [_columns(packed_tests(record[name], here), here) for name, here in wheres.items()]
            cases = [case for tests in columns for case in tests]
            return _cases(cases, where, entry)
    tests = as_data(record.get("tests"))
    if isinstance(tests, Mapping) and isinstance(tests.get("functional"), str):
        tests = tests["functional"]
    if isinstance(tests, Mapping):
        return _input_output(tests, f"{where}: tests", entry)
    if isinstance(tests, str):
        tests = [tests]
    if not isinstance(tests, list) or not tests:
        raise DataError(f"{where}: no tests; expected {FORMS}")
    tests = [as_data(test) for test in tests]
    texts = [test for test in tests if isinstance(test, str)]
    if len(texts) == len(tests):
        return _asserts("", "\n".join(texts), where, entry)
    return _cases(tests, where, entry)


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


def _cases(tests: Iterable[object], where: str, entry: str | None) -> Problem:
    """Streams or calls, one kind for all."""
    entry = entry.removeprefix("Solution().") if entry else None
    streams: list[StreamCase] = []
    calls: list[CallCase] = []
    for number, test in enumerate(tests, start=1):
        here = f"{where}: test {number}"
        values = _checked_keys(test, here)
        limits = _limits(values, here)
        kind, name = _kind(values, here, entry)
        if "arguments" in values:
            calls.append(_call(values["arguments"], values["expected"], values.get("keywords"), limits, here))
        elif kind == "call":
            calls.append(_call(values["input"], values["output"], None, limits, here, from_text=True))
        else:
            stdin, stdout = (as_text(values[key], f"{here}: {key}") for key in ("input", "output"))
            streams.append(StreamCase(stdin, stdout, limits))
            continue
        if not name or (entry and name != entry):
            raise DataError(
                f"{here}: function calls need 'entry_point', the name of the function"
                + (f"; found {entry!r} and {name!r}" if name else "")
            )
        entry = name
    if streams and calls:
        raise DataError(f"{where}: some tests are function calls and some standard input; a task has one kind")
    if not streams and not calls:
        raise DataError(f"{where}: no tests; expected {FORMS}")
    if streams:
        return Problem(stream_cases=tuple(streams))
    return Problem(call_cases=_unwrapped(calls), entry=entry)


def _checked_keys(test: object, here: str) -> Mapping[str, object]:
    if not isinstance(test, Mapping) or not (
        {"input", "output"} <= test.keys() or {"arguments", "expected"} <= test.keys()
    ):
        raise DataError(
            f"{here}: tests must all be texts, or objects with 'input' and 'output', or with 'arguments' and 'expected'"
        )
    if unknown := sorted(map(str, test.keys() - _READ - _OF_NO_EFFECT)):
        raise DataError(
            f"{here}: {', '.join(unknown)} would be ignored; known are {', '.join(sorted(_READ))}. Remove what "
            "does not matter"
        )
    return test


def _kind(test: Mapping[str, object], here: str, entry: str | None) -> tuple[Literal["call", "stream"], str | None]:
    """How a test is run, and the function that it calls. Without a type, what names a function is a call."""
    name = _entry(test, here) or entry
    said = test.get("testtype", test.get("type"))
    if said is None:
        return ("call" if name or "arguments" in test else "stream"), name
    if said in _CALLS:
        return "call", name
    if said in _STREAMS and "arguments" not in test:
        return "stream", None
    raise DataError(f"{here}: type {said!r} is not known; use {_CALLS[0]!r} or {_STREAMS[0]!r}")


def _input_output(value: object, where: str, entry: str | None) -> Problem:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(key), list) for key in ("inputs", "outputs")):
        raise DataError(f"{where}: must be an object with lists 'inputs' and 'outputs', found {shown(value)}")
    inputs, outputs = value["inputs"], value["outputs"]
    if not inputs or len(inputs) != len(outputs):
        raise DataError(f"{where} has {len(inputs)} inputs and {len(outputs)} outputs")
    tests = [{"input": given, "output": expected} for given, expected in zip(inputs, outputs, strict=True)]
    return _cases(tests, where, _entry(value, where) or entry)


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
    """Functions test_...() that take nothing are called, as pytest does."""
    tests = _FROM_SOLUTION.sub("", tests)
    tests = "\n".join([tests, *(f"{name}()" for name in _TEST_FUNCTION.findall(tests))])
    block = AssertBlock(python_source(context, f"{where}: prompt or imports"), python_source(tests, f"{where}: tests"))
    if "assert" not in tests:
        raise DataError(f"{where}: the tests assert nothing, any answer would pass")
    return Problem(assertions=block, entry=entry)


def code_in(response: str, language: Language = "python") -> str | None:
    """The program: the last fenced block of the final answer (one labelled with the language first), else all of
    the final answer. None: nothing is there. What stands before `</think>` is reasoning and never the answer. A block in
    a list item or a quotation loses what its lines begin with there."""
    text = response.rsplit("</think>", 1)[-1]
    if "<answer>" in text and "</answer>" in text:
        inner = text[text.rfind("<answer>") + len("<answer>") :]
        text = inner[: inner.find("</answer>")] if "</answer>" in inner else text
    text = text.replace("\r\n", "\n")
    blocks: list[tuple[str, str]] = []
    position = 0
    while opening := _FENCE.search(text, position):
        fence = opening["fence"]
        ending = rf"^[ \t>]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*$"
        closing = re.compile(ending, re.MULTILINE).search(text, opening.end())
        end = closing.start() if closing else len(text)
        blocks.append((opening["label"].lower(), _outdented(text[opening.end() + 1 : end], opening["lead"])))
        if closing is None:
            break
        position = closing.end()
    labelled = [code for label, code in blocks if label in _LANGUAGES[language]]
    code = labelled[-1] if labelled else blocks[-1][1] if blocks else text
    code = code.strip("\n")
    return code if code.strip() else None


def _outdented(block: str, lead: str) -> str:
    """Lines without the white space and quotation marks that the fence itself stands behind, as far as they have them."""
    if not lead:
        return block
    lines = block.split("\n")
    for _ in range(lead.count(">")):
        lines = [re.sub(r"^[ \t]*> ?", "", line) for line in lines]
    indents = [re.match(r"[ \t]*", line)[0].expandtabs(4) for line in lines]  # type: ignore[index]  # never None
    lines = [indent + line.lstrip(" \t") for indent, line in zip(indents, lines, strict=True)]
    inner = lead.rpartition(">")[2].removeprefix(" ") if ">" in lead else lead
    width = min([len(inner.expandtabs(4)), *(len(i) for i, line in zip(indents, lines, strict=True) if line.strip())])
    lines = [line[width:] for line in lines]
    return "\n".join(lines)
