"""Samples on their way from the ranks that made them to those that train on them: as flat bytes, once, through bounded buffers.

Every rank knows the lengths of all samples (`SampleExchange.index`), plans from them which it needs, and gets those
(`StepSamples.fetch`, by `train.sample_plan`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from r1mega.errors import GenerationError
from r1mega.platform.groups import GeneratorPlace
from r1mega.train.sample_plan import (
    BUFFER_BYTES,
    RankPlace,
    Reads,
    Round,
    Routing,
    covered,
    pack_bits,
    plan_rounds,
    ranks_by,
    sample_wants,
    unpack_bits,
)
from r1mega.types import KeptIds, SampleSummary, TrainingSample
from r1mega.weights.transport import ALIGNMENT, Message, MessageTransport, Side

if TYPE_CHECKING:
    from r1mega.train.policy import Policy

_CPU = torch.device("cpu")

Pack = Callable[[int, int], Iterable[np.ndarray]]
"""(item, the rank that it goes to) -> arrays whose bytes, one after the other, are what is sent."""
Unpack = Callable[[int, np.ndarray], None]
"""(item, its bytes, uint8, valid during the call)."""


def gather_rows(rows: np.ndarray) -> list[np.ndarray]:
    """[n, columns] int64 of each rank, n as it likes -> those of all, on every rank. A collective call."""
    world = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    longest = max(map(int, counts))
    if not longest:
        return [rows] * world
    mine = torch.zeros(longest, rows.shape[1], dtype=torch.int64)
    mine[: len(rows)] = torch.from_numpy(rows)
    everyone = torch.empty(world, longest, rows.shape[1], dtype=torch.int64)
    dist.all_gather(list(everyone.unbind()), mine)
    return [theirs.numpy()[: int(count)] for theirs, count in zip(everyone, counts, strict=True)]


def gather_places(policy: Policy, generator: int) -> list[RankPlace]:
    """Of all ranks. A collective call. generator: of this rank."""
    mine = RankPlace(generator, policy.replica, policy.routed_columns, policy.reads)
    everyone = [mine] * dist.get_world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def run_rounds(rounds: Sequence[Round], pack: Pack, unpack: Unpack, num_bytes: Callable[[int, int], int]) -> int:
    """Carry a plan out; every rank calls it with its own part. num_bytes: of an item on its way to a rank.

    Returns the bytes that this rank sent. While a round is on its way the one before is unpacked.
    """
    rank = dist.get_rank()
    sides = [
        (_side(one.sends, num_bytes, None), _side(one.receives, num_bytes, rank)) for one in rounds
    ]  # fmt: skip
    transport = MessageTransport([(sends.num_bytes, receives.num_bytes) for sends, receives in sides], _CPU)
    for number, (sends, receives) in enumerate(sides):
        buffer = transport.outgoing(number).numpy()
        for message in sends.messages:
            start = message.start
            for item, size in message.pieces:
                octets = [part.reshape(-1).view(np.uint8) for part in pack(item, message.rank)]
                np.concatenate(octets, out=buffer[start : start + size])  # fails where the plan has another size
                start += size
        transport.post(number, sends, receives)
        if number:
            _unpack(transport, number - 1, sides[number - 1][1], unpack)
    _unpack(transport, len(sides) - 1, sides[-1][1], unpack)
    transport.finish()
    return sum(message.num_bytes for sends, _ in sides for message in sends.messages)


def _side(items: Mapping[int, Sequence[int]], num_bytes: Callable[[int, int], int], target: int | None) -> Side:
    """target: who receives; None: the other rank of each message."""
    messages, start = [], 0
    for other, members in sorted(items.items()):
        pieces = tuple((item, num_bytes(item, other if target is None else target)) for item in members)
        size = sum(octets for _, octets in pieces)
        messages.append(Message(other, start, size, pieces))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return Side(tuple(messages))


def _unpack(transport: MessageTransport, number: int, receives: Side, unpack: Unpack) -> None:
    for message, buffer in transport.received(number, receives):
        octets, start = buffer.numpy(), 0
        for item, size in message.pieces:
            unpack(item, octets[start : start + size])
            start += size


class StepSamples:
    """The samples of a step, in the order of their groups' slots: what every rank knows of all, and those that this rank has."""

    def __init__(
        self, known: Sequence[SampleSummary], own: Mapping[int, TrainingSample], exchange: SampleExchange | None
    ):
        """own: samples that this rank has, by their indices in `known`; all of them where there is no exchange."""
        self.known, self._own, self._exchange = known, dict(own), exchange

    @classmethod
    def everywhere(cls, samples: Sequence[TrainingSample]) -> StepSamples:
        """Of samples that every rank has."""
        return cls([sample.summary() for sample in samples], dict(enumerate(samples)), None)

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, index: int, /) -> TrainingSample:
        """One that this rank has."""
        return self._own[index]

    @property
    def indices(self) -> set[int]:
        """Of those that this rank has."""
        return set(self._own)

    def fetch(self, shares: Sequence[Iterable[int]]) -> None:
        """Have those of this rank's replica, and no others. shares: the samples (by index) of each data-parallel replica,
        the same on every rank. A collective call.
        """
        if self._exchange is not None:
            self._own = self._exchange.fetch(self.known, self._own, shares)


class SampleExchange:
    """What does not change during a run of the way of samples. Every rank makes one alike.

    places: of all ranks. limit: bytes of a round, in each direction.
    """

    def __init__(self, places: Sequence[RankPlace], routing: Routing, limit: int = BUFFER_BYTES):
        self._places, self._routing, self._limit = places, routing, limit
        self._rank = dist.get_rank()
        self._place = places[self._rank]
        generator = [rank for rank, place in enumerate(places) if place.generator == self._place.generator]
        self._part = (generator.index(self._rank), len(generator))
        self.bytes_sent = 0
        """By this rank, of all samples so far."""

    @classmethod
    def of(cls, policy: Policy, generator_tp: int) -> SampleExchange:
        """For a policy and generators of so many ranks. A collective call."""
        places = gather_places(policy, GeneratorPlace.of_this_rank(generator_tp).replica)
        return cls(places, policy.routing)

    def index(self, made: Sequence[TrainingSample]) -> StepSamples:
        """The step's samples, of those that each generator made. A collective call: lengths and figures of all go to all
        ranks, 56 bytes a sample and as many a rank, and nothing else. made: the same on each rank of a generator, in any
        order of slots.

        Raises GenerationError, on all ranks, where the ranks of a generator have not the same, and for experts that the model
        that is trained does not have.
        """
        made = sorted(made, key=lambda sample: sample.slot)  # as in the table
        if len(self._places) == 1:
            _check_experts({0: _first_absent(made, self._routing)}, self._routing)
            return StepSamples.everywhere(made)
        rows, (part, parts) = _rows(made), self._part
        mine = rows[len(made) * part // parts : len(made) * (part + 1) // parts]  # a generator's ranks tell a part each
        everyone = gather_rows(np.concatenate([_header(made, rows, self._routing), mine]))
        self._check([theirs[0].tolist() for theirs in everyone])
        table = [
            summary
            for rank, theirs in enumerate(everyone)
            for summary in _summaries(theirs[1:], self._places[rank].generator)
        ]
        table.sort(key=lambda summary: summary.slot)
        own = [index for index, summary in enumerate(table) if summary.generator == self._place.generator]
        return StepSamples(table, dict(zip(own, made, strict=True)), self)

    def _check(self, headers: Sequence[Sequence[int]]) -> None:
        """headers: of all ranks, see `_header`."""
        _check_experts({rank: expert if bad else None for rank, (bad, expert, *_) in enumerate(headers)}, self._routing)
        for generator, ranks in ranks_by("generator", self._places).items():
            digests = {rank: headers[rank][2] for rank in ranks.tolist()}
            if len(set(digests.values())) > 1:
                raise GenerationError(
                    f"the ranks {', '.join(map(str, digests))} of generator {generator} have not made the same samples of "
                    "this step, which tensor-parallel ranks of the same software and settings do"
                )

    def fetch(
        self, known: Sequence[SampleSummary], own: Mapping[int, TrainingSample], shares: Sequence[Iterable[int]]
    ) -> dict[int, TrainingSample]:
        """See `StepSamples.fetch`."""
        wants = sample_wants(known, self._places, self._routing, shares)
        rounds = plan_rounds(wants, self._rank, len(self._places), self._limit)
        columns, reads = self._place.columns, self._place.reads
        kept = {index: _of_columns(own[index], columns) for index in shares[self._place.replica] if index in own}

        def unpack(index: int, octets: np.ndarray) -> None:
            kept[index] = _unpacked(known[index], octets, self._routing, reads, len(columns))

        def pack(index: int, target: int) -> Iterable[np.ndarray]:
            return _packed(own[index], self._routing, self._places[target])

        def num_bytes(index: int, rank: int) -> int:
            return wants[index].bytes_to(rank)

        self.bytes_sent += run_rounds(rounds, pack, unpack, num_bytes)
        for index in shares[self._place.replica]:  # of which this rank reads nothing but what it knows
            if index not in kept:
                unpack(index, np.zeros(0, dtype=np.uint8))
        return kept


def _header(made: Sequence[TrainingSample], rows: np.ndarray, routing: Routing) -> np.ndarray:
    """[1, 7] int64 of a rank, before its rows: whether its generator chose an expert that does not exist, and which; a digest
    of all that it made, but for routed experts, which are too many.
    """
    digest, absent = hashlib.blake2b(rows.tobytes(), digest_size=8), _first_absent(made, routing)
    for sample in made:
        digest.update(sample.token_ids.tobytes())
        digest.update(sample.sampler_log_probs.tobytes())
        if sample.kept is not None:
            digest.update(sample.kept.counts.tobytes())
            digest.update(sample.kept.ids.tobytes())
    told = int.from_bytes(digest.digest(), "little", signed=True)
    return np.array([[absent is not None, absent or 0, told, 0, 0, 0, 0]], dtype=np.int64)


def _first_absent(made: Sequence[TrainingSample], routing: Routing) -> int | None:
    """An expert that was chosen and that the model does not have."""
    for sample in made:
        if (routed := sample.routed_experts) is not None and routed.size:
            for expert in (int(routed.min()), int(routed.max())):
                if not 0 <= expert < routing.num_experts:
                    return expert
    return None


def _check_experts(absent: Mapping[int, int | None], routing: Routing) -> None:
    """absent: `_first_absent` of each rank."""
    for rank, expert in absent.items():
        if expert is not None:
            raise GenerationError(
                f"the generator of rank {rank} chose expert {expert} for a token, the model that is trained has "
                f"{routing.num_experts}, counted from 0: rollout.router_replay wants the same model in both"
            )


def _rows(samples: Sequence[TrainingSample]) -> np.ndarray:
    """[n, 7] int64, what `_summaries` reads; the figures by their bits."""
    known = [sample.summary() for sample in samples]
    figures = np.array([[s.advantage, s.reward] for s in known], dtype=np.float64).reshape(-1, 2)
    numbers = np.array(
        [[s.slot, s.num_tokens, s.prompt_length, s.opens_group + 2 * s.has_routing, s.num_kept] for s in known],
        dtype=np.int64,
    ).reshape(-1, 5)
    return np.concatenate([numbers, figures.view(np.int64)], axis=1)


def _summaries(rows: np.ndarray, generator: int) -> list[SampleSummary]:
    figures = np.ascontiguousarray(rows[:, 5:]).view(np.float64).tolist()
    return [
        SampleSummary(generator, slot, tokens, prompt, advantage, reward, bool(flags & 1), bool(flags & 2), kept)
        for (slot, tokens, prompt, flags, kept, *_), (advantage, reward) in zip(rows.tolist(), figures, strict=True)
    ]


def _of_columns(sample: TrainingSample, columns: tuple[int, ...]) -> TrainingSample:
    """With the choices of these MoE layers alone."""
    routed = sample.routed_experts
    if routed is None or columns == tuple(range(routed.shape[1])):
        return sample
    return dataclasses.replace(sample, routed_experts=_layers(routed, columns))


def _layers(routed: np.ndarray, columns: tuple[int, ...]) -> np.ndarray:
    """[tokens, columns, top-k], a copy."""
    return np.take(routed, np.array(columns, dtype=np.int64), axis=1)


def _packed(sample: TrainingSample, routing: Routing, place: RankPlace) -> list[np.ndarray]:
    """What the rank at this place reads of it. At least one array."""
    parts = [sample.token_ids[first:last] for first, last in place.reads.token_spans(sample.num_tokens)]
    if place.reads.log_probs:
        parts.append(sample.sampler_log_probs)
        if sample.kept is not None and len(sample.kept.ids):
            parts += [sample.kept.counts, sample.kept.ids]
    if sample.routed_experts is not None and place.columns:
        spans = place.reads.routing_spans(sample.num_tokens)
        rows = [_layers(sample.routed_experts[first:last], place.columns).reshape(-1) for first, last in spans]
        if rows:
            parts.append(pack_bits(np.concatenate(rows), routing.bits))
    return parts


def _unpacked(
    summary: SampleSummary, octets: np.ndarray, routing: Routing, reads: Reads, num_layers: int
) -> TrainingSample:
    """As whole as the rank reads it: 0 where it reads nothing, and no kept ids where it reads no log-probs."""
    tokens = np.zeros(summary.num_tokens, dtype=np.int32)
    log_probs = np.zeros(summary.response_length, dtype=np.float32)
    start = _fill(tokens, reads.token_spans(summary.num_tokens), octets)
    if reads.log_probs:
        start += _fill(log_probs, [(0, len(log_probs))], octets[start:])
    kept = None
    if reads.log_probs and summary.num_kept:
        kept = KeptIds(np.zeros(summary.response_length, np.int32), np.zeros(summary.num_kept, np.int32))
        for values in (kept.counts, kept.ids):
            start += _fill(values, [(0, len(values))], octets[start:])
    routed = None
    if summary.has_routing:
        spans = reads.routing_spans(summary.num_tokens)
        shape = (covered(spans), num_layers, routing.top_k)
        values = unpack_bits(octets[start:], routing.bits, math.prod(shape)).reshape(shape)
        routed = values if len(values) == summary.num_tokens - 1 else None
        if routed is None:
            routed = np.zeros((summary.num_tokens - 1, *shape[1:]), dtype=values.dtype)
            _fill(routed, spans, values.reshape(-1).view(np.uint8))
    return TrainingSample(
        token_ids=tokens,
        prompt_length=summary.prompt_length,
        advantage=summary.advantage,
        sampler_log_probs=log_probs,
        routed_experts=routed,
        slot=summary.slot,
        reward=summary.reward,
        opens_group=summary.opens_group,
        kept=kept,
    )


def _fill(values: np.ndarray, spans: Iterable[tuple[int, int]], octets: np.ndarray) -> int:
    """These rows of an array, from bytes that lie one after the other; how many of them it took."""
    start = 0
    for first, last in spans:
        rows = values[first:last]
        rows.reshape(-1).view(np.uint8)[:] = octets[start : start + rows.nbytes]
        start += rows.nbytes
    return start
