"""Model FLOPs: the floating-point operations that a model's mathematics asks for, whatever a program does to get there.

Counted: the matrix products, two operations a multiply-add, of projections, attention, router, the chosen and the shared
experts, the output layer at the positions that are scored, and multi-token prediction where it is trained. Attention is
causal and counted pair by pair within each sequence, so that long sequences cost what they cost. Training is three times
the forward pass (Narayanan et al. 2021, arXiv 2104.04473); recomputed activations, padding and what a kernel computes
only to mask it are not model FLOPs. Not counted: norms, rotary embeddings, softmax, activations, the optimizer (below
1 % in models of this size). Latent attention is counted in its plain form, keys and values of every head from the
latent; a generator that absorbs those projections into queries and outputs executes other numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from r1mega.config.model_files import HFConfig
from r1mega.model.architecture import GroupedAttention, LatentAttention
from r1mega.model.families import architecture_of

TRAINING_FORWARDS = 3
"""Forward and backward pass, in forward passes: the backward one computes the gradients of inputs and of weights."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a forward pass has to process: tokens; pairs of a query and a key that it attends to; tokens that the output
    layer scores.
    """

    tokens: float = 0
    pairs: float = 0
    scored: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.scored + other.scored)

    def __mul__(self, times: float) -> Work:
        return Work(self.tokens * times, self.pairs * times, self.scored * times)


def sequences_work(lengths: Iterable[tuple[int, int]]) -> Work:
    """Of whole sequences, each (tokens, tokens of it that are scored)."""
    total = Work()
    for tokens, scored in lengths:
        total += Work(tokens, tokens * (tokens + 1) // 2, scored)
    return total


def generation_work(prompt: int, responses: Iterable[int]) -> Work:
    """Of sampling responses (tokens each) to one prompt: a pass for every sampled token over all that precedes it. The
    tokens of the prompt before its last are processed once, as a generator with a prefix cache needs to.
    """
    total = Work(prompt - 1, prompt * (prompt - 1) // 2, 0)
    for tokens in responses:
        total += Work(tokens, tokens * prompt + tokens * (tokens - 1) // 2, tokens)
    return total


@dataclass(frozen=True, slots=True)
class Forward:
    """FLOPs of a forward pass by what causes them: a token, an attended pair (over all layers), a scored token."""

    token: float
    pair: float
    scored: float

    def __call__(self, work: Work) -> float:
        return self.token * work.tokens + self.pair * work.pairs + self.scored * work.scored


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """main: the decoder and its output layer; further: what the layers of multi-token prediction add where they run."""

    main: Forward
    further: Forward

    def forward(self, work: Work) -> float:
        return self.main(work)

    def training(self, work: Work, *, mtp_loss: bool = False) -> float:
        """Forward and backward. mtp_loss: with the layers of multi-token prediction."""
        return TRAINING_FORWARDS * (self.main(work) + (self.further(work) if mtp_loss else 0.0))


def model_flops(hf: HFConfig) -> ModelFlops:
    """For a config.json of the families that can be trained. Raises ConfigError for another, or missing keys."""
    model = architecture_of(hf)
    hidden, head = model.hidden_size, model.hidden_size * model.vocab_size
    attention, pair = _attention(hidden, model.attention)
    sparse, mixture = 0, 0
    if (experts := model.experts) is not None:
        sparse = sum(experts.layers)
        mixture = hidden * experts.count + (experts.chosen * experts.size + experts.shared_size) * 3 * hidden
    dense = model.num_layers - sparse
    main = model.num_layers * attention + dense * 3 * hidden * model.intermediate_size + sparse * mixture
    depth = model.num_mtp_layers
    further = depth * (2 * hidden * hidden + attention + mixture)  # joins hidden state and embedding first
    return ModelFlops(
        Forward(2.0 * main, 2.0 * model.num_layers * pair, 2.0 * head),
        Forward(2.0 * further, 2.0 * depth * pair, 2.0 * depth * head),
    )


def _attention(hidden: int, attention: LatentAttention | GroupedAttention) -> tuple[int, int]:
    """(multiply-adds of a layer's projections for a token, of its scores and values for a pair)."""
    heads = attention.heads
    if isinstance(attention, GroupedAttention):
        size = attention.head_size
        return hidden * size * (heads + 2 * attention.groups) + heads * size * hidden, heads * 2 * size
    key, value, rank = attention.nope_size + attention.rope_size, attention.value_size, attention.query_rank
    query = hidden * rank + rank * heads * key if rank else hidden * heads * key
    latent = hidden * (attention.kv_rank + attention.rope_size)
    latent += attention.kv_rank * heads * (attention.nope_size + value)
    return query + latent + heads * value * hidden, heads * (key + value)
