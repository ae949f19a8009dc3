"""Several ranks on this machine: their variables, the exit code of the one that fails, and signals that let them save."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1mega.platform import launcher
from r1mega.platform.launcher import LAZY_FROM, adopt_launcher_environment, raise_open_files
from r1mega.platform.signals import SECONDS_APART

pytestmark = pytest.mark.heavy

START = "import sys; from r1mega.platform.local_ranks import run_ranks; sys.exit(run_ranks(sys.argv[1:3], 2))"
RANK = """
import os, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else None
rank = os.environ["RANK"]
{}
"""


def start(tmp_path, body):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(body))
    return subprocess.Popen([sys.executable, "-c", START, script, tmp_path], stderr=subprocess.PIPE, text=True)


def test_ranks_know_their_place_and_the_failing_one_gives_the_exit_code(tmp_path):
    body = """
(place / rank).write_text(" ".join(os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
if rank == "1":
    while not (place / "0").exists() or not (place / "0").read_text(): time.sleep(0.05)
    sys.exit(5)
time.sleep(60)
"""
    process = start(tmp_path, body)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 5 and "rank 1 of 2" in errors and "exit code 5" in errors
    assert len(errors.splitlines()) == 1, f"torch's own lines beside ours:\n{errors}"
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 2 2", "1 2 2"]


@pytest.mark.parametrize(
    ("limits", "expected", "set_to"),
    [
        ((1024, 4096), 4096, (4096, 4096)),
        ((1024, 1 << 30), 65536, (65536, 1 << 30)),
        ((1024, resource.RLIM_INFINITY), 65536, (65536, resource.RLIM_INFINITY)),
        ((1 << 20, 1 << 30), 1 << 20, None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), sys.maxsize, None),
    ],
)
def test_open_files(monkeypatch, limits, expected, set_to):
    found = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: found.append(given))
    assert raise_open_files() == expected
    assert found == ([] if set_to is None else [set_to])


def test_a_killed_rank_is_named(tmp_path):
    process = start(tmp_path, 'time.sleep(60) if rank == "1" else os.kill(os.getpid(), signal.SIGKILL)')
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 137 and "rank 0 of 2" in errors and "SIGKILL" in errors


def test_sigterm_reaches_every_rank_as_a_request_to_save(tmp_path):
    body = """
asked = []
signal.signal(signal.SIGUSR2, lambda *_: asked.append(1))
(place / f"ready{rank}").touch()
while not asked: time.sleep(0.05)
time.sleep(1.0 + int(rank))  # the other one ends while this one saves
(place / f"saved{rank}").touch()
sys.exit(85)
"""
    process = start(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)" + body)
    limit = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in "01") and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 85
    assert all((tmp_path / f"saved{rank}").exists() for rank in "01")


def test_after_the_watchdog_what_is_stopped_is_killed(tmp_path):
    """After ten seconds; torch's elastic agent would do it after 30."""
    body = """
if rank == "1":
    (place / "pid").write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
while not (place / "pid").exists() or not (place / "pid").read_text(): time.sleep(0.05)
time.sleep(1)
(place / "ended").touch()
os.kill(int(os.environ["R1MEGA_LAUNCHER"]), signal.SIGUSR1)
os._exit(12)
"""
    process, limit = start(tmp_path, body), time.monotonic() + 100
    while not (tmp_path / "ended").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    while Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert time.time() - (tmp_path / "ended").stat().st_mtime < 25
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 12 and "the watchdog ended the 2 ranks" in errors


def test_a_second_sigterm_ends_at_once_but_not_one_that_comes_with_the_first(tmp_path):
    body = """
signal.signal(signal.SIGUSR2, lambda *_: (place / f"asked{rank}").touch())
(place / f"ready{rank}").touch()
time.sleep(600)
"""
    process = start(tmp_path, body)
    limit = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in "01") and time.monotonic() < limit:
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    time.sleep(SECONDS_APART)
    assert process.poll() is None
    assert all((tmp_path / f"asked{rank}").exists() for rank in "01")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.parametrize(
    ("size", "before", "after"), [(LAZY_FROM - 1, None, None), (LAZY_FROM, None, "1"), (LAZY_FROM, "0", "0")]
)
def test_gloo_connects_lazily_in_a_large_job(monkeypatch, size, before, after):
    name = "TORCH_GLOO_LAZY_INIT"
    monkeypatch.setenv(name, before or "")  # known to monkeypatch, which takes back what is set from here on
    if before is None:
        monkeypatch.delenv(name)
    for variable, value in (("RANK", 0), ("WORLD_SIZE", size), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        monkeypatch.setenv(variable, str(value))
    raised = []
    monkeypatch.setattr(launcher, "raise_open_files", lambda: raised.append(True))
    adopt_launcher_environment()
    assert os.environ.get(name) == after
    assert raised, "each start raises its limit of open files, whatever the job's size"
