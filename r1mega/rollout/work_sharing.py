"""Which generator samples which group of a step: as many as it has seats for from the start, the others whoever has room first.

What is sampled follows from a group's seed, so that speeds decide where a group is made, and by the batches that it is in how it
is rounded, and nothing else. Where all groups have seats from the start nothing is shared; of several generators, the ranks then
tell each other once a round what an earlier start left them, unless `rollout.work_sharing` is off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from r1mega.config.schema import RolloutConfig
from r1mega.platform.groups import GeneratorPlace, claim, forget_claims, generator_ranks
from r1mega.rollout.open_groups import OpenGroup

NOBODY = -1
"""The owner of a group that no generator has taken yet."""
_NONE = 1 << 30


def without_seat(owners: Sequence[int], load: Sequence[int], seats: int) -> list[int]:
    """Places of the groups that wait for a seat where each generator begins with its own, in order. load: groups that each
    has beside them; seats: groups that one has room for.
    """
    load, waiting = list(load), []
    for place, owner in enumerate(owners):
        load[owner] += 1
        if load[owner] > seats:
            waiting.append(place)
    return waiting


@dataclass(slots=True)
class SharedGroups:
    """Groups that generators take, one at a time: the same list on every rank. A call takes the next one, [] once all are taken;
    the ranks of a generator call it together.
    """

    groups: Sequence[OpenGroup]
    name: str
    place: GeneratorPlace
    ranks: dist.ProcessGroup | None

    def __call__(self) -> list[OpenGroup]:
        taken = torch.tensor(claim(self.name) if self.place.is_first else 0)
        if self.ranks is not None:
            dist.broadcast(taken, group_src=0, group=self.ranks)
        group = self.groups[int(taken) :][:1]
        for one in group:
            one.owner = self.place.replica
        return list(group)


class WorkSharing:
    """Of all generators of a run; every rank makes one alike, a collective call where a generator has several ranks."""

    def __init__(self, rollout: RolloutConfig, place: GeneratorPlace, holds: Callable[[int, int], bool]):
        """holds: whether this generator has some of the group with a seed from an earlier start's (step, seed)."""
        self._place, self._holds = place, holds
        self._is_on = rollout.work_sharing and place.num_replicas > 1
        self._seats = -(-rollout.max_num_seqs // rollout.group_size)
        self._ranks = generator_ranks(rollout.tp) if self._is_on and rollout.tp > 1 else None
        self._shared: SharedGroups | None = None
        self._num_shared = 0

    def holders(self, step: int, seeds: Sequence[int]) -> list[int]:
        """The generator that has some of each group from an earlier start (NOBODY: none, or nothing is shared): there it goes on.
        A collective call where sharing is on.
        """
        if not self._is_on:
            return [NOBODY] * len(seeds)
        found = torch.tensor([self._place.replica if self._holds(step, seed) else _NONE for seed in seeds])
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return [owner if owner < _NONE else NOBODY for owner in found.tolist()]

    def share(self, groups: Sequence[OpenGroup], load: Sequence[int]) -> SharedGroups | None:
        """Those of the groups, each with the owner that it would have, that its owner has no seat for; None: all have one. They
        are NOBODY's then. load: see `without_seat`. Every rank calls it alike, and `finish` once all have sampled.
        """
        waiting = without_seat([group.owner for group in groups], load, self._seats) if self._is_on else []
        if not waiting:
            return None
        shared = [groups[place] for place in waiting]
        for group in shared:
            group.owner = NOBODY
        self._num_shared += 1
        self._shared = SharedGroups(shared, f"work/{self._num_shared}", self._place, self._ranks)
        return self._shared

    def finish(self) -> None:
        """Every rank knows who took what. A collective call where something was shared, after all have come."""
        if self._shared is None:
            return
        owners = torch.tensor([group.owner for group in self._shared.groups])
        dist.all_reduce(owners, dist.ReduceOp.MAX)
        for group, owner in zip(self._shared.groups, owners.tolist(), strict=True):
            group.owner = owner
        if dist.get_rank() == 0:
            forget_claims(self._shared.name)
        self._shared = None
