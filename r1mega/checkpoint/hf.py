"""Hugging Face directories: tensors read lazily, written in bounded shards, under their final name only when whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from r1mega.checkpoint.fp8_blocks import BLOCK, SCALE, dequantize
from r1mega.checkpoint.safetensors_file import TensorInfo, as_bytes, read_header, read_tensor, write_tensors
from r1mega.checkpoint.workers import Alone, Workers, agree, on_first_rank
from r1mega.config.model_files import HFConfig
from r1mega.data.tokenizer import TOKENIZER_FILES
from r1mega.errors import CheckpointError
from r1mega.files import sync_path, write_atomic

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
EXPERT_BIAS = "e_score_correction_bias"
WIDER = (torch.float32, torch.float16)
"""Than bfloat16, in digits."""
_COMPARED_ROWS = 4096


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of an HF directory. CheckpointError when it is missing or not a JSON object."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file; model.path must be an HF model directory") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: a JSON {type(config).__name__}, not the config of a model")
    return config


class HFTensors(Mapping[str, torch.Tensor]):
    """The tensors of an HF directory by name, each read from its shard when asked for.

    FP8 weights with block scales (DeepSeek-V3's published form) are given in bfloat16, their scales not at all.
    CheckpointError names every shard that is missing, and every tensor that the index has and its shard has not.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.infos: dict[str, TensorInfo] = {}
        """As stored: with the scales, in the stored dtypes."""
        index = _read_index(self.directory)
        if index is None:
            shards = sorted(self.directory.glob("*.safetensors"))
            if not shards:
                raise CheckpointError(f"{directory}: no *.safetensors there: the directory holds no weights")
        else:
            shards = [self.directory / name for name in sorted(set(index.values()))]
            if absent := [shard.name for shard in shards if not shard.exists()]:
                raise CheckpointError(f"{directory} is not a complete HF checkpoint, it lacks {', '.join(absent)}")
        twice: list[str] = []
        for shard in shards:
            held = read_header(shard)
            twice += [f"{name}: {self.infos[name].path.name}, {shard.name}" for name in held if name in self.infos]
            self.infos.update(held)
        if twice:
            head = f"{directory}: {len(twice)} tensors are in two files; remove those that do not belong to the model"
            raise CheckpointError("\n  ".join([head, *sorted(twice)]))
        if index is not None and (lost := sorted(index.keys() - self.infos.keys())):
            head = f"{directory}: {INDEX} names {len(lost)} tensors that no shard has"
            raise CheckpointError("\n  ".join([head, *lost]))
        self._names = [n for n in self.infos if not (n.endswith(SCALE) and n.removesuffix(SCALE) in self.infos)]

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor is stored in FP8 with block scales."""
        return self.infos[name].dtype == torch.float8_e4m3fn and name + SCALE in self.infos

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = read_tensor(self.infos[name])
        if self.is_quantized(name):
            wide = torch.empty(tensor.shape, dtype=torch.bfloat16)
            return dequantize(tensor, read_tensor(self.infos[name + SCALE]), wide)
        return tensor

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """The rows [first, last) of a tensor, for which no others are read, in FP8 those of the same blocks."""
        info = self.infos[name]
        if not self.is_quantized(name):
            return read_tensor(info.rows(first, last))
        top, bottom = first // BLOCK, -(-last // BLOCK)
        low, high = top * BLOCK, min(bottom * BLOCK, info.shape[0])
        wide = torch.empty(high - low, info.shape[1], dtype=torch.bfloat16)
        scales = read_tensor(self.infos[name + SCALE].rows(top, bottom))
        return dequantize(read_tensor(info.rows(low, high)), scales, wide)[first - low : last - low]

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def weights_dtype(config: HFConfig, tensors: HFTensors) -> torch.dtype:
    """What config.json says. float16 becomes float32, which holds all of it, as bfloat16 does not; without a word there, the
    tensors tell.
    """
    name = config.get("dtype") or config.get("torch_dtype")
    if name in ("float32", "bfloat16"):
        return torch.float32 if name == "float32" else torch.bfloat16
    stored = {info.dtype for name, info in tensors.infos.items() if not name.endswith((SCALE, EXPERT_BIAS))}
    return torch.float32 if name == "float16" or stored & set(WIDER) else torch.bfloat16


def tied_head_problems(tensors: HFTensors) -> list[str]:
    """Of a model whose config.json ties its head to the embedding: a head that is there all the same must be that one.

    Where it is another, it was trained, and would be thrown away.
    """
    head, embedding = tensors.infos.get(HEAD), tensors.infos.get(EMBEDDING)
    if head is None or embedding is None:
        return []
    if head.shape == embedding.shape:
        ours, theirs = read_tensor(head), read_tensor(embedding)
        blocks = (slice(i, i + _COMPARED_ROWS) for i in range(0, len(ours), _COMPARED_ROWS))
        if all(torch.equal(as_bytes(ours[rows].float()), as_bytes(theirs[rows].float())) for rows in blocks):
            return []
    return [
        f"tied: {HEAD} differs from {EMBEDDING}, though config.json says tie_word_embeddings: say false there if the head is "
        f"the model's own, else remove it"
    ]


def _read_index(directory: Path) -> dict[str, str] | None:
    """{tensor: shard}, or None when there is no index."""
    path = directory / INDEX
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("weight_map names a shard that is no text")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({error!r})") from error
    return weight_map


def shard_name(index: int, shards: int) -> str:
    """File name of shard `index` (from 0), as transformers names it."""
    return "model.safetensors" if shards == 1 else f"model-{index + 1:05d}-of-{shards:05d}.safetensors"


def write_hf_files(
    directory: Path,
    config: HFConfig,
    shards: Mapping[str, list[str]],
    total_bytes: int,
    extra_from: Path | None,
) -> None:
    """What an HF directory has besides shards: config.json, the index, and the tokenizer's files from `extra_from`."""
    if len(shards) > 1:
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomic(directory / INDEX, json.dumps(index, indent=1))
    write_atomic(directory / "config.json", json.dumps(dict(config), indent=1))
    copy_tokenizer(extra_from, directory)


def copy_tokenizer(source: Path | None, directory: Path) -> None:
    """What belongs to a model besides config.json and weights, as far as it is there: the tokenizer's files,
    generation_config.json, and the Python files that `auto_map` in config.json and tokenizer_config.json refer to.
    """
    if source is None:
        return
    code = (path.name for path in Path(source).glob("*.py"))
    for name in (*TOKENIZER_FILES, "generation_config.json", *code):
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, directory / name)
            sync_path(directory / name)


def write_hf(
    directory: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: HFConfig,
    *,
    tokenizer_from: Path | None = None,
    shard_bytes: int = 5 * 2**30,
    workers: Workers | None = None,
) -> Path:
    """Write an HF directory from a stream of (name, tensor). An existing one of that name is replaced once the new is whole.

    workers: who consume the same stream together (it may be collective), and share out the files: rank r writes shards
    r, r + size, ..., while the stream goes on. Each holds at most two shards in host memory, one being written. None: this
    process alone. tokenizer_from: where to copy tokenizer files from. Raises CheckpointError on all of them.
    """
    directory, workers = Path(directory), workers or Alone()
    temporary = directory.with_name(directory.name + ".tmp")

    def make() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish(shards: Sequence[list[str]], total: int) -> None:
        final = {shard_name(i, len(shards)): names for i, names in enumerate(shards)}
        for i, name in enumerate(final):
            os.replace(temporary / _part_name(i), temporary / name)
        write_hf_files(temporary, config, final, total, tokenizer_from)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)

    advice = f"{directory} was not written, nothing of it was kept; free some disk and start again"
    try:
        on_first_rank(workers, make, advice)
        shards, total, problems = _write_shards(temporary, tensors, shard_bytes, workers)
        agree(workers, problems, advice)
        on_first_rank(workers, lambda: finish(shards, total), advice)
    except CheckpointError:
        if workers.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return directory


def _part_name(index: int) -> str:
    """Of a shard while their number is not known."""
    return f"shard-{index:05d}"


def _write_shards(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int, workers: Workers
) -> tuple[list[list[str]], int, list[str]]:
    """(names in each shard of all ranks, bytes of all tensors, what this rank could not write). The stream is exhausted
    whatever happens to the disk: other ranks wait in it.
    """
    shards: list[list[str]] = [[]]
    mine: dict[str, torch.Tensor] = {}
    writing: list[Future[None]] = []
    problems: list[str] = []
    held = total = 0

    def settle() -> None:
        try:
            for future in writing:
                future.result()
        except OSError as error:
            problems.append(f"{directory}: could not be written ({error})")
        writing.clear()

    def flush() -> None:
        nonlocal mine
        settle()
        if mine and not problems:
            specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in mine.items()}
            path = directory / _part_name(len(shards) - 1)
            writing.append(pool.submit(write_tensors, path, specs, mine.items()))
        mine = {}

    with ThreadPoolExecutor(1) as pool:
        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if shards[-1] and held + size > shard_bytes:
                flush()
                shards.append([])
                held = 0
            shards[-1].append(name)
            if (len(shards) - 1) % workers.size == workers.rank:
                mine[name] = tensor.detach().to("cpu", copy=True).contiguous()
            held, total = held + size, total + size
        flush()
        settle()
    return shards, total, problems
