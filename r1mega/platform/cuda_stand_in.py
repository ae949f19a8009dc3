"""What megatron-core sees as `torch.cuda` on a CPU. torch itself is left alone: vLLM patches it as it likes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class HostStream:
    """Work is done when it was called, so there is nothing to wait for. All streams are equal."""

    def __init__(self, *_args: Any, **_kwargs: Any):
        pass

    def wait_stream(self, _stream: Any) -> None:
        pass

    def wait_event(self, _event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> HostEvent:
        return event or HostEvent()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostStream)

    def __hash__(self) -> int:
        return hash(HostStream)


class HostEvent:
    """An event that has always happened already."""

    def __init__(self, *_args: Any, **_kwargs: Any):
        pass

    def record(self, _stream: Any = None) -> None:
        pass

    def wait(self, _stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class HostRanges:
    """Names of ranges in a profile that nobody takes."""

    @staticmethod
    def range_push(_name: str) -> None:
        pass

    @staticmethod
    def range_pop() -> None:
        pass

    @staticmethod
    def range(_name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class CudaStandIn:
    """The names of torch.cuda that megatron-core uses, for a CPU. Other names are torch.cuda's own."""

    Stream = HostStream
    Event = HostEvent
    nvtx = HostRanges
    FloatTensor = torch.FloatTensor
    HalfTensor = torch.HalfTensor
    BFloat16Tensor = torch.BFloat16Tensor

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def set_device(_device: Any) -> None:
        pass

    @staticmethod
    def synchronize(_device: Any = None) -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def get_rng_state(_device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, _device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def current_stream(_device: Any = None) -> HostStream:
        return HostStream()

    @staticmethod
    def default_stream(_device: Any = None) -> HostStream:
        return HostStream()

    @staticmethod
    def stream(_stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)
