"""Content hashes and records: the same for the same content wherever it lies, another for any other."""

import hashlib
import os
import shutil

import pytest

from r1mega.errors import DataError
from r1mega.observe.lineage import (
    Attempt,
    ContentHashes,
    Lineage,
    Source,
    changed_outputs,
    fingerprint,
    read_lineage,
    stamp_outputs,
    write_lineage,
)


def make(directory):
    (directory / "hf").mkdir(parents=True)
    (directory / "hf" / "a.bin").write_bytes(b"weights")
    (directory / "hf" / "b.json").write_text("{}")
    (directory / "metrics.jsonl").write_text("{}\n")
    for name in ("lock", "status.json", "config.yaml", "lineage.json", "metrics.jsonl.1", "samples.jsonl.12"):
        (directory / name).write_text(name)
    (directory / "checkpoints" / "step_1").mkdir(parents=True)
    (directory / "nonfinite").mkdir()
    (directory / "nonfinite" / "update_000002_rank_00000.pt").touch()
    (directory / "checkpoints" / "step_1" / "x").touch()
    return directory


def lineage(outputs):
    sources = {"model.path": Source("m", "1" * 64, "base")}
    return Lineage("zero", "zero", "finished", "f", {"seed": 1}, sources, outputs, (Attempt("t", None, "t", 0),))


def test_outputs_are_what_others_may_read(tmp_path):
    run = make(tmp_path / "run")
    stamps = stamp_outputs(run)
    assert set(stamps) == {"hf/a.bin", "hf/b.json", "metrics.jsonl"}
    assert stamps["hf/a.bin"].sha256 == hashlib.sha256(b"weights").hexdigest() and stamps["hf/a.bin"].bytes == 7


def test_a_recorded_output_and_a_copy_of_it_have_one_hash(tmp_path):
    run = make(tmp_path / "run")
    shutil.copytree(run / "hf", tmp_path / "copy")
    record, hashes = lineage(stamp_outputs(run)), ContentHashes(tmp_path / "hashes.json")
    assert record.output_hash("hf") == hashes.of(run / "hf") == hashes.of(tmp_path / "copy")
    assert (
        record.output_hash("hf/a.bin")
        == hashes.of(tmp_path / "copy" / "a.bin")
        == hashlib.sha256(b"weights").hexdigest()
    )
    assert (
        record.output_hash("h") is None and record.output_hash("nothing") is None and hashes.of(tmp_path / "no") is None
    )
    os.rename(tmp_path / "copy" / "a.bin", tmp_path / "copy" / "c.bin")
    assert hashes.of(tmp_path / "copy") != record.output_hash("hf"), "names count"


def test_what_was_read_is_remembered_until_it_is_written(tmp_path):
    file, cache = tmp_path / "data", tmp_path / "cache" / "hashes.json"
    file.write_text("one")
    first = ContentHashes(cache).of(file)
    status = file.stat()
    file.write_text("two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ContentHashes(cache).of(file) == first, "same size and time: taken for the same"
    file.write_text("two")
    assert ContentHashes(cache).of(file) == hashlib.sha256(b"two").hexdigest()
    cache.write_text("{")
    with pytest.raises(DataError, match="hashes.json: damaged"):
        ContentHashes(cache)


def test_nothing_is_written_where_nothing_is_to_be_remembered(tmp_path):
    (tmp_path / "data").write_text("one")
    ContentHashes(tmp_path / "hashes.json").of(tmp_path / "data", remember=False)
    assert not (tmp_path / "hashes.json").exists()


def test_changed_outputs(tmp_path):
    run = make(tmp_path / "run")
    stamps = stamp_outputs(run)
    os.utime(run / "metrics.jsonl", ns=(1, 1))  # touched, not changed
    assert changed_outputs(run, stamps) == []
    (run / "hf" / "a.bin").write_bytes(b"wEights")
    (run / "hf" / "b.json").unlink()
    assert changed_outputs(run, stamps) == ["hf/a.bin", "hf/b.json"]


def test_record_survives_a_round_trip(tmp_path):
    run = make(tmp_path / "run")
    record = lineage(stamp_outputs(run))
    write_lineage(run, record)
    assert read_lineage(run) == record
    assert read_lineage(tmp_path) is None
    for damaged in ('{"node": 1}', "[]", '{"inputs": [], "outputs": {}, "attempts": []}', "{"):
        (run / "lineage.json").write_text(damaged)
        with pytest.raises(DataError, match="lineage.json: damaged"):
            read_lineage(run)
    (run / "lineage.json").unlink()  # as it says
    assert read_lineage(run) is None


def test_fingerprint_is_of_contents_not_of_places():
    def of(seed=1, path="a", sha="1"):
        return fingerprint({"seed": seed}, {"model.path": Source(path, sha, None)})

    assert of() == of(path="b") == fingerprint({"seed": 1}, {"model.path": Source("a", "1", "base")})
    assert len({of(), of(seed=2), of(sha="2")}) == 3
