"""Overlap with evaluation sets by n-grams of words (paper: what shares a 10-gram with an evaluation is left out)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from r1mega.data.sft import read_lines
from r1mega.data.words import ngrams, split_words
from r1mega.errors import DataError

QUESTION_KEYS = ("question", "problem", "prompt", "text")


def evaluation_questions(paths: Iterable[Path]) -> list[str]:
    """The questions of evaluation files (JSONL or Parquet). DataError for a line that has none."""
    return [_question(item, where) for path in paths for where, item in read_lines(path)]


def _question(item: Mapping[str, Any], where: str) -> str:
    for key in QUESTION_KEYS:
        if isinstance(item.get(key), str):
            return item[key]
    raise DataError(f"{where}: an evaluation line needs a text under {', '.join(QUESTION_KEYS)}")


class Contamination:
    """Answers whether a text holds an n-gram of a set of questions. A shorter question counts when all of it occurs."""

    def __init__(self, questions: Iterable[str], ngram: int):
        self._grams: dict[int, set[tuple[str, ...]]] = {}
        for question in questions:
            words = split_words(question)
            size = min(ngram, len(words))
            if size:
                self._grams.setdefault(size, set()).update(ngrams(words, size))

    def __call__(self, text: str) -> bool:
        words = split_words(text)
        return any(not grams.isdisjoint(ngrams(words, size)) for size, grams in self._grams.items())
