"""Collecting a step's groups: which prompts this rank samples, and dynamic sampling (refill of groups without signal)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from r1mega.config.stages.rl import RLStage
from r1mega.data.cursor import PromptCursor
from r1mega.platform.groups import GeneratorPlace, begin_work, wait_for_all
from r1mega.rollout.sampler import GroupSampler, request_seed
from r1mega.rollout.work_sharing import NOBODY, WorkSharing
from r1mega.types import Prompt, Reward, RewardStatus, RolloutGroup

SIGNAL = 1e-6
"""By which rewards of a group differ at least, as a share of the largest: less is the rounding of a reward model's batches."""


def carries_signal(group: RolloutGroup) -> bool:
    """Whether the group's scored responses differ in reward by more than rounding; only then do its advantages say something
    (DAPO, section 3.2).
    """
    return carry_signal(group.rewards)


def carry_signal(rewards: Iterable[Reward | None]) -> bool:
    """The same of the rewards of a group. None: not scored yet."""
    scored = (reward.value for reward in rewards if reward is not None and reward.status == RewardStatus.OK)
    values = [value for value in scored if value is not None]
    return bool(values) and max(values) - min(values) > SIGNAL * max(map(abs, values))


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one step sampled. groups: this generator's that are trained on; sampled: with those that dynamic sampling dropped.

    num_sampled: groups over all generators, in num_rounds rounds. is_first: False where these are copies, on the further
    tensor-parallel ranks of a generator. figures: further metrics, over all generators.
    """

    groups: list[RolloutGroup]
    sampled: list[RolloutGroup]
    num_sampled: int
    num_rounds: int
    is_first: bool
    figures: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        return {
            "group/num_sampled": float(self.num_sampled),
            "group/num_rounds": float(self.num_rounds),
            **self.figures,
        }


class GroupCollector:
    """Draws prompts and samples this generator's share of them.

    Generators begin with contiguous blocks of a round's prompts, as far as they have seats, and take the others as they become
    free. A prompt's seed follows from its place among all of the step, so that the step's groups in the order of their slots
    depend neither on how many generators there are nor on how fast they are.
    """

    def __init__(self, sampler: GroupSampler, prompts: Sequence[Prompt], cursor: PromptCursor, config: RLStage):
        self._sampler, self._prompts, self._cursor, self._config = sampler, prompts, cursor, config
        self._place = GeneratorPlace.of_this_rank(config.rollout.tp)
        self._work = WorkSharing(config.rollout, self._place, sampler.holds)

    def collect(self, step: int) -> Rollout:
        """The step's scored groups: num_prompts over all generators, or fewer when dynamic sampling gave up."""
        dynamic, wanted = self._config.algorithm.dynamic_sampling, self._config.rollout.num_prompts
        kept: list[RolloutGroup] = []
        sampled: list[RolloutGroup] = []
        num_sampled = num_rounds = total = 0
        begin_work()
        while total < wanted and num_rounds < (dynamic.max_rounds if dynamic.enabled else 1):
            groups = self._sample_round(step, num_sampled, wanted - total)
            num_sampled += wanted - total
            num_rounds += 1
            sampled += groups
            kept += [g for g in groups if carries_signal(g)] if dynamic.enabled else groups
            wait_for_all("rollout", f"the rollout of step {step}")
            self._work.finish()
            total = self._over_replicas(len(kept))
        kept = kept if total else groups  # a step without any signal still updates (KL) and is seen in the metrics
        return Rollout(kept, sampled, num_sampled, num_rounds, self._place.is_first)

    def state(self) -> None:
        """What a checkpoint keeps: nothing outlives a step."""

    def _sample_round(self, step: int, first_slot: int, count: int) -> list[RolloutGroup]:
        drawn = self._cursor.draw(count)  # the same on every rank
        slots = range(first_slot, first_slot + count)
        seeds = [request_seed(self._config.seed, step, slot) for slot in slots]
        owners = self._work.holders(step, seeds)
        groups, left = [], []
        blocks = self._place.owners(count)  # of all: what no kill interrupted has the same generators
        for slot, seed, index, owner, block in zip(slots, seeds, drawn, owners, blocks, strict=True):
            group = self._sampler.open(self._prompts[index], seed, step, slot, owner, index)
            groups.append(group)
            if owner == NOBODY:
                group.owner = block
                left.append(group)
        more = self._work.share(left, [owners.count(replica) for replica in range(self._place.num_replicas)])
        return self._sampler.sample([g for g in groups if g.owner == self._place.replica], step - 1, more)

    def _over_replicas(self, count: int) -> int:
        total = torch.tensor([count if self._place.is_first else 0])
        dist.all_reduce(total)
        return int(total)
