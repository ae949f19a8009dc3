"""The trainer's parameters as a generator in FP8 holds them: quantised block by block where they are, before they are sent.

A block of 128 x 128 lies whole on every rank that holds any of it (layouts that cut one are refused), so that its scale is
that rank's own to find, and equals the one that the whole tensor would have: what is sent are the bytes of the checkpoint
in DeepSeek-V3's published form (checkpoint/fp8_blocks.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

import torch

from r1mega.checkpoint.fp8_blocks import SCALE, is_quantized, quantize
from r1mega.config.model_files import HFConfig
from r1mega.weights.layout import Placement
from r1mega.weights.trainer_layout import TrainerLayout


def quantized_tensors(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole HF tensors, those of linear layers in e4m3, each followed by its scales."""
    for name, tensor in named_tensors:
        if not is_quantized(name):
            yield name, tensor
            continue
        quantized, scales = quantize(tensor.detach())
        yield name, quantized
        yield name + SCALE, scales


class QuantizedParameters(Mapping[str, torch.Tensor]):
    """One rank's parameters by the names that a plan has for them, linear layers in e4m3, and under HF names the scales of
    its parts of each HF tensor, one part below the other.

    A parameter is quantised when it is asked for; those of `cache_bytes` are kept.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        parts: Mapping[str, list[tuple[Placement, Placement]]],
        cache_bytes: int,
    ):
        """parts: of `quantized_parts`."""
        self._parameters, self._parts, self._room = parameters, parts, cache_bytes
        self._owners = {scale.parameter: name for name, pairs in parts.items() for _, scale in pairs}
        self._made: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()

    def __getitem__(self, name: str) -> torch.Tensor:
        owner = self._owners.get(name, name)
        if owner not in self._parts:
            return self._parameters[name]
        if owner not in self._made:
            self._made[owner] = self._quantize(owner)
            while len(self._made) > 1 and self._held_bytes() > self._room:
                self._made.popitem(last=False)
        self._made.move_to_end(owner)
        return self._made[owner][name]

    def __iter__(self) -> Iterator[str]:
        yield from self._parameters
        yield from self._owners

    def __len__(self) -> int:
        return len(self._parameters) + len(self._owners)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Without quantising it; None: there is none."""
        owner = self._owners.get(name)
        if owner is None:
            return tuple(self._parameters[name].shape) if name in self._parameters else None
        return _extent(scale for _, scale in self._parts[owner] if scale.parameter == name)

    def _held_bytes(self) -> int:
        return sum(tensor.nbytes for made in self._made.values() for tensor in made.values())

    @torch.no_grad()
    def _quantize(self, owner: str) -> dict[str, torch.Tensor]:
        source = self._parameters[owner]
        made = {owner: torch.empty(source.shape, dtype=torch.float8_e4m3fn, device=source.device)}
        for name in {scale.parameter for _, scale in self._parts[owner]}:
            made[name] = torch.empty(self.shape(name) or (), dtype=torch.float32, device=source.device)
        for weight, scale in self._parts[owner]:
            quantized, scales = quantize(weight.read(self._parameters))
            weight.write(made, quantized)
            scale.write(made, scales)
        return made


def quantized_parts(
    trainer: TrainerLayout, shapes: Mapping[str, tuple[int, ...]], config: HFConfig, rank: int
) -> dict[str, list[tuple[Placement, Placement]]]:
    """By parameter of this rank: its parts of HF tensors that have scales among `shapes`, and where those of each part are."""
    parts: dict[str, list[tuple[Placement, Placement]]] = {}
    for name in shapes:
        if not name.endswith(SCALE):
            continue
        weight, stages = name.removesuffix(SCALE), trainer.holding_stages(name)
        pairs = zip(trainer.shards(weight, shapes, config), trainer.shards(name, shapes, config), strict=True)
        for (part, holders), (scale, _) in pairs:
            if rank in trainer.ranks(holders, stages):
                parts.setdefault(part.parameter, []).append((part, scale))
    return parts


def _extent(placements: Iterable[Placement]) -> tuple[int, ...]:
    stops = [[stop for _, stop in placement.target] for placement in placements]
    return tuple(max(column) for column in zip(*stops, strict=True))
