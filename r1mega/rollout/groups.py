"""Collecting a step's groups: which prompts this rank samples, and dynamic sampling (refill of groups without signal)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from r1mega.config.stages.rl import RLStage
from r1mega.data.cursor import PromptCursor
from r1mega.platform.groups import wait_for_all
from r1mega.rollout.sampler import GroupSampler, request_seed
from r1mega.types import Prompt, RewardStatus, RolloutGroup


def carries_signal(group: RolloutGroup) -> bool:
    """Whether the group's scored responses differ in reward; only then are its advantages not zero (DAPO, section 3.2)."""
    values = {reward.value for reward in group.rewards if reward.status == RewardStatus.OK}
    return len(values) > 1


class GroupCollector:
    """Draws prompts and samples this generator replica's share of them.

    Generator replicas (ranks // rollout.tp) take contiguous blocks of the step's prompts, and a prompt's seed follows
    from its place among all, so that the step's groups in rank order do not depend on how many replicas there are.
    """

    def __init__(self, sampler: GroupSampler, prompts: Sequence[Prompt], cursor: PromptCursor, config: RLStage):
        self._sampler, self._prompts, self._cursor, self._config = sampler, prompts, cursor, config
        tp = config.rollout.tp
        self._replica, self._num_replicas = dist.get_rank() // tp, dist.get_world_size() // tp
        self.contributes = dist.get_rank() % tp == 0
        """False on the further tensor-parallel ranks of a generator: their groups are copies."""
        self._num_sampled = self._num_rounds = 0
        self.sampled: list[RolloutGroup] = []
        """This replica's groups of the last step, those that dynamic sampling dropped included."""

    def collect(self, step: int) -> list[RolloutGroup]:
        """This replica's groups of the step: num_prompts over all replicas, or fewer when dynamic sampling gave up."""
        dynamic, wanted = self._config.algorithm.dynamic_sampling, self._config.rollout.num_prompts
        kept: list[RolloutGroup] = []
        self._num_sampled = self._num_rounds = 0
        self.sampled = []
        total = 0
        while total < wanted and self._num_rounds < (dynamic.max_rounds if dynamic.enabled else 1):
            groups = self._sample_round(step, wanted - total)
            self.sampled += groups
            kept += [g for g in groups if carries_signal(g)] if dynamic.enabled else groups
            self._num_rounds += 1
            wait_for_all("rollout", f"the rollout of step {step}")
            total = self._over_replicas(len(kept))
        return kept if total else groups  # a step without any signal still updates (KL) and is seen in the metrics

    def metrics(self) -> dict[str, float]:
        """How much was sampled for the last step, over all replicas."""
        return {"group/num_sampled": float(self._num_sampled), "group/num_rounds": float(self._num_rounds)}

    def _sample_round(self, step: int, count: int) -> list[RolloutGroup]:
        first_slot = self._num_sampled
        drawn = self._cursor.draw(count)  # the same on every rank
        self._num_sampled += count
        share = range(count * self._replica // self._num_replicas, count * (self._replica + 1) // self._num_replicas)
        return self._sampler.sample(
            [self._prompts[drawn[i]] for i in share],
            [request_seed(self._config.seed, step, first_slot + i) for i in share],
            policy_version=step - 1,
        )

    def _over_replicas(self, count: int) -> int:
        total = torch.tensor([count if self.contributes else 0])
        dist.all_reduce(total)
        return int(total)
