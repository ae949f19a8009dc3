"""safetensors files one tensor at a time: headers checked before any data is touched, data read and written in place.

The library maps files into memory: a file that a disk error or another process cuts short then ends the reader with
SIGBUS, and pages that were read count as its memory. Plain reads give an OSError, and hold what is asked for.
Format: https://huggingface.co/docs/safetensors (8 bytes of header size, JSON header, tensors).
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from r1mega.errors import CheckpointError
from r1mega.files import sync_path, write_all

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file; start: of its data in the file, in bytes."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, last: int) -> TensorInfo:
        """Of the rows [first, last)."""
        start = self.start + first * math.prod(self.shape[1:]) * self.dtype.itemsize
        return TensorInfo(self.path, self.dtype, (last - first, *self.shape[1:]), start)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """{name: where it is}. CheckpointError when the file is missing, cut short, or not of this format."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"its header would be {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        infos = {name: _info(path, entry, 8 + length, size) for name, entry in header.items() if name != "__metadata__"}
        _check_contiguous(infos, 8 + length, size)
        return infos
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the directory is not a complete HF checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error}); fetch it again") from error


def _info(path: Path, entry: Mapping, data_start: int, size: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not known")
    info = TensorInfo(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), data_start + start)
    if end - start != info.num_bytes or start < 0:
        raise ValueError(f"a tensor of {info.num_bytes} bytes lies in {end - start}")
    if data_start + end > size:
        raise ValueError(f"it should have {data_start + end} bytes and has {size}")
    return info


def _check_contiguous(infos: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """The format leaves no byte of the data to two tensors, or to none."""
    end = data_start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start != end:
            raise ValueError(f"{name} begins at byte {info.start}, where the tensor before it ends at {end}")
        end += info.num_bytes
    if end != size:
        raise ValueError(f"it should have {end} bytes and has {size}")


def read_tensor(info: TensorInfo, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor; into `out` (contiguous, of its dtype and size) when given. OSError when the disk does not give it."""
    tensor = torch.empty(info.shape, dtype=info.dtype) if out is None else out.view(info.shape)
    with open(info.path, "rb", buffering=0) as file:
        file.seek(info.start)
        read_exactly(file, tensor)
    return tensor


def read_exactly(file: io.FileIO, tensor: torch.Tensor) -> None:
    """Fill a contiguous tensor from a raw binary file. OSError when it ends before."""
    view = as_bytes(tensor).numpy().data
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise OSError(f"{file.name}: ends {len(view) - done} bytes too early")
        done += got


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor [bytes], without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def write_tensors(
    path: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write a durable file from a stream of (name, tensor) in the order of `specs`, holding one tensor at a time.

    Raises OSError when the disk does not take it, ValueError when the stream is not what `specs` says.
    """
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin aligned
    expected = iter(specs.items())
    with open(path, "wb", buffering=0) as file:
        write_all(file.fileno(), struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            if (name, (tensor.dtype, tuple(tensor.shape))) != next(expected, None):
                raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)} is not what comes next in {path}")
            write_all(file.fileno(), as_bytes(tensor.contiguous()).numpy().data)
        if (left := next(expected, None)) is not None:
            raise ValueError(f"{path}: {left[0]} and what follows were not given")
    sync_path(path)
