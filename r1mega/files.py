"""Files that survive kill -9 and full disks: atomic replacement, and JSON lines that are appended whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r1mega.errors import DataError

Record = dict[str, Any]
"""A line of a JSONL file."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in the block names `path`: one of a write names no file, one of a temporary file names that."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def check_writable(path: Path) -> None:
    """OSError, naming `path`, when `write_atomic` could not write it: found out before the work, not after."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with naming(path):
        descriptor, temporary = _create_beside(path)
        os.close(descriptor)
        temporary.unlink()


def _create_beside(path: Path) -> tuple[int, Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), temporary


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` so that a reader (or a run after kill -9) sees the old content or the new, never a part.

    The content is synced before the rename, the directory after it. Permissions follow the umask. Raises OSError, which
    names the path.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    with naming(path):
        descriptor, temporary = _create_beside(path)
        try:
            try:
                write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_path(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` for a library to write to: it becomes `path`, durably, at the end of the block, and is gone after
    an error. An OSError that names no other file names `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync_path(temporary)
        os.replace(temporary, path)
        sync_path(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise


def sync_path(path: Path) -> None:
    """Make a file's content, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[Record]:
    """All complete records of a JSONL file. A broken last line (a write cut short) is left out.

    Raises DataError when the file is missing, or a line before the last is not a JSON object.
    """
    return [record for _, record in scan_json_lines(path)]


def scan_json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    """`read_json_lines` one at a time, each with the place in the file, in bytes, where its line begins."""
    path, offset, broken = Path(path), 0, ""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if broken and line.strip():
                raise DataError(f"{path}:{broken}; restore the file or remove it")
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                broken = broken or f"{number}: not a JSON object ({error})"
            else:
                yield offset, record
            offset += len(line)


class JsonLinesWriter:
    """Appends JSON objects to a file, each in the file and (but for `sync=False`) on disk before `write` returns.

    resume_step: keep the lines with "step" <= resume_step (atomically) and append after them; None: start afresh, and what
    is there already stays as NAME.1, NAME.2, ... beside it.
    last: the last record of the file, an earlier start's at first; None without any.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path = Path(path)
        if resume_step is None:
            _set_aside(self.path)
        kept = read_json_lines(self.path) if resume_step is not None and self.path.exists() else []
        kept = [record for record in kept if record["step"] <= resume_step]
        self.last: Record | None = kept[-1] if kept else None
        write_atomic(self.path, "".join(_line(record) for record in kept))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by `close`

    @property
    def last_step(self) -> int | None:
        """The step of the last record."""
        return None if self.last is None else self.last["step"]

    def write(self, *records: Mapping[str, Any], sync: bool = True) -> None:
        """Append one line a record, all or none: whatever the disk takes a part of is undone. Each record needs an integer
        "step". Raises OSError, which names the path.

        sync: False leaves it to `sync`: the lines outlive a kill of this process at once, one of the machine later.
        """
        if not records:
            return
        with naming(self.path):
            append_whole(self._file.fileno(), "".join(_line(record) for record in records).encode(), sync=sync)
        self.last = dict(records[-1])

    def sync(self) -> None:
        """Bring what was written to disk."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _set_aside(path: Path) -> None:
    """Out of the way under the first free name: the records of a run that begins anew outlive it."""
    if path.is_file() and path.stat().st_size > 0:
        free = next(other for n in itertools.count(1) if not (other := path.with_name(f"{path.name}.{n}")).exists())
        path.rename(free)
        sync_path(path.parent)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """All of `content`, however little the system takes at a time: 2 GiB at most, and on a full disk what still fits, both
    without an error. Raises OSError.
    """
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def append_whole(descriptor: int, content: bytes, *, sync: bool = True) -> None:
    """All of `content` at the end of an open file, or nothing: after an OSError the file is as long as before."""
    before = os.fstat(descriptor).st_size
    try:
        write_all(descriptor, content)
        if sync:
            os.fsync(descriptor)
    except BaseException:
        os.ftruncate(descriptor, before)
        raise


def _line(record: Mapping[str, Any]) -> str:
    """Floats are written by repr, which reads back to the same bits; NaN and infinity are refused (ValueError)."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
