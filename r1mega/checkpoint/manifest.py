"""What a whole checkpoint directory consists of: size and sha256 of every file, in `manifest.json`, written last."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from r1mega.checkpoint.workers import Alone, Workers
from r1mega.errors import CheckpointError
from r1mega.files import sync_path, write_all

MANIFEST = "manifest.json"
FileRecords = dict[str, dict[str, Any]]
"""File name, relative to the directory -> {"bytes": size, "sha256": hex digest}."""

_LARGE = 1 << 20


class DigestingFile:
    """A file opened for writing whose sha256 is taken on the way, so that it never has to be read for it.

    Large pieces are written and digested at the same time by two threads.
    """

    def __init__(self, path: Path, pool: ThreadPoolExecutor):
        self._file, self._pool = open(path, "wb", buffering=0), pool  # noqa: SIM115  closed by `close`
        self._digest, self._bytes = hashlib.sha256(), 0
        self.error: OSError | None = None
        """What a write failed with: torch.save makes a RuntimeError of it that says something else."""

    def write(self, data: Any) -> int:
        """All of `data` (bytes or any contiguous buffer); its size in bytes. Raises OSError."""
        view = memoryview(data).cast("B")
        digested = None
        if len(view) >= _LARGE:
            digested = self._pool.submit(self._digest.update, view)
        else:
            self._digest.update(view)
        try:
            write_all(self._file.fileno(), view)
        except OSError as error:
            self.error = error
            raise
        finally:
            if digested is not None:
                digested.result()
        self._bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> dict[str, Any]:
        """Make the content durable; the file's record."""
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def digesting_file(path: Path) -> Iterator[DigestingFile]:
    """The file at `path`, open for writing; its digest is made beside the writing."""
    with ThreadPoolExecutor(1) as pool, contextlib.closing(DigestingFile(path, pool)) as file:
        yield file


def file_record(path: Path) -> dict[str, Any]:
    """The record of a file that is there already; it is made durable too."""
    sync_path(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def write_manifest(directory: Path, architecture: Mapping[str, Any], files: FileRecords) -> None:
    """Everything in `files` is durable before this is called; afterwards the checkpoint is whole."""
    manifest = directory / MANIFEST
    content = {"architecture": dict(architecture), "files": dict(sorted(files.items()))}
    manifest.write_text(json.dumps(content, indent=1))
    sync_path(manifest)
    sync_path(directory)


def read_manifest(directory: Path) -> dict[str, Any]:
    """{"architecture", "files"}. CheckpointError when there is none, or it is damaged."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        records = manifest["files"].values()
        complete = all(isinstance(r["bytes"], int) and isinstance(r["sha256"], str) for r in records)
        if not complete or not isinstance(manifest["architecture"], dict):
            raise ValueError("not a manifest")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"no {MANIFEST} in {directory}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r})") from error
    return manifest


def verify(directory: Path, workers: Workers | None = None) -> str | None:
    """None when every file of the manifest is there with its size and sha256; otherwise what is wrong.

    A collective call when there are several workers: each reads its share of the files. One alone uses all its cores.
    """
    workers = workers or Alone()
    threads = min(8, len(os.sched_getaffinity(0))) if workers.size == 1 else 1
    try:
        files = sorted(read_manifest(directory)["files"].items(), key=lambda item: -item[1]["bytes"])
        mine = [(directory / name, record) for name, record in files[workers.rank :: workers.size]]
        with ThreadPoolExecutor(threads) as pool:
            problem = next(filter(None, pool.map(_check, *zip(*mine, strict=True))), None) if mine else None
    except CheckpointError as error:
        problem = str(error)
    return next(filter(None, workers.gather(problem)), None)


def lacks(directory: Path) -> str | None:
    """What is missing or too short of a checkpoint by its manifest, without reading the files; None: nothing."""
    try:
        files = read_manifest(directory)["files"]
    except CheckpointError as error:
        return str(error)
    return next(filter(None, (_check_size(directory / name, record) for name, record in files.items())), None)


def _check_size(file: Path, record: Mapping[str, object]) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    size = file.stat().st_size
    return None if size == record["bytes"] else f"{file.name} has {size} bytes, not {record['bytes']}"


def _check(file: Path, record: Mapping[str, Any]) -> str | None:
    try:
        if problem := _check_size(file, record):
            return problem
        if _sha256(file) != record["sha256"]:
            return f"{file.name} has another sha256 than when it was written"
    except OSError as error:  # a disk that cannot read it: on this worker, all have to know
        return f"{file.name} cannot be read ({error})"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
