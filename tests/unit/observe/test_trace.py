"""Phase times on a clock of our own, memory, and the profiler on demand."""

import gzip
import json
import mmap
from types import SimpleNamespace

import pytest
import torch

from r1mega.observe.trace import PROFILE_VARIABLE, PhaseTimer, profile_step, rss_bytes
from r1mega.platform.memory import DevicePeak, HostPeak


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


def test_nested_phases_do_not_synchronize():
    """A response that is scored while others are generated must not stop the device; its time still counts apart."""
    calls, clock = [], Clock()
    timer = PhaseTimer(clock, synchronize=lambda: calls.append(1))
    timer.start_step()
    with timer.phase("rollout"):
        before = len(calls)
        for _ in range(5):
            with timer.phase("reward"):
                clock.now += 1
        assert len(calls) == before
    assert len(calls) == before + 1
    assert timer.finish_step()["time/reward_seconds"] == 5


def test_peaks_belong_to_the_outermost_phase():
    """A gauge that tells what was allocated since it was last read, whatever the phases say."""
    held = [0]

    def gauge():
        held[0], peak = 0, held[0]
        return peak

    timer = PhaseTimer(Clock(), memory={"host": gauge})
    held[0] = 1  # set-up
    timer.start_step()
    held[0] = 2  # in the step, before its phases
    with timer.phase("rollout"):
        held[0] = 3
        with timer.phase("reward"):
            held[0] = 7
    with timer.phase("reward"):
        held[0] = 4
    with timer.phase("rollout"):
        held[0] = 5
    held[0] = 6
    timer.finish_step()
    expected = {"between": 1, "other": 6, "rollout": 7, "reward": 4}
    assert timer.take_peaks() == {f"memory/{name}_host_peak_bytes": value for name, value in expected.items()}
    held[0] = 9  # a checkpoint
    timer.start_step()
    timer.finish_step()
    assert timer.take_peaks() == {"memory/between_host_peak_bytes": 9, "memory/other_host_peak_bytes": 0}


def resident(num_bytes):
    """Memory of the system's own, every page of it touched. (What torch asks for may lie in what earlier tests left free.)"""
    block = mmap.mmap(-1, num_bytes)
    torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    return block


def test_host_peak_is_of_its_phase():
    """Linux's own figure: what a phase took and gave back is seen there, and not in the next one."""
    try:
        HostPeak()()
    except OSError as error:
        pytest.skip(f"Linux does not let this process reset its peak: {error}")
    timer = PhaseTimer(memory={"host": HostPeak()})
    timer.start_step()
    with timer.phase("update"):
        resident(128 << 20)
    with timer.phase("reshard"):
        pass
    timer.finish_step()
    peaks = timer.take_peaks()
    taken = peaks["memory/update_host_peak_bytes"] - peaks["memory/reshard_host_peak_bytes"]
    assert 100 << 20 < taken < 160 << 20
    assert abs(peaks["memory/reshard_host_peak_bytes"] - rss_bytes()) < 32 << 20


@pytest.mark.heavy
def test_memory_of_a_sleeping_generator_is_not_counted(monkeypatch):
    """vLLM's own records, and torch's counters on a stand-in of a device: no GPU is needed to see what is subtracted."""
    cumem = pytest.importorskip("vllm.device_allocator.cumem")
    data = [cumem.AllocationData((0, size, pointer, 0), "weights") for pointer, size in ((1, 100), (2, 30))]
    allocator = SimpleNamespace(pointer_to_data=dict(enumerate(data)))
    monkeypatch.setattr(cumem.CuMemAllocator, "instance", allocator)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    peak = DevicePeak()
    assert peak() == 1000
    data[0].is_asleep = True
    assert peak() == 1000, "it was awake when the phase began"
    assert peak() == 900
    data[0].is_asleep = False
    data[1].is_asleep = True
    assert peak() == 970, "what is asleep at both ends cannot be more than the lesser of both"


def test_wrong_order_is_an_error():
    timer = PhaseTimer(Clock())
    with pytest.raises(RuntimeError):
        timer.finish_step()
    timer.start_step()
    with pytest.raises(RuntimeError), timer.phase("update"):
        timer.finish_step()


def test_rss_follows_an_allocation():
    before = rss_bytes()
    block = resident(64 << 20)
    grown = rss_bytes() - before
    assert 60 << 20 < grown < 100 << 20 and block[0] == 1


def test_profiler_records_the_named_step_only(tmp_path, monkeypatch):
    monkeypatch.setenv(PROFILE_VARIABLE, "2")
    for step in (1, 2, 3):
        with profile_step(tmp_path, step):
            torch.ones(8, 8) @ torch.ones(8, 8)
    (trace,) = tmp_path.iterdir()
    assert trace.name == "trace_step_2_rank_0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert "aten::mm" in {event.get("name") for event in events}
