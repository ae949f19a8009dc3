"""The devices' own rates, by which the kernels' are divided; and whether what they multiply is right."""

from __future__ import annotations

import contextlib

import torch

from bench.limits import MATMUL_SIZE, measured_limits
from r1mega.gpu_check.findings import Context, Findings

REPEATS = {"cuda": 100, "cpu": 2}
LIKE_THE_FASTEST = 0.9
"""No GPU of a machine should be slower than this share of its fastest: it is hot, capped, or not like the others."""


def measure(context: Context, findings: Findings) -> None:
    """Figures copy_bytes_per_s, matmul_flop_per_s and, where the device has FP8, fp8_matmul_flop_per_s: of the first
    device; where there are more, of each under its name, with goals."""
    cuda = context.device == "cuda"
    rates = []
    for index in range(torch.cuda.device_count() if cuda else 1):
        name = f"{context.device}:{index}"
        with torch.cuda.device(index) if cuda else contextlib.nullcontext():
            rates.append(measured_limits(context.device, rounds=10 if cuda else 2))
            wrong = wrong_products(context.device)
            findings.holds(f"{name}: products of whole numbers are exact", not wrong, f"{wrong} rows differ")
            if cuda:
                torch.cuda.empty_cache()
    findings.holds("rates are finite", all(0 < value < float("inf") for each in rates for value in each.values()))
    for name, value in rates[0].items():
        findings.figure(name, value)
        fastest = max(each[name] for each in rates)
        for index, each in enumerate(rates if len(rates) > 1 else []):
            findings.figure(f"{context.device}:{index}: {name}", each[name])
            share = each[name] / fastest
            findings.goal(f"{context.device}:{index}: {name}, share of the fastest", share, LIKE_THE_FASTEST)
    first = rates[0]
    findings.notes.append(
        f"copy {first['copy_bytes_per_s'] / 1e12:.3g} TB/s, bf16 {first['matmul_flop_per_s'] / 1e12:.3g} TFLOP/s"
        + (f", fp8 {first['fp8_matmul_flop_per_s'] / 1e12:.4g} TFLOP/s" if "fp8_matmul_flop_per_s" in first else "")
        + (f"; {len(rates)} devices" if len(rates) > 1 else "")
    )


def wrong_products(device: str) -> int:
    """Rows that are not exact in any of several bfloat16 products C = A B of entries -1, 0 and 1.

    One entry in eight is not 0: no sum, in whatever order, passes 256, up to which bfloat16 has every whole number. So
    C v = A (B v), the right side from the CPU, holds to the last bit in float64.
    """
    size, generator = MATMUL_SIZE[device], torch.Generator().manual_seed(0)
    draws = (torch.randint(0, 16, (size, size), generator=generator) for _ in range(2))
    a, b = ((draw == 0).double() - (draw == 1).double() for draw in draws)
    vector = torch.randint(-99, 100, (size,), generator=generator).double()
    expected = (a @ (b @ vector)).to(device)
    a, b, vector = a.bfloat16().to(device), b.bfloat16().to(device), vector.to(device)
    wrong = torch.zeros(size, dtype=torch.bool, device=device)
    for _ in range(REPEATS[device]):
        product = a @ b
        for start in range(0, size, 1024):  # all in float64 would be half a gigabyte
            rows = slice(start, start + 1024)
            wrong[rows] |= product[rows].double() @ vector != expected[rows]
    return int(wrong.sum())
