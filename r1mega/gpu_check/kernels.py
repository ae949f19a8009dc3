"""The compiled kernels: they build, they are right (float64), and how near they come to the device's limits."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import torch

from r1mega.gpu_check.environment import build_script
from r1mega.gpu_check.findings import Context, Findings

GOALS = {"logits forward": 0.92, "logits backward": 0.9, "hidden forward": 0.96, "hidden backward": 0.97}
"""Shares of the copy and the matmul rate at which docs/kernels.md aims (8192 tokens, V = 129280, H = 7168)."""


def build(context: Context, findings: Findings) -> None:
    """`python kernels/build.py`, with the CUDA library on a GPU. Loading what it made is `right`'s first act."""
    start = time.monotonic()
    built = build_script().build_libraries(cuda=context.device == "cuda")
    for path in built:
        findings.figure(f"{Path(path).name} bytes", Path(path).stat().st_size)
    findings.figure("build_seconds", time.monotonic() - start)
    wanted = "_cuda.so" if context.device == "cuda" else "_cpu.so"
    findings.holds(f"{wanted} was built", any(Path(path).name == wanted for path in built))


# ---------------------------------------------------------------------- right


def right(context: Context, findings: Findings) -> None:
    """Every operator against float64 on the CPU, on random inputs; extremes; bits that do not depend on the batch."""
    import r1mega_kernels

    device = context.device
    served = r1mega_kernels.backend(device)
    findings.figure("backend", served)
    expected = served == "cuda" if device == "cuda" else served.startswith("cpu-")
    findings.holds("the compiled library is in use", expected, served)
    for dtype in (torch.float32, torch.bfloat16):
        for vocabulary in (1, 400, 1003, 16160) + ((129280, 151936) if device == "cuda" else ()):
            _check_log_prob(findings, device, dtype, vocabulary)
        _check_linear(findings, device, dtype)
        _check_kept(findings, device, dtype)
    _check_extremes(findings, device)
    _check_batch_invariance(findings, device)
    for count in (1, 2049, 100_000):
        for surrogate in ("clip", "cispo", "sapo"):
            _check_token_loss(findings, device, count, surrogate)
    for scale in ("none", "group", "batch"):
        _check_advantage(findings, device, scale)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| (Euclidean), in float64 on the CPU; NaN where either has one."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    if leaf.grad is None:
        raise ValueError("no gradient has reached it")
    return leaf.grad


def _largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double().cpu() - expected.detach().double().cpu()).abs().max())


def _exact(logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, rows: torch.Tensor):
    """([3, rows] log-prob, entropy and logsumexp in float64, the leaf that gets their gradient)."""
    leaf = logits.double().requires_grad_()
    scaled = leaf[rows] / temperature[rows, None]
    log_softmax = scaled.log_softmax(-1)
    chosen = log_softmax.gather(1, targets[rows, None])[:, 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return torch.stack([chosen, entropy, scaled.logsumexp(-1)]), leaf


def _check_log_prob(findings: Findings, device: str, dtype: torch.dtype, vocabulary: int) -> None:
    from r1mega_kernels import grouped_log_prob

    generator = _generator(vocabulary)
    logits = (torch.randn(9, vocabulary, generator=generator) * 4).to(dtype)
    targets = torch.randint(0, vocabulary, (9,), generator=generator)
    temperature, rows = torch.linspace(0.5, 1.5, 9, dtype=torch.float64), torch.tensor([0, 2, 3, 8])
    upstream = torch.randn(3, 4, generator=generator)
    expected, leaf = _exact(logits, targets, temperature, rows)
    (expected * upstream).sum().backward()
    found_leaf = logits.to(device).requires_grad_()
    found = torch.stack(
        grouped_log_prob(found_leaf, targets.to(device), temperature.float().to(device), rows.to(device))
    )
    (found * upstream.to(device)).sum().backward()
    name = f"log-prob V={vocabulary} {str(dtype)[6:]}"
    findings.at_most(f"{name}: largest error", _largest(found, expected), 4e-6 + 1e-6 * float(expected.abs().max()))
    gradient, found_gradient = _gradient(leaf), _gradient(found_leaf)
    if vocabulary == 1:  # all gradients are 0
        gradient, found_gradient = gradient + 1, found_gradient.float() + 1
    findings.at_most(f"{name}: gradient", relative(found_gradient, gradient), 2e-5 if dtype == torch.float32 else 4e-3)


def _check_linear(findings: Findings, device: str, dtype: torch.dtype) -> None:
    from r1mega_kernels import linear_log_prob

    generator = _generator(2)
    tokens, size, vocabulary = (2048, 256, 32000) if device == "cuda" else (96, 64, 1003)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, size, generator=generator) / size**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = (h @ w.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    gh, gw = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
    gw.main_grad = in_place = torch.zeros(gw.shape, device=device)
    found = linear_log_prob(gh, gw, targets.to(device), buffer_bytes=8 << 20)
    found.log_prob.sum().backward()
    name, tight = f"from hidden states {str(dtype)[6:]}", dtype == torch.float32
    findings.at_most(f"{name}: largest error", _largest(found.log_prob, expected), 2e-5 if tight else 2e-2)
    for what, ours, theirs in (("hidden", _gradient(gh), _gradient(h)), ("weight", in_place, _gradient(w))):
        findings.at_most(f"{name}: gradient of {what}", relative(ours, theirs), 2e-5 if tight else 1e-2)


def _check_kept(findings: Findings, device: str, dtype: torch.dtype) -> None:
    """Lists of kept ids: log-probs and gradients of what is left, row by row; one token keeps all, and one list is longer than
    a block of threads reads at once."""
    from r1mega_kernels import KeptTokens, grouped_log_prob

    logits = (torch.randn(9, 5001, generator=_generator(6)) * 4).to(dtype)
    lists = [torch.arange(start, 5001, 7 * start + 1, dtype=torch.int32) for start in range(8)]  # of 5001 ids to 100
    targets = torch.stack([*(ids[len(ids) // 2].long() for ids in lists), torch.tensor(17)])
    offsets = torch.tensor([0, *(len(ids) for ids in lists), 0]).cumsum(0)
    leaf = logits.double().requires_grad_()
    kept = [*(ids.long() for ids in lists), torch.arange(5001)]
    expected = torch.stack(
        [row[target] - row[ids].logsumexp(0) for row, target, ids in zip(leaf, targets, kept, strict=True)]
    )
    expected.sum().backward()
    x = logits.to(device).requires_grad_()
    on_device = KeptTokens(torch.cat(lists).to(device), offsets.to(device))
    found = grouped_log_prob(x, targets.to(device), kept=on_device).log_prob
    found.sum().backward()
    name = f"kept ids {str(dtype)[6:]}"
    findings.at_most(f"{name}: largest error", _largest(found, expected.detach()), 1e-5)
    findings.at_most(
        f"{name}: gradient", relative(_gradient(x), _gradient(leaf)), 1e-5 if dtype == torch.float32 else 1e-2
    )


def _check_extremes(findings: Findings, device: str) -> None:
    """Very low rows and rows of -inf are exact; NaN and +inf give NaN, as a target outside the vocabulary does."""
    from r1mega_kernels import grouped_log_prob

    logits = torch.randn(5, 2100, generator=_generator(5))
    targets = torch.tensor([3, 2099, 1, 2, 0])
    logits[0] -= 200
    logits[1, :2050] = -math.inf
    logits[2, 700], logits[3, 5], logits[4] = math.nan, math.inf, -math.inf
    found = torch.stack(grouped_log_prob(logits.to(device), targets.to(device))).cpu()
    exact = logits[:2].double().log_softmax(-1)
    entropy = -(exact.exp() * exact.clamp(min=-1e9)).sum(-1)
    findings.at_most("extremes: log-prob", _largest(found[0, :2], exact.gather(1, targets[:2, None])[:, 0]), 1e-5)
    findings.at_most("extremes: entropy", _largest(found[1, :2], entropy), 1e-5)
    findings.holds("NaN and infinity give NaN", bool(found[:, 2:4].isnan().all() and found[0, 4].isnan()))
    if device == "cuda":  # on a CPU it is an error
        outside = grouped_log_prob(torch.zeros(1, 8, device=device), torch.tensor([8], device=device))
        findings.holds("a target outside the vocabulary gives NaN", bool(outside.log_prob.isnan().all()))


def _check_batch_invariance(findings: Findings, device: str) -> None:
    from r1mega_kernels import grouped_log_prob

    def run(x: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        out = grouped_log_prob(x, t)
        (out.log_prob + 0.1 * out.entropy).sum().backward()
        return [*(o.detach() for o in out), _gradient(x)]

    for vocabulary in (16160, 16163):  # rows on and off 16-byte boundaries
        generator = _generator(vocabulary)
        count = 700 if device == "cuda" else 60
        logits = torch.randn(count, vocabulary, generator=generator).bfloat16().to(device)
        targets = torch.randint(0, vocabulary, (count,), generator=generator).to(device)
        whole = run(logits, targets)
        same = all(torch.equal(a, b) for a, b in zip(run(logits, targets), whole, strict=True))
        for part in (slice(0, 1), slice(count - 1, count), slice(count // 7, count // 2)):
            again = run(logits[part], targets[part])
            same &= all(torch.equal(a, b[part]) for a, b in zip(again, whole, strict=True))
        findings.holds(f"bits do not depend on the batch, V={vocabulary}", same)


def _check_token_loss(findings: Findings, device: str, count: int, surrogate: str) -> None:
    """Against the project's torch functions in float64."""
    from r1mega_kernels import grpo_token_loss

    generator = _generator(count)
    policy = -torch.rand(count, generator=generator) * 4
    old, reference, sampler = (policy + torch.randn(count, generator=generator) * s for s in (0.2, 0.2, 0.1))
    advantages, weights = torch.randn(count, generator=generator), torch.rand(count, generator=generator) / count
    loss_of = functools.partial(
        grpo_token_loss, clip_low=0.2, clip_high=0.28, dual_clip=3.0 if surrogate == "clip" else None,
        kl_coefficient=0.1, importance_cap=1.2, surrogate=surrogate, kl_bias_correction=surrogate != "clip",
    )  # fmt: skip
    results = []
    for place, dtype, backend in ((device, torch.float32, None), ("cpu", torch.float64, "reference")):
        leaf = policy.to(place, dtype, copy=True).requires_grad_()
        a, o, r, s, w = (t.to(place, dtype) for t in (advantages, old, reference, sampler, weights))
        loss, metrics = loss_of(leaf, a, o, reference_log_probs=r, sampler_log_probs=s, weights=w, backend=backend)
        loss.backward()
        sums = torch.stack([metrics.num_tokens, metrics.clipped, metrics.kl, metrics.truncated, metrics.ratio_sum])
        results.append((loss.detach()[None], sums, _gradient(leaf)))
    for what, ours, theirs in zip(("loss", "metrics", "gradient"), *results, strict=True):
        findings.at_most(f"token loss, {surrogate}, {count} tokens: {what}", relative(ours, theirs), 1e-4)


def _check_advantage(findings: Findings, device: str, scale: str) -> None:
    from r1mega_kernels import group_advantage

    offsets = torch.tensor([0, 1, 1, 17, 50, 52])
    rewards = torch.randint(0, 4, (52,), generator=_generator(2)).double() / 3
    mask = torch.rand(52, generator=_generator(3)) > 0.2
    expected = group_advantage(rewards, offsets, mask, scale=scale, backend="reference")
    found = group_advantage(rewards.to(device), offsets.to(device), mask.to(device), scale=scale)
    findings.at_most(f"advantages, scale {scale}", _largest(found, expected), 1e-6)


# ---------------------------------------------------------------------- fast


def fast(context: Context, findings: Findings) -> None:
    """Shares of the measured limits, at DeepSeek-V3's sizes on a GPU. On a CPU they are told and not judged."""
    from bench.gpu import Shape, hidden_rows, logits_rows

    limits, cuda = context.earlier["limits"], context.device == "cuda"
    goal_shape = Shape(8192, 129280, 7168, "T=8192 V=129280")
    shapes = (
        [goal_shape, Shape(8192, 16160, 7168, "T=8192 V=129280/8")] if cuda else [Shape(32, 16160, 64, "T=32 V=16160")]
    )
    rounds = 5 if cuda else 2
    rows: list[dict[str, Any]] = []
    for measure in (logits_rows, hidden_rows):
        rows += measure(limits, rounds, shapes, context.device, with_peers=False)
    for row in rows:
        share, (kind,) = row["share_of_measured_limit"], [kind for kind in GOALS if row["case"].startswith(kind)]
        judged = cuda and goal_shape.name in row["case"].split("/")[0] and "/8" not in row["case"]
        findings.goal(f"{row['case']}: share", share, GOALS[kind] if judged else 0.0)
        findings.figure(f"{row['case']}: ms", row["ms"])
    findings.notes.append(", ".join(f"{kind} {100 * _share(rows, kind):.0f} %" for kind in GOALS))
    if not cuda:
        findings.notes.append("on a CPU the shares are not judged")


def _share(rows: list[dict[str, Any]], kind: str) -> float:
    return next(row["share_of_measured_limit"] for row in rows if row["case"].startswith(kind))
