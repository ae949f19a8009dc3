"""When a job starts again by itself: something new to go on from, nobody to ask, and not too often."""

from __future__ import annotations

import json
import os
import signal
import threading
from types import SimpleNamespace
from unittest import mock

import pytest

from r1mega import cli
from r1mega.config.schema import RestartConfig
from r1mega.observe.restarts import HOUR, main, newest_checkpoint, seconds_until_restart

CONFIG = RestartConfig(per_hour=3, backoff_seconds=10)


def checkpoint(run_dir, step, whole=True):
    directory = run_dir / f"checkpoints/step_{step:06d}"
    directory.mkdir(parents=True)
    if whole:
        (directory / "manifest.json").write_text("{}")


def started(run_dir, step):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "environment.json").write_text(json.dumps({"starts": [{"step": 0}, {"step": step}]}))


@pytest.mark.parametrize("code", [1, 10, 137, 139])
def test_a_rank_that_died_is_started_again(tmp_path, code):
    checkpoint(tmp_path, 6)
    started(tmp_path, 4)
    assert seconds_until_restart(tmp_path, code, CONFIG) == 10
    (line,) = map(json.loads, (tmp_path / "restarts.jsonl").read_text().splitlines())
    assert (line["step"], line["code"]) == (6, code)


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 85, 130, 143])
def test_what_a_person_must_answer_stays_ended(tmp_path, code):
    checkpoint(tmp_path, 6)
    started(tmp_path, 4)
    assert seconds_until_restart(tmp_path, code, CONFIG) is None
    assert not (tmp_path / "restarts.jsonl").exists()


def test_without_a_newer_checkpoint_it_stays_ended(tmp_path):
    assert seconds_until_restart(tmp_path, 137, CONFIG) is None
    checkpoint(tmp_path, 6)
    checkpoint(tmp_path, 8, whole=False)
    assert newest_checkpoint(tmp_path) == 6
    started(tmp_path, 6)
    assert seconds_until_restart(tmp_path, 137, CONFIG) is None


def test_a_start_that_ended_before_it_said_where_from_counts(tmp_path):
    checkpoint(tmp_path, 6)
    started(tmp_path, 4)
    assert seconds_until_restart(tmp_path, 137, CONFIG) == 10
    assert seconds_until_restart(tmp_path, 137, CONFIG) is None  # the same checkpoint again


def test_so_many_times_an_hour_each_later_than_the_one_before(tmp_path):
    now, waits = 1000.0, []
    for step in range(1, 6):
        checkpoint(tmp_path, step)
        waits.append(seconds_until_restart(tmp_path, 137, CONFIG, clock=lambda: now))  # noqa: B023
        now += HOUR / 10
    assert waits == [10, 20, 40, None, None]
    now = 1000.0 + HOUR + 1  # the first is an hour ago
    assert seconds_until_restart(tmp_path, 137, CONFIG, clock=lambda: now) == 40


def test_a_clock_that_was_set_back_keeps_no_run_down(tmp_path):
    checkpoint(tmp_path, 3)
    lines = ({"step": step, "time": 10_000_000.0, "code": 137} for step in (0, 1, 2))
    (tmp_path / "restarts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert seconds_until_restart(tmp_path, 137, CONFIG, clock=lambda: 10_000_000.0 - 7200) == 10
    (tmp_path / "restarts.jsonl").write_text(json.dumps({"step": 2, "time": 10_000_000.0, "code": 137}) + "\n")
    assert seconds_until_restart(tmp_path, 137, CONFIG, clock=lambda: 10_000_000.0 - 60) == 20, (
        "of this hour all the same"
    )


def test_a_record_that_cannot_be_read_or_written_costs_the_restart_alone(tmp_path, capsys):
    checkpoint(tmp_path, 6)
    (tmp_path / "restarts.jsonl").mkdir()
    assert seconds_until_restart(tmp_path, 137, CONFIG) is None
    assert "exit code 137, and no start by itself: " in capsys.readouterr().err


def test_what_was_asked_to_stop_is_not_started_again(tmp_path, own_signals):
    def run(arguments, ranks, asked):
        checkpoint(tmp_path, 6)
        asked.set()
        return 137

    assert launch(tmp_path, run, backoff=0) == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_asked_to_stop_while_it_waits(tmp_path, number):
    def run(arguments, ranks, asked):
        checkpoint(tmp_path, 6)
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        return 137

    child = os.fork()
    if not child:
        launch(tmp_path, run, backoff=60)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 85


@pytest.fixture
def own_signals():
    """The launcher's handlers end the process: not this one, afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def launch(run_dir, run, backoff):
    loaded = SimpleNamespace(run_dir=run_dir, restart=RestartConfig(backoff_seconds=backoff))

    def checked_run(arguments, ranks, asked):
        validate.assert_called_once_with(loaded, ranks)  # config and data are looked at once, before any rank starts
        scan_data.assert_called_once_with(loaded)
        return run(arguments, ranks, asked)

    with (
        mock.patch("r1mega.config.load.load_config", lambda path, overrides: loaded),
        mock.patch("r1mega.config.validate.validate") as validate,
        mock.patch("r1mega.data.prompts.scan_data") as scan_data,
        mock.patch("r1mega.platform.local_ranks.run_ranks", checked_run),
    ):
        return cli._train_on_ranks("x.yaml", [], 2)


def test_the_launcher_does_so(tmp_path, capsys, own_signals):
    """Two deaths, each after a new checkpoint, then the end: three runs of the ranks."""
    codes = iter([137, 134, 0])

    def run(arguments, ranks, asked):
        assert arguments == ["-m", "r1mega", "train", "x.yaml"] and ranks == 2
        code = next(codes)
        if code:
            checkpoint(tmp_path, 140 - code)
        return code

    assert launch(tmp_path, run, backoff=0) == 0
    assert capsys.readouterr().err.count("starting again in 0 s") == 2


@pytest.mark.parametrize(("code", "hourly", "said"), [(137, 3, "10"), (137, 0, ""), (2, 3, "")])
def test_asked_by_the_launch_scripts(tmp_path, capsys, code, hourly, said):
    """By the run's own config; without a code, whether anything was kept since the last start."""
    (tmp_path / "config.yaml").write_text(f"restart: {{per_hour: {hourly}, backoff_seconds: 10}}\n")
    assert main([str(tmp_path)]) == 1
    checkpoint(tmp_path, 6)
    started(tmp_path, 4)
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), str(code)]) == int(not said)
    assert capsys.readouterr().out.strip() == said
    started(tmp_path, 6)
    assert main([str(tmp_path)]) == 1


def test_asked_about_a_directory_that_is_no_run(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "137"]) == 1
    assert "no start by itself: " in capsys.readouterr().err
