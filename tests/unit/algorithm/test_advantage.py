"""Group advantages against a plain float64 loop."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.algorithm.advantage import group_advantages, has_signal


def brute_force(rewards, groups, normalize_std, epsilon):
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        siblings = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        centred = reward - statistics.fmean(siblings)
        if min(siblings) == max(siblings):
            out.append(0.0)
        else:
            out.append(centred / (statistics.pstdev(siblings) + epsilon) if normalize_std else centred)
    return out


@given(
    st.lists(st.tuples(st.floats(-3, 3, width=32), st.integers(0, 5)), min_size=1, max_size=40),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_equals_brute_force(pairs, normalize_std):
    rewards, groups = [p[0] for p in pairs], [p[1] for p in pairs]
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), normalize_std=normalize_std)
    want = brute_force(rewards, groups, normalize_std, 1e-6)
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1.1, 1 / 3])
def test_groups_without_signal_are_exactly_zero(value):
    rewards = torch.tensor([value] * 7 + [0.0], dtype=torch.float32)  # 7 equal rewards, then a group of one
    groups = torch.tensor([0] * 7 + [1])
    assert torch.equal(group_advantages(rewards, groups), torch.zeros(8))
    assert not has_signal(rewards, groups).any()


def test_empty():
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
