"""What a run has read: the contents of the files and models that its config names. RUN_DIR/inputs.json.

A run that is started again with other contents under the same names would go on as if nothing had happened; so it is
asked first, on rank 0. Files that nobody has written, replaced or moved since are not read again: those whose size, times and inode
are as they were. A tool may set back the time of the last write (`touch -r`, `cp -p`, `rsync -t`), but not that of the last change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from r1mega.config.schema import Stage
from r1mega.errors import DataError
from r1mega.files import write_atomic
from r1mega.observe.lineage import Stamp
from r1mega.observe.run import CHANGEABLE_KEYS, RunDirectory, is_below

_WEIGHTS = (".safetensors", ".distcp", ".bin", ".pt")
_SETTINGS = re.compile(
    r"(generation_|preprocessor_)?config\.json|(special_)?tokens?(izer)?.*|added_tokens.*|chat_template.*|vocab.*|merges\.txt|.*\.tiktoken"
    r"|.*\.model"
)
"""Names of a model's files besides its weights that decide what is read of it."""
_BLOCK, _NUM_BLOCKS = 1 << 16, 64


@dataclass(frozen=True, slots=True)
class Seen(Stamp):
    """And what tells it where the time of the last write was set back. 0: of a record of an older program."""

    ctime_ns: int = 0
    inode: int = 0


Files = dict[str, Seen]
"""Relative name ("" for a file itself) -> what is in it."""


class Entry(TypedDict):
    """One key of inputs.json. files: as `Files`, each a `Seen`'s fields."""

    path: str
    files: dict[str, dict[str, str | int]]


def record_inputs(config: Stage) -> None:
    """Write down what there is; what a run that has made something began with stays."""
    directory = RunDirectory(config.run_dir)
    if not directory.inputs.exists() or not directory.holds_work():
        content: dict[str, Entry] = {
            key: {
                "path": str(source),
                "files": {name: dataclasses.asdict(_stamp(file)) for name, file in _files(source).items()},
            }
            for key, source in _inputs(config)
        }
        _write(directory.inputs, content)


def check_inputs(config: Stage, *, renew: bool = False) -> None:
    """DataError that names what holds something else than when the run began. Inputs that are gone are not its business.

    renew: write down the new times and inodes of files whose contents are as they were, so that the next start need not read them.
    """
    directory = RunDirectory(config.run_dir)
    path = directory.inputs
    if not path.exists() or not directory.holds_work():
        return
    try:
        record = json.loads(path.read_text())
        known = {key: {name: Seen(**s) for name, s in entry["files"].items()} for key, entry in record.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: damaged ({error}); remove it, then what is there now is taken for what was read"
        ) from error
    changed = [(key, text) for key, source in _inputs(config) for text in _changes(source, known.get(key))]
    if changed:
        advice = "put it back, or use another run_dir"
        if not any(is_below(key.partition("[")[0], ("data",)) for key, _ in changed):  # of data there are other records
            advice += f"; to go on with what is there now, remove {path}"
        told = "\n  ".join(f"{key}: {text}" for key, text in changed)
        raise DataError(f"not what this run began with:\n  {told}\n{advice}")
    if renew:
        _renew_times(config, path, record)


def _renew_times(config: Stage, path: Path, record: dict[str, Entry]) -> None:
    """Of files that are all as they were, by `_changes`."""
    stale = False
    for key, source in _inputs(config):
        for name, file in _files(source).items() if key in record else ():
            stamp, now = record[key]["files"].get(name), _marks(file)
            if stamp is not None and stamp | now != stamp:
                stamp |= now
                stale = True
    if stale:
        _write(path, record)


def _write(path: Path, record: Mapping[str, Entry]) -> None:
    write_atomic(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _inputs(config: Stage) -> Iterator[tuple[str, Path]]:
    """(dotted key, path) of all that is there of what the config names and may not change between starts."""

    def walk(key: str, value: object) -> Iterator[tuple[str, Path]]:
        if isinstance(value, Path):
            yield key, value
        elif isinstance(value, Mapping):
            for name, item in value.items():
                yield from walk(f"{key}.{name}" if key else name, item)
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                yield from walk(f"{key}[{place}]", item)

    known: tuple[str, ...] = (*CHANGEABLE_KEYS, "reward.sandbox")  # an interpreter and its libraries are no contents
    if config.stage == "evaluate":  # it looks at its checkpoints
        known = (*known, "model.path")
    for key, path in walk("", config.model_dump()):
        own = path.resolve().is_relative_to(config.run_dir.resolve())
        if path.exists() and not own and not is_below(key.partition("[")[0], known):
            yield key, path


def _files(path: Path) -> dict[str, Path]:
    """A file itself; of a model, the files beside its config.json; of other directories, all but what Python keeps there."""
    if path.is_file():
        return {"": path}
    model = _model_in(path)
    found = path.rglob("*") if model is None else model.iterdir()
    files = (p for p in sorted(found) if p.is_file() and p.name[0] != "." and p.parent.name != "__pycache__")
    return {str(p.relative_to(model or path)): p for p in files}


def _model_in(path: Path) -> Path | None:
    return next((place for place in (path / "hf", path) if (place / "config.json").exists()), None)


def _stamp(file: Path) -> Seen:
    marks = _marks(file)
    return Seen(sha256=_digest(file, marks["bytes"]), **marks)


def _marks(file: Path) -> dict[str, int]:
    """Of a `Seen`, all but the content: equal as long as nobody has written, replaced or moved the file."""
    status = file.stat()
    return {
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _digest(file: Path, size: int) -> str:
    """sha256: of the whole file, or of blocks all over a file of weights, which training changes everywhere."""
    with file.open("rb") as stream:
        if file.suffix not in _WEIGHTS or size <= _BLOCK * _NUM_BLOCKS:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        for block in range(_NUM_BLOCKS):
            stream.seek((size - _BLOCK) * block // (_NUM_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
        return digest.hexdigest()


def _changes(path: Path, known: Files | None) -> Iterator[str]:
    if known is None:  # a key that an older start did not have
        return
    files, is_model = _files(path), _model_in(path) is not None
    for name in sorted(known.keys() | files.keys()):
        if name not in known and is_model and Path(name).suffix not in _WEIGHTS and not _SETTINGS.fullmatch(name):
            continue  # a note, a log: nothing of a model is read from it
        if "__pycache__" in Path(name).parts:  # of a record that has such
            continue
        shown = path / name if name else path
        if name not in files or name not in known:
            yield f"{shown} is {'gone' if name not in files else 'new'}"
            continue
        marks, before = _marks(files[name]), known[name]
        same = all(getattr(before, mark) == value for mark, value in marks.items())
        if not same and (marks["bytes"] != before.bytes or _digest(files[name], before.bytes) != before.sha256):
            yield f"{shown} has another content"
