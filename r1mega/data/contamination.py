"""Overlap with evaluation sets by n-grams of words (paper: what shares a 10-gram with an evaluation is left out)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from r1mega.data.rows import MMLU_COLUMNS, Row, first_cells, read_rows
from r1mega.data.words import ngrams, split_words
from r1mega.errors import DataError

QUESTION_KEYS = (
    "question", "problem", "Question", "Problem", "question_content", "problem_statement", "description", "prompt", "text",
)  # fmt: skip
"""Under which of these the evaluation tasks' files have their question, the first that a row has."""


def evaluation_questions(paths: Iterable[Path]) -> list[str]:
    """The questions of evaluation files, in any form that the evaluation tasks read.

    DataError for a row that has none.
    """
    return [_question(row) for path in paths for row in read_rows(path, _columns(Path(path)))]


def _question(row: Row) -> str:
    for key in QUESTION_KEYS:
        if isinstance(row.values.get(key), str) and row.values[key].strip():
            return row.values[key]
    raise DataError(f"{row.where}: an evaluation line needs a text under {', '.join(QUESTION_KEYS)}")


def _columns(path: Path) -> tuple[str, ...] | None:
    """MMLU's for a CSV whose first line names no question; None for any other file."""
    cells = first_cells(path)
    return MMLU_COLUMNS if cells and set(QUESTION_KEYS).isdisjoint(cells) else None


class Contamination:
    """Answers whether a text holds an n-gram of a set of questions."""

    def __init__(self, questions: Iterable[str], ngram: int):
        self._ngram = ngram
        self._grams: dict[int, set[tuple[str, ...]]] = {}
        for question in questions:
            words = split_words(question)
            size = min(ngram, len(words))
            if size:
                self._grams.setdefault(size, set()).update(ngrams(words, size))

    def __call__(self, text: str, *, shorter: bool = True) -> bool:
        """shorter: a question of fewer words counts as well, when all of it occurs. That is for questions: of a response,
        two words such as "the trachea", which some set asks to complete, say nothing.
        """
        words = split_words(text)
        return any(
            not grams.isdisjoint(ngrams(words, size))
            for size, grams in self._grams.items()
            if shorter or size == self._ngram
        )
