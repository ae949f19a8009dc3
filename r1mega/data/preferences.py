"""Preference files: rows of {"question", "chosen", "rejected", optional "margin"}, or of {"question", "response",
"safe"}.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.data.rows import read_rows
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
    pairs = [_pair(record, where) for record, where in _lines(paths)]
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
    judgements = [_judgement(record, where) for record, where in _lines(paths)]
    if not judgements:
        raise DataError(f"{', '.join(map(str, paths))}: no lines")
    return judgements


def encode(tokenizer: Tokenizer, template: str, question: str, text: str) -> list[int]:
    """What a reward model reads of a response: the rendered prompt, the text, the end-of-text token."""
    return [*tokenizer.encode_prompt(render(template, question)), *with_end(tokenizer, tokenizer.encode(text))]


def _lines(paths: Sequence[Path]) -> Iterator[tuple[Mapping[str, Any], str]]:
    for path in paths:
        for row in read_rows(path):
            yield row.values, row.where


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key!r} is missing or not a text")
    return value


def _pair(record: Mapping[str, Any], where: str) -> Pair:
    question, chosen, rejected = (_text(record, key, where) for key in ("question", "chosen", "rejected"))
    if chosen == rejected:
        raise DataError(f"{where}: 'chosen' and 'rejected' are the same text: there is nothing to learn from it")
    margin = record.get("margin")
    if margin is not None and (
        isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin)
    ):
        raise DataError(f"{where}: 'margin' is {margin!r}, not a number")
    return Pair(where, question, chosen, rejected, None if margin is None else float(margin))


def _judgement(record: Mapping[str, Any], where: str) -> Judgement:
    question, response = (_text(record, key, where) for key in ("question", "response"))
    if not isinstance(record.get("safe"), bool):
        raise DataError(f"{where}: 'safe' is {record.get('safe')!r}, not true or false")
    return Judgement(where, question, response, record["safe"])
