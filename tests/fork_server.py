"""A process that has imported what runs of r1mega import, and forks for each: a start costs a fork, not ten seconds of imports.

Started by tests/processes.py, with the socket of its requests as standard input. A fork has arguments, variables, directory and
standard streams of its own, and ends as the command does (r1mega/ending.py). What forks share and real starts do not: the
seed of text hashes (the order of sets), addresses, and variables that are read at import. So each test that compares runs has
one real start.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy

from r1mega import ending

STREAMS = 3


def preload() -> None:
    """Imports only, in the order of a run: Megatron before vLLM's variables are set. No thread may start here."""
    from r1mega import platform

    platform.prepare()
    import torch._dynamo
    import transformers  # noqa: F401

    import r1mega.stages.rl
    import r1mega.stages.sft  # noqa: F401
    from r1mega.platform import vllm_cpu, vllm_import

    vllm_cpu.prepare_environment()
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()  # goes through all modules; once a process (platform/vllm_cpu_patches.py)
    torch._dynamo.config.disable = False  # until a run prepares vLLM's environment itself
    lost = [*vllm_import.NOT_USED, *vllm_import.STOOD_IN_FOR, "openai"]
    assert not any(map(sys.modules.get, lost)), "imported, and seconds of every start lost"
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in the forks"


def serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """(request, its standard streams), in a fork for each. Its parent waits for it and tells pid and exit code.

    Ends the process when nobody is left to ask.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 1 + STREAMS)
        if not message:
            sys.exit()
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests.close()
    answers, *streams = descriptors
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        with socket.socket(fileno=answers) as told, contextlib.suppress(BrokenPipeError):
            told.send(str(pid).encode())
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # the number stays taken until it has been told
            told.send(str(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status).encode())
        os.waitpid(pid, 0)
        os._exit(0)
    os.close(answers)
    return json.loads(message), streams


def become(arguments: list[str], environment: dict[str, str], directory: str, streams: list[int]) -> None:
    """Run `python ARGUMENTS` in this process: "-m", module, ... or script, ..."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    numpy.random.seed()  # as a fresh interpreter draws one; random's is drawn anew by Python itself
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    is_module = arguments[0] == "-m"
    program, sys.argv = arguments[is_module], arguments[is_module:]
    sys.orig_argv[1:] = arguments  # what a restart runs
    first = directory if is_module else str(Path(program).parent.resolve())
    path = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = list(dict.fromkeys([*path, *sys.path]))
    run = runpy.run_module if is_module else runpy.run_path
    ending.run(lambda: run(program, run_name="__main__", **({"alter_sys": True} if is_module else {})))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    asked = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # or forks would keep the socket open after this process
    preload()
    gc.collect()
    gc.freeze()  # pages of what is imported stay shared
    request, given = serve(asked)
    become(**request, streams=given)
