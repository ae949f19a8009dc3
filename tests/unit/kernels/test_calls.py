"""What a call costs where arithmetic costs nothing: beside the leanest autograd.Function over the same operators."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[3] / "kernels"))

from bench import timing  # noqa: E402
from bench.calls import CONTESTANTS  # noqa: E402
from bench.timing import call_seconds  # noqa: E402

LIMIT, TRIES = 1.5, 4


def ratio(contestants) -> float:
    """Of the CPU times of a call."""
    ours, raw = call_seconds(contestants, 200).values()
    return round(ours / raw, 3)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_call_costs_little_beside_the_raw_operators(native, name):
    """A loaded machine moves the ratio by some percent: what is safely below the limit may try again, what is over it fails."""
    ours, raw = CONTESTANTS[name].values()
    torch.testing.assert_close(ours(), raw(), rtol=0, atol=0)  # the two do the same
    found: list[float] = []
    while len(found) < TRIES and (not found or min(found) > LIMIT):
        found.append(ratio(CONTESTANTS[name]))
    assert min(found) <= LIMIT, f"{name}: {found} times the raw operators"


def test_the_measurement_tells_what_is_over_the_limit(native):
    """5 calls against 3."""
    raw = CONTESTANTS["linear_log_prob"]["raw operators"]
    ways = {"five": lambda: [raw() for _ in range(5)], "three": lambda: [raw() for _ in range(3)]}
    found = [ratio(ways) for _ in range(2)]
    assert min(found) > LIMIT and max(found) < 1.9, found


class Stream:
    """A host that launches and a GPU that works through its queue, with a clock each [s]."""

    def __init__(self) -> None:
        self.host = self.gpu = 0.0
        self.cuda = SimpleNamespace(Event=lambda enable_timing: Event(self), synchronize=self.wait)
        self.uint8 = torch.uint8

    def launch(self, host: float, gpu: float) -> None:
        self.host += host
        self.gpu = max(self.gpu, self.host) + gpu

    def wait(self) -> None:
        self.host = max(self.host, self.gpu)

    def empty(self, size, dtype, device):
        return SimpleNamespace(zero_=lambda: self.launch(5e-6, size / 4e12))

    def perf_counter(self) -> float:
        return self.host


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, 0.0

    def record(self) -> None:
        self.stream.host += 2e-6
        self.at = self.stream.gpu = max(self.stream.gpu, self.stream.host)

    def synchronize(self) -> None:
        self.stream.wait()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.mark.parametrize("launches", [1, 2, 40])
def test_the_time_of_launches_is_hidden(monkeypatch, launches):
    """Of kernels shorter than their launches: the time on the GPU, not the host's."""
    stream = Stream()
    monkeypatch.setattr(timing, "torch", stream)
    monkeypatch.setattr(timing, "time", stream)
    compiles = iter([30.0])

    def one() -> None:
        stream.host += next(compiles, 0.0)
        for _ in range(launches):
            stream.launch(60e-6, 10e-6)

    found = timing.gpu_seconds({"one": one}, 3)
    assert found["one"] == pytest.approx(launches * 10e-6, abs=3e-6)
    assert stream.host < 30.1, "nothing waits as long again as the first launch took"
