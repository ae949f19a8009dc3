"""Preference files: rows of {"question", "chosen", "rejected", optional "margin"}, or of {"question", "response",
"safe"}. TRL's key "prompt" is a question as well; texts may be chats of one turn, as it has them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1mega.data.record import question_text
from r1mega.data.rows import QUESTION_KEYS, Row, is_chat, is_missing, read_rows
from r1mega.data.template import render
from r1mega.data.tokenizer import Tokenizer, with_end
from r1mega.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """margin: by how much the chosen one is better, in whatever unit its judges used; None: not said."""

    where: str
    question: str
    chosen: str
    rejected: str
    margin: float | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether one response is safe."""

    where: str
    question: str
    response: str
    safe: bool


def read_pairs(paths: Sequence[Path], min_margin: float = 0.0) -> list[Pair]:
    """All pairs; those whose stated margin is below min_margin are unclear: dropped, and counted in a warning.

    Raises DataError (file:line) for a bad line, and when nothing is left.
    """
    pairs = [_pair(row) for row in _lines(paths)]
    kept = [pair for pair in pairs if pair.margin is None or pair.margin >= min_margin]
    if len(kept) < len(pairs):
        logger.warning(
            "%d of %d pairs have a margin below %g and were dropped", len(pairs) - len(kept), len(pairs), min_margin
        )
    if not kept:
        raise DataError(
            f"{', '.join(map(str, paths))}: no pairs left of {len(pairs)}; lower data.min_margin, or add data"
        )
    return kept


def read_judgements(paths: Sequence[Path]) -> list[Judgement]:
    """All judgements. Raises DataError (file:line) for a bad line, and when there are none."""
    judgements = [_judgement(row) for row in _lines(paths)]
    if not judgements:
        raise DataError(f"{', '.join(map(str, paths))}: no lines")
    return judgements


def encode(tokenizer: Tokenizer, template: str, question: str, text: str) -> list[int]:
    """What a reward model reads of a response: the rendered prompt, the text, the end-of-text token."""
    return [*tokenizer.encode_prompt(render(template, question)), *with_end(tokenizer, tokenizer.encode(text))]


def _lines(paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        yield from read_rows(path)


def _question(row: Row) -> str:
    key = next((key for key in QUESTION_KEYS if not is_missing(row.values.get(key))), QUESTION_KEYS[0])
    return question_text(row.values.get(key), key, row)


def _response(row: Row, key: str) -> str:
    """A text, or the assistant's turn: a chat of this alone, or of the question's turn and this."""
    value = row.values.get(key)
    if isinstance(value, list) and is_chat(value):
        turns = [(turn["role"], turn["content"]) for turn in value]
        if [role for role, _ in turns] not in (["assistant"], ["user", "assistant"]):
            roles = ", ".join(role for role, _ in turns)
            raise DataError(
                f"{row.where}: {key!r} is a conversation ({roles}): a response here is one turn of the assistant"
            )
        if len(turns) == 2 and (asked := turns[0][1]) != _question(row):
            raise DataError(f"{row.where}: {key!r} answers {asked!r:.60}, which is not the row's question")
        value = turns[-1][1]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.where}: {key!r} is missing or not a text; the row's keys: {row.keys()}")
    return value


def _pair(row: Row) -> Pair:
    question, chosen, rejected = _question(row), _response(row, "chosen"), _response(row, "rejected")
    if chosen == rejected:
        raise DataError(f"{row.where}: 'chosen' and 'rejected' are the same text: there is nothing to learn from it")
    margin = row.values.get("margin")
    if margin is not None and (
        isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin)
    ):
        raise DataError(f"{row.where}: 'margin' is {margin!r}, not a number")
    return Pair(row.where, question, chosen, rejected, None if margin is None else float(margin))


def _judgement(row: Row) -> Judgement:
    safe = row.values.get("safe")
    if not isinstance(safe, bool):
        raise DataError(f"{row.where}: 'safe' is {safe!r}, not true or false")
    return Judgement(row.where, _question(row), _response(row, "response"), safe)
