"""Timing: the best of several runs, contestants in turn, so that a slow moment of the machine strikes all of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping

import torch

Contestants = Mapping[str, Callable[[], object]]


def cpu_seconds(contestants: Contestants, rounds: int) -> dict[str, float]:
    """Best seconds of each contestant over interleaved rounds, after one that warms up: with one torch thread the CPU
    time of that thread, which other processes do not stretch; with more, wall-clock time."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def timed(function: Callable[[], object]) -> float:
        start = clock()
        function()
        return clock() - start

    return _best(contestants, rounds, timed)


def call_seconds(contestants: Contestants, blocks: int) -> dict[str, float]:
    """Seconds of a call of functions of some microseconds: the least of many short blocks of calls, in turn. CPU time of this thread.

    A core that another process shares is half as fast for some milliseconds, then whole again: a block is shorter than
    that, so each contestant meets both, and only noise is added to the least (medians fall on either side, and put
    ratios nearer to 1). The thread is not bound to a core, where something else may have the right of way; no garbage
    is collected meanwhile.
    """

    def block(function: Callable[[], object], calls: int) -> float:
        start = time.thread_time()
        for _ in range(calls):
            function()
        return time.thread_time() - start

    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for function in contestants.values():
            block(function, 20)  # warms up
        calls = {name: max(1, int(5e-4 * 20 / block(function, 20))) for name, function in contestants.items()}
        found: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(blocks):
            for name in list(contestants)[:: 1 if number % 2 else -1]:
                found[name].append(block(contestants[name], calls[name]) / calls[name])
    finally:
        if collects:
            gc.enable()
    return {name: min(seconds) for name, seconds in found.items()}


def gpu_seconds(contestants: Contestants, rounds: int) -> dict[str, float]:
    """The same on the current CUDA stream, by events. Before each run the L2 cache is overwritten, for longer than the host takes to
    launch the run: its kernels then wait in the stream one behind the other, and what is between the events is theirs alone.
    """
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def seconds_of(function: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    for function in (flush.zero_, *contestants.values()):
        seconds_of(function)  # the first launch compiles and tunes: the host's next time is told by the second
    of_flush = seconds_of(lambda: [flush.zero_() for _ in range(8)]) / 8

    def timed(function: Callable[[], object]) -> float:
        begun = time.perf_counter()
        function()
        launched = time.perf_counter() - begun  # of the host, which the next time takes as long
        torch.cuda.synchronize()
        for _ in range(1 + math.ceil(2 * launched / of_flush)):
            flush.zero_()
        return seconds_of(function)

    return _best(contestants, rounds, timed)


def seconds_on(device: str) -> Callable[[Contestants, int], dict[str, float]]:
    """`gpu_seconds` or `cpu_seconds`."""
    return gpu_seconds if device == "cuda" else cpu_seconds


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that torch's CPU allocator has given out at once while `function` ran, beyond what was there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    current = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def _best(contestants: Contestants, rounds: int, timed: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    best: dict[str, float] = {}
    for round_number in range(rounds + 1):
        for name, function in contestants.items():
            seconds = timed(function)
            if round_number:
                best[name] = min(seconds, best.get(name, seconds))
    return best
