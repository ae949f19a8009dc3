"""Exact answers: multiple choice, logic, and reasoning-gym's tasks through their own scorers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r1mega.errors import DataError, RewardError
from r1mega.reward.expression.prose import same_wording, without_lead
from r1mega.reward.expression.text import clean
from r1mega.reward.expression.verbal import names_another
from r1mega.reward.extract import AnswerForm, final_answer
from r1mega.reward.parts import Deferred, PartScore, ScoringItem
from r1mega.reward.pool import Outcome, Task
from r1mega.types import RewardStatus

if TYPE_CHECKING:  # workers import this module and want no pydantic
    from r1mega.config.rewards import RewardConfig

BLOCKED_SCORERS: Mapping[str, str] = {
    "game_of_life_halting": "gives full marks to any text",
    "complex_arithmetic": "gives full marks to 'nan'",
    "coin_flip": "takes '0' for any small probability and raises on '1e999'",
    "prime_factorization": "raises on malformed answers",
    "boxnet": "raises on malformed answers",
    "game_of_life": "raises on malformed answers",
}
"""reasoning-gym 0.1.25 tasks whose scorer cannot be trusted, with the reason."""

_LETTER = re.compile(r"[\s(\[*]*([A-Za-z])[\s)\]*]*(?:[.:)]\s*(?P<rest>.*))?", re.DOTALL)
_OPTION_WORD = re.compile(r"^(?:option|choice|answer)\s+(?=\(?[A-Za-z]\)?\s*$)", re.IGNORECASE)
_MANY = re.compile(r"\(\s*[A-Za-z]\s*\)|\b[A-Z][.):]\s|\bor\b", re.DOTALL)


def same_choice(gold: str, answer: str) -> bool:
    """Whether an answer names the gold: 'B', '(b)', 'B. Paris', 'option B' for 'B'; words alike up to case and
    punctuation otherwise.
    """
    gold, answer = without_lead(gold).strip(), _OPTION_WORD.sub("", without_lead(answer).strip(" \n."))
    letter, chosen = _LETTER.fullmatch(clean_choice(gold)), _LETTER.fullmatch(clean_choice(answer))
    if letter and not letter["rest"]:
        if chosen is None or chosen.group(1).upper() != letter.group(1).upper():
            return False
        rest = chosen["rest"] or ""
        return not _MANY.search(rest) and not names_another(letter.group(1).upper(), rest)
    return same_wording(clean_choice(gold), clean_choice(answer))


def clean_choice(text: str) -> str:
    """Without the marks that `clean` puts around \\text{...}."""
    return re.sub("[\u27e6\u27e7]", "", clean(text))


@dataclass(frozen=True, slots=True)
class ChoiceAccuracy:
    """1 when the last well-formed answer is exactly one of the golds."""

    form: AnswerForm = "any"
    name: str = "accuracy"

    @classmethod
    def from_config(cls, config: RewardConfig) -> ChoiceAccuracy:
        return cls(config.accuracy.form)

    def score(self, item: ScoringItem) -> PartScore:
        answer = final_answer(item.text, self.form)
        if answer is None:
            return PartScore(0.0, "no answer in the asked form")
        if any(same_choice(gold, answer) for gold in item.prompt.answers):
            return PartScore(1.0, "the right choice")
        return PartScore(0.0, f"{answer[:40]!r} is not {' or '.join(item.prompt.answers)!r}")


@dataclass(frozen=True, slots=True)
class ReasoningGymAccuracy:
    """Scores by the task's own scorer, in a worker. The prompt's metadata holds the task's `entry` (as reasoning-gym
    made it).

    Only full marks count, unless partial_credit is set: many scorers give a little to any text. A task in
    BLOCKED_SCORERS raises RewardError.
    """

    timeout_seconds: float = 5.0
    partial_credit: bool = False
    form: AnswerForm = "any"
    name: str = "accuracy"

    @classmethod
    def from_config(cls, config: RewardConfig) -> ReasoningGymAccuracy:
        return cls(config.accuracy.timeout_seconds, config.accuracy.partial_credit, config.accuracy.form)

    def score(self, item: ScoringItem) -> PartScore | Deferred:
        """By the task's own scorer, in a worker. DataError without the task's entry, or for a blocked scorer."""
        entry, task = _entry(item.prompt.metadata, f"prompt {item.prompt.id}")
        answer = final_answer(item.text, self.form)
        if not answer:
            return PartScore(0.0, "no answer in the asked form")
        entry = json.loads(json.dumps(dict(entry), default=str))
        work = Task("r1mega.reward.choice:reasoning_gym_score", (task, answer, entry), self.timeout_seconds)
        return Deferred(work, self._finish)

    def _finish(self, outcome: Outcome) -> PartScore:
        if outcome.failure is not None:
            return PartScore(None, outcome.failure, RewardStatus.FAILED)
        value = outcome.value if self.partial_credit else float(outcome.value >= 1.0)
        return PartScore(value, f"the task's scorer gives {outcome.value:g}")


def _entry(metadata: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str]:
    """(the dataset's item, its task)."""
    entry = metadata.get("entry")
    further = entry.get("metadata") if isinstance(entry, Mapping) else None
    if not isinstance(further, Mapping) or not isinstance(task := further.get("source_dataset"), str):
        raise DataError(
            f"{where}: kind 'reasoning_gym' needs the key 'entry' with the dataset's item, metadata.source_dataset included"
        )
    if task in BLOCKED_SCORERS:
        raise DataError(f"{where}: the scorer of {task!r} is blocked, it {BLOCKED_SCORERS[task]}; remove the task")
    return entry, task


def check_line(metadata: Mapping[str, Any], where: str) -> None:
    """DataError for a line of kind `reasoning_gym` without an entry, of a blocked scorer or of a task that is not known."""
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise RewardError("prompts of kind 'reasoning_gym' need reasoning-gym: pip install reasoning-gym") from error
    _, task = _entry(metadata, where)
    if task not in reasoning_gym.factory.DATASETS:
        raise DataError(f"{where}: reasoning-gym has no task {task!r}")


def reasoning_gym_score(task: str, answer: str, entry: dict[str, Any]) -> float:
    """Runs in a worker. Raises RewardError for a blocked or unknown task."""
    if task in BLOCKED_SCORERS:
        raise RewardError(f"the scorer of {task!r} is blocked, it {BLOCKED_SCORERS[task]}")
    import reasoning_gym

    return min(max(float(reasoning_gym.get_score_answer_fn(task)(answer, entry)), 0.0), 1.0)


def prepare() -> None:
    """Import the library outside the limit of the first item."""
    import reasoning_gym  # noqa: F401
