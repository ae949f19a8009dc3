"""The rows of a published data file, whatever its container: JSONL, JSON, CSV, Parquet or Arrow, packed or not, a directory
of them, or a set saved by `datasets`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from r1mega.data.text import decode, other_encoding, parse_json, wide_encoding
from r1mega.errors import DataError

MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
"""Columns of the original MMLU files, which have no header line."""

QUESTION_KEYS = ("question", "problem", "prompt", "Question", "Problem")
"""Under which a row has its question, the first that it has: a text, or messages of a chat."""
_JSON_ENDINGS = (".jsonl", ".json", ".ndjson", ".jsonlines")
_CSV_ENDINGS = (".csv", ".tsv")
_ENDINGS = (*_JSON_ENDINGS, *_CSV_ENDINGS, ".parquet", ".arrow")
_PACKED: Mapping[str, tuple[bytes, Callable[[Path], io.BufferedIOBase]]] = {
    ".gz": (b"\x1f\x8b", gzip.GzipFile),
    ".bz2": (b"BZh", bz2.BZ2File),
    ".xz": (b"\xfd7zXZ\0", lzma.LZMAFile),
}
_HEAD_BYTES = 512
_AS_CSV = "save the sheet with the rows as CSV in UTF-8"
_REFUSED: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it: zstd -d {0}"),
    *(
        (30, name, "a workbook", _AS_CSV)
        for name in (b"[Content_Types].xml", b"_rels/", b"docProps/", b"xl/", b"mimetype")
    ),
    (0, b"\xd0\xcf\x11\xe0", "a workbook", _AS_CSV),
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it: python -m zipfile -e {0} DIRECTORY"),
    (257, b"ustar", "a tar archive", "unpack it: tar -xf {0}"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the data", "fetch the data: git lfs pull"),
    (0, b"SQLite format 3", "an SQLite database", "write its table as JSONL or Parquet"),
    (0, b"\x80", "a Python pickle", "write it as JSONL or Parquet where it was made: DataFrame.to_parquet"),
)
"""(offset, bytes there, what it is, what to do) of files that hold no rows that can be read here."""
_AS_COMMAS = 'write it anew: python -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={0!r}))" < {1} > NEW'
_ENDLESS = re.compile("unexpected end of data|larger than field limit")
_PAGE = re.compile(rb"<(?:!doctype|html|\?xml)", re.IGNORECASE)
_SPLIT = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?=[-_.])")
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row. where: "file:line" (JSONL, CSV) or "file: row n" for messages; number: from 1."""

    where: str
    number: int
    values: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The first of these keys that the row has, a text that is not blank. DataError names them otherwise."""
        name, value = self._first(names)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.where}: {name!r} is {value!r:.60}, not a text")
        return value

    def words(self, *names: str) -> str:
        """As `text`, numbers written out: published answers and ids are one or the other."""
        name, value = self._first(names)
        written = as_text(value)
        if not written:
            raise DataError(f"{self.where}: {name!r} is {value!r:.60}, neither a text nor a finite number")
        return written

    def optional(self, *names: str) -> Any:
        """The first of these keys with a value; None without any."""
        return next((self.values[name] for name in names if not is_missing(self.values.get(name))), None)

    def identity(self, *names: str) -> str:
        """The row's own id if it has one of these keys, else its place in the file."""
        return as_text(self.optional(*names)) or str(self.number - 1)

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        name = next((name for name in names if name in self.values), None)
        if name is None:
            raise DataError(f"{self.where}: {' or '.join(map(repr, names))} is missing; the row's keys: {self.keys()}")
        return name, self.values[name]

    def keys(self) -> str:
        """The keys of the row, for messages."""
        return ", ".join(map(str, self.values)) or "none"


def as_text(value: object) -> str | None:
    """A text without the blanks around it, a finite number as it is written; None for anything else.

    Columns of numbers of which one is missing become floats (pandas): a whole one is written without its ".0".
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if not isinstance(value, int) and not math.isfinite(value):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)


def is_missing(value: object) -> bool:
    """null, an empty text, or NaN, which pandas writes for a number that is missing."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def raise_it(error: DataError) -> None:
    """What to do about a bad line, unless a caller knows better."""
    raise error


def read_rows(
    path: Path, columns: tuple[str, ...] | None = None, on_bad_line: Callable[[DataError], None] = raise_it
) -> Iterator[Row]:
    """The rows of a file (by its ending and its first bytes), or of the files that a directory stands for (`data_files`).

    columns: names of a CSV's columns when the file has no header line. on_bad_line: told of a line that is no JSON, no UTF-8,
    or has not the columns of its CSV; where it returns, the line is left out. Raises DataError for a file that is missing, of another kind or damaged, naming
    the line, and what to do about it.
    """
    for file in data_files(Path(path)):
        try:
            yield from _rows_of(file, columns, on_bad_line)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if reason := getattr(error, "strerror", None):
                raise DataError(f"{file}: cannot be read ({reason})") from error
            raise DataError(f"{file}: cannot be read to its end ({error}); is it whole?") from error


def data_files(path: Path) -> list[Path]:
    """The files that a path stands for: itself; the data files in a directory, by name; the Arrow files of a set that
    `datasets` saved. DataError when there are none, or when they are those of several splits.
    """
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path}: no such file")
        return [path]
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise DataError(
            f"{path}: holds the splits {', '.join(splits)}; name the one that is meant, as {path / splits[0]}"
        )
    if (path / "state.json").exists():
        return _saved_files(path)
    files = sorted(file for file in path.iterdir() if file.is_file() and _ending(file) in _ENDINGS)
    files = [file for file in files if file.name not in _NO_DATA and not file.name.startswith(".")]
    if not files:
        below = {file.parent for file in path.rglob("*") if file.is_file() and _ending(file) in _ENDINGS}
        hint = f"; there are some in {', '.join(map(str, sorted(below)[:3]))}: name one of these" if below else ""
        raise DataError(f"{path}: a directory without data files ({', '.join(_ENDINGS)}){hint}")
    if len({found[1] if (found := _SPLIT.search(file.name)) else None for file in files}) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise DataError(
            f"{path}: holds files of several splits ({names}, ...); name those files that are meant, one by one"
        )
    return files


def content_hash(path: Path) -> str:
    """SHA-256 of a file; of a directory, of its data files one after the other. DataError as for `data_files`."""
    digest = hashlib.sha256()
    for part in data_files(path):
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _saved_files(path: Path) -> list[Path]:
    """Of Dataset.save_to_disk. Old versions wrote a selection beside the whole data."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        files = [path / file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / 'state.json'}: not the state of a saved data set ({error!r})") from error
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(f"{path}: a selection of a data set; save it by Dataset.flatten_indices().save_to_disk")
    return files


def _ending(path: Path) -> str:
    """Of what the file holds once unpacked."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _PACKED else path.suffix.lower()


def _open(path: Path) -> io.BufferedIOBase:
    """The content, unpacked if the first bytes say that it is packed."""
    with path.open("rb") as file:
        head = file.read(8)
    opener = next((opener for magic, opener in _PACKED.values() if head.startswith(magic)), None)
    return path.open("rb") if opener is None else opener(path)


def _rows_of(path: Path, columns: tuple[str, ...] | None, on_bad_line: Callable[[DataError], None]) -> Iterator[Row]:
    with _open(path) as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        for offset, magic, kind, advice in _REFUSED:
            if head[offset : offset + len(magic)] == magic:
                raise DataError(f"{path}: {kind}; {advice.format(path)}")
        ending, start = _ending(path), head.removeprefix(b"\xef\xbb\xbf").lstrip()
        first = start[:1]
        if ending not in _CSV_ENDINGS and _PAGE.match(start):
            raise DataError(f"{path}: a web page or XML; download the file itself, not the page that shows it")
        if head.startswith(b"PAR1") or ending == ".parquet":
            yield from _parquet(path, file)
        elif head.startswith(b"ARROW1") or ending == ".arrow":
            yield from _arrow(path, file, head.startswith(b"ARROW1"))
        elif encoding := wide_encoding(head):
            raise DataError(other_encoding(path, encoding, path))
        elif ending in _CSV_ENDINGS:
            yield from _csv(path, file, columns, "\t" if ending == ".tsv" else ",", on_bad_line)
        elif ending not in _JSON_ENDINGS and first != b"{":
            raise DataError(f"{path}: unknown kind of file {path.suffix!r}; known are {', '.join(_ENDINGS)}")
        elif first == b"[" or (ending == ".json" and _is_one_value(file)):
            yield from _json(path, file)
        else:
            yield from _json_lines(path, file, on_bad_line)


def _is_one_value(file: io.BufferedIOBase) -> bool:
    """Whether a .json file holds one value, and not a line of JSON for each row, as many do."""
    content = file.read()
    file.seek(0)
    try:
        json.loads(content)
    except ValueError as error:
        return not (isinstance(error, json.JSONDecodeError) and error.msg == "Extra data")
    except RecursionError:
        return False
    return True


def _json_lines(path: Path, file: io.BufferedIOBase, on_bad_line: Callable[[DataError], None]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield _row(where, number, parse_json(line, where))
        except DataError as error:
            on_bad_line(error)


def _json(path: Path, file: io.BufferedIOBase) -> Iterator[Row]:
    values = parse_json(file.read(), str(path))
    if isinstance(values, dict) and _is_row(values):
        values = [values]
    if not isinstance(values, list):
        keys = f" with the keys {', '.join(map(str, values))[:80]}" if isinstance(values, dict) and values else ""
        raise DataError(
            f"{path}: a JSON {type(values).__name__}{keys}, not a list of objects, nor a line for each of them; pandas "
            "writes lines by DataFrame.to_json(PATH, orient='records', lines=True)"
        )
    for number, value in enumerate(values, start=1):
        yield _row(f"{path}: row {number}", number, value)


def _is_row(value: Mapping[str, object]) -> bool:
    """Whether an object is one row, and not a table: pandas' columns, or rows under a key. A row with a question may hold lists
    of objects as well: its tests.
    """
    asked = (value.get(key) for key in QUESTION_KEYS)
    if any(isinstance(one, str) or is_chat(one) for one in asked):
        return True
    has_rows = any(
        isinstance(one, list) and one and all(isinstance(each, dict) for each in one) and not is_chat(one)
        for one in value.values()
    )
    return not has_rows and not all(isinstance(one, dict) for one in value.values())


def is_chat(value: object) -> bool:
    """Whether a value is the messages of a conversation: [{"role", "content"}], one at least."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def _csv(
    path: Path,
    file: io.BufferedIOBase,
    columns: tuple[str, ...] | None,
    delimiter: str,
    on_bad_line: Callable[[DataError], None],
) -> Iterator[Row]:
    csv.field_size_limit(1 << 24)
    undecoded: list[DataError] = []  # of the lines of the row that is being read

    def decoded() -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            try:
                yield decode(line, f"{path}:{number}")
            except DataError as error:
                undecoded.append(error)
                yield line.decode("utf-8", "replace")

    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    names = list(columns or ())
    number = 0
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            bad = DataError(_not_csv(path, begin, reader.line_num, error))
            if not names or _ENDLESS.search(str(error)):
                raise bad from error
            undecoded[:0] = [bad]
            cells = [""]
        if cells is None:
            return
        if undecoded and not names:
            raise undecoded[0]
        if cells and not names:
            names = cells
            if len(names) == 1 and (mark := re.search(r"[;|\t]", names[0])):
                raise DataError(
                    f"{path}:{begin}: columns apart by {mark[0]!r}, not by commas; {_AS_COMMAS.format(mark[0], path)}"
                )
            if twice := sorted({name for name in names if name and names.count(name) > 1}):
                raise DataError(
                    f"{path}:{begin}: several columns are named {', '.join(twice)}; which one is meant? Rename the others"
                )
            continue
        number += bool(cells)
        where = f"{path}:{reader.line_num}"
        if undecoded:
            on_bad_line(undecoded[0])
            undecoded.clear()
        elif cells and len(cells) != len(names):
            on_bad_line(DataError(f"{where}: {len(names)} columns expected: {names}"))
        elif cells:
            yield Row(where, number, dict(zip(names, cells, strict=True)))


def _not_csv(path: Path, begin: int, end: int, error: csv.Error) -> str:
    if _ENDLESS.search(str(error)):
        return f"{path}:{begin}: a quote that is opened here is not closed again; close it, or write a literal one twice in quotes"
    if "new-line" in str(error):
        return (
            f"{path}:{begin}: lines that end in a carriage return alone; write it anew: tr '\\r' '\\n' < {path} > NEW"
        )
    lines = f"{begin}" if begin == end else f"{begin} to {end}"
    return f"{path}:{end}: not CSV ({error}; row of line {lines}); a quote within quotes is written twice"


def first_cells(path: Path) -> list[str]:
    """The first line of a CSV, which may be its header; empty for another kind of file, or none."""
    if _ending(path) not in _CSV_ENDINGS or not path.is_file():
        return []
    with _open(path) as file:
        line = decode(file.readline(), f"{path}:1")
    return [cell.strip() for cell in next(csv.reader([line]), [])]


def _parquet(path: Path, file: io.BufferedIOBase) -> Iterator[Row]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if path.suffix in _PACKED else path) as table:
            yield from _batches(path, table.iter_batches(batch_size=256))
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file, or a damaged one ({error})") from error


def _arrow(path: Path, file: io.BufferedIOBase, is_random_access: bool) -> Iterator[Row]:
    """Arrow's file format, or its stream, which `datasets` writes."""
    import pyarrow.ipc
    import pyarrow.lib

    try:
        if is_random_access:
            table = pyarrow.ipc.open_file(file)
            yield from _batches(path, (table.get_batch(i) for i in range(table.num_record_batches)))
        else:
            yield from _batches(path, pyarrow.ipc.open_stream(file))
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: not an Arrow file, or a damaged one ({error})") from error


def _batches(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{path}: row {number}", number, values)


def _row(where: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}, not an object")
    return Row(where, number, value)
