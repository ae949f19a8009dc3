"""Prompts -> groups of scored responses. Each response goes to the reward pool while the others are still generated."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

from r1mega.data.tokenizer import Tokenizer, response_text
from r1mega.observe.trace import PhaseTimer
from r1mega.types import Completion, GenerationRequest, Prompt, Response, Reward, RolloutGroup, SamplingSettings


class Scorer(Protocol):
    """Scores responses, one ticket each; `reward.compose.RewardScorer` is the one for training."""

    def submit(self, prompt: Prompt, response: Response, text: str) -> int: ...
    def flush(self) -> None: ...
    def result(self, ticket: int) -> Reward: ...


class StreamingEngine(Protocol):
    """What sampling asks of a `GenerationEngine`."""

    def stream(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]: ...


class GroupSampler:
    """Samples `group_size` responses a prompt and scores them."""

    def __init__(
        self,
        engine: StreamingEngine,
        tokenizer: Tokenizer,
        scorer: Scorer,
        sampling: SamplingSettings,
        group_size: int,
        timer: PhaseTimer,
    ):
        self._engine, self._tokenizer, self._scorer, self._timer = engine, tokenizer, scorer, timer
        self._sampling, self._group_size = sampling, group_size

    def sample(self, prompts: Sequence[Prompt], seeds: Sequence[int], policy_version: int) -> list[RolloutGroup]:
        """One group a prompt, in order. A prompt's seed alone (with the weights) determines its responses."""
        requests = [
            GenerationRequest(prompt.token_ids, self._group_size, seed, self._sampling)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        slots: list[list] = [[None] * self._group_size for _ in requests]
        with self._timer.phase("rollout"):
            for done in self._engine.stream(requests):
                with self._timer.phase("reward"):
                    text = response_text(self._tokenizer, done.response)
                    ticket = self._scorer.submit(prompts[done.request_index], done.response, text)
                slots[done.request_index][done.sample_index] = (done.response, text, ticket)
        with self._timer.phase("reward"):
            self._scorer.flush()
            return [
                RolloutGroup(
                    prompt=prompt,
                    responses=tuple(response for response, _, _ in members),
                    texts=tuple(text for _, text, _ in members),
                    rewards=tuple(self._scorer.result(ticket) for _, _, ticket in members),
                    policy_version=policy_version,
                )
                for prompt, members in zip(prompts, slots, strict=True)
            ]


def request_seed(run_seed: int, step: int, slot: int) -> int:
    """The seed of the request in place `slot` (counted over all ranks and refill rounds) of a step, in [0, 2^63)."""
    return random.Random(f"{run_seed}/{step}/{slot}").getrandbits(63)


def stop_settings(stop: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(stop token ids, stop strings): texts that are one token of the vocabulary become ids (no detokenising while
    sampling), the others stay strings; the end tokens of model and tokenizer always stop.
    """
    ids = list(tokenizer.end_token_ids)
    strings = []
    for text in stop:
        # in running text the tag may or may not follow a space: both spellings must be one and the same token
        pieces = {tuple(tokenizer.encode(form)) for form in (text, f" {text}")}
        if all(len(piece) == 1 for piece in pieces):
            ids += [piece[0] for piece in pieces]
        else:
            strings.append(text)
    return tuple(sorted(set(ids))), tuple(strings)
