"""What a run has read: the contents of the files and models that its config names. RUN_DIR/inputs.json.

A run that is started again with other contents under the same names would go on as if nothing had happened; so it is
asked first. Files whose size and time are as they were are not read again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from r1mega.config.schema import Stage
from r1mega.errors import DataError
from r1mega.files import write_atomic
from r1mega.observe.lineage import Stamp
from r1mega.observe.run import CHANGEABLE_KEYS, RunDirectory, is_below

_WEIGHTS = (".safetensors", ".distcp", ".bin", ".pt")
_BLOCK, _NUM_BLOCKS = 1 << 16, 64

Files = dict[str, Stamp]
"""Relative name ("" for a file itself) -> what is in it."""


def record_inputs(config: Stage) -> None:
    """Write down what there is; what a run that has made something began with stays."""
    directory = RunDirectory(config.run_dir)
    if not directory.inputs.exists() or not directory.holds_work():
        content = {
            key: {
                "path": str(source),
                "files": {name: dataclasses.asdict(stamp) for name, stamp in _stamps(source).items()},
            }
            for key, source in _inputs(config)
        }
        write_atomic(directory.inputs, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def check_inputs(config: Stage) -> None:
    """DataError that names what holds something else than when the run began. Inputs that are gone are not its business."""
    directory = RunDirectory(config.run_dir)
    path = directory.inputs
    if not path.exists() or not directory.holds_work():
        return
    try:
        record = json.loads(path.read_text())
        known = {key: {name: Stamp(**s) for name, s in entry["files"].items()} for key, entry in record.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: damaged ({error}); remove it, then what is there now is taken for what was read"
        ) from error
    changed = [f"{key}: {text}" for key, source in _inputs(config) for text in _changes(source, known.get(key))]
    if changed:
        raise DataError(
            "not what this run began with:\n  "
            + "\n  ".join(changed)
            + "\nput it back, or use another run_dir; to go on with "
            f"what is there now, remove {path}"
        )


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

    known = (
        (*CHANGEABLE_KEYS, "model.path") if config.stage == "evaluate" else CHANGEABLE_KEYS
    )  # it looks at its checkpoints
    for key, path in walk("", config.model_dump()):
        own = path.resolve().is_relative_to(config.run_dir.resolve())
        if path.exists() and not own and not is_below(key.partition("[")[0], known):
            yield key, path


def _files(path: Path) -> dict[str, Path]:
    """A file itself; of a model, the files beside its config.json; of other directories, all."""
    if path.is_file():
        return {"": path}
    model = path / "hf" if (path / "hf" / "config.json").exists() else path
    is_model = (model / "config.json").exists()
    found = model.iterdir() if is_model else path.rglob("*")
    return {str(p.relative_to(model)): p for p in sorted(found) if p.is_file() and p.name[0] != "."}


def _stamps(path: Path) -> Files:
    return {name: _stamp(file) for name, file in _files(path).items()}


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    return Stamp(_digest(file, status.st_size), status.st_size, status.st_mtime_ns)


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
    files = _files(path)
    for name in sorted(known.keys() | files.keys()):
        shown = path / name if name else path
        if name not in files or name not in known:
            yield f"{shown} is {'gone' if name not in files else 'new'}"
            continue
        status, before = files[name].stat(), known[name]
        same = (status.st_size, status.st_mtime_ns) == (before.bytes, before.mtime_ns)
        if not same and (status.st_size != before.bytes or _digest(files[name], status.st_size) != before.sha256):
            yield f"{shown} has another content"
