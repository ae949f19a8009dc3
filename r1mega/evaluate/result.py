"""The outcome of an evaluation: a row a prompt, the summary over them, files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.data.language import chain_of_thought, language_share, mixes_languages
from r1mega.errors import DataError
from r1mega.evaluate.metrics import Estimate, majority, pass_at_1, pass_at_k
from r1mega.evaluate.rating import Rating, estimate_rating
from r1mega.files import write_atomic
from r1mega.reward.choice import same_choice
from r1mega.reward.extract import final_answer
from r1mega.reward.math import decide
from r1mega.reward.reflection import reflects
from r1mega.types import Prompt, Reward, RewardStatus

if TYPE_CHECKING:
    from r1mega.rollout.draw import GradedSample


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One prompt and its samples. correct, well_formed: None where the reward could not be computed.

    consensus: the majority answer, None when no sample has one; consensus_correct: its verdict (no answer is wrong),
    None for prompts without a gold answer, such as code, or when no member of the majority was judged. language: the
    one that the reasoning should be in (ISO 639-1), None when the prompt does not say. rating: the
    problem's difficulty on the Elo scale, where its file has one.
    """

    prompt_id: str
    question: str
    golds: tuple[str, ...]
    kind: str
    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
    answers: tuple[str | None, ...]
    correct: tuple[bool | None, ...]
    well_formed: tuple[bool | None, ...]
    consensus: str | None
    consensus_correct: bool | None
    language: str | None = None
    rating: float | None = None

    @property
    def judged(self) -> tuple[bool, ...]:
        """The verdicts that there are."""
        return tuple(verdict for verdict in self.correct if verdict is not None)


def evaluation_row(prompt: Prompt, graded: Sequence[GradedSample]) -> EvaluationRow:
    """The row of a prompt. A sample is correct when its accuracy part is 1, well formed when its format part is 1."""
    samples, rewards = [g.sample for g in graded], [g.reward for g in graded]
    answers = tuple(final_answer(sample.text) for sample in samples)
    correct = tuple(_part(reward, "accuracy") for reward in rewards)
    members = majority(answers, _EQUAL.get(prompt.kind, _equal_by_rule)) if prompt.answers else []
    verdict = next((correct[i] for i in members if correct[i] is not None), None)
    if prompt.answers and not members:
        verdict = False
    rating = prompt.metadata.get("rating")
    return EvaluationRow(
        prompt_id=prompt.id,
        question=prompt.question,
        golds=prompt.answers,
        kind=prompt.kind,
        texts=tuple(sample.text for sample in samples),
        lengths=tuple(sample.length for sample in samples),
        truncated=tuple(sample.truncated for sample in samples),
        answers=answers,
        correct=correct,
        well_formed=tuple(_part(reward, "format") for reward in rewards),
        consensus=answers[members[0]] if members else None,
        consensus_correct=verdict,
        language=prompt.language,
        rating=float(rating) if isinstance(rating, int | float) and not isinstance(rating, bool) else None,
    )


def evaluation_rows(
    prompts: Sequence[Prompt], graded: Iterable[GradedSample], num_samples: int
) -> tuple[EvaluationRow, ...]:
    """A row a prompt, in order. ValueError when one of its num_samples samples is missing."""
    by_key = {(g.sample.prompt_id, g.sample.index): g for g in graded}
    try:
        return tuple(
            evaluation_row(prompt, [by_key[prompt.id, index] for index in range(num_samples)]) for prompt in prompts
        )
    except KeyError as error:
        raise ValueError(f"sample {error} is missing") from error


def _part(reward: Reward, name: str) -> bool | None:
    return reward.parts[name] >= 1.0 if reward.status == RewardStatus.OK and name in reward.parts else None


def _equal_by_rule(first: str, second: str) -> bool:
    """Equality of two answers on the math reward's fast path; what only algebra could decide counts as different."""
    return decide((first,), second).equal is True


_EQUAL = {"choice": same_choice, "logic": same_choice}
"""When two answers are the same, by the prompt's kind; the math rule for all others."""


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Rows and how they came about. settings: checkpoint, data, sampling (JSON types); seconds: wall time."""

    rows: tuple[EvaluationRow, ...]
    num_samples: int
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> Estimate | None:
        """pass@1 over the prompts with at least one judged sample; None when there is none."""
        judged = [row.judged for row in self.rows if row.judged]
        return pass_at_1(judged) if judged else None

    @property
    def consensus(self) -> float | None:
        """cons@k: accuracy of the majority answers; None without prompts that have gold answers."""
        return _mean([row.consensus_correct for row in self.rows])

    def pass_at(self, k: int) -> float | None:
        """pass@k over the prompts with at least k judged samples; None when there is none."""
        judged = [row.judged for row in self.rows if len(row.judged) >= k]
        return _mean([pass_at_k(len(verdicts), sum(verdicts), k) for verdicts in judged])

    @property
    def rating(self) -> Rating | None:
        """Elo rating from the judged prompts that have one; None without such prompts."""
        rated = [(row.rating, row.judged) for row in self.rows if row.rating is not None and row.judged]
        solved = [sum(judged) / len(judged) for _, judged in rated]
        return estimate_rating([rating for rating, _ in rated], solved) if rated else None

    @property
    def excluded_fraction(self) -> float:
        """Samples whose reward could not be computed."""
        verdicts = [verdict for row in self.rows for verdict in row.correct]
        return verdicts.count(None) / len(verdicts) if verdicts else 0.0

    def metrics(self) -> dict[str, float]:
        """The summary under the names of observe/registry.py; what is not defined is left out."""
        values: dict[str, float | None] = {}
        if (accuracy := self.accuracy) is not None:
            values = {
                "eval/accuracy": accuracy.value,
                "eval/accuracy_low": accuracy.low,
                "eval/accuracy_high": accuracy.high,
            }
        values |= {
            "eval/format": _mean([verdict for row in self.rows for verdict in row.well_formed]),
            "eval/length_mean": _mean([length for row in self.rows for length in row.lengths]),
            "eval/truncated_fraction": _mean([cut for row in self.rows for cut in row.truncated]),
            "eval/reflection_fraction": _mean([reflects(text) for row in self.rows for text in row.texts]),
            "eval/mixed_language_fraction": _mean([mixes_languages(text) for row in self.rows for text in row.texts]),
            "eval/language_share": _mean(
                [
                    language_share(chain_of_thought(text), row.language)
                    for row in self.rows
                    if row.language is not None
                    for text in row.texts
                ]
            ),
            "eval/excluded_fraction": self.excluded_fraction,
            "eval/prompts": float(len(self.rows)),
        }
        if (rating := self.rating) is not None:
            values |= {"eval/rating": rating.value, "eval/rating_low": rating.low, "eval/rating_high": rating.high}
        if self.num_samples > 1:
            values["eval/consensus"] = self.consensus
            values[f"eval/pass_at_{self.num_samples}"] = self.pass_at(self.num_samples)
        return {name: value for name, value in values.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Summary first, then settings and rows: what `write_result` stores."""
        return {
            "summary": self.metrics(),
            "settings": dict(self.settings),
            "num_samples": self.num_samples,
            "seconds": self.seconds,
            "rows": [asdict(row) for row in self.rows],
        }


def merge_results(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """One result of those of several ranks (disjoint prompts, the same settings). Sums are exact, so its metrics do
    not depend on how the prompts were divided.
    """
    rows = tuple(sorted((row for result in results for row in result.rows), key=lambda row: row.prompt_id))
    return EvaluationResult(rows, results[0].num_samples, max(r.seconds for r in results), results[0].settings)


def write_result(result: EvaluationResult, path: Path) -> None:
    """Store a result as one JSON file (atomically)."""
    write_atomic(path, json.dumps(result.to_json(), ensure_ascii=False, indent=1) + "\n")


def read_result(path: Path) -> EvaluationResult:
    """A stored result; DataError when the file is missing or something else."""
    try:
        stored = json.loads(Path(path).read_text())
        for row in stored["rows"]:
            row.update({key: tuple(value) for key, value in row.items() if isinstance(value, list)})
        rows = tuple(EvaluationRow(**row) for row in stored["rows"])
        return EvaluationResult(rows, stored["num_samples"], stored["seconds"], stored["settings"])
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the results file of an evaluation ({error!r})") from error


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
