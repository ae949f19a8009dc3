"""Checks that need more than one key: the model's config.json, files, the number of processes. No heavy imports."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from r1mega.config.launched import launched_place
from r1mega.config.model_files import context_length, tokenizer_size
from r1mega.config.schema import DataConfig, RolloutConfig, Stage
from r1mega.errors import ConfigError


def validate(config: Stage, world_size: int | None = None) -> None:
    """Raises ConfigError listing everything that cannot work. world_size: None: what the launcher's environment says."""
    world = world_size if world_size is not None else launched_processes()
    hf, problems = _read_model(config)
    if hf is not None:
        problems += _layout_problems(config, hf, world)
    problems += config.problems(hf or {}, world)
    if problems:
        raise ConfigError("\n".join(problems))


_promise: ContextVar[Mapping[Path, Path | None]] = ContextVar("promise", default={})


@contextlib.contextmanager
def promised(directories: Mapping[Path, Path | None]) -> Iterator[None]:
    """In the block, what lies in these directories does not count as missing: an earlier stage will have made it.

    directories: each with the HF directory whose architecture its models will have, itself promised perhaps; None for
    what is no model.
    """
    token = _promise.set(directories)
    try:
        yield
    finally:
        _promise.reset(token)


def _promised_in(path: Path) -> Path | None:
    """The promised directory that `path` lies in, unless `path` is there already."""
    if path.exists():
        return None
    whole = Path(os.path.abspath(path))
    return next((d for d in _promise.get() if whole.is_relative_to(os.path.abspath(d))), None)


def is_given(path: Path) -> bool:
    """Whether there is such a file or directory, or will be."""
    return path.exists() or _promised_in(path) is not None


def launched_processes() -> int:
    """Processes of this job, by what torchrun, Slurm or MPI put into the environment; 1 without any."""
    place = launched_place()
    return place.size if place else 1


def _read_model(config: Stage) -> tuple[dict[str, Any] | None, list[str]]:
    """(config.json of the model, or None when it cannot be read; problems)."""
    directory = config.model.path
    while (promise := _promised_in(directory / "config.json")) is not None and (model := _promise.get()[promise]) is not None:
        directory = model
    path = directory / "config.json"
    try:
        return json.loads(path.read_text()), []
    except FileNotFoundError:
        hint = "; run the stage that makes it first" if config.model.path.name == "hf" else ""
        return None, [f"model.path = {config.model.path}: {path} is missing: not an HF model directory{hint}"]
    except ValueError as error:
        return None, [f"{path}: not JSON ({error})"]


def missing_file_problems(files: Iterable[tuple[str, Path]]) -> Iterator[str]:
    """files: (config key, path that must be a file)."""
    for key, path in files:
        if path.is_dir() or not is_given(path):
            yield f"{key}: {path} is missing"


def weights_problems(path: Path, hf: dict[str, Any]) -> Iterator[str]:
    """For a stage that starts from the weights and the tokenizer in the HF directory `path`."""
    if not hf:
        return  # said already
    if not holds_weights(path):
        yield f"model.path = {path}: holds no *.safetensors"
    yield from tokenizer_problems(path, hf)


def holds_weights(path: Path) -> bool:
    """Whether the HF directory `path` holds weights, or will."""
    return any(path.glob("*.safetensors")) or _promised_in(path / "config.json") is not None


def tokenizer_problems(path: Path, hf: dict[str, Any]) -> Iterator[str]:
    """Whether the HF directory `path` holds a tokenizer whose ids the model of config.json `hf` has."""
    if _promised_in(path / "config.json") is not None:
        return  # it will be a model's directory, complete
    try:
        size = tokenizer_size(path)
    except ValueError as error:
        yield f"{path}/tokenizer.json: not JSON ({error})"
        return
    if size is None:
        yield f"{path}: holds no tokenizer (tokenizer.json or tokenizer.model)"
    elif size > hf.get("vocab_size", size):
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


def _layout_problems(config: Stage, hf: dict[str, Any], world: int) -> Iterator[str]:
    p = config.parallel
    model_ranks, expert_ranks = p.tp * p.pp * p.cp, p.ep * p.etp * p.pp
    if world % model_ranks:
        yield f"parallel: {world} processes cannot be divided by tp * pp * cp = {model_ranks}"
    elif p.dp is not None and p.dp * model_ranks != world:
        yield f"parallel.dp = {p.dp} with tp * pp * cp = {model_ranks} wants {p.dp * model_ranks} processes, there are {world}"
    if world % expert_ranks:
        yield f"parallel: {world} processes cannot be divided by ep * etp * pp = {expert_ranks}"
    if config.model.log_probs == "hidden" and (p.tp > 1 or hf.get("tie_word_embeddings") or config.model.mtp_loss_coefficient):
        yield "model.log_probs = hidden wants parallel.tp=1, untied embeddings and no MTP loss; use logits"
    kind = config.stage
    if model_ranks > 1:
        yield f"parallel: stage {kind} does not run in this layout yet; set tp=1, pp=1 and cp=1 (dp, ep and rollout.tp may be more)"
    if hf.get("n_routed_experts") and p.tp > 1 and p.sp is False:
        yield "parallel.sp = false: a mixture of experts with parallel.tp > 1 needs sequence parallelism; leave sp out"
    if not hf.get("kv_lora_rank") and hf.get("num_key_value_heads", p.tp) % p.tp:
        yield f"parallel.tp = {p.tp} does not divide the model's num_key_value_heads = {hf['num_key_value_heads']}"
    experts = hf.get("n_routed_experts")
    divisions = [
        ("parallel.tp", p.tp, "num_attention_heads", hf.get("num_attention_heads")),
        ("parallel.tp", p.tp, "intermediate_size", hf.get("intermediate_size")),
        ("parallel.pp * vpp", p.pp * (p.vpp or 1), "num_hidden_layers", hf.get("num_hidden_layers")),
        ("parallel.ep", p.ep, "n_routed_experts", experts),
        ("parallel.etp", p.etp, "moe_intermediate_size", hf.get("moe_intermediate_size")),
    ]
    for key, size, name, value in divisions:
        if value is not None and value % size:
            smaller = max(d for d in range(1, size + 1) if value % d == 0)
            yield f"{key} = {size} does not divide the model's {name} = {value}; {smaller} would"
    if not experts and (p.ep > 1 or p.etp > 1):
        yield f"parallel.ep = {p.ep}, parallel.etp = {p.etp}: a model without experts wants 1 and 1"
    if p.vpp is not None and p.pp == 1:
        yield f"parallel.vpp = {p.vpp} wants parallel.pp > 1"
