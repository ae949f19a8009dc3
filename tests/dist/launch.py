"""Run a function on N gloo ranks, with a timeout; the first traceback of a rank is raised here.

The processes are forks of one that has only imported what ranks use: starting a rank costs a fork, not ten seconds of imports.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any
from unittest import mock

FORKS = multiprocessing.get_context("forkserver")


class RankError(AssertionError):
    """A rank failed, died or did not finish in time."""


def launch(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout_seconds: float = 600,
    preload: str = "tests.dist.preload",
) -> list[Any]:
    """[function(*args) on rank 0, 1, ...], each in a process of its own with RANK etc. set and one thread.

    function: importable. Results must be picklable. preload: the module that is imported before those of `function` and
    `args`, in the process that all ranks with the same preload are forks of.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outcomes = FORKS.Queue()
    call = pickle.dumps((function, args))
    processes = [
        FORKS.Process(target=_run, args=(outcomes, preload, call, rank, ranks, port), daemon=True)
        for rank in range(ranks)
    ]
    with mock.patch.object(forkserver, "connect_to_new_process", _server(preload).connect_to_new_process):
        for process in processes:
            process.start()
    try:
        return _collect(outcomes, processes, time.monotonic() + timeout_seconds, timeout_seconds)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


@functools.cache
def _server(preload: str) -> forkserver.ForkServer:
    """multiprocessing has one for all; libraries that must not meet want one each. It ends when this process has."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([preload])
    return server


def _collect(outcomes: Any, processes: list[Any], deadline: float, timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        try:
            rank, error, result = outcomes.get(timeout=0.2)
        except queue.Empty:
            dead = [i for i, p in enumerate(processes) if i not in results and p.exitcode not in (None, 0)]
            if dead and outcomes.empty():
                raise RankError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                waiting = sorted(set(range(len(processes))) - results.keys())
                raise RankError(f"ranks {waiting} did not finish in {timeout_seconds} s") from None
            continue
        if error is not None:
            raise RankError(f"rank {rank}:\n{error}")
        results[rank] = result
    return [results[rank] for rank in range(len(processes))]


def _run(outcomes: Any, preload: str, call: bytes, rank: int, ranks: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    try:
        import torch

        torch.set_num_threads(1)
        importlib.import_module(preload)  # is there; the server keeps an ImportError to itself
        function, args = pickle.loads(call)
        outcomes.put((rank, None, function(*args)))
    except BaseException:
        outcomes.put((rank, traceback.format_exc(), None))
        raise SystemExit(1) from None
