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
class Reads:
    """What of a sample the part of a model on a rank reads; lengths, advantage and reward it has of every sample.

    tokens: where they are embedded or predicted; log_probs: the sampler's, and of a chunk of tokens the one that follows, where the
    loss is; cp, cp_rank: its share of the positions, for tokens and routed experts (Megatron's zigzag).
    """

    tokens: bool = True
    log_probs: bool = True
    cp: int = 1
    cp_rank: int = 0

    def spans(self, num_tokens: int, stop: int, further: int = 0) -> list[tuple[int, int]]:
        """Positions [a, b) below `stop` of a sample of so many tokens that this rank's layers see, ascending and apart; further:
        so many behind each chunk too.
        """
        chunk = -(-num_tokens // (2 * self.cp))
        found: list[tuple[int, int]] = []
        for place in (self.cp_rank, 2 * self.cp - 1 - self.cp_rank):
            first, last = min(place * chunk, stop), min((place + 1) * chunk + further, stop)
            if found and first <= found[-1][1]:
                found[-1] = found[-1][0], max(last, found[-1][1])
            elif first < last:
                found.append((first, last))
        return found

    def token_spans(self, num_tokens: int) -> list[tuple[int, int]]:
        """Of the tokens that it reads."""
        return self.spans(num_tokens, num_tokens, int(self.log_probs)) if self.tokens else []

    def routing_spans(self, num_tokens: int) -> list[tuple[int, int]]:
        """Of the positions whose routed experts it replays: what the last token of a sample is routed to changes nothing."""
        return self.spans(num_tokens, num_tokens - 1)

    def num_read(self, num_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions in `token_spans`, in `routing_spans`) of samples of so many tokens: [n] -> [n], [n] int64."""
        tokens = (
            self._num_seen(num_tokens, num_tokens, int(self.log_probs)) if self.tokens else np.zeros_like(num_tokens)
        )
        return tokens, self._num_seen(num_tokens, num_tokens - 1)

    def _num_seen(self, num_tokens: np.ndarray, stop: np.ndarray, further: int = 0) -> np.ndarray:
        chunk = -(-num_tokens // (2 * self.cp))
        total, end = np.zeros_like(num_tokens), np.zeros_like(num_tokens)
        for place in (self.cp_rank, 2 * self.cp - 1 - self.cp_rank):
            first, last = np.maximum(place * chunk, end), np.minimum((place + 1) * chunk + further, stop)
            total += np.maximum(last - first, 0)
            end = np.maximum(last, end)
        return total


@dataclass(frozen=True, slots=True)
class RankPlace:
    """What a rank makes and what it trains on. generator: whose samples it has; replica: its data-parallel share.

    columns: the MoE layers of its pipeline stage, as numbers among those of the whole model: whose choices it replays.
    """

    generator: int
    replica: int
    columns: tuple[int, ...] = ()
    reads: Reads = Reads()


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

    def bytes_to(self, rank: int) -> int:
        """That go to one of those that want it."""
        return int(self.num_bytes[self.wanted == rank][0])


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


def routing_bytes(routing: Routing, num_positions: np.ndarray, num_layers: int) -> np.ndarray:
    """Of the choices for so many positions of samples in so many layers, packed."""
    return -(-num_positions * num_layers * routing.top_k * routing.bits // 8)


def sample_bytes(samples: Sequence[SampleSummary], routing: Routing, kinds: Iterable[tuple[Reads, int]]) -> np.ndarray:
    """[samples, kinds] int64: that each takes on its way to a rank which reads so much of it and has so many MoE layers."""
    columns = [(s.num_tokens, s.response_length, s.num_kept, s.has_routing) for s in samples]
    num_tokens, response, kept, has_routing = np.array(columns, dtype=np.int64).reshape(-1, 4).T
    of_responses = response + np.where(kept > 0, response + kept, 0)
    found = []
    for reads, num_layers in kinds:
        tokens, routed = reads.num_read(num_tokens)
        numbers = tokens + (of_responses if reads.log_probs else 0)
        found.append(TOKEN_BYTES * numbers + routing_bytes(routing, routed * has_routing, num_layers))
    return np.stack(found, axis=1)


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """Positions in them."""
    return sum(last - first for first, last in spans)


def sample_wants(
    samples: Sequence[SampleSummary],
    places: Sequence[RankPlace],
    routing: Routing,
    shares: Sequence[Iterable[int]],
) -> dict[int, Want]:
    """Every sample that is trained on, wanted by those ranks that read anything of it. shares: the samples (by index) of each
    data-parallel replica.
    """
    generators, replicas = ranks_by("generator", places), ranks_by("replica", places)
    of_ranks = [(place.reads, len(place.columns)) for place in places]
    kinds = list(dict.fromkeys(of_ranks))
    numbers = {kind: number for number, kind in enumerate(kinds)}
    kind_of = np.array([numbers[kind] for kind in of_ranks])
    ranks = defaultdict[int, list[np.ndarray]](list)
    for replica, share in enumerate(shares):
        for index in sorted(set(share)):
            ranks[index].append(replicas[replica])
    wants, sizes = {}, sample_bytes(samples, routing, kinds)
    for index in sorted(ranks):
        wanted = np.concatenate(ranks[index])
        num_bytes = sizes[index, kind_of[wanted]]
        wants[index] = Want(generators[samples[index].generator], wanted[num_bytes > 0], num_bytes[num_bytes > 0])
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
