"""GPU measurements: the kernels and their peers against the same device's copy bandwidth and matmul rate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import r1mega_kernels
from bench import eager, peers
from bench.limits import measured_limits
from bench.timing import Contestants, seconds_on

VOCABULARIES = {129280: 7168, 151936: 2048}  # DeepSeek-V3; Qwen: vocabulary -> hidden size
TENSOR_PARALLEL = (1, 8)
TOKENS = (1024, 8192, 65536)
MEMORY_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Shape:
    """tokens; columns: of this rank's part of the vocabulary; hidden: size of the hidden states; name: for a person."""

    tokens: int
    columns: int
    hidden: int
    name: str


SHAPES = tuple(
    Shape(tokens, vocabulary // parts, hidden, f"T={tokens} V={vocabulary}/{parts}")
    for vocabulary, hidden in VOCABULARIES.items()
    for parts in TENSOR_PARALLEL
    for tokens in TOKENS
)


def logits_rows(
    limits: dict[str, float],
    rounds: int,
    shapes: Sequence[Shape] = SHAPES,
    device: str = "cuda",
    with_peers: bool = True,
) -> list[dict[str, Any]]:
    """Forward and backward from logits at every shape that fits the device."""
    memory = _memory(device)
    records = []
    for shape in shapes:
        read = shape.tokens * shape.columns * 2
        if 3 * read > memory:
            continue
        logits = torch.randn(shape.tokens, shape.columns, device=device, dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(0, shape.columns, (shape.tokens,), device=device)
        ways: dict[str, Callable[..., object]] = {"kernel": r1mega_kernels.grouped_log_prob}
        if with_peers:
            if 10 * read < memory:  # eager holds fp32 copies
                ways["eager"] = eager.log_prob_entropy
            ways |= peers.from_logits()
        forward = {name: functools.partial(way, logits.detach(), targets) for name, way in ways.items()}
        out = r1mega_kernels.grouped_log_prob(logits, targets)
        upstream = torch.randn_like(out.log_prob)
        backward = {"kernel": functools.partial(torch.autograd.grad, out.log_prob, logits, upstream, retain_graph=True)}
        rate = limits["copy_bytes_per_s"]
        records += _rows(f"logits forward {shape.name}", forward, rounds, read, rate, "bytes", device)
        records += _rows(f"logits backward {shape.name}", backward, rounds, 2 * read, rate, "bytes", device)
        del logits, out, forward, backward
    return records


def hidden_rows(
    limits: dict[str, float],
    rounds: int,
    shapes: Sequence[Shape] = SHAPES,
    device: str = "cuda",
    with_peers: bool = True,
) -> list[dict[str, Any]]:
    """Forward and backward from hidden states, with the peak memory beside the size of the logits (on a GPU)."""
    records = []
    for shape in shapes:
        tokens, columns, size = shape.tokens, shape.columns, shape.hidden
        hidden = torch.randn(tokens, size, device=device, dtype=torch.bfloat16).requires_grad_()
        weight = (torch.randn(columns, size, device=device, dtype=torch.bfloat16) / size**0.5).requires_grad_()
        weight.main_grad = torch.zeros(columns, size, device=device)
        targets = torch.randint(0, columns, (tokens,), device=device)
        ways: dict[str, Callable[..., object]] = {"kernel": r1mega_kernels.linear_log_prob}
        if with_peers:
            ways |= peers.from_hidden()
        forward = {name: functools.partial(way, hidden, weight, targets) for name, way in ways.items()}
        before = _start_peak(device)
        out = r1mega_kernels.linear_log_prob(hidden, weight, targets)
        peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
        upstream = torch.randn_like(out.log_prob)
        backward = {
            # the weight's gradient goes to main_grad, so autograd gets none for it
            "kernel": functools.partial(
                torch.autograd.grad, out.log_prob, (hidden, weight), upstream, retain_graph=True, allow_unused=True
            )
        }
        flop, name = 2 * tokens * columns * size, f"{shape.name} H={size}"
        rate = limits["matmul_flop_per_s"]
        rows = _rows(f"hidden forward {name}", forward, rounds, flop, rate, "flop", device)
        if peak is not None:
            rows[0]["peak_share_of_logits"] = round(peak / (tokens * columns * 2), 4)
        records += rows
        records += _rows(f"hidden backward {name}", backward, rounds, 3 * flop, rate, "flop", device)
        del hidden, weight, out, forward, backward
    return records


def _memory(device: str) -> float:
    """Bytes that a case may take."""
    return (torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 2 << 30) * MEMORY_SHARE


def _start_peak(device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _rows(
    name: str, contestants: Contestants, rounds: int, work: int, limit: float, unit: str, device: str
) -> list[dict[str, Any]]:
    seconds = seconds_on(device)(contestants, rounds)
    return [
        {"case": name, "who": who, "ms": round(value * 1e3, 4), f"{unit}_per_s": work / value,
         "share_of_measured_limit": round(work / value / limit, 4)}
        for who, value in seconds.items()
    ]  # fmt: skip


def measure(quick: bool) -> list[dict[str, Any]]:
    """All GPU rows of the current device, its limits first."""
    rounds = 3 if quick else 10
    limits = measured_limits("cuda", rounds)
    peers.from_logits(), peers.from_hidden()  # looks for them
    device = {"case": "device", "name": torch.cuda.get_device_name(), **limits, "peers_missing": peers.left_out()}
    return [device, *logits_rows(limits, rounds), *hidden_rows(limits, rounds)]
