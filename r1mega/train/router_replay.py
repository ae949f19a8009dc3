"""Router replay: the update repeats the expert choices of the generator (R3, arXiv 2510.11370).

Megatron-core's routers can be told which experts to take (core/transformer/moe/router_replay.py); the weights of the
experts are still computed, and have gradients. Not built: with `model.recompute` full or moe, which route a second time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction


class Replay:
    """The routers of this rank's model chunks, and which column of the recorded choices each follows."""

    def __init__(self, chunks: Sequence[GPTModel]):
        frequency = chunks[0].config.moe_layer_freq  # a flag for each layer of the whole model, where there are experts
        layers = [i for i, flag in enumerate(frequency) if flag] if isinstance(frequency, list) else []
        self._routers = [
            [
                (layers.index(module.layer_number - 1), module)
                for module in (chunk.decoder.modules() if layers else ())
                if isinstance(module, TopKRouter)
            ]
            for chunk in chunks
        ]
        self._num_layers = len(layers)
        self.columns = tuple(sorted({column for chunk in self._routers for column, _ in chunk}))
        """Those that the routers of this rank follow."""

    def set(self, chunk: int, choices: torch.Tensor | None) -> None:
        """Make the next forward pass of a chunk take these experts: [tokens of this rank, MoE layers, top-k], of the layers of
        the whole model or of `columns`; None: its own.
        """
        for column, router in self._routers[chunk]:
            if choices is not None:
                place = column if choices.shape[1] == self._num_layers else self.columns.index(column)
                router.router_replay = router.router_replay or RouterReplay()
                router.router_replay.set_target_indices(choices[:, place].long())
                router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            elif router.router_replay is not None:
                router.router_replay.clear_router_replay_action()

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """Afterwards the routers choose for themselves again."""
        try:
            yield
        finally:
            for _, router in (entry for chunk in self._routers for entry in chunk):
                if router.router_replay is not None:
                    router.router_replay.clear_router_replay_action()
                    router.router_replay.clear_indices()
