"""What the device itself reaches: a large copy and large matrix products, the denominators of every other figure."""

from __future__ import annotations

import torch

from bench.timing import seconds_on

COPY_BYTES = {"cuda": 4 << 30, "cpu": 32 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 384}


def measured_limits(device: str = "cuda", rounds: int = 10) -> dict[str, float]:
    """copy_bytes_per_s (read + written), matmul_flop_per_s (bfloat16), and fp8_matmul_flop_per_s where the device has
    e4m3 products (per-tensor scales, fast accumulation)."""
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    size = MATMUL_SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    contestants = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    if has_fp8(device):
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
        contestants["fp8_matmul"] = lambda: torch._scaled_mm(
            a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    seconds = seconds_on(device)(contestants, rounds)
    rates = {f"{name}_flop_per_s": 2 * size**3 / taken for name, taken in seconds.items() if name != "copy"}
    return {"copy_bytes_per_s": 2 * source.numel() / seconds["copy"], **rates}


def has_fp8(device: str) -> bool:
    """Whether torch multiplies float8_e4m3fn matrices on this device (compute capability 8.9 and newer)."""
    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
