"""Hugging Face directories: safetensors read lazily, written in bounded shards, under their final name only when whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from r1mega.data.tokenizer import TOKENIZER_FILES
from r1mega.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of an HF directory. CheckpointError when it is missing or not JSON."""
    path = Path(directory) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; model.path must be an HF model directory") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error


class HFTensors(Mapping[str, torch.Tensor]):
    """The tensors of an HF directory by name, each read from its shard when asked for."""

    def __init__(self, directory: Path):
        self._directory = Path(directory)
        shards = sorted(self._directory.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(f"{directory}: no *.safetensors there: the directory holds no weights")
        self._files: dict[str, Any] = {}
        for shard in shards:
            try:
                handle = safe_open(shard, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{shard}: truncated or not a safetensors file ({error})") from error
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def write_hf(
    directory: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Mapping[str, Any],
    *,
    tokenizer_from: Path | None = None,
    shard_bytes: int = 5 * 2**30,
    write: bool = True,
) -> Path:
    """Write an HF directory from a stream of (name, tensor), holding at most one shard in memory.

    All ranks consume the stream (it may be collective); only the one with write=True touches the disk. An existing
    directory of that name is replaced once the new one is whole. tokenizer_from: where to copy tokenizer files from.
    """
    directory = Path(directory)
    temporary = directory.with_name(directory.name + ".tmp")
    if not write:
        for _ in tensors:
            pass
        return directory
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    held = total = 0

    def flush() -> None:
        nonlocal held
        save_file(shard, temporary / f"shard-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()
        held = 0

    try:
        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if shard and held + size > shard_bytes:
                flush()
            shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
            held, total = held + size, total + size
        flush()
        weight_map = {}
        for i, names in enumerate(shards):
            final = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            os.replace(temporary / f"shard-{i:05d}.safetensors", temporary / final)
            weight_map.update(dict.fromkeys(names, final))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / INDEX).write_text(json.dumps(index, indent=1))
        (temporary / "config.json").write_text(json.dumps(dict(config), indent=1))
        for name in (*TOKENIZER_FILES, "generation_config.json") if tokenizer_from is not None else ():
            if (Path(tokenizer_from) / name).exists():
                shutil.copyfile(Path(tokenizer_from) / name, temporary / name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{directory}: could not be written ({error}); nothing was kept") from error
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)
    return directory
