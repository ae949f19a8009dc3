"""Prompt files: rows of {"question", "answer"} and optional "id", "kind", "language", anything else; other keys: record.py."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

from r1mega.config.rewards import JUDGED_BY_KEYS, WITHOUT_GOLD
from r1mega.config.schema import DataConfig, Stage
from r1mega.data.record import PromptRecord, UniqueIds, check_keys, check_kind, record_from
from r1mega.data.rows import read_rows
from r1mega.data.template import render
from r1mega.data.tokenizer import Tokenizer, load_tokenizer
from r1mega.errors import DataError
from r1mega.types import Prompt

logger = logging.getLogger(__name__)

DOCUMENT_TOKENS = 4
"""More than any tokenizer puts before a text: the begin-of-text token and sentencepiece's leading space."""


def load_prompts(config: DataConfig, tokenizer: Tokenizer, *, has_keys: bool = True) -> tuple[Prompt, ...]:
    """All prompts of the config's files, rendered and tokenised, in order. has_keys: as for `read_records`.

    Raises DataError (file:line) for a bad line or a prompt of more than max_prompt_tokens tokens, unless on_bad_line or
    on_long_prompt says to skip; what is skipped is counted in a warning. At least one prompt must remain.
    """
    prompts, too_long = [], 0
    for record in read_records(config, has_keys=has_keys):
        token_ids = tuple(tokenizer.encode_prompt(render(config.template, record.question)))
        if len(token_ids) > config.max_prompt_tokens:
            if config.on_long_prompt == "error":
                _check_length(len(token_ids), record, config, has_keys)
            too_long += 1
            continue
        prompts.append(
            Prompt(record.id, record.question, record.answers, record.kind, record.language, token_ids, record.metadata)
        )
    if too_long:
        logger.warning(
            "%d prompts longer than data.max_prompt_tokens = %d were skipped", too_long, config.max_prompt_tokens
        )
    if not prompts:
        raise DataError(f"no prompts left in {', '.join(map(str, config.prompts))}")
    return tuple(prompts)


def scan_data(config: Stage) -> None:
    """Bad lines and prompts that are too long, in any of a stage's prompt files, before anything is started or written."""
    for data in config.prompt_data():
        scan_prompts(data, config.model.path)


def scan_prompts(config: DataConfig, tokenizer_directory: Path, *, has_keys: bool = True) -> None:
    """Raise what `load_prompts` would raise for the lines of the config's files, before any process group starts.

    A text of n bytes has no more than n tokens besides the few that begin a document, so only questions near the limit
    are tokenised: files of short ones are scanned at the speed of reading JSON.
    """
    tokenizer: Tokenizer | None = None
    kept = 0
    for record in read_records(config, has_keys=has_keys):
        text = render(config.template, record.question)
        if len(text.encode()) + DOCUMENT_TOKENS <= config.max_prompt_tokens:
            kept += 1
            continue
        if config.on_long_prompt == "skip" and kept:
            continue
        tokenizer = tokenizer or load_tokenizer(tokenizer_directory)
        num_tokens = len(tokenizer.encode_prompt(text))
        if config.on_long_prompt == "error":
            _check_length(num_tokens, record, config, has_keys)
        kept += num_tokens <= config.max_prompt_tokens
    if not kept:
        raise DataError(f"no prompts left in {', '.join(map(str, config.prompts))}")


def _check_length(num_tokens: int, record: PromptRecord, config: DataConfig, has_keys: bool) -> None:
    if num_tokens > config.max_prompt_tokens:
        limit = "data.max_prompt_tokens is" if has_keys else "the model's context leaves"
        advice = "; raise it, or set data.on_long_prompt=skip" if has_keys else "; shorten it, or take it out"
        raise DataError(
            f"{record.where}: the prompt has {num_tokens} tokens, {limit} {config.max_prompt_tokens}{advice}"
        )


def read_records(config: DataConfig, *, has_keys: bool = True) -> Iterator[PromptRecord]:
    """The checked rows of the config's files, with unique ids.

    A row whose answer is null, empty or NaN has no gold (public sets hold a few): nothing about it can be verified, so it is
    left out, counted in a warning. A row that lacks what its kind is judged by is a bad line. has_keys: whether who asks can
    set the keys of `data`, and so follow the advice to do so.
    """
    unique, bad, without_gold = UniqueIds(), _BadLines(config, has_keys), []
    for path in config.prompts:
        for row in read_rows(path, on_bad_line=bad):
            try:
                record = record_from(row, config.kind, config.language)
                check_kind(record.kind, record.where)
                check_keys(record)
            except DataError as error:
                bad(error)
                continue
            if not record.answers and record.kind not in WITHOUT_GOLD | JUDGED_BY_KEYS:
                without_gold.append(record.where)
                continue
            yield dataclasses.replace(record, id=unique(record.id))
    if without_gold:
        logger.warning("%d lines without an answer were left out; the first: %s", len(without_gold), without_gold[0])
    if bad.skipped:
        logger.warning("%d bad lines were skipped; the first: %s", len(bad.skipped), bad.skipped[0])


class _BadLines:
    """Raises or counts them, by data.on_bad_line."""

    def __init__(self, config: DataConfig, has_keys: bool) -> None:
        self.skipped: list[str] = []
        self._is_fatal = config.on_bad_line == "error"
        self._advice = "mend the line, or set data.on_bad_line=skip" if has_keys else "mend the line"

    def __call__(self, error: DataError) -> None:
        if self._is_fatal:
            raise DataError(f"{error}; {self._advice}") from error
        self.skipped.append(str(error))
