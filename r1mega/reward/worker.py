"""Worker process of the reward pool: one JSON request a line on stdin, one JSON reply a line on the original stdout.

Started as a fresh interpreter, never forked: the trainer holds threads, sockets and a CUDA context. Imports nothing
but what a request names ("module:function"). Dies with its parent.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_PARENT_POLL_SECONDS = 1.0


def die_with_parent(parent: int) -> None:
    """SIGKILL from the kernel when the parent's thread ends; a watching thread where prctl is missing or came too
    late.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def limit_memory(num_bytes: int) -> None:
    """Cap the address space; no core files."""
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def warm_up(function: str) -> bool:
    """Import the libraries of a task's module, outside the limit of the first task."""
    module = importlib.import_module(function.partition(":")[0])
    prepare = getattr(module, "prepare", None)
    if prepare is not None:
        prepare()
    return True


def serve(memory_bytes: int, parent: int) -> None:
    """Answer requests until stdin closes. Replies: {"value"}, {"error"}, or {"fatal"} after which the process ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    die_with_parent(parent)
    limit_memory(memory_bytes)
    for line in sys.stdin:
        request = json.loads(line)
        fatal = False
        try:
            module, _, name = request["function"].partition(":")
            function = getattr(importlib.import_module(module), name)
            reply = {"value": function(*request["arguments"])}
        except MemoryError:
            reply, fatal = {"fatal": f"needed more than {memory_bytes >> 20} MiB"}, True
        except Exception as error:  # every failure of a task becomes a reply that names it
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if fatal:
            os._exit(1)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
