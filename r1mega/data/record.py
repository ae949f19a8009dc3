"""One row of a prompt file -> a question, its golds and its kind: the project's own keys, and those under which verl, slime,
open-r1, TRL and published sets of mathematics have them.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1mega.config.rewards import ACCURACY, JUDGED_BY_KEYS, LINE_CHECKS, WITHOUT_GOLD
from r1mega.data.rows import QUESTION_KEYS, Row, as_text, is_chat, is_missing
from r1mega.errors import DataError

OWN_KEYS = ("id", "question", "answer", "kind", "language")
GOLD_KEYS = ("expected_answer", "answer", "final_answer", "ground_truth", "label", "Answer", "solution")
"""Under which a row has its gold, the first that it has; verl's `reward_model.ground_truth` comes before them."""
ID_KEYS = ("id", "unique_id", "ID", "task_id", "question_id")
_TEST_KEYS = ("tests", "test_list", "test", "input_output")
_KINDS: Mapping[str, str] = {kind: kind for kind in ACCURACY} | {"coding": "code", "maths": "math"}
"""By verl's `ability`."""
_AFTER_SOLUTION = re.compile(r"####\s*(.*?)\s*$")
_NOT_A_NUMBER = re.compile(r"[+-]?nan|<na>", re.IGNORECASE)
_INFINITE = re.compile(r"[+-]?inf(?:inity)?", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_JSON_GOLD = re.compile(r"\s*[\[{]\s*\"")
_MAX_PLAIN_SOLUTION = 200


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A checked line. where: "file:line" for messages. answers: none when the line has no gold."""

    where: str
    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    language: str | None
    metadata: dict[str, Any]


class UniqueIds:
    """Gives an id that occurs again a number that no other id has: a, a#2, a#3."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}

    def __call__(self, identity: str) -> str:
        unique, count = identity, self._counts.get(identity, 1)
        while unique in self._taken:
            count += 1
            unique = f"{identity}#{count}"
        self._counts[identity] = count
        self._taken.add(unique)
        return unique


def after_solution(answer: str) -> str:
    """The answer itself, where the text is a solution that ends in "#### 1,234", as in GSM8K's own files: 1234.

    Commas between thousands go; those between coordinates, roots or the members of a list stay. Empty where nothing follows.
    """
    found = _AFTER_SOLUTION.search(answer)
    return _THOUSANDS.sub(_without_commas, found[1]) if found else answer


def _without_commas(number: re.Match[str]) -> str:
    before = number.string[: number.start()]
    in_brackets = any(before.count(opened) > before.count(closed) for opened, closed in ("()", "[]", "{}"))
    return number[0] if in_brackets else number[0].replace(",", "")


def check_kind(kind: str, where: str) -> None:
    """DataError for a kind that nothing judges."""
    known = (*ACCURACY, *sorted(WITHOUT_GOLD))
    if kind not in known:
        raise DataError(f"{where}: kind {kind!r} has no reward; known are {', '.join(known)}")


def check_keys(record: PromptRecord) -> None:
    """DataError for a record that lacks what its kind is judged by: tests, instructions, an entry."""
    if record.kind in LINE_CHECKS:
        module, _, name = LINE_CHECKS[record.kind].partition(":")
        getattr(importlib.import_module(module), name)(record.metadata, record.where)


def record_from(row: Row, kind: str = "math", language: str | None = None) -> PromptRecord:
    """The record of a row. kind, language: where the row does not say. DataError for a row without a question, or with an
    answer that is neither text nor number. A gold that is null, empty or NaN is none: such a record has no answers.
    """
    kind, language = _option(row, "kind") or _ability(row) or kind, _option(row, "language") or language
    key = next((key for key in QUESTION_KEYS if not is_missing(row.values.get(key))), QUESTION_KEYS[0])
    question = question_text(row.values.get(key), key, row)
    gold = _gold(row, kind)
    read = OWN_KEYS if kind == "code" else (*OWN_KEYS, key)  # a code prompt's text can belong to its tests
    metadata = {name: value for name, value in row.values.items() if name not in read and value is not None}
    if kind == "code" and isinstance(gold, str) and not any(name in metadata for name in _TEST_KEYS):
        metadata["tests" if gold.lstrip().startswith("[") else "input_output"] = _json_or_text(gold)
    answers = () if kind in JUDGED_BY_KEYS else _answers(gold, kind, row)
    return PromptRecord(row.where, _identity(row), question, answers, kind, language, metadata)


def question_text(value: object, key: str, row: Row) -> str:
    """A question that is a text, or the one user's turn of a chat (after the system's, if there is one), which may be written
    as JSON.
    """
    chat = _from_json(value)
    if isinstance(chat, list) and is_chat(chat):
        roles = [message["role"] for message in chat]
        if set(roles) - {"system", "developer", "user"} or roles.count("user") != 1 or roles[-1] != "user":
            raise DataError(
                f"{row.where}: {key!r} is a conversation ({', '.join(roles)}): a prompt here is one question; write the turns "
                "before it into the user's"
            )
        value = "\n\n".join(_content(message, key, row) for message in chat)
    if not isinstance(value, str) or not value.strip():
        known = ", ".join(QUESTION_KEYS[:3])
        shown = f"the row's keys: {row.keys()}; known are {known}: rename yours" if value is None else _shown(value)
        raise DataError(f"{row.where}: {key!r} is missing or not a text ({shown})")
    return value


def _content(message: Mapping[str, Any], key: str, row: Row) -> str:
    content = message["content"]
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{row.where}: {key!r} holds {_shown(content)}: only text can be read")
    return content


def _option(row: Row, name: str) -> str | None:
    value = row.optional(name)
    if not isinstance(value, str | None):
        raise DataError(f"{row.where}: {name!r} is {value!r:.60}, not a string")
    return value


def _ability(row: Row) -> str | None:
    ability = row.values.get("ability")
    return _KINDS.get(ability.lower()) if isinstance(ability, str) else None


def _identity(row: Row) -> str:
    """The row's own id; verl's source, split and index; else its place."""
    if own := as_text(row.optional(*ID_KEYS)):
        return own
    further = _from_json(row.values.get("extra_info"))
    if isinstance(further, Mapping) and (index := as_text(further.get("index"))):
        parts = (as_text(row.values.get("data_source")), as_text(further.get("split")), index)
        return "/".join(part for part in parts if part)
    return row.where


def _gold(row: Row, kind: str) -> object:
    """As it stands there; None where there is none. DataError where one is needed and no key is there."""
    keys = [key for key in GOLD_KEYS if key in row.values and not (key == "solution" and kind in JUDGED_BY_KEYS)]
    judged = _from_json(row.values.get("reward_model"))
    if isinstance(judged, Mapping) and not is_missing(judged.get("ground_truth")):
        return judged["ground_truth"]
    if not keys and kind not in WITHOUT_GOLD | JUDGED_BY_KEYS and not isinstance(judged, Mapping):
        raise DataError(f"{row.where}: 'answer' is missing; the row's keys: {row.keys()}")
    key = next((key for key in keys if not is_missing(row.values[key])), None)
    value = row.values[key] if key else None
    return _last_result(value, row) if key == "solution" and isinstance(value, str) else value


def _last_result(solution: str, row: Row) -> str:
    """What a worked solution arrives at: what its last box holds, or what follows "####"; a short text is the result."""
    for box in reversed(list(_BOX.finditer(solution))):
        depth = 1
        for place in range(box.end(), len(solution)):
            depth += {"{": 1, "}": -1}.get(solution[place], 0) if solution[place - 1] != "\\" else 0
            if depth == 0:
                return solution[box.end() : place]
    if _AFTER_SOLUTION.search(solution) or ("\n" not in solution.strip() and len(solution) <= _MAX_PLAIN_SOLUTION):
        return solution
    raise DataError(f"{row.where}: 'solution' has no \\boxed{{...}}: which is the answer? Give it as 'answer'")


def _answers(gold: object, kind: str, row: Row) -> tuple[str, ...]:
    if (
        kind == "math" and isinstance(gold, str) and _JSON_GOLD.match(gold)
    ):  # Skywork's: ["3"]; others have objects, which are refused
        gold = _json_or_text(gold)
    golds = gold if isinstance(gold, list) and gold else [gold]
    if kind == "math":
        golds = [after_solution(one) if isinstance(one, str) else one for one in golds]
    if all(map(_is_no_gold, golds)):
        return ()
    answers = [
        text for one in golds if (text := as_text(one)) and not _is_no_gold(text) and not _INFINITE.fullmatch(text)
    ]
    if len(answers) < len(golds):
        raise DataError(
            f"{row.where}: 'answer' is {_shown(gold)}: it must be a string or a finite number, or a list of non-empty ones; "
            r"infinity is written \infty"
        )
    return tuple(answers)


def _is_no_gold(value: object) -> bool:
    """pandas writes a missing number as NaN, and that as a text when a column is made one of texts."""
    text = value.strip() if isinstance(value, str) else value
    return is_missing(text) or (isinstance(text, str) and _NOT_A_NUMBER.fullmatch(text) is not None)


def _from_json(value: object) -> object:
    """What a text of JSON says, a list or an object: columns of Parquet often hold them so. Anything else as it is."""
    return _json_or_text(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # whoever reads the tests says what is wrong with them


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:60]
