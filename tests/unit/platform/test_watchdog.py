"""A rank that stands still is named and the job ends: real processes, one of which stops, hangs, or works long."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest

from r1mega.config.schema import TimeoutsConfig, WatchdogConfig
from r1mega.errors import EXIT_STALLED
from r1mega.platform.stacks import record_collectives
from r1mega.platform.watchdog import (
    FLOOR_SECONDS,
    UNSEEN_SECONDS,
    Beat,
    Place,
    Watchdog,
    _Seen,
    behind,
    prepare_directory,
)

pytestmark = pytest.mark.heavy

BEAT = Beat(0, "host", 1, Place(3, 2, "update", 9), {"microbatch": 4}, 7, 20, 0, "r1mega/a.py:1 f", True, 1)


def beat(rank: int, **changes) -> Beat:
    place = dataclasses.replace(
        BEAT.place, **{k: v for k, v in changes.items() if k in ("step", "part", "phase", "turns")}
    )
    return dataclasses.replace(BEAT, rank=rank, place=place, **{k: v for k, v in changes.items() if hasattr(BEAT, k)})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}, {"part": 1}, {}], [1]),  # still in the phase before
        ([{"step": 4, "part": 0}, {}, {"step": 4, "part": 1}], [1]),
        ([{}, {}, {"waits": False}], [2]),  # the others are in a collective
        ([{"part": 1}, {"waits": False}, {}], [0]),  # what is later cannot hold the earlier
        ([{"ticks": {"microbatch": 3}}, {}, {}], [0]),
        ([{"collectives": 8}, {"collectives": 7}, {"collectives": 8}], [1]),
        ([{}, {}, {}], [0, 1, 2]),
    ],
)  # fmt: skip
def test_who_is_behind(changes, expected):
    assert behind({rank: beat(rank, **change) for rank, change in enumerate(changes)}) == expected


RANKS = """
import os, signal, sys, threading, time
from pathlib import Path
from r1mega.config.schema import WatchdogConfig
from r1mega.platform.watchdog import Place, Watchdog, prepare_directory, tick

directory = Path(sys.argv[1])
prepare_directory(directory)
child = os.fork()
rank = 0 if child else 1
phase = ["update", "rollout"][rank]

def work_of_the_rank():
    {body}

with Watchdog(directory, WatchdogConfig(seconds={seconds}, silent_seconds=1.5), lambda: Place(1, 2 - rank, phase, 0),
              rank=rank, world=2, on_verdict=lambda text: print("verdict:", text, flush=True)) as dog:
    work_of_the_rank()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run_ranks(tmp_path, body: str, seconds: float = 600) -> tuple[int, str]:
    script = RANKS.format(body=body, seconds=seconds)
    variables = os.environ | {"PATH": ""}  # without gdb, which takes its time to read torch's symbols
    command = [sys.executable, "-c", script, tmp_path / "watch"]
    said = tmp_path / "said.txt"
    with said.open("w") as file:  # no pipe: a rank that is stopped would hold it open
        code = subprocess.run(command, stdout=file, stderr=file, timeout=120, env=variables).returncode
    return code, said.read_text()


def stacks(tmp_path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (tmp_path / "watch/stacks").iterdir()}


def test_a_stopped_rank_is_named_and_the_other_one_ends(tmp_path):
    body = "os.kill(os.getpid(), signal.SIGSTOP) if rank else threading.Event().wait(20)"
    code, said = run_ranks(tmp_path, body + "; os.kill(child or os.getpid(), signal.SIGKILL)")
    beats = {rank: json.loads((tmp_path / f"watch/rank_{rank}.json").read_text()) for rank in range(2)}
    os.kill(beats[1]["pid"], signal.SIGKILL)
    assert code == EXIT_STALLED, said
    assert "verdict: rank 1 (pid" in said and "stopped, by SIGSTOP" in said
    assert "it was at step 1, rollout" in said and "rank 0 (" not in said
    assert list(stacks(tmp_path)) == ["rank_0.txt"]


def test_a_hung_rank_is_named_and_all_write_their_stacks(tmp_path):
    code, said = run_ranks(tmp_path, "threading.Event().wait(20)", seconds=2)
    assert code == EXIT_STALLED, said
    assert "no rank got on for" in said and "behind is rank 1 (pid" in said
    assert "rank 0 (" not in said
    found = stacks(tmp_path)
    assert sorted(found) == ["rank_0.txt", "rank_1.txt"]
    for text in found.values():
        assert "work_of_the_rank" in text and "neither py-spy nor gdb" in text
    assert json.loads((tmp_path / "watch/verdict.json").read_text())["dumps"] == 2


def test_ranks_that_get_on_are_left_alone(tmp_path):
    body = 'for _ in range(25): time.sleep(0.2); tick("generator step") if rank else None'
    code, said = run_ranks(tmp_path, body, seconds=2)
    assert code == 0, said
    assert all(json.loads((tmp_path / f"watch/rank_{rank}.json").read_text())["ended"] for rank in range(2))


def watchdog(tmp_path, world: int = 2) -> Watchdog:
    return Watchdog(tmp_path, WatchdogConfig(), lambda: BEAT.place, rank=0, world=world)


def test_the_limit_of_a_phase_follows_from_its_pauses(tmp_path):
    """A rollout that pauses for 200 s may later pause for 2,000; nothing is known of a phase that was not passed."""
    dog, now = watchdog(tmp_path), 1000.0
    dog._timeouts = TimeoutsConfig(collective_seconds=60)
    moments = [("rollout", 0), ("rollout", 200), ("update", 210), ("update", 211), ("rollout", 212)]
    for phase, seconds in moments:
        beats = [beat(rank, phase=phase, turns=seconds) for rank in range(2)]
        dog._seen = {rank: _Seen(beats[rank], now + seconds, now + seconds) for rank in range(2)}
        assert dog._judge(now + seconds) is None
    assert dog._limit("rollout") == 2000
    assert dog._limit("update") == FLOOR_SECONDS
    assert dog._limit("evaluate") == dog._limit("save") == UNSEEN_SECONDS
    for seen in dog._seen.values():
        seen.sign = now + 2300
    assert dog._judge(now + 212 + 1999) is None
    assert "rollout may pause for 2000" in dog._judge(now + 212 + 2001)


def test_no_limit_is_below_what_the_timeouts_allow(tmp_path):
    dog = watchdog(tmp_path)
    dog._timeouts = TimeoutsConfig(startup_seconds=7200, collective_seconds=5000, checkpoint_seconds=9000)
    dog._passed = {"update"}
    found = [dog._limit(phase) for phase in ("start", "end", "save", "export", "update", "rollout")]
    assert found == [7200, 7200, 9000, 9000, 5000, 5000]


@pytest.mark.parametrize(
    ("host", "lives", "phase", "seconds"),
    [("", True, "update", 300), ("", False, "start", 60), ("far", True, "start", 300), ("far", True, "update", 60)],
)
def test_a_process_that_runs_may_be_silent_for_longer(tmp_path, host, lives, phase, seconds):
    dog, now = watchdog(tmp_path, world=1), 1000.0
    child = subprocess.Popen(["true"])
    child.wait()
    silent = dataclasses.replace(
        beat(0, phase=phase), host=host or socket.gethostname(), pid=os.getpid() if lives else child.pid
    )
    dog._seen = {0: _Seen(silent, now, now)}
    assert dog._judge(now + seconds - 1) is None
    assert "has given no sign" in dog._judge(now + seconds + 1)


def test_what_counts_as_work(tmp_path):
    """Work takes a processor and moves on; a wait with naps does not."""
    dog = Watchdog(tmp_path, WatchdogConfig(silent_seconds=1.2), lambda: Place(0, 0, "start", 0), rank=0, world=1)

    def after(work, most_beats) -> int:
        """How often it counted, in so many beats or until it did."""
        beats = []

        def look():
            for _ in range(most_beats):
                time.sleep(dog._interval)
                dog._beat()
                beats.append(dog._busy)
                if beats[-1] > beats[0]:
                    break

        dog._spot = None
        thread = threading.Thread(target=look)
        thread.start()
        while thread.is_alive():
            work()
        return beats[-1] - beats[0]

    assert (
        after(lambda: [number * number % 7 for number in range(9999)], 400) > 0
    )  # the machine may have no time for it
    assert after(lambda: time.sleep(1), 8) == 0


def test_a_watcher_that_was_stopped_itself_blames_nobody(tmp_path):
    dog = watchdog(tmp_path, world=1)
    dog._beat()
    dog._look()
    dog._looked -= 10_000
    dog._seen[0].sign -= 10_000
    dog._look()
    assert not (tmp_path / "verdict.json").exists()


def test_reading_many_files_slowly_is_not_lateness(tmp_path, monkeypatch):
    dog = watchdog(tmp_path, world=1)
    dog._beat()
    dog._look()
    clock, read = time.monotonic(), dog._read

    def slowly(now):
        nonlocal clock
        read(now)
        clock += 40

    monkeypatch.setattr(dog, "_read", slowly)
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for _ in range(2):
        clock += dog._interval
        dog._look()
    assert dog._seen[0].sign < clock - 80  # of the first look: nothing was forgotten


def test_the_job_ends_where_nothing_can_be_written(tmp_path):
    """The directory is gone, as good as a full disk; what the stage says of it fails as well."""
    body = """
import shutil
    from r1mega.platform import watchdog
    def say(text): raise OSError("disk full")
    watchdog.write_atomic = lambda *_: say("")
    watchdog.Watchdog._write_stacks = lambda *_: say("")
    dog._on_verdict = say
    threading.Event().wait(20)
    """
    code, said = run_ranks(tmp_path, body.strip(), seconds=2)
    assert code == EXIT_STALLED, said
    assert "watchdog, rank 0: no rank got on for" in said and "disk full" in said


@pytest.mark.parametrize("found", [False, True])
def test_a_rank_that_has_left_ends_nothing(tmp_path, found, monkeypatch):
    dog = watchdog(tmp_path, world=1)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the process was ended"))
    monkeypatch.setattr(dog, "_judge", lambda now: "no rank got on")
    if found:
        (tmp_path / "verdict.json").write_text('{"text": "", "dumps": 0}')
    dog._stop.set()
    dog._look()
    assert (tmp_path / "verdict.json").exists() == found and not (tmp_path / "stacks").exists()


def test_a_disk_that_stays_read_only_is_told_once_and_the_run_goes_on(tmp_path, caplog):
    own = watchdog(tmp_path, world=1)
    own._interval = 0.02
    with own:
        with mock.patch.object(os, "open", side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS), "/x")):
            time.sleep(0.3)
        assert [record.message for record in caplog.records] == [
            "watchdog: no sign of rank 0 while this lasts: [Errno 30] Read-only file system: '/x'"
        ]
        before = json.loads((tmp_path / "rank_0.json").read_text())["number"]
        time.sleep(0.3)
        with mock.patch.object(os, "open", side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS), "/x")):
            time.sleep(0.3)
        assert len(caplog.records) == 2, "another time of it is told too"
    assert json.loads((tmp_path / "rank_0.json").read_text())["number"] > before + 1


def test_a_new_start_does_not_see_the_verdict_of_the_last(tmp_path):
    watch = tmp_path / "watch"
    prepare_directory(watch)
    (watch / "verdict.json").write_text("{}")
    (watch / "rank_0.json").write_text("{}")
    prepare_directory(watch)
    assert [path.name for path in watch.iterdir()] == ["earlier"]
    assert sorted(path.name for path in (watch / "earlier").iterdir()) == ["rank_0.json", "verdict.json"]


@pytest.mark.parametrize("own", [None, "50000"])
def test_the_flight_recorder_is_on_and_writes_into_the_run(tmp_path, monkeypatch, own):
    """Unless somebody has said otherwise, under torch's new name or its old one."""
    monkeypatch.setattr(os, "environ", {} if own is None else {"TORCH_NCCL_TRACE_BUFFER_SIZE": own})
    record_collectives(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == (own or "2000") and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl_trace_rank_"


def test_the_file_of_a_rank_is_readable_at_any_time(tmp_path):
    """It is written over in place, with another length of text each time."""
    dog, limit, lengths = watchdog(tmp_path), time.monotonic() + 0.3, set()
    while time.monotonic() < limit:
        dog._number = max(1, dog._number * 10 % 10**12)
        dog._beat()
        lengths.add(len((tmp_path / "rank_0.json").read_bytes()))
        assert json.loads((tmp_path / "rank_0.json").read_text())["number"] == dog._number
    assert lengths == {1024}


def test_a_debugger_that_is_cut_off_leaves_the_process_running(tmp_path):
    """A gdb that was killed in the middle leaves what it looked at stopped: here the process that asked."""
    gdb = tmp_path / "gdb"
    gdb.write_text('#!/bin/sh\nkill -STOP "$2"\nsleep 60\n')
    gdb.chmod(0o755)
    asks = "import os; from r1mega.platform.stacks import native_stacks; print(native_stacks(os.getpid(), seconds=1))"
    done = subprocess.run(
        [sys.executable, "-c", asks], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0 and "native stacks by gdb" in done.stdout, done.stderr
