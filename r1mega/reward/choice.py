"""Exact answers: multiple choice, logic, and reasoning-gym's tasks through their own scorers."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

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

_STYLE = re.compile(
    r"\\(?:math(?:bf|rm|it|sf|tt|cal|bb|frak|scr)|text(?:bf|it|rm|sf|tt|normal|sc)?|boldsymbol|bm|bf|rm|operatorname|mbox|hbox|underline|emph|fbox|boxed)"
    r"\*?\s*\{([^{}]*)\}"
)
_LAYOUT = re.compile(
    r"\\(?:textcolor|colorbox|color)\s*\{[^{}]*\}|\\(?:left|right|big|Big|bf|rm|quad|qquad|displaystyle|[lr]angle|tiny|small|"
    r"normalsize|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])|\\[()\[\],;:! ]|[$~`]|\*+|__"
)
_LEAD = re.compile(
    r"^\s*(?:(?:the\s+)?(?:(?:correct|right|final|best|my)\s+)*(?:answer|option|choice)(?:\s+is(?![A-Za-z])|\s*[:=])?\s*"
    r"(?:(?:option|choice)\s*)?|(?:正确)?(?:答案|选项)\s*[是为选:]?\s*|(?:应)?选择?\s*)(?=\W*[A-Za-z](?![A-Za-z]))",
    re.IGNORECASE,
)
_OPENED, _CLOSED = r"""[\s(\[{<"'“‘「『【〔⟨〈《]*""", r"""[\s)\]}>"'”’」』】〕⟩〉》]*"""
_LETTER = re.compile(
    rf"{_OPENED}([A-Za-z])(?:{_CLOSED}(?:\s*(?:is|为|是)\s*(?:the\s+)?(?:correct|right|best|正确)(?:\s+(?:answer|option|choice|one)|的|答案)*|选?项)?[\s.!。]*"
    rf"|(?:{_CLOSED}(?:[.:,;、。]|\s[-–—])|[)\]}}>】〕」』⟩〉》]|\s*\n|\s+(?=[一-鿿])(?![不错非没无是和或与及还以]))\s*(?P<rest>.*))",
    re.DOTALL,
)
_OPTION_WORD = re.compile(r"^(?:option|choice|answer)\s+(?=\(?[A-Za-z]\)?\s*$)", re.IGNORECASE)
_LETTER_AND_TEXT = re.compile(r"\(?([A-Z])[.)]\s*(?P<rest>\S.*)", re.DOTALL)
_NAMED = re.compile(r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer)s?\s+\(?([A-Z])(?![A-Za-z])")
_MANY = re.compile(r"\(\s*[A-Za-z]\s*\)|\b[A-Z][.):]\s|\bor\b", re.DOTALL)
_ONLY_LETTERS = re.compile(
    r"(?:[\W_]*(?:(?:and|or|und|oder|not|和|或|与)[\W_]+)?(?<![A-Za-z])[A-Za-z](?![A-Za-z]))+[\W_]*"
)


def same_choice(gold: str, answer: str) -> bool:
    """Whether an answer names the gold: 'B', '(b)', 'B. Paris', 'Option (B): Paris', '\\mathbf{B}', 'B、巴黎' for 'B'; for
    'B. Paris' also 'Paris'; words alike up to case and punctuation otherwise. An answer that names a second letter names none.
    """
    letter, chosen = (_LETTER.fullmatch(_LEAD.sub("", _plain(without_lead(text)))) for text in (gold, answer))
    with_text = _LETTER_AND_TEXT.fullmatch(_plain(gold))
    if with_text and not _MANY.search(with_text["rest"]):
        if same_wording(with_text["rest"], _plain(without_lead(answer))):
            return True
        says_other = chosen and chosen["rest"] and not same_wording(with_text["rest"], chosen["rest"])
        return not says_other and same_choice(with_text[1], answer)
    if letter and not letter["rest"]:
        if chosen is None or chosen.group(1).upper() != letter.group(1).upper():
            return False
        rest = chosen["rest"] or ""
        others = {found.upper() for found in re.findall("[A-Za-z]", rest)} - {letter.group(1).upper()}
        if (
            _MANY.search(rest)
            or {*_NAMED.findall(rest)} - {letter.group(1).upper()}
            or (others and _ONLY_LETTERS.fullmatch(rest))
        ):
            return False
        return not names_another(letter.group(1).upper(), rest)
    gold, answer = without_lead(gold).strip(), _OPTION_WORD.sub("", without_lead(answer).strip(" \n."))
    return same_wording(clean_choice(gold), clean_choice(answer))


def _plain(text: str) -> str:
    """Without what only says how a letter looks: fonts, emphasis, mathematics around it, full-width forms."""
    text, before = unicodedata.normalize("NFKC", text), ""
    while text != before:
        text, before = _STYLE.sub(r"\1", text), text
    return re.sub(r"[\^_]?\{\}", "", _LAYOUT.sub(" ", text)).strip()


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
        work = Task("r1mega.reward.choice:reasoning_gym_score", (task, answer, _as_json(entry)), self.timeout_seconds)
        return Deferred(work, self._finish)

    def _finish(self, outcome: Outcome) -> PartScore:
        if outcome.failure is not None:
            return PartScore(None, outcome.failure, RewardStatus.FAILED)
        value = outcome.value if self.partial_credit else float(outcome.value >= 1.0)
        return PartScore(value, f"the task's scorer gives {outcome.value:g}")


def _entry(metadata: Mapping[str, object], where: str) -> tuple[Mapping[str, object], str]:
    """(the dataset's item, its task)."""
    entry = metadata.get("entry")
    further = entry.get("metadata") if isinstance(entry, Mapping) else None
    task = further.get("source_dataset") if isinstance(further, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(task, str):
        raise DataError(
            f"{where}: kind 'reasoning_gym' needs the key 'entry' with the dataset's item, metadata.source_dataset included"
        )
    if task in BLOCKED_SCORERS:
        raise DataError(f"{where}: the scorer of {task!r} is blocked, it {BLOCKED_SCORERS[task]}; remove the task")
    return entry, task


def _as_json(entry: Mapping[str, object]) -> dict[str, object]:
    """As a worker gets it."""
    return json.loads(json.dumps(dict(entry), default=str))


def check_line(metadata: Mapping[str, object], where: str) -> None:
    """DataError for a line of kind `reasoning_gym` without an entry, of a blocked scorer, of a task that is not known, or whose
    entry lacks what the task's scorer reads: it is run on the entry's own answer and on another one.
    """
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise RewardError("prompts of kind 'reasoning_gym' need reasoning-gym: pip install reasoning-gym") from error
    entry, task = _entry(metadata, where)
    if task not in reasoning_gym.factory.DATASETS:
        raise DataError(f"{where}: reasoning-gym has no task {task!r}")
    own, entry = entry.get("answer"), _as_json(entry)
    try:
        for answer in (own if isinstance(own, str) and own else "1", "0"):
            reasoning_gym_score(task, answer, entry)
    except Exception as error:  # a scorer raises whatever the entry leads to
        raise DataError(
            f"{where}: the scorer of {task!r} fails on this 'entry' ({error!r:.80}): give the item as reasoning-gym made it, with "
            "its answer and all of its metadata"
        ) from error


def reasoning_gym_score(task: str, answer: str, entry: dict[str, object]) -> float:
    """Runs in a worker. Raises RewardError for a blocked or unknown task."""
    if task in BLOCKED_SCORERS:
        raise RewardError(f"the scorer of {task!r} is blocked, it {BLOCKED_SCORERS[task]}")
    return min(max(float(_scorer(task)(answer, entry)), 0.0), 1.0)


@lru_cache
def _scorer(task: str) -> Callable[[str, dict[str, object]], float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def prepare() -> None:
    """Import the library outside the limit of the first item."""
    import reasoning_gym  # noqa: F401
