"""From one memory phase of an RL run to the next: the generator and the trainer, by one plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from r1mega.train.phases import Phase, PhasePlan


class Sleeper(Protocol):
    """What a phase asks of a `GenerationEngine`."""

    def sleep(self, *, keep_weights: bool = True) -> None: ...
    def wake_up(self) -> None: ...


class Mover(Protocol):
    """What a phase asks of a `train.trainer.Trainer`."""

    def enter(self, phase: Phase) -> None: ...


class Phases:
    """Moves a trainer and a generator of one run. What leaves the device leaves before anything comes."""

    def __init__(self, plan: PhasePlan, trainer: Mover, engine: Sleeper):
        """engine: awake, as it was built."""
        self._plan, self._trainer, self._engine = plan, trainer, engine
        self._present: Phase = "rollout"
        self.generator_has_weights = True
        """False from when they were dropped until `weights_arrived`."""

    def enter(self, phase: Phase) -> None:
        """Everything to where the plan wants it in `phase`. A generator that lost its weights gets them by a push in
        `reshard`, and does not wake before.
        """
        self._present = phase
        places = self._plan.places[phase]
        if places["kv_cache"] == "dropped":
            keep = places["generator_weights"] == "host"
            self._engine.sleep(keep_weights=keep)
            self.generator_has_weights &= keep
        self._trainer.enter(phase)
        if places["kv_cache"] == "device" and self.generator_has_weights:
            self._engine.wake_up()

    def weights_arrived(self) -> None:
        """The push of a `reshard` is over: what is next is `rollout`."""
        self.generator_has_weights = True
        self.enter("rollout")

    @contextlib.contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Inside, this phase (`score`: the device is for reward models, the generator keeps its weights; `evaluate`); then
        again the one that was before.
        """
        before = self._present
        self.enter(phase)
        yield
        self.enter(before)
