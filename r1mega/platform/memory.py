"""Peak memory of this rank, host and device, since it was last asked: for `observe.trace.PhaseTimer`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from r1mega.platform import Platform

logger = logging.getLogger(__name__)


def peak_probes(platform: Platform) -> dict[str, Callable[[], int]]:
    """By kind: `host` where Linux lets a process reset its own peak, `device` on a GPU."""
    probes: dict[str, Callable[[], int]] = {}
    try:
        HostPeak()()
        probes["host"] = HostPeak()
    except OSError as error:
        logger.warning("no peaks of host memory by phase: %s", error)
    if platform.name == "cuda":
        probes["device"] = DevicePeak()
    return probes


class HostPeak:
    """Peak resident bytes of this process (Linux: VmHWM, which a 5 in /proc/self/clear_refs sets back; proc(5))."""

    def __call__(self) -> int:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
        return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024


class DevicePeak:
    """Peak bytes of torch's allocator on this rank's device, less what vLLM has unmapped of them: a sleeping generator's
    tensors still count as allocated, but take no memory. What torch does not allocate (NCCL, CUDA graphs' and contexts'
    own memory, other processes) is not in it; see `device_used_bytes`.
    """

    def __init__(self) -> None:
        self._asleep = asleep_bytes()

    def __call__(self) -> int:
        before, self._asleep = self._asleep, asleep_bytes()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak - min(before, self._asleep)  # asleep at both ends: asleep all the time


def asleep_bytes() -> int:
    """What vLLM's allocator holds unmapped (vllm 0.32.0, device_allocator/cumem.py: AllocationData)."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    allocator = None if module is None else module.CuMemAllocator.instance
    return 0 if allocator is None else sum(d.handle[1] for d in allocator.pointer_to_data.values() if d.is_asleep)


def device_used_bytes() -> int:
    """What is taken of this rank's device now, by whomever (cudaMemGetInfo)."""
    free, total = torch.cuda.mem_get_info()
    return total - free
