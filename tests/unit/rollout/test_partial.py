"""Partial rollouts: where a step is cut, how old its tokens may be, and that neither speeds, layouts nor kills change it."""

from __future__ import annotations

import random
import time
from types import MappingProxyType

import pytest
import torch.distributed as dist

from r1mega.config.schema import PartialRollouts
from r1mega.errors import DataError, RewardError
from r1mega.platform import groups
from r1mega.rollout import partial as partial_rollouts
from r1mega.rollout.engine import continued_seed, sample_seed
from r1mega.rollout.groups import GroupCollector, carries_signal
from r1mega.rollout.open_groups import NEVER, find_cut
from r1mega.rollout.sampler import StepCut
from r1mega.types import (
    GenerationRequest,
    Reward,
    RewardStatus,
    SamplingSettings,
)
from tests.dist.launch import launch
from tests.unit.rollout.scripted import (
    EVERY,
    Run,
    check_tokens,
    facts,
)


def versions(response, group):
    return response.policy_versions or (group.policy_version,) * len(response.token_ids)


@pytest.mark.parametrize("on_stale", ["finish", "drop"])
@pytest.mark.parametrize(("overdraw", "max_staleness"), [(1.5, 1), (2.0, 1), (3.0, 2), (2.5, 4)])
def test_each_token_is_of_the_weights_that_it_says_and_none_is_too_old(alone, overdraw, max_staleness, on_stale):
    run = Run(None, overdraw=overdraw, max_staleness=max_staleness, on_stale=on_stale)
    seen, most = [], 0
    for step in range(1, 25):
        rollout = run.step(step)
        assert [group.slot for group in rollout.groups] == [0, 1, 2, 3]
        for group in rollout.groups:
            for response, reward in zip(group.responses, group.rewards, strict=True):
                of = versions(response, group)
                assert response.finish_reason == "stop" and reward.value == len(response.token_ids) % 3
                assert response.log_probs == tuple(-float(v) for v in of)
                assert list(of) == sorted(of)
                assert step - 1 - min(of) <= max_staleness
                check_tokens(response.token_ids, of)
                most = max(most, step - 1 - min(of))
                seen.append(len(response.token_ids))
        assert rollout.metrics()["staleness/max"] <= max_staleness
    assert most > 0 and (max(seen) >= 30 or on_stale == "drop")


def test_overdraw_is_the_decimal_number_that_is_written(alone):
    """As binary fractions, 1.1 of 10 prompts are more than 11."""
    for hundredths in range(100, 301):
        partial = PartialRollouts(overdraw=float(f"{hundredths // 100}.{hundredths % 100:02d}"))
        for wanted in range(1, 101):
            assert partial.open_groups(wanted) == -(-hundredths * wanted // 100)
    assert Run(None, keys={"num_prompts": 10}, overdraw=1.1).step(1).metrics()["group/num_sampled"] == 11


def test_groups_without_signal_are_left_out_and_others_drawn(alone):
    """Each group is trained on, left out or given up once, and every step has as many with signal as it trains on."""
    run, seen, left_out = Run(None, dynamic=True, overdraw=2.0, max_staleness=2), [], 0
    for step in range(1, 25):
        rollout = run.step(step)
        assert len(rollout.groups) == 4 and all(carries_signal(group) for group in rollout.groups)
        others = [group for group in rollout.sampled if group not in rollout.groups]
        assert not any(carries_signal(group) for group in others)
        left_out += len(others)
        for group in rollout.sampled:
            assert all(step - 1 - min(versions(response, group)) <= 2 for response in group.responses)
            seen.append(group.responses[0].token_ids)
    assert left_out > 5 and len(set(seen)) == len(seen)


def test_a_step_in_which_nothing_carries_a_signal_is_seen(alone):
    run = Run(None, dynamic=True, overdraw=2.0, max_staleness=2)
    run.sampler._scorer.submit = lambda *_: 0
    run.sampler._scorer.rewards.append(Reward(1.0, {}, RewardStatus.OK))
    rollout = run.step(1)
    assert len(rollout.groups) == 4 and len(rollout.sampled) == 8 == rollout.metrics()["group/num_sampled"]
    assert run.step(2).metrics()["group/num_sampled"] == 8.0


def test_a_step_trains_on_what_is_whole_first_and_takes_less_time(alone):
    """The lengths of what is trained on are, in the long run, those that the seeds give; the passes are far fewer."""
    waiting, partial = Run(None), Run(None, overdraw=2.0, max_staleness=3)
    assert isinstance(waiting.collector, GroupCollector)
    sums = [0, 0]
    for step in range(1, 41):
        for i, run in enumerate((waiting, partial)):
            sums[i] += sum(len(r.token_ids) for group in run.step(step).groups for r in group.responses)
    busy = [sums[0] / waiting.engine.passes, sums[1] / partial.engine.passes]
    assert busy[1] > 1.5 * busy[0]
    assert 0.85 < sums[1] / sums[0] < 1.15  # no preference for short ones


def test_find_cut_is_the_smallest_that_holds():
    """Against a search over all numbers of tokens, of drawn groups, by the definition: a schedule must exist."""
    rng = random.Random(0)
    for _ in range(400):
        wanted, step = rng.randint(1, 4), 10
        deadlines = sorted(rng.randint(step, step + 3) for _ in range(wanted + rng.randint(0, 6)))
        clocks = [rng.choice([0, rng.randint(1, 40), NEVER]) for _ in deadlines]
        frontier = rng.choice([rng.randint(0, 48), NEVER if NEVER not in clocks else 48])

        def holds(length, deadlines=deadlines, clocks=clocks, wanted=wanted, step=step):
            whole = [place for place, clock in enumerate(clocks) if clock <= length]
            if len(whole) < wanted:
                return False
            left = [d for place, d in enumerate(deadlines) if place not in whole[:wanted]]
            return all(place // wanted + step + 1 <= due for place, due in enumerate(left))

        expected = next((n for n in range(0, min(frontier, 80) + 1, EVERY) if holds(n)), None)
        found = find_cut(clocks, deadlines, frontier, step, wanted, EVERY)
        if expected is not None or frontier < NEVER:
            assert found == expected
        # of groups that are left out: as if those that are whole by then had not been drawn
        vain = {place for place, clock in enumerate(clocks) if clock < NEVER and rng.random() < 0.4}

        def holds_without(n, clocks=clocks, deadlines=deadlines, vain=vain, holds=holds):
            kept = [place for place, clock in enumerate(clocks) if place not in vain or clock > n]
            return holds(n, [deadlines[p] for p in kept], [clocks[p] for p in kept])

        expected = next((n for n in range(0, min(frontier, 80) + 1, EVERY) if holds_without(n)), None)
        found = find_cut(clocks, deadlines, frontier, step, wanted, EVERY, vain)
        if expected is not None or frontier < NEVER:
            assert found == expected
        elif len(clocks) - len(vain) < wanted and vain:  # all is whole, and too few carry a signal
            assert found == max(-(-clock // EVERY) * EVERY for clock in clocks)


QUEUES = {"num_prompts": 12, "max_num_seqs": 5}
"""Three generators have room for two groups each at the start: six of twelve wait."""


def steps_of(
    slots_by_rank,
    run_dir=None,
    progress=None,
    first=1,
    last=8,
    seconds=0.0,
    keys=MappingProxyType({}),
    overdraw=2.0,
    dynamic=False,
):
    """What each step of a run had on this rank, and what a checkpoint after the last one keeps. seconds: of a pass, of rank 0."""
    groups.init_distributed()
    slots = slots_by_rank[dist.get_rank()]
    seconds = 0.0 if dist.get_rank() else seconds
    staleness = 2 if overdraw > 1 else 1
    run = Run(run_dir, progress, first - 1, slots, seconds, keys, dynamic, overdraw=overdraw, max_staleness=staleness)
    groups.wait_for_all("startup", "all have read the journal")
    found = [facts(run.step(step)) for step in range(first, last + 1)]
    run.journal.close()
    return found, run.progress()


def check_equal(ranks, whole):
    """Over the ranks together, the steps of one."""
    for step, (every, same) in enumerate(whole):
        lines = (line for found, _ in ranks for line in found[step][0])
        assert sorted(lines, key=lambda line: line[0]) == every
        assert all(found[step][1] == same for found, _ in ranks)


@pytest.mark.heavy
def test_neither_speed_nor_number_of_generators_changes_a_step(tmp_path):
    """One generator with room for all, one that queues, three that are unequal; two, and from their checkpoint on three."""
    ((whole, _),) = launch(steps_of, 1, [1000])
    check_equal(launch(steps_of, 1, [5]), whole)
    check_equal(launch(steps_of, 3, [7, 1000, 3]), whole)
    two = launch(steps_of, 2, [1000, 9], tmp_path, None, 1, 5)
    check_equal(two, whole[:5])
    check_equal(launch(steps_of, 3, [7, 1000, 3], tmp_path, two[0][1], 6, 8), whole[5:])


@pytest.mark.heavy
def test_a_slow_generator_leaves_groups_to_others_and_changes_none(tmp_path):
    """Groups beyond the seats go to who has room; then from a checkpoint on with what is on disk, by others or by more."""
    ((whole, progress),) = launch(steps_of, 1, [5], None, None, 1, 4, 0.0, QUEUES, 1.0)
    slow = launch(steps_of, 3, [5] * 3, tmp_path, None, 1, 4, 0.01, QUEUES, 1.0)
    check_equal(slow, whole)
    taken = [[len(every) // 3 for every, _ in steps] for steps, _ in slow]
    assert all(sum(counts) == 12 for counts in zip(*taken, strict=True))
    assert sum(taken[0]) < 4 * 12 / 3  # of the slow one alone: which of the others was faster is the machine's business
    for ranks in (3, 2):  # read where they were made, or by all
        check_equal(launch(steps_of, ranks, [5] * ranks, tmp_path, None, 1, 4, 0.0, QUEUES, 1.0), whole)
    kept = launch(steps_of, 3, [5] * 3, None, None, 1, 1, 0.01, {**QUEUES, "work_sharing": False}, 1.0)
    check_equal(kept, whole[:1])
    assert [len(steps[0][0]) for steps, _ in kept] == [12] * 3


@pytest.mark.heavy
def test_groups_in_the_making_are_shared_too(tmp_path):
    """Each has the steps of one generator with room for all, though who samples what is a matter of speed; and goes on so."""
    keys = {"num_prompts": 6, "max_num_seqs": 5}
    ((whole, _),) = launch(steps_of, 1, [1000], None, None, 1, 4, 0.0, keys, 2.0, True)
    check_equal(
        launch(steps_of, 3, [5, 1000, 2], None, None, 1, 4, 0.003, keys, 2.0, True), whole
    )  # without signal: out
    ((whole, _),) = launch(steps_of, 1, [1000], None, None, 1, 6, 0.0, keys)
    for place, slots in enumerate(([5, 5], [5, 1000, 2])):
        run_dir, ranks = tmp_path / str(place), len(slots)
        first = launch(steps_of, ranks, slots, run_dir, None, 1, 3, 0.003, keys)
        check_equal(first, whole[:3])
        progress = first[0][1]
        assert all(theirs == progress for _, theirs in first)
        check_equal(launch(steps_of, ranks, slots, run_dir, progress, 4, 6, 0.003, keys), whole[3:])
        more = ranks + place  # as many: each reads what it wrote; more: all read all
        check_equal(launch(steps_of, more, [5] * more, run_dir, progress, 4, 6, 0.0, keys), whole[3:])


def test_a_step_that_no_response_can_end_says_so(alone, tmp_path):
    run = Run(tmp_path, overdraw=2.0, max_staleness=1)
    run.step(1)
    for group in run.collector._open:
        group.born = -1  # all of them are overdue, more than a step trains on
    with pytest.raises(DataError, match=r"remove RUN_DIR/rollouts/step_000002"):
        run.step(2)


def test_waiting_for_other_generators_is_timed_apart_and_names_them(alone, monkeypatch):
    """With the time-out of rollouts, which names who is missing; the step's own wait at its end is no part of a phase."""
    waits = []

    def wait(kind, what):
        waits.append((kind, what))
        time.sleep(0.01)

    monkeypatch.setattr(partial_rollouts, "wait_for_all", wait)
    run = Run(None, overdraw=2.0, max_staleness=2)
    run.step(1)
    assert set(waits) == {("rollout", "the rollout of step 1")}
    assert run.timer.seconds("rollout_wait") >= 0.01 * (len(waits) - 1) > 0


def test_what_goes_on_has_a_seed_of_its_own():
    def seeds(seed, begun):
        request = GenerationRequest((1,), 1, seed, SamplingSettings(max_tokens=9), 2, begun)
        return continued_seed(request, 2)

    found = [seeds(5, (7,) * n) for n in range(8)]
    assert found[0] == sample_seed(5, 2) and len(set(found)) == 8
    assert seeds(5, (1, 2)) == found[2] != seeds(6, (1, 2))


def test_a_generator_without_anything_to_sample_is_called_all_the_same(alone):
    """Others may share its passes (rollout.ep above rollout.tp), and would wait for it."""
    run = Run(None, overdraw=1)
    assert run.sampler.sample([], 0) == [] and run.engine.calls == [0]
    going_on = StepCut(EVERY, lambda fewest, held: (None if fewest < NEVER else EVERY, False))
    assert run.sampler.advance([], 0, going_on, more=list) == [] and run.engine.calls == [0, 0]


def test_an_error_in_what_takes_a_response_is_told_to_the_engine(alone):
    """It ends the passes that others share with it."""
    run = Run(None, overdraw=1)

    def submit(*_):
        raise RewardError("no such kind")

    run.sampler._scorer.submit = submit
    with pytest.raises(RewardError, match="no such kind") as caught:
        run.step(1)
    assert run.engine.thrown is caught.value
