"""One gloo device for all groups of a process, where torch makes one for each.

A device is a thread that looks for messages and wakes a hundred times a second whether there are any or not (gloo's
transport/tcp/loop.cc). A rank has some twenty groups: of short runs on few cores a sixth of the processor time went there.
Gloo itself means a device for many contexts. Written against torch 2.13, distributed_c10d.py, _new_process_group_helper,
which takes no options for gloo; an option there would end this.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroupGloo, default_pg_timeout

_init: Callable[..., None] = ProcessGroupGloo.__init__
_devices: dict[tuple[int, str, str], list[ProcessGroupGloo.Device]] = {}
"""By process, for a fork has none of its threads, and by what torch makes them from."""


def share_device() -> None:
    """From here on. Idempotent; groups that are there keep their own."""
    ProcessGroupGloo.__init__ = _with_shared_device  # type: ignore[method-assign, assignment]


def _of_this_process() -> list[ProcessGroupGloo.Device]:
    """As torch makes them for a group: one for each of the interfaces in GLOO_SOCKET_IFNAME, else the default's."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    key = os.getpid(), names, os.environ.get("TORCH_GLOO_LAZY_INIT", "")
    if key not in _devices:
        _devices[key] = [
            ProcessGroupGloo.create_device(interface=name) if name else ProcessGroupGloo.create_default_device()
            for name in names.split(",")
        ]
    return _devices[key]


def _with_shared_device(
    self: ProcessGroupGloo,
    store: dist.Store,
    rank: int,
    size: int,
    options: ProcessGroupGloo.Options | timedelta | None = None,
    *,
    timeout: timedelta | None = None,
) -> None:
    """torch gives a time-out, or options that say which devices."""
    if options is None or isinstance(options, timedelta):
        shared = cast("Any", ProcessGroupGloo)._Options()
        shared._devices = _of_this_process()
        shared._threads = 2 * len(shared._devices)  # as torch has it
        shared._timeout = timeout or options or default_pg_timeout
        options = shared
    _init(self, store, rank, size, options)
