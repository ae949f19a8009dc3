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
    """column: of the model's MoE layers, which one it is. records, chosen: whether it writes down in the next forward pass what it
    takes, and what it is to take, [tokens, top-k] in as few bits as came. follows: `chosen` of the forward passes whose backward
    passes are to come, first to last, where it runs again in them.
    """

    column: int
    module: TopKRouter
    records: bool = False
    chosen: torch.Tensor | None = None
    follows: deque[torch.Tensor | None] = field(default_factory=deque)

    @property
    def replay(self) -> RouterReplay:
        """Megatron's, made when it is first asked for."""
        self.module.router_replay = self.module.router_replay or RouterReplay()
        return self.module.router_replay

    def begin(self, chosen: torch.Tensor | None = None, *, records: bool = False) -> None:
        """Before a forward pass of its chunk."""
        self.chosen, self.records = chosen, records
        if torch.is_grad_enabled() and _is_recomputed(self.module):
            self.follows.append(chosen)

    def act(self) -> None:
        """Before it routes. In a backward pass, where it does when it is recomputed, another microbatch may have begun since.

        Megatron's own list of what backward passes take (REPLAY_BACKWARD) is left alone: nothing else than those takes
        anything off it, and it holds int64.
        """
        chosen, action = self.chosen, RouterReplayAction.RECORD if self.records else None
        if torch._C._current_graph_task_id() != -1:  # as torch.utils.checkpoint knows that it recomputes
            chosen, action = self.follows.popleft(), None
        if chosen is not None:
            action = RouterReplayAction.REPLAY_FORWARD
            self.replay.target_topk_idx = chosen.long()
        if action is not None or self.module.router_replay is not None:
            self.replay.router_replay_action = action

    def routed(self) -> None:
        """After it routed: what it took is of no use to anybody any more."""
        if self.module.router_replay is not None:
            self.replay.target_topk_idx = None

    def clear(self) -> None:
        """After a pass over microbatches."""
        self.begin()
        self.follows.clear()
        if self.module.router_replay is not None:
            self.replay.clear_router_replay_action()
            self.replay.clear_indices()


def _is_recomputed(router: TopKRouter) -> bool:
    """Whether it runs again in a backward pass."""
    config = router.config
    return config.recompute_granularity == "full" or (
        config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or ())
    )


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
            router.module.register_forward_hook(functools.partial(_after, router))
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
        own: Sequence[torch.Tensor] | None = None,
        *,
        record: bool = False,
    ) -> None:
        """Say which experts the next forward pass of a chunk takes, and what of it is recomputed.

        choices: [tokens of this rank, MoE layers, top-k], of the layers of the whole model or of `columns`; own: by chunk, what
        `recorded` gave; neither: its own. record: write them down, for `recorded`; nothing is replayed then.
        """
        routers = self._routers[chunk]
        taken = own[chunk].to(routers[0].module.weight.device) if routers and own is not None and not record else None
        for place, router in enumerate(routers):
            if record:
                router.begin(records=True)
            elif taken is not None:
                router.begin(taken[place])
            elif choices is not None:
                whole = choices.shape[1] == self._num_layers
                router.begin(choices[:, router.column if whole else self.columns.index(router.column)])
            else:
                router.begin()

    def recorded(self, chunk: int) -> torch.Tensor:
        """[routers of a chunk, tokens of this rank, top-k] in host memory, after its forward pass; uint8, or int16 of more than
        256 experts.
        """
        taken = [_narrow(router.replay.get_recorded_indices(), router.module) for router in self._routers[chunk]]
        return torch.stack(taken).cpu() if taken else torch.empty(0, dtype=torch.uint8)

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


def _after(router: _Router, _module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], _outputs: object) -> None:
    router.routed()


def _narrow(indices: torch.Tensor | None, router: TopKRouter) -> torch.Tensor:
    if indices is None:
        raise RuntimeError("record() and a forward pass come first")
    return indices.to(torch.uint8 if router.config.num_moe_experts <= 256 else torch.int16)
