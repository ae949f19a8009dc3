"""`tools/soak.py` in small: four faults in one run, one after the other, and the metrics, samples and weights of a run without."""

import random

import pytest

from tests.processes import start
from tools import soak

pytestmark = pytest.mark.slow
NAMES = ["kill", "full", "damage", "worker"]


def start_fork(arguments, log):
    with open(log, "ab") as output:
        return start(*arguments, output=output)


def test_a_run_that_is_hurt_equals_one_that_is_not(nano_base, tmp_path, capsys):
    chance = random.Random(random.SystemRandom().randrange(1000))
    hurt = soak.Soak(tmp_path, soak.run_arguments(nano_base, 1), start_fork, chance, ranks=1)
    last = soak.soak(hurt, soak.draw(NAMES, 1, chance), 0.2, lambda: len(hurt.outcomes) < len(NAMES))
    equal = soak.compare(hurt, last)
    said = capsys.readouterr().out
    assert equal and "4 faults" in said, said
    assert sorted(outcome.fault.name for outcome in hurt.outcomes) == sorted(NAMES)
    lost = {outcome.fault.name: outcome.lost for outcome in hurt.outcomes}
    assert lost["worker"] == 0 and lost["kill"] <= 2 and 0 < lost["damage"] <= 4, said


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
