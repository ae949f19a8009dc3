"""HF directory -> torch_dist checkpoint of the weights, without a model: each parameter is read, cut, written."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from r1mega.checkpoint.conversion import PLAN, OutputFile, partition, read_ahead
from r1mega.checkpoint.fp8_blocks import SCALE, check_config, dequantize, scale_shape
from r1mega.checkpoint.hf import (
    EXPERT_BIAS,
    WIDER,
    HFTensors,
    copy_tokenizer,
    read_config,
    tied_head_problems,
    weights_dtype,
)
from r1mega.checkpoint.hf_state import is_ignored
from r1mega.checkpoint.manifest import MANIFEST, file_record, write_manifest
from r1mega.checkpoint.name_rules import Region, pieces, to_local
from r1mega.checkpoint.parameters import Parameter, model_shape_of, parameters
from r1mega.checkpoint.safetensors_file import as_bytes, read_tensor
from r1mega.checkpoint.store import PROGRESS, check_architecture, deciding_keys
from r1mega.checkpoint.torch_dist import COMMON, Piece, without_crc, write_index, write_pieces
from r1mega.config.layout import Layout, model_problems
from r1mega.config.model_files import HFConfig
from r1mega.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

_FLOATS = (*WIDER, torch.bfloat16)
_MTP_COPY = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
_COPY_ROWS = 4096


class ToMegatron:
    """The plan of one conversion, and the writing of its files (`conversion.Conversion`).

    layout: how parameters are cut; a stage in that layout then reads no byte that it does not need, and one in any
    other layout can load it as well. dtype: of the weights (None: what config.json says); the routers' expert bias is
    always float32. Raises CheckpointError, listing every tensor that is missing, unknown, misshapen or of a wrong
    dtype; ConfigError for a layout that does not divide the model.
    """

    def __init__(self, source: Path, layout: Layout, *, dtype: torch.dtype | None = None, max_file_bytes: int):
        self.source, self.layout = Path(source), layout
        config = read_config(self.source)
        check_config(config)
        self.tensors = HFTensors(self.source)
        self.num_mtp = _count_mtp(self.tensors, config)
        self.parameters = list(parameters(config, self.num_mtp))
        if problems := list(model_problems(layout, config)):
            raise ConfigError("; ".join(problems))
        self.model = model_shape_of(config, self.num_mtp)
        self.dtype = dtype or weights_dtype(config, self.tensors)
        check_tensors(self.tensors, self.parameters, self.model, self.source)
        if dtype is None:
            self._tell_rounding()
        self.config = _plain_config(config, self.dtype, self.num_mtp)
        runs = partition(self.parameters, self._num_bytes, max_file_bytes)
        self.files = [OutputFile(f"__{i}_0.distcp", held, size) for i, (held, size) in enumerate(runs)]
        largest = max(map(self._num_bytes, self.parameters))
        self._buffers = itertools.cycle([torch.empty(largest, dtype=torch.uint8) for _ in range(2)])

    def describe(self) -> str:
        stamps = sorted((i.path.name, i.path.stat().st_mtime_ns) for i in self.tensors.infos.values())
        return f"{self.config} {self.layout} {self.dtype} {sorted(set(stamps))}"

    def write(self, file: OutputFile, path: Path) -> dict[str, Any]:
        wholes = read_ahead(file.parameters, self._whole)
        pieces = itertools.chain.from_iterable(itertools.starmap(self._pieces, wholes))
        with without_crc():
            results, record = write_pieces(path, pieces, name=file.name)
        places = [
            [r.index.fqn, list(r.index.offset or ()), r.storage_data.offset, r.storage_data.length] for r in results
        ]
        return {"pieces": places, "file": record}

    def problem(self) -> str | None:
        """An HF directory has no digests to compare."""
        return None

    def finish(self, directory: Path, records: Mapping[str, dict[str, Any]]) -> None:
        """Write the index over all files, config.json, the tokenizer and the manifest."""
        results = [
            WriteResult(MetadataIndex(key, offset), length, _StorageInfo(name, start, length))
            for name, record in records.items()
            for key, offset, start, length in record["pieces"]
        ]
        write_index(directory, self._metadata(), results)
        torch.save({}, directory / COMMON)
        (directory / PROGRESS).write_text(json.dumps({"step": 0}))
        (directory / "config.json").write_text(json.dumps(self.config, indent=1))
        copy_tokenizer(self.source, directory)
        files = {name: record["file"] for name, record in records.items()}
        small = [p for p in directory.iterdir() if p.is_file() and p.name not in (*files, PLAN)]
        write_manifest(directory, deciding_keys(self.config), files | {p.name: file_record(p) for p in small})

    def _tell_rounding(self) -> None:
        """Of wider weights than config.json says, which nobody asked for."""
        names = [name for parameter in self.parameters for name in parameter.entry.hf_names]
        wider = [n for n in names if self.tensors.infos[n].dtype in WIDER and not n.endswith(EXPERT_BIAS)]
        if wider and self.dtype == torch.bfloat16:
            stored = str(self.tensors.infos[wider[0]].dtype).removeprefix("torch.")
            logger.warning(
                "%s: %d tensors are wider than the bfloat16 of config.json and are rounded to it (the first: %s, %s); "
                "--dtype float32 keeps them as they are", self.source, len(wider), wider[0], stored,
            )  # fmt: skip

    # ------------------------------------------------------------------ one parameter

    def _dtype(self, parameter: Parameter) -> torch.dtype:
        return torch.float32 if parameter.key.endswith("expert_bias") else self.dtype

    def _num_bytes(self, parameter: Parameter) -> int:
        return torch.Size(parameter.shape).numel() * self._dtype(parameter).itemsize

    def _cut(self, parameter: Parameter) -> list[Region]:
        ranks = self.layout.etp if parameter.entry.expert is not None else self.layout.tp
        return pieces(parameter.entry.form, parameter.entry.dim, parameter.shape, ranks)

    def _pieces(self, parameter: Parameter, whole: torch.Tensor) -> Iterator[Piece]:
        if parameter.key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            self._check_copies(parameter, whole)
        for region in self._cut(parameter):
            piece = whole[tuple(slice(start, stop) for start, stop in region)]
            padding = region[0][1] - region[0][0] - piece.shape[0]
            if padding:
                piece = torch.cat([piece, piece.new_zeros(padding, *piece.shape[1:])])
            piece = _own_storage(piece.contiguous()).view(*(1 for _ in parameter.prefix), *piece.shape)
            yield MetadataIndex(parameter.key, (*parameter.prefix, *(start for start, _ in region))), piece

    def _whole(self, parameter: Parameter) -> torch.Tensor:
        """The parameter of one rank without parallelism; in one of two buffers, so valid until the next but one."""
        names, dtype = parameter.entry.hf_names, self._dtype(parameter)
        if parameter.entry.form == "qkv":
            parts = [self._read(name, torch.empty(self.tensors.infos[name].shape, dtype=dtype)) for name in names]
            return to_local(parts, parameter.entry, self.model, 0, 1)
        whole = next(self._buffers)[: self._num_bytes(parameter)].view(dtype).view(parameter.shape)
        row = 0
        for name, shape in zip(names, parameter.entry.hf_shapes, strict=True):
            self._read(name, whole[row : row + shape[0]])
            row += shape[0]
        return whole

    def _read(self, name: str, out: torch.Tensor) -> torch.Tensor:
        info = self.tensors.infos[name]
        if self.tensors.is_quantized(name):
            return dequantize(read_tensor(info), read_tensor(self.tensors.infos[name + SCALE]), out)
        return read_tensor(info, out) if info.dtype == out.dtype else out.copy_(read_tensor(info))

    def _check_copies(self, parameter: Parameter, whole: torch.Tensor) -> None:
        """MTP layers share embedding and head with the model in Megatron: their own copies must be the same."""
        ending = ".embed_tokens.weight" if parameter.key.startswith("embedding") else ".shared_head.head.weight"
        for name in self.tensors:
            if not (name.endswith(ending) and _MTP_COPY.fullmatch(name)):
                continue
            copy = read_tensor(self.tensors.infos[name])
            for rows in (slice(i, i + _COPY_ROWS) for i in range(0, len(whole), _COPY_ROWS)):
                if not torch.equal(copy[rows].to(whole.dtype), whole[rows]):
                    raise CheckpointError(
                        f"{self.source}: {name} differs from {parameter.entry.hf_names[0]}, which Megatron shares with "
                        f"the MTP layer; remove the tensors of that layer to convert the model without it"
                    )

    def _metadata(self) -> Metadata:
        described: dict[str, TensorStorageMetadata] = {}
        for parameter in self.parameters:
            cut = self._cut(parameter)
            if parameter.key not in described:
                size = [max(stop for _, stop in spans) for spans in zip(*cut, strict=True)]
                properties = TensorProperties(dtype=self._dtype(parameter))
                described[parameter.key] = TensorStorageMetadata(
                    properties, torch.Size([*parameter.prefix_shape, *size]), []
                )
            described[parameter.key].chunks.extend(
                ChunkStorageMetadata(
                    torch.Size([*parameter.prefix, *(start for start, _ in region)]),
                    torch.Size([*(1 for _ in parameter.prefix), *(stop - start for start, stop in region)]),
                )
                for region in cut
            )
        return Metadata(dict(described))


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under a storage of just this size: torch.save writes storages, not what is seen of them."""
    return torch.frombuffer(as_bytes(tensor).numpy(), dtype=tensor.dtype)


def _plain_config(config: HFConfig, dtype: torch.dtype, num_mtp: int) -> dict[str, Any]:
    """config.json of the same model with plain weights of that dtype."""
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "dtype")}
    if "num_nextn_predict_layers" in plain:
        plain["num_nextn_predict_layers"] = num_mtp
    return plain | {"torch_dtype": str(dtype).removeprefix("torch.")}


def _count_mtp(tensors: HFTensors, config: HFConfig) -> int:
    """MTP layers that are there: the published config may say one that a fine-tuned checkpoint lacks."""
    first = config.get("num_hidden_layers", 0)
    return sum(
        f"model.layers.{first + k}.eh_proj.weight" in tensors
        for k in range(config.get("num_nextn_predict_layers") or 0)
    )


def check_weights(directory: Path, num_mtp_layers: int) -> None:
    """CheckpointError unless the weights in `directory` are of the model that its config.json describes.

    directory: an HF directory, or a checkpoint made by a conversion. Reads headers (and a tied head that is there all the
    same), and needs no processes: what is wrong is told before anything starts.
    """
    config = read_config(directory)
    if (directory / MANIFEST).exists():
        check_architecture(directory, deciding_keys(config))
        return
    tensors = HFTensors(directory)
    check_tensors(tensors, list(parameters(config, num_mtp_layers)), model_shape_of(config, num_mtp_layers), directory)


def check_tensors(tensors: HFTensors, wanted: list[Parameter], model: Any, source: Path) -> None:
    """CheckpointError that lists everything by which the tensors differ from what the config asks for."""
    problems, expected = [], set()
    for parameter in wanted:
        for name, shape in zip(parameter.entry.hf_names, parameter.entry.hf_shapes, strict=True):
            expected |= {name, name + SCALE} if name in tensors and tensors.is_quantized(name) else {name}
            info = tensors.infos.get(name)
            if info is None:
                problems.append(f"missing: {name}")
            elif info.shape != shape:
                problems.append(f"shape: {name} is {list(info.shape)}, config.json asks for {list(shape)}")
            elif info.dtype == torch.float8_e4m3fn:
                problems += _check_scale(tensors, name)
            elif info.dtype not in _FLOATS:
                problems.append(f"dtype: {name} is {info.dtype}, not a floating-point weight")
    problems += [f"unknown: {name}" for name in tensors.infos if name not in expected and not is_ignored(name, model)]
    if model.tied_embeddings and not problems:
        problems += tied_head_problems(tensors)
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise CheckpointError(
            f"{source}: {len(problems)} tensors are not what config.json describes; is it of another model?\n  {listed}"
        )


def _check_scale(tensors: HFTensors, name: str) -> list[str]:
    scale = tensors.infos.get(name + SCALE)
    if scale is None:
        return [f"dtype: {name} is torch.float8_e4m3fn without {name}{SCALE}"]
    if scale.dtype != torch.float32:
        return [f"dtype: {name}{SCALE} is {scale.dtype}, not torch.float32"]
    shape = scale_shape(tensors.infos[name].shape)
    return (
        []
        if scale.shape == shape
        else [f"shape: {name}{SCALE} is {list(scale.shape)}, the blocks of the weight ask for {list(shape)}"]
    )
