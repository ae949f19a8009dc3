"""Who sends which samples to whom, and what that takes: pure, from lengths alone, so that every rank finds the same without
having the samples. `train.sample_exchange` carries it out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from r1mega.types import SampleSummary

TOKEN_BYTES = 4
"""Of a token id, int32, of a log-prob, float32, and of a count of kept ids, int32."""
BUFFER_BYTES = 32 * 2**20
"""That a rank sends, and receives, in one round. It has buffers for two rounds in both directions."""
_BLOCK = 1 << 16
"""Values whose bits are spread out at a time; a multiple of 8, so that each block begins with a byte."""


@dataclass(frozen=True, slots=True)
class RankPlace:
    """What a rank makes and what it trains on. generator: whose samples it has; replica: its data-parallel share.

    columns: the MoE layers of its pipeline stage, as numbers among those of the whole model: whose choices it replays.
    """

    generator: int
    replica: int
    columns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Routing:
    """Of routed experts: how many there are to choose from, and how many are chosen (top-k) for a token in each layer."""

    num_experts: int = 1
    top_k: int = 0

    @property
    def bits(self) -> int:
        """That a choice takes on its way: as few as tell the experts apart."""
        return max(1, (self.num_experts - 1).bit_length())


@dataclass(slots=True)
class Round:
    """What one rank sends and receives at one time: items by the other rank, in the order in which they lie in the message."""

    sends: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    receives: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True, slots=True)
class Want:
    """One item: the ranks that have it, those that want it, and the bytes that go to each of these."""

    holders: np.ndarray
    wanted: np.ndarray
    num_bytes: np.ndarray


def plan_rounds(items: Mapping[int, Want], rank: int, world: int, limit: int) -> list[Round]:
    """This rank's part of getting every item to each rank that wants it and has it not, once. Every rank has as many rounds.

    The ranks that have an item take turns in sending it. In a round no rank sends or receives more than `limit` bytes,
    but for one item that is larger by itself: what a transport needs for buffers. Generators alternate, so that none waits
    until all samples of another are through.
    """
    rounds, turns, counts = [Round()], defaultdict[int, int](int), defaultdict[int, int](int)
    places = {}
    for index, item in items.items():
        first = int(item.holders[0])
        places[index] = (counts[first], first)
        counts[first] += 1
    loads = np.zeros((2, world), dtype=np.int64)  # sent, received
    for index in sorted(items, key=places.__getitem__):
        item, first = items[index], places[index][1]
        absent = ~np.isin(item.wanted, item.holders)
        targets, sizes = item.wanted[absent], item.num_bytes[absent]
        if not len(targets):
            continue
        sources = item.holders[(turns[first] + np.arange(len(targets))) % len(item.holders)]
        turns[first] += len(targets)
        more = np.stack([np.bincount(ranks, sizes, world) for ranks in (sources, targets)]).astype(np.int64)
        if loads.any() and (loads + more).max() > limit:
            rounds.append(Round())
            loads[:] = 0
        loads += more
        for target in targets[sources == rank].tolist():
            rounds[-1].sends[target].append(index)
        for source in sources[targets == rank].tolist():
            rounds[-1].receives[source].append(index)
    return rounds


def ranks_by(kind: Literal["generator", "replica"], places: Sequence[RankPlace]) -> dict[int, np.ndarray]:
    """The ranks of every generator, or replica."""
    found = defaultdict(list)
    for rank, place in enumerate(places):
        found[getattr(place, kind)].append(rank)
    return {number: np.array(ranks) for number, ranks in found.items()}


def routing_bytes(routing: Routing, num_tokens: int, num_layers: int) -> int:
    """Of the choices for a sample in so many layers, packed: of all its tokens but the last."""
    return -(-(num_tokens - 1) * num_layers * routing.top_k * routing.bits // 8)


def sample_bytes(summary: SampleSummary, routing: Routing, num_layers: int) -> int:
    """That a sample takes on its way to a rank with so many MoE layers."""
    routed = routing_bytes(routing, summary.num_tokens, num_layers) if summary.has_routing else 0
    kept = summary.response_length + summary.num_kept if summary.num_kept else 0
    return TOKEN_BYTES * (summary.num_tokens + summary.response_length + kept) + routed


def sample_wants(
    samples: Sequence[SampleSummary],
    places: Sequence[RankPlace],
    routing: Routing,
    shares: Sequence[Iterable[int]],
) -> dict[int, Want]:
    """Every sample that is trained on. shares: the samples (by index) of each data-parallel replica."""
    generators, replicas = ranks_by("generator", places), ranks_by("replica", places)
    layers = np.array([len(place.columns) for place in places])
    ranks = defaultdict[int, list[np.ndarray]](list)
    for replica, share in enumerate(shares):
        for index in sorted(set(share)):
            ranks[index].append(replicas[replica])
    wants = {}
    for index in sorted(ranks):
        wanted, sample = np.concatenate(ranks[index]), samples[index]
        sizes = {count: sample_bytes(sample, routing, count) for count in np.unique(layers[wanted]).tolist()}
        num_bytes = np.array([sizes[count] for count in layers[wanted].tolist()], dtype=np.int64)
        wants[index] = Want(generators[sample.generator], wanted, num_bytes)
    return wants


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """[n] uint8 or uint16 -> [ceil(n * bits / 8)] uint8: the lowest bits of each, one after the other."""
    octets = np.ascontiguousarray(values).astype(f"<u{values.itemsize}", copy=False).view(np.uint8)
    if bits == 8 * values.itemsize:
        return octets
    octets, packed = octets.reshape(-1, values.itemsize), np.empty(-(-len(values) * bits // 8), dtype=np.uint8)
    for first in range(0, len(values), _BLOCK):
        spread = np.unpackbits(octets[first : first + _BLOCK], axis=1, bitorder="little")
        block = np.packbits(spread[:, :bits].reshape(-1), bitorder="little")
        packed[first * bits // 8 :][: len(block)] = block
    return packed


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse: [count], uint8 where they fit into it, else uint16."""
    kind = np.dtype("u1" if bits <= 8 else "<u2")
    if bits == 8 * kind.itemsize:
        return packed.copy().view(kind)
    values = np.empty(count, dtype=kind)
    for first in range(0, count, _BLOCK):
        size = min(_BLOCK, count - first)
        spread = np.zeros((size, 8 * kind.itemsize), dtype=np.uint8)
        part = packed[first * bits // 8 :]
        spread[:, :bits] = np.unpackbits(part, count=size * bits, bitorder="little").reshape(size, bits)
        values[first : first + size] = np.packbits(spread, axis=1, bitorder="little").reshape(-1).view(kind)
    return values
