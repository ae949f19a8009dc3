"""Groups -> samples: advantages by a plain loop, exclusion of what has no reward, masking of truncated responses."""

import dataclasses
import statistics

import numpy as np
import pytest
import torch

from r1mega.config.stages.rl import AlgorithmConfig
from r1mega.train.grpo_update import _kept_ids
from r1mega.train.samples import step_advantages, training_samples
from r1mega.types import Prompt, Response, Reward, RewardStatus, RolloutGroup, SampleSummary


def group(values, finish="stop"):
    prompt = Prompt("p", "q", ("1",), "math", None, (1, 2, 3))
    responses = tuple(Response((4, 5 + i), (-0.5, -0.25 * i), finish) for i in range(len(values)))
    rewards = tuple(Reward(v, {}, RewardStatus.OK if v is not None else RewardStatus.FAILED) for v in values)
    return RolloutGroup(prompt, responses, ("",) * len(values), rewards, 0)


@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_of_scored_responses(normalize):
    values = [[1.0, 0.0, 0.1, 1.1], [0.5, None, 0.0], [0.1, 0.1, 0.1], [None, None], [2.0]]
    samples = training_samples([group(v) for v in values], AlgorithmConfig(normalize_std=normalize))
    expected = []
    for members in values:
        scored = [v for v in members if v is not None]
        for value in scored:
            centred = value - statistics.fmean(scored)
            if len(set(scored)) < 2:
                expected.append(0.0)
            else:
                expected.append(centred / (statistics.pstdev(scored) + 1e-6) if normalize else centred)
    assert [s.advantage for s in samples] == pytest.approx(expected, abs=1e-6)
    assert [len(s.token_ids) for s in samples] == [5] * len(expected)
    assert samples[1].token_ids.tolist() == [1, 2, 3, 4, 6]
    assert samples[1].sampler_log_probs.tolist() == [-0.5, -0.25]


def test_truncated_responses_count_in_their_group_but_carry_no_loss():
    whole, cut = group([1.0, 0.0]), group([1.0, 0.0], finish="length")
    assert len(training_samples([whole, cut], AlgorithmConfig(mask_truncated=True))) == 2
    assert len(training_samples([whole, cut], AlgorithmConfig())) == 4


def test_leave_one_out_and_no_baseline():
    """RLOO and REINFORCE, by a plain loop."""
    values = [[1.0, 0.0, 0.1, 1.1], [0.5, None, 0.0], [0.1, 0.1, 0.1]]
    groups = [group(v) for v in values]
    scored = [[v for v in members if v is not None] for members in values]
    rloo = training_samples(groups, AlgorithmConfig(baseline="leave_one_out", normalize_std=False))
    expected = [v - (sum(s) - v) / (len(s) - 1) for s in scored for v in s]
    assert [s.advantage for s in rloo] == pytest.approx(expected, abs=1e-6)
    plain = training_samples(groups, AlgorithmConfig(baseline="none", normalize_std=False))
    assert [s.advantage for s in plain] == [s.reward for s in plain] == [v for s in scored for v in s]
    assert [s.opens_group for s in plain] == [True, False, False, False, True, False, True, False, False]


def test_whitening_is_over_all_tokens_of_the_step():
    samples = training_samples([group([1.0, 0.0, 0.5]), group([0.0, 1.0])], AlgorithmConfig(normalize_std=False))
    lengths = [1, 3, 2, 5, 4]
    samples = [
        dataclasses.replace(sample, token_ids=np.arange(3 + length, dtype=np.int32))
        for sample, length in zip(samples, lengths, strict=True)
    ]
    whitened = step_advantages(samples, AlgorithmConfig(normalize_std=False, whiten=True, std_epsilon=0.0))
    tokens = [sample.advantage for sample in samples for _ in range(sample.response_length)]
    mean, deviation = statistics.fmean(tokens), statistics.pstdev(tokens)
    assert whitened == pytest.approx([(sample.advantage - mean) / deviation for sample in samples])


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_whitening_of_equal_advantages(epsilon):
    """Zero, whatever the mean of equal numbers is rounded to."""
    algorithm = AlgorithmConfig(baseline="none", normalize_std=False, whiten=True, std_epsilon=epsilon)
    samples = training_samples([group([0.1, 0.1, 0.1]), group([0.1])], algorithm)
    assert step_advantages(samples, algorithm) == [0.0] * 4


@pytest.mark.parametrize("normalize", [True, False])
def test_penalties_are_taken_from_the_rewards_of_the_group(normalize):
    values, penalties = [[1.0, 0.0, 0.5], [0.0, 1.0], [1.0, 1.0]], [0.1, -0.2, 0.3, 0.0, 0.4, 0.25, 0.5]
    samples = training_samples([group(v) for v in values], AlgorithmConfig())
    found = step_advantages(samples, AlgorithmConfig(normalize_std=normalize), torch.tensor(penalties).double())
    expected, rest = [], iter(penalties)
    for members in values:
        net = [value - next(rest) for value in members]
        deviation = statistics.pstdev(net) + 1e-6 if normalize else 1.0
        expected += [(value - statistics.fmean(net)) / deviation for value in net]
    assert found == pytest.approx(expected, abs=1e-5)


def test_without_either_the_advantages_are_those_of_the_samples():
    samples = training_samples([group([1.0, 0.0, 0.1]), group([0.3, 0.7])], AlgorithmConfig())
    assert step_advantages(samples, AlgorithmConfig()) == [sample.advantage for sample in samples]


def test_a_group_is_opened_by_its_first_response_that_carries_loss():
    cut = group([1.0, 0.0, 0.5])
    responses = (dataclasses.replace(cut.responses[0], finish_reason="length"), *cut.responses[1:])
    samples = training_samples(
        [dataclasses.replace(cut, responses=responses), group([0.0, 1.0])], AlgorithmConfig(mask_truncated=True)
    )
    assert [sample.opens_group for sample in samples] == [True, False, True, False]


def test_nothing_scored():
    assert training_samples([group([None, None])], AlgorithmConfig()) == []


def test_the_mean_of_kept_ids_is_over_the_responses_that_tell_them():
    told = [SampleSummary(0, 0, 9, 5, 1.0, 1.0, num_kept=12), SampleSummary(0, 0, 15, 5, 1.0, 1.0, num_kept=16)]
    assert _kept_ids(told) == _kept_ids([*told, SampleSummary(0, 1, 90, 5, 1.0, 1.0)]) == 2.0
    assert _kept_ids([SampleSummary(0, 1, 90, 5, 1.0, 1.0)]) is None
