"""What padding is to FP8 layers: zeros, so that it takes part in no scale.

The scales of FP8 are of blocks of tokens, or of all of them. A padded token's embedding is made zero: it then is zero
behind every norm, projection (without bias) and expert, has no gradient, and raises no block's largest value.
Exactly so for the padding behind the samples, which is a sequence of its own. Under context parallelism each sequence is
padded at its end too, and those tokens attend to the sequence; with biased projections (Qwen2) zeros become the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class ZeroedPadding:
    """Makes the embeddings of padded tokens zero. padding: of the microbatch that comes next, [tokens that this rank's
    layers see] bool, or None; see `Shard`.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        self.padding: torch.Tensor | None = None
        for chunk in chunks:
            if (embedding := getattr(chunk, "embedding", None)) is not None:
                embedding.register_forward_hook(self._zero)

    def _zero(self, _embedding: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """output: [tokens, 1, hidden]."""
        return output if self.padding is None else output.masked_fill(self.padding[:, None, None], 0.0)
