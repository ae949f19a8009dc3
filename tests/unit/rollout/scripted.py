"""A scripted generator, and what a stage has of its rollouts: responses are told from their seeds alone."""

from __future__ import annotations

import json
import random
import time
from types import MappingProxyType, SimpleNamespace

import numpy as np

from r1mega.config.schema import RolloutConfig
from r1mega.data.cursor import PromptCursor
from r1mega.observe.trace import PhaseTimer
from r1mega.rollout.engine import continued_seed, sample_seed
from r1mega.rollout.journal import open_journal
from r1mega.rollout.partial import build_collector
from r1mega.rollout.sampler import GroupSampler
from r1mega.types import (
    UNFINISHED,
    Completion,
    KeptIds,
    Prompt,
    Response,
    Reward,
    RewardStatus,
    SamplingSettings,
)

PROMPTS = [Prompt(str(i), f"q{i}", ("1",), "math", None, (i,)) for i in range(40)]
TOKENIZER = SimpleNamespace(end_token_ids=(), decode=lambda tokens: " ".join(map(str, tokens)))
LONGEST = 60
EVERY = 4
HARD = {"overdraw": 2.0, "max_staleness": 2, "slots": 5}
ROOMY = {"overdraw": 2.0, "max_staleness": 2}
FILE = "start_1-0-of-1.jsonl"  # of a run of one generator, in each step's directory


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
