"""Checks that need more than one key: the model's config.json, files, the number of processes. No heavy imports."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from r1mega.config.launched import launched_place
from r1mega.config.layout import NOT_BUILT, model_problems, process_problems
from r1mega.config.megatron import (
    dispatch_problems,
    exchange_problems,
    offload_problems,
    overlap_problems,
    recompute_problems,
)
from r1mega.config.model_files import context_length, tokenizer_code_problem, tokenizer_size, trusts_remote_code
from r1mega.config.precision import fp8_problems
from r1mega.config.schema import DataConfig, RolloutConfig, Stage, TrainingStage
from r1mega.errors import ConfigError


def validate(config: Stage, world_size: int | None = None) -> None:
    """Raises ConfigError listing everything that cannot work. world_size: None: what the launcher's environment says."""
    world = world_size if world_size is not None else launched_processes()
    hf, problems = _read_model(config)
    if hf is not None:
        problems += layout_problems(config, hf, world)
    if isinstance(config, TrainingStage):
        problems += config.memory_problems()
    problems += config.problems(hf or {}, world)
    if problems:
        raise ConfigError("\n".join(problems))


_promise: ContextVar[Mapping[Path, Path | None]] = ContextVar("promise", default=MappingProxyType({}))
_damaged: ContextVar[Collection[Path]] = ContextVar("damaged", default=())


@contextlib.contextmanager
def promised(directories: Mapping[Path, Path | None], damaged: Collection[Path] = ()) -> Iterator[None]:
    """In the block, what lies in these directories does not count as missing: an earlier stage will have made it.

    directories: each with the HF directory whose architecture its models will have, itself promised perhaps; None for
    what is no model. damaged: those of them whose present content does not count.
    """
    token, other = _promise.set(directories), _damaged.set(damaged)
    try:
        yield
    finally:
        _promise.reset(token)
        _damaged.reset(other)


def _promised_in(path: Path) -> Path | None:
    """The promised directory that `path` lies in, unless `path` is there already, undamaged."""
    whole = Path(os.path.abspath(path))
    found = next((d for d in _promise.get() if whole.is_relative_to(os.path.abspath(d))), None)
    return None if path.exists() and found not in _damaged.get() else found


def is_given(path: Path) -> bool:
    """Whether there is such a file or directory, or will be."""
    return path.exists() or _promised_in(path) is not None


def architecture_directory(model: Path) -> Path:
    """Where the config.json of an HF directory is: there, or while an earlier stage is to make it in what that starts from."""
    while (promise := _promised_in(model / "config.json")) is not None:
        if (source := _promise.get()[promise]) is None:
            break
        model = source
    return model


def launched_processes() -> int:
    """Processes of this job, by what torchrun, Slurm or MPI put into the environment; 1 without any."""
    place = launched_place()
    return place.size if place else 1


def _read_model(config: Stage) -> tuple[dict[str, Any] | None, list[str]]:
    """(config.json of the model, or None when it cannot be read; problems)."""
    path = architecture_directory(config.model.path) / "config.json"
    try:
        hf = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        hint = "; run the stage that makes it first" if config.model.path.name == "hf" else ""
        return None, [f"model.path = {config.model.path}: {path} is missing: not an HF model directory{hint}"]
    except OSError as error:
        return None, [f"model.path = {config.model.path}: {path} cannot be read ({error.strerror})"]
    except (ValueError, RecursionError) as error:
        return None, [f"{path}: not JSON ({error})"]
    if not isinstance(hf, dict) or not isinstance(hf.get("model_type"), str):
        return None, [f"{path}: not the config.json of an HF model (it names no model_type)"]
    return hf, []


def missing_file_problems(files: Iterable[tuple[str, Path]]) -> Iterator[str]:
    """files: (config key, path that must be a file, or a directory of data files)."""
    for key, path in files:
        if not is_given(path):
            yield f"{key}: {path} is missing"


def weights_problems(path: Path, hf: dict[str, Any]) -> Iterator[str]:
    """For a stage that starts from the weights and the tokenizer in the HF directory `path`."""
    if not hf:
        return  # said already
    if not holds_weights(path):
        yield f"model.path = {path}: holds neither *.safetensors nor a converted checkpoint"
    yield from tokenizer_problems(path, hf)


def holds_weights(path: Path) -> bool:
    """Whether the directory `path` holds weights (an HF model, or a converted checkpoint), or will."""
    there = any(path.glob("*.safetensors")) or (path / ".metadata").exists()
    return there or _promised_in(path / "model.safetensors") is not None


def tokenizer_problems(path: Path, hf: dict[str, Any]) -> Iterator[str]:
    """Whether the HF directory `path` holds a tokenizer whose ids the model of config.json `hf` has."""
    if _promised_in(path / "config.json") is not None:
        return  # it will be a model's directory, complete
    try:
        size = tokenizer_size(path)
    except ValueError as error:
        yield f"{path}/tokenizer.json: not JSON ({error})"
        return
    if size is None and _promised_in(path / "tokenizer.json") is not None:
        return
    if (problem := tokenizer_code_problem(path)) is not None:
        yield problem
    elif size is None and not (trusts_remote_code() and (path / "tokenizer_config.json").exists()):
        yield f"{path}: holds no tokenizer (tokenizer.json or tokenizer.model)"
    elif size is not None and size > hf.get("vocab_size", size):
        yield (
            f"{path}: the tokenizer has ids up to {size - 1}, config.json's vocab_size is {hf['vocab_size']}; "
            f"take the tokenizer that belongs to the model, or one with at most {hf['vocab_size']} tokens"
        )


def context_problems(hf: dict[str, Any], data: DataConfig, rollout: RolloutConfig) -> Iterator[str]:
    """Prompt and response must fit into the model's context."""
    context = context_length(hf) if hf else None
    longest = data.max_prompt_tokens + rollout.max_response_tokens + 1
    if context is not None and longest > context:
        yield (
            f"data.max_prompt_tokens = {data.max_prompt_tokens} and rollout.max_response_tokens = "
            f"{rollout.max_response_tokens} need a context of {longest}, the model's max_position_embeddings is "
            f"{context}; lower their sum to at most {context - 1}"
        )


def layout_problems(config: Stage, hf: dict[str, Any], world: int) -> Iterator[str]:
    """Why this stage cannot be laid out over so many processes, or its layers not built so."""
    yield from process_problems(config.parallel, world)
    yield from model_problems(config.parallel, hf)
    if config.parallel.mtp_standalone and not config.model.mtp_loss_coefficient:
        yield NOT_BUILT
    yield from fp8_problems(config.model, config.parallel, hf)
    yield from recompute_problems(config.model, hf)
    yield from offload_problems(config.model, hf)
    yield from dispatch_problems(config.model, config.parallel, hf)
    yield from exchange_problems(config.model, config.parallel, hf)
    if isinstance(config, TrainingStage):
        yield from overlap_problems(config.optimizer)
    tied, further = hf.get("tie_word_embeddings"), config.model.mtp_loss_coefficient
    if config.model.log_probs == "hidden" and (tied or further):
        yield "model.log_probs = hidden wants untied embeddings and no MTP loss; use logits"
    if (
        config.model.log_probs == "hidden"
        and config.model.dtype != "float32"
        and isinstance(config, TrainingStage)
        and not config.optimizer.grad_reduce_in_fp32
    ):
        yield (
            "model.log_probs = hidden adds its weight's gradient up in float32: set optimizer.grad_reduce_in_fp32=true, or "
            "model.log_probs=logits"
        )
