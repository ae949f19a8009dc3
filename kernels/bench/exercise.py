"""Runs every CUDA kernel a few times, with and without rows and lists of kept ids, at widths on and off 16-byte boundaries:
what compute-sanitizer and ncu look at. `python -m bench.exercise [--large | --fault]` in kernels/; large is what ncu
measures, fault a single read out of bounds, which shows that memcheck sees one.
"""

from __future__ import annotations

import argparse

import torch

import r1mega_kernels


def exercise(tokens: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
    """Every operator once in each direction."""
    logits = torch.randn(tokens, vocabulary, device=device).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    rows = torch.arange(1, tokens, 2, device=device)
    length = min(40, vocabulary)
    ids = torch.arange(length, dtype=torch.int32, device=device).repeat(tokens - 1)
    offsets = (torch.arange(tokens + 1, device=device) * length).clamp(max=len(ids))  # the last keeps every id
    kept = r1mega_kernels.KeptTokens(ids, offsets)
    inside = torch.where(torch.arange(tokens, device=device) < tokens - 1, targets % length, targets)
    for chosen in (None, rows):
        for lists in (None, kept):
            scores = r1mega_kernels.grouped_log_prob(logits, inside, 0.9, chosen, kept=lists)
            (scores.log_prob + 0.1 * scores.entropy).sum().backward()
    rewards = torch.rand(tokens, device=device, dtype=torch.float64)
    offsets = torch.tensor([0, tokens // 2, tokens], device=device)
    advantages = r1mega_kernels.group_advantage(rewards, offsets)
    policy = torch.randn(tokens, device=device).requires_grad_()
    for surrogate in ("clip", "cispo", "sapo"):
        r1mega_kernels.grpo_token_loss(policy, advantages, policy.detach() - 0.1, surrogate=surrogate)[0].backward()


def fault(device: str) -> None:
    """Reads a row that lies a terabyte beyond the logits. Only for a GPU under memcheck."""
    logits, targets = torch.zeros(2, 64, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    row, stats = torch.full((1,), 1 << 32, device=device), torch.empty(1, 4, device=device)
    one = torch.ones(1, device=device)
    torch.ops.r1mega_kernels.log_prob_stats(logits, targets, one, row, True, 0, 64, True, stats)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--fault", action="store_true")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.fault:
        if r1mega_kernels.backend(arguments.device) != "cuda":
            parser.error("--fault wants a GPU and the CUDA library")
        fault(arguments.device)
        torch.cuda.synchronize()
        return
    shapes = [(8192, 129280)] if arguments.large else [(6, 1), (6, 1003), (40, 9000), (4097, 64)]
    for dtype in (torch.bfloat16,) if arguments.large else (torch.bfloat16, torch.float32):
        for tokens, vocabulary in shapes:
            exercise(tokens, vocabulary, dtype, arguments.device)
    if arguments.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
