"""What each rank of the vocabulary-parallel test runs."""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist

from r1mega_kernels import KeptTokens, grouped_log_prob, grpo_token_loss, linear_grpo_loss, linear_log_prob

TOKENS, VOCABULARY, HIDDEN, PADDING = 19, 501, 8, 3


def case():
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    upstream = torch.randn(3, TOKENS - 2, generator=generator)
    return hidden, weight, targets, torch.arange(2, TOKENS), upstream


def token_loss(scores, part):
    """Of a token: its advantage is its place, and the policy has moved."""
    advantages = torch.linspace(-1, 1, TOKENS - 2)[part]
    moved = torch.linspace(-0.5, 0.5, TOKENS - 2)[part]
    return grpo_token_loss(scores.log_prob, advantages, scores.log_prob.detach() + moved, backend="reference")


def kept_case() -> tuple[torch.Tensor, KeptTokens]:
    """Which ids of the whole vocabulary each token keeps: token 5 its target alone, token 6 all (an empty list)."""
    keeps = torch.rand(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(8)) < 0.1
    keeps[5] = False
    keeps.scatter_(1, case()[2][:, None], True)
    keeps[6] = False
    offsets = torch.zeros(TOKENS + 1, dtype=torch.int64)
    offsets[1:] = keeps.sum(1).cumsum(0)
    kept = KeptTokens(keeps.nonzero()[:, 1].int(), offsets)
    keeps[6] = True
    return keeps, kept


def run(backends: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """`shard_results` of every backend: one pair of processes serves them all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {backend: shard_results(backend) for backend in backends}
    dist.destroy_process_group()
    return results


def shard_results(backend: str) -> dict[str, np.ndarray]:
    """This rank's results on shards of unequal width, the second with PADDING columns beyond the vocabulary that nobody may
    read; 'masked': where the first rank's columns are all -inf.
    """
    rank, group = int(os.environ["RANK"]), dist.group.WORLD
    hidden, weight, targets, rows, upstream = case()
    columns = slice(0, 200) if rank == 0 else slice(200, VOCABULARY)
    padding = PADDING if rank == 1 else 0
    whole = (hidden @ weight.t())[:, columns]
    logits = torch.cat([whole, torch.full((TOKENS, padding), torch.inf)], 1).requires_grad_()
    place = {"tp_group": group, "vocab_start": columns.start, "vocab_size": VOCABULARY, "backend": backend}
    results = torch.stack(grouped_log_prob(logits, targets, 0.9, rows, **place))
    (results * upstream).sum().backward()
    padded = torch.cat([weight[columns], torch.full((padding, HIDDEN), torch.nan)])
    hidden_leaf, weight_leaf = hidden.clone().requires_grad_(), padded.requires_grad_()
    linear = torch.stack(linear_log_prob(hidden_leaf, weight_leaf, targets, 0.9, rows, **place))
    (linear * upstream).sum().backward()
    chunked = [x.detach().clone().requires_grad_() for x in (hidden, padded)]
    loss, _ = linear_grpo_loss(*chunked, targets, token_loss, 0.9, rows, **place, chunk_tokens=5)
    (loss * 3).backward()
    kept_leaf = logits.detach().clone().requires_grad_()
    kept = torch.stack(grouped_log_prob(kept_leaf, targets, 0.9, rows, **place, kept=kept_case()[1]))
    (kept * upstream).sum().backward()
    masked_shard = torch.full((TOKENS, 4), -torch.inf) if rank == 0 else whole
    empty = grouped_log_prob(
        masked_shard, targets.clamp(min=4, max=300), tp_group=group, vocab_start=0 if rank == 0 else 4,
        vocab_size=305, backend=backend,
    )  # fmt: skip
    tensors = {
        "results": results.detach(), "grad_logits": logits.grad, "linear": linear.detach(),
        "kept": kept.detach(), "kept_logits": kept_leaf.grad,
        "masked": torch.stack(empty),
        "grad_hidden": hidden_leaf.grad, "grad_weight": weight_leaf.grad,
        "loss": loss.detach(), "loss_hidden": chunked[0].grad, "loss_weight": chunked[1].grad,
    }  # fmt: skip
    return {name: tensor.numpy() for name, tensor in tensors.items()}  # a tensor's memory would die with this process
