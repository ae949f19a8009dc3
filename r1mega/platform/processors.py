"""Which processors a rank computes on: those of its GPU's socket, and how many of them are its own share."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)
PCI_DEVICES = Path("/sys/bus/pci/devices")
PROCESSORS = Path("/sys/devices/system/cpu")


def stay_near(device: torch.device) -> None:
    """Keep this process, with all of its threads and the processes that it will start, on the processors of that GPU's NUMA node and
    of the others of its socket: from there its memory, copies to the GPU and launches do not cross the machine's sockets. (Memory
    follows: Linux takes it from the node of the thread that first writes to it.) A node alone is too little where a socket is
    divided (SNC, NPS): some have no GPU, and nobody would compute there.

    Of those that the launcher has left to this process. Where it has left none of them, or the system does not let a process choose,
    nothing changes, and a warning says so.
    """
    properties = torch.cuda.get_device_properties(device)
    numbers = (getattr(properties, f"pci_{part}_id") for part in ("domain", "bus", "device"))
    address = "{:04x}:{:02x}:{:02x}.0".format(*numbers)
    try:
        near = _with_their_sockets(parse_list((PCI_DEVICES / address / "local_cpulist").read_text()))
    except OSError as error:
        logger.warning("%s: processors near it are not known (%s)", device, error)
        return
    allowed = os.sched_getaffinity(0)
    if not near & allowed:
        logger.warning(
            "%s is near the processors %s, and this process may use %s alone: let its launcher bind it there, or not at all "
            "(srun --cpu-bind=none, mpirun --bind-to none)", device, as_list(near), as_list(allowed),
        )  # fmt: skip
    elif allowed - near:
        try:
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(ProcessLookupError):  # ended meanwhile
                    os.sched_setaffinity(int(thread), near & allowed)
        except OSError as error:
            logger.warning("%s: this process is not kept on the processors near it (%s)", device, error)


def _with_their_sockets(near: set[int]) -> set[int]:
    """As far as Linux tells, which calls a socket a package."""
    found = set(near)
    for processor in near:
        siblings = PROCESSORS / f"cpu{processor}" / "topology" / "core_siblings_list"
        with contextlib.suppress(OSError):  # it is not on, or not shown
            found |= parse_list(siblings.read_text())
    return found


def own_share() -> int:
    """How many processors of those that this rank may use are its own where ranks of its machine share them; at least one. A
    collective call.
    """
    mine = (this_machine(), frozenset(os.sched_getaffinity(0)))
    ranks: list[tuple[object, frozenset[int]]] = [mine] * dist.get_world_size()
    if len(ranks) > 1:
        dist.all_gather_object(ranks, mine)
    return share(mine[1], [processors for machine, processors in ranks if machine == mine[0]])


def share(mine: Iterable[int], of_ranks: Sequence[Iterable[int]]) -> int:
    """What falls to a rank of its processors when each of them is divided among the ranks that may use it, itself among these."""
    users = Counter(processor for processors in of_ranks for processor in processors)
    return max(1, int(sum(Fraction(1, users[processor]) for processor in mine)))


def this_machine() -> tuple[str, str | None]:
    """Equal on two ranks that run on one machine: its name, and what its kernel was called at its last start."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.exists() else None


def parse_list(text: str) -> set[int]:
    """Linux's lists: '0-3,8' are five."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def as_list(numbers: Iterable[int]) -> str:
    """Such a list of them."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
