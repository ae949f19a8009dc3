"""Parts of a reward that are not r1mega's own: `reward.custom` names a class, which is loaded and watched here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from r1mega.config.named import load_named
from r1mega.config.rewards import CustomReward
from r1mega.errors import ConfigError, RewardError
from r1mega.reward.parts import Deferred, Part, PartScore, ScoringItem, Waiting
from r1mega.types import RewardStatus

T = TypeVar("T")


def load_part(name: str, section: CustomReward) -> WatchedPart:
    """The part of `reward.custom.NAME`. ConfigError for one that is not there, cannot be made or is no part."""
    where = f"reward.custom.{name}.part = {section.part}"
    part_class = load_named(section.part, where)
    try:
        made = part_class(**section.settings)
    except Exception as error:  # whatever the class raises: it is not ours
        raise ConfigError(
            f"{where}: cannot be made with reward.custom.{name}.settings = {section.settings}: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(made, "score", None)):
        raise ConfigError(f"{where} has no method score(item); see r1mega.reward.parts.Part")
    return WatchedPart(name, made)


class WatchedPart:
    """Passes on what the part says, now or later, if it is a score; else RewardError, with the part's name and the prompt."""

    def __init__(self, name: str, part: Part) -> None:
        self.name, self._part = name, part

    def score(self, item: ScoringItem) -> PartScore | Deferred | Waiting:
        where = f"reward part {self.name!r}, prompt {item.prompt.id}"
        score = _told(lambda: self._part.score(item), where)
        if isinstance(score, Deferred):
            return Deferred(score.task, lambda outcome: _checked(lambda: score.finish(outcome), where))
        if not isinstance(score, PartScore) and callable(getattr(score, "result", None)):
            return _Later(score, where)
        return _checked(lambda: score, where)

    @property
    def waits_for_flush(self) -> bool:
        """Whether some score may want `flush` first."""
        return hasattr(self._part, "flush")

    def flush(self) -> None:
        _told(getattr(self._part, "flush", lambda: None), f"reward part {self.name!r}")

    def close(self) -> None:
        _told(getattr(self._part, "close", lambda: None), f"reward part {self.name!r}")


class _Later:
    """A score that is on its way, and looked at when it is there."""

    def __init__(self, waiting: Waiting, where: str) -> None:
        self._waiting, self._where = waiting, where
        if isinstance(waiting, Future):
            self.add_done_callback = waiting.add_done_callback

    def result(self) -> PartScore:
        return _checked(self._waiting.result, self._where)


def _told(call: Callable[[], T], where: str) -> T:
    """What the part's own code gives. It may raise anything."""
    try:
        return call()
    except Exception as error:
        raise RewardError(f"{where}: {type(error).__name__}: {error}") from error


def _checked(make: Callable[[], object], where: str) -> PartScore:
    """A score with a plain, finite number: one infinite value would become every advantage of its group."""
    score = _told(make, where)
    if not isinstance(score, PartScore):
        raise RewardError(f"{where}: {score!r} is no score; give a PartScore, a Deferred, or what has result()")
    if (score.value is None) != (score.status != RewardStatus.OK):
        raise RewardError(f"{where}: value {score.value} with status {score.status}; only status OK has a value")
    given = score.value
    if given is None:
        return score
    value = _told(lambda: float(given), where)
    if not math.isfinite(value):
        raise RewardError(f"{where}: value {value}; give a finite one, or status FAILED to leave the response out")
    return dataclasses.replace(score, value=value)
