"""Parts of a reward that are not r1mega's own: `reward.custom` names a class, which is loaded and watched here."""

from __future__ import annotations

import importlib
import math

from r1mega.config.rewards import CustomReward
from r1mega.errors import ConfigError, RewardError
from r1mega.reward.parts import Deferred, Part, PartScore, ScoringItem, Waiting
from r1mega.types import RewardStatus


def load_part(name: str, section: CustomReward) -> WatchedPart:
    """The part of `reward.custom.NAME`. ConfigError for one that is not there, cannot be made or is no part."""
    where = f"reward.custom.{name}.part = {section.part}"
    module, _, attribute = section.part.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)(**section.settings)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{where}: {error}; install its package into this Python, or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:  # whatever the module or the class raises: it is not ours
        raise ConfigError(
            f"{where}: cannot be made with reward.custom.{name}.settings = {section.settings}: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(made, "score", None)):
        raise ConfigError(f"{where} has no method score(item); see r1mega.reward.parts.Part")
    return WatchedPart(name, made)


class WatchedPart:
    """Passes on what the part says, if it is a score; else RewardError, with the part's name and the prompt."""

    def __init__(self, name: str, part: Part) -> None:
        self.name, self._part = name, part

    def score(self, item: ScoringItem) -> PartScore | Deferred | Waiting:
        where = f"reward part {self.name!r}, prompt {item.prompt.id}"
        try:
            score = self._part.score(item)
        except Exception as error:
            raise RewardError(f"{where}: {type(error).__name__}: {error}") from error
        if isinstance(score, PartScore):
            return _finite(score, where)
        if isinstance(score, Deferred):
            return Deferred(score.task, lambda outcome: _finite(score.finish(outcome), where))
        if not callable(getattr(score, "result", None)):
            raise RewardError(f"{where}: score() gave {score!r}; it must be a PartScore, a Deferred or have result()")
        return score

    def flush(self) -> None:
        if (flush := getattr(self._part, "flush", None)) is not None:
            flush()

    def close(self) -> None:
        if (close := getattr(self._part, "close", None)) is not None:
            close()


def _finite(score: PartScore, where: str) -> PartScore:
    """One infinite value would become every advantage of its group."""
    if (score.value is None) != (score.status != RewardStatus.OK):
        raise RewardError(f"{where}: value {score.value} with status {score.status}; only status OK has a value")
    if score.value is not None and not math.isfinite(score.value):
        raise RewardError(
            f"{where}: value {score.value}; give a finite one, or status FAILED to leave the response out"
        )
    return score
