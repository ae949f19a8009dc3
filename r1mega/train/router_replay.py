"""Router replay: the update repeats the expert choices of the generator (R3, arXiv 2510.11370), or those that the policy itself
made when it computed the old log-probs (R2).

Megatron-core's routers can be told which experts to take, and write down which they took (core/transformer/moe/
router_replay.py); the weights of the experts are still computed, and have gradients. A router that runs again in the
backward pass (`model.recompute` full or moe) takes what it took in the forward pass of the same microbatch.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction


@dataclass(slots=True, eq=False)
class _Router:
    """column: of the model's MoE layers, which one it is. action: in a forward pass. follows: of the forward passes whose
    backward passes are to come, first to last, whether it was told what to take.
    """

    column: int
    module: TopKRouter
    action: RouterReplayAction | None = None
    follows: deque[bool] = field(default_factory=deque)

    @property
    def replay(self) -> RouterReplay:
        """Megatron's, made when it is first asked for."""
        self.module.router_replay = self.module.router_replay or RouterReplay()
        return self.module.router_replay

    def begin(self, action: RouterReplayAction | None) -> None:
        """Before a forward pass of its chunk."""
        self.action = action
        self.follows.append(action is RouterReplayAction.REPLAY_FORWARD)
        if action is not None:
            self.replay.set_router_replay_action(action)
        elif self.module.router_replay is not None:
            self.replay.clear_router_replay_action()

    def repeat(self, indices: torch.Tensor) -> None:
        """`begin` with what to take: [tokens, top-k]."""
        self.replay.set_target_indices(indices.long())
        self.begin(RouterReplayAction.REPLAY_FORWARD)

    def act(self) -> None:
        """Before it routes. In a backward pass, where it does when it is recomputed, another microbatch may have begun since."""
        if self.module.router_replay is None:
            return
        action = self.action
        if torch._C._current_graph_task_id() != -1:  # as torch.utils.checkpoint knows that it recomputes
            follows = bool(self.follows) and self.follows.popleft()
            action = RouterReplayAction.REPLAY_BACKWARD if follows else None
        self.replay.router_replay_action = action

    def clear(self) -> None:
        """After a pass over microbatches."""
        self.action = None
        self.follows.clear()
        if self.module.router_replay is not None:
            self.replay.clear_router_replay_action()
            self.replay.clear_indices()


class Replay:
    """The routers of this rank's model chunks, and which column of the recorded choices each follows."""

    def __init__(self, chunks: Sequence[GPTModel]):
        frequency = chunks[0].config.moe_layer_freq  # a flag for each layer of the whole model, where there are experts
        layers = [i for i, flag in enumerate(frequency) if flag] if isinstance(frequency, list) else []
        self._routers = [
            [
                _Router(layers.index(module.layer_number - 1), module)
                for module in (chunk.decoder.modules() if layers else ())
                if isinstance(module, TopKRouter)
            ]
            for chunk in chunks
        ]
        for router in self._all():
            router.module.register_forward_pre_hook(functools.partial(_before, router))
        self._num_layers = len(layers)
        self.columns = tuple(sorted({router.column for router in self._all()}))
        """Those that the routers of this rank follow."""

    def _all(self) -> Iterator[_Router]:
        for routers in self._routers:
            yield from routers

    def begin(
        self,
        chunk: int,
        choices: torch.Tensor | None,
        own: Sequence[Sequence[torch.Tensor]] | None = None,
        *,
        record: bool = False,
    ) -> None:
        """Say which experts the next forward pass of a chunk takes, and what of it is recomputed.

        choices: [tokens of this rank, MoE layers, top-k], of the layers of the whole model or of `columns`; own: by chunk, what
        `recorded` gave; neither: its own. record: write them down, for `recorded`; nothing is replayed then.
        """
        for place, router in enumerate(self._routers[chunk]):
            if record:
                router.begin(RouterReplayAction.RECORD)
            elif own is not None:
                router.repeat(own[chunk][place])
            elif choices is not None:
                whole = choices.shape[1] == self._num_layers
                router.repeat(choices[:, router.column if whole else self.columns.index(router.column)])
            else:
                router.begin(None)

    def recorded(self, chunk: int) -> tuple[torch.Tensor, ...]:
        """[tokens of this rank, top-k] of each router of a chunk, after its forward pass; uint8, or int16 of more than 256
        experts.
        """
        return tuple(_narrow(router.replay.get_recorded_indices(), router.module) for router in self._routers[chunk])

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """Afterwards the routers choose for themselves again."""
        try:
            yield
        finally:
            for router in self._all():
                router.clear()


def _before(router: _Router, _module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...]) -> None:
    router.act()


def _narrow(indices: torch.Tensor | None, router: TopKRouter) -> torch.Tensor:
    if indices is None:
        raise RuntimeError("record() and a forward pass come first")
    return indices.to(torch.uint8 if router.config.num_moe_experts <= 256 else torch.int16)
