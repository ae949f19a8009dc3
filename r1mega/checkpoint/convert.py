"""`r1mega convert`: what the command and tools/convert_checkpoint.py do, alone or as one of many processes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from r1mega.checkpoint.conversion import run_conversion
from r1mega.checkpoint.to_hf import ToHF, find_checkpoint, find_config
from r1mega.checkpoint.to_megatron import ToMegatron
from r1mega.checkpoint.workers import Workers, together
from r1mega.config.schema import Dtype, ParallelConfig
from r1mega.errors import ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """parallel: the layout to write for (to megatron); config: an HF directory that describes the model (to hf);
    max_file_bytes: of one output file, unless a single tensor is larger; verify: read the checkpoint's digests first.
    """

    parallel: ParallelConfig = ParallelConfig()
    config: Path | None = None
    dtype: Dtype | None = None
    fp8_blocks: bool = False
    max_file_bytes: int = 5 * 10**9
    verify: bool = True


def convert(
    source: Path, out: Path, target: Literal["megatron", "hf"], options: ConvertOptions, workers: Workers
) -> Path:
    """Convert `source` into the directory `out`. Raises ConfigError, CheckpointError on every worker."""
    if workers.size > 1:
        torch.set_num_threads(1)  # the workers share the cores
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if target == "megatron":
        if options.fp8_blocks:
            raise ConfigError("--fp8-blocks goes with --to-hf; what is stored in FP8 is read as it is")
        planned = together(
            workers, lambda: ToMegatron(source, options.parallel, dtype=dtype, max_file_bytes=options.max_file_bytes)
        )
        return run_conversion(planned, out, workers)
    checkpoint, digests = find_checkpoint(source, workers, verify=options.verify)

    def plan() -> ToHF:
        config, described_in = find_config(checkpoint, options.config)
        return ToHF(
            checkpoint, config, tokenizer_from=described_in, dtype=dtype, fp8_blocks=options.fp8_blocks,
            max_file_bytes=options.max_file_bytes, digests=digests,
        )  # fmt: skip

    return run_conversion(together(workers, plan), out, workers)


def parse_parallel(text: str) -> ParallelConfig:
    """'tp=2,ep=4' -> ParallelConfig. ConfigError for what is not one of its sizes.

    pp and vpp may be there and are left out: they cut no tensor, whether they fit the model or not.
    """
    sizes: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in ("tp", "ep", "etp", "pp", "vpp") or not value.isdigit() or int(value) < 1:
            raise ConfigError(f"--parallel {text!r}: {part!r} is not one of tp, ep, etp, pp, vpp = a positive number")
        if key not in ("pp", "vpp"):
            sizes[key] = int(value)
    return ParallelConfig(**sizes)


def parse_bytes(text: str) -> int:
    """'5GB', '512MiB', '1000000' -> bytes. ConfigError for anything else."""
    match = re.fullmatch(r"(\d+) *([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) == 0:
        raise ConfigError(f"--max-shard-size {text!r} is not a size such as 5GB or 512MiB")
    return int(match[1]) * _UNITS[match[2]]
