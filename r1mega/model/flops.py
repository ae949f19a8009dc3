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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from r1mega.errors import ConfigError
from r1mega.model import deepseek_v3, dense
from r1mega.model.hf_config import require

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


def model_flops(hf: Mapping[str, Any]) -> ModelFlops:
    """For a config.json of the families that can be trained. Raises ConfigError for another, or missing keys."""
    kind = hf.get("model_type")
    if kind in deepseek_v3.MODEL_TYPES:
        return _mixture_of_experts(hf)
    if kind in dense.MODEL_TYPES:
        return _dense(hf)
    known = ", ".join((*deepseek_v3.MODEL_TYPES, *dense.MODEL_TYPES))
    raise ConfigError(f"config.json: model_type {kind!r} is not one of {known}")


def _mixture_of_experts(hf: Mapping[str, Any]) -> ModelFlops:
    """DeepSeek-V3's latent attention and mixture of experts (technical report, sections 2.1 and 2.2)."""
    hidden, heads, layers, vocabulary, intermediate = require(
        hf, "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"
    )
    kv_rank, nope, rope, value = require(hf, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    experts, top_k, expert, first_dense = require(
        hf, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace"
    )
    key, q_rank = nope + rope, hf.get("q_lora_rank")
    query = hidden * q_rank + q_rank * heads * key if q_rank else hidden * heads * key
    latent = hidden * (kv_rank + rope) + kv_rank * heads * (nope + value)
    attention = query + latent + heads * value * hidden
    shared = hf.get("n_shared_experts") or 0
    mixture = hidden * experts + (top_k + shared) * 3 * hidden * expert
    pair = heads * (key + value)
    first_dense = min(first_dense, layers)
    main = layers * attention + first_dense * 3 * hidden * intermediate + (layers - first_dense) * mixture
    depth = hf.get("num_nextn_predict_layers") or 0
    further = depth * (2 * hidden * hidden + attention + mixture)  # joins hidden state and embedding first
    head = hidden * vocabulary
    return ModelFlops(
        Forward(2.0 * main, 2.0 * layers * pair, 2.0 * head),
        Forward(2.0 * further, 2.0 * depth * pair, 2.0 * depth * head),
    )


def _dense(hf: Mapping[str, Any]) -> ModelFlops:
    """Llama, Qwen2.5, Qwen3: grouped-query attention and a gated MLP."""
    hidden, heads, layers, vocabulary, intermediate = require(
        hf, "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"
    )
    size, groups = hf.get("head_dim") or hidden // heads, hf.get("num_key_value_heads") or heads
    layer = hidden * size * (heads + 2 * groups) + heads * size * hidden + 3 * hidden * intermediate
    main = Forward(2.0 * layers * layer, 2.0 * layers * heads * 2 * size, 2.0 * hidden * vocabulary)
    return ModelFlops(main, Forward(0.0, 0.0, 0.0))
