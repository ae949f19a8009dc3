"""Drawn tensors, and how close two are."""

from __future__ import annotations

import torch


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape
    scale = max(float(expected.double().abs().max()), 1e-30) if expected.numel() else 1.0
    difference = float((found.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance * scale
