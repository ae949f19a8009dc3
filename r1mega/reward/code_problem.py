"""What a code task asks for, from one record of a data file; and the program in a response.

Records, by their keys (HumanEval and MBPP as they are published, APPS and LiveCodeBench in their common form):
    prompt, test, entry_point             the test defines check(candidate)
    test_list [, test_setup_code, test_imports]   assert statements
    tests: text or list of texts          assert statements
    tests: [{"input", "output"}]          standard input -> standard output
    tests: [{"arguments", "expected" [, "keywords"]}], entry_point   function calls
    input_output: {"inputs", "outputs" [, "fn_name"]} (or that as JSON text)
Optional: language ("python" | "cpp"), time_limit (seconds a case), memory_limit_mb.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from r1mega.errors import DataError

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*$", re.MULTILINE)
_LANGUAGES = {"python": ("python", "py", "python3"), "cpp": ("cpp", "c++", "cc", "cxx", "c")}
FORMS = "'test' with 'entry_point' (HumanEval), 'test_list' (MBPP), 'tests' or 'input_output'"


@dataclass(frozen=True, slots=True)
class StreamCase:
    """Standard input and the standard output that is expected for it."""

    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class CallCase:
    """Arguments of one call and the value expected (as JSON holds them). wrapped: the only item of `expected` will do
    as well (APPS puts most results into a list of their own, and accepts either).
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    expected: Any
    wrapped: bool = False


@dataclass(frozen=True, slots=True)
class AssertBlock:
    """context: trusted code that runs before the tests (a prompt's imports and helpers); tests: statements with
    asserts."""

    context: str
    tests: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One task. Exactly one of the three kinds of tests is there. prefix: what a completion continues.

    entry: the function under test (None: taken from the asserts). time_limit: seconds a case, memory_bytes: None for
    the defaults of the reward.
    """

    language: Literal["python", "cpp"] = "python"
    stream_cases: tuple[StreamCase, ...] = ()
    call_cases: tuple[CallCase, ...] = ()
    assertions: AssertBlock | None = None
    entry: str | None = None
    prefix: str = ""
    time_limit: float | None = None
    memory_bytes: int | None = None

    def program(self, code: str) -> str:
        """The whole source: a completion (first line indented) continues the prefix, a full program follows it."""
        if not self.prefix or re.search(r"^from __future__ ", code, re.MULTILINE):
            return code
        first = next((line for line in code.splitlines() if line.strip()), "")
        return self.prefix + ("" if first[:1] in " \t" else "\n\n") + code


def problem_from(record: Mapping[str, Any], where: str) -> Problem:
    """Raises DataError with `where` (file:line) when the record has no usable tests."""
    language = str(record.get("language") or "python").lower()
    known = next((name for name, labels in _LANGUAGES.items() if language in labels), None)
    if known is None:
        raise DataError(f"{where}: language {language!r} is not supported; use 'python' or 'cpp'")
    common: dict[str, Any] = {"language": known}
    for key, name, scale in (("time_limit", "time_limit", 1), ("memory_limit_mb", "memory_bytes", 1 << 20)):
        if record.get(key) is not None:
            if not isinstance(record[key], int | float) or isinstance(record[key], bool) or not 0 < record[key] < 1e6:
                raise DataError(f"{where}: {key} must be a positive number, found {record[key]!r}")
            common[name] = type(scale)(record[key] * scale) if scale != 1 else float(record[key])
    entry = record.get("entry_point")
    if entry is not None and not isinstance(entry, str):
        raise DataError(f"{where}: entry_point must be a text, found {entry!r}")
    problem = _tests(record, where, entry, common)
    if problem.language == "cpp" and not problem.stream_cases:
        raise DataError(
            f"{where}: C++ is tested by standard input and output only; give 'tests' of 'input' and 'output'"
        )
    return problem


def _tests(record: Mapping[str, Any], where: str, entry: str | None, common: dict[str, Any]) -> Problem:
    if isinstance(record.get("test"), str) and entry:
        prompt = record.get("prompt") or ""
        block = AssertBlock(prompt, f"{record['test']}\n\ncheck({entry})\n")
        return _with_asserts(Problem(**common, assertions=block, entry=entry, prefix=prompt), where)
    if "test_list" in record:
        context = "\n".join([*(record.get("test_imports") or ())])
        lines = [record.get("test_setup_code") or "", *_texts(record["test_list"], f"{where}: test_list")]
        return _with_asserts(Problem(**common, assertions=AssertBlock(context, "\n".join(lines)), entry=entry), where)
    if record.get("input_output") is not None:
        return _input_output(record["input_output"], where, entry, common)
    tests = record.get("tests")
    if isinstance(tests, str):
        tests = [tests]
    if not isinstance(tests, list) or not tests:
        raise DataError(f"{where}: no tests; expected {FORMS}")
    if all(isinstance(test, str) for test in tests):
        return _with_asserts(Problem(**common, assertions=AssertBlock("", "\n".join(tests)), entry=entry), where)
    if all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        cases = tuple(StreamCase(_text(test["input"]), _text(test["output"])) for test in tests)
        return Problem(**common, stream_cases=cases)
    if all(isinstance(test, dict) and {"arguments", "expected"} <= test.keys() for test in tests):
        if not entry:
            raise DataError(f"{where}: function calls need 'entry_point', the name of the function")
        calls = tuple(
            CallCase(tuple(test["arguments"]), dict(test.get("keywords") or {}), test["expected"]) for test in tests
        )
        return Problem(**common, call_cases=calls, entry=entry)
    raise DataError(
        f"{where}: 'tests' must all be texts, or objects with 'input' and 'output', or with 'arguments' and 'expected'"
    )


def _input_output(value: Any, where: str, entry: str | None, common: dict[str, Any]) -> Problem:
    try:
        value = json.loads(value) if isinstance(value, str) else value
        inputs, outputs = list(value["inputs"]), list(value["outputs"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: input_output must be an object with lists 'inputs' and 'outputs' ({error!r})"
        ) from error
    if not inputs or len(inputs) != len(outputs):
        raise DataError(f"{where}: input_output has {len(inputs)} inputs and {len(outputs)} outputs")
    name = value.get("fn_name") or entry
    if name:
        wrapped = all(isinstance(expected, list) and len(expected) == 1 for expected in outputs)
        calls = tuple(
            CallCase(tuple(given), {}, expected, wrapped) for given, expected in zip(inputs, outputs, strict=True)
        )
        return Problem(**common, call_cases=calls, entry=name)
    cases = tuple(StreamCase(_text(given), _text(expected)) for given, expected in zip(inputs, outputs, strict=True))
    return Problem(**common, stream_cases=cases)


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where} must be a non-empty list of texts, found {value!r}")
    return value


def _text(value: Any) -> str:
    """Lines of a list (as APPS has them), or the text itself."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _with_asserts(problem: Problem, where: str) -> Problem:
    if problem.assertions is None or "assert" not in problem.assertions.tests:
        raise DataError(f"{where}: the tests assert nothing, any answer would pass")
    return problem


def code_in(response: str, language: str = "python") -> str | None:
    """The program: the last fenced block of the final answer (one labelled with the language first), else all of
    the final answer. None: nothing is there. What stands before `</think>` is reasoning and never the answer."""
    text = response.rsplit("</think>", 1)[-1]
    if "<answer>" in text and "</answer>" in text:
        inner = text[text.rfind("<answer>") + len("<answer>") :]
        text = inner[: inner.find("</answer>")] if "</answer>" in inner else text
    blocks: list[tuple[str, str]] = []
    position = 0
    while opening := _FENCE.search(text, position):
        closing = re.compile(rf"^[ \t]*{re.escape(opening[1])}[ \t]*$", re.MULTILINE).search(text, opening.end())
        end = closing.start() if closing else len(text)
        blocks.append((opening[2].lower(), text[opening.end() + 1 : end]))
        if closing is None:
            break
        position = closing.end()
    labelled = [code for label, code in blocks if label in _LANGUAGES[language]]
    code = labelled[-1] if labelled else blocks[-1][1] if blocks else text
    code = code.replace("\r\n", "\n").strip("\n")
    return code if code.strip() else None
