"""The plan of memory phases, and a generator and a trainer that are moved by it."""

import subprocess
import sys

import pytest

from r1mega.config.schema import MemoryConfig
from r1mega.stages.phases import Phases
from r1mega.train.phases import PARTS, PHASES, pinned_bytes, plan_phases

ALL = MemoryConfig(grad_offload=True, optimizer_offload="rollout", param_offload=True, reference_swap=True)
SIZES = {part: 10**place for place, part in enumerate(PARTS)}  # a sum shows by its digits what is in it


def test_table():
    assert str(plan_phases(ALL)).splitlines() == [
        "phase      weights  gradients  main_params  exp_avg  exp_avg_sq  reference  generator_weights  kv_cache",
        "rollout    host     dropped    host         host     host        host       device             device",
        "score      host     dropped    host         host     host        host       host               dropped",
        "evaluate   host     dropped    host         host     host        host       device             device",
        "logprob    device   dropped    host         host     host        host       dropped            dropped",
        "reference  host     dropped    host         host     host        device     dropped            dropped",
        "update     device   device     device       device   device      host       dropped            dropped",
        "step       device   device     device       device   device      host       dropped            dropped",
        "reshard    device   dropped    host         host     host        host       device             dropped",
        "save       device   dropped    device       device   device      host       dropped            dropped",
    ]


def test_bytes_are_sums_over_the_places():
    plan = plan_phases(ALL)
    assert plan.device_bytes("rollout", SIZES) == 11_000_000
    assert plan.device_bytes("update", SIZES) == 11_111
    assert plan.host_bytes("update", SIZES) == 111_101  # what is pinned is kept
    nothing = plan_phases(MemoryConfig())
    assert nothing.device_bytes("rollout", SIZES) == 11_011_111
    assert nothing.host_bytes("score", SIZES) == 1_100_000
    awake = plan_phases(MemoryConfig(), sleep=False)
    assert {awake.device_bytes(phase, SIZES) for phase in PHASES} == {11_011_111, 11_111_111}


@pytest.mark.parametrize(
    ("key", "frees"),
    [
        ({"grad_offload": True}, {p: 10 for p in PHASES if p not in ("update", "step")}),
        ({"optimizer_offload": "rollout"}, {p: 11_100 for p in PHASES if p not in ("update", "step", "save")}),
        ({"optimizer_offload": "update"}, {p: 11_100 for p in PHASES if p not in ("step", "save")}),
        ({"param_offload": True}, dict.fromkeys(("rollout", "score", "evaluate"), 1)),
        ({"reference_swap": True}, {"reference": 1}),
    ],
)
def test_each_key_frees_its_part_in_its_phases(key, frees):
    plain, plan = plan_phases(MemoryConfig()), plan_phases(MemoryConfig(**key))
    for phase in PHASES:
        assert plain.device_bytes(phase, SIZES) - plan.device_bytes(phase, SIZES) == frees.get(phase, 0), phase


def test_pinned_memory_is_a_power_of_two():
    assert [pinned_bytes(size) for size in (0, 1, 2, 3, 4, 5, 2**20, 2**20 + 1)] == [0, 1, 2, 4, 4, 8, 2**20, 2**21]


def test_a_plan_needs_no_torch():
    code = "import sys; import r1mega.train.phases; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class Recorder:
    """Trainer and engine in one: the order in which they are told."""

    def __init__(self):
        self.calls = []

    def enter(self, phase):
        self.calls.append(phase)

    def sleep(self, *, keep_weights=True):
        self.calls.append("sleep" if keep_weights else "drop")

    def wake_up(self):
        self.calls.append("wake")


def moved(sleep=True):
    both = Recorder()
    return Phases(plan_phases(ALL, sleep=sleep), both, both), both.calls


def test_the_generator_leaves_before_the_trainer_comes_and_wakes_after_it_left():
    phases, calls = moved()
    with phases.within("score"):
        assert calls == ["sleep", "score"]
    phases.enter("logprob")
    phases.enter("reshard")
    phases.weights_arrived()
    assert calls == ["sleep", "score", "rollout", "wake", "drop", "logprob", "drop", "reshard", "rollout", "wake"]


def test_scoring_within_an_evaluation_goes_back_to_it():
    phases, calls = moved()
    with phases.within("evaluate"):
        with phases.within("score"):
            pass
        assert calls == ["evaluate", "wake", "sleep", "score", "evaluate", "wake"]
    assert calls[-2:] == ["rollout", "wake"]


def test_a_generator_whose_weights_were_dropped_does_not_wake_before_a_push():
    phases, calls = moved()
    phases.enter("save")
    assert not phases.generator_has_weights
    phases.enter("rollout")
    assert calls == ["drop", "save", "rollout"]
    phases.weights_arrived()
    assert phases.generator_has_weights
    assert calls[-2:] == ["rollout", "wake"]


def test_without_sleep_the_generator_is_left_alone():
    phases, calls = moved(sleep=False)
    for phase in PHASES:
        phases.enter(phase)
    assert "sleep" not in calls and "drop" not in calls
    assert phases.generator_has_weights
