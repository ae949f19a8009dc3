"""How the bytes of one bucket get from rank to rank: messages over gloo or NCCL, or memory that ranks of a host share.

Both have two sets of buffers, so that a bucket is packed and another unpacked while one is on its way, and no barrier:
a rank waits only for those that it exchanges with. What goes between two ranks arrives in the order of the buckets.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from r1mega.errors import WeightSyncError
from r1mega.platform.processors import this_machine

ALIGNMENT = 16  # bytes: where a message begins in a buffer
MAX_OPERATIONS = 256
"""Messages of one rank in one batch. torch's NCCL batches hang at about 1,000; torch cuts its own at 256 since
(pytorch#174288, #174942)."""
_READY, _DONE = 1, 2  # tags


@dataclass(frozen=True, slots=True)
class Message:
    """All that one rank sends another in one bucket. rank: the other; start: in this side's buffer, bytes."""

    rank: int
    start: int
    num_bytes: int
    pieces: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Side:
    """What a rank sends, or receives, in one bucket."""

    messages: tuple[Message, ...] = ()

    @property
    def num_bytes(self) -> int:
        return max((message.start + message.num_bytes for message in self.messages), default=0)


class Transport(Protocol):
    """For each bucket in turn: `outgoing`, `post`, and, one bucket later, `received`. `finish` after the last."""

    def outgoing(self, index: int) -> torch.Tensor:
        """A flat uint8 buffer to pack bucket `index` into, when it is free."""

    def post(self, index: int, sends: Side, receives: Side) -> None:
        """Start what was packed on its way."""

    def received(self, index: int, receives: Side) -> Iterator[tuple[Message, torch.Tensor]]:
        """Each message and its bytes, which are valid until the next is drawn."""

    def finish(self) -> None:
        """Wait for what is still under way."""


class MessageTransport:
    """Batched point-to-point messages of torch.distributed. Buffers live as long as this object."""

    def __init__(self, sizes: Sequence[tuple[int, int]], device: torch.device):
        """sizes: (bytes sent, bytes received) of each bucket."""
        self._out, self._in = (
            [torch.empty(max((s[side] for s in sizes[parity::2]), default=0), dtype=torch.uint8, device=device)
             for parity in (0, 1)] for side in (0, 1)
        )  # fmt: skip
        self._works: dict[int, list[dist.Work]] = {}

    def outgoing(self, index: int) -> torch.Tensor:
        return self._out[index % 2]

    def post(self, index: int, sends: Side, receives: Side) -> None:
        self._works[index] = works = []
        for receiving, sending in in_batches(receives, sends, dist.get_rank(), dist.get_world_size()):
            both = ((dist.irecv, self._in[index % 2], receiving), (dist.isend, self._out[index % 2], sending))
            works += dist.batch_isend_irecv([
                dist.P2POp(function, buffer[message.start : message.start + message.num_bytes], message.rank)
                for function, buffer, messages in both
                for message in messages
            ])  # fmt: skip

    def received(self, index: int, receives: Side) -> Iterator[tuple[Message, torch.Tensor]]:
        for work in self._works.pop(index):
            work.wait()
        for message in receives.messages:
            yield message, self._in[index % 2][message.start : message.start + message.num_bytes]

    def finish(self) -> None:
        """Nothing: `received` waited for both directions."""


def in_batches(
    receives: Side, sends: Side, rank: int, num_ranks: int, limit: int = MAX_OPERATIONS
) -> list[tuple[list[Message], list[Message]]]:
    """(received, sent) messages of one bucket in batches of at most `limit`, in the order in which to post them.

    NCCL ends a batch when all of its messages have met their other side, and begins the next one then: a message must be
    in batches that wait for each other on neither side. So a message's batch follows from its two ranks alone, from how
    far the receiver is behind the sender (modulo num_ranks): a rank has one message at most in either direction at each
    distance, and the n-th distances of all ranks meet only each other.
    """
    width = max(1, limit // 2)
    cut: dict[int, tuple[list[Message], list[Message]]] = {}
    for side, messages in enumerate((receives.messages, sends.messages)):
        for message in messages:
            distance = (rank - message.rank if side == 0 else message.rank - rank) % num_ranks
            cut.setdefault(distance // width, ([], []))[side].append(message)
    return [batch for _, batch in sorted(cut.items())]


class SharedMemoryTransport:
    """Ranks of one host read straight out of each other's packing buffers; gloo carries where, and that it was read.

    Linux: anonymous memory (memfd), which ends with its process. Kept for all runs; a collective constructor.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]):
        half = max((sent for sent, _ in sizes), default=0)
        self._half = -(-half // ALIGNMENT) * ALIGNMENT
        self._own, descriptor = _allocate(2 * self._half)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (os.getpid(), descriptor, 2 * self._half))
        self._others = [_map(*theirs) for theirs in everyone]
        dist.barrier()  # everyone has mapped it
        os.close(descriptor)
        self._unread: dict[int, list[dist.Work]] = {}
        self._ready: dict[int, list[tuple[dist.Work, torch.Tensor]]] = {}
        self._tokens: list[tuple[dist.Work, torch.Tensor]] = []

    def outgoing(self, index: int) -> torch.Tensor:
        for work in self._unread.pop(index - 2, ()):
            work.wait()
        start = index % 2 * self._half
        return self._own[start : start + self._half]

    def post(self, index: int, sends: Side, receives: Side) -> None:
        self._ready[index] = [self._receive(message.rank, _READY) for message in receives.messages]
        self._unread[index] = [self._receive(message.rank, _DONE)[0] for message in sends.messages]
        for message in sends.messages:
            self._send(index % 2 * self._half + message.start, message.rank, _READY)

    def received(self, index: int, receives: Side) -> Iterator[tuple[Message, torch.Tensor]]:
        for message, (work, token) in zip(receives.messages, self._ready.pop(index), strict=True):
            work.wait()
            start = int(token)
            yield message, self._others[message.rank][start : start + message.num_bytes]
            self._send(start, message.rank, _DONE)

    def finish(self) -> None:
        for works in self._unread.values():
            for work in works:
                work.wait()
        for work, _ in self._tokens:
            work.wait()
        self._unread.clear()
        self._tokens.clear()

    def _send(self, value: int, rank: int, tag: int) -> None:
        token = torch.tensor([value])
        self._tokens.append((_begun(dist.isend(token, rank, tag=tag)), token))

    @staticmethod
    def _receive(rank: int, tag: int) -> tuple[dist.Work, torch.Tensor]:
        token = torch.empty(1, dtype=torch.int64)
        return _begun(dist.irecv(token, rank, tag=tag)), token


def _begun(work: dist.Work | None) -> dist.Work:
    """torch has None for a rank outside of the group; outside of the world's there is none."""
    assert work is not None
    return work


def share_a_host() -> bool:
    """Whether all ranks run on one machine, by its name and boot. A collective call."""
    mine = (*this_machine(), hasattr(os, "memfd_create"))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return mine[1] is not None and mine[2] and all(theirs == mine for theirs in everyone)


def _allocate(num_bytes: int) -> tuple[torch.Tensor, int]:
    descriptor = os.memfd_create("r1mega-reshard", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, max(num_bytes, 1))
    return torch.frombuffer(mmap.mmap(descriptor, max(num_bytes, 1)), dtype=torch.uint8), descriptor


def _map(process: int, descriptor: int, num_bytes: int) -> torch.Tensor:
    path = f"/proc/{process}/fd/{descriptor}"
    try:
        with open(path, "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), max(num_bytes, 1)), dtype=torch.uint8)
    except OSError as error:
        raise WeightSyncError(
            f"{path}: the memory of another rank of this machine cannot be mapped ({error}); set "
            "weights.shared_memory=false"
        ) from error
