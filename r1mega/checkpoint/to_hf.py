"""torch_dist checkpoint -> HF directory, without a model: each parameter is read from its pieces, split, written."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from r1mega.checkpoint.conversion import Altered, OutputFile, partition, read_ahead
from r1mega.checkpoint.fit import alias
from r1mega.checkpoint.fp8_blocks import CONFIG, SCALE, is_quantized, quantize, scale_shape
from r1mega.checkpoint.hf import read_config, shard_name, write_hf_files
from r1mega.checkpoint.manifest import MANIFEST, PassingDigests, read_manifest
from r1mega.checkpoint.manifest import verify as problem_of
from r1mega.checkpoint.name_rules import to_full
from r1mega.checkpoint.parameters import Parameter, model_shape_of, parameters
from r1mega.checkpoint.safetensors_file import write_tensors
from r1mega.checkpoint.store import check_architecture, deciding_keys, newest_whole
from r1mega.checkpoint.torch_dist import TorchDistReader
from r1mega.checkpoint.workers import Workers
from r1mega.config.model_files import HFConfig
from r1mega.data.tokenizer import TOKENIZER_FILES
from r1mega.errors import CheckpointError

Spec = tuple[str, torch.dtype, tuple[int, ...]]


class ToHF:
    """The plan of one conversion, and the writing of its files (`conversion.Conversion`).

    config: config.json of the model. tokenizer_from: where the tokenizer's files are copied from. dtype: of the weights
    (None: as saved). fp8_blocks: write DeepSeek-V3's published form. digests: compare what is read with them.
    Raises CheckpointError, listing every tensor that is missing or misshapen.
    """

    def __init__(
        self, path: Path, config: HFConfig, *, tokenizer_from: Path | None, dtype: torch.dtype | None = None,
        fp8_blocks: bool = False, max_file_bytes: int, digests: PassingDigests | None = None,
    ):  # fmt: skip
        self.path, self.tokenizer_from, self.fp8_blocks = Path(path), tokenizer_from, fp8_blocks
        self.reader = TorchDistReader(self.path, digests)
        saved = self.reader.saved
        layers = range(config.get("num_nextn_predict_layers") or 0)
        self.num_mtp = sum(f"mtp.layers.{k}.enorm.weight" in saved for k in layers)
        wanted = [*parameters(config, self.num_mtp), *_mtp_copies(config, self.num_mtp)]
        self.model = model_shape_of(config, self.num_mtp)
        self._check_architecture(config)
        self.parameters = [
            p if p.key in saved else dataclasses.replace(p, key=alias(p.key) or p.key) for p in self._complete(wanted)
        ]
        self._dtype_asked = dtype
        self.config = self._config(config)
        runs = partition(self.parameters, self._num_bytes, max_file_bytes)
        self.files = [OutputFile(shard_name(i, len(runs)), held, size) for i, (held, size) in enumerate(runs)]

    def describe(self) -> str:
        # a file that was altered and is mended is another one, and so is what was made of it: ctime, for a copy may
        # keep mtime
        names = (MANIFEST, *sorted(read_manifest(self.path)["files"]))
        found = [(self.path / name).stat() for name in names]
        stamps = [
            (name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in zip(names, found, strict=True)
        ]
        return f"{self.path.resolve()} {stamps} {(self.path / MANIFEST).read_text()} {self.config} {self.fp8_blocks}"

    def write(self, file: OutputFile, path: Path) -> dict[str, Any]:
        specs = {name: (dtype, shape) for p in file.parameters for name, dtype, shape in self._specs(p)}
        wholes = read_ahead(file.parameters, lambda p: self.reader.read(p.key, p.prefix, p.shape))
        try:
            with contextlib.closing(wholes):
                write_tensors(path, specs, itertools.chain.from_iterable(itertools.starmap(self._tensors, wholes)))
        except OSError:
            raise
        except Exception as error:  # bytes that were altered end in any
            if problem := self.problem():
                raise Altered(problem) from error
            raise
        return {"names": list(specs)}

    def problem(self) -> str | None:
        """What is altered, where digests are taken on the way; reads what no tensor was made of."""
        found = None if self.reader.digests is None else self.reader.digests.problem()
        return found and _not_whole(self.path, found)

    def finish(self, directory: Path, records: Mapping[str, dict[str, Any]]) -> None:
        shards = {name: record["names"] for name, record in records.items()}
        write_hf_files(directory, self.config, shards, sum(f.num_bytes for f in self.files), self.tokenizer_from)

    # ------------------------------------------------------------------ one parameter

    def _dtype(self, parameter: Parameter) -> torch.dtype:
        if parameter.key.endswith("expert_bias"):
            return torch.float32
        return self._dtype_asked or self.reader.saved[parameter.key].properties.dtype

    def _specs(self, parameter: Parameter) -> Iterator[Spec]:
        """(name, dtype, shape) of the HF tensors of one parameter, in the order in which they are written."""
        for name, shape in zip(parameter.entry.hf_names, parameter.entry.hf_shapes, strict=True):
            if self.fp8_blocks and is_quantized(name):
                yield name, torch.float8_e4m3fn, shape
                yield name + SCALE, torch.float32, scale_shape(shape)
            else:
                yield name, self._dtype(parameter), shape

    def _num_bytes(self, parameter: Parameter) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in self._specs(parameter))

    def _tensors(self, parameter: Parameter, whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        parts = to_full([whole], parameter.entry, self.model)
        for name, tensor in zip(parameter.entry.hf_names, parts, strict=True):
            if self.fp8_blocks and is_quantized(name):
                yield from zip((name, name + SCALE), quantize(tensor), strict=True)
            else:
                yield name, tensor.to(self._dtype(parameter))

    # ------------------------------------------------------------------ the whole

    def _complete(self, wanted: list[Parameter]) -> list[Parameter]:
        """`wanted`, after every one was found to be there in the right shape."""
        problems = set()
        for parameter in wanted:
            found = self.reader.saved.get(parameter.key) or self.reader.saved.get(alias(parameter.key))
            size = (*parameter.prefix_shape, *parameter.shape)
            if found is None:
                problems.add(f"missing: {parameter.key}")
            elif tuple(found.size) != size and not _is_padded(parameter, found.size):
                problems.add(f"shape: {parameter.key} is {list(found.size)}, config.json asks for {list(size)}")
        if problems:
            listed = "\n  ".join(sorted(problems))
            raise CheckpointError(
                f"{self.path}: {len(problems)} tensors are not what config.json describes; is it of another model?\n"
                f"  {listed}"
            )
        return wanted

    def _check_architecture(self, config: HFConfig) -> None:
        """The manifest says more clearly than a list of tensors that a config is of another model."""
        architecture = deciding_keys(config)
        saved = read_manifest(self.path)["architecture"]
        if saved.get("num_nextn_predict_layers") != architecture.get("num_nextn_predict_layers"):
            architecture.pop("num_nextn_predict_layers", None)  # MTP layers may be left out
            saved.pop("num_nextn_predict_layers", None)
        if saved != json.loads(json.dumps(architecture)):
            check_architecture(self.path, architecture)

    def _config(self, config: HFConfig) -> dict[str, Any]:
        """config.json as transformers and vLLM load it: what is in the files, and nothing else."""
        result = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
        weights = self._dtype(self.parameters[0])
        result["torch_dtype"] = str(weights).removeprefix("torch.")
        if "num_nextn_predict_layers" in result:
            result["num_nextn_predict_layers"] = self.num_mtp
        if self.fp8_blocks:
            result["quantization_config"] = CONFIG
        return result


def _is_padded(parameter: Parameter, size: Any) -> bool:
    """The vocabulary is padded to a multiple of the ranks that saved it."""
    rows, *rest = parameter.shape
    return parameter.entry.form == "vocabulary" and list(size[1:]) == rest and size[0] >= rows


def _mtp_copies(config: HFConfig, num_mtp: int) -> Iterator[Parameter]:
    """The published form repeats embedding and head in each MTP layer."""
    if num_mtp == 0:
        return
    top = {p.key: p for p in parameters({**config, "num_hidden_layers": 0}) if not p.prefix}
    embedding = top["embedding.word_embeddings.weight"]
    for k in range(num_mtp):
        for parameter, suffix in (
            (embedding, "embed_tokens.weight"),
            (top.get("output_layer.weight", embedding), "shared_head.head.weight"),
        ):
            name = f"model.layers.{config['num_hidden_layers'] + k}.{suffix}"
            yield dataclasses.replace(parameter, entry=dataclasses.replace(parameter.entry, hf_names=(name,)))


def find_checkpoint(path: Path, workers: Workers, *, verify: bool = True) -> tuple[Path, PassingDigests | None]:
    """A checkpoint directory itself, or the newest whole one of a run; and what compares its data as they are read.

    A checkpoint that was named is read once: one worker alone compares its data on the way, several share the files
    and do it before. Of a run's the newest is verified before, for it may have to be the one before it.
    verify: False trusts what was named as it is.

    CheckpointError when there is none, or when the one that was named is torn or altered.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        found = newest_whole(path / "checkpoints", workers)
        if found is None:
            raise CheckpointError(f"{path}: the run has no whole checkpoint")
        return found, None
    if not (path / MANIFEST).exists():
        raise CheckpointError(
            f"{path} is neither a run nor a whole checkpoint: it has no checkpoints/ and no {MANIFEST}"
        )
    passing = verify and workers.size == 1
    if verify and (problem := problem_of(path, workers, data_passes=passing)):
        raise CheckpointError(_not_whole(path, problem))
    return path, PassingDigests(path) if passing else None


def _not_whole(path: Path, problem: str) -> str:
    return f"{path} is not a whole checkpoint ({problem}); use another one"


def find_config(checkpoint: Path, given: Path | None) -> tuple[dict[str, Any], Path]:
    """(config.json, the directory of the tokenizer): of the HF directory that was given, the checkpoint's own, or of
    its run: what the run trained its tokenizer in, its key `tokenizer`, or model.path, the first that has one.
    """
    from r1mega.observe.run import RunDirectory

    if given is None and (checkpoint / "config.json").exists():
        given = checkpoint
    if given is not None:
        return read_config(given), given
    run = checkpoint.parent.parent
    if not (run / "config.yaml").exists():
        raise CheckpointError(f"{checkpoint} belongs to no run; say with --config which HF directory describes it")
    stage = RunDirectory(run).read_config()
    model = Path(stage["model"]["path"])
    places = [run / "tokenizer", *([Path(stage["tokenizer"])] if stage.get("tokenizer") else []), model]
    found = (place for place in places if any((place / name).exists() for name in TOKENIZER_FILES))
    return read_config(model), next(found, model)
