"""Phase times on a clock of our own, memory, and the profiler on demand."""

import gzip
import json

import pytest
import torch

from r1mega.observe.trace import PROFILE_VARIABLE, PhaseTimer, profile_step, rss_bytes


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_nested_phases_are_exclusive():
    clock = Clock()
    timer = PhaseTimer(clock)
    timer.start_step()
    clock.now += 1  # no phase
    with timer.phase("rollout"):
        clock.now += 2
        with timer.phase("reward"):
            clock.now += 4
            with timer.phase("rollout"):  # the same phase again, inside
                clock.now += 8
        clock.now += 16
    with timer.phase("save"):
        clock.now += 32
    clock.now += 64
    assert timer.seconds("rollout") == 26 and timer.seconds("update") == 0
    assert timer.finish_step() == {
        "time/rollout_seconds": 26,
        "time/reward_seconds": 4,
        "time/logprob_seconds": 0,
        "time/update_seconds": 0,
        "time/reshard_seconds": 0,
        "time/save_seconds": 32,
        "time/step_seconds": 127,
    }
    timer.start_step()
    assert timer.finish_step()["time/rollout_seconds"] == 0


def test_time_counts_when_the_phase_fails():
    clock = Clock()
    timer = PhaseTimer(clock)
    timer.start_step()
    with pytest.raises(KeyError), timer.phase("update"):
        clock.now += 3
        raise KeyError
    assert timer.finish_step()["time/update_seconds"] == 3


def test_boundaries_synchronize():
    calls = []
    timer = PhaseTimer(Clock(), synchronize=lambda: calls.append(1))
    timer.start_step()
    with timer.phase("update"):
        assert len(calls) == 2
    timer.finish_step()
    assert len(calls) == 4


def test_wrong_order_is_an_error():
    timer = PhaseTimer(Clock())
    with pytest.raises(RuntimeError):
        timer.finish_step()
    timer.start_step()
    with pytest.raises(RuntimeError), timer.phase("update"):
        timer.finish_step()


def test_rss_follows_an_allocation():
    before = rss_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    grown = rss_bytes() - before
    assert 60 << 20 < grown < 100 << 20 and block[0] == 1


def test_profiler_records_the_named_step_only(tmp_path, monkeypatch):
    monkeypatch.setenv(PROFILE_VARIABLE, "2")
    for step in (1, 2, 3):
        with profile_step(tmp_path, step):
            torch.ones(8, 8) @ torch.ones(8, 8)
    (trace,) = tmp_path.iterdir()
    assert trace.name == "trace_step_2_rank_0.json.gz"
    assert "aten::mm" in {event.get("name") for event in json.loads(gzip.open(trace).read())["traceEvents"]}
