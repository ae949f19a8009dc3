"""What goes where when weights move from trainer to generator: a list of copies, in buckets, made without any process.

A copy takes a region of a trainer's parameter on one rank to a region of a generator's parameter on another (or on the
same: then nothing is sent). Every generator rank gets each element that it wants exactly once, from a rank that holds
it: from itself, else from a rank of its node, else from any, always the one that has sent least so far. So the bytes
sent are the lower bound: those that a rank wants and does not hold.

Layers of one kind are cut alike and ranks come in sets that hold the same; the plan works on kinds of layers and sets
of ranks (`Group`), so that 2,048 ranks are planned in seconds. `Plan.routes` unrolls it, the same on every rank.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from r1mega.config.model_files import HFConfig
from r1mega.errors import ConfigError
from r1mega.model.families import architecture_of
from r1mega.weights.layout import (
    GeneratorRank,
    Placement,
    Region,
    generator_layout,
    weight_dtype,
)
from r1mega.weights.trainer_layout import Holders, TrainerLayout


@dataclass(frozen=True, slots=True)
class GeneratorLayout:
    """vLLM's layout on `world` processes: replicas of tp ranks each; ep > 1: experts spread over ep ranks (a multiple
    of tp: replicas may share experts) instead of cut by tp."""

    world: int
    tp: int = 1
    ep: int = 1
    fp8: bool = False

    def __post_init__(self) -> None:
        if self.ep > 1 and self.ep % self.tp:
            raise ConfigError(f"rollout.ep = {self.ep} is not a multiple of rollout.tp = {self.tp}")
        if self.world % self.period:
            raise ConfigError(
                f"the generator wants {self.period} processes a replica, which do not divide "
                f"{self.world}; change rollout.tp or rollout.ep"
            )

    @property
    def period(self) -> int:
        """Ranks r and r + period hold the same."""
        return max(self.tp, self.ep)

    def place(self, rank: int) -> GeneratorRank:
        return GeneratorRank(self.tp, rank % self.tp, self.ep, rank % self.ep, self.fp8)


@dataclass(frozen=True, slots=True)
class Overlap:
    """Elements that a part of the trainer's and a part of the generator's parameter share: HF tensor, region in the
    local parameter of either side, and its bytes as they are sent."""

    name: str
    source_parameter: str
    source: Region
    target_parameter: str
    target: Region
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """All that goes from one set of holders to one set of takers (of one layer). takers: residues modulo the period."""

    holders: Holders
    takers: tuple[int, ...]
    overlaps: tuple[Overlap, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """One chunk of a group, its bucket, and who sends it to whom. layer: to rename the overlaps by (None: as they are).

    sources, targets: [n] ranks; where they are equal the copy stays within the rank.
    """

    bucket: int
    layer: int | None
    overlaps: tuple[Overlap, ...]
    num_bytes: int
    sources: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, slots=True)
class Copy:
    """One region of one parameter from rank `source` to rank `target`."""

    bucket: int
    source: int
    target: int
    overlap: Overlap


@dataclass(frozen=True, slots=True)
class _Unit:
    """One layer (or what is around the layers) on its stages. position: its turn among those of its stage."""

    position: int
    stages: tuple[int, ...]
    layer: int | None
    groups: tuple[Group, ...]


class Plan:
    """The copies of one pair of layouts. Deterministic: every rank that makes it gets the same.

    bucket_bytes: no rank sends or receives more in one bucket. ranks_per_node: to prefer sources of the same node.
    Raises ConfigError for layouts that do not divide the model.
    """

    def __init__(
        self,
        config: HFConfig,
        trainer: TrainerLayout,
        generator: GeneratorLayout,
        *,
        model_dtype: torch.dtype,
        bucket_bytes: int,
        ranks_per_node: int | None = None,
    ):
        if trainer.world != generator.world:
            raise ConfigError(f"trainer on {trainer.world} ranks, generator on {generator.world}: they share them")
        self.trainer, self.generator, self.bucket_bytes = trainer, generator, bucket_bytes
        self.ranks_per_node = ranks_per_node or trainer.world
        self._units = list(_units(config, trainer, generator, model_dtype))

    def routes(self) -> Iterator[Route]:
        """Every copy of the plan, in order of execution, those of alike ranks together."""
        router = _Router(self.trainer.world, self.ranks_per_node, self.bucket_bytes)
        for _, units in itertools.groupby(
            sorted(self._units, key=lambda u: (u.position, u.stages)), key=lambda u: u.position
        ):
            # the stages take turns: each sends in every bucket, instead of one after the other
            turns = list(units)
            streams = [self._chunks(unit, len(turns), router) for unit in turns]
            for chunk in itertools.chain.from_iterable(itertools.zip_longest(*streams)):
                if chunk is not None:
                    yield router.route(*chunk)

    def copies(self, rank: int | None = None) -> Iterator[Copy]:
        """The single copies that a rank sends, receives or keeps; None: those of all ranks."""
        for route in self.routes():
            if rank is None:
                pairs = zip(route.sources, route.targets, strict=True)
            else:
                mine = np.flatnonzero((route.sources == rank) | (route.targets == rank))
                pairs = zip(route.sources[mine], route.targets[mine], strict=True)
            for source, target in pairs:
                for overlap in route.overlaps:
                    yield Copy(route.bucket, int(source), int(target), _of_layer(overlap, route.layer))

    def _chunks(self, unit: _Unit, turns: int, router: _Router) -> Iterator[tuple[Any, ...]]:
        """(layer, overlaps, flow) of at most a share of the bucket each, the groups in turns."""
        streams = []
        for group in unit.groups:
            flow = router.flow(self.trainer, self.generator, group, unit.stages)
            limit = self.bucket_bytes // max(flow.max_fan_out, turns)  # all stages fit into one bucket of a receiver
            pieces = _split(group.overlaps, limit)
            streams.append(zip(itertools.repeat(unit.layer), pieces, itertools.repeat(flow)))
        for chunk in itertools.chain.from_iterable(itertools.zip_longest(*streams)):
            if chunk is not None:
                yield chunk


def _spread(groups: Sequence[Group]) -> tuple[Group, ...]:
    """An order in which neighbours have other holders and other takers, and those that were used least come first: one
    bucket keeps all of them busy."""
    ordered: list[Group] = []
    rest = list(groups)
    used: Counter[Any] = Counter()
    while rest:
        rest.sort(key=lambda group: (used[group.holders], used[group.takers]))
        busy, later = set(), []
        for group in rest:
            if group.holders in busy or group.takers in busy:
                later.append(group)
            else:
                ordered.append(group)
                busy |= {group.holders, group.takers}
        used.update(busy)
        rest = later
    return tuple(ordered)


def _units(
    config: HFConfig, trainer: TrainerLayout, generator: GeneratorLayout, model_dtype: torch.dtype
) -> Iterator[_Unit]:
    """Layers by kind, from the placements of one layer of each kind."""
    model, kinds = architecture_of(config), dict[bool, int]()
    for layer in range(model.num_layers):
        kinds.setdefault(model.has_experts(layer), layer)
    takers: dict[tuple[Any, ...], tuple[Placement, list[int]]] = {}
    for position in range(generator.period):
        for placement in generator_layout(config, generator.place(position), tuple(kinds.values())):
            key = (placement.name, placement.parameter, placement.target, placement.source)
            takers.setdefault(key, (placement, []))[1].append(position)
    shapes = {placement.name: placement.shape for placement, _ in takers.values()}
    held = {name: list(trainer.shards(name, shapes, config)) for name in shapes}
    groups: dict[int | str, dict[tuple[Holders, tuple[int, ...]], list[Overlap]]] = {}
    for wanted, positions in takers.values():
        itemsize = weight_dtype(wanted.name, model_dtype, generator.fp8).itemsize
        prefix, _, rest = wanted.name.partition("model.layers.")
        unit = int(rest.split(".")[0]) if rest and not prefix else wanted.name
        for shard, holders in held[wanted.name]:
            overlap = _overlap(shard, wanted, itemsize)
            if overlap is not None:
                groups.setdefault(unit, {}).setdefault((holders, tuple(positions)), []).append(overlap)
    made = {
        unit: _spread([Group(*key, tuple(overlaps)) for key, overlaps in found.items()])
        for unit, found in groups.items()
    }
    turn = [0] * trainer.pp
    for layer, stage in enumerate(trainer.stages):
        turn[stage] += 1
        yield _Unit(turn[stage], (stage,), layer, made[kinds[model.has_experts(layer)]])
    for unit, parts in made.items():
        if isinstance(unit, str):
            yield _Unit(0, trainer.holding_stages(unit), None, parts)


def _overlap(held: Placement, wanted: Placement, itemsize: int) -> Overlap | None:
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(held.source, wanted.source, strict=True))
    if any(stop <= start for start, stop in common):
        return None
    lead = len(wanted.target) - len(common)
    source = _shifted(common, held.source, held.target)
    target = wanted.target[:lead] + _shifted(common, wanted.source, wanted.target[lead:])
    size = itemsize
    for start, stop in common:
        size *= stop - start
    return Overlap(held.name, held.parameter, source, wanted.parameter, target, size)


def _shifted(region: Region, old: Region, new: Region) -> Region:
    """A region within `old`, in the coordinates where `old` lies at `new`."""
    return tuple((start - o + n, stop - o + n) for (start, stop), (o, _), (n, _) in zip(region, old, new, strict=True))


def _split(overlaps: Sequence[Overlap], limit: int) -> Iterator[tuple[Overlap, ...]]:
    """Runs of overlaps of at most `limit` bytes together; an overlap that is larger is cut by rows (by columns too when
    a row is larger)."""
    run: list[Overlap] = []
    size = 0
    for overlap in overlaps:
        for piece in _cut(overlap, limit, len(overlap.source)):
            if run and size + piece.num_bytes > limit:
                yield tuple(run)
                run, size = [], 0
            run.append(piece)
            size += piece.num_bytes
    if run:
        yield tuple(run)


def _cut(overlap: Overlap, limit: int, dimensions: int, axis: int = 0) -> Iterator[Overlap]:
    if overlap.num_bytes <= limit or axis == dimensions:
        yield overlap
        return
    start, stop = overlap.source[axis]
    each = overlap.num_bytes // (stop - start)
    step = max(1, limit // each)
    lead = len(overlap.target) - dimensions
    for first in range(0, stop - start, step):
        last = min(first + step, stop - start)
        source, target = list(overlap.source), list(overlap.target)
        source[axis] = (start + first, start + last)
        offset = target[lead + axis][0]
        target[lead + axis] = (offset + first, offset + last)
        piece = Overlap(
            overlap.name,
            overlap.source_parameter,
            tuple(source),
            overlap.target_parameter,
            tuple(target),
            each * (last - first),
        )
        yield from _cut(piece, limit, dimensions, axis + 1)


def _of_layer(overlap: Overlap, layer: int | None) -> Overlap:
    """The same elements of another layer of the same kind."""
    if layer is None:
        return overlap
    names = []
    for name in (overlap.name, overlap.source_parameter, overlap.target_parameter):
        prefix, _, rest = name.partition("model.layers.")
        names.append(f"{prefix}model.layers.{layer}.{rest.split('.', 1)[1]}")
    return Overlap(names[0], names[1], overlap.source, names[2], overlap.target, overlap.num_bytes)


@dataclass(frozen=True, slots=True)
class _Flow:
    """Holders and takers of a group, sorted, and for the takers that do not hold it themselves ("remote"): `turn`, a
    taker's turn among those that choose from the same holders; near: whether those are the ones on its node, which are
    `number` from index `first` on (far: all of them). max_fan_out: at most so many of them have the same source."""

    holders: np.ndarray
    targets: np.ndarray
    remote: np.ndarray
    turn: np.ndarray
    near: np.ndarray
    first: np.ndarray
    number: np.ndarray
    all_near: bool
    max_fan_out: int


class _Router:
    """Chooses sources by what they have sent so far, and buckets by what they hold so far."""

    def __init__(self, world: int, ranks_per_node: int, bucket_bytes: int):
        self._per_node, self._limit = ranks_per_node, bucket_bytes
        self._sent = np.zeros(world, dtype=np.int64)
        self._bucket = 0
        self._out, self._in = np.zeros(world, dtype=np.int64), np.zeros(world, dtype=np.int64)
        self._flows: dict[tuple[Any, ...], _Flow] = {}

    def flow(self, trainer: TrainerLayout, generator: GeneratorLayout, group: Group, stages: tuple[int, ...]) -> _Flow:
        key = (group.holders, group.takers, stages)
        if key not in self._flows:
            every = np.arange(trainer.world).reshape(-1, generator.period)
            targets = np.sort(every[:, list(group.takers)].reshape(-1))
            self._flows[key] = self._make_flow(trainer.ranks(group.holders, stages), targets)
        return self._flows[key]

    def _make_flow(self, holders: np.ndarray, targets: np.ndarray) -> _Flow:
        remote = np.flatnonzero(~np.isin(targets, holders))
        node, holder_nodes = targets[remote] // self._per_node, holders // self._per_node
        first, last = np.searchsorted(holder_nodes, node), np.searchsorted(holder_nodes, node, side="right")
        near = first < last
        choice = np.where(near, node, -1)
        order = np.argsort(choice, kind="stable")
        turn = np.empty(len(remote), dtype=np.int64)
        turn[order] = np.arange(len(remote)) - np.searchsorted(choice[order], choice[order])
        number = np.where(near, last - first, 1)
        choices = (first + turn % number)[near], (turn % len(holders))[~near]
        fan_out = max(1, sum(int(np.bincount(chosen).max()) for chosen in choices if len(chosen)))
        return _Flow(holders, targets, remote, turn, near, first, number, bool(near.all()), fan_out)

    def route(self, layer: int | None, overlaps: tuple[Overlap, ...], flow: _Flow) -> Route:
        size = sum(overlap.num_bytes for overlap in overlaps)
        holders, receivers, chosen = flow.holders, flow.targets[flow.remote], self._choose(flow)
        sources = flow.targets.copy()
        sources[flow.remote] = holders[chosen]
        sent = np.bincount(chosen, minlength=len(holders)) * size
        if len(receivers) and ((self._out[holders] + sent).max() > self._limit
                               or self._in[receivers].max() + size > self._limit):  # fmt: skip
            self._bucket += 1
            self._out[:], self._in[:] = 0, 0
        self._out[holders] += sent
        self._sent[holders] += sent
        self._in[receivers] += size
        return Route(self._bucket, layer, overlaps, size, sources, flow.targets)

    def _choose(self, flow: _Flow) -> np.ndarray:
        """The holder (its index) for every remote target: those that have sent least take the first turns."""
        holders = flow.holders
        if len(holders) == 1:
            return np.zeros(len(flow.remote), dtype=np.int64)
        load = self._sent[holders]
        in_node = np.lexsort((load, holders // self._per_node))
        chosen = in_node[np.minimum(flow.first + flow.turn % flow.number, len(holders) - 1)]
        if not flow.all_near:
            far = ~flow.near
            chosen[far] = np.argsort(load, kind="stable")[flow.turn[far] % len(holders)]
        return chosen
