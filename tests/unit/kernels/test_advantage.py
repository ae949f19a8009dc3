"""group_advantage against Python's statistics module, group by group."""

from __future__ import annotations

import statistics

import pytest
import torch

from r1mega_kernels import group_advantage


def brute_force(groups, masks, baseline, scale, epsilon):
    everything = [r for group, mask in zip(groups, masks, strict=True) for r, m in zip(group, mask, strict=True) if m]
    result = []
    for group, mask in zip(groups, masks, strict=True):
        members = [r for r, m in zip(group, mask, strict=True) if m]
        for index, (reward, counted) in enumerate(zip(group, mask, strict=True)):
            if not counted or len(set(members)) < 2:
                result.append(0.0)
                continue
            others = [r for i, (r, m) in enumerate(zip(group, mask, strict=True)) if m and i != index]
            value = reward - statistics.fmean(members if baseline == "group" else others)
            if scale != "none":
                value /= statistics.pstdev(members if scale == "group" else everything) + epsilon
            result.append(value)
    return torch.tensor(result)


GROUPS = [[1.0, 0.0, 0.0, 1.0, 0.5], [], [3.0], [0.1, 0.1, 0.1], [2.0, -7.5], [1e6, 1e6 + 1, 1e6 + 2], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("masked", [False, True])
def test_against_brute_force(implementation, baseline, scale, masked):
    masks = [[True] * len(group) for group in GROUPS]
    if masked:
        masks[0][1], masks[3][0], masks[4][0] = False, False, False
        masks[6] = [False] * 3
    expected = brute_force(GROUPS, masks, baseline, scale, 1e-6)
    rewards = torch.tensor([r for g in GROUPS for r in g], dtype=torch.float64)
    offsets = torch.tensor([0, *torch.tensor([len(g) for g in GROUPS]).cumsum(0)])
    mask = torch.tensor([m for g in masks for m in g]) if masked else None
    if masked:
        rewards[~mask] = float("nan")  # what a masked member holds is not looked at
    got = group_advantage(rewards, offsets, mask, baseline=baseline, scale=scale, backend=implementation)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)


def test_equal_rewards_that_fp32_cannot_hold_are_exactly_zero(implementation):
    rewards = torch.full((7,), 0.1, dtype=torch.float64)
    assert (group_advantage(rewards, torch.tensor([0, 7]), backend=implementation) == 0).all()


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("bad", [[float("nan"), 1.0, 1.0], [float("nan")], [float("inf")] * 2, [0.0, float("-inf")]])
def test_what_is_not_finite_never_becomes_zero(implementation, bad, scale):
    """Even where the other members agree, and beside groups that are as they should be."""
    rewards = torch.tensor([0.0, 1.0, *bad, 2.0, 2.0], dtype=torch.float64)
    offsets = torch.tensor([0, 2, 2 + len(bad), 4 + len(bad)])
    got = group_advantage(rewards, offsets, scale=scale, backend=implementation)
    assert not got[2:-2].isfinite().any()
    assert got[:2].isfinite().all() and (got[:2] != 0).all() and (got[-2:] == 0).all()


def test_same_bits_as_alone(native):
    rewards = torch.randn(96, generator=torch.Generator().manual_seed(0))
    whole = group_advantage(rewards, torch.arange(0, 97, 16))
    assert torch.equal(group_advantage(rewards[32:48], torch.tensor([0, 16])), whole[32:48])


def test_no_rewards(implementation):
    assert group_advantage(torch.empty(0), torch.tensor([0]), backend=implementation).shape == (0,)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3]])
def test_offsets_that_are_no_partition(offsets):
    with pytest.raises(ValueError, match="must rise from 0 to 3"):
        group_advantage(torch.zeros(3), torch.tensor(offsets))


def test_unknown_names():
    with pytest.raises(ValueError, match="baseline must be one of"):
        group_advantage(torch.zeros(3), torch.tensor([0, 3]), scale="minmax")
