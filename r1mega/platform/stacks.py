"""What a rank that is to end is doing: its stacks with their C frames, and the collectives that NCCL recorded."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist


def record_collectives(directory: Path) -> None:
    """Switch on NCCL's flight recorder (torch 2.13: FlightRecorder.hpp, ProcessGroupNCCL.hpp), before the process groups: the last
    2,000 collectives of each rank with their state, in memory alone, written as `nccl_trace_rank_N` when one times out. It tells
    which rank did not enter which collective, which no Python stack of a GPU job does.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(directory.absolute() / "nccl_trace_rank_"))


def native_stacks(pid: int, seconds: int = 15) -> str:
    """Stacks of a process with its C frames, by py-spy or gdb within `seconds`; without either, that they are missing."""
    for command in (
        ["py-spy", "dump", "--native", "--nonblocking", "--pid", str(pid)],
        ["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all bt"],
    ):
        if shutil.which(command[0]) is None:
            continue
        try:
            # gdb stops the process, also this one: another keeps the limit, and ends the stop that a killed gdb leaves
            limited = ["sh", "-c", f'timeout -s KILL {seconds} "$@"; kill -CONT "$0"', str(pid), *command]
            done = subprocess.run(limited, capture_output=True, text=True)
        except OSError as error:
            return f"\nnative stacks: {command[0]} failed ({error})\n"
        return f"\nnative stacks by {command[0]}:\n{done.stdout}{done.stderr}"
    return "\nnative stacks: neither py-spy nor gdb is installed here\n"


def dump_collectives(path: Path) -> None:
    """Write what NCCL's flight recorder holds of this rank, once; nothing where torch has no NCCL."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)  # of CUDA builds
    if dump is not None and dist.is_initialized() and not path.exists():
        path.write_bytes(dump())
