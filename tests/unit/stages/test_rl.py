"""The loop of an RL run around stand-ins for its parts."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

from r1mega.stages import rl


class Groups(list):
    """Of a step; a list that can be watched."""


class Trainer:
    """Notes in each step whether what the one before sampled is still there."""

    found: tuple[bool, ...] = ()

    def __init__(self, *_):
        self.start = 0
        self.engine = self.tokenizer = self.scorer = self.sampling = self.policy = self.hf_config = None
        self.phases = self.trainer = SimpleNamespace(enter=lambda _: None)
        self.timer = SimpleNamespace(finish_step=lambda: {"time/rollout_seconds": 1.0, "time/update_seconds": 1.0})
        self.progress, self.close = dict, lambda: None
        self.before = lambda: None

    def step(self, step):
        Trainer.found += (self.before() is not None,)
        groups = Groups([step])
        self.before = weakref.ref(groups)
        return {"tokens/rollout": 1.0, "tokens/update": 1.0}, groups


def test_what_a_step_sampled_is_gone_when_the_next_begins(monkeypatch):
    """The planner counts the host memory of one step's samples."""
    written = []
    evaluation = SimpleNamespace(run=lambda _: {}, is_due=lambda _: False, summary=dict)
    runtime = SimpleNamespace(
        run_dir=Path("unused"), rank=0, steps=lambda *_, **__: range(1, 4), write_metrics=lambda *_: None,
        write_samples=lambda step, groups: written.append((step, *groups)), export=lambda *_, **__: "hf", finished=len,
    )  # fmt: skip
    config = SimpleNamespace(steps=3, model=SimpleNamespace(path=Path("unused")))
    monkeypatch.setattr(rl, "RLTrainer", Trainer)
    monkeypatch.setattr(rl, "Evaluation", lambda *_: evaluation)
    rl.run(config, runtime)
    assert written == [(1, 1), (2, 2), (3, 3)]
    assert Trainer.found == (False, False, False)
