"""`tools/soak.py` in small: four faults in one run, one after the other, and the metrics, samples and weights of a run without."""

import os
import random
import signal
import subprocess
import sys

import pytest

from tests.processes import start
from tools import soak

soak_faults = sys.modules[soak.Soak.__module__]

pytestmark = pytest.mark.slow
NAMES = ["kill", "full", "damage", "worker"]


def start_fork(arguments, log):
    with open(log, "ab") as output:
        return start(*arguments, output=output)


def test_a_run_that_is_hurt_equals_one_that_is_not(nano_base, tmp_path, capsys):
    seed = random.SystemRandom().randrange(1000)
    chance = random.Random(seed)
    print(f"seed {seed}")
    hurt = soak.Soak(tmp_path, soak.run_arguments(nano_base, 1), start_fork, chance, ranks=1)
    last = soak.soak(hurt, soak.draw(NAMES, 1, chance), 0.2, lambda: len(hurt.outcomes) < len(NAMES))
    equal = soak.compare(hurt, last)
    said = capsys.readouterr().out
    assert equal and "4 faults" in said, said
    assert sorted(outcome.fault.name for outcome in hurt.outcomes) == sorted(NAMES), said
    lost = {outcome.fault.name: outcome.lost for outcome in hurt.outcomes}
    assert lost["worker"] == 0 and lost["kill"] <= 2 and 0 < lost["damage"] <= 4, said


def a_soak(directory, process=None):
    hurt = soak.Soak(directory, [], lambda arguments, log: process, random.Random(1), ranks=1)
    hurt.process = process
    return hurt


def test_it_refuses_to_do_nothing(tmp_path, monkeypatch):
    with pytest.raises(soak.SoakError, match="stop can be inflicted on 1 rank"):
        soak.draw(["stop"], 1, random.Random(1))
    monkeypatch.setattr(soak.Soak, "goes_on", lambda *_: None)
    with pytest.raises(soak.SoakError, match="before the first fault"):
        soak.soak(a_soak(tmp_path), soak.draw([], 1, random.Random(1)), 1, lambda: False)


def test_a_fault_that_does_nothing_is_no_fault(tmp_path, monkeypatch):
    """No worker to kill; and one after which the run was to go on, but began again."""
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            hurt = a_soak(tmp_path, process)
            (tmp_path / "run/watch").mkdir(parents=True)
            (tmp_path / "run/watch/rank_0.json").write_text(f'{{"pid": {process.pid}}}')
            with pytest.raises(soak.SoakError, match="has no workers to kill"):
                soak_faults.kill_worker(hurt)
            monkeypatch.setattr(soak.Soak, "goes_on", lambda *_: None)
            starts = iter([[], [{"step": 2}]])
            monkeypatch.setattr(soak.Soak, "starts", lambda _: next(starts))
            with pytest.raises(soak.SoakError, match="1 new starts"):
                hurt.suffer(soak.Fault("none", "nothing", lambda _: None))
        finally:
            process.kill()


def test_what_has_ended_gets_no_signal(tmp_path, monkeypatch):
    """Its number may be another process's."""
    process = subprocess.Popen(["true"])
    process.wait()
    hurt = a_soak(tmp_path, process)
    (tmp_path / "run/watch").mkdir(parents=True)
    (tmp_path / "run/watch/rank_0.json").write_text(f'{{"pid": {os.getpid()}}}')
    monkeypatch.setattr(soak_faults, "send", lambda *sent: pytest.fail(f"sent {sent}"))
    hurt.kill()
    hurt.signal(signal.SIGTERM)
    with pytest.raises(soak.SoakError, match="is not one of this run"):
        soak_faults.kill_rank(hurt)


def test_what_differs_is_told(tmp_path):
    for name, value in (("one", 1.0), ("other", 2.0)):
        (tmp_path / name / "hf").mkdir(parents=True)
        line = f'{{"step": 1, "time/step_seconds": {value}}}\n{{"step": 2, "reward/mean": {value}}}\n'
        (tmp_path / name / "metrics.jsonl").write_text(line)
        (tmp_path / name / "samples.jsonl").write_text("same")
        (tmp_path / name / "hf/model.safetensors").write_text(str(value))
    one = tmp_path / "one"
    assert soak.differences(one, one) == []
    assert soak.differences(one, tmp_path / "other") == ["metrics of step 2: reward/mean", "hf/model.safetensors"]
