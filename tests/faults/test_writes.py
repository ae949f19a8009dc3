"""A disk that is full, read-only, over quota or broken at any write of a run: what was there stays whole, and the error says so.

The system's own `write` takes a part and then fails, as on a full disk; and, with a limit on the size of files, really does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from r1mega.checkpoint.manifest import DigestingFile
from r1mega.checkpoint.safetensors_file import write_tensors
from r1mega.data.filters import Candidate
from r1mega.data.selection import write_data
from r1mega.errors import DataError
from r1mega.files import JsonLinesWriter, read_json_lines, write_atomic
from r1mega.observe.metrics import MetricsWriter
from r1mega.observe.samples import SamplesWriter
from r1mega.rollout.draw import GradedSample, Sample
from r1mega.rollout.store import SampleStore
from r1mega.types import Prompt, Reward, RewardStatus

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)
PROMPT = Prompt("p", "?", ("1",), "math", None, (1, 2, 3))


def atomic(directory: Path, text: str) -> None:
    write_atomic(directory / "status.json", json.dumps({"state": text}) * 50)


def metrics(directory: Path, text: str) -> None:
    step = len(read_json_lines(directory / "metrics.jsonl")) if (directory / "metrics.jsonl").exists() else 0
    with MetricsWriter(directory, resume_step=step, tensorboard=False) as writer:
        writer.write(step + 1, {"reward/mean": len(text) / 3})


def samples(directory: Path, text: str) -> None:
    with SamplesWriter(directory, resume_step=2**62) as writer:
        writer.write_lines(*({"step": i, "response": text * 20} for i in range(3)))


def store(directory: Path, text: str) -> None:
    kept = SampleStore(directory, 0, [PROMPT])
    with kept.opened():
        kept.write_sample(Sample("p", len(text), text * 20, 3, False))
        kept.write_grade(GradedSample(Sample("p", len(text), "", 3, False), Reward(1.0, {}, RewardStatus.OK, "")))


WRITERS: tuple[Callable[[Path, str], None], ...] = (atomic, metrics, samples, store)


class FailingDisk:
    """`os.write` to regular files: `most` bytes at a time; at write number `at` half of it, then the error."""

    def __init__(self, at: int | None = None, error: int = errno.ENOSPC, most: int = 2**31):
        self.at, self.error, self.most, self.writes, self._real = at, error, most, 0, os.write

    def __call__(self, descriptor: int, data: bytes | memoryview) -> int:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return self._real(descriptor, data)
        self.writes += 1
        if self.at is not None and self.writes > self.at:
            raise OSError(self.error, os.strerror(self.error))
        half = self.writes == self.at and len(data) > 1
        return self._real(descriptor, memoryview(data)[: len(data) // 2 if half else self.most])


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def lines_of(found: dict[str, bytes]) -> list[bytes]:
    return sorted(line for content in found.values() for line in content.splitlines(True))


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("write", WRITERS)
def test_a_write_that_fails_at_any_moment_leaves_whole_lines(tmp_path, monkeypatch, write, error):
    counted = FailingDisk()
    with monkeypatch.context() as patch:
        (tmp_path / "all").mkdir()
        write(tmp_path / "all", "one")
        before = contents(tmp_path / "all")
        patch.setattr(os, "write", counted)
        write(tmp_path / "all", "other")
    assert counted.writes, "the writer goes past os.write: this test would show nothing"
    whole = lines_of(contents(tmp_path / "all")) + lines_of(before)
    for at in range(counted.writes + 1):
        directory = tmp_path / str(at)
        directory.mkdir()
        write(directory, "one")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", FailingDisk(at, error))
            if at < counted.writes:
                with pytest.raises(OSError, match=re.escape(os.strerror(error))) as raised:
                    write(directory, "other")
                assert str(raised.value.filename).startswith(str(directory)), "the message names the file"
        left = contents(directory)
        assert not [name for name in left if name.endswith(".tmp")]
        assert set(lines_of(left)) <= set(whole), "no line is torn, none melts into another"
        assert set(lines_of(before)) <= set(lines_of(left)) or write is atomic, "what was written stays"
        if write is not store:  # whose first line may be there when its second fails
            assert left == before or at == counted.writes
        write(directory, "other")  # the disk has room again
        if at == 0 and write is not store:
            assert contents(directory) == contents(tmp_path / "all")


@pytest.mark.parametrize("write", WRITERS)
def test_short_writes_are_gone_on_with(tmp_path, monkeypatch, write):
    for name, disk in (("whole", FailingDisk()), ("short", FailingDisk(most=7))):
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", disk)
            write(tmp_path / name, "one")
    assert contents(tmp_path / "short") == contents(tmp_path / "whole")


def test_tensors_and_digests_survive_short_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", FailingDisk(most=13))
    tensor = torch.arange(100.0)
    write_tensors(tmp_path / "x.safetensors", {"w": (tensor.dtype, tensor.shape)}, [("w", tensor)])
    with contextlib.closing(DigestingFile(tmp_path / "y")) as file:
        file.write(bytes(range(200)))
        assert file.finish()["bytes"] == 200
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], tensor)
    assert (tmp_path / "y").read_bytes() == bytes(range(200))


@pytest.fixture
def files_up_to() -> Iterator[Callable[[int], None]]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 30, 60])
def test_a_line_that_the_disk_really_takes_a_part_of_is_undone(tmp_path, files_up_to, room):
    """The kernel's own short write, then its error; afterwards the run goes on with the next line."""
    path = tmp_path / "metrics.jsonl"
    lines = JsonLinesWriter(path)
    lines.write({"step": 1, "text": "x" * 100})
    before = path.read_bytes()
    files_up_to(len(before) + room)
    with pytest.raises(OSError, match="File too large"):
        lines.write({"step": 2, "text": "y" * 100})
    assert path.read_bytes() == before and lines.last_step == 1
    files_up_to(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    lines.write({"step": 2, "text": "z"})
    lines.close()
    assert [line["step"] for line in read_json_lines(path)] == [1, 2]


def test_what_a_broken_line_advises(tmp_path):
    """Restored or removed, the run goes on where it was; only what the file held is gone."""
    path, whole = tmp_path / "metrics.jsonl", '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"st\n' + whole)
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not a JSON object .*; restore the file or remove it"):
        MetricsWriter(tmp_path, resume_step=2, tensorboard=False)
    for content, steps in ((whole, [1, 2, 3]), (None, [3])):
        path.unlink()
        if content is not None:
            path.write_text(content)
        with MetricsWriter(tmp_path, resume_step=2, tensorboard=False) as writer:
            writer.write(3, {"reward/mean": 1.0})
        assert [line["step"] for line in read_json_lines(path)] == steps


def test_files_of_other_libraries_appear_whole_or_not_at_all(tmp_path, files_up_to):
    kept = [
        Candidate(
            id=str(i), prompt_id=str(i), question="?", response="r" * 2000, kind="math", language=None, template="r1_zero",
            source="", tokens=3, truncated=False, scored=True, parts={}, licence="",
        )
        for i in range(4)
    ]  # fmt: skip
    write_data(kept[:1], tmp_path)
    (tmp_path / "train.jsonl").unlink()
    before = contents(tmp_path)
    files_up_to(1500)  # the parquet file, compressed, is larger
    with pytest.raises(OSError, match="File too large") as raised:
        write_data(kept, tmp_path)
    assert Path(raised.value.filename).parent == tmp_path
    assert contents(tmp_path) == before


def test_lines_are_appended_in_one_place():
    """A new file that grows goes through `JsonLinesWriter`, which the tests above fail on purpose."""
    package = Path(__file__).parents[2] / "r1mega"
    appending = re.compile(r"open\([^)]*[\"']a[b+t]*[\"']")
    assert [p.name for p in package.rglob("*.py") if appending.search(p.read_text())] == ["files.py"]
    unbuffered = [p for p in package.rglob("*.py") if re.search(r"[\"']wb[\"'], buffering=0", p.read_text())]
    assert len(unbuffered) == 2
    assert not [p.name for p in unbuffered if re.search(r"(?<!def )\bfile\.write\(", p.read_text())]
