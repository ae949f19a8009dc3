"""Partial rollouts: a step ends when enough groups are whole, and what is unfinished goes on in the next one, by its weights.

What a step is trained on follows from its responses alone (`open_groups.find_cut`): how many generators there are, how fast they
are and in which batches they sample makes no difference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from r1mega.config.stages.rl import RLStage
from r1mega.data.cursor import PromptCursor
from r1mega.errors import DataError
from r1mega.platform.groups import GeneratorPlace, begin_work, wait_for_all
from r1mega.rollout.groups import GroupCollector, Rollout, carry_signal
from r1mega.rollout.open_groups import NEVER, OpenGroup, OpenState, find_cut
from r1mega.rollout.sampler import GroupSampler, StepCut, request_seed
from r1mega.rollout.work_sharing import NOBODY, SharedGroups, WorkSharing
from r1mega.types import Prompt

TAKEN = NEVER - 1
"""The clock of a group that some generator has, and of which not all is finished; NEVER: none has it."""


class PartialCollector:
    """Samples up to `overdraw` times a step's prompts at once, and trains on the first whole ones.

    Whole groups are taken oldest first. One of which a token is as stale as `max_staleness` allows is finished in this step,
    or given up and its prompt drawn again, by `on_stale`. With dynamic sampling, groups without signal are left out as soon as
    they are whole, and others are drawn in the next step.
    """

    def __init__(self, sampler: GroupSampler, prompts: Sequence[Prompt], cursor: PromptCursor, config: RLStage):
        self._sampler, self._prompts, self._cursor, self._config = sampler, prompts, cursor, config
        self._partial, self._wanted = config.rollout.partial, config.rollout.num_prompts
        self._leaves_out = config.algorithm.dynamic_sampling.enabled
        self._place = GeneratorPlace.of_this_rank(config.rollout.tp)
        self._work = WorkSharing(config.rollout, self._place, sampler.holds)
        self._open: list[OpenGroup] = []  # of all generators, oldest first; the same list on every rank
        self._redraw: list[int] = []
        self._step = 0

    def collect(self, step: int) -> Rollout:
        """The step's scored groups: num_prompts over all generators, in the order in which their prompts were drawn."""
        begin_work()
        num_drawn, more = self._draw(step)
        cut = StepCut(self._partial.every_tokens, functools.partial(self._decide, step), self._leaves_out)
        mine = self._sampler.advance([g for g in self._open if self._is_mine(g)], step - 1, cut, more)
        wait_for_all("rollout", f"the rollout of step {step}")
        self._work.finish()
        sampled = sum(member.clock for group in mine for member in group.members)
        chosen, vain, dropped = self._take(step)
        closed = [
            replace(group.closed(step - 1), slot=slot)
            for slot, group in enumerate([*chosen, *vain])
            if self._is_mine(group)
        ]
        self._step = step
        figures = self._figures(step, chosen, dropped, sampled, cut)
        groups = [group for group in closed if group.slot < len(chosen)]
        return Rollout(groups, closed, num_drawn, 1, self._place.is_first, figures)

    def state(self) -> OpenState:
        """What a checkpoint keeps beside the journal."""
        groups = [(g.prompt_index, g.seed, g.born, g.slot, g.owner, g.is_whole) for g in self._open]
        return OpenState(
            step=self._step, num_replicas=self._place.num_replicas, groups=groups, redraw=list(self._redraw)
        )

    def restore(self, state: OpenState) -> None:
        """Go on from a checkpoint's, with any number of generators. CheckpointError when the journal lacks what it began."""
        self._redraw, self._step = list(state["redraw"]), state["step"]
        alike = state["num_replicas"] == self._place.num_replicas
        for place, (index, seed, born, slot, owner, is_whole) in enumerate(state["groups"]):
            owner = owner if alike else place % self._place.num_replicas
            group = self._sampler.open(self._prompts[index], seed, born, slot, owner, index)
            group.is_whole = is_whole
            if self._is_mine(group):
                self._sampler.recall(group, self._step)
            self._open.append(group)

    def _draw(self, step: int) -> tuple[int, SharedGroups | None]:
        """Fill up the groups in the making; how many are new, and those of them that wait for a seat. Each goes to the generator
        with the fewest to sample, or to the one that has some of it from an earlier start.
        """
        count = self._partial.open_groups(self._wanted) - len(self._open)
        again, self._redraw = self._redraw[:count], self._redraw[count:]
        load = [0] * self._place.num_replicas
        for group in self._open:
            load[group.owner] += not group.is_whole
        drawn = [*again, *self._cursor.draw(count - len(again))]
        seeds = [request_seed(self._config.seed, step, slot) for slot in range(count)]
        holders = self._work.holders(step, seeds)
        for owner in holders:
            if owner != NOBODY:
                load[owner] += 1
        begun, new = list(load), []
        for slot, (index, seed, owner) in enumerate(zip(drawn, seeds, holders, strict=True)):
            group = self._sampler.open(self._prompts[index], seed, step, slot, owner, index)
            if owner == NOBODY:
                group.owner = load.index(min(load))
                load[group.owner] += 1
                new.append(group)
            self._open.append(group)
        # where enough are whole already the step may end before anything is sampled, and nobody would take any
        ends_at_once = sum(group.is_whole for group in self._open) >= self._wanted
        return count, None if ends_at_once else self._work.share(new, begun)

    def _decide(self, step: int, fewest: int, held: int) -> tuple[int | None, bool]:
        """See StepCut.decide; a collective call. DataError when all there is does not tell where the step ends."""
        count = len(self._open)
        known = torch.full((2 * count + 2,), NEVER)
        for place, group in enumerate(self._open):
            if self._is_mine(group):
                known[place] = min(group.clock, TAKEN)
                if self._leaves_out and group.clock < TAKEN and not carry_signal(m.reward for m in group.members):
                    known[count + place] = 0
        known[-2], known[-1] = fewest, held
        wait_for_all("rollout", f"the rollout of step {step}")
        dist.all_reduce(known, dist.ReduceOp.MIN)
        *both, sampling, holding = known.tolist()
        clocks, vain = both[:count], {place for place, value in enumerate(both[count:]) if value == 0}
        if NEVER in clocks:  # it waits for a seat: none of its tokens is there yet
            sampling = 0
        clocks = [clock if clock < TAKEN else NEVER for clock in clocks]
        finishes = self._partial.on_stale == "finish"
        deadlines = [self._deadline(group) if finishes else NEVER for group in self._open]
        frontier = min(sampling, holding)
        length = find_cut(clocks, deadlines, frontier, step, self._wanted, self._partial.every_tokens, vain)
        if length is not None:
            for place, (group, clock) in enumerate(zip(self._open, clocks, strict=True)):
                group.is_whole = clock <= length
                group.is_vain = group.is_whole and place in vain
        elif frontier >= NEVER:
            raise DataError(
                f"step {step}: no response is unfinished, and yet more groups are due than a step trains on; restore or remove "
                f"RUN_DIR/rollouts/step_{step:06d} and start again, or go back to an earlier checkpoint"
            )
        return length, sampling < NEVER

    def _take(self, step: int) -> tuple[list[OpenGroup], list[OpenGroup], list[OpenGroup]]:
        """(what is trained on, what carries no signal, what is too stale to go on), taken out of those in the making. A step without
        any signal trains on what there is, and is seen in the metrics.
        """
        vain = [group for group in self._open if group.is_vain]
        chosen = [group for group in self._open if group.is_whole and not group.is_vain][: self._wanted]
        if not chosen:
            chosen, vain = vain[: self._wanted], vain[self._wanted :]
        gone = {id(group) for group in [*chosen, *vain]}
        left = [group for group in self._open if id(group) not in gone]
        dropped = [group for group in left if self._deadline(group) <= step]
        self._open = [group for group in left if self._deadline(group) > step]
        self._redraw += [group.prompt_index for group in dropped]
        return chosen, vain, dropped

    def _deadline(self, group: OpenGroup) -> int:
        """The last step that may train on it."""
        return group.born + self._partial.max_staleness

    def _is_mine(self, group: OpenGroup) -> bool:
        return group.owner == self._place.replica

    def _figures(
        self, step: int, chosen: list[OpenGroup], dropped: list[OpenGroup], sampled: int, cut: StepCut
    ) -> dict[str, float]:
        """Over all generators; a collective call."""
        own = self._place.is_first
        lags = [step - 1 - v for g in chosen if own and self._is_mine(g) for m in g.members for v in m.versions]
        lost = sum(len(m.token_ids) for g in dropped if own and self._is_mine(g) for m in g.members)
        sums = torch.tensor(
            [len(lags), sum(lags), sum(lag > 0 for lag in lags), lost, sampled * own, cut.surplus * own],
            dtype=torch.float64,
        )
        most = torch.tensor(max(lags, default=0))
        dist.all_reduce(sums)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        tokens, lag, stale, lost_tokens, new, surplus = sums.tolist()
        return {
            "staleness/mean": lag / max(tokens, 1),
            "staleness/max": float(most),
            "staleness/stale_fraction": stale / max(tokens, 1),
            "partial/open_groups": float(len(self._open)),
            "partial/cut_tokens": float(cut.length or 0),
            "partial/surplus_tokens": surplus,
            "partial/dropped_tokens": lost_tokens,
            "tokens/rollout": new,
        }


def build_collector(
    sampler: GroupSampler, prompts: Sequence[Prompt], cursor: PromptCursor, config: RLStage, state: OpenState | None
) -> GroupCollector | PartialCollector:
    """The one that the config asks for, where a checkpoint left off. Raises as `PartialCollector.restore` does."""
    if not config.rollout.partial.is_on:
        return GroupCollector(sampler, prompts, cursor, config)
    collector = PartialCollector(sampler, prompts, cursor, config)
    if state is not None:
        collector.restore(state)
    return collector
