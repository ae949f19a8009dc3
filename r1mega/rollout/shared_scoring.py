"""Rewards once a response, where several ranks of a generator have it: each rank scores a part, and all get all rewards."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import torch.distributed as dist

from r1mega.errors import GenerationError, R1MegaError
from r1mega.platform.groups import generator_ranks
from r1mega.rollout.sampler import Scorer
from r1mega.types import Prompt, Response, Reward

_Failure = R1MegaError | OSError
_Key = tuple[bytes, int]
"""Of a response: the digest of its prompt and tokens, and which one of those that are equal."""


class SharedScorer:
    """A `Scorer` for all ranks of a generator, which submit the same responses and flush together.

    A response's digest chooses the rank that scores it, so that what a rank scores together does not depend on which was
    finished first. everywhere: a part asks the generator in `flush`, which wants all of its ranks: then each scores everything,
    of responses in the same order, and the rewards of the first are those of all.

    An R1MegaError or OSError of one rank's `submit` or `result` is raised on all, in `flush`; before anything that takes several ranks,
    or after all of it. One of the scorer's own `flush` is raised at once, for others may be within the same collective call.
    """

    def __init__(self, scorer: Scorer, tp: int, *, everywhere: bool = False):
        """tp: ranks of a generator, neighbours. A collective call of all generators, see `generator_ranks`."""
        self._scorer, self._tp, self._everywhere = scorer, tp, everywhere
        self._rank = dist.get_rank() % tp
        self._group = generator_ranks(tp)
        self._num_submitted = 0
        self._submitted: dict[_Key, int] = {}  # tickets, in order
        self._counts = Counter[bytes]()
        self._waiting: dict[_Key, int] = {}  # the scorer's tickets of those that this rank scores
        self._rewards: dict[int, Reward] = {}
        self._error: _Failure | None = None

    def submit(self, prompt: Prompt, response: Response, text: str) -> int:
        """Start scoring, on the rank whose part it is; a ticket for `result`."""
        ticket, self._num_submitted = self._num_submitted, self._num_submitted + 1
        digest = _digest(prompt, response)
        key = digest, self._counts[digest]
        self._counts[digest] += 1
        self._submitted[key] = ticket
        if self._everywhere or int.from_bytes(digest) % self._tp == self._rank:
            try:
                self._waiting[key] = self._scorer.submit(prompt, response, text)
            except (
                R1MegaError,
                OSError,
            ) as error:  # a rank that left now would leave the others in the middle of generating
                self._error = self._error or error
        return ticket

    def flush(self) -> None:
        """Wait for all that was submitted, on all ranks of the generator. A collective call. Raises GenerationError where
        they have not the same responses.
        """
        submitted, waiting, error = self._submitted, self._waiting, self._error
        self._submitted, self._waiting, self._error = {}, {}, None
        self._counts.clear()
        self._check_equal(list(submitted) if self._everywhere else sorted(submitted), error)
        self._scorer.flush()
        found: dict[_Key, Reward] | _Failure
        try:
            found = {key: self._scorer.result(there) for key, there in waiting.items()}
        except (R1MegaError, OSError) as failed:
            found = failed
        everyone: list[dict[_Key, Reward] | _Failure] = [{} for _ in range(self._tp)]
        dist.all_gather_object(everyone, found, group=self._group)
        for theirs in reversed(everyone):  # the first rank's count where all have scored
            if isinstance(theirs, _Failure):
                raise theirs
            self._rewards |= {submitted[key]: reward for key, reward in theirs.items()}

    def result(self, ticket: int) -> Reward:
        """Of a ticket, once; `flush` comes first where it has not followed the ticket. Raises KeyError for any other."""
        if ticket not in self._rewards and self._submitted:
            self.flush()
        return self._rewards.pop(ticket)

    def _check_equal(self, keys: list[_Key], error: _Failure | None) -> None:
        """Raises an error of any rank on all of the generator's, and GenerationError for responses that are not the same."""
        mine = error or hashlib.blake2b(b"".join(digest for digest, _ in keys), digest_size=16).digest()
        everyone: list[bytes | _Failure] = [mine] * self._tp
        dist.all_gather_object(everyone, mine, group=self._group)
        for theirs in everyone:
            if isinstance(theirs, _Failure):
                raise theirs
        if len(set(everyone)) > 1:
            first = dist.get_rank() - self._rank
            raise GenerationError(
                f"the ranks {first} to {first + self._tp - 1} of one generator (rollout.tp = {self._tp}) have not sampled the "
                "same responses, which tensor-parallel ranks of the same software and settings do"
            )


def _digest(prompt: Prompt, response: Response) -> bytes:
    digest = hashlib.blake2b(repr((prompt.id, prompt.answers, len(prompt.token_ids))).encode(), digest_size=16)
    digest.update(np.array(prompt.token_ids + response.token_ids, dtype=np.int64).tobytes())
    return digest.digest()


def share_scoring(scorer: Scorer, tp: int, *, everywhere: bool = False) -> Scorer:
    """`SharedScorer`, or the scorer itself where a generator is one rank."""
    return scorer if tp == 1 else SharedScorer(scorer, tp, everywhere=everywhere)
