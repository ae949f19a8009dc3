"""Tensors without memory: a program runs on the shapes of its floating-point tensors, and what it would allocate is counted.

Integers and truth values are computed, so that what depends on them (splits of an exchange, bounds of sequences) is as in a
run. Floating-point tensors are on torch's meta device, whatever device was asked for: a shape, a dtype, and a storage of a
size that holds nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_VALUES_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
_RANDOM_STATE = torch.uint8
"""What random generators give out their state as, kilobytes on a CPU and a few bytes on a GPU: it is not counted."""


class ShapesOnly(TorchDispatchMode):
    """In the block, floating-point tensors have no memory; the bytes that they and the integers take are counted.

    route: (rows, columns, k) -> int64 [rows, k]: which columns a top-k over values that are not there chooses; None: the
    first k. fused_norms: norms keep what a GPU's do. live_bytes: of storages that were made in the block and still exist;
    peak_bytes: the most of them at once.
    """

    def __init__(self, route: Callable[[int, int, int], torch.Tensor] | None = None, *, fused_norms: bool = False):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._route = route or first_columns
        self._sizes: dict[int, int] = {}
        self._functions = _Functions(fused_norms)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here: torch's compiler takes a second to import

    def __enter__(self) -> ShapesOnly:
        super().__enter__()
        self._functions.__enter__()
        self._resize = torch.UntypedStorage.resize_
        resize = self._resize

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            if (known := self._sizes.get(storage._cdata)) is not None:
                self._change(size - known)
                self._sizes[storage._cdata] = size
            return resize(storage, size)

        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign, assignment]  # recomputation empties storages
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        self._functions.__exit__(*error)
        super().__exit__(*error)

    def restart_peak(self) -> None:
        """Count the peak from what is live now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(func, args, kwargs or {})
        for tensor in _tensors(result):
            if tensor.dtype != _RANDOM_STATE:
                self._count(tensor.untyped_storage())
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        dtype = kwargs.get("dtype")
        if not any(tensor.is_meta for tensor in tensors):
            if tensors or not _takes_device(func) or (dtype is not None and not dtype.is_floating_point):
                return func(*args, **kwargs)
            made = func(*args, **(kwargs | {"device": "meta"}))
            return made if made.is_floating_point() else func(*args, **kwargs)
        if func.namespace == "c10d":
            return _exchange(func, args)
        name = func._schema.name.removeprefix("aten::")
        if name in _VALUES_LIKE and dtype is not None and not dtype.is_floating_point:
            return func(torch.empty(args[0].shape, dtype=dtype), *args[1:], **(kwargs | {"device": "cpu"}))
        if name == "_to_copy" and dtype is not None and not dtype.is_floating_point:
            return torch.zeros(args[0].shape, dtype=dtype)  # of zeros_like(...).int(), and of what nobody knows
        if name == "topk":
            rows, columns = args[0].shape[:-1].numel(), args[0].shape[-1]
            chosen = self._route(rows, columns, args[1])
            values = torch.empty((*args[0].shape[:-1], args[1]), dtype=args[0].dtype, device="meta")
            return torch.return_types.topk((values, chosen.view(values.shape)))
        if name in ("index", "index_put", "index_put_"):  # a mask stands for the numbers of its true places
            args = (args[0], _numbers(args[1]), *args[2:])
        if name == "masked_select":
            return torch.empty(int(args[1].expand(args[0].shape).sum()), dtype=args[0].dtype, device="meta")
        args, kwargs = _without_memory(args), {key: _without_memory(value) for key, value in kwargs.items()}
        return func(*args, **(kwargs | {"device": "meta"} if "device" in kwargs else kwargs))

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._change(storage.nbytes())
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._change(-self._sizes.pop(key))

    def _change(self, num_bytes: int) -> None:
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class _Functions(TorchFunctionMode):
    """What is decided above the dispatcher.

    Attention without memory would take the way that keeps all scores: it keeps what the fused kernels keep. Megatron's
    optimizer knows tensors by the names of their types, among which there is no meta type.
    """

    def __init__(self, fused_norms: bool):
        super().__init__()
        self._norms = (torch.nn.functional.rms_norm, torch.rms_norm) if fused_norms else ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return FusedAttention.apply(*args[:3])
        if func in self._norms:
            return FusedNorm.apply(args[0], args[2] if len(args) > 2 else kwargs["weight"])
        result = func(*args, **kwargs)
        return result.replace("torch.meta.", "torch.") if func is torch.Tensor.type and len(args) == 1 else result


class FusedAttention(torch.autograd.Function):
    """What flash attention keeps: query, key, value, output, and the logarithm of each row's sum.

    [..., heads, tokens, size] x3 -> [..., heads, tokens, size of value].
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class FusedNorm(torch.autograd.Function):
    """What Transformer Engine's RMSNorm keeps: its input, and a scale for each row."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(given, weight, given.new_empty(given.shape[:-1], dtype=torch.float32))
        return torch.empty_like(given)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given, weight, _ = ctx.saved_tensors
        return torch.empty_like(given), torch.empty_like(weight)


def first_columns(rows: int, columns: int, k: int) -> torch.Tensor:
    """[rows, k]: 0 to k - 1 in each row."""
    return torch.arange(k).repeat(rows, 1)


def _numbers(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _tensors(given: object) -> list[torch.Tensor]:
    """Those in an operation's argument or result, which has them in lists at most: torch's trees take half of the time."""
    if isinstance(given, torch.Tensor):
        return [given]
    if isinstance(given, tuple | list):
        return [tensor for one in given for tensor in _tensors(one)]
    return []


def _without_memory(given: object) -> object:
    if isinstance(given, torch.Tensor):
        if given.is_meta:
            return given
        return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device="meta")
    if isinstance(given, tuple | list):
        return type(given)(map(_without_memory, given))
    return given


def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _exchange(func: Any, args: Any) -> Any:
    """A collective operation on shapes: what it writes into is its first argument, and it is done."""
    work = FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (args[0], work)
