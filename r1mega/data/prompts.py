"""Prompt files: JSONL of {"question", "answer"} and optional "id", "kind", "language", anything else."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config.rewards import ACCURACY, WITHOUT_GOLD
from r1mega.config.schema import DataConfig, Stage
from r1mega.data.template import render
from r1mega.data.tokenizer import Tokenizer, load_tokenizer
from r1mega.errors import DataError
from r1mega.types import Prompt

logger = logging.getLogger(__name__)

OWN_KEYS = ("id", "question", "answer", "kind", "language")
_AFTER_SOLUTION = re.compile(r"####\s*(.+?)\s*$")
DOCUMENT_TOKENS = 4
"""More than any tokenizer puts before a text: the begin-of-text token and sentencepiece's leading space."""


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A checked line. where: "file:line" for messages. answers: none when the line has no gold."""

    where: str
    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    language: str | None
    metadata: dict[str, Any]


def after_solution(answer: str) -> str:
    """The answer itself, where the text is a solution that ends in "#### 1,234", as in GSM8K's own files: 1234."""
    found = _AFTER_SOLUTION.search(answer)
    return found[1].replace(",", "") if found else answer


def load_prompts(config: DataConfig, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """All prompts of the config's files, rendered and tokenised, in order.

    Raises DataError (file:line) for a bad line or a prompt of more than max_prompt_tokens tokens, unless on_bad_line or
    on_long_prompt says to skip; what is skipped is counted in a warning. At least one prompt must remain.
    """
    prompts, too_long = [], 0
    for record in read_records(config):
        token_ids = tuple(tokenizer.encode_prompt(render(config.template, record.question)))
        if len(token_ids) > config.max_prompt_tokens:
            if config.on_long_prompt == "error":
                _check_length(len(token_ids), record, config)
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


def scan_prompts(config: DataConfig, tokenizer_directory: Path) -> None:
    """Raise what `load_prompts` would raise for the lines of the config's files, before any process group starts.

    A text of n bytes has no more than n tokens besides the few that begin a document, so only questions near the limit
    are tokenised: files of short ones are scanned at the speed of reading JSON.
    """
    tokenizer: Tokenizer | None = None
    kept = 0
    for record in read_records(config):
        check_kind(record.kind, record.where)
        text = render(config.template, record.question)
        if len(text.encode()) + DOCUMENT_TOKENS <= config.max_prompt_tokens:
            kept += 1
            continue
        if config.on_long_prompt == "skip" and kept:
            continue
        tokenizer = tokenizer or load_tokenizer(tokenizer_directory)
        num_tokens = len(tokenizer.encode_prompt(text))
        if config.on_long_prompt == "error":
            _check_length(num_tokens, record, config)
        kept += num_tokens <= config.max_prompt_tokens
    if not kept:
        raise DataError(f"no prompts left in {', '.join(map(str, config.prompts))}")


def check_kind(kind: str, where: str) -> None:
    """DataError for a kind that nothing judges."""
    known = (*ACCURACY, *sorted(WITHOUT_GOLD))
    if kind not in known:
        raise DataError(f"{where}: kind {kind!r} has no reward; known are {', '.join(known)}")


def _check_length(num_tokens: int, record: PromptRecord, config: DataConfig) -> None:
    if num_tokens > config.max_prompt_tokens:
        raise DataError(
            f"{record.where}: the prompt has {num_tokens} tokens, data.max_prompt_tokens is "
            f"{config.max_prompt_tokens}; raise it, or set data.on_long_prompt=skip"
        )


def read_records(config: DataConfig) -> Iterator[PromptRecord]:
    """The checked lines of the config's files. Ids that occur again get a suffix, so that each is unique.

    A line whose answer is null or empty has no gold (public sets hold a few): nothing about it can be verified, so it is
    left out, counted in a warning. A missing answer, or one of another type, is a bad line.
    """
    seen: dict[str, int] = {}
    skipped: list[str] = []
    without_gold: list[str] = []
    for path in config.prompts:
        if not path.is_file():
            raise DataError(f"{path}: no such file (data.prompts)")
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = _record(line, f"{path}:{number}", config)
                except DataError as error:
                    if config.on_bad_line == "error":
                        raise DataError(f"{error}; mend the line, or set data.on_bad_line=skip") from error
                    skipped.append(str(error))
                    continue
                if not record.answers and record.kind not in WITHOUT_GOLD:
                    without_gold.append(record.where)
                    continue
                seen[record.id] = seen.get(record.id, 0) + 1
                if seen[record.id] > 1:
                    record = PromptRecord(
                        record.where, f"{record.id}#{seen[record.id]}", record.question, record.answers, record.kind,
                        record.language, record.metadata,
                    )  # fmt: skip
                yield record
    if without_gold:
        logger.warning("%d lines without an answer were left out; the first: %s", len(without_gold), without_gold[0])
    if skipped:
        logger.warning("%d bad lines were skipped; the first: %s", len(skipped), skipped[0])


def _record(line: bytes, where: str, config: DataConfig) -> PromptRecord:
    try:
        item = json.loads(line)
        if b"\\ud" in line.lower():  # half of a surrogate pair is JSON, but no text
            json.dumps(item, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, UnicodeEncodeError
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(item, dict):
        raise DataError(f"{where}: a JSON {type(item).__name__}, not an object")
    question, answer = item.get("question"), item.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: 'question' is missing or not a text")
    if "answer" not in item and item.get("kind", config.kind) not in WITHOUT_GOLD:
        raise DataError(f"{where}: 'answer' is missing")
    answers = tuple(answer) if isinstance(answer, list) else (answer,)
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        answers = ()
    elif not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        shown = json.dumps(answer, ensure_ascii=False)
        raise DataError(f"{where}: 'answer' is {shown[:60]}: it must be a string, or a list of non-empty ones")
    kind, language = item.get("kind", config.kind), item.get("language", config.language)
    if kind == "math":
        answers = tuple(map(after_solution, answers))
    for key, value in (("kind", kind), ("language", language)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {key!r} is {value!r}, not a string")
    identity = str(item.get("id", where))
    metadata = {key: value for key, value in item.items() if key not in OWN_KEYS}
    return PromptRecord(where, identity, question, answers, kind, language, metadata)
