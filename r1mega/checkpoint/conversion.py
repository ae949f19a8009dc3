"""HF directory <-> torch_dist checkpoint, file by file: planned whole, written one parameter at a time, resumable.

A conversion is a list of output files that depends on the input and the options alone. Every worker writes its share
into OUT.partial and notes each finished file; what a killed or failed conversion has finished is not done again.
The first worker then adds what belongs to the whole and gives the directory its name. `to_megatron.py` and `to_hf.py`
say what a file consists of.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from r1mega.checkpoint.parameters import Parameter
from r1mega.checkpoint.workers import Workers, agree, on_first_rank
from r1mega.errors import CheckpointError
from r1mega.files import sync_path, write_atomic
from r1mega.observe.progress import StageProgress

PLAN, DONE = ".plan", ".done"


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of the result: the parameters in it, and the bytes of their data."""

    name: str
    parameters: tuple[Parameter, ...]
    num_bytes: int


class Altered(CheckpointError):
    """What is read is not what its digests say: nothing that was made of it may stay."""


class Conversion(Protocol):
    """files: all of the result. describe: what the result depends on. Both the same on every worker."""

    files: Sequence[OutputFile]

    def describe(self) -> str: ...

    def write(self, file: OutputFile, path: Path) -> dict[str, Any]:
        """Write `file` as `path`; a record (JSON) for `finish`. Raises OSError, RuntimeError, CheckpointError.

        Altered on one worker alone: several compare what they read before.
        """
        ...

    def problem(self) -> str | None:
        """What is wrong with what was read, as far as that shows when it has been read; asked after the last file."""
        ...

    def finish(self, directory: Path, records: dict[str, dict[str, Any]]) -> None:
        """Add to the directory what belongs to all files. On the first worker only."""
        ...


def partition(
    parameters: Iterable[Parameter], num_bytes: Callable[[Parameter], int], limit: int
) -> list[tuple[tuple[Parameter, ...], int]]:
    """Parameters in order, cut into runs of at most `limit` bytes (or one parameter): [(parameters, bytes)]."""
    runs: list[tuple[list[Parameter], int]] = []
    for parameter in parameters:
        size = num_bytes(parameter)
        if runs and runs[-1][1] + size <= limit:
            held, before = runs[-1]
            held.append(parameter)
            runs[-1] = (held, before + size)
        else:
            runs.append(([parameter], size))
    return [(tuple(held), size) for held, size in runs]


def read_ahead(
    parameters: Iterable[Parameter], read: Callable[[Parameter], torch.Tensor]
) -> Generator[tuple[Parameter, torch.Tensor], None, None]:
    """(parameter, read(parameter)) in order; a thread reads the next one while the caller writes the one before.

    So two are in memory at a time. Raises what `read` raises.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        coming: deque[tuple[Parameter, Future[torch.Tensor]]] = deque()
        for parameter in parameters:
            coming.append((parameter, pool.submit(read, parameter)))
            if len(coming) == 2:
                before, whole = coming.popleft()
                yield before, whole.result()
        for last, whole in coming:
            yield last, whole.result()


def run_conversion(conversion: Conversion, out: Path, workers: Workers) -> Path:
    """Write the result as `out`, all workers together. CheckpointError on every worker when one of them fails.

    What was finished then stays in OUT.partial, and the same call goes on from there.
    Of what was altered nothing stays.
    """
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    advice = f"{out} was not made; finished files stay in {partial}, the same command goes on with them"
    done = on_first_rank(workers, lambda: _prepare(conversion, out, partial), f"{out} cannot be made")
    mine = [file for file in conversion.files if file.name not in done][workers.rank :: workers.size]
    problems: list[str] = []
    altered: str | None = None
    with StageProgress("convert", len(conversion.files), len(done), rank=workers.rank) as progress:
        begun, written = time.monotonic(), 0
        try:
            for file in mine:
                _write_one(conversion, file, partial)
                written += file.num_bytes
                rate = written * workers.size / 1e9 / (time.monotonic() - begun)
                if workers.rank == 0:  # the others' files are counted where they are noted
                    progress.advance(len(list((partial / DONE).iterdir())), **{"GB/s": rate})
        except Altered as error:
            altered = str(error)
        except (OSError, RuntimeError, CheckpointError) as error:
            problems = [f"{file.name}: {error}"]
        agree(workers, problems, advice)
    if problem := on_first_rank(workers, lambda: altered or conversion.problem(), advice):
        on_first_rank(workers, lambda: shutil.rmtree(partial), advice)
        raise CheckpointError(f"{problem}; {out} was not made")

    def finish() -> None:
        records = {file.name: json.loads((partial / DONE / file.name).read_text()) for file in conversion.files}
        conversion.finish(partial, records)
        shutil.rmtree(partial / DONE)
        (partial / PLAN).unlink()
        sync_path(partial)
        os.replace(partial, out)
        sync_path(out.parent)

    on_first_rank(workers, finish, advice)
    return out


def _prepare(conversion: Conversion, out: Path, partial: Path) -> set[str]:
    """OUT.partial is there and holds files of this very conversion only; the names of those that are finished."""
    if out.exists():
        raise CheckpointError(f"{out} exists; remove it, or choose another name")
    plan = hashlib.sha256(
        "\n".join([conversion.describe(), *(f"{f.name} {f.num_bytes}" for f in conversion.files)]).encode()
    ).hexdigest()
    if partial.exists() and (not (partial / PLAN).exists() or (partial / PLAN).read_text() != plan):
        shutil.rmtree(partial)
    (partial / DONE).mkdir(parents=True, exist_ok=True)
    write_atomic(partial / PLAN, plan)
    finished = {f.name for f in conversion.files if (partial / DONE / f.name).exists()}
    for path in partial.iterdir():
        if path.name not in (PLAN, DONE) and path.name not in finished:
            path.unlink()  # cut short
    return {name for name in finished if (partial / name).exists()}


def _write_one(conversion: Conversion, file: OutputFile, partial: Path) -> None:
    path = partial / f"{file.name}.tmp"
    try:
        record = conversion.write(file, path)
        os.replace(path, partial / file.name)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    write_atomic(partial / DONE / file.name, json.dumps(record))
