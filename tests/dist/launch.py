"""Run a function on N gloo ranks, with a timeout; the first traceback of a rank is raised here.

The processes are forks of one that has only imported what ranks use: starting a rank costs a fork, not ten seconds of imports.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.dist.preload"])


class RankError(AssertionError):
    """A rank failed, died or did not finish in time."""


def launch(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout_seconds: float = 240,
    prepare: Callable[[], None] | None = None,
) -> list[Any]:
    """[function(*args) on rank 0, 1, ...], each in a process of its own with RANK etc. set and one thread.

    function: importable. Results must be picklable. prepare: called in each process before the modules of `function` and
    `args` are imported; such processes start from nothing.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = FORKS if prepare is None else multiprocessing.get_context("spawn")
    outcomes = context.Queue()
    processes = [
        context.Process(
            target=_run, args=(outcomes, prepare, pickle.dumps((function, args)), rank, ranks, port), daemon=True
        )
        for rank in range(ranks)
    ]
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


def _run(outcomes: Any, prepare: Callable[[], None] | None, call: bytes, rank: int, ranks: int, port: int) -> None:
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
        if prepare is not None:
            prepare()
        function, args = pickle.loads(call)
        outcomes.put((rank, None, function(*args)))
    except BaseException:
        outcomes.put((rank, traceback.format_exc(), None))
        raise SystemExit(1) from None
