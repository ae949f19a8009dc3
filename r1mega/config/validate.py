"""Checks that need more than one key: the model's config.json, files, the number of processes. No heavy imports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from r1mega.config.model_files import context_length, tokenizer_size
from r1mega.config.schema import BaseStage, RLStage
from r1mega.errors import ConfigError


def validate(config: BaseStage | RLStage, world_size: int | None = None) -> None:
    """Raises ConfigError listing everything that cannot work. world_size: None: what the launcher's environment says."""
    world = world_size if world_size is not None else launched_processes()
    problems = list(_model_problems(config, world))
    if isinstance(config, RLStage):
        problems += _rl_problems(config, world)
    elif config.microbatch_tokens < 96:
        problems.append(f"microbatch_tokens = {config.microbatch_tokens}: a sample of the nano corpus has up to 96 tokens")
    if problems:
        raise ConfigError("\n".join(problems))


def launched_processes() -> int:
    """Processes of this job, by what torchrun, Slurm or MPI put into the environment; 1 without any."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def _model_problems(config: BaseStage | RLStage, world: int) -> Iterator[str]:
    path = config.model.path / "config.json"
    try:
        hf: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        hint = "; run the base stage first" if isinstance(config, RLStage) and config.model.path.name == "hf" else ""
        yield f"model.path = {config.model.path}: {path} is missing: not an HF model directory{hint}"
        return
    except ValueError as error:
        yield f"{path}: not JSON ({error})"
        return
    yield from _layout_problems(config, hf, world)
    if not isinstance(config, RLStage):
        return
    if not any(config.model.path.glob("*.safetensors")):
        yield f"model.path = {config.model.path}: holds no *.safetensors"
    yield from _tokenizer_problems(config, hf)
    context = context_length(hf)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens + 1
    if context is not None and longest > context:
        yield (
            f"data.max_prompt_tokens = {config.data.max_prompt_tokens} and rollout.max_response_tokens = "
            f"{config.rollout.max_response_tokens} need a context of {longest}, the model's max_position_embeddings is "
            f"{context}; lower their sum to at most {context - 1}"
        )


def _tokenizer_problems(config: RLStage, hf: dict[str, Any]) -> Iterator[str]:
    try:
        size = tokenizer_size(config.model.path)
    except ValueError as error:
        yield f"{config.model.path}/tokenizer.json: not JSON ({error})"
        return
    if size is None:
        yield f"model.path = {config.model.path}: holds no tokenizer (tokenizer.json or tokenizer.model)"
    elif size > hf.get("vocab_size", size):
        yield (
            f"{config.model.path}: the tokenizer has ids up to {size - 1}, config.json's vocab_size is {hf['vocab_size']}; "
            f"take the tokenizer that belongs to the model, or one with at most {hf['vocab_size']} tokens"
        )


def _layout_problems(config: BaseStage | RLStage, hf: dict[str, Any], world: int) -> Iterator[str]:
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


def _rl_problems(config: RLStage, world: int) -> Iterator[str]:
    for key, path in (("data.prompts", p) for p in config.data.prompts):
        if not path.is_file():
            yield f"{key}: {path} is missing"
    if config.evaluate.data is not None and not config.evaluate.data.is_file():
        yield f"evaluate.data: {config.evaluate.data} is missing"
    rollout, update, algorithm = config.rollout, config.update, config.algorithm
    if world % rollout.tp:
        yield f"rollout.tp = {rollout.tp} does not divide the {world} processes"
    elif rollout.num_prompts < world // rollout.tp:
        yield (
            f"rollout.num_prompts = {rollout.num_prompts} gives some of the {world // rollout.tp} generators no prompt; "
            f"raise it to at least {world // rollout.tp}"
        )
    samples = rollout.num_prompts * rollout.group_size
    if samples % update.num_minibatches:
        yield (
            f"rollout.num_prompts * rollout.group_size = {samples} responses cannot be divided into "
            f"update.num_minibatches = {update.num_minibatches}"
        )
    if rollout.group_size < 2:
        yield "rollout.group_size = 1: an advantage relative to the group needs at least 2 responses a prompt"
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    if update.microbatch_tokens < longest:
        yield (
            f"update.microbatch_tokens = {update.microbatch_tokens} does not hold the longest sample, "
            f"max_prompt_tokens + max_response_tokens = {longest}; raise it to at least that"
        )
    if algorithm.importance_cap is not None and algorithm.old_log_probs != "recompute":
        yield "algorithm.importance_cap corrects recomputed log-probs: it wants algorithm.old_log_probs=recompute"
    if rollout.top_p < 1 and algorithm.old_log_probs == "rollout":
        yield (
            f"rollout.top_p = {rollout.top_p}: the generator's log-probs are of the truncated distribution, the trainer's "
            "are not; set rollout.top_p=1 or algorithm.old_log_probs=recompute"
        )
    if config.reward.overlong.weight > 0 and config.reward.overlong.buffer_tokens >= rollout.max_response_tokens:
        yield (
            f"reward.overlong.buffer_tokens = {config.reward.overlong.buffer_tokens} must be below "
            f"rollout.max_response_tokens = {rollout.max_response_tokens}"
        )
