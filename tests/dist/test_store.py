"""A disk that takes no more on one rank: the same typed error on all, nothing of that checkpoint is kept."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.dist.launch import launch

SIZE = 4 << 20


@contextlib.contextmanager
def small_disk(directory: Path):
    """A file system of 4 MiB, where root may mount one; else the ranks limit the size of a file (RLIMIT_FSIZE)."""
    directory.mkdir()
    mounted = os.getuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(directory)], capture_output=True
    ).returncode  # fmt: skip
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)


def save_on_small_disk(directory: Path, mounted: bool, asynchronous: bool) -> list:
    """Step 1 fits; in step 2 rank 1 alone has too much. [error of step 2, what is there then, is step 1 whole]."""
    import torch
    import torch.distributed as dist

    from r1mega import platform

    platform.prepare()
    from megatron.core.dist_checkpointing import ShardedTensor

    from r1mega.checkpoint.store import CheckpointStore
    from r1mega.errors import CheckpointError
    from r1mega.platform import groups

    groups.init_distributed()
    rank = dist.get_rank()
    store = CheckpointStore(directory, keep=2, architecture={}, asynchronous=asynchronous)

    def state(elements: int) -> dict:
        return {"w": ShardedTensor.from_rank_offsets(f"w{rank}", torch.ones(elements))}

    store.save(1, state(1000), {})
    store.wait()
    if not mounted:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, SIZE))
    message = ""
    try:
        store.save(2, state(1000 if rank == 0 else SIZE // 2), {})
        store.wait()
    except CheckpointError as error:
        message = str(error)
    latest = store.latest()
    groups.destroy()
    return [message, sorted(p.name for p in store.directory.iterdir()), latest.name]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_told_by_all_ranks(tmp_path, asynchronous):
    with small_disk(tmp_path / "disk") as mounted:
        for message, left, latest in launch(save_on_small_disk, 2, tmp_path / "disk", mounted, asynchronous):
            assert "could not be written" in message
            assert "(rank 1)" in message or "(rank" not in message  # of both: the other found the disk full
            assert left == ["step_000001"]
            assert latest == "step_000001"
