"""The torch_dist form on disk: data files of serialized pieces, and `.metadata`, which says where each piece lies.

Megatron's dist_checkpointing reads and writes the same files; here they are written without forked processes (which
may not be forked from under gloo's and vLLM's threads), digested on the way, and read one tensor at a time.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from r1mega.checkpoint.manifest import digesting_file
from r1mega.observe.files import sync_path

METADATA, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

Piece = tuple[MetadataIndex, torch.Tensor | io.BytesIO]


def write_pieces(
    path: Path, pieces: Iterable[Piece], name: str | None = None
) -> tuple[list[WriteResult], dict[str, Any]]:
    """Write one data file; where each piece lies in it, and the file's manifest record. Raises OSError, RuntimeError.

    name: that the file will have in the checkpoint, when it is not path's.

    Tensors are contiguous, on the CPU, and own their storage or are a view of all that is to be stored.
    """
    results = []
    with digesting_file(path) as file:
        for index, data in pieces:
            start = file.tell()
            if isinstance(data, torch.Tensor):
                torch.save(data.detach(), file)
            else:
                file.write(data.getbuffer())
            size = file.tell() - start
            results.append(WriteResult(index, size, _StorageInfo(name or path.name, start, size)))
        return results, file.finish()


@contextlib.contextmanager
def without_crc() -> Iterator[None]:
    """Inside, torch.save leaves out its CRC-32 (a tenth of its time): the manifest's sha256 says more."""
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
