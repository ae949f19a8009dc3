"""The rows of a published data file, whatever its container: JSONL, JSON, CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.errors import DataError

MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
"""Columns of the original MMLU files, which have no header line."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row. where: "file:line" (JSONL, CSV) or "file: row n" for messages; number: from 1."""

    where: str
    number: int
    values: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The first of these keys that the row has, a text that is not blank. DataError names them otherwise."""
        name, value = self._first(names)
        if not isinstance(value, str) or not value.strip() or not is_unicode(value):
            raise DataError(f"{self.where}: {name!r} is {value!r:.60}, not a text")
        return value

    def words(self, *names: str) -> str:
        """As `text`, numbers written out: published answers and ids are one or the other."""
        name, value = self._first(names)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise DataError(f"{self.where}: {name!r} is {value!r:.60}, neither a text nor a number")
        return str(value).strip()

    def optional(self, *names: str) -> Any:
        """The first of these keys with a value; None without any."""
        return next((self.values[name] for name in names if self.values.get(name) not in (None, "")), None)

    def identity(self, *names: str) -> str:
        """The row's own id if it has one of these keys, else its place in the file."""
        found = self.optional(*names)
        return str(self.number - 1) if found is None else str(found)

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        name = next((name for name in names if name in self.values), None)
        if name is None:
            known = ", ".join(map(str, self.values)) or "none"
            raise DataError(f"{self.where}: {' or '.join(map(repr, names))} is missing; the row's keys: {known}")
        return name, self.values[name]


def is_unicode(text: str) -> bool:
    """Whether a text can be written: half of a surrogate pair, which JSON can escape, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_rows(path: Path, columns: tuple[str, ...] | None = None) -> Iterator[Row]:
    """The rows of a file, by its ending. columns: names of a CSV's columns when the file has no header line.

    Raises DataError for a file that is missing, of another kind or damaged, naming the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; known are {', '.join(_READERS)}")
    if reader is _csv:
        yield from _csv(path, columns)
    else:
        yield from reader(path)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}: not JSON ({error})") from error
                yield _row(where, number, value)


def _json(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, list):
        raise DataError(f"{path}: a JSON {type(values).__name__}, not a list of objects")
    for number, value in enumerate(values, start=1):
        yield _row(f"{path}: row {number}", number, value)


def _csv(path: Path, columns: tuple[str, ...] | None) -> Iterator[Row]:
    csv.field_size_limit(1 << 24)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, fieldnames=columns)
        for number, values in enumerate(reader, start=1):
            where = f"{path}:{reader.line_num}"
            if None in values or None in values.values():
                raise DataError(f"{where}: {len(reader.fieldnames or ())} columns expected: {reader.fieldnames}")
            yield Row(where, number, values)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", number, values)
    except pyarrow.lib.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from error


def _row(where: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}, not an object")
    return Row(where, number, value)


_READERS: dict[str, Callable[..., Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
