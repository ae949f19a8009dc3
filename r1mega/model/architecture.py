"""What a decoder is made of, as its config.json says it: all that names, shapes, cuts and costs of its tensors follow from.

Nothing here is Megatron's or vLLM's. A family (r1mega/model/families) reads it from its own keys; the conversion
(checkpoint/parameters.py), the generator's layout (weights/layout.py) and the model FLOPs (flops.py) go by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from r1mega.config.model_files import HFConfig
from r1mega.model.hf_config import require


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1). query_rank: None: queries are projected in one step.

    nope_size, rope_size, value_size: of each head's key without and with rotation, and of its value.
    """

    heads: int
    query_rank: int | None
    kv_rank: int
    nope_size: int
    rope_size: int
    value_size: int


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """Grouped-query attention. groups: of queries that share a key and a value; qk_norm: a norm on each head's query and key."""

    heads: int
    groups: int
    head_size: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in some of the layers.

    count: routed experts; chosen: of them for a token; size: of the hidden layer of one; shared_size: of all shared ones
    together; router_bias: the router has `e_score_correction_bias`; layers: for each decoder layer, whether it has them.
    """

    count: int
    chosen: int
    size: int
    layers: tuple[bool, ...]
    shared_size: int = 0
    router_bias: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """num_mtp_layers: layers of multi-token prediction; they have experts. intermediate_size: of layers without experts."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool
    attention: LatentAttention | GroupedAttention
    experts: Experts | None = None
    mlp_bias: bool = False
    num_mtp_layers: int = 0

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts; layers of multi-token prediction count on from num_layers."""
        return self.experts is not None and (layer >= self.num_layers or self.experts.layers[layer])


def sizes(hf: HFConfig) -> dict[str, Any]:
    """The fields of Architecture that every family has under the same keys. ConfigError for missing ones."""
    layers, hidden, intermediate, vocabulary = require(
        hf, "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"
    )
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
    }
