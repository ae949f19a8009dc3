"""Rating by maximum likelihood, against a search over all ratings and against known solvers."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.evaluate.rating import HIGHEST, LOWEST, estimate_rating, solve_probability


def likelihood(rating, difficulties, solved):
    total = 0.0
    for difficulty, share in zip(difficulties, solved, strict=True):
        p = 1 / (1 + 10 ** ((difficulty - rating) / 400))
        total += share * math.log(p) + (1 - share) * math.log(1 - p)
    return total


def test_elo_formula():
    assert solve_probability(1500, 1500) == 0.5
    assert solve_probability(1900, 1500) == pytest.approx(10 / 11), "400 points are odds of 10 : 1"


problem = st.tuples(st.integers(8, 35).map(lambda x: 100 * x), st.sampled_from([0, 0.25, 0.5, 1]))
problems = st.lists(problem, min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(problems)
def test_against_a_search_over_all_ratings(results):
    difficulties, solved = zip(*results, strict=True)
    estimate = estimate_rating(difficulties, solved)
    grid = [LOWEST + 2 * i for i in range(int((HIGHEST - LOWEST) / 2) + 1)]
    values = {rating: likelihood(rating, difficulties, solved) for rating in grid}
    best = max(values, key=values.get)
    assert estimate.value == pytest.approx(best, abs=2.001)
    likely = [rating for rating in grid if 2 * (values[best] - values[rating]) <= 3.841458820694124]
    assert (estimate.low, estimate.high) == pytest.approx((likely[0], likely[-1]), abs=2.5)


def test_nothing_and_everything_solved():
    """No maximum: the estimate ends where the search does, its other bound says what is known."""
    nothing, everything = estimate_rating([800, 1200], [0, 0]), estimate_rating([800, 1200], [1, 1])
    assert nothing.value == nothing.low == LOWEST and nothing.high < 1300
    assert everything.value == everything.high == HIGHEST and everything.low > 700


@pytest.mark.heavy
@pytest.mark.parametrize("truth", [1200, 1900, 2400])
def test_known_solvers_are_found_and_covered(truth):
    generator = random.Random(truth)
    difficulties = [generator.randrange(800, 3000, 100) for _ in range(150)]
    estimates = []
    for _ in range(200):
        solved = [float(generator.random() < 1 / (1 + 10 ** ((d - truth) / 400))) for d in difficulties]
        estimates.append(estimate_rating(difficulties, solved))
    mean = sum(e.value for e in estimates) / 200
    error = math.sqrt(sum((e.value - mean) ** 2 for e in estimates) / 199 / 200)
    assert abs(mean - truth) < 4 * error + 10
    assert 0.9 <= sum(e.low <= truth <= e.high for e in estimates) / 200 <= 0.99


@pytest.mark.parametrize("case", [([], []), ([1000], [1.5]), ([1000], [-0.1])])
def test_bad_input(case):
    with pytest.raises(ValueError):
        estimate_rating(*case)
