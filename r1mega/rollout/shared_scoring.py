"""Rewards once a response, where several ranks of a generator have it: each rank scores a part, and all get all rewards."""

from __future__ import annotations

import torch.distributed as dist

from r1mega.errors import R1MegaError
from r1mega.platform.groups import timeout
from r1mega.rollout.sampler import Scorer
from r1mega.types import Prompt, Response, Reward


class SharedScorer:
    """A `Scorer` for all ranks of a generator, which submit the same responses in the same order and flush together.

    everywhere: a part asks the generator, which wants all of its ranks: then each scores everything, and the rewards of the
    first are those of all. An R1MegaError of one rank's scoring is raised on all, in `flush`.
    """

    def __init__(self, scorer: Scorer, tp: int, *, everywhere: bool = False):
        """tp: ranks of a generator, neighbours. A collective call of all generators."""
        self._scorer, self._tp, self._everywhere = scorer, tp, everywhere
        self._rank = dist.get_rank() % tp
        self._group, _ = dist.new_subgroups(tp, timeout=timeout("rollout"), backend="gloo")
        self._num_submitted = 0
        self._waiting: dict[int, int] = {}  # this rank's tickets there, by those here
        self._rewards: dict[int, Reward] = {}
        self._error: R1MegaError | None = None

    def submit(self, prompt: Prompt, response: Response, text: str) -> int:
        """Start scoring, on the rank whose turn it is; a ticket for `result`."""
        ticket, self._num_submitted = self._num_submitted, self._num_submitted + 1
        if self._everywhere or ticket % self._tp == self._rank:
            try:
                self._waiting[ticket] = self._scorer.submit(prompt, response, text)
            except R1MegaError as error:  # a rank that left now would leave the others in the middle of generating
                self._error = self._error or error
        return ticket

    def flush(self) -> None:
        """Wait for all that was submitted, on all ranks of the generator. A collective call."""
        found: dict[int, Reward] | R1MegaError
        try:
            self._scorer.flush()
            found = {ticket: self._scorer.result(there) for ticket, there in self._waiting.items()}
        except R1MegaError as error:
            found = error
        found, self._error = self._error or found, None
        self._waiting.clear()
        everyone: list[dict[int, Reward] | R1MegaError] = [{} for _ in range(self._tp)]
        dist.all_gather_object(everyone, found, group=self._group)
        for theirs in reversed(everyone):  # the first rank's count where all have scored
            if isinstance(theirs, R1MegaError):
                raise theirs
            self._rewards |= theirs

    def result(self, ticket: int) -> Reward:
        """Of a ticket, once, after the `flush` that followed it. Raises KeyError for any other."""
        return self._rewards.pop(ticket)


def share_scoring(scorer: Scorer, tp: int, *, everywhere: bool = False) -> Scorer:
    """`SharedScorer`, or the scorer itself where a generator is one rank."""
    return scorer if tp == 1 else SharedScorer(scorer, tp, everywhere=everywhere)
