"""Reward of a response = weighted sum of parts, by the config. Scoring starts as each response is submitted."""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

from r1mega.config.rewards import ACCURACY, WITHOUT_GOLD, NeuralReward, PreferenceReward, RewardConfig
from r1mega.data.tokenizer import Tokenizer
from r1mega.errors import RewardError
from r1mega.platform.watchdog import tick
from r1mega.reward.custom import load_part
from r1mega.reward.format import check_format
from r1mega.reward.language import LanguageConsistency
from r1mega.reward.length import LengthShaping, Overlong, Repetition
from r1mega.reward.mpi_pool import open_pool
from r1mega.reward.parts import Deferred, Part, PartScore, ScoringItem, Waiting
from r1mega.reward.pool import Outcome, PoolMetrics, percentile
from r1mega.types import GenerationEngine, Prompt, Response, Reward, RewardStatus

logger = logging.getLogger(__name__)

VERIFIED = ("accuracy", "format")
"""Parts that follow from the text alone, whatever the run's other rewards are."""

ShardedModel = Callable[[PreferenceReward], Callable[[Sequence[list[int]]], list[float]]]
"""Loads a reward model over all ranks; what it gives scores sequences, as a collective call."""


@dataclass(frozen=True, slots=True)
class Format:
    """`<think>...</think><answer>...</answer>`, once each."""

    mode: Literal["strict", "graded"] = "strict"
    prompt_opens_think: bool = False
    name: str = "format"

    def score(self, item: ScoringItem) -> PartScore:
        verdict = check_format(item.text, self.mode, self.prompt_opens_think)
        return PartScore(verdict.value, "; ".join(verdict.problems) or "well formed")


class Accuracy:
    """Sends each prompt to the scorer of its kind."""

    name = "accuracy"

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._by_kind: dict[str, Part] = {}

    def score(self, item: ScoringItem) -> PartScore | Deferred | Waiting:
        """By the part for the prompt's kind, which is imported at its first prompt. RewardError for an unknown kind."""
        kind = item.prompt.kind
        if kind not in self._by_kind:
            if kind not in ACCURACY:
                raise RewardError(
                    f"prompt {item.prompt.id}: no accuracy reward for kind {kind!r}; known: {', '.join(ACCURACY)}"
                )
            module, _, name = ACCURACY[kind].partition(":")
            self._by_kind[kind] = getattr(importlib.import_module(module), name).from_config(self._config)
        return self._by_kind[kind].score(item)

    def close(self) -> None:
        for part in self._by_kind.values():
            _close(part)


@dataclass(frozen=True, slots=True)
class WeightedPart:
    """A part, what it weighs, and where it counts. kinds: of prompts; None: all. from_step: the first step with it."""

    weight: float
    part: Part
    kinds: tuple[str, ...] | None = None
    from_step: int = 1

    def applies(self, prompt: Prompt, step: int) -> bool:
        return step >= self.from_step and (self.kinds is None or prompt.kind in self.kinds)


def weighted_parts(
    config: RewardConfig,
    max_response_tokens: int,
    engine: GenerationEngine | None = None,
    tokenizer: Tokenizer | None = None,
    sharded: ShardedModel | None = None,
) -> list[WeightedPart]:
    """The parts of a config. Format always, and accuracy for all prompts that have a gold, are computed; the others
    when they weigh something. engine, tokenizer: of the policy, for a judge that is the policy itself. sharded: loads
    reward models over all ranks.
    """
    parts = [
        WeightedPart(config.accuracy.weight, Accuracy(config)),
        WeightedPart(config.format.weight, Format(config.format.mode, config.format.prompt_opens_think)),
    ]
    optional: list[tuple[float, Part]] = [
        (config.language.weight, LanguageConsistency(config.language.target)),
        (config.overlong.weight, Overlong(max_response_tokens, config.overlong.buffer_tokens)),
        (config.length.weight, LengthShaping(config.length.free_tokens, max_response_tokens)),
        (config.repetition.weight, Repetition(config.repetition.ngram)),
    ]
    parts += [WeightedPart(weight, part) for weight, part in optional if weight > 0]
    neural: list[tuple[NeuralReward, Callable[[], Part]]] = []
    opens_think = config.format.prompt_opens_think
    if config.helpfulness.weight > 0 or config.harmlessness.weight > 0:
        from r1mega.reward.preference import Preference

        def preference(name: str, section: PreferenceReward, reads: Literal["summary", "response"]) -> Part:
            return Preference(name, section, reads, opens_think, _forward(name, section, sharded))

        neural += [
            (config.helpfulness, lambda: preference("helpfulness", config.helpfulness, "summary")),
            (config.harmlessness, lambda: preference("harmlessness", config.harmlessness, "response")),
        ]
    if config.judge.weight > 0:
        from r1mega.reward.judge import Judge, open_client

        neural.append(
            (config.judge, lambda: Judge(config.judge, open_client(config.judge, engine, tokenizer), opens_think))
        )
    parts += [
        WeightedPart(section.weight, make(), section.kinds, section.from_step)
        for section, make in neural
        if section.weight > 0
    ]
    return parts + [
        WeightedPart(section.weight, load_part(name, section), section.kinds, section.from_step)
        for name, section in config.custom.items()
        if section.weight > 0
    ]


def _forward(
    name: str, section: PreferenceReward, sharded: ShardedModel | None
) -> Callable[[Sequence[list[int]]], list[float]] | None:
    if section.backend == "transformers":
        return None
    if sharded is None:
        raise RewardError(f"reward.{name}.backend = megatron: only RL stages have a layout for it; use transformers")
    return sharded(section)


def compose(scores: dict[str, PartScore], weights: dict[str, float]) -> Reward:
    """Reward of the parts. One part without a score leaves the whole without a value: a status is not a score."""
    parts = {name: score.value for name, score in scores.items() if score.value is not None}
    bad = [(name, score) for name, score in scores.items() if score.status != RewardStatus.OK]
    if bad:
        status = next((s.status for _, s in bad if s.status == RewardStatus.FAILED), bad[0][1].status)
        return Reward(None, parts, status, "; ".join(f"{name}: {score.reason}" for name, score in bad))
    value = sum(weights[name] * part for name, part in parts.items())
    return Reward(value, parts, RewardStatus.OK, "; ".join(f"{n} {s.value:g} ({s.reason})" for n, s in scores.items()))


def _close(part: Part) -> None:
    if (close := getattr(part, "close", None)) is not None:
        close()


@dataclass(frozen=True, slots=True)
class Activity:
    """What scoring took since it was last asked. Counts: scores that had to be waited for, and what became of their
    workers. queue_max: most of them unfinished at one time; seconds: from submission to score, waiting included.
    """

    deferred: int
    failed: int
    retries: int
    kills: int
    crashes: int
    queue_max: int
    p50_seconds: float
    p99_seconds: float


@dataclass(frozen=True, slots=True)
class _Pending:
    prompt_id: str
    scores: dict[str, PartScore]
    waiting: dict[str, Callable[[], PartScore]]
    order: tuple[str, ...]


def _awaiting(deferred: Deferred, future: Future[Outcome]) -> Callable[[], PartScore]:
    return lambda: deferred.finish(future.result())


class RewardScorer:
    """`submit` scores what it can at once and hands the rest to workers; `result` waits. Tickets may be asked in any
    order, once each.

    step: of the run, for parts that count from a later step on; set it before the step's responses are submitted.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        max_response_tokens: int,
        engine: GenerationEngine | None = None,
        tokenizer: Tokenizer | None = None,
        sharded: ShardedModel | None = None,
    ) -> None:
        self.step = 1
        self.asks_generator = config.judge.weight > 0 and config.judge.engine == "policy"
        """Whether `flush` takes the generator, all of its ranks."""
        self._parts = weighted_parts(config, max_response_tokens, engine, tokenizer, sharded)
        self._weights = {entry.part.name: entry.weight for entry in self._parts}
        self._pool = open_pool(config.pool)
        self._pending: dict[int, _Pending] = {}
        self._next_ticket = 0
        self._clock = _Clock()
        self._before = self._pool.metrics()

    def submit(self, prompt: Prompt, response: Response, text: str, only: Collection[str] | None = None) -> int:
        """Start scoring a response; returns its ticket. only: the names of the parts that count; None: all."""
        item = ScoringItem(prompt, response, text)
        names: list[str] = []
        scores: dict[str, PartScore] = {}
        waiting: dict[str, Callable[[], PartScore]] = {}
        for entry in self._parts:
            name = entry.part.name
            if not entry.applies(prompt, self.step) or (name == "accuracy" and prompt.kind in WITHOUT_GOLD):
                continue
            if only is not None and name not in only:
                continue
            names.append(name)
            score = entry.part.score(item)
            if isinstance(score, Deferred):
                waiting[name] = _awaiting(score, self._clock.watch(self._pool.submit(score.task)))
            elif isinstance(score, PartScore):
                scores[name] = score
            else:
                waiting[name] = score.result
                if isinstance(score, _Future):
                    self._clock.watch(score)
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._pending[ticket] = _Pending(prompt.id, scores, waiting, tuple(names))
        return ticket

    def flush(self) -> None:
        """Compute what takes several ranks (reward models sharded over all, the policy as judge over those of its generator):
        each calls it once its responses are in. `result` then asks no other rank.
        """
        for entry in self._parts:
            if self.step >= entry.from_step and (flush := getattr(entry.part, "flush", None)) is not None:
                flush()

    def result(self, ticket: int) -> Reward:
        """The reward of a ticket; waits for its workers. Raises KeyError for a ticket that was already asked for."""
        pending = self._pending.pop(ticket)
        scores = pending.scores | {name: wait() for name, wait in pending.waiting.items()}
        reward = compose({name: scores[name] for name in pending.order}, self._weights)
        if reward.status != RewardStatus.OK:
            logger.warning("a response to prompt %s is left out of its group: %s", pending.prompt_id, reward.reason)
        return reward

    def forget(self, ticket: int) -> None:
        """Keep nothing of a ticket that nobody will ask for. What a worker has of it goes on, and counts in `activity`."""
        self._pending.pop(ticket, None)

    def metrics(self) -> PoolMetrics:
        """Of the worker pool, since the start."""
        return self._pool.metrics()

    def activity(self) -> Activity:
        """Since the last call."""
        before, self._before = self._before, self._pool.metrics()
        counts = {
            name: getattr(self._before, name) - getattr(before, name)
            for name in ("failed", "retries", "kills", "crashes")
        }
        latencies, queue_max = self._clock.read()
        p50, p99 = percentile(latencies, 0.5), percentile(latencies, 0.99)
        return Activity(len(latencies), **counts, queue_max=queue_max, p50_seconds=p50, p99_seconds=p99)

    def close(self) -> None:
        """Stop the workers. Tickets that wait for one become FAILED rewards."""
        self._pool.close()
        for entry in self._parts:
            _close(entry.part)

    def __enter__(self) -> RewardScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Verdicts:
    """A scorer whose parts VERIFIED alone count: what an evaluation reads. Judges and reward models, which may want the
    generator, all ranks at once, or a server, are not asked.
    """

    def __init__(self, scorer: RewardScorer) -> None:
        self._scorer = scorer
        self._open: set[int] = set()

    def submit(self, prompt: Prompt, response: Response, text: str) -> int:
        ticket = self._scorer.submit(prompt, response, text, only=VERIFIED)
        self._open.add(ticket)
        return ticket

    def flush(self) -> None:
        """Nothing waits for other ranks."""

    def result(self, ticket: int) -> Reward:
        self._open.discard(ticket)
        return self._scorer.result(ticket)

    def forget(self) -> None:
        """Give up the tickets that were not asked for: what submitted them has failed."""
        for ticket in self._open:
            self._scorer.forget(ticket)
        self._open.clear()


@runtime_checkable
class _Future(Protocol):
    """What tells when it is done."""

    def add_done_callback(self, call: Callable[..., object], /) -> object: ...


_F = TypeVar("_F", bound=_Future)


class _Clock:
    """How long scores take that are not there at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latencies: list[float] = []
        self._unfinished = self._most = 0

    def watch(self, future: _F) -> _F:
        start = time.monotonic()
        with self._lock:
            self._unfinished += 1
            self._most = max(self._most, self._unfinished)
        future.add_done_callback(lambda _: self._finished(time.monotonic() - start))
        return future

    def _finished(self, seconds: float) -> None:
        tick("score")
        with self._lock:
            self._unfinished -= 1
            self._latencies.append(seconds)

    def read(self) -> tuple[list[float], int]:
        """(latencies since the last call, most unfinished at one time)."""
        with self._lock:
            latencies, self._latencies = self._latencies, []
            most, self._most = self._most, self._unfinished
            return latencies, most
