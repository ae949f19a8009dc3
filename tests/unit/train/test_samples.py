"""Groups -> samples: advantages by a plain loop, exclusion of what has no reward, masking of truncated responses."""

import statistics

import pytest

from r1mega.config.stages.rl import AlgorithmConfig
from r1mega.train.samples import training_samples
from r1mega.types import Prompt, Response, Reward, RewardStatus, RolloutGroup


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


def test_nothing_scored():
    assert training_samples([group([None, None])], AlgorithmConfig()) == []
