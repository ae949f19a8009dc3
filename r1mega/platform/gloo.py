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

from torch.distributed.distributed_c10d import ProcessGroupGloo, default_pg_timeout

_init: Callable[..., None] = ProcessGroupGloo.__init__
_first: dict[tuple[int, str | None], tuple[list[ProcessGroupGloo.Device], int]] = {}
"""Devices and number of threads that torch gave the first group; by process, for a fork has none of its parent's threads, and by
the variable that torch reads then.
"""


def share_device() -> None:
    """From here on. Idempotent; groups that are there keep their own. Where torch has no such options, all do: it only saves time."""
    made = getattr(ProcessGroupGloo, "_Options", None)
    if all(hasattr(made, name) for name in ("_devices", "_threads", "_timeout")):
        ProcessGroupGloo.__init__ = _with_shared_device  # type: ignore[method-assign]


def _with_shared_device(self: ProcessGroupGloo, *args: object, **named: object) -> None:
    """(store, rank, size, timeout), as torch and vLLM call it. Who gives something else says himself which devices."""
    given = dict(zip(("store", "rank", "size", "timeout"), args, strict=False)) | named
    timeout = given.pop("timeout", default_pg_timeout)
    is_lazy = os.environ.get("TORCH_GLOO_LAZY_INIT", "0") != "0"  # as for many ranks: groups of one device hang then
    if is_lazy or given.keys() != {"store", "rank", "size"} or not isinstance(timeout, timedelta):
        return _init(self, *args, **named)
    key = os.getpid(), os.environ.get("GLOO_SOCKET_IFNAME")
    if key in _first:
        options = cast("Any", ProcessGroupGloo)._Options()
        options._devices, options._threads = _first[key]
        options._timeout = timeout
        return _init(self, **given, options=options)
    _init(self, *args, **named)
    made = cast("Any", self.options)
    _first[key] = made._devices, made._threads
    return None
