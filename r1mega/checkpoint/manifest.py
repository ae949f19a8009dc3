"""What a whole checkpoint directory consists of: size and digest of every file, in `manifest.json`, written last."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from r1mega.checkpoint.safetensors_file import as_bytes, read_exactly
from r1mega.checkpoint.workers import Alone, Workers
from r1mega.errors import CheckpointError
from r1mega.files import sync_path, write_all

MANIFEST = "manifest.json"
FileRecords = dict[str, dict[str, Any]]
"""File name, relative to the directory -> {"bytes": size, DIGEST: hex digest}; in older checkpoints "sha256" in its place."""


class _Hash(Protocol):
    """As of hashlib."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


_HASHES: dict[str, Callable[[], _Hash]] = {}
"""By their names in a record."""
with contextlib.suppress(ImportError):  # tools/gpu_check.py may run without it
    from xxhash import xxh3_128

    _HASHES["xxh3_128"] = xxh3_128
_HASHES["sha256"] = hashlib.sha256

DIGEST = next(iter(_HASHES))
"""XXH3 in 128 bits, where the package is: it finds faults, not forgeries (who can write the files can write the manifest),
fifteen times as fast as sha256, which took more time than reading or writing what it was taken of."""

_BLOCK = 1 << 20
"""Bytes that a core's cache holds between the digest and the read or write of them."""


class UnreadableError(CheckpointError):
    """The system could not read a checkpoint now, or a newer program wrote it: whether it is whole is not known."""


class DigestingFile:
    """A file opened for writing whose digest is taken on the way, so that it never has to be read for it."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by `close`
        self._digest, self._bytes = _HASHES[DIGEST](), 0
        self.error: OSError | None = None
        """What a write failed with: torch.save makes a RuntimeError of it that says something else."""

    def write(self, data: Any) -> int:
        """All of `data` (bytes or any contiguous buffer); its size in bytes. Raises OSError."""
        view = memoryview(data).cast("B")
        try:
            for first in range(0, len(view), _BLOCK):
                block = view[first : first + _BLOCK]
                self._digest.update(block)
                write_all(self._file.fileno(), block)
        except OSError as error:
            self.error = error
            raise
        self._bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> dict[str, Any]:
        """Make the content durable; the file's record."""
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, DIGEST: self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()


class PassingDigests:
    """Digests of a checkpoint's data files, of the bytes that are read from them anyway: each passes once.

    Files are digested from their beginnings: what lies before a read is read then, what nobody has read, at the end.
    Only a read that goes back is one more. Not for several threads at a time.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self._records = {n: r for n, r in read_manifest(directory)["files"].items() if is_data(n)}
        self._passed = {name: (_HASHES[_digest_name(r)](), 0) for name, r in self._records.items()}
        self._between = torch.empty(_BLOCK, dtype=torch.uint8)

    def read_exactly(self, name: str, file: io.FileIO, tensor: torch.Tensor) -> None:
        """`safetensors_file.read_exactly` from where `file`, that of this name, stands."""
        start = file.tell()
        if name not in self._passed or start < self._passed[name][1]:
            read_exactly(file, tensor)
            return
        self._pass(name, file, start)
        self._take(name, file, as_bytes(tensor))

    def problem(self) -> str | None:
        """None when every file has passed and has the manifest's digest, else what is wrong. Reads what is left."""
        for name, record in self._records.items():
            path = self.directory / name
            try:
                with open(path, "rb", buffering=0) as file:
                    self._pass(name, file, record["bytes"])
            except OSError as error:
                return _unreadable(path, error)
            if self._passed[name][0].hexdigest() != record[digest := _digest_name(record)]:
                return _altered(path, digest)
        return None

    def _pass(self, name: str, file: io.FileIO, end: int) -> None:
        file.seek(self._passed[name][1])
        while (left := end - self._passed[name][1]) > 0:
            self._take(name, file, self._between[:left])
        file.seek(end)

    def _take(self, name: str, file: io.FileIO, data: torch.Tensor) -> None:
        """Read and digest in blocks that a core's cache holds from the one to the other."""
        digest, done = self._passed[name]
        for first in range(0, data.numel(), _BLOCK):
            block = data[first : first + _BLOCK]
            read_exactly(file, block)
            digest.update(block.numpy().data)
            self._passed[name] = (digest, done + first + block.numel())


def is_data(name: str) -> bool:
    """Whether a file of a checkpoint holds tensors; the others are small, and say what is where."""
    return name.endswith(".distcp")


def file_record(path: Path) -> dict[str, Any]:
    """The record of a file that is there already; it is made durable too."""
    sync_path(path)
    return {"bytes": path.stat().st_size, DIGEST: _digest_of_file(path, DIGEST)}


def write_manifest(directory: Path, architecture: Mapping[str, Any], files: FileRecords) -> None:
    """Everything in `files` is durable before this is called; afterwards the checkpoint is whole."""
    manifest = directory / MANIFEST
    content = {"architecture": dict(architecture), "files": dict(sorted(files.items()))}
    manifest.write_text(json.dumps({**content, "sha256": _digest_of(content)}, indent=1))
    sync_path(manifest)
    sync_path(directory)


def _digest_of(content: Mapping[str, object]) -> str:
    """Of a manifest without its own digest, as JSON."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """{"architecture", "files"}. CheckpointError when there is none, or it is damaged: it has a digest of its own, but for those
    written before it had. UnreadableError for one that is whole by that and has digests of files that are not known here.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        records = manifest["files"].values()
        if (own := manifest.pop("sha256", None)) not in (None, _digest_of(manifest)):
            raise ValueError("another sha256 than when it was written")
        if own is not None and (unknown := _unknown_digest(records)):
            raise UnreadableError(
                f"{path} has digests by {unknown}, of a newer program than this one, or of the package xxhash, which is missing"
            )
        complete = all(isinstance(r["bytes"], int) and isinstance(r[_digest_name(r)], str) for r in records)
        if not complete or not isinstance(manifest["architecture"], dict):
            raise ValueError("not a manifest")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"no {MANIFEST} in {directory}") from None
    except OSError as error:
        raise UnreadableError(_unreadable(path, error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r})") from error
    return manifest


def verify(directory: Path, workers: Workers | None = None, *, data_passes: bool = False) -> str | None:
    """None when every file of the manifest is there with its size and digest; otherwise what is wrong.

    data_passes: of data files the size only, for their digests are taken when they are read (`PassingDigests`).

    A collective call when there are several workers: each reads its share of the files. One alone uses all its cores.
    UnreadableError on every worker when the system does not read a file on any.
    """
    workers = workers or Alone()
    threads = min(8, len(os.sched_getaffinity(0))) if workers.size == 1 else 1
    unreadable = None
    try:
        files = sorted(read_manifest(directory)["files"].items(), key=lambda item: -item[1]["bytes"])
        mine = [
            (directory / name, record, not (data_passes and is_data(name)))
            for name, record in files[workers.rank :: workers.size]
        ]
        with ThreadPoolExecutor(threads) as pool:
            problem = next(filter(None, pool.map(_check, *zip(*mine, strict=True))), None) if mine else None
    except UnreadableError as error:
        problem, unreadable = None, str(error)
    except CheckpointError as error:
        problem = str(error)
    problems, unread = zip(*workers.gather((problem, unreadable)), strict=True)
    if any(unread):
        raise UnreadableError(f"{directory}: {next(filter(None, unread))}")
    return next(filter(None, problems), None)


def lacks(directory: Path) -> str | None:
    """What is missing or too short of a checkpoint by its manifest, without reading the files; None: nothing. Raises OSError
    and UnreadableError where the system does not say.
    """
    try:
        files = read_manifest(directory)["files"]
    except UnreadableError:
        raise
    except CheckpointError as error:
        return str(error)
    return next(filter(None, (_check_size(directory / name, record) for name, record in files.items())), None)


def _check_size(file: Path, record: Mapping[str, object]) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    size = file.stat().st_size
    return None if size == record["bytes"] else f"{file.name} has {size} bytes, not {record['bytes']}"


def _check(file: Path, record: Mapping[str, Any], digest: bool) -> str | None:
    try:
        if problem := _check_size(file, record):
            return problem
        if digest and _digest_of_file(file, name := _digest_name(record)) != record[name]:
            return _altered(file, name)
    except OSError as error:
        raise UnreadableError(_unreadable(file, error)) from error
    return None


def _altered(file: Path, digest: str) -> str:
    return f"{file.name} has another {digest} than when it was written"


def _unreadable(file: Path, error: OSError) -> str:
    return f"{file.name} cannot be read ({error})"


def _digest_name(record: Mapping[str, object]) -> str:
    """Of the digest that a record has. KeyError where it has none that is known here."""
    return next((name for name in _HASHES if name in record), DIGEST)


def _unknown_digest(records: Iterable[Mapping[str, object]]) -> str | None:
    """A name in a record that has a size, and no digest that is known here."""
    unknown = (record for record in records if "bytes" in record and _HASHES.keys().isdisjoint(record))
    return next((name for record in unknown for name in record if name != "bytes"), None)


def _digest_of_file(file: Path, name: str) -> str:
    digest, block = _HASHES[name](), bytearray(_BLOCK)
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()
