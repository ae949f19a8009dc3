"""What a model's last output says of each trained token: a head turns the one into the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from r1mega.train.shard import Shard, join_rows
from r1mega_kernels import grouped_log_prob, linear_grpo_loss, linear_log_prob
from r1mega_kernels.linear_loss import DEFAULT_CHUNK_TOKENS

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class TokenScores:
    """values: [R] float32, what the head says of each row of a microbatch: the log-prob of the row's target (nats), or a
    `ScoreHead`'s score. entropies: [R] of the predictions (nats), or None where they were not asked for or the head has none. Both are
    over the ids that the row keeps, where the microbatch says which.
    """

    values: torch.Tensor
    entropies: torch.Tensor | None = None

    def joined(self, part: Shard, num_rows: int, group: dist.ProcessGroup | None) -> TokenScores:
        """Of this rank's rows -> of all rows, on every context-parallel rank. group: None when there is one rank."""
        if group is None:
            return self
        columns = [self.values] if self.entropies is None else [self.values, self.entropies]
        joined = join_rows(torch.stack(columns, 1), part.places, num_rows, group)
        return TokenScores(joined[:, 0], None if self.entropies is None else joined[:, 1])


class Head(Protocol):
    """Reads the output of the last pipeline stage for this rank's part of a microbatch."""

    def scores(self, output: torch.Tensor, part: Shard, temperature: float, *, entropies: bool = True) -> TokenScores:
        """Of `part.rows`. output: [t, ...], what the head's class says; temperature: of the predictions. entropies: False
        leaves them out, which spares arithmetic; the values have the same bits.
        """
        ...


@dataclass(frozen=True, slots=True)
class LogitsHead:
    """Reads logits [t, vocabulary / tp]. group: over which the vocabulary is cut; backend: of the kernels."""

    group: dist.ProcessGroup | None
    backend: str | None = None

    def scores(self, output: torch.Tensor, part: Shard, temperature: float, *, entropies: bool = True) -> TokenScores:
        found = grouped_log_prob(
            output, part.labels, temperature, part.rows, self.group, kept=part.kept, entropy=entropies,
            backend=self.backend,
        )  # fmt: skip
        return TokenScores(found.log_prob, found.entropy if entropies else None)


@dataclass(frozen=True, slots=True)
class HiddenHead:
    """Reads hidden states [t, hidden] of a model whose output layer is bypassed; the kernel makes the logits, a block at a
    time. weight: [vocabulary / tp, hidden] of that layer; vocab_size: without padding.
    """

    weight: torch.nn.Parameter
    vocab_size: int
    group: dist.ProcessGroup | None
    reduce_hidden_grad: bool
    """Add the gradient of the hidden states up over `group`; False where that is done while they are scattered."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Rows whose logits `loss` holds at a time."""

    def scores(self, output: torch.Tensor, part: Shard, temperature: float, *, entropies: bool = True) -> TokenScores:
        found = linear_log_prob(
            output, self.weight, part.labels, temperature, part.rows, self.group, vocab_size=self.vocab_size,
            kept=part.kept, entropy=entropies, reduce_hidden_grad=self.reduce_hidden_grad,
        )  # fmt: skip
        return TokenScores(found.log_prob, found.entropy if entropies else None)

    def loss(
        self,
        output: torch.Tensor,
        part: Shard,
        temperature: float,
        token_loss: Callable[[TokenScores, slice], tuple[torch.Tensor, S]],
        row_offsets: Sequence[int] | None = None,
        *,
        entropies: bool = True,
    ) -> tuple[torch.Tensor, list[S]]:
        """The sum of a loss over chunks of `part.rows`, and what else it returned of each: as of `scores`, with one matrix
        product less. It is a sum over tokens, of each one's scores alone, or with row_offsets over sequences: the chunks are
        then of whole ones, which begin there. entropies: as of `scores`.
        """
        return linear_grpo_loss(
            output, self.weight, part.labels,
            lambda found, rows: token_loss(TokenScores(found.log_prob, found.entropy if entropies else None), rows),
            temperature, part.rows, self.group, vocab_size=self.vocab_size, kept=part.kept, entropy=entropies,
            reduce_hidden_grad=self.reduce_hidden_grad,
            chunk_tokens=self.chunk_tokens, sequence_offsets=row_offsets,
        )  # fmt: skip


class ScoreHead:
    """Reads the scores [t, 1] of a model with a scalar head (`model.reward_head`)."""

    def scores(self, output: torch.Tensor, part: Shard, temperature: float, *, entropies: bool = True) -> TokenScores:
        return TokenScores(output.index_select(0, part.rows)[:, 0].float())


class CrossEntropyHead:
    """Reads cross-entropies [t]: what Megatron returns when it is given the labels, to add the MTP loss itself."""

    def scores(self, output: torch.Tensor, part: Shard, temperature: float, *, entropies: bool = True) -> TokenScores:
        return TokenScores(-output.index_select(0, part.rows).float())
