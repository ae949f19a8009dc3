"""Batches of messages: whatever a plan asks, both sides of every message meet, and no batch is larger than it may be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from r1mega.weights.transport import Message, Side, in_batches

Batches = list[tuple[list[Message], list[Message]]]
Cut = Callable[[Side, Side, int, int, int], Batches]


def draw_buckets(rng: random.Random, num_ranks: int, num_buckets: int) -> list[set[tuple[int, int]]]:
    """Which rank sends which other one a message, bucket by bucket; some ranks send to all, some buckets are thin."""
    buckets = []
    for _ in range(num_buckets):
        density = rng.choice((0.05, 0.3, 1.0))
        pairs = {(s, r) for s in range(num_ranks) for r in range(num_ranks) if s != r and rng.random() < density}
        hub = rng.randrange(num_ranks)
        buckets.append(pairs | {(hub, r) for r in range(num_ranks) if r != hub and rng.random() < 0.5})
    return buckets


def batches_of(rank: int, num_ranks: int, buckets: Sequence[set[tuple[int, int]]], limit: int, cut: Cut) -> list[set]:
    """The batches that a rank posts one after the other, as sets of (bucket, sender, receiver)."""
    posted = []
    for number, pairs in enumerate(buckets):
        receives = Side(tuple(Message(s, 0, 1, ()) for s, r in sorted(pairs) if r == rank))
        sends = Side(tuple(Message(r, 0, 1, ()) for s, r in sorted(pairs) if s == rank))
        for received, sent in cut(receives, sends, rank, num_ranks, limit):
            assert 0 < len(received) + len(sent) <= limit
            posted.append({(number, m.rank, rank) for m in received} | {(number, rank, m.rank) for m in sent})
    return posted


def left_waiting(queues: list[list[set]]) -> int:
    """Batches that never end where a rank posts its next one only after all messages of the one before have met their
    other side, which is what NCCL's stream order makes of them (brute force, round after round).
    """
    places = [0] * len(queues)
    while True:
        posted = [queue[place] if place < len(queue) else set() for queue, place in zip(queues, places, strict=True)]
        met = {m for batch in posted for m in batch if m in posted[m[1]] and m in posted[m[2]]}
        if not met:
            return sum(len(queue) - place for queue, place in zip(queues, places, strict=True))
        for rank, batch in enumerate(posted):
            places[rank] += bool(batch) and batch <= met
            batch -= met


def cut_by_length(receives: Side, sends: Side, _rank: int, _num_ranks: int, limit: int) -> Batches:
    """What not to do: each rank cuts its own list, whatever the others have."""
    both = [(0, m) for m in receives.messages] + [(1, m) for m in sends.messages]
    parts = [both[i : i + limit] for i in range(0, len(both), limit)]
    return [([m for side, m in part if side == 0], [m for side, m in part if side == 1]) for part in parts]


@pytest.mark.parametrize("seed", range(60))
def test_both_sides_of_every_message_meet(seed):
    rng = random.Random(seed)
    num_ranks, limit = rng.randrange(2, 24), rng.choice((2, 3, 4, 8, 46))
    buckets = draw_buckets(rng, num_ranks, rng.randrange(1, 4))
    queues = [batches_of(rank, num_ranks, buckets, limit, in_batches) for rank in range(num_ranks)]
    wanted = {(number, *pair) for number, pairs in enumerate(buckets) for pair in pairs}
    for side in (1, 2):  # each message once on either side
        mine = [
            message
            for rank, queue in enumerate(queues)
            for batch in queue
            for message in batch
            if message[side] == rank
        ]
        assert len(mine) == len(wanted) and set(mine) == wanted
    assert left_waiting(queues) == 0


def test_cutting_each_list_by_its_length_would_hang():
    """The brute force can tell: of the drawn plans some hang when ranks cut without regard to each other."""
    hung = 0
    for seed in range(20):
        rng = random.Random(seed)
        buckets = draw_buckets(rng, 12, 2)
        hung += left_waiting([batches_of(rank, 12, buckets, 4, cut_by_length) for rank in range(12)]) > 0
    assert hung > 0


def test_a_plan_of_two_thousand_ranks_stays_below_the_limit():
    """One rank receives from 374 others; torch cuts its own NCCL batches at 256, as longer ones hang (pytorch#174288)."""
    rng = random.Random(0)
    receives = Side(tuple(Message(rank, 0, 1, ()) for rank in sorted(rng.sample(range(1, 2048), 374))))
    batches = in_batches(receives, Side(), 0, 2048)
    assert sum(len(received) for received, _ in batches) == 374
    assert max(len(received) for received, _ in batches) <= 256
    assert len(in_batches(Side(receives.messages[:40]), Side(), 0, 256)) <= 2
