"""Who sends what to whom, on drawn layouts of many ranks: once, in bounded rounds, by turns; choices in few bits."""

import random
from collections import Counter

import numpy as np
import pytest

from r1mega.errors import GenerationError
from r1mega.platform import groups
from r1mega.train.sample_exchange import SampleExchange
from r1mega.train.sample_plan import (
    RankPlace,
    Reads,
    Routing,
    Want,
    covered,
    pack_bits,
    plan_rounds,
    sample_wants,
    unpack_bits,
)
from r1mega.types import SampleSummary, TrainingSample


def draw(seed):
    """(items, ranks, limit): groups of neighbours make, any ranks want."""
    generator = random.Random(seed)
    parts, width = generator.choice([1, 3, 4]), generator.choice([1, 2, 5])
    items = {}
    for index in range(generator.randrange(30)):
        first = generator.randrange(parts) * width
        wanted = np.array(sorted(generator.sample(range(parts * width), generator.randrange(1, parts * width + 1))))
        sizes = np.array([generator.randrange(1, 100) for _ in wanted])
        items[index] = Want(np.arange(first, first + width), wanted, sizes)
    return items, parts * width, generator.choice([30, 200, 10_000])


@pytest.mark.parametrize("seed", range(40))
def test_each_rank_gets_what_it_lacks_once_in_bounded_rounds(seed):
    items, world, limit = draw(seed)
    plans = [plan_rounds(items, rank, world, limit) for rank in range(world)]
    assert len(set(map(len, plans))) == 1
    sent, loads = Counter(), Counter()
    for rank, rounds in enumerate(plans):
        for number, one in enumerate(rounds):
            for target, members in one.sends.items():
                assert plans[target][number].receives[rank] == members  # in the same order
                for index in members:
                    size = int(items[index].num_bytes[items[index].wanted.tolist().index(target)])
                    assert rank in items[index].holders
                    sent[index, target] += 1
                    loads[number, "from", rank] += size
                    loads[number, "to", target] += size
    lacking = {(i, r) for i, item in items.items() for r in set(item.wanted.tolist()) - set(item.holders.tolist())}
    assert sent == Counter(lacking)
    for number in {number for number, _, _ in loads}:
        inside = {index for plan in plans for members in plan[number].sends.values() for index in members}
        most = max(load for (place, *_), load in loads.items() if place == number)
        assert most <= limit or len(inside) == 1


def bytes_to(sample, routing, place):
    """Of one sample for one rank, span by span."""
    tokens = covered(place.reads.token_spans(sample.num_tokens))
    response = sample.num_tokens - sample.prompt_length
    kept = response + sample.num_kept if sample.num_kept else 0
    told = response + kept if place.reads.log_probs else 0
    routed = covered(place.reads.routing_spans(sample.num_tokens)) if sample.has_routing else 0
    bits = routed * len(place.columns) * routing.top_k * routing.bits
    return 4 * (tokens + told) + -(-bits // 8)


@pytest.mark.parametrize("seed", range(8))
def test_every_rank_wants_what_its_part_of_the_model_reads(seed):
    """Drawn layouts and samples of 1 token and more, also of fewer than context-parallel ranks have chunks."""
    draw = random.Random(seed)
    cp, width, routing = draw.choice([1, 2, 3, 8]), draw.choice([1, 2, 4]), Routing(draw.choice([2, 8, 384]), 3)
    places = [
        RankPlace(
            rank // width, rank % 3, tuple(range(draw.randrange(3))),
            Reads(draw.random() < 0.5, draw.random() < 0.5, cp, draw.randrange(cp)),
        )
        for rank in range(24)
    ]  # fmt: skip
    samples = [
        SampleSummary(
            draw.randrange(24 // width), slot, length, draw.randrange(length), 0.0, 0.0,
            has_routing=draw.random() < 0.5, num_kept=draw.choice([0, 7]),
        )
        for slot, length in enumerate([1, 2, 3, 16, 17, *(draw.randrange(1, 60) for _ in range(35))])
    ]  # fmt: skip
    shares = [[draw.randrange(len(samples)) for _ in range(20)] for _ in range(3)]
    wants = sample_wants(samples, places, routing, shares)
    for index, sample in enumerate(samples):
        sizes = {r: bytes_to(sample, routing, p) for r, p in enumerate(places) if index in shares[p.replica]}
        want = wants.get(index)
        assert {r: size for r, size in sizes.items() if size} == {
            r: want.bytes_to(r) for r in ([] if want is None else want.wanted.tolist())
        }
        if want is not None:
            holders = [rank for rank, place in enumerate(places) if place.generator == sample.generator]
            assert want.holders.tolist() == holders


def test_the_ranks_that_have_a_sample_take_turns():
    items = {i: Want(np.arange(4), np.arange(8), np.full(8, 10)) for i in range(6)}
    rounds = [plan_rounds(items, rank, 8, 1 << 20) for rank in range(8)]
    sent = [sum(len(members) for members in one[0].sends.values()) for one in rounds]
    assert sent == [6, 6, 6, 6, 0, 0, 0, 0]


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 9, 64, 160, 256, 257, 384, 512, 65536])
@pytest.mark.parametrize("count", [0, 1, 7, 65536 + 5])
def test_choices_take_as_few_bits_as_tell_the_experts_apart(experts, count):
    bits = Routing(experts, 1).bits
    values = np.random.default_rng(experts).integers(0, experts, count).astype("u1" if experts <= 256 else "u2")
    if count:
        values[0] = experts - 1
    packed = pack_bits(values, bits)
    assert packed.dtype == np.uint8 and len(packed) == -(-count * bits // 8)
    assert bits == 1 or 2 ** (bits - 1) < experts <= 2**bits
    found = unpack_bits(packed, bits, count)
    assert found.dtype == values.dtype and np.array_equal(found, values)


@pytest.mark.parametrize(("expert", "kind"), [(8, np.uint8), (-1, np.int16)])
def test_a_choice_that_the_model_does_not_have_is_refused(expert, kind):
    routed = np.array([0, expert, 7], dtype=kind).reshape(3, 1, 1)
    sample = TrainingSample(np.arange(4, dtype=np.int32), 1, 0.0, np.zeros(3, np.float32), routed)
    groups.init_distributed()
    try:
        with pytest.raises(GenerationError, match=f"rank 0 chose expert {expert} for a token, the model .* has 8,"):
            SampleExchange([RankPlace(0, 0, (0,))], Routing(8, 1)).index([sample])
    finally:
        groups.destroy()
