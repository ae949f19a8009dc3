"""Published benchmark files -> prompt records: a function for each form of row, with the field names as published.

Each returns None for a row that cannot be judged here (said in its docstring); `tasks.load_task` counts those.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1mega.config.rewards import JUDGED_BY_KEYS, WITHOUT_GOLD
from r1mega.data.record import PromptRecord, check_kind, record_from
from r1mega.data.rows import Row, as_text
from r1mega.errors import DataError
from r1mega.reward.code_values import packed_tests

LETTERS = "ABCDEFGHIJ"
_LIVECODEBENCH_SECONDS = 6.0  # a test, as in the benchmark's own harness


@dataclass(frozen=True, slots=True)
class FormOptions:
    """seed: of shuffled options. since, until: contest dates (ISO) between which problems count, both included."""

    seed: int = 0
    since: str | None = None
    until: str | None = None


def _record(
    row: Row, identity: str, question: str, kind: str, answers: tuple[str, ...] = (), language: str | None = None,
    **metadata: Any,
) -> PromptRecord:  # fmt: skip
    return PromptRecord(row.where, identity, question, answers, kind, language, metadata)


# ---------------------------------------------------------------------------------------------------------- answers


def question_answer(row: Row, options: FormOptions) -> PromptRecord:
    """Math with one answer. GSM8K {"question", "answer": "... #### 18"}, MATH-500 {"problem", "answer", "unique_id"},
    AIME {"problem" or "Problem", "answer" or "Answer", "id" or "ID"}, NeMo's {"problem", "expected_answer"}; and what else
    `data/record.py` reads.
    """
    return _with_gold(dataclasses.replace(record_from(row), kind="math", metadata={}), row)


def own_prompt(row: Row, options: FormOptions) -> PromptRecord:
    """The prompt files of the training stages: {"question", "answer" (or a list), "id", "kind", "language", ...}. A
    kind that no rule verifies needs no answer: it is sampled, not judged.
    """
    record = record_from(row)
    check_kind(record.kind, row.where)
    return _with_gold(record, row)


def _with_gold(record: PromptRecord, row: Row) -> PromptRecord:
    """The record, with its place in the file as the id when it has none. DataError for one that cannot be judged."""
    if not record.answers and record.kind not in WITHOUT_GOLD | JUDGED_BY_KEYS:
        raise DataError(f"{row.where}: the row has no answer (null, empty or NaN): mend the row, or take it out")
    return record if record.id != row.where else dataclasses.replace(record, id=row.identity())


# ---------------------------------------------------------------------------------------------------------- choices


def mmlu(row: Row, options: FormOptions) -> PromptRecord:
    """{"question", "choices" or "options", "answer": letter or index, "subject"}; the original's columns A to D."""
    values = row.optional("choices", "options")
    choices = values if values is not None else [row.words(letter) for letter in "ABCD"]
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{row.where}: 'choices' must be a list of 2 to {len(LETTERS)} texts, found {choices!r:.60}")
    answer = row.words("answer", "Answer")
    letter = LETTERS[int(answer)] if answer.isdigit() and int(answer) < len(choices) else answer.upper()
    if letter not in LETTERS[: len(choices)]:
        raise DataError(f"{row.where}: 'answer' is {answer!r}, neither a letter nor an index of {len(choices)} choices")
    identity = row.identity("id", "question_id")
    subject = row.optional("subject", "category")
    if None in (texts := [as_text(choice) for choice in choices]):
        raise DataError(f"{row.where}: 'choices' holds what is neither a text nor a finite number: {choices!r:.60}")
    question = with_choices(row.text("question", "Question"), [text for text in texts if text is not None])
    name = f"{subject}/{identity}" if subject else identity
    return _record(row, name, question, "choice", (letter,), subject=subject)


def gpqa(row: Row, options: FormOptions) -> PromptRecord:
    """GPQA's CSV: "Question", "Correct Answer", "Incorrect Answer 1" to 3, "Record ID".

    The published order tells the answer, so options are shuffled: by the options' seed and the record's id alone.
    """
    identity = row.identity("Record ID")
    right = row.words("Correct Answer")
    choices = [right, *(row.words(f"Incorrect Answer {number}") for number in (1, 2, 3))]
    order = list(range(len(choices)))
    random.Random(f"gpqa/{options.seed}/{identity}").shuffle(order)
    question = with_choices(row.text("Question"), [choices[i] for i in order])
    letter = LETTERS[order.index(0)]
    return _record(row, identity, question, "choice", (letter,), subject=row.optional("High-level domain"))


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question, and its options as lines "A) ..."."""
    lines = [f"{letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question.strip(), "", *lines])


# ------------------------------------------------------------------------------------------------------------- code


def humaneval(row: Row, options: FormOptions) -> PromptRecord:
    """{"task_id", "prompt", "entry_point", "test"}: complete the function."""
    prompt = row.text("prompt")
    question = f"```python\n{prompt.rstrip()}\n```"
    test, name = row.text("test"), row.text("entry_point")
    return _record(row, row.text("task_id"), question, "code", prompt=prompt, test=test, entry_point=name)


def mbpp(row: Row, options: FormOptions) -> PromptRecord:
    """{"task_id", "text" (sanitized: "prompt"), "test_list", "test_setup_code" (sanitized: "test_imports")}. The tests
    are part of the question, as in the original paper: they alone say what the function is called.
    """
    tests = row.optional("test_list")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise DataError(f"{row.where}: 'test_list' must be a list of assert statements")
    question = f"{row.text('text', 'prompt').strip()}\nYour code should pass these tests:\n\n" + "\n".join(tests)
    names = ("test_list", "test_setup_code", "test_imports")
    metadata = {name: row.values[name] for name in names if name in row.values}
    return _record(row, row.words("task_id"), question, "code", **metadata)


def livecodebench(row: Row, options: FormOptions) -> PromptRecord | None:
    """LiveCodeBench's code generation rows: "question_content", "starter_code", "public_test_cases" and
    "private_test_cases" (JSON texts, the latter maybe packed), "metadata" (JSON with "func_name"), "contest_date".

    None: a contest outside options.since .. options.until.
    """
    date = str(row.optional("contest_date") or "")
    if (options.since or options.until) and not date:
        raise DataError(f"{row.where}: 'contest_date' is missing, and since or until asks for it")
    if (options.since and date[:10] < options.since) or (options.until and date[:10] > options.until):
        return None
    cases = [*_cases(row, "public_test_cases"), *_cases(row, "private_test_cases")]
    if not cases:
        raise DataError(f"{row.where}: no test cases")
    question, starter = row.text("question_content"), row.optional("starter_code")
    name = _json_value(row, "metadata").get("func_name")
    common = {"time_limit": _LIVECODEBENCH_SECONDS, "difficulty": row.optional("difficulty")}
    if name and cases[0].get("testtype") != "stdin":
        tests = [_functional(row, case) for case in cases]
        question = f"{question}\n\nUse this starter code:\n```python\n{str(starter or '').rstrip()}\n```"
        return _record(row, row.words("question_id"), question, "code", tests=tests, entry_point=name, **common)
    question = f"{question}\n\nRead the input from standard input and write the answer to standard output."
    tests = [{"input": case["input"], "output": case["output"]} for case in cases]
    return _record(row, row.words("question_id"), question, "code", tests=tests, **common)


def codeforces(row: Row, options: FormOptions) -> PromptRecord | None:
    """Problems with their rating: "id", "title", "description", "input_format", "output_format", "note", "examples" and
    "official_tests" ([{"input", "output"}]), "time_limit" (s), "memory_limit" (MB), "rating".

    None: a problem that equality of outputs does not judge (interactive, reading files, several right answers), without
    a rating, or whose published tests are cut short.
    """
    whole = row.optional("official_tests_complete")
    if row.optional("interaction_format", "generated_checker") or row.optional("input_mode") not in (None, "stdio"):
        return None
    if whole is False or row.optional("rating") is None or not row.optional("official_tests"):
        return None
    parts = [row.optional("title"), row.text("description")]
    for heading, name in (("Input", "input_format"), ("Output", "output_format"), ("Note", "note")):
        if text := row.optional(name):
            parts.append(f"{heading}\n{text}")
    for number, example in enumerate(row.optional("examples") or (), start=1):
        parts.append(f"Example {number}\nInput:\n{example['input'].strip()}\nOutput:\n{example['output'].strip()}")
    limits = {"time_limit": row.optional("time_limit"), "memory_limit_mb": row.optional("memory_limit")}
    parts.append("Read the input from standard input and write the answer to standard output.")
    tests = [{"input": case["input"], "output": case["output"]} for case in row.optional("official_tests")]
    rating = row.optional("rating")
    if isinstance(rating, bool) or not isinstance(rating, int | float):
        raise DataError(f"{row.where}: 'rating' is {rating!r}, not a number")
    question = "\n\n".join(part.strip() for part in parts if part)
    return _record(row, row.words("id"), question, "code", tests=tests, rating=float(rating), **limits)


def _functional(row: Row, case: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments stand a line each, as JSON; so does the result."""
    try:
        arguments = [json.loads(line) for line in case["input"].split("\n") if line.strip()]
        return {"arguments": arguments, "expected": json.loads(case["output"])}
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{row.where}: a functional test that is not JSON, a line each argument ({error!r})") from error


def _json_value(row: Row, name: str) -> Any:
    value = row.optional(name) or {}
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{row.where}: {name!r} is not JSON ({error})") from error


def _cases(row: Row, name: str) -> list[Mapping[str, Any]]:
    """[{"input", "output", "testtype"}], as they are or packed."""
    cases = packed_tests(row.optional(name) or [], f"{row.where}: {name!r}")
    if not isinstance(cases, list) or not all(
        isinstance(case, Mapping) and {"input", "output"} <= case.keys() for case in cases
    ):
        raise DataError(f"{row.where}: {name!r} must hold objects with 'input' and 'output'")
    return cases


# ----------------------------------------------------------------------------------------- instructions and patches


def ifeval(row: Row, options: FormOptions) -> PromptRecord:
    """{"key", "prompt", "instruction_id_list", "kwargs"}. The prompt is posed as it is: one instruction repeats it."""
    metadata = {name: row.optional(name) for name in ("instruction_id_list", "kwargs")}
    return _record(row, row.words("key"), row.text("prompt"), "instruction", **metadata)


def swe_bench(row: Row, options: FormOptions) -> PromptRecord:
    """SWE-bench: {"instance_id", "text"} of its prompt sets (retrieved code in the text), or its plain rows with
    "problem_statement", "repo" and "base_commit". Kind "patch": judged by the benchmark's own harness.
    """
    text = row.optional("text")
    if text is None:
        text = (
            f"The repository {row.text('repo')} (commit {row.text('base_commit')}) has this issue:\n\n"
            f"{row.text('problem_statement').strip()}\n\nSolve it by a single patch that `git apply` takes, between "
            "<patch> and </patch>."
        )
    return _record(row, row.text("instance_id"), text, "patch")
