"""The packing plan: every sample once, within capacity, balanced; and the packed tensors against plain loops."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.errors import ConfigError
from r1mega.train.packing import best_fit, build_microbatch, plan_packing, split_minibatches

CAPACITY = 64


@given(
    st.lists(st.integers(1, CAPACITY), min_size=1, max_size=80),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 9),
)
@settings(max_examples=150, deadline=None)
def test_every_sample_once_within_capacity_and_equal_counts(lengths, num_minibatches, num_ranks, multiple, least):
    minibatches = split_minibatches(len(lengths), num_minibatches, "seed")
    plan = plan_packing(lengths, minibatches, CAPACITY, num_ranks, multiple, least)
    seen = []
    for wanted, ranks in zip(minibatches, plan.bins, strict=True):
        assert len(ranks) == num_ranks
        assert len({len(bins) for bins in ranks}) == 1, "ranks must run equally many microbatches"
        assert len(ranks[0]) % multiple == 0
        # enough of them, but none only to be empty: the next smaller multiple is below `least`, or all that samples can fill
        most = len(wanted) // (num_ranks * multiple) * multiple
        assert len(ranks[0]) >= min(least, most)
        if len(wanted) >= num_ranks * len(ranks[0]):
            assert all(members for bins in ranks for members in bins)
        members = [i for bins in ranks for members in bins for i in members]
        assert sorted(members) == sorted(wanted)
        assert all(sum(lengths[i] for i in members) <= CAPACITY for bins in ranks for members in bins)
        seen += members
    assert sorted(seen) == list(range(len(lengths)))
    assert 0 < plan.fill_fraction <= 1


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_best_fit_stays_within_its_bound(lengths):
    """Best-fit decreasing uses at most 11/9 OPT + 6/9 bins; OPT by brute force over assignments is at least the volume."""

    def optimum(items, bins):
        if not items:
            return len(bins)
        best = len(lengths)
        first, rest = items[0], items[1:]
        for i, used in enumerate(bins):
            if used + first <= CAPACITY:
                best = min(best, optimum(rest, bins[:i] + [used + first] + bins[i + 1 :]))
        return min(best, optimum(rest, [*bins, first])) if len(bins) + 1 < best else best

    exact = optimum(sorted(lengths, reverse=True), [])
    assert len(best_fit(lengths, range(len(lengths)), CAPACITY)) <= 11 / 9 * exact + 6 / 9


def test_many_short_samples_fill_at_least_95_percent():
    lengths = [20 + (i * 7919) % 45 for i in range(256)]
    plan = plan_packing(lengths, split_minibatches(256, 2, "x"), 2048, 2)
    assert plan.fill_fraction >= 0.95


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_no_more_microbatches_than_needed_or_asked_for(lengths, num_ranks, multiple):
    (fewest,) = plan_packing(lengths, [range(len(lengths))], CAPACITY, num_ranks, multiple).bins
    for least in range(1, 30):
        (ranks,) = plan_packing(lengths, [range(len(lengths))], CAPACITY, num_ranks, multiple, least).bins
        assert len(ranks[0]) <= max(len(fewest[0]), -(-least // multiple) * multiple)
        if least <= len(fewest[0]):
            assert ranks == fewest
        # no microbatch grows by there being more of them
        assert max(sum(lengths[i] for i in members) for bins in ranks for members in bins) <= max(
            sum(lengths[i] for i in members) for bins in fewest for members in bins
        )


def test_a_pipeline_of_16_stages_is_kept_busy():
    """16 samples a replica of 16 stages, 32 data-parallel ranks: one each, and not the 1-4 that 33,792 tokens would hold."""
    lengths = [2000 + (i * 7919) % 12000 for i in range(512)]
    bubble = {}
    for least in (1, 2 * 16):
        (ranks,) = plan_packing(lengths, [range(512)], 33792, 32, 1, least).bins
        bubble[least] = (16 - 1) / (len(ranks[0]) + 16 - 1)
    assert bubble[1] > 0.7
    assert bubble[32] < 0.5


def test_minibatches_partition_evenly_and_by_seed():
    one, again, other = (split_minibatches(10, 3, seed) for seed in ("a", "a", "b"))
    assert one == again != other
    assert sorted(len(b) for b in one) == [3, 3, 4]


def test_too_long_sample_names_the_key():
    with pytest.raises(ConfigError, match=r"update\.microbatch_tokens.*at least 65"):
        plan_packing([3, CAPACITY + 1], [[0, 1]], CAPACITY)


def test_packed_tensors_equal_plain_loops():
    samples = [[5, 6, 7, 8, 9], [1, 2], [3, 4, 5, 6]]
    prompts = [2, 1, 4]  # the last sample has an empty response
    batch = build_microbatch(samples, prompts, (4, 0, 2))
    assert batch.tokens.tolist() == [t for s in samples for t in s]
    positions, labels, rows, targets, ids = [], [], [], [], []
    for n, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
        base = len(positions)
        positions += range(len(sample))
        labels += [*sample[1:], 0]
        for at in range(prompt, len(sample)):
            rows.append(base + at - 1)
            targets.append(sample[at])
            ids.append(n)
    assert batch.positions.tolist() == positions
    assert batch.labels.tolist() == labels
    assert (batch.rows.tolist(), batch.targets.tolist(), batch.sequence_ids.tolist()) == (rows, targets, ids)
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 11]


def test_empty_microbatch_is_one_token_of_padding():
    batch = build_microbatch([], [], ())
    assert batch.num_tokens == 1
    assert batch.rows.numel() == 0
