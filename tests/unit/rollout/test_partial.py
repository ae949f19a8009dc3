"""Partial rollouts: where a step is cut, how old its tokens may be, and that neither speeds, layouts nor kills change it."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import shutil
import time
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from r1mega.config.schema import PartialRollouts, RolloutConfig
from r1mega.data.cursor import PromptCursor
from r1mega.errors import CheckpointError, DataError, RewardError
from r1mega.observe.trace import PhaseTimer
from r1mega.platform import groups
from r1mega.platform.groups import GeneratorPlace
from r1mega.rollout import partial as partial_rollouts
from r1mega.rollout.engine import continued_seed, sample_seed
from r1mega.rollout.groups import GroupCollector, carries_signal
from r1mega.rollout.journal import Place, RolloutJournal, Segment, open_journal
from r1mega.rollout.open_groups import NEVER, find_cut
from r1mega.rollout.partial import build_collector
from r1mega.rollout.sampler import GroupSampler, StepCut
from r1mega.types import (
    UNFINISHED,
    Completion,
    GenerationRequest,
    KeptIds,
    Prompt,
    Response,
    Reward,
    RewardStatus,
    SamplingSettings,
)
from tests.dist.launch import launch

PROMPTS = [Prompt(str(i), f"q{i}", ("1",), "math", None, (i,)) for i in range(40)]
TOKENIZER = SimpleNamespace(end_token_ids=(), decode=lambda tokens: " ".join(map(str, tokens)))
LONGEST = 60
EVERY = 4
HARD = {"overdraw": 2.0, "max_staleness": 2, "slots": 5}
ROOMY = {"overdraw": 2.0, "max_staleness": 2}
FILE = "start_1-0-of-1.jsonl"  # of a run of one generator, in each step's directory


@pytest.fixture
def alone():
    """A world of one process; what an engine of an earlier test left goes first."""
    groups.destroy()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def length_of(seed):
    """Long-tailed: most are short, some ten times as long."""
    rng = random.Random(seed)
    return rng.randint(30, LONGEST) if rng.random() < 0.15 else rng.randint(1, 8)


def stream_of(request, number):
    """What a response's tokens share, of one step's, over LONGEST places."""
    return sample_seed(continued_seed(request, number), *request.prompt_token_ids) % 10**9 * 100


def check_tokens(token_ids, of):
    """Each is at its place, and of one stream with its neighbours of the same weights, of another with others'."""
    assert [token % 100 for token in token_ids] == list(range(len(token_ids)))
    assert len({(token // 100, v) for token, v in zip(token_ids, of, strict=True)}) == len(set(of))
    assert len({token // 100 for token in token_ids}) == len(set(of))


def kept_of(token):
    """One id to four of them, as the token says."""
    return np.arange(1 + token % 4, dtype=np.int32) + token % 10**6


class Scripted:
    """A generator of `slots` places, a token a pass in each. A token tells its place, its prompt and the seed of its stream, and
    its log-prob the weights that sampled it. seconds: that a pass takes.
    """

    def __init__(self, slots, seconds=0.0):
        self.slots, self.seconds, self.version, self.passes, self.tokens = slots, seconds, 0, 0, 0
        self.calls, self.thrown = [], None

    def stream(self, requests, cut=None, refill=None):
        queue, count = [], 0
        self.calls.append(len(requests))

        def add(requests):
            nonlocal count
            for i, r in enumerate(requests, count):
                for n in range(r.first_sample, r.first_sample + r.num_samples):
                    queue.append((i, n, sample_seed(r.seed, n), list(r.begun), [], stream_of(r, n)))
            count += len(requests)

        add(requests)
        while True:
            while refill is not None and len(queue) < self.slots:
                refill = refill if (more := refill()) else None
                add(more)
            if not queue:
                break
            self.passes += 1
            time.sleep(self.seconds)
            for sample in queue[: self.slots]:
                index, number, seed, begun, new, stream = sample
                new.append(stream + len(begun) + len(new))
                self.tokens += 1
                if len(begun) + len(new) == length_of(seed):
                    queue[:] = [other for other in queue if other is not sample]
                    try:
                        yield Completion(index, number, self.response(new, "stop"))
                    except Exception as error:
                        self.thrown = error
                        raise
            if (
                cut is not None
                and queue
                and self.passes % cut.every == 0
                and cut.reached(min(len(s[4]) for s in queue))
            ):
                break
        for index, number, _, _, new, _ in queue:
            yield Completion(index, number, self.response(new, UNFINISHED))

    def response(self, tokens, reason):
        kept = KeptIds.of([kept_of(token) for token in tokens])
        return Response(tuple(tokens), (-float(self.version),) * len(tokens), reason, kept=kept)


class Scorer:
    def __init__(self):
        self.rewards = []

    def submit(self, prompt, response, text):
        assert text == TOKENIZER.decode(response.token_ids)
        self.rewards.append(Reward(float(len(response.token_ids) % 3), {}, RewardStatus.OK))
        return len(self.rewards) - 1

    def flush(self): ...

    def result(self, ticket):
        return self.rewards[ticket]


class Run:
    """What a stage has of its rollouts. progress: of a checkpoint, after `start` steps; keys: of `rollout`."""

    def __init__(
        self,
        run_dir,
        progress=None,
        start=0,
        slots=1000,
        seconds=0.0,
        keys=MappingProxyType({}),
        dynamic=False,
        **partial,
    ):
        rollout = RolloutConfig(
            **{"num_prompts": 4, "group_size": 3, "durable": run_dir is not None, **keys},
            partial={"every_tokens": EVERY, **partial},
        )
        self.config, self.engine = (
            SimpleNamespace(seed=1, rollout=rollout, algorithm=SimpleNamespace()),
            Scripted(slots, seconds),
        )
        self.config.algorithm.dynamic_sampling = SimpleNamespace(enabled=dynamic, max_rounds=4)
        self.timer = PhaseTimer()
        self.journal = open_journal(rollout, run_dir or "unused", start)
        self.sampler = GroupSampler(
            self.engine, TOKENIZER, Scorer(), SamplingSettings(max_tokens=LONGEST), 3, self.timer, self.journal
        )
        self.cursor = PromptCursor(len(PROMPTS), 0)
        if progress:
            self.cursor.load_state_dict(progress["cursor"])
        self.collector = build_collector(
            self.sampler, PROMPTS, self.cursor, self.config, (progress or {}).get("open_groups")
        )

    def step(self, step):
        self.engine.version = step - 1
        return self.collector.collect(step)

    def progress(self):
        """As it is in a checkpoint."""
        return json.loads(json.dumps({"cursor": self.cursor.state_dict(), "open_groups": self.collector.state()}))


def facts(rollout):
    """All that training has of a step, and what was measured of it."""
    for response in (
        r for g in rollout.groups for r in g.responses
    ):  # whatever was cut, written, read and gone on from
        wanted = [kept_of(token) for token in response.token_ids]
        assert response.kept.counts.tolist() == list(map(len, wanted))
        assert response.kept.ids.tolist() == [i for ids in wanted for i in ids]
    every = [
        (g.slot, g.prompt.id, r.token_ids, r.log_probs, r.policy_versions, r.finish_reason, t, w.value)
        for g in rollout.groups
        for r, t, w in zip(g.responses, g.texts, g.rewards, strict=True)
    ]
    same = {name: value for name, value in rollout.metrics().items() if name != "partial/surplus_tokens"}
    return every, same


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


def test_neither_speed_nor_number_of_generators_changes_a_step(tmp_path):
    """One generator with room for all, one that queues, three that are unequal; two, and from their checkpoint on three."""
    ((whole, _),) = launch(steps_of, 1, [1000])
    check_equal(launch(steps_of, 1, [5]), whole)
    check_equal(launch(steps_of, 3, [7, 1000, 3]), whole)
    two = launch(steps_of, 2, [1000, 9], tmp_path, None, 1, 5)
    check_equal(two, whole[:5])
    check_equal(launch(steps_of, 3, [7, 1000, 3], tmp_path, two[0][1], 6, 8), whole[5:])


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


@pytest.mark.parametrize("partial", [{}, ROOMY, {**ROOMY, "dynamic": True}], ids=["whole", "partial", "dynamic"])
def test_a_kill_at_any_line_of_the_journal_changes_nothing(alone, tmp_path, partial):
    """Resumed from any checkpoint with what was on disk at the kill: what is sampled again is what was in flight."""
    whole, saved = Run(tmp_path / "whole", **partial), {0: None}
    expected = {}
    for step in range(1, 7):
        expected[step] = facts(whole.step(step))
        saved[step] = whole.progress()
    whole.journal.close()
    rng = random.Random(0)
    for trial in range(12):
        start, run_dir = rng.randint(0, 5), tmp_path / f"run{trial}"
        shutil.copytree(tmp_path / "whole", run_dir)
        last = rng.randint(start + 1, 6)
        file = run_dir / f"rollouts/step_{last:06d}/{FILE}"
        lines = file.read_bytes().splitlines(keepends=True)
        kept = b"".join(lines)[: rng.randint(0, sum(map(len, lines)))]
        file.write_bytes(kept)
        for step in range(last + 1, 7):
            shutil.rmtree(run_dir / f"rollouts/step_{step:06d}")
        run = Run(run_dir, copy.deepcopy(saved[start]), start, **partial)
        for step in range(start + 1, 7):
            before = run.engine.tokens
            assert facts(run.step(step)) == expected[step], (trial, start, last, step)
            if step < last:
                assert run.engine.tokens == before  # read, not sampled
        run.journal.close()


def open_tokens(run):
    """What each response in the making has, as far as it is known to the rank."""
    return [(member.token_ids, member.finish_reason) for group in run.collector._open for member in group.members]


def lines_of(run_dir, step):
    return [json.loads(line) for line in (run_dir / f"rollouts/step_{step:06d}/{FILE}").read_text().splitlines()]


def write_lines(run_dir, step, lines, name=FILE):
    path = run_dir / f"rollouts/step_{step:06d}/{name}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def whole(alone, tmp_path):
    """A run of six steps, its directory; what each step had; what a checkpoint after each keeps."""
    run, expected, saved = Run(tmp_path / "whole", **HARD), {}, {0: None}
    for step in range(1, 7):
        expected[step] = facts(run.step(step))
        saved[step] = run.progress()
    run.journal.close()
    return tmp_path / "whole", expected, saved


def test_the_last_start_counts_whatever_its_generators_wrote_to(whole, tmp_path):
    """Killed between the finished lines of a step and the unfinished ones, in a layout of two; the next start, of one, cuts what
    those had finished too far, and saves; the third reads what the second had.
    """
    directory, expected, saved = whole
    beyond = 0
    for step in range(1, 6):
        lines, run_dir = lines_of(directory, step), tmp_path / f"run{step}"
        keys = [(line["seed"], line["index"]) for line in lines if line.get("finish_reason") == "unfinished"]
        kept = lines[: next((n for n, line in enumerate(lines) if line.get("finish_reason") == "unfinished"), None)]
        beyond += sum("tokens" in line and (line["seed"], line["index"]) in keys for line in kept)
        shutil.copytree(directory, run_dir)
        for later in range(step, 7):
            shutil.rmtree(run_dir / f"rollouts/step_{later:06d}")
        (run_dir / f"rollouts/step_{step:06d}").mkdir()
        write_lines(run_dir, step, kept, "start_1-1-of-2.jsonl")
        run = Run(run_dir, copy.deepcopy(saved[step - 1]), step - 1, **HARD)
        assert facts(run.step(step)) == expected[step]
        progress = run.progress()
        run.journal.close()
        again = Run(run_dir, progress, step, **HARD)
        assert open_tokens(again) == open_tokens(run)
        assert [facts(again.step(later)) for later in range(step + 1, 7)] == [expected[n] for n in range(step + 1, 7)]
        again.journal.close()
    assert beyond  # the case did occur


@pytest.mark.parametrize("longer", [False, True], ids=["shorter", "longer"])
def test_what_is_sampled_again_may_come_out_otherwise(alone, tmp_path, monkeypatch, longer):
    """A finished line is lost and the response, sampled again, comes out with another length (other rounding), so that the step
    is cut elsewhere: what earlier starts left unfinished there is shortened or goes on, and is what the next start reads.
    """
    first = Run(tmp_path / "run", overdraw=2.0, max_staleness=2)
    cut = first.step(1).figures["partial/cut_tokens"]
    first.journal.close()
    lines, usual, seen = lines_of(tmp_path / "run", 1), length_of, 0
    for place, lost in enumerate(line for line in lines if line.get("finish_reason") == "stop"):
        run_dir, victim = tmp_path / f"run{place}", sample_seed(lost["seed"], lost["index"])
        shutil.copytree(tmp_path / "run", run_dir)
        key = (lost["seed"], lost["index"])
        write_lines(run_dir, 1, [line for line in lines if (line["seed"], line["index"]) != key])
        monkeypatch.setitem(
            globals(), "length_of", lambda s, v=victim: (usual(s) + 20 if longer else 1) if s == v else usual(s)
        )
        run = Run(run_dir, None, 0, overdraw=2.0, max_staleness=2)
        again_at = run.step(1).figures["partial/cut_tokens"]
        seen += again_at > cut if longer else again_at < cut
        for step in (1, 2):
            run.step(2) if step == 2 else None
            for tokens, _ in open_tokens(run):
                assert [token % 100 for token in tokens] == list(range(len(tokens)))
        again = Run(run_dir, run.progress(), 2, overdraw=2.0, max_staleness=2)
        assert open_tokens(again) == open_tokens(run)
        assert facts(again.step(3)) == facts(run.step(3))
        run.journal.close(), again.journal.close()
    assert seen


def test_a_segment_that_does_not_fit_is_no_part_of_a_response(whole, tmp_path):
    """Of a start that had gone on from another number of tokens: sampled anew, or refused where it cannot be."""
    directory, expected, saved = whole
    lines = lines_of(directory, 2)
    assert any(line.get("begun", 0) > 0 for line in lines)
    write_lines(directory, 2, [{**line, "begun": line["begun"] + 1} if line.get("begun") else line for line in lines])
    for step in range(3, 7):
        shutil.rmtree(directory / f"rollouts/step_{step:06d}")
    with pytest.raises(CheckpointError, match="lacks the tokens of step 2"):
        Run(directory, copy.deepcopy(saved[2]), 2, **HARD)
    run = Run(directory, copy.deepcopy(saved[1]), 1, **HARD)
    assert facts(run.step(2)) == expected[2]


def test_what_an_older_program_did_not_tell_the_ids_of_is_sampled_again(whole):
    """A run with `rollout.top_p` that goes on, or is refused where earlier steps' tokens cannot be sampled again."""
    directory, expected, saved = whole
    for step in (1, 2):
        old = [{key: value for key, value in line.items() if key != "kept"} for line in lines_of(directory, step)]
        write_lines(directory, step, old)
    for step in range(3, 7):
        shutil.rmtree(directory / f"rollouts/step_{step:06d}")
    cut = {**HARD, "keys": {"top_p": 0.9}}
    with pytest.raises(
        CheckpointError, match=r"lacks the tokens of step [12] .*which ids they were drawn from.*another run_dir"
    ):
        Run(directory, copy.deepcopy(saved[2]), 2, **cut)
    run = Run(directory, None, 0, **cut)
    assert [facts(run.step(step)) for step in (1, 2)] == [expected[1], expected[2]]  # with the ids, of all


def test_a_reward_is_of_the_segment_that_counts(alone, tmp_path):
    """Between files, whichever is read first; not of what an earlier start had sampled."""
    place, spot = Place(1, 5, 0), GeneratorPlace.of_this_rank(1)
    done, reward = Response((1, 2), (-1.0, -2.0), "stop"), Reward(1.0, {"accuracy": 1.0}, RewardStatus.OK)

    def start(*writes):
        journal = RolloutJournal(tmp_path, spot)
        for method, what, *begun in writes:
            getattr(journal, method)(place, what, *begun)
        journal.close()
        return RolloutJournal(tmp_path, spot).take(place, 0)

    assert start(("write", done, 0)).reward is None
    assert start(("write_reward", reward)) == Segment(done, reward)
    assert start(("write", replace(done, finish_reason=UNFINISHED), 0)).reward is None
    assert start(("write", done, 0), ("write_reward", reward)) == Segment(done, reward)


def test_what_is_not_finite_or_no_text_is_written_and_read(alone, tmp_path):
    place, spot = Place(1, 5, 0), GeneratorPlace.of_this_rank(1)
    journal = RolloutJournal(tmp_path, spot)
    journal.write(place, Response((1, 2, 3), (float("nan"), float("-inf"), -0.5), "stop"), 0)
    journal.write_reward(place, Reward(float("inf"), {"a": float("nan")}, RewardStatus.OK, "answer \ud800"))
    journal.close()
    found = RolloutJournal(tmp_path, spot).take(place, 0)
    assert math.isnan(found.response.log_probs[0]) and found.response.log_probs[1:] == (float("-inf"), -0.5)
    assert found.reward.value == float("inf") and math.isnan(found.reward.parts["a"])
    assert found.reward.reason == "answer \\ud800"


def test_the_journal_keeps_places_not_tokens_and_those_of_steps_to_come(whole):
    directory, _, saved = whole
    run = Run(directory, copy.deepcopy(saved[3]), 3, **HARD)
    for step in range(4, 7):
        run.step(step)
        assert {place.step for place in run.journal._segments} <= set(range(step, 7))
    run = Run(directory, copy.deepcopy(saved[3]), 3, **HARD)
    write_lines(directory, 4, lines_of(directory, 4)[1:])
    with pytest.raises(DataError, match=r"step_000004.start_1.*something changed it since"):
        run.step(4)


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


def test_a_journal_that_cannot_be_closed_keeps_nothing_else_open():
    from r1mega.stages.rl import RLTrainer  # not above: the ranks that tests start need it not

    closed = []

    def fail():
        raise OSError("disk full")

    parts = {name: SimpleNamespace(close=functools.partial(closed.append, name)) for name in ("scorer", "engine")}
    with pytest.raises(OSError, match="disk full"):
        RLTrainer.close(SimpleNamespace(journal=SimpleNamespace(close=fail), **parts))
    assert sorted(closed) == ["engine", "scorer"]


def test_what_goes_on_has_a_seed_of_its_own():
    def seeds(seed, begun):
        request = GenerationRequest((1,), 1, seed, SamplingSettings(max_tokens=9), 2, begun)
        return continued_seed(request, 2)

    found = [seeds(5, (7,) * n) for n in range(8)]
    assert found[0] == sample_seed(5, 2) and len(set(found)) == 8
    assert seeds(5, (1, 2)) == found[2] != seeds(6, (1, 2))


def test_old_steps_go_once_no_checkpoint_needs_them(alone, tmp_path):
    run = Run(tmp_path, overdraw=2.0, max_staleness=2)
    for step in range(1, 9):
        run.step(step)
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
        shutil.rmtree(tmp_path / f"checkpoints/step_{step - 1:06d}", ignore_errors=True)
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == ["step_000006", "step_000007", "step_000008"]  # what began in 6 may be unfinished after 7
    again = Run(tmp_path, run.progress(), 8, overdraw=2.0, max_staleness=2)
    assert facts(again.step(9)) == facts(run.step(9))


def test_a_checkpoint_without_its_journal_is_refused(alone, tmp_path):
    run = Run(tmp_path, overdraw=2.0, max_staleness=2)
    run.step(1)
    shutil.rmtree(tmp_path / "rollouts")
    with pytest.raises(CheckpointError, match="put RUN_DIR/rollouts back"):
        Run(tmp_path, run.progress(), 1, overdraw=2.0, max_staleness=2)


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
