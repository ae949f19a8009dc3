"""Advantages of ragged groups of rewards: one launch, in double."""

from __future__ import annotations

import torch

from r1mega_kernels.library import check_devices, kernels, uses_reference

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
        ValueError: unknown names, shapes, or (on a CPU) offsets that are not a partition of the rewards.
    """
    if baseline not in _BASELINES or scale not in _SCALES:
        raise ValueError(
            f"baseline must be one of {list(_BASELINES)}, scale one of {list(_SCALES)}; not {baseline!r}, {scale!r}"
        )
    use_reference = uses_reference(rewards.device, backend)
    offsets = group_offsets.to(torch.int64).contiguous()
    if rewards.dim() != 1 or offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(
            f"expected rewards [R] and group_offsets [G + 1], not {list(rewards.shape)}, {list(offsets.shape)}"
        )
    check_devices(rewards.device, group_offsets=offsets, mask=mask)
    if offsets.device.type == "cpu" and (
        int(offsets[0]) != 0 or int(offsets[-1]) != len(rewards) or bool((offsets.diff() < 0).any())
    ):
        raise ValueError(f"group_offsets must rise from 0 to {len(rewards)}, not {offsets.tolist()[:8]}...")
    if mask is not None and mask.shape != rewards.shape:
        raise ValueError(f"mask {list(mask.shape)} does not fit rewards {list(rewards.shape)}")
    values = rewards.detach().to(torch.float64).contiguous()
    mask = (
        torch.empty(0, dtype=torch.uint8, device=rewards.device) if mask is None else mask.to(torch.uint8).contiguous()
    )
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    if rewards.numel():
        kernels(use_reference).group_advantage(
            values, offsets, mask, _BASELINES[baseline], _SCALES[scale], epsilon, advantages
        )
    return advantages
