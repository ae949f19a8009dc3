"""Peers on a CPU: their own torch functions where the packages are installed (`peers.left_out` says which are not), and what
they compute as plain torch functions, written from what they document, not from their sources: their kernels for GPUs
(Triton's, CuTe's) have no CPU form. Triton's interpreter runs Liger's: that shows its error, and no time worth a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

import r1mega_kernels
from bench import peers
from bench.timing import cpu_seconds, peak_bytes

Pair = tuple[torch.Tensor, ...]
CHUNK_TOKENS = 64
BLOCK_COLUMNS, FILTERED_BELOW = 1024, 2.0**-12


def row_by_row(logits: torch.Tensor, targets: torch.Tensor) -> Pair:
    """TRL's way: the logsumexp of one row at a time (log_softmax of a row below fp32), entropies of 128 rows at a time."""
    if logits.dtype == torch.float32:
        log_probs = logits.gather(1, targets[:, None])[:, 0] - torch.stack([row.logsumexp(-1) for row in logits])
    else:
        rows = zip(logits, targets, strict=True)
        log_probs = torch.stack([row.log_softmax(-1).gather(0, target[None])[0] for row, target in rows])
    entropies = []
    for part in logits.split(128):
        of_part = part.log_softmax(-1)
        entropies.append(-(of_part.exp() * of_part).sum(-1))
    return log_probs, torch.cat(entropies)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> Pair:
    """verl's way without flash-attention: the loss in fp32; the entropy as logsumexp minus the mean logit."""
    wide = logits.float()
    entropies = wide.logsumexp(-1) - (wide.softmax(-1) * wide).sum(-1)
    return -functional.cross_entropy(wide, targets, reduction="none"), entropies


def with_kernel(logits: torch.Tensor, targets: torch.Tensor) -> Pair:
    """This package's."""
    scores = r1mega_kernels.grouped_log_prob(logits, targets)
    return scores.log_prob, scores.entropy


FROM_LOGITS: dict[str, Callable[[torch.Tensor, torch.Tensor], Pair]] = {
    "kernel": with_kernel,
    "TRL's formula": row_by_row,
    "verl's formula": cross_entropy,
}


def logits_rows(shapes: list[tuple[int, int, torch.dtype]], rounds: int) -> list[dict[str, str | float]]:
    """Log-probs, entropies and the gradient of both at each (tokens, vocabulary, dtype): time, peak memory beyond arguments,
    largest error of the log-probs and of the gradient (relative to its largest element) against float64."""
    records = []
    for tokens, vocabulary, dtype in shapes:
        generator = torch.Generator().manual_seed(0)
        logits = (torch.randn(tokens, vocabulary, generator=generator) * 3).to(dtype).requires_grad_()
        targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
        upstream = torch.randn(tokens, generator=generator)

        def update(way, x=logits, targets=targets, upstream=upstream):
            log_probs, entropies = way(x, targets)
            loss = (log_probs.to(upstream) * upstream).sum() + 0.01 * entropies.to(upstream).sum()
            return log_probs.detach(), torch.autograd.grad(loss, x)[0]

        wide = logits.detach().double().requires_grad_()
        exact = update(cross_entropy_of_float64, wide, targets, upstream.double())
        name = f"peers from logits T={tokens} V={vocabulary} {str(dtype)[6:]} forward + backward"
        ways = FROM_LOGITS | {f"{who}, the package": way for who, way in peers.on_cpu_from_logits().items()}
        records += _records(name, {who: functools.partial(update, way) for who, way in ways.items()}, exact, rounds)
    return records


def _negative(way: Callable[..., object], logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses = way(logits, targets)
    assert isinstance(losses, torch.Tensor)
    return -losses


def interpreted_rows(tokens: int, vocabulary: int) -> list[dict[str, str | float]]:
    """Log-probs and their gradient, as above, without entropies, where Triton's interpreter runs a peer's kernel: one run."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocabulary, generator=generator) * 3
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)

    def update(way, dtype=torch.float32):
        leaf = logits.to(dtype).requires_grad_()
        log_probs = way(leaf * 1.0, targets)  # some overwrite what they are given
        return log_probs.detach(), torch.autograd.grad(log_probs.sum(), leaf)[0]

    exact = update(lambda x, t: cross_entropy_of_float64(x, t)[0], torch.float64)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "kernel": lambda x, t: r1mega_kernels.grouped_log_prob(x, t, entropy=False).log_prob
    }
    ways |= {
        f"{who}, in Triton's interpreter": functools.partial(_negative, way)
        for who, way in peers.on_cpu_interpreted().items()
    }
    name = f"peers' Triton kernels T={tokens} V={vocabulary} float32 forward + backward"
    return _records(name, {who: functools.partial(update, way) for who, way in ways.items()}, exact, 1)


def cross_entropy_of_float64(logits: torch.Tensor, targets: torch.Tensor) -> Pair:
    """What the errors are measured against."""
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def hidden_rows(shapes: list[tuple[int, int, int, torch.dtype]], rounds: int) -> list[dict[str, str | float]]:
    """A clipped token loss with both gradients at each (tokens, hidden, vocabulary, dtype): as above, the errors those of
    the gradients of hidden states and weight."""
    records = []
    for tokens, width, vocabulary, dtype in shapes:
        generator = torch.Generator().manual_seed(2)
        hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
        weight = (torch.randn(vocabulary, width, generator=generator) * 3 / width**0.5).to(dtype).requires_grad_()
        targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
        advantages = torch.randn(tokens, generator=generator)
        wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
        exact = plain(wide_hidden, wide_weight, targets, advantages.double())
        ways = {
            "kernel": one_pass,
            "whole logits (verl, TRL)": plain,
            "chunked (Liger's, QuACK's way)": chunked,
            "filtered (CCE's way)": filtered,
        }
        ways |= {f"{who}, the package": way for who, way in packages().items()}
        contestants = {who: functools.partial(way, hidden, weight, targets, advantages) for who, way in ways.items()}
        name = f"peers from hidden states T={tokens} H={width} V={vocabulary} {str(dtype)[6:]} loss + gradients"
        records += _records(name, contestants, exact, rounds)
    return records


def _token_loss(log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    ratio = (log_probs - log_probs.detach()).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()


def packages() -> dict[str, Callable[..., Pair]]:
    """Installed peers: what they give put into the same loss, or their own."""

    def gradients(loss, way, hidden, weight, targets, advantages) -> Pair:
        return torch.autograd.grad(loss(way, hidden, weight, targets, advantages), (hidden, weight))

    def of_log_probs(way, hidden, weight, targets, advantages) -> torch.Tensor:
        return _token_loss(way(hidden, weight, targets).to(advantages.dtype), advantages)

    def of_losses(way, hidden, weight, targets, advantages) -> torch.Tensor:
        return _token_loss(-way(hidden, weight, targets).to(advantages.dtype), advantages)

    def of_its_own(way, hidden, weight, targets, advantages) -> torch.Tensor:
        return way(hidden, weight, targets, advantages)

    ways = {who: (of_losses if "CCE" in who else of_log_probs, way) for who, way in peers.on_cpu_from_hidden().items()}
    ways |= {who: (of_its_own, way) for who, way in peers.on_cpu_losses().items()}
    return {who: functools.partial(gradients, loss, way) for who, (loss, way) in ways.items()}


def one_pass(hidden, weight, targets, advantages) -> Pair:
    """This package's."""
    loss, _ = r1mega_kernels.linear_grpo_loss(
        hidden, weight, targets, lambda scores, part: (_token_loss(scores.log_prob, advantages[part]), None)
    )
    return torch.autograd.grad(loss, (hidden, weight))


def plain(hidden, weight, targets, advantages) -> Pair:
    """The product in the model's dtype, then fp32: what a trainer does that has no fused head."""
    logits = (hidden @ weight.t()).to(advantages.dtype)
    log_probs = -functional.cross_entropy(logits, targets, reduction="none")
    return torch.autograd.grad(_token_loss(log_probs, advantages), (hidden, weight))


def chunked(hidden, weight, targets, advantages) -> Pair:
    """Loss and gradients of a chunk of tokens at a time, the weight's added up in its own dtype."""
    grads, total = [], torch.zeros_like(weight)
    for part in (slice(at, at + CHUNK_TOKENS) for at in range(0, len(hidden), CHUNK_TOKENS)):
        of_hidden, of_weight = plain(hidden[part].detach().requires_grad_(), weight, targets[part], advantages[part])
        grads.append(of_hidden)
        total += of_weight
    return torch.cat(grads), total


def filtered(hidden, weight, targets, advantages) -> Pair:
    """Apple's CCE: no logits kept, blocks of the vocabulary made twice; probabilities below 2^-12 bring no gradient."""
    states, total = hidden.detach(), advantages.new_full((len(hidden),), -torch.inf)
    blocks = [slice(at, at + BLOCK_COLUMNS) for at in range(0, len(weight), BLOCK_COLUMNS)]
    for block in blocks:
        total = torch.logaddexp(total, (states @ weight.detach()[block].t()).to(total).logsumexp(-1))
    at_target = (states.to(total) * weight.detach()[targets].to(total)).sum(-1)
    log_probs = (at_target - total).requires_grad_()
    (upstream,) = torch.autograd.grad(_token_loss(log_probs, advantages), log_probs)
    of_hidden, of_weight, rows = torch.zeros_like(states), torch.empty_like(weight), torch.arange(len(states))
    for block in blocks:
        factor = weight.detach()[block]
        probabilities = ((states @ factor.t()).to(total) - total[:, None]).exp()
        grad = -upstream[:, None] * torch.where(probabilities < FILTERED_BELOW, 0.0, probabilities)
        here = (targets >= block.start) & (targets < block.stop)
        grad[rows[here], targets[here] - block.start] += upstream[here]
        grad = grad.to(states.dtype)
        of_hidden += grad @ factor
        of_weight[block] = grad.t() @ states
    return of_hidden, of_weight.detach()


def _records(
    name: str, contestants: Mapping[str, Callable[[], Pair]], exact: Pair, rounds: int
) -> list[dict[str, str | float]]:
    records: list[dict[str, str | float]] = []
    running = {}
    for who, way in contestants.items():
        try:
            way()
        except Exception as error:  # a package of another version, or without a compiler: the others are measured
            if "the package" not in who:
                raise
            records.append({"case": f"{name}, {who}", "left out": str(error).splitlines()[0][:200]})
        else:
            running[who] = way
    seconds = cpu_seconds(running, rounds)
    for who, way in running.items():
        errors = [(x.double() - y).abs().max().item() / y.abs().max().item() for x, y in zip(way(), exact, strict=True)]
        records.append(
            {
                "case": f"{name}, {who}",
                "ms": round(seconds[who] * 1e3, 2),
                "x kernel": round(seconds[who] / seconds["kernel"], 2),
                "peak_mb": round(peak_bytes(way) / 1e6, 1),
                "error": f"{errors[0]:.1e} {errors[1]:.1e}",
            }
        )
    return records


def measure(quick: bool) -> list[dict[str, str | float]]:
    """All rows; `quick` takes a tenth of the vocabulary."""
    vocabulary, rounds = (12928, 2) if quick else (129280, 3)
    shapes = [(64, vocabulary, torch.bfloat16), (64, vocabulary, torch.float32)]
    records = logits_rows(shapes, rounds) + interpreted_rows(16, 4096)
    records += hidden_rows([(256, 256, vocabulary, dtype) for dtype in (torch.bfloat16, torch.float32)], rounds)
    for peer in peers.left_out():
        records.append({"case": f"left out: {peer}"})
    return records
