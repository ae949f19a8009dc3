"""Carries out one rank's part of a plan: packs, sends, receives and unpacks, bucket after bucket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from r1mega.errors import WeightSyncError
from r1mega.weights.layout import Region, weight_dtype
from r1mega.weights.plan import Copy, Overlap
from r1mega.weights.quantize import QuantizedParameters
from r1mega.weights.transport import (
    ALIGNMENT,
    Message,
    MessageTransport,
    SharedMemoryTransport,
    Side,
    Transport,
    share_a_host,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """An overlap and where its bytes are in its message. shape: of the region in the trainer's parameter."""

    overlap: Overlap
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]

    def staged(self, message: torch.Tensor) -> torch.Tensor:
        """[shape] view of its bytes in a message's flat uint8 buffer."""
        return message[self.start : self.start + self.overlap.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class _Bucket:
    sends: Side
    receives: Side
    kept: tuple[Overlap, ...]


class Exchange:
    """A rank's copies, laid out once for all runs.

    copies: of `rank` (Plan.copies). model_dtype: of the generator, which is also what is sent; fp8: of its linear layers
    blocks in e4m3 and their scales. shared_memory: use it on CPUs when all ranks are on one machine; otherwise, and on GPUs,
    messages of the default process group.
    """

    def __init__(
        self,
        copies: Iterable[Copy],
        rank: int,
        model_dtype: torch.dtype,
        *,
        fp8: bool = False,
        shared_memory: bool = True,
    ):
        self._model_dtype, self._fp8, self._may_share = model_dtype, fp8, shared_memory
        grouped: dict[int, dict[str, dict[int, list[Overlap]]]] = {}  # bucket -> side -> other rank -> overlaps
        for copy in copies:
            if rank not in (copy.source, copy.target):
                raise ValueError(f"{copy} is none of rank {rank}")
            side = "kept" if copy.source == copy.target else "sends" if copy.source == rank else "receives"
            other = copy.target if side == "sends" else copy.source
            grouped.setdefault(copy.bucket, {}).setdefault(side, {}).setdefault(other, []).append(copy.overlap)
        self._buckets = [
            _Bucket(self._side(sides.get("sends", {})), self._side(sides.get("receives", {})),
                    tuple(sides.get("kept", {}).get(rank, ())))
            for _, sides in sorted(grouped.items())
        ]  # fmt: skip
        self._transport: Transport | None = None

    def _side(self, messages: Mapping[int, list[Overlap]]) -> Side:
        """Wider elements first in each message, so that all are aligned."""
        made, start = [], 0
        for other, overlaps in sorted(messages.items()):
            pieces, size = [], 0
            typed = [(overlap, weight_dtype(overlap.name, self._model_dtype, self._fp8)) for overlap in overlaps]
            for overlap, dtype in sorted(typed, key=lambda pair: -pair[1].itemsize):
                pieces.append(Piece(overlap, dtype, size, tuple(stop - first for first, stop in overlap.source)))
                size += overlap.num_bytes
            made.append(Message(other, start, size, tuple(pieces)))
            start += -(-size // ALIGNMENT) * ALIGNMENT
        return Side(tuple(made))

    @property
    def num_bytes(self) -> tuple[int, int, int]:
        """(sent, received, kept within the rank)."""
        return (
            sum(message.num_bytes for bucket in self._buckets for message in bucket.sends.messages),
            sum(message.num_bytes for bucket in self._buckets for message in bucket.receives.messages),
            sum(overlap.num_bytes for bucket in self._buckets for overlap in bucket.kept),
        )

    @torch.no_grad()
    def run(self, sources: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
        """Fills `targets` from every rank's `sources`; both by the plan's parameter names, on one device.

        Every rank calls it, with nothing else under way between the same processes. Raises WeightSyncError naming what
        a side lacks, before anything is sent.
        """
        self._check(sources, targets)
        transport = self._open(next(iter(targets.values())).device)
        before: tuple[int, _Bucket] | None = None
        for index, bucket in enumerate(self._buckets):
            self._pack(bucket, transport.outgoing(index), sources)
            transport.post(index, bucket.sends, bucket.receives)
            for overlap in bucket.kept:
                part = _part(targets[overlap.target_parameter], overlap.target)
                part.copy_(_part(sources[overlap.source_parameter], overlap.source).reshape(part.shape))
            if before is not None:
                self._unpack(transport, *before, targets)
            before = (index, bucket)
        if before is not None:
            self._unpack(transport, *before, targets)
        transport.finish()

    def _open(self, device: torch.device) -> Transport:
        if self._transport is not None:
            return self._transport
        sizes = [(bucket.sends.num_bytes, bucket.receives.num_bytes) for bucket in self._buckets]
        if device.type != "cpu" or not self._may_share or not share_a_host():
            return MessageTransport(sizes, device)  # its buffers are freed after the run
        self._transport = SharedMemoryTransport(sizes)
        return self._transport

    @staticmethod
    def _pack(bucket: _Bucket, outgoing: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> None:
        for message in bucket.sends.messages:
            buffer = outgoing[message.start : message.start + message.num_bytes]
            for piece in message.pieces:
                piece.staged(buffer).copy_(_part(sources[piece.overlap.source_parameter], piece.overlap.source))

    @staticmethod
    def _unpack(transport: Transport, index: int, bucket: _Bucket, targets: Mapping[str, torch.Tensor]) -> None:
        for message, buffer in transport.received(index, bucket.receives):
            for piece in message.pieces:
                part = _part(targets[piece.overlap.target_parameter], piece.overlap.target)
                part.copy_(piece.staged(buffer).view(part.shape))

    def _check(self, sources: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
        problems = set()
        for bucket in self._buckets:
            sent, received = ([piece.overlap for message in side.messages for piece in message.pieces]
                              for side in (bucket.sends, bucket.receives))  # fmt: skip
            for overlap in (*sent, *bucket.kept):
                problems |= _problems("the trainer", overlap.source_parameter, overlap.source, sources)
            for overlap in (*received, *bucket.kept):
                problems |= _problems("the generator", overlap.target_parameter, overlap.target, targets)
        if problems:
            raise WeightSyncError("the reshard plan is not of these models:\n  " + "\n  ".join(sorted(problems)))


def _part(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in region)]


def _problems(side: str, name: str, region: Region, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    shape = _shape(tensors, name)
    if shape is None:
        return {f"{name}: {side} has no such parameter on this rank"}
    if len(shape) != len(region) or any(stop > size for (_, stop), size in zip(region, shape, strict=True)):
        return {f"{name}: {side} holds {list(shape)}, the plan reaches to {[stop for _, stop in region]}"}
    return set()


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    if isinstance(tensors, QuantizedParameters):
        return tensors.shape(name)
    return tuple(tensors[name].shape) if name in tensors else None
