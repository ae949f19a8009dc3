"""What a part of a reward gets and gives. A part is a small class with one method, `score`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

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


class Part(Protocol):
    """name: key in `Reward.parts`."""

    name: str

    def score(self, item: ScoringItem) -> PartScore | Deferred | Future[PartScore]: ...
