"""Math rewards: is the answer of a response equal to a gold? Fast reader first, symbolic algebra in killable workers
for the rest.

`decide` is the fast path: pure Python, microseconds, no process. What it cannot tell (None) is asked of
`symbolic.same_by_algebra` through the pool. What is deliberately not accepted: relative tolerances on numbers (28800
is not 28801), a percentage without its sign (25 is not 2500), several different answers for one, a decimal of fewer
than 6 correct digits for a number that has no finite decimal form.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, TextIO

from r1mega.data.rows import as_text
from r1mega.errors import DataError
from r1mega.reward.expression import compare
from r1mega.reward.expression.parse import MAX_CHARS
from r1mega.reward.expression.prose import from_prose, without_lead
from r1mega.reward.expression.tokens import UnreadableError
from r1mega.reward.extract import AnswerForm, final_answer
from r1mega.reward.parts import Deferred, PartScore, ScoringItem
from r1mega.reward.pool import Outcome, Task, WorkerPool
from r1mega.types import RewardStatus

if TYPE_CHECKING:  # workers import this module and want no pydantic
    from r1mega.config.rewards import RewardConfig

MAX_SECONDS = 5.0
CPU_SHARE = 0.4  # of the hard limit: what a comparison may spend before it counts as not equal
MAX_WAITING_LINES = 4096

_PLAIN = re.compile(r"\s*([+-]?\d{1,400}(?:\.\d{1,400})?)\s*")
_NO_GOLD = re.compile(r"\s*[-+]?(?:nan|inf)\s*", re.IGNORECASE)  # floats of a column, written as text
_MARKED = re.compile(r"\\(?:boxed|fbox)|</?answer>|</think>|####")


@dataclass(frozen=True, slots=True)
class Comparison:
    """equal: None while undecided. reason: for a person."""

    equal: bool | None
    reason: str


def decide(golds: Sequence[str], answer: str, max_work: int = compare.MAX_WORK) -> Comparison:
    """Compare one extracted answer with every accepted gold on the fast path. max_work: see `reward.accuracy`."""
    undecided = None
    for gold in golds:
        comparison = _decide_one(gold, answer, max_work)
        if comparison.equal:
            return comparison
        undecided = comparison if comparison.equal is None else undecided
    return undecided or Comparison(False, f"{_shown(answer)} is not {' or '.join(map(_shown, golds))}")


def _decide_one(gold: str, answer: str, max_work: int) -> Comparison:
    if _NO_GOLD.fullmatch(gold):
        return Comparison(False, f"the gold is no value: {gold.strip()}")
    plain_gold, plain = _PLAIN.fullmatch(gold), _PLAIN.fullmatch(answer)
    if plain_gold and plain:
        same = _number(plain_gold.group(1)) == _number(plain.group(1))
        return Comparison(same, "equal numbers" if same else "different numbers")
    if len(answer) > MAX_CHARS:
        return Comparison(False, f"the answer has {len(answer)} characters, more than {MAX_CHARS}")
    try:
        equal = compare.same_answer(_unwrapped(gold), without_lead(answer), max_work)
        if not equal and (core := from_prose(answer)) is not None:
            equal = compare.same_answer(_unwrapped(gold), core, max_work)
    except UnreadableError as error:
        return Comparison(False, f"not compared: {error}")
    except RecursionError:
        return Comparison(False, "not compared: nested too deeply")
    return Comparison(equal, "equal" if equal else "undecided" if equal is None else "different")


def _number(literal: str) -> int | Fraction:
    return int(literal) if "." not in literal else Fraction(literal)


def _unwrapped(gold: str) -> str:
    """A gold may itself be written as a box, a tagged answer or a solution of GSM8K."""
    found = final_answer(gold) if _MARKED.search(gold) else None
    return gold if found is None else found


def _shown(answer: str) -> str:
    return repr(answer if len(answer) <= 80 else answer[:77] + "...")


def answer_of(prediction: str, form: AnswerForm = "any", bare: bool = False) -> str | None:
    """The answer in a response. bare: a text without box or tag is itself the answer (pairs of the command line)."""
    if _MARKED.search(prediction):
        return final_answer(prediction, form)
    return prediction if bare else None


def verify(
    golds: Sequence[str], answer: str | None, timeout_seconds: float, max_work: int = compare.MAX_WORK
) -> PartScore | Deferred:
    """1 or 0 on the fast path, or the worker task that decides. timeout_seconds: hard limit of one symbolic
    comparison. max_work: how much arithmetic the answer may leave undone.
    """
    if answer is None:
        return PartScore(0.0, "no answer in the asked form")
    comparison = decide(golds, answer, max_work)
    if comparison.equal is not None:
        return PartScore(float(comparison.equal), comparison.reason)
    cpu_seconds = CPU_SHARE * min(timeout_seconds, MAX_SECONDS)
    arguments = ([_unwrapped(gold) for gold in golds], without_lead(answer), cpu_seconds)
    return Deferred(
        Task("r1mega.reward.symbolic:same_by_algebra", arguments, min(timeout_seconds, MAX_SECONDS)), _finish
    )


def _finish(outcome: Outcome) -> PartScore:
    if outcome.failure is not None:
        return PartScore(None, outcome.failure, RewardStatus.FAILED)
    return PartScore(float(outcome.value["equal"]), outcome.value["reason"])


@dataclass(frozen=True, slots=True)
class MathAccuracy:
    """1 when the last well-formed answer equals one of the prompt's golds, else 0."""

    timeout_seconds: float = MAX_SECONDS
    form: AnswerForm = "any"
    max_work: int = compare.MAX_WORK
    name: str = "accuracy"

    @classmethod
    def from_config(cls, config: RewardConfig) -> MathAccuracy:
        return cls(config.accuracy.timeout_seconds, config.accuracy.form, config.accuracy.max_work)

    def score(self, item: ScoringItem) -> PartScore | Deferred:
        return verify(item.prompt.answers, answer_of(item.text, self.form), self.timeout_seconds, self.max_work)


# --- command line ------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Pair:
    """One line of the command: accepted golds and a prediction."""

    golds: tuple[str, ...]
    prediction: str


def read_pairs(lines: Iterable[str], name: str) -> Iterator[Pair]:
    """{"gold": text or list of texts, "prediction": text} lines. Raises DataError naming file:line."""
    number = 0
    rows = iter(lines)
    while True:
        number += 1
        where = f"{name}:{number}"
        try:
            line = next(rows, None)
            if line is None:
                return
            if not line.strip():
                continue
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers of thousands of digits, too deep
            raise DataError(
                f"{where}: not JSON ({error}); expected one object with 'gold' and 'prediction' a line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with 'gold' and 'prediction', found {type(record).__name__}")
        golds = record.get("gold")
        golds = golds if isinstance(golds, list) else [golds]
        texts = [as_text(gold) for gold in golds]
        if not golds or None in texts:
            raise DataError(
                f"{where}: 'gold' must be a text or a finite number, or a non-empty list of these, found {record.get('gold')!r}"
            )
        if not isinstance(record.get("prediction"), str):
            raise DataError(f"{where}: 'prediction' must be a text, found {record.get('prediction')!r}")
        yield Pair(tuple(text for text in texts if text is not None), record["prediction"])


def score_stream(
    source: Iterable[str],
    sink: TextIO,
    name: str = "<stdin>",
    *,
    num_workers: int = 1,
    timeout_seconds: float = MAX_SECONDS,
    max_work: int = compare.MAX_WORK,
) -> int:
    """`r1mega reward math`: pairs in, {"value", "status", "reason"} lines out in the same order. Returns the number
    of pairs.

    Raises DataError (file:line) at a malformed line, after the lines before it have been written.
    """
    count = 0
    waiting: deque[PartScore | tuple[Deferred, Future[Outcome]]] = deque()
    with WorkerPool(num_workers) as pool:
        try:
            for pair in read_pairs(source, name):
                score = verify(pair.golds, answer_of(pair.prediction, bare=True), timeout_seconds, max_work)
                waiting.append((score, pool.submit(score.task)) if isinstance(score, Deferred) else score)
                count += 1
                _write_ready(waiting, sink, block=len(waiting) > MAX_WAITING_LINES)
        finally:
            while waiting:
                _write_ready(waiting, sink, block=True)
    return count


def _write_ready(waiting: deque[PartScore | tuple[Deferred, Future[Outcome]]], sink: TextIO, block: bool) -> None:
    """Write the scores at the head of the line that are there; `block` waits for the first one."""
    while waiting:
        score = waiting[0]
        if isinstance(score, tuple):
            if not (block or score[1].done()):
                return
            score = score[0].finish(score[1].result())
        waiting.popleft()
        block = False
        sink.write(
            json.dumps({"value": score.value, "status": score.status.value, "reason": score.reason}, ensure_ascii=False)
            + "\n"
        )
