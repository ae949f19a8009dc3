"""Reward of a response = weighted sum of parts, by the config. Scoring starts as each response is submitted."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from r1mega.config.schema import RewardConfig
from r1mega.errors import RewardError
from r1mega.reward.format import check_format
from r1mega.reward.language import LanguageConsistency
from r1mega.reward.length import Overlong, Repetition
from r1mega.reward.parts import Deferred, Part, PartScore, ScoringItem
from r1mega.reward.pool import Outcome, PoolMetrics, WorkerPool
from r1mega.types import Prompt, Response, Reward, RewardStatus

ACCURACY = {
    "math": "r1mega.reward.math:MathAccuracy",
    "choice": "r1mega.reward.choice:ChoiceAccuracy",
    "logic": "r1mega.reward.choice:ChoiceAccuracy",
    "reasoning_gym": "r1mega.reward.choice:ReasoningGymAccuracy",
    "instruction": "r1mega.reward.instruction:InstructionAccuracy",
    "code": "r1mega.reward.code_accuracy:CodeAccuracy",
}
"""Accuracy part by the prompt's kind. Each is imported when the first prompt of its kind is scored."""


@dataclass(frozen=True, slots=True)
class Format:
    """`<think>...</think><answer>...</answer>`, once each."""

    mode: str = "strict"
    prompt_opens_think: bool = False
    name: str = "format"

    def score(self, item: ScoringItem) -> PartScore:
        verdict = check_format(item.text, self.mode, self.prompt_opens_think)
        return PartScore(verdict.value, "; ".join(verdict.problems) or "well formed")


class Accuracy:
    """Sends each prompt to the scorer of its kind."""

    name = "accuracy"

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._by_kind: dict[str, Part] = {}

    def score(self, item: ScoringItem) -> PartScore | Deferred | Future[PartScore]:
        kind = item.prompt.kind
        if kind not in self._by_kind:
            if kind not in ACCURACY:
                raise RewardError(
                    f"prompt {item.prompt.id}: no accuracy reward for kind {kind!r}; known: {', '.join(ACCURACY)}"
                )
            module, _, name = ACCURACY[kind].partition(":")
            self._by_kind[kind] = getattr(importlib.import_module(module), name)(timeout_seconds=self._timeout_seconds)
        return self._by_kind[kind].score(item)


def weighted_parts(config: RewardConfig, max_response_tokens: int) -> list[tuple[float, Part]]:
    """(weight, part) pairs of a config. Accuracy and format are always computed, the others when they weigh
    something.
    """
    always: list[tuple[float, Part]] = [
        (config.accuracy.weight, Accuracy(config.accuracy.timeout_seconds)),
        (config.format.weight, Format(config.format.mode, config.format.prompt_opens_think)),
    ]
    optional: list[tuple[float, Part]] = [
        (config.language.weight, LanguageConsistency(config.language.target)),
        (config.overlong.weight, Overlong(max_response_tokens, config.overlong.buffer_tokens)),
        (config.repetition.weight, Repetition(config.repetition.ngram)),
    ]
    return always + [(weight, part) for weight, part in optional if weight > 0]


def compose(scores: dict[str, PartScore], weights: dict[str, float]) -> Reward:
    """Reward of the parts. One part without a score leaves the whole without a value: a status is not a score."""
    parts = {name: score.value for name, score in scores.items() if score.value is not None}
    bad = [(name, score) for name, score in scores.items() if score.status != RewardStatus.OK]
    if bad:
        status = next((s.status for _, s in bad if s.status == RewardStatus.FAILED), bad[0][1].status)
        return Reward(None, parts, status, "; ".join(f"{name}: {score.reason}" for name, score in bad))
    value = sum(weights[name] * score.value for name, score in scores.items())
    return Reward(value, parts, RewardStatus.OK, "; ".join(f"{n} {s.value:g} ({s.reason})" for n, s in scores.items()))


@dataclass(frozen=True, slots=True)
class _Pending:
    scores: dict[str, PartScore]
    waiting: dict[str, Callable[[], PartScore]]


def _awaiting(deferred: Deferred, future: Future[Outcome]) -> Callable[[], PartScore]:
    return lambda: deferred.finish(future.result())


class RewardScorer:
    """`submit` scores what it can at once and hands the rest to workers; `result` waits. Tickets may be asked in any
    order, once each.
    """

    def __init__(self, config: RewardConfig, *, max_response_tokens: int) -> None:
        pool = config.pool
        self._parts = weighted_parts(config, max_response_tokens)
        self._weights = {part.name: weight for weight, part in self._parts}
        self._pool = WorkerPool(pool.num_workers, pool.memory_bytes, pool.max_retries, pool.max_pending)
        self._pending: dict[int, _Pending] = {}
        self._next_ticket = 0

    def submit(self, prompt: Prompt, response: Response, text: str) -> int:
        """Start scoring a response; returns its ticket."""
        item = ScoringItem(prompt, response, text)
        pending = _Pending({}, {})
        for _, part in self._parts:
            score = part.score(item)
            if isinstance(score, Deferred):
                pending.waiting[part.name] = _awaiting(score, self._pool.submit(score.task))
            elif isinstance(score, Future):
                pending.waiting[part.name] = score.result
            else:
                pending.scores[part.name] = score
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._pending[ticket] = pending
        return ticket

    def result(self, ticket: int) -> Reward:
        """The reward of a ticket; waits for its workers. Raises KeyError for a ticket that was already asked for."""
        pending = self._pending.pop(ticket)
        scores = pending.scores | {name: wait() for name, wait in pending.waiting.items()}
        return compose({name: scores[name] for name in self._weights}, self._weights)

    def metrics(self) -> PoolMetrics:
        return self._pool.metrics()

    def close(self) -> None:
        """Stop the workers. Tickets that wait for one become FAILED rewards."""
        self._pool.close()

    def __enter__(self) -> RewardScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
