"""The device's own rates, by which the kernels' are divided."""

from __future__ import annotations

from bench.limits import measured_limits

from r1mega.gpu_check.findings import Context, Findings


def measure(context: Context, findings: Findings) -> None:
    """Figures copy_bytes_per_s, matmul_flop_per_s and, where the device has FP8, fp8_matmul_flop_per_s."""
    rates = measured_limits(context.device, rounds=10 if context.device == "cuda" else 2)
    for name, value in rates.items():
        findings.figure(name, value)
        print(f"{name} {value:.3e}")
    findings.notes.append(
        f"copy {rates['copy_bytes_per_s'] / 1e12:.3g} TB/s, bf16 {rates['matmul_flop_per_s'] / 1e12:.3g} TFLOP/s"
        + (f", fp8 {rates['fp8_matmul_flop_per_s'] / 1e12:.4g} TFLOP/s" if "fp8_matmul_flop_per_s" in rates else "")
    )
    findings.holds("rates are finite", all(0 < value < float("inf") for value in rates.values()))
