"""An HF directory that several ranks write: the files that one would write, each rank its share; or none of it anywhere."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from r1mega.checkpoint.hf import write_hf
from r1mega.checkpoint.workers import TorchWorkers
from r1mega.errors import CheckpointError
from r1mega.platform import groups
from tests.dist.launch import launch

SHARD_BYTES = 4000


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}": torch.randn(100 + 37 * i, generator=generator) for i in range(23)}


def export(directory: Path, full_on: int | None) -> tuple[list[str], str]:
    """(files that this rank wrote, the error). full_on: the rank whose files may have no more than a few bytes."""
    import r1mega.checkpoint.hf as module

    groups.init_distributed()
    workers, written, writing = TorchWorkers(), [], module.write_tensors
    if workers.rank == full_on:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def noted(path, specs, stream):
        written.append(path.name)
        writing(path, specs, stream)

    module.write_tensors = noted
    error = ""
    try:
        write_hf(directory, tensors().items(), {"x": 1}, shard_bytes=SHARD_BYTES, workers=workers)
    except CheckpointError as caught:
        error = str(caught)
    groups.destroy()
    return written, error


def test_every_rank_writes_a_share_of_the_files_that_one_would_write(tmp_path):
    write_hf(tmp_path / "alone", tensors().items(), {"x": 1}, shard_bytes=SHARD_BYTES)
    found = launch(export, 3, tmp_path / "together", None)
    assert [error for _, error in found] == [""] * 3
    files = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "together").iterdir()} == files
    shares = [written for written, _ in found]
    assert sorted(sum(shares, [])) == [f"shard-{i:05d}" for i in range(len(files) - 2)]  # config.json, the index
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    loaded = {n: t for path in (tmp_path / "together").glob("*.safetensors") for n, t in load_file(path).items()}
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())


def test_a_disk_that_is_full_for_one_rank_is_an_error_on_all_and_leaves_what_was_there(tmp_path):
    write_hf(tmp_path / "hf", tensors().items(), {"x": 1}, shard_bytes=SHARD_BYTES)
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    for _, error in launch(export, 3, tmp_path / "hf", 1):
        assert "File too large" in error
        assert "(rank 1); " in error
        assert "free some disk" in error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
