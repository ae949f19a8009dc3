"""One prompt through the recipe: what each checkpoint of a pipeline answers to it, as an evaluation recorded it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from r1mega.errors import DataError
from r1mega.files import read_json_lines

RESPONSES_SHOWN = 4


class Row(TypedDict):
    """What is read of a row of a result.json (`evaluate.result.EvaluationRow`)."""

    prompt_id: str
    question: str
    golds: list[str]
    texts: list[str]
    lengths: list[int]
    truncated: list[bool]
    correct: list[bool | None]


@dataclass(frozen=True, slots=True)
class Reply:
    """One response, in the words of a sample (`samples.sample_record`). reward: None where none was recorded."""

    response: str
    tokens: int
    finish_reason: str
    reward: float | None
    parts: Mapping[str, float]
    status: str
    answers: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Stop:
    """The first of a checkpoint's replies to the prompt, of `drawn`; right: how many of the judged, of how many."""

    name: str
    replies: Sequence[Reply]
    drawn: int
    right: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Walk:
    """The prompt, and the checkpoints in the pipeline's order. prompts: of so many it is the most typical one."""

    task: str
    prompt_id: str
    question: str
    answers: Sequence[str]
    prompts: int
    stops: Sequence[Stop]


def walk(task: str, results: Iterable[tuple[str, Path]]) -> Walk | None:
    """The most typical prompt of a task and what each checkpoint made of it.

    results: (checkpoint, its result.json), in order. Typical: over all checkpoints, its share of right answers is
    nearest to theirs (squares added up; the first of equals). So it is chosen by no one, and shows a checkpoint no
    better than it is. None where fewer than two checkpoints have answered a common prompt that was judged.
    DataError for a damaged file.
    """
    held = [(name, path.parent, _read(path)) for name, path in results]
    if len(held) < 2:
        return None
    first = held[0][2]
    common = [key for key in first if all(key in rows and _judged(rows[key]) for _, _, rows in held)]
    if not common:
        return None
    means = [sum(_share(rows[key]) for key in common) / len(common) for _, _, rows in held]

    def distance(key: str) -> float:
        return sum((_share(rows[key]) - mean) ** 2 for (_, _, rows), mean in zip(held, means, strict=True))

    chosen = min(common, key=distance)
    stops = [_stop(name, rows[chosen], directory) for name, directory, rows in held]
    return Walk(task, chosen, first[chosen]["question"], first[chosen]["golds"], len(common), stops)


def _read(path: Path) -> dict[str, Row]:
    try:
        rows = json.loads(path.read_text())["rows"]
        lacking = sorted({key for row in rows for key in Row.__required_keys__ - row.keys()})
    except FileNotFoundError:
        return {}  # of an evaluation whose samples were removed
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the results file of an evaluation ({error!r})") from error
    if lacking:
        raise DataError(
            f"{path}: a row has no {', '.join(lacking)}; it is damaged or of another version: evaluate anew"
        )
    return {row["prompt_id"]: row for row in rows}


def _judged(row: Row) -> list[bool]:
    return [verdict for verdict in row["correct"] if verdict is not None]


def _share(row: Row) -> float:
    judged = _judged(row)
    return sum(judged) / len(judged)


def _stop(name: str, row: Row, directory: Path) -> Stop:
    rewards = _rewards(directory, row["prompt_id"])
    replies = []
    for index, text in enumerate(row["texts"][:RESPONSES_SHOWN]):
        value, parts, status = rewards.get(index, (None, {}, "not recorded"))
        end = "length" if row["truncated"][index] else "stop"
        replies.append(Reply(text, row["lengths"][index], end, value, parts, status))
    judged = _judged(row)
    return Stop(name, replies, len(row["texts"]), (sum(judged), len(judged)))


def _rewards(directory: Path, prompt_id: str) -> dict[int, tuple[float | None, Mapping[str, float], str]]:
    """{number of the response: (value, parts, status)}: with the samples, or in their own files (`rollout.store`)."""
    lines = [
        line
        for kind in ("samples", "grades")
        for path in sorted(directory.glob(f"{kind}-*.jsonl"))
        for line in read_json_lines(path)
        if line.get("prompt_id") == prompt_id and "status" in line
    ]
    return {line["index"]: (line["value"], line["parts"], line["status"]) for line in lines}
