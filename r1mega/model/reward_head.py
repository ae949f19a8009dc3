"""A scalar head in place of the output layer: one score a position. Under HF names it is `score.weight`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from r1mega.config.model_files import HFConfig
from r1mega.platform.marks import mark

SCORE = "score.weight"
READER = "r1mega_reward"
"""Key of config.json that says how a reward model is to be asked: {"template", "reads"}."""


class ScalarHead(torch.nn.Module):
    """hidden [tokens, batch, hidden] -> scores [tokens, batch, 1] in float32. No bias: a pairwise loss cannot see one,
    and transformers' sequence classifiers have none.

    With sequence parallelism each rank scores its part of the tokens and the scores are put together.
    """

    def __init__(self, like: torch.nn.Parameter, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1, like.shape[1]), math.nan, dtype=like.dtype, device=like.device))
        # every tensor-parallel rank has all of it but sees only its tokens: Megatron then adds the gradients up
        mark(self.weight, sequence_parallel=sequence_parallel)
        self._sequence_parallel = sequence_parallel

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        scores = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self._sequence_parallel:
            scores = gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False)
        return scores, None


def attach_scalar_head(chunks: Sequence[Any]) -> None:
    """Replace the last pipeline stage's output layer, before the chunks are wrapped. Weights are NaN until loaded."""
    for chunk in chunks:
        chunk.scalar_head = True
        if chunk.post_process:
            chunk.output_layer = ScalarHead(chunk.output_layer.weight, chunk.config.sequence_parallel)


def untied(hf_config: HFConfig) -> dict[str, Any]:
    """A config to build a model with a scalar head from: the head shares nothing with the embeddings."""
    return {**hf_config, "tie_word_embeddings": False}


def initial_head(hidden_size: int, seed: int) -> torch.Tensor:
    """[1, hidden] drawn from N(0, 1 / (hidden + 1)) (Stiennon et al. 2020, appendix B.1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)


def classifier_config(hf_config: HFConfig, reader: Mapping[str, str]) -> dict[str, Any]:
    """config.json of the export: transformers' sequence classifier of the same family, with one label."""
    architecture = hf_config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return {**untied(hf_config), "architectures": [architecture], **labels, READER: dict(reader)}
