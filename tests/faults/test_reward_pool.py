"""The reward pool under fire: killers among the items change neither the others' scores nor their order."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1mega.errors import RewardError
from r1mega.reward import pool as pool_module
from r1mega.reward.pool import Task, WorkerPool

KILLERS = ("segfault", "memory_bomb", "endless_loop", "giant_integer")
MEMORY_BYTES = 512 << 20
FEW_MEMORY_BYTES = 256 << 20
"""Where many a bomb goes off: each fills what it may have."""
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def killers_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def task(name: str, *arguments, seconds: float = 20.0) -> Task:
    return Task(f"reward_killers:{name}", arguments, seconds)


def mixed_items(count: int, killer_share: float, seed: int) -> list[Task]:
    """Items with killers spread over them; the innocent ones have a generous limit, for busy machines, and what never answers a
    short one: a processor is busy with it until then.
    """
    rng, items = random.Random(seed), []
    for index in range(count):
        if rng.random() < killer_share:
            name = rng.choice(KILLERS)
            items.append(task(name, seconds=0.05 if name in ("endless_loop", "giant_integer") else 1.0))
        else:
            items.append(task("square", index))
    return items


def run_mixed(count: int, num_workers: int, max_retries: int) -> None:
    items = mixed_items(count, 0.01, seed=7)
    with WorkerPool(num_workers, FEW_MEMORY_BYTES, max_retries, max_pending=256) as pool:
        outcomes = pool.map(items)
        metrics = pool.metrics()
    killers = 0
    for index, (item, outcome) in enumerate(zip(items, outcomes, strict=True)):
        if item.function.endswith(":square"):
            assert (outcome.value, outcome.failure, outcome.attempts) == (index * index, None, 1)
        else:
            killers += 1
            assert outcome.value is None
            assert f"({max_retries + 1} attempts)" in outcome.failure
            assert outcome.attempts == max_retries + 1
    assert killers > 0
    assert metrics.failed == killers and metrics.finished == count - killers
    assert metrics.retries == killers * max_retries
    assert metrics.kills + metrics.crashes == killers * (max_retries + 1)
    assert metrics.queued == 0


def test_killers_change_no_score_and_no_order():
    run_mixed(count=1200, num_workers=2, max_retries=1)


@pytest.mark.slow
def test_ten_thousand_items_with_killers():
    run_mixed(count=10_000, num_workers=2, max_retries=1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("segfault", f"signal {signal.SIGSEGV.value}"),
        ("memory_bomb", "512 MiB"),
        ("endless_loop", "no answer within 0.5 s"),
        ("giant_integer", "no answer within 0.5 s"),
    ],
)
def test_reason_names_the_cause(name, reason, caplog):
    seconds = 20.0 if name in ("segfault", "memory_bomb") else 0.5
    with WorkerPool(1, MEMORY_BYTES, max_retries=0) as pool:
        outcome = pool.submit(task(name, seconds=seconds)).result(timeout=60)
    assert outcome.value is None and reason in outcome.failure
    assert "excluded after 1 attempts" in caplog.text


def test_a_death_costs_one_retry_and_no_score(tmp_path):
    with WorkerPool(1, MEMORY_BYTES, max_retries=2) as pool:
        outcome = pool.submit(task("dies_once", str(tmp_path / "flag"))).result(timeout=60)
        assert (outcome.value, outcome.attempts) == ("alive", 2)
        assert pool.metrics().retries == 1 and pool.metrics().crashes == 1


def test_a_slow_start_is_waited_for(tmp_path, monkeypatch):
    """Longer at each attempt, and for later workers three times what one took; only one that hangs is given up."""
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1)\n\ndef answer():\n    return 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(pool_module, "START_SECONDS", 0.2)
    with WorkerPool(1, MEMORY_BYTES, max_retries=7) as pool:
        outcome = pool.submit(Task("slow_to_import:answer", (), 20.0)).result(timeout=120)
        assert outcome.value == 42 and outcome.attempts >= 4  # 0.2, 0.4 and 0.8 seconds were too few
        assert pool.start_seconds(1) >= 3 and pool.start_seconds(2) == 2 * pool.start_seconds(1)


def test_a_slow_start_counts_whatever_the_task_does_then(monkeypatch):
    class Dying:
        started_seconds = 0.0

        def __init__(self, memory_bytes): ...

        def call(self, task, start_seconds):
            self.started_seconds = 50.0
            raise pool_module.WorkerDiedError("died", killed=False)

        def close(self): ...

    monkeypatch.setattr(pool_module, "_Worker", Dying)
    with WorkerPool(1, MEMORY_BYTES, max_retries=0) as pool:
        assert pool.submit(task("raises")).result(timeout=60).failure is not None
        assert pool.start_seconds(1) == 150


def test_an_exception_is_a_failure_without_retry():
    with WorkerPool(1, MEMORY_BYTES, max_retries=2) as pool:
        outcome = pool.submit(task("raises")).result(timeout=60)
    assert outcome.failure == "ValueError: not in the mood" and outcome.attempts == 1


def test_a_worker_killed_from_outside_is_replaced():
    with WorkerPool(1, MEMORY_BYTES, max_retries=1) as pool:
        assert pool.submit(task("square", 3)).result(timeout=60).value == 9
        for number in range(5):  # the death is noticed while writing or while reading, as it happens
            (worker,) = children_of(os.getpid(), "r1mega.reward.worker")
            os.kill(worker, signal.SIGKILL)
            time.sleep(0.05 * (number % 2))
            assert pool.submit(task("square", number)).result(timeout=60).value == number * number


def test_submissions_wait_when_the_pool_is_full():
    with WorkerPool(1, MEMORY_BYTES, max_pending=2) as pool:
        pool.submit(task("square", 1)).result(timeout=60)  # the worker is up
        start = time.monotonic()
        futures = [pool.submit(task("slow", 0.4)) for _ in range(3)]
        assert time.monotonic() - start >= 0.35  # the third one waited for the first
        assert [future.result().value for future in futures] == [0.4] * 3


def test_workers_start_lazily_and_without_heavy_imports():
    with WorkerPool(2, MEMORY_BYTES) as pool:
        assert not children_of(os.getpid(), "r1mega.reward.worker")
        loaded = pool.submit(Task("test_reward_pool:loaded_modules", (), 30.0)).result(timeout=60)
        assert loaded.failure is None
        assert len(children_of(os.getpid(), "r1mega.reward.worker")) == 1
    assert not {"torch", "vllm", "megatron", "transformers", "sympy", "numpy"} & set(loaded.value)
    assert not children_of(os.getpid(), "r1mega.reward.worker")  # close() leaves none


def loaded_modules() -> list[str]:
    """Runs in a worker; pytest and what it brings were imported by this file only."""
    return sorted(name.partition(".")[0] for name in sys.modules)


def test_closed_pool_refuses():
    pool = WorkerPool(1, MEMORY_BYTES)
    pool.close()
    with pytest.raises(RewardError, match="closed"):
        pool.submit(task("square", 1))


def test_workers_die_with_their_parent():
    program = (
        f"import sys; sys.path[:0] = [{str(HERE.parents[1])!r}, {str(HERE)!r}]\n"
        "from r1mega.reward.pool import Task, WorkerPool\n"
        "pool = WorkerPool(1)\n"
        "pool.submit(Task('reward_killers:square', (2,), 30.0)).result()\n"
        "pool.submit(Task('reward_killers:endless_loop', (), 300.0))\n"
        "print('ready', flush=True)\n"
        "import time; time.sleep(300)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    (worker,) = children_of(parent.pid, "r1mega.reward.worker")
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and "(zombie)" not in status_of(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists() or "(zombie)" in status_of(worker)


def status_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return "(zombie)"


def children_of(pid: int, needle: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and needle in (entry / "cmdline").read_bytes().decode():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
