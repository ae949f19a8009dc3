"""pass@1, pass@k, majority and paired comparisons against brute force and simulation."""

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.evaluate.metrics import majority, mcnemar, paired_bootstrap, pass_at_1, pass_at_k, sign_flip_test

scores = st.sampled_from([0, 0.25, 0.5, 1])
verdicts = st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=20)


@settings(deadline=None)
@given(verdicts)
def test_pass_at_1_is_the_mean_of_means(correct):
    exact = sum(Fraction(sum(samples), len(samples)) for samples in correct) / len(correct)
    estimate = pass_at_1(correct)
    assert estimate.value == pytest.approx(float(exact), abs=1e-12)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low < estimate.high, "there is always something unknown"


def test_interval_is_wilsons_for_single_samples():
    """Published example (Newcombe 1998, table I, method 3): 81 of 263 gives 0.2553 to 0.3662. Here with n - 1 in the
    variance, which the effective size n - 1 = 263 reproduces.
    """
    estimate = pass_at_1([[i < 81] for i in range(263)])
    assert (estimate.low, estimate.high) == pytest.approx((0.2553, 0.3662), abs=2e-4)


def test_interval_at_the_ends():
    """15 of 15 has no variance: Wilson's bound n / (n + z^2), each prompt counted once however many samples it has."""
    bound = 15 / (15 + 1.959964**2)
    for samples in (1, 8):
        estimate = pass_at_1([[True] * samples] * 15)
        assert estimate.value == estimate.high == 1.0 and estimate.low == pytest.approx(bound, abs=1e-6)
    estimate = pass_at_1([[False]] * 15)
    assert (estimate.low, estimate.high) == pytest.approx((0.0, 1 - bound), abs=1e-6)


def test_equal_samples_do_not_narrow_the_interval():
    """Eight copies of every verdict carry no more knowledge than one; eight independent draws do."""
    generator = random.Random(0)
    once = [[generator.random() < 0.6] for _ in range(200)]
    copied = pass_at_1([samples * 8 for samples in once])
    assert (copied.low, copied.high) == pytest.approx((pass_at_1(once).low, pass_at_1(once).high), abs=1e-12)
    drawn = pass_at_1([[generator.random() < 0.6 for _ in range(8)] for _ in range(200)])
    assert drawn.high - drawn.low < 0.5 * (copied.high - copied.low)


@pytest.mark.parametrize("skill", [(2.0, 1.0), (0.5, 0.2), (20.0, 1.0)])
def test_interval_covers(skill):
    """Prompts with their own difficulty (beta), 4 samples each, 60 prompts: the truth lies inside about 95%."""
    generator, truth = random.Random(1), skill[0] / sum(skill)
    hits = 0
    for _ in range(1000):
        rates = [generator.betavariate(*skill) for _ in range(60)]
        estimate = pass_at_1([[generator.random() < rate for _ in range(4)] for rate in rates])
        hits += estimate.low <= truth <= estimate.high
    assert 0.92 <= hits / 1000 <= 0.98


@pytest.mark.parametrize("correct", [[], [[]], [[True], []]])
def test_pass_at_1_needs_samples(correct):
    with pytest.raises(ValueError):
        pass_at_1(correct)


@settings(deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets(case):
    n, c, k = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("case", [(4, 2, 0), (4, 2, 5), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_out_of_range(case):
    with pytest.raises(ValueError):
        pass_at_k(*case)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["1", "1.0", "2", "3", None]), max_size=9))
def test_majority_against_counting(answers):
    value = {"1": 1, "1.0": 1, "2": 2, "3": 3}
    counts = {v: sum(a is not None and value[a] == v for a in answers) for v in (1, 2, 3)}
    members = majority(answers, lambda a, b: value[a] == value[b])
    if not any(counts.values()):
        assert members == []
        return
    best = [v for v in counts if counts[v] == max(counts.values())]
    winner = next(value[a] for a in answers if a is not None and value[a] in best)  # ties: the one seen first
    assert members == [i for i, a in enumerate(answers) if a is not None and value[a] == winner]


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=10))
def test_mcnemar_against_all_sign_flips(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    result = mcnemar(first, second)
    discordant = [b - a for a, b in pairs if a != b]
    observed = abs(sum(discordant))
    flips = [abs(sum(signs)) >= observed for signs in itertools.product((-1, 1), repeat=len(discordant))]
    assert result.p_value == pytest.approx(sum(flips) / len(flips), abs=1e-12)
    assert (result.only_first, result.only_second) == (discordant.count(-1), discordant.count(1))


def test_mcnemar_needs_pairs():
    with pytest.raises(ValueError):
        mcnemar([True], [True, False])


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=5))
def test_bootstrap_against_all_resamples(pairs):
    """n <= 5: all n^n resamples give the exact percentiles, between which the sampled ones must lie (2% to spare)."""
    first, second = zip(*pairs, strict=True)
    differences = [b - a for a, b in pairs]
    exact = sorted(sum(draw) / len(draw) for draw in itertools.product(differences, repeat=len(pairs)))
    at = lambda q: exact[min(len(exact) - 1, max(0, math.floor(q * len(exact))))]  # noqa: E731
    estimate = paired_bootstrap(first, second, resamples=4000)
    assert estimate.value == pytest.approx(sum(differences) / len(differences))
    assert at(0.015) - 1e-9 <= estimate.low <= at(0.035) + 1e-9
    assert at(0.965) - 1e-9 <= estimate.high <= at(0.985) + 1e-9


def test_bootstrap_is_deterministic_and_needs_prompts():
    first, second = [0.1, 0.5, 0.3, 0.9], [0.2, 0.4, 0.8, 1.0]
    assert paired_bootstrap(first, second, seed=3) == paired_bootstrap(first, second, seed=3)
    with pytest.raises(ValueError):
        paired_bootstrap([], [])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=9))
def test_sign_flips_against_all_of_them(pairs):
    first, second = zip(*pairs, strict=True)
    differences = [b - a for a, b in pairs]
    observed = abs(sum(differences))
    extreme = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed
        for signs in itertools.product((-1, 1), repeat=len(pairs))
    ]
    exact = sum(extreme) / len(extreme)
    assert sign_flip_test(first, second) == pytest.approx(exact, abs=4.5 * math.sqrt(0.25 / 20_000) + 1e-4)


def test_sign_flips_of_single_samples_are_mcnemars():
    first, second = [i < 40 for i in range(200)], [15 <= i < 90 for i in range(200)]
    assert sign_flip_test(first, second) == pytest.approx(mcnemar(first, second).p_value, abs=1e-3)
    assert sign_flip_test(first, first) == 1.0
