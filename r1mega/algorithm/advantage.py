"""Group-relative advantages (DeepSeekMath, section 4.1): how much better than its siblings a response is."""

from __future__ import annotations

import torch


def group_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    normalize_std: bool = True,
    std_epsilon: float = 1e-6,
) -> torch.Tensor:
    """(r - mean of group) / (std of group + epsilon), one value per response.

    rewards: [responses] float; group_ids: [responses] int in [0, num_groups), any order, groups of any size (excluded
    responses are simply left out). normalize_std=False gives Dr.GRPO's r - mean. std is the population's (divides by
    the group's size, as the paper's formula over the G outputs). Groups without signal (one response, or all rewards
    equal) get exact zeros. Computed in float64, returned in float32: [responses].
    """
    values = rewards.to(torch.float64)
    num_groups = int(group_ids.max()) + 1 if group_ids.numel() else 0

    def group_mean(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group_ids, x)
        count = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group_ids, torch.ones_like(x))
        return (total / count.clamp(min=1))[group_ids]

    centred = values - group_mean(values)
    centred = torch.where(has_signal(rewards, group_ids), centred, torch.zeros_like(centred))
    if normalize_std:
        centred = centred / (group_mean(centred**2).sqrt() + std_epsilon)
    return centred.to(torch.float32)


def has_signal(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """[responses] bool: whether the response's group holds at least two different rewards (exact comparison)."""
    values = rewards.to(torch.float64)
    num_groups = int(group_ids.max()) + 1 if group_ids.numel() else 0
    low = torch.full((num_groups,), float("inf"), dtype=torch.float64).scatter_reduce(0, group_ids, values, "amin")
    high = torch.full((num_groups,), float("-inf"), dtype=torch.float64).scatter_reduce(0, group_ids, values, "amax")
    return (high > low)[group_ids]
