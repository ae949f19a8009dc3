"""GPU measurements: the kernels and their peers against the same device's copy bandwidth and matmul rate."""

from __future__ import annotations

from typing import Any

import torch
from bench import eager, peers
from bench.timing import gpu_seconds

import r1mega_kernels

VOCABULARIES = {129280: 7168, 151936: 2048}  # DeepSeek-V3; Qwen: vocabulary -> hidden size
TENSOR_PARALLEL = (1, 8)
TOKENS = (1024, 8192, 65536)
MEMORY_SHARE = 0.6


def roofline(rounds: int = 10) -> dict[str, float]:
    """Measured bytes/s of a large copy (read + write) and FLOP/s of a large bf16 matrix product."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = gpu_seconds({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, rounds)
    return {
        "copy_bytes_per_s": 2 * source.numel() / seconds["copy"],
        "matmul_flop_per_s": 2 * 8192**3 / seconds["matmul"],
    }


def logits_rows(limits: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    """Forward and backward from logits at every shape that fits the device."""
    memory = torch.cuda.get_device_properties(0).total_memory * MEMORY_SHARE
    records = []
    for vocabulary in VOCABULARIES:
        for parts in TENSOR_PARALLEL:
            for tokens in TOKENS:
                columns = vocabulary // parts
                read = tokens * columns * 2
                if 3 * read > memory:
                    continue
                logits = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16).requires_grad_()
                targets = torch.randint(0, columns, (tokens,), device="cuda")
                forward = {"kernel": lambda x=logits, t=targets: r1mega_kernels.grouped_log_prob(x.detach(), t)}
                if 10 * read < memory:  # eager holds fp32 copies
                    forward["eager"] = lambda x=logits, t=targets: eager.log_prob_entropy(x.detach(), t)
                for name, function in peers.from_logits().items():
                    forward[name] = lambda x=logits, t=targets, f=function: f(x.detach(), t)
                out = r1mega_kernels.grouped_log_prob(logits, targets)
                upstream = torch.randn_like(out.log_prob)
                backward = {
                    "kernel": lambda o=out, x=logits, g=upstream: torch.autograd.grad(
                        o.log_prob, x, g, retain_graph=True
                    )
                }
                shape = f"T={tokens} V={vocabulary}/{parts}"
                records += _rows(f"logits forward {shape}", forward, rounds, read, limits["copy_bytes_per_s"], "bytes")
                records += _rows(
                    f"logits backward {shape}", backward, rounds, 2 * read, limits["copy_bytes_per_s"], "bytes"
                )
                del logits, out
    return records


def hidden_rows(limits: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    """Forward and backward from hidden states, with the peak memory beside the size of the logits."""
    records = []
    for vocabulary, size in VOCABULARIES.items():
        for parts in TENSOR_PARALLEL:
            for tokens in TOKENS:
                columns = vocabulary // parts
                hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16).requires_grad_()
                weight = (torch.randn(columns, size, device="cuda", dtype=torch.bfloat16) / size**0.5).requires_grad_()
                weight.main_grad = torch.zeros(columns, size, device="cuda")
                targets = torch.randint(0, columns, (tokens,), device="cuda")
                forward = {"kernel": lambda h=hidden, w=weight, t=targets: r1mega_kernels.linear_log_prob(h, w, t)}
                for name, function in peers.from_hidden().items():
                    forward[name] = lambda h=hidden, w=weight, t=targets, f=function: f(h, w, t)
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                out = r1mega_kernels.linear_log_prob(hidden, weight, targets)
                peak = torch.cuda.max_memory_allocated() - before
                upstream = torch.randn_like(out.log_prob)
                backward = {
                    # the weight's gradient goes to main_grad, so autograd gets none for it
                    "kernel": lambda o=out, h=hidden, w=weight, g=upstream: torch.autograd.grad(
                        o.log_prob, (h, w), g, retain_graph=True, allow_unused=True
                    )
                }
                flop, shape = 2 * tokens * columns * size, f"T={tokens} V={vocabulary}/{parts} H={size}"
                rate = limits["matmul_flop_per_s"]
                rows = _rows(f"hidden forward {shape}", forward, rounds, flop, rate, "flop")
                rows[0]["peak_share_of_logits"] = round(peak / (tokens * columns * 2), 4)
                records += rows
                records += _rows(f"hidden backward {shape}", backward, rounds, 3 * flop, rate, "flop")
                del hidden, weight, out
    return records


def _rows(name, contestants, rounds, work, limit, unit) -> list[dict[str, Any]]:
    seconds = gpu_seconds(contestants, rounds)
    return [
        {"case": name, "who": who, "ms": round(value * 1e3, 4), f"{unit}_per_s": work / value,
         "share_of_measured_limit": round(work / value / limit, 4)}
        for who, value in seconds.items()
    ]  # fmt: skip


def measure(quick: bool) -> list[dict[str, Any]]:
    """All GPU rows of the current device, its limits first."""
    rounds = 3 if quick else 10
    limits = roofline(rounds)
    device = {"case": "device", "name": torch.cuda.get_device_name(), **limits, "peers_missing": peers.missing()}
    return [device, *logits_rows(limits, rounds), *hidden_rows(limits, rounds)]
