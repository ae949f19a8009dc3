"""Which machine this process runs on, and the Megatron patches that follow from it.

`prepare()` comes before the first import of megatron; it imports neither megatron nor vLLM and leaves torch alone.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Platform:
    """name: 'cpu' or 'cuda'; device: where this rank's tensors live; distributed_backend: for torch.distributed."""

    name: Literal["cpu", "cuda"]
    device: torch.device
    distributed_backend: str
    has_transformer_engine: bool
    has_apex: bool


_chosen: Platform | None = None


def use(platform: Platform) -> None:
    """Make `platform` the one of this process, whatever the machine has. For tests that bring what a machine lacks.

    Raises PlatformError after `prepare()`: megatron's patches follow from the platform.
    """
    from r1mega.errors import PlatformError
    from r1mega.platform import megatron_import

    global _chosen
    if megatron_import.is_installed():
        raise PlatformError(
            "r1mega.platform.use() comes before prepare(): megatron-core is patched for another platform"
        )
    _chosen = platform
    current.cache_clear()


@cache
def current() -> Platform:
    """The platform of this process. On CUDA the device is the one that LOCAL_RANK names; PlatformError where this process does not
    see it.
    """
    if _chosen is not None:
        return _chosen
    from r1mega.errors import PlatformError
    from r1mega.platform import libraries

    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local_rank >= (seen := torch.cuda.device_count()):
        raise PlatformError(
            f"LOCAL_RANK is {local_rank}, and this process on {socket.gethostname()} sees {seen} GPUs: start a rank a GPU, and let each "
            "see all of its machine (srun --gpus-per-node=N, without --gpus-per-task and --gpu-bind; CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES')}); where nvidia-smi -L there shows fewer than it should, leave the machine out"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(
            device
        )  # before libraries ask for the current one: of all ranks that would be the first GPU
    return Platform(
        name="cuda" if cuda else "cpu",
        device=device,
        distributed_backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
        # Transformer Engine has no CPU code: installed without a GPU it cannot be used
        has_transformer_engine=cuda and libraries.transformer_engine().works,
        has_apex=cuda and libraries.apex().works,
    )


def prepare() -> Platform:
    """Install the patches that megatron-core needs on this platform. Idempotent.

    Raises PlatformError when megatron.core was imported before, or is of a version that the patches were not made for.
    """
    from r1mega.platform import megatron_import

    platform = current()
    megatron_import.install(platform)
    return platform
