"""Lineage: which config, inputs and code made the files of a run directory. RUN_DIR/lineage.json.

A node's fingerprint is made of its resolved config, without the keys that do not change the result, and the content
hashes of what it reads; an input that an earlier node made is known by the hashes recorded there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from r1mega.errors import DataError
from r1mega.files import write_atomic

LINEAGE_FILE = "lineage.json"
RECORDS = {
    "lock", "report.html", "status.json", "environment.json", "config.yaml", "inputs.json", LINEAGE_FILE, "checkpoints",
    "tensorboard", "wandb_id", "nonfinite", "rollouts", "watch", "restarts.jsonl",
}  # fmt: skip
"""Names in a run directory that are no outputs: they tell of the run, or serve to resume it."""
_EARLIER = re.compile(r".*\.jsonl\.\d+")  # of what the run wrote before it began anew

_READERS = 8  # files hashed at a time (hashlib lets other threads run meanwhile)

State = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file's content, and what tells cheaply that it has not been written since."""

    sha256: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Source:
    """What an input was. owner: the node that made it; sha256: of the file, or of a directory's names and files."""

    path: str
    sha256: str
    owner: str | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of the stage. Times are local with their offset; exit_code is None while it runs."""

    start: str
    git_commit: str | None
    end: str | None = None
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Lineage:
    """config: what of it the fingerprint covers; adopted: finished outside the pipeline, so that `inputs` were hashed
    later; environment: versions and host of the last attempt, as far as the stage recorded them.
    """

    node: str
    stage: str
    state: State
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, Source]
    outputs: dict[str, Stamp] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    adopted: bool = False

    def output_hash(self, relative: str) -> str | None:
        """The content hash of a file or directory below run_dir ("." for all outputs); None when it was not made."""
        if relative in self.outputs:
            return self.outputs[relative].sha256
        prefix = "" if relative == "." else relative + "/"
        inside = {name.removeprefix(prefix): s.sha256 for name, s in self.outputs.items() if name.startswith(prefix)}
        return hash_of_tree(inside) if inside else None


def read_lineage(run_dir: Path) -> Lineage | None:
    """None when no pipeline made this directory; DataError for a damaged record."""
    path = Path(run_dir) / LINEAGE_FILE
    try:
        content = json.loads(path.read_text())
        return Lineage(**content | {
            "inputs": {key: Source(**source) for key, source in content["inputs"].items()},
            "outputs": {name: Stamp(**stamp) for name, stamp in content["outputs"].items()},
            "attempts": tuple(Attempt(**attempt) for attempt in content["attempts"]),
        })  # fmt: skip
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it, then the run is taken for one made by hand") from error


def write_lineage(run_dir: Path, lineage: Lineage) -> None:
    """Into the run directory, whole or not at all."""
    text = json.dumps(dataclasses.asdict(lineage), indent=1, ensure_ascii=False)
    write_atomic(Path(run_dir) / LINEAGE_FILE, text + "\n")


def fingerprint(config: Mapping[str, Any], inputs: Mapping[str, Source]) -> str:
    """Equal for equal config and input contents, wherever those lie."""
    content = {"config": config, "inputs": {key: source.sha256 for key, source in inputs.items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_of_tree(files: Mapping[str, str]) -> str:
    """One hash for {relative name: sha256}."""
    lines = "".join(f"{name}\0{sha}\n" for name, sha in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def changed_outputs(run_dir: Path, outputs: Mapping[str, Stamp]) -> list[str]:
    """Names of recorded outputs that are gone or hold something else. Only files whose time differs are read."""
    changed = []
    for name, stamp in outputs.items():
        path = Path(run_dir) / name
        try:
            status = path.stat()
        except FileNotFoundError:
            changed.append(name)
            continue
        same = (status.st_size, status.st_mtime_ns) == (stamp.bytes, stamp.mtime_ns)
        if not same and (status.st_size != stamp.bytes or _sha256(path) != stamp.sha256):
            changed.append(name)
    return changed


def stamp_outputs(run_dir: Path) -> dict[str, Stamp]:
    """The files below run_dir that others may read, by their relative names."""
    names = sorted(entry.name for entry in Path(run_dir).iterdir())
    tops = [Path(run_dir) / n for n in names if n not in RECORDS and n[0] != "." and not _EARLIER.fullmatch(n)]
    files = [file for top in tops for file in _files(top)]
    return {str(file.relative_to(run_dir)): stamp for file, stamp in zip(files, _stamps(files), strict=True)}


class ContentHashes:
    """Content hashes of given inputs. What was read once is remembered in `cache` by path, size and time."""

    def __init__(self, cache: Path):
        self._cache = Path(cache)
        try:
            self._known = {path: Stamp(**stamp) for path, stamp in json.loads(self._cache.read_text()).items()}
        except FileNotFoundError:
            self._known = {}
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{self._cache}: damaged ({error}); remove it") from error

    def of(self, path: Path, *, remember: bool = True) -> str | None:
        """sha256 of a file, `hash_of_tree` of a directory; None when there is neither."""
        if not path.exists():
            return None
        files = _files(path)
        new = [file for file in files if not self._is_known(file)]
        self._known |= {os.path.abspath(file): stamp for file, stamp in zip(new, _stamps(new), strict=True)}
        if new and remember:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._cache, json.dumps({p: dataclasses.asdict(s) for p, s in self._known.items()}, indent=1))
        hashes = {str(file.relative_to(path)): self._known[os.path.abspath(file)].sha256 for file in files}
        return hashes["."] if path.is_file() else hash_of_tree(hashes)

    def _is_known(self, file: Path) -> bool:
        known, status = self._known.get(os.path.abspath(file)), file.stat()
        return known is not None and (known.bytes, known.mtime_ns) == (status.st_size, status.st_mtime_ns)


def now() -> str:
    """The local time with its zone, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")


def _stamps(files: Iterable[Path]) -> list[Stamp]:
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(_stamp, files))


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    return Stamp(_sha256(file), status.st_size, status.st_mtime_ns)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
