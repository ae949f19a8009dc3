"""Tasks for the pool's worker processes that misbehave on purpose."""

import ctypes
import time
from pathlib import Path


def square(value: int) -> int:
    return value * value


def segfault() -> None:
    ctypes.string_at(0)


def memory_bomb() -> int:
    return len([bytearray(1 << 24) for _ in range(1 << 20)])


def endless_loop() -> None:
    while True:
        pass


def giant_integer() -> int:
    return (9**9**8).bit_length()  # one C call: no signal handler runs until it is done


def slow(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def dies_once(flag: str) -> str:
    """Dies at the first attempt, answers at the second."""
    path = Path(flag)
    if not path.exists():
        path.touch()
        segfault()
    return "alive"


def raises() -> None:
    raise ValueError("not in the mood")
