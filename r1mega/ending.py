"""How a command ends: errors as a message and an exit code, and a signal that comes before there is anything to save."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import gc
import io
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from r1mega.errors import EXIT_FILE, EXIT_SAVED_FOR_REQUEUE, ConfigError, DataError, R1MegaError, StragglerError
from r1mega.noise import NVIDIA

SECONDS_FOR_THE_FIRST_RANK = 5
"""How long another rank leaves it to the first to tell what all of them find, before it tells it itself."""
SECONDS_FOR_THE_CAUSE = 5
"""How long a rank waits with its end for that of the one which it lost: the launcher's exit code is that of whoever ends first."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """An R1MegaError, and an OSError of a file, becomes a message and its exit code; R1MEGA_TRACEBACK=1 shows where it came from."""
    try:
        yield
    except R1MegaError as error:
        if os.environ.get("R1MEGA_TRACEBACK") == "1":
            raise
        if is_told_by_the_first(error):
            exit_on_signals(error.exit_code)
            time.sleep(SECONDS_FOR_THE_FIRST_RANK)  # its end, once it has told, ends this one too
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        exit_on_signals(error.exit_code)  # a launcher sends them once another has ended, and nothing is saved here
        if isinstance(error, StragglerError):
            time.sleep(SECONDS_FOR_THE_CAUSE)
        sys.exit(error.exit_code)
    except OSError as error:
        text = _file_problem(error)
        if text is None or os.environ.get("R1MEGA_TRACEBACK") == "1":
            raise
        print(f"{type(error).__name__}: {text}", file=sys.stderr)
        sys.exit(EXIT_FILE)


def exit_code(error: BaseException) -> int:
    """Of the command that ends by it."""
    if isinstance(error, R1MegaError):
        return error.exit_code
    if isinstance(error, OSError) and _file_problem(error) is not None:
        return EXIT_FILE
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def is_told_by_the_first(error: BaseException) -> bool:
    """Whether this is another rank than the first, and all of them may have found it."""
    return isinstance(error, (ConfigError, DataError)) and not is_first_rank()


def _file_problem(error: OSError) -> str | None:
    """What to tell of an error that is about a file or a disk; None for another one (of a socket, say)."""
    if error.filename is not None:
        names = " -> ".join(
            os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
        )
        return f"{names}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        return f"a file could not be written or read: {error.strerror}; R1MEGA_TRACEBACK=1 shows which"
    return None


def requeue_on_signals() -> None:
    """Asked to stop before anything has begun (libraries load, ranks gather): there is nothing to save, start again."""
    exit_on_signals(EXIT_SAVED_FOR_REQUEUE)


def exit_on_signals(code: int) -> None:
    """At once, with that code, when asked to stop."""
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    for number in numbers:
        signal.signal(number, lambda *_: os._exit(code))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # a restart blocks them (platform/launcher.py)


def run(main: Callable[[], object]) -> NoReturn:
    """Call `main` and end the process as Python does after it, but without taking down what is imported: with torch and vLLM that is two
    seconds of a processor. Threads are waited for, exit handlers called (Python's and those of C), files left open written. Where libraries
    have more to do in the end (CUDA's and its profilers', MPI's), where somebody waits for the end of the program (`python -m cProfile`),
    and where a stream cannot be flushed, Python ends it.
    """
    if NVIDIA.exists() or _is_watched():
        main()
        sys.exit()
    code: object = 0
    try:
        main()
    except SystemExit as error:
        code = 0 if error.code is None else error.code
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    if "mpi4py.MPI" in sys.modules:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for them, after what concurrent.futures asks for
    atexit._run_exitfuncs()
    _write_files()
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError):  # ValueError: closed
        sys.exit(code)
    ctypes.PyDLL(None).exit(
        code & 0xFF
    )  # no thread gets at Python meanwhile. Segments of shared memory are removed there
    raise AssertionError("exit returned")


def _is_watched() -> bool:
    """By a profiler, a debugger or what measures coverage, which may go on after the program."""
    monitoring = getattr(sys, "monitoring", None)  # of Python 3.12 and later
    tools = map(monitoring.get_tool, range(6)) if monitoring else ()
    return any((sys.gettrace(), sys.getprofile(), *tools))


def _write_files() -> None:
    """What files that nobody has closed (a plug-in's log, say) still hold. Not pipes, which may never take it."""
    for file in gc.get_objects():
        if issubclass(type(file), io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom):
            with contextlib.suppress(
                OSError, ValueError
            ):  # closed, no file, a full disk: Python's end says nothing of it either
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    file.flush()


def leave(code: int) -> NoReturn:
    """With that code, whatever is asked from here on: the interpreter's end takes Python's handlers away, and seconds after that a signal
    would end the process by itself, as if nothing had been saved.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def is_first_rank() -> bool:
    """By the launcher's own variables: an error may come before they are adopted."""
    from r1mega.config.launched import launched_place

    place = launched_place()
    return place is None or place.rank == 0
