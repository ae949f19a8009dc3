"""CPU measurements: the kernels against torch's eager functions, in the same run."""

from __future__ import annotations

from collections.abc import Callable

import torch

import r1mega_kernels
from bench import calls, eager
from bench.timing import call_seconds, cpu_seconds, peak_bytes

Record = dict[str, str | float]


def log_prob_rows(shapes: list[tuple[int, int, torch.dtype]], rounds: int) -> list[Record]:
    """Forward and forward + backward of log-probs at each (tokens, vocabulary, dtype)."""
    return [record for shape in shapes for record in _log_prob_case(*shape, rounds)]


def _log_prob_case(tokens: int, vocabulary: int, dtype: torch.dtype, rounds: int) -> list[Record]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(tokens, vocabulary, generator=generator) * 3).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)

    def update(log_prob: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad((log_prob * upstream).sum(), logits)
        return grad

    def quietly(function: Callable[[torch.Tensor, torch.Tensor], object]) -> object:
        with torch.no_grad():
            return function(logits, targets)

    forward = cpu_seconds(
        {
            "kernel": lambda: quietly(r1mega_kernels.grouped_log_prob),
            "eager with entropy": lambda: quietly(eager.log_prob_entropy),
            "eager": lambda: quietly(eager.log_prob),
        },
        rounds,
    )
    both = cpu_seconds(
        {
            "kernel": lambda: update(r1mega_kernels.grouped_log_prob(logits, targets).log_prob),
            "eager with entropy": lambda: update(eager.log_prob_entropy(logits, targets)[0]),
            "eager": lambda: update(eager.log_prob(logits, targets)),
        },
        rounds,
    )
    name = f"log-prob T={tokens} V={vocabulary} {str(dtype)[6:]}"
    gigabytes = tokens * vocabulary * logits.element_size() / 1e9
    return [_record(f"{name} forward", forward, gigabytes), _record(f"{name} forward + backward", both, None)]


def loss_rows(tokens: int, rounds: int) -> list[Record]:
    """group_advantage + grpo_token_loss + its backward at `tokens` tokens in sequences of about 200, groups of 16."""
    generator = torch.Generator().manual_seed(1)
    sequences = tokens // 200 // 16 * 16
    rewards = torch.randint(0, 2, (sequences,), generator=generator).double()
    offsets, groups = torch.arange(0, sequences + 1, 16), torch.arange(sequences) // 16
    ids = torch.randint(0, sequences, (tokens,), generator=generator).sort().values
    policy = (-torch.rand(tokens, generator=generator) * 4).requires_grad_()
    old, reference, sampler = (policy.detach() + torch.randn(tokens, generator=generator) * s for s in (0.1, 0.2, 0.05))
    weights, mask = torch.full((sequences,), 1 / tokens), torch.rand(tokens, generator=generator) > 0.1

    def with_kernels():
        advantages = r1mega_kernels.group_advantage(rewards, offsets)
        loss, _ = r1mega_kernels.grpo_token_loss(
            policy, advantages, old, reference_log_probs=reference, sampler_log_probs=sampler, weights=weights,
            mask=mask, sequence_ids=ids, clip_high=0.28, kl_coefficient=0.001, importance_cap=2.0,
        )  # fmt: skip
        return torch.autograd.grad(loss, policy)[0]

    def with_eager():
        advantages = eager.group_advantage(rewards, groups, sequences // 16).float()
        loss, _ = eager.grpo_token_loss(policy, advantages, old, reference, sampler, weights, mask, ids)
        return torch.autograd.grad(loss, policy)[0]

    torch.testing.assert_close(with_kernels(), with_eager(), rtol=1e-4, atol=1e-9)
    seconds = cpu_seconds({"kernel": with_kernels, "eager": with_eager}, rounds)
    return [_record(f"advantage + loss + backward, {tokens} tokens", seconds, None)]


def linear_loss_rows(shapes: list[tuple[int, int, int]], rounds: int) -> list[Record]:
    """Loss and gradients from hidden states at each (tokens, hidden, vocabulary), float32: in one pass, and by log-probs
    first; with what each holds beyond its arguments and results at its peak."""
    return [_linear_loss_case(*shape, rounds) for shape in shapes]


def _linear_loss_case(tokens: int, width: int, vocabulary: int, rounds: int) -> Record:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    old = r1mega_kernels.linear_log_prob(hidden.detach(), weight.detach(), targets).log_prob

    def token_loss(scores: r1mega_kernels.LogProbs, part: slice):
        return r1mega_kernels.grpo_token_loss(scores.log_prob, advantages[part], old[part])

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, (hidden, weight))

    def one_pass() -> tuple[torch.Tensor, ...]:
        return gradients(r1mega_kernels.linear_grpo_loss(hidden, weight, targets, token_loss)[0])

    def two_steps() -> tuple[torch.Tensor, ...]:
        scores = r1mega_kernels.linear_log_prob(hidden, weight, targets)
        return gradients(token_loss(scores, slice(0, tokens))[0])

    for ours, theirs in zip(one_pass(), two_steps(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    contestants = {"kernel": one_pass, "two steps": two_steps}
    name = f"loss from hidden states, one pass, T={tokens} H={width} V={vocabulary} float32"
    record = _record(name, cpu_seconds(contestants, rounds), None)
    return record | {f"{key}_peak_mb": round(peak_bytes(run) / 1e6, 1) for key, run in contestants.items()}


def call_rows(blocks: int) -> list[Record]:
    """What a call with its backward pass costs, at 8 tokens and 16 columns: beside an autograd.Function that does nothing
    but call the operators. Thousandths of the printed milliseconds are what counts here."""
    records = []
    for name, contestants in calls.CONTESTANTS.items():
        seconds = call_seconds(contestants, blocks)
        record = _record(f"one call of {name} + backward", seconds, None)
        records.append(record | {"kernel / raw operators": round(seconds["kernel"] / seconds["raw operators"], 2)})
    return records


def _record(name: str, seconds: dict[str, float], gigabytes: float | None) -> Record:
    record: Record = {"case": name} | {f"{key}_ms": round(value * 1e3, 3) for key, value in seconds.items()}
    record |= {
        f"speedup over {key}": round(value / seconds["kernel"], 2) for key, value in seconds.items() if key != "kernel"
    }
    if gigabytes is not None:
        record["kernel_gb_per_s"] = round(gigabytes / seconds["kernel"], 1)
    return record


def measure(quick: bool) -> list[Record]:
    """All CPU rows; `quick` takes a tenth of the tokens."""
    scale, rounds = (10, 3) if quick else (1, 9)
    shapes = [
        (640 // scale // 10, 129280, torch.bfloat16),
        (640 // scale // 10, 129280, torch.float32),
        (640 // scale // 10, 151936, torch.bfloat16),
        (20480 // scale // 10, 16160, torch.bfloat16),
        (8192 // scale, 400, torch.float32),
    ]
    linear = [(2048 // scale, 512, 129280)]
    return (
        log_prob_rows(shapes, rounds)
        + loss_rows(100_000 // scale, rounds)
        + call_rows(200 if quick else 1000)
        + linear_loss_rows(linear, min(rounds, 3))
    )
