"""Drawing and grading single samples: what an evaluation in a training loop, of a checkpoint and of a stage share."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from r1mega.data.tokenizer import Tokenizer
from r1mega.rollout.engine import GenerationEngine
from r1mega.rollout.sampler import Scorer, response_text
from r1mega.types import GenerationRequest, Prompt, Response, Reward, RewardStatus, SamplingSettings

PATCH_KIND = "patch"
"""Prompts whose responses are judged by the benchmark's own harness, later and elsewhere."""

_MAX_UNGRADED = 256
"""Responses that may wait for their reward before drawing waits for the oldest."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A response: number `index` of prompt `prompt_id`. length: tokens; truncated: cut at max_tokens."""

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


def sample_request(prompt: Prompt, index: int, seed: int, sampling: SamplingSettings) -> GenerationRequest:
    """One sample as a request of its own. Its seed is made of the evaluation's seed, the prompt's id and the index, so
    it depends neither on the other samples nor on the rank that draws it: ranks may divide the samples in any way, and
    a start after a kill draws just those that are missing.
    """
    name = f"evaluate/{seed}/{prompt.id}" + (f"/{index}" if index else "")
    return GenerationRequest(prompt.token_ids, 1, random.Random(name).getrandbits(63), sampling)


def draw_samples(
    engine: GenerationEngine,
    tokenizer: Tokenizer,
    scorer: Scorer,
    work: Sequence[tuple[Prompt, int]],
    sampling: SamplingSettings,
    seed: int,
    on_sample: Callable[[Sample], object] = lambda sample: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[GradedSample]:
    """Draw the (prompt, sample index) pairs of `work` and grade each while others are still being generated.

    on_sample is called with each sample the moment it is there, before its grade. Once should_stop (asked after each
    sample) says so, generation ends and samples without a grade stay without.
    """
    if not work:
        return
    grader = _Grader(scorer)
    requests = [sample_request(prompt, index, seed, sampling) for prompt, index in work]
    stream = engine.stream(requests)
    try:
        for done in stream:
            prompt, index = work[done.request_index]
            text = response_text(tokenizer, done.response)
            cut = done.response.finish_reason == "length"
            sample = Sample(prompt.id, index, text, len(done.response.token_ids), cut)
            on_sample(sample)
            yield from grader.add(prompt, done.response, sample)
            if should_stop():
                return
    finally:
        stream.close()
    yield from grader.rest()


def grade_samples(scorer: Scorer, prompts: Iterable[tuple[Prompt, Sample]]) -> Iterator[GradedSample]:
    """Grade samples that were drawn earlier, by their texts alone: the scorer's parts must need no tokens."""
    grader = _Grader(scorer)
    for prompt, sample in prompts:
        response = Response((), (), "length" if sample.truncated else "stop")
        yield from grader.add(prompt, response, sample)
    yield from grader.rest()


class _Grader:
    """Hands responses to the scorer and their grades back in the same order, with a bound on what is in between."""

    def __init__(self, scorer: Scorer):
        self._scorer = scorer
        self._waiting: deque[tuple[Sample, int | None]] = deque()

    def add(self, prompt: Prompt, response: Response, sample: Sample) -> Iterator[GradedSample]:
        ticket = None if prompt.kind == PATCH_KIND else self._scorer.submit(prompt, response, sample.text)
        self._waiting.append((sample, ticket))
        if len(self._waiting) > _MAX_UNGRADED:
            yield self._oldest()

    def rest(self) -> Iterator[GradedSample]:
        while self._waiting:
            yield self._oldest()

    def _oldest(self) -> GradedSample:
        sample, ticket = self._waiting.popleft()
        if ticket is None:
            elsewhere = Reward(None, {}, RewardStatus.UNJUDGED, "judged by the benchmark's own harness")
            return GradedSample(sample, elsewhere)
        return GradedSample(sample, self._scorer.result(ticket))
