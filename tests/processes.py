"""How end-to-end tests start r1mega: forks of one process that has imported it (fork_server.py), or real starts.

Real are those of tests about starting itself (`real=True`), and all where there is a GPU: CUDA does not survive a fork.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

REPOSITORY = Path(__file__).parents[1]
SECONDS_TO_END = 30
"""After a rank has failed, until the others are killed; as torchrun has it."""


def environment() -> dict[str, str]:
    """Variables of a run: this process's, one thread, quiet."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class Fork:
    """A run as subprocess.Popen has it: `args`, `pid`, `returncode`, `poll`, `wait`, signals."""

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str], streams: Sequence[int]):
        self.args, self.returncode = list(arguments), None
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"arguments": self.args, "environment": dict(variables), "directory": str(REPOSITORY)}
        with theirs:
            socket.send_fds(_server(), [json.dumps(request).encode()], [theirs.fileno(), *streams])
        self.pid = self._answer()

    def poll(self, timeout: float = 0) -> int | None:
        """The exit code (-n: ended by signal n), or None."""
        if self.returncode is None and select.select([self._answers], [], [], timeout)[0]:
            self.returncode = self._answer()
            self._answers.close()
        return self.returncode

    def _answer(self) -> int:
        if not (answer := self._answers.recv(64)):
            raise RuntimeError("the fork server has ended; its own error stands in the output of the tests")
        return int(answer)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises TimeoutExpired after so many seconds."""
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    *arguments: Any, output: IO, errors: IO | None = None, stdin: IO | None = None,
    variables: Mapping[str, str] | None = None, real: bool = False, program: Sequence[str] = ("-m", "r1mega"),
) -> Fork | subprocess.Popen:  # fmt: skip
    """Start `python PROGRAM ARGUMENTS` in the repository; output, errors (default: output), stdin (default: nothing): open files."""
    command, variables = [*program, *map(str, arguments)], variables or environment()
    with open(os.devnull) as nothing:
        stdin, errors = stdin or nothing, errors or output
        if real or torch.cuda.is_available():
            command = [sys.executable, *command]
            return subprocess.Popen(command, env=variables, cwd=REPOSITORY, stdin=stdin, stdout=output, stderr=errors)
        return Fork(command, variables, [stdin.fileno(), output.fileno(), errors.fileno()])


def run(
    *arguments: Any, num_ranks: int = 1, separate: bool = False, stdin: str = "", timeout: float = 900,
    variables: Mapping[str, str] | None = None, real: bool = False, program: Sequence[str] = ("-m", "r1mega"),
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run `python PROGRAM ARGUMENTS` to the end; its output as text, errors among it unless they are to be separate.

    With several ranks, `real` is under torchrun. Raises TimeoutExpired after so many seconds, with everything killed.
    """
    variables = variables or environment()
    with (
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
        tempfile.TemporaryFile("w+") as given,
    ):
        given.write(stdin)
        given.seek(0)
        further = {"output": output, "stdin": given, "real": real, "program": program}
        further |= {"errors": errors} if separate else {}
        if num_ranks == 1:
            processes = [start(*arguments, variables=variables, **further)]
        elif real:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
            processes = [subprocess.Popen(
                [*launcher, *program, *map(str, arguments)], env=variables, cwd=REPOSITORY, stdout=output, stderr=output,
            )]  # fmt: skip
        else:
            processes = [start(*arguments, variables=variables | place, **further) for place in _places(num_ranks)]
        try:
            code = _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(processes[0].args, code, output.read(), errors.read())


def _wait(processes: Sequence[Fork | subprocess.Popen], timeout: float) -> int:
    """The code of the first that failed, once all have ended; 0 when none did."""
    limit, code = time.monotonic() + timeout, 0
    while None in (codes := [process.poll() for process in processes]):
        if not code and (code := next(filter(None, codes), 0)):
            limit = time.monotonic() + SECONDS_TO_END
            for process in processes:
                process.terminate()
        if time.monotonic() > limit:
            if code:
                break
            raise subprocess.TimeoutExpired(processes[0].args, timeout)
        time.sleep(0.02)
    return code or next(filter(None, codes), 0)


def _places(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun would set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port
    }  # fmt: skip
    places = ({"RANK": rank, "LOCAL_RANK": rank, **common} for rank in range(num_ranks))
    return [{name: str(value) for name, value in place.items()} for place in places]


@functools.cache
def _server() -> socket.socket:
    """Where to ask the fork server, which this process starts once; it ends when this process has."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"], stdin=theirs, stdout=subprocess.DEVNULL, cwd=REPOSITORY,
            env=environment() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
    return ours
