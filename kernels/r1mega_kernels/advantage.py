"""Advantages of ragged groups of rewards: one launch, in double."""

from __future__ import annotations

import math

import torch

from r1mega_kernels.library import check_devices, kernels, nothing, plain, uses_reference

_BASELINES = {"group": 0, "leave_one_out": 1}
_SCALES = {"none": 0, "group": 1, "batch": 2}


def group_advantage(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    baseline: str = "group",
    scale: str = "group",
    epsilon: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """(r - baseline) / (std + epsilon): [R] float32 (DeepSeekMath, section 4.1).

    rewards: [R] float; group g is rewards[group_offsets[g]:group_offsets[g + 1]], group_offsets: [G + 1] int64 from 0
    to R, never falling (empty groups are allowed). mask: [R] bool, False leaves a response out: it gets 0 and its
    value is not looked at.
    baseline: 'group' the mean of the group; 'leave_one_out' the mean of the others (RLOO).
    scale: 'group' the population standard deviation of the group; 'batch' of all rewards together; 'none' (Dr.GRPO).
    A group without signal (fewer than two members, or all rewards equal, compared exactly) gets exact zeros; a reward
    that is NaN or infinite leaves no finite advantage in its group. For statistics of the whole batch alone, pass one group: offsets [0, R].

    Raises:
        ValueError: unknown names, shapes, epsilon, or (on a CPU) offsets that are not a partition of the rewards.
        TypeError: offsets that are no integers.
    """
    kind, unit = _BASELINES.get(baseline), _SCALES.get(scale)
    if kind is None or unit is None:
        raise ValueError(
            f"baseline must be one of {list(_BASELINES)}, scale one of {list(_SCALES)}; not {baseline!r}, {scale!r}"
        )
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be a finite number, 0 or more, not {epsilon}")
    use_reference = uses_reference(rewards, backend)
    if rewards.dim() != 1 or group_offsets.dim() != 1 or group_offsets.shape[0] == 0:
        raise ValueError(
            f"expected rewards [R] and group_offsets [G + 1], not {list(rewards.shape)}, {list(group_offsets.shape)}"
        )
    offsets = group_offsets
    if offsets.dtype != torch.int64 or not offsets.is_contiguous():
        if offsets.is_floating_point():
            raise TypeError(f"group_offsets must be integers, not {offsets.dtype}")
        offsets = plain(offsets, torch.int64)
    if mask is not None or offsets.device != rewards.device:
        check_devices(rewards.device, group_offsets=group_offsets, mask=mask)
    if mask is not None and mask.shape != rewards.shape:
        raise ValueError(f"mask {list(mask.shape)} does not fit rewards {list(rewards.shape)}")
    values = plain(rewards, torch.float64)
    counted = nothing(values, torch.uint8) if mask is None else plain(mask, torch.uint8)
    single = rewards.dtype == torch.float32
    advantages = torch.empty_like(rewards) if single else torch.empty_like(values, dtype=torch.float32)
    if rewards.is_cpu or rewards.shape[0]:  # a CPU's operator looks at the offsets too
        kernels(use_reference).group_advantage(values, offsets, counted, kind, unit, epsilon, advantages)
    return advantages
