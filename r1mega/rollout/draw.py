"""Single samples, each with a seed of its own: drawn, and graded while others are still being generated.

A sample depends neither on the others nor on the rank that draws it, so ranks may divide the samples in any way, and a
start after a kill draws just those that are missing (`rollout.store` keeps them).
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from r1mega.config.rewards import PATCH_KIND
from r1mega.data.tokenizer import Tokenizer, response_text
from r1mega.rollout.sampler import Scorer
from r1mega.types import GenerationEngine, GenerationRequest, Prompt, Response, Reward, RewardStatus, SamplingSettings

Key = tuple[str, int]
"""(prompt id, sample index)."""

MAX_UNGRADED = 256
"""Responses that may wait for their reward before drawing waits for the oldest."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What to draw: sample number `index` of a prompt, by this seed. prefix: tokens at the prompt's end that belong to
    the response.
    """

    prompt: Prompt
    index: int
    seed: int
    prefix: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        return self.prompt.id, self.index


@dataclass(frozen=True, slots=True)
class Sample:
    """A response: number `index` of prompt `prompt_id`. text: with the prefix; length: sampled tokens; truncated: cut at
    max_tokens.
    """

    prompt_id: str
    index: int
    text: str
    length: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class GradedSample:
    """A sample and its reward."""

    sample: Sample
    reward: Reward


def draw_samples(
    engine: GenerationEngine,
    tokenizer: Tokenizer,
    scorer: Scorer | None,
    draws: Sequence[Draw],
    sampling: SamplingSettings,
    *,
    on_sample: Callable[[Sample], object] = lambda sample: None,
    should_stop: Callable[[], bool] = lambda: False,
    max_ungraded: int = MAX_UNGRADED,
) -> Iterator[GradedSample]:
    """Samples and their grades, in the order in which they finish. Without a scorer all are UNJUDGED. Without draws the engine is
    called all the same: others may share its passes.

    on_sample is called with each sample the moment it is there, before its grade. Once should_stop (asked after each
    sample) says so, generation ends; what is drawn is still graded.
    """

    def drawn() -> Generator[tuple[Prompt, Response, Sample]]:
        requests = [GenerationRequest(draw.prompt.token_ids, 1, draw.seed, sampling) for draw in draws]
        with contextlib.closing(engine.stream(requests)) as stream:
            for done in stream:
                draw, response = draws[done.request_index], done.response
                text = response_text(tokenizer, response, draw.prefix)
                sample = Sample(*draw.key, text, len(response.token_ids), response.finish_reason == "length")
                on_sample(sample)
                yield draw.prompt, response, sample
                if should_stop():
                    break

    with contextlib.closing(drawn()) as responses:  # an error in the scorer, too, leaves the engine free
        yield from _graded(scorer, responses, max_ungraded)


def grade_samples(
    scorer: Scorer,
    samples: Iterable[tuple[Prompt, Sample]],
    tokenizer: Tokenizer | None = None,
    max_ungraded: int = MAX_UNGRADED,
) -> Iterator[GradedSample]:
    """Grade samples that were drawn earlier, from their texts. tokenizer: for parts that look at tokens; None: there are none."""

    def response(sample: Sample) -> Response:
        token_ids = () if tokenizer is None else tuple(tokenizer.encode(sample.text))
        return Response(token_ids, (0.0,) * len(token_ids), "length" if sample.truncated else "stop")

    drawn = ((prompt, response(sample), sample) for prompt, sample in samples)
    return _graded(scorer, drawn, max_ungraded)


def _graded(
    scorer: Scorer | None, drawn: Iterable[tuple[Prompt, Response, Sample]], max_ungraded: int
) -> Iterator[GradedSample]:
    """In the same order, with a bound on what waits for its grade."""
    waiting: deque[tuple[Sample, Callable[[], Reward]]] = deque()

    def oldest() -> GradedSample:
        sample, reward = waiting.popleft()
        return GradedSample(sample, reward())

    def elsewhere() -> Reward:
        return Reward(None, {}, RewardStatus.UNJUDGED, "not judged here")

    for prompt, response, sample in drawn:
        if scorer is None or prompt.kind == PATCH_KIND:
            waiting.append((sample, elsewhere))
        else:
            ticket = scorer.submit(prompt, response, sample.text)
            waiting.append((sample, functools.partial(scorer.result, ticket)))
        if len(waiting) > max_ungraded:
            yield oldest()
    while waiting:
        yield oldest()
