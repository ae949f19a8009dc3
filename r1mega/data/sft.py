"""Data of supervised fine-tuning: rows of data files -> token ids with trained spans, in one memory-mapped Arrow file.

A line is {"question", "response", optional "id", "template", "kind", "language", "source"}, where the response is the text
exactly as it follows the rendered prompt, or a conversation {"messages": [{"role", "content"}, ...]} for tokenizers with a
chat template. Every response (each assistant turn) is trained, followed by the tokenizer's end-of-text token.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r1mega.data.rows import content_hash, raise_it, read_rows
from r1mega.data.template import render
from r1mega.data.tokenizer import Tokenizer, with_end
from r1mega.errors import DataError
from r1mega.files import replacing, write_atomic

if TYPE_CHECKING:
    from datasets import Dataset

    from r1mega.config.stages.sft import SFTData

logger = logging.getLogger(__name__)

LINES_AT_A_TIME = 4096
"""Lines that are in memory at one time, of each process that works on them."""

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a sample, and whether it is a response: text that the model is to produce."""

    token_ids: list[int]
    is_response: bool


def read_lines(path: Path, on_bad_line: Callable[[DataError], None] = raise_it) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of a data file (`data/rows.py`); keys without a value are left out.

    Raises DataError for a file that is missing, of another kind, or damaged.
    """
    for row in read_rows(path, on_bad_line=on_bad_line):
        yield row.where, {key: value for key, value in row.values.items() if value is not None}


def segments(item: Mapping[str, Any], where: str, tokenizer: Tokenizer, template: str) -> list[Segment]:
    """The pieces of one line, in order. template: for lines that name none. Raises DataError naming `where`."""
    if "messages" in item:
        return _chat_segments(item["messages"], where, tokenizer)
    for key in ("question", "response"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise DataError(f"{where}: {key!r} is missing or not a text (and there are no 'messages')")
    prompt = tokenizer.encode_prompt(render(item.get("template", template), item["question"]))
    return [Segment(prompt, False), Segment(_response_ids(tokenizer, item["response"]), True)]


def _response_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return with_end(tokenizer, tokenizer.encode(text))


def _chat_segments(messages: Any, where: str, tokenizer: Tokenizer) -> list[Segment]:
    """Each assistant turn is a response; what its chat template puts around it belongs to the prompts."""
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages
    )
    if not valid or not any(m["role"] == "assistant" for m in messages):
        raise DataError(
            f"{where}: 'messages' must be a list of {{'role': {'|'.join(ROLES)}, 'content': text}} with an assistant's turn"
        )
    pieces: list[Segment] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render_chat(messages[:place], add_generation_prompt=True)
        whole = tokenizer.render_chat(messages[: place + 1], add_generation_prompt=False)
        if not (before.startswith(done) and whole.startswith(before)):
            raise DataError(
                f"{where}: the chat template rewrites earlier turns when turn {place + 1} is added, so that the turns cannot "
                "be trained together; give a line for each turn"
            )
        pieces.append(Segment(tokenizer.encode(before[len(done) :]), False))
        pieces.append(Segment(tokenizer.encode(whole[len(before) :]), True))  # ends as the template ends a turn
        done = whole
    return pieces


Line = tuple[str, Mapping[str, Any]]
"""("file:line", what it holds)."""
Row = dict[str, Any]
Tokenise = Callable[[Sequence[Line]], list[Row | DataError]]


def tokenise(data: SFTData, tokenizer: Tokenizer, lines: Sequence[Line]) -> list[Row | DataError]:
    """The rows of a token file, or what is wrong with a line; of each line by itself."""
    found: list[Row | DataError] = []
    for where, line in lines:
        try:
            found.append(_row(line, where, tokenizer, data))
        except DataError as error:
            found.append(error)
    return found


def build_token_file(
    data: SFTData,
    tokenizer: Tokenizer,
    directory: Path,
    rows_of: Tokenise | None = None,
    at_a_time: int = LINES_AT_A_TIME,
) -> Path:
    """Tokenise all lines of `data.files` into directory/tokens.arrow, or keep the file of an earlier start.

    rows_of: `tokenise` of these data, where others do it too; None: this process. at_a_time: lines that it gets.
    Columns: id, question, kind, language, source (texts, maybe null), token_ids (int32), spans (int32: start and end of each
    response, flat). A line of more than data.max_tokens tokens is an error or skipped, by data.on_long. Raises DataError
    (file:line), also when the files are not those of the earlier start.
    """
    path, record = directory / "tokens.arrow", directory / "tokens.json"
    described = {
        "files": {str(file): content_hash(file) for file in data.files},
        **data.model_dump(mode="json", exclude={"files"}),
    }
    if path.exists() and record.exists():
        before = json.loads(record.read_text())["made_from"]
        if before != described:
            changed = [name for name in described["files"] if before["files"].get(name) != described["files"][name]]
            raise DataError(
                f"{', '.join(changed) or 'data'}: not what this run began with; use another run_dir, or put the files back"
            )
        return path
    directory.mkdir(parents=True, exist_ok=True)
    counts = _write_arrow(data, rows_of or functools.partial(tokenise, data, tokenizer), path, at_a_time)
    content = {"made_from": described, "lines": counts, "held_out_by": "prompt"}
    write_atomic(record, json.dumps(content, indent=1) + "\n")
    return path


def _write_arrow(data: SFTData, rows_of: Tokenise, path: Path, at_a_time: int) -> dict[str, int]:
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    numbers = List(Value("int32"))
    texts = {name: Value("large_string") for name in ("id", "question", "kind", "language", "source")}
    counts = {"kept": 0, "bad": 0, "long": 0}
    first_bad = ""

    def on_bad_line(error: DataError) -> None:
        nonlocal first_bad
        if data.on_bad_line == "error":
            raise DataError(f"{error}; mend the line, or set data.on_bad_line=skip") from error
        counts["bad"] += 1
        first_bad = first_bad or str(error)

    features = Features(texts | {"token_ids": numbers, "spans": numbers})
    with replacing(path) as temporary:
        with ArrowWriter(features=features, path=str(temporary)) as writer:
            lines = (line for file in data.files for line in read_lines(file, on_bad_line))
            while batch := list(itertools.islice(lines, at_a_time)):
                for (where, _), row in zip(batch, rows_of(batch), strict=True):
                    if isinstance(row, DataError):
                        on_bad_line(row)
                    elif len(row["token_ids"]) <= data.max_tokens:
                        counts["kept"] += 1
                        writer.write(row)
                    elif data.on_long == "error":
                        raise DataError(
                            f"{where}: {len(row['token_ids'])} tokens, data.max_tokens is {data.max_tokens}; raise it, or set "
                            "data.on_long=skip"
                        )
                    else:
                        counts["long"] += 1
            writer.finalize()
        if not counts["kept"]:
            raise DataError(f"no samples left in {', '.join(map(str, data.files))}")
    if counts["bad"]:
        logger.warning("%d bad lines were skipped; the first: %s", counts["bad"], first_bad)
    if counts["long"]:
        logger.warning(
            "%d lines of more than data.max_tokens = %d tokens were skipped", counts["long"], data.max_tokens
        )
    return counts


def _row(item: Mapping[str, Any], where: str, tokenizer: Tokenizer, data: SFTData) -> dict[str, Any]:
    token_ids: list[int] = []
    spans: list[int] = []
    for piece in segments(item, where, tokenizer, data.template):
        if piece.is_response:
            spans += [len(token_ids), len(token_ids) + len(piece.token_ids)]
        token_ids += piece.token_ids
    question = item.get("question") or next((m["content"] for m in item.get("messages", []) if m["role"] == "user"), "")
    texts = {name: str(item[name]) if name in item else None for name in ("kind", "language", "source")}
    numbers = {"token_ids": np.asarray(token_ids, np.int32), "spans": np.asarray(spans, np.int32)}
    return {"id": str(item.get("id", where)), "question": question} | numbers | texts


class SFTDataset:
    """Tokenised samples, memory-mapped. lengths: tokens of each, [samples]."""

    def __init__(self, path: Path):
        from datasets import Dataset

        self._path = path
        self._rows: Dataset = Dataset.from_file(str(path))
        self._numpy = self._rows.with_format("numpy")
        offsets = self._rows.data.column("token_ids")
        self.lengths: list[int] = [n for chunk in offsets.chunks for n in chunk.value_lengths().to_pylist()]

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self) -> list[str]:
        return self._rows["id"][:]

    def prompts(self) -> list[str]:
        """What tells one prompt from another: the question, or the id of a line without one. Of a file that an earlier version
        made, the ids: its run goes on with the samples that it has held out.
        """
        if json.loads(self._path.with_suffix(".json").read_text()).get("held_out_by") != "prompt":
            return self.ids()
        return [question or name for question, name in zip(self._rows["question"][:], self.ids(), strict=True)]

    def sample(self, index: int, prompt_weight: float) -> tuple[list[int], list[float]]:
        """(token ids, loss weights: 1 on responses, prompt_weight elsewhere) of one sample."""
        row = self._numpy[index]
        weights = [prompt_weight] * len(row["token_ids"])
        spans: Sequence[int] = row["spans"].tolist()
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            weights[start:end] = [1.0] * (end - start)
        return row["token_ids"].tolist(), weights

    def describe(self, index: int) -> dict[str, Any]:
        """id, question, kind, language, source, and the token ids of the last response."""
        row = self._rows[index]
        spans = row.pop("spans")
        return {**row, "token_ids": row["token_ids"][spans[-2] : spans[-1]]}


def held_out_indices(prompts: Sequence[str], share: float, seed: int) -> set[int]:
    """The samples that are kept from training: those of `share` of the prompts, by a hash of these (whatever their order). All
    answers to a prompt are on one side: else the loss on one would be that of a prompt that was trained on.
    """
    limit = int(share * 2**64)
    digests = (hashlib.sha256(f"{seed}/{prompt}".encode()).digest() for prompt in prompts)
    return {i for i, digest in enumerate(digests) if int.from_bytes(digest[:8], "big") < limit}
