"""What a part of a reward gets and gives. A part is a small class with one method, `score`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from r1mega.errors import RewardError
from r1mega.reward.pool import Outcome, Task
from r1mega.types import Prompt, Response, RewardStatus


@dataclass(frozen=True, slots=True)
class ScoringItem:
    """One response to score: its prompt, its tokens and its text."""

    prompt: Prompt
    response: Response
    text: str


@dataclass(frozen=True, slots=True)
class PartScore:
    """value: unweighted, None unless status is OK. reason: for a person."""

    value: float | None
    reason: str = ""
    status: RewardStatus = RewardStatus.OK


@dataclass(frozen=True, slots=True)
class Deferred:
    """A score that needs a worker: the task, and what its outcome means."""

    task: Task
    finish: Callable[[Outcome], PartScore]


class Waiting(Protocol):
    """A score that is on its way: a future, or a place in a batch."""

    def result(self) -> PartScore: ...


class Part(Protocol):
    """name: key in `Reward.parts`. A part that holds threads or a model also has `close()`."""

    @property
    def name(self) -> str: ...

    def score(self, item: ScoringItem) -> PartScore | Deferred | Waiting:
        """The score of one response, or what will give it. RewardError for a prompt that this part cannot score."""
        ...


class Batch:
    """Items that are scored together, once the first of their results is asked for: all that wait by then.

    Where that is after the last of them was submitted (a rollout with one generator, without partial rollouts that read rewards
    early), which items share a batch follows from what was sampled. Otherwise speeds have a say in it, and a score that is
    rounded by its batch differs by so much.
    """

    def __init__(self, score: Callable[[Sequence[ScoringItem]], Sequence[PartScore]], collective: bool = False) -> None:
        """collective: all ranks score together, so `flush` is to be called on each of them, with or without items."""
        self._score, self.collective = score, collective
        self._waiting: list[_InBatch] = []

    def add(self, item: ScoringItem) -> Waiting:
        place = _InBatch(self, item)
        self._waiting.append(place)
        return place

    def flush(self) -> None:
        """Score all that wait."""
        waiting, self._waiting = self._waiting, []
        for place, score in zip(waiting, self._score([place.item for place in waiting]), strict=True):
            place.score = score


@dataclass(slots=True)
class _InBatch:
    batch: Batch
    item: ScoringItem
    score: PartScore | None = None

    def result(self) -> PartScore:
        if self.score is None:
            if self.batch.collective:
                raise RewardError("a reward model that is sharded over ranks scores in flush(), which was not called")
            self.batch.flush()
        if self.score is None:
            raise RewardError("the batch of this response could not be scored")
        return self.score
