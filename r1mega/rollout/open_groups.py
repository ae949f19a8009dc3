"""Groups in the making: what each of their responses has, from one step to the next, and where a step is cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from r1mega.types import UNFINISHED, KeptIds, Prompt, Response, Reward, RolloutGroup

NEVER = 1 << 62
"""More tokens than any response has."""


@dataclass(slots=True)
class Member:
    """A response in the making. clock: tokens that this step added; text, reward: once it is finished and scored."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str = UNFINISHED
    routed_experts: np.ndarray | None = None
    kept: KeptIds | None = None
    clock: int = 0
    is_held: bool = False  # an earlier start left it unfinished in this step, with what it has: it waits for the cut
    text: str = ""
    reward: Reward | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason != UNFINISHED

    def add(self, response: Response, version: int) -> None:
        """What a step sampled of it; again in the same step: more."""
        if self.kept is not None or response.kept is not None:
            before, more = self.kept or KeptIds.whole(len(self.token_ids)), response.kept
            self.kept = before + (more or KeptIds.whole(len(response.token_ids)))
        self.token_ids += response.token_ids
        self.log_probs += response.log_probs
        self.versions += [version] * len(response.token_ids)
        self.finish_reason, self.routed_experts = response.finish_reason, response.routed_experts
        self.clock += len(response.token_ids)

    def cut(self, length: int) -> int:
        """Leave it with at most `length` tokens of this step, unfinished if it had more; how many went."""
        surplus = self.clock - length
        if surplus <= 0:
            return 0
        for values in (self.token_ids, self.log_probs, self.versions):
            del values[len(values) - surplus :]
        self.kept = None if self.kept is None else self.kept.first(len(self.token_ids))
        self.finish_reason, self.routed_experts, self.clock = UNFINISHED, None, length
        self.text, self.reward, self.is_held = "", None, False
        return surplus

    @property
    def begun(self) -> int:
        """Tokens of earlier steps."""
        return len(self.token_ids) - self.clock

    def new(self) -> Response:
        """What this step added."""
        new = tuple(self.token_ids[self.begun :]), tuple(self.log_probs[self.begun :])
        kept = None if self.kept is None else self.kept.without_first(self.begun)
        return Response(*new, self.finish_reason, self.routed_experts, kept=kept)

    def response(self, version: int) -> Response:
        """All of it. version: that of its group."""
        versions = () if all(v == version for v in self.versions) else tuple(self.versions)
        values = tuple(self.token_ids), tuple(self.log_probs), self.finish_reason, self.routed_experts, versions
        return Response(*values, self.kept)


@dataclass(slots=True)
class OpenGroup:
    """The responses to one prompt, from the step that drew it (`born`) to the one that trains on it.

    prompt_index: in the run's prompts; slot: its place among those that its step drew; owner: the generator that samples it, -1
    while that is whoever has room first; members: there alone. is_whole: all of its
    responses are finished, which every rank knows after a step; is_vain: and they carry no signal, where that is asked for.
    """

    prompt_index: int
    prompt: Prompt
    seed: int
    born: int
    slot: int
    owner: int
    members: list[Member]
    is_whole: bool = False
    is_vain: bool = False

    @property
    def clock(self) -> int:
        """How many tokens a response must be allowed in this step for the group to be whole; NEVER: not known yet."""
        return max(member.clock if member.is_finished else NEVER for member in self.members)

    def closed(self, version: int) -> RolloutGroup:
        """As it is trained on. Its responses are finished and scored."""
        rewards = tuple(member.reward for member in self.members if member.reward is not None)
        return RolloutGroup(
            prompt=self.prompt,
            responses=tuple(member.response(version) for member in self.members),
            texts=tuple(member.text for member in self.members),
            rewards=rewards,
            policy_version=version,
            slot=self.slot,
        )


class OpenState(TypedDict):
    """What a checkpoint keeps of the groups in the making after a step; their tokens are in the journal. groups: prompt index,
    seed, born, slot, owner, is_whole; redraw: indices of prompts whose groups were dropped.
    """

    step: int
    num_replicas: int
    groups: list[tuple[int, int, int, int, int, bool]]
    redraw: list[int]


def find_cut(
    clocks: Sequence[int],
    deadlines: Sequence[int],
    frontier: int,
    step: int,
    wanted: int,
    every: int,
    vain: Collection[int] = (),
) -> int | None:
    """Tokens of a response, a multiple of `every`, after which a step ends; None while too little is known.

    That is the smallest number with which `wanted` groups are whole, of which so many are due that in no later step more than
    `wanted` will be. It follows from the responses alone, not from how fast or where they are sampled.

    clocks: see `OpenGroup.clock`, of all groups; frontier: tokens that every unfinished response has by now; deadlines: the last
    step that may train on each group (a large number: none). vain: places of groups that are left out once they are whole: they
    count neither among the `wanted` nor as due. Where all groups are whole and fewer are left, the step ends with those.
    """
    rounded = [-(-clock // every) * every if clock < NEVER else NEVER for clock in clocks]
    counted = sorted(length for place, length in enumerate(rounded) if length < NEVER and place not in vain)
    if len(counted) < wanted:
        is_all = vain and frontier >= NEVER and NEVER not in rounded
        return max(rounded) if is_all else None
    for length in sorted({length for length in rounded if counted[wanted - 1] <= length < NEVER}):
        if length > frontier:
            return None
        left = [place for place, clock in enumerate(clocks) if place not in vain or clock > length]
        if not _is_behind([clocks[place] <= length for place in left], [deadlines[p] for p in left], step, wanted):
            return length
    return None


def _is_behind(whole: Sequence[bool], deadlines: Sequence[int], step: int, wanted: int) -> bool:
    """Whether, after a step that trains on `wanted` whole groups (the first due first), some step would have more due."""
    for due in sorted(set(deadlines)):
        num_due = sum(deadline <= due for deadline in deadlines)
        num_ready = sum(is_whole and deadline <= due for is_whole, deadline in zip(whole, deadlines, strict=True))
        if num_due - min(num_ready, wanted) > (due - step) * wanted:
            return True
    return False
