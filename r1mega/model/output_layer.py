"""What a last pipeline stage gives instead of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import ColumnParallelLinear


def bypass_output_layer(chunk: GPTModel) -> ColumnParallelLinear | None:
    """Make a last pipeline stage return its final hidden states (of all tokens, also under sequence parallelism); the
    layer whose weight is left for `linear_log_prob`.
    """
    layer = getattr(chunk, "output_layer", None)
    if layer is None:
        return None

    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    def forward(hidden: torch.Tensor, *_args: object, **_kwargs: object) -> tuple[torch.Tensor, None]:
        # backward: each rank's gradient is of its part of the vocabulary, they are added up while they are scattered
        return gather_from_sequence_parallel_region(hidden) if chunk.config.sequence_parallel else hidden, None

    layer.forward = forward
    if (masking := getattr(chunk, "vocabulary_mask", None)) is not None:
        masking.remove()  # `linear_log_prob` leaves the rows that pad the vocabulary out itself
    return layer
