"""The torch_dist form on disk: data files of serialized pieces, and `.metadata`, which says where each piece lies.

Megatron's dist_checkpointing reads and writes the same files; here they are written without forked processes (which
may not be forked from under gloo's and vLLM's threads), digested on the way, and read one tensor at a time.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from r1mega.checkpoint.fit import read_metadata
from r1mega.checkpoint.manifest import DigestingFile, PassingDigests
from r1mega.checkpoint.safetensors_file import read_exactly
from r1mega.errors import CheckpointError
from r1mega.files import sync_path

METADATA, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

BLOCK = 2**24
"""Elements that are read at one time of what is `Stored`."""

Piece = tuple[MetadataIndex, torch.Tensor | io.BytesIO]


def write_pieces(
    path: Path, pieces: Iterable[Piece], name: str | None = None
) -> tuple[list[WriteResult], dict[str, Any]]:
    """Write one data file; where each piece lies in it, and the file's manifest record. Raises OSError, RuntimeError.

    name: that the file will have in the checkpoint, when it is not path's.

    Tensors are contiguous, on the CPU, and own their storage or are a view of all that is to be stored.
    """
    results = []
    with contextlib.closing(DigestingFile(path)) as file:
        for index, data in pieces:
            start = file.tell()
            if isinstance(data, torch.Tensor):
                try:
                    torch.save(data.detach(), file)  # type: ignore[arg-type]  # what it asks of a file: write, flush
                except RuntimeError as error:
                    raise file.error or error from error
            else:
                file.write(data.getbuffer())
            size = file.tell() - start
            results.append(WriteResult(index, size, _StorageInfo(name or path.name, start, size)))
        return results, file.finish()


@contextlib.contextmanager
def without_crc() -> Iterator[None]:
    """Inside, torch.save leaves out its CRC-32 (a tenth of its time): the manifest's digest says more."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_index(directory: Path, metadata: Metadata, results: Iterable[WriteResult]) -> None:
    """`.metadata` and `metadata.json`: with them the directory is a checkpoint that dist_checkpointing loads."""
    metadata.storage_data = {result.index: result.storage_data for result in results}
    with (directory / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
    (directory / BACKEND).write_text(json.dumps(_BACKEND))
    for name in (METADATA, BACKEND):
        sync_path(directory / name)


class _Buffer:
    """Memory that is used again and again: the system takes longer to give fresh memory than to read a file into it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor, in place of the one before."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if self._bytes.numel() < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        return self._bytes[:num_bytes].view(dtype).view(tuple(shape))


class TorchDistReader:
    """Tensors of a torch_dist directory, each read from its pieces when asked for; valid until the next but one.

    digests: take those of what is read.
    """

    def __init__(self, path: Path, digests: PassingDigests | None = None):
        self.path, self.digests = Path(path), digests
        self._metadata = read_metadata(self.path)
        self.saved = {k: v for k, v in self._metadata.state_dict_metadata.items() if hasattr(v, "size")}
        self._pieces: dict[str, dict[tuple[int, ...], list[Any]]] = {}
        self._wholes, self._piece = itertools.cycle([_Buffer(), _Buffer()]), _Buffer()

    def read(self, key: str, prefix: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The first rows (columns ...) of extent `shape` of the tensor's slice at index `prefix` of its leading axes.

        A copy only where the slice lies in several pieces. Raises OSError and RuntimeError for damaged files.
        """
        pieces = self._at(key, len(prefix))[prefix]
        if len(pieces) == 1:
            whole = self._load(key, pieces[0], next(self._wholes), len(prefix))
            return whole[tuple(slice(0, size) for size in shape)]
        result = next(self._wholes).tensor(shape, self.saved[key].properties.dtype)
        return self.read_region(key, prefix, (0,) * len(shape), result)

    def read_region(
        self, key: str, prefix: tuple[int, ...], start: tuple[int, ...], result: torch.Tensor
    ) -> torch.Tensor:
        """Fill `result` with the part of its extent that starts at index `start` of the slice at `prefix`; what lies beyond
        the tensor is left as it is. Of each piece, the rows that are needed are read. CheckpointError for a gap.
        """
        missing = math.prod(
            max(0, min(size - s, n))
            for size, s, n in zip(self.saved[key].size[len(prefix) :], start, result.shape, strict=True)
        )
        for piece in self._at(key, len(prefix)).get(prefix, ()):
            first, sizes = piece.offsets[len(prefix) :], piece.sizes[len(prefix) :]
            low = [max(0, s - f) for s, f in zip(start, first, strict=True)]
            high = [min(n, s + m - f) for s, m, f, n in zip(start, result.shape, first, sizes, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                data = self._load(key, piece, self._piece, len(prefix), (low[0], high[0]))
                data = data[:, *(slice(a, b) for a, b in zip(low[1:], high[1:], strict=True))]
                inside = [f + a - s for f, a, s in zip(first, low, start, strict=True)]
                result[tuple(slice(i, i + n) for i, n in zip(inside, data.shape, strict=True))] = data
                missing -= data.numel()
        if missing > 0:
            raise CheckpointError(
                f"{self.path}: {missing} elements of {key} are in no piece of it; use another checkpoint"
            )
        return result

    def _at(self, key: str, axes: int) -> Mapping[tuple[int, ...], list[Any]]:
        if key not in self._pieces:
            found = defaultdict(list)
            for piece in self.saved[key].chunks:
                found[tuple(piece.offsets[:axes])].append(piece)
            self._pieces[key] = found
        return self._pieces[key]

    def _load(
        self, key: str, piece: Any, buffer: _Buffer, axes: int, rows: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """What torch.load gives, but in the buffer, without its leading axes; or the rows [first, last) of it."""
        place = self._metadata.storage_data[MetadataIndex(key, piece.offsets)]
        with open(self.path / place.relative_path, "rb", buffering=0) as file:
            with torch.serialization.skip_data():
                like = torch.load(_view(file, place), weights_only=True)
            if not like.is_contiguous():  # nothing here writes such a piece
                whole = torch.load(_view(file, place), weights_only=True)
                whole = whole.view(whole.shape[axes:])
                return whole if rows is None else whole[rows[0] : rows[1]]
            archive = torch._C.PyTorchFileReader(_view(file, place))
            start = archive.get_record_offset("data/0")  # type: ignore[attr-defined]  # not in torch's stub
            start += like.storage_offset() * like.itemsize
            like = like.view(like.shape[axes:])
            if rows is not None:
                start, like = start + rows[0] * like.stride(0) * like.itemsize, like[rows[0] : rows[1]]
            result = buffer.tensor(like.shape, like.dtype)
            file.seek(place.offset + start)
            if self.digests is None:
                read_exactly(file, result)
            else:
                self.digests.read_exactly(place.relative_path, file, result)
        return result


def _view(file: io.FileIO, place: _StorageInfo) -> IO[bytes]:
    return _create_file_view(file, place.offset, place.length)  # type: ignore[return-value]  # torch says IOBase of it


class Stored:
    """A tensor that a model asks for, left in the checkpoint until it is needed. leaf: Megatron's ShardedTensor, or factory
    of some, whose data says nothing but shapes (it is on torch's meta device).
    """

    def __init__(self, leaf: Any, reader: TorchDistReader):
        self._leaf, self._reader = leaf, reader

    def copy_into(self, target: torch.Tensor, first: int) -> None:
        """Fill `target` [n] with the elements [first, first + n) of the flattened tensor. Zeros where none were saved.

        Takes BLOCK elements of memory twice, or two rows where they are longer; for what a factory puts together (the fused
        first layer of a feed-forward), twice that whole tensor.
        """
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
        from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

        last = first + target.numel()
        if isinstance(self._leaf, ShardedTensorFactory):
            parts = dict_list_map_outplace(lambda part: self._rows(part, 0, part.local_shape[0]), self._leaf.build())
            target.copy_(self._leaf.merge_fn(parts).flatten()[first:last])
            return
        width = math.prod(self._leaf.local_shape[1:])
        step, end = max(1, BLOCK // width), -(-last // width)
        for row in range(first // width, end, step):
            block = self._rows(self._leaf, row, min(end, row + step)).flatten()
            low, high = max(first, row * width), min(last, row * width + block.numel())
            target[low - first : high - first].copy_(block[low - row * width : high - row * width])

    def _rows(self, tensor: Any, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of this rank's part of a ShardedTensor."""
        axes = tensor.prepend_axis_num
        prefix, (start, *others) = tuple(tensor.global_offset[:axes]), tensor.global_offset[axes:]
        rows = torch.zeros((last - first, *tensor.local_shape[1:]), dtype=tensor.dtype)
        return self._reader.read_region(tensor.key, prefix, (start + first, *others), rows)
