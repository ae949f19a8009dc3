"""Evaluations by a generator: of prompts (in a training loop), and of a checkpoint on disk (from the command line)."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from r1mega.checkpoint.hf import read_config
from r1mega.config.rewards import RewardConfig
from r1mega.config.schema import DataConfig, EvaluateConfig
from r1mega.data.prompts import load_prompts
from r1mega.data.template import render
from r1mega.data.tokenizer import Tokenizer, load_tokenizer
from r1mega.errors import CheckpointError, ConfigError
from r1mega.evaluate.result import EvaluationResult, evaluation_row, write_result
from r1mega.observe.trace import PhaseTimer
from r1mega.reward.compose import RewardScorer
from r1mega.rollout.engine import EngineSettings, GenerationEngine
from r1mega.rollout.sampler import GroupSampler, Scorer, stop_settings
from r1mega.types import GenerationRequest, Prompt, SamplingSettings

DEFAULT_STOP = ("</answer>",)
DEFAULT_MAX_TOKENS = 32768  # paper
EngineName = Literal["vllm", "transformers"]


def evaluate_prompts(
    engine: GenerationEngine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    scorer: Scorer,
    sampling: SamplingSettings,
) -> EvaluationResult:
    """Sample config.num_samples responses a prompt and grade them.

    sampling: its stops and max_tokens; temperature and top-p are the config's. The seed of a prompt's samples is made
    of config.seed and the prompt's id, so it does not depend on the other prompts: ranks may divide the prompts
    (`prompts[rank::size]`) and join their results by `merge_results`.
    """
    begun = time.perf_counter()
    sampling = dataclasses.replace(sampling, temperature=config.temperature, top_p=config.top_p)
    sampler = GroupSampler(engine, tokenizer, scorer, sampling, config.num_samples, PhaseTimer())
    seeds = [random.Random(f"evaluate/{config.seed}/{prompt.id}").getrandbits(63) for prompt in prompts]
    groups = sampler.sample(prompts, seeds, policy_version=-1)
    settings = {**dataclasses.asdict(sampling), "seed": config.seed}
    rows = tuple(evaluation_row(group) for group in groups)
    return EvaluationResult(rows, config.num_samples, time.perf_counter() - begun, settings)


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """An HF directory, and how the run that wrote it (if any) posed its prompts and scored them."""

    path: Path
    template: str = "r1_zero"
    stop: tuple[str, ...] = DEFAULT_STOP
    max_tokens: int | None = None
    reward: RewardConfig = RewardConfig()


def find_checkpoint(checkpoint: Path) -> CheckpointSource:
    """Resolve an HF directory, a run directory (its export RUN_DIR/hf) or RUN_DIR/checkpoints/step_x (its hf/).

    Template, stops, response length and rewards come from the run's config.yaml where there is one. CheckpointError
    when there is no HF export.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such directory; give an HF directory or a run directory")
    path = checkpoint if (checkpoint / "config.json").exists() else checkpoint / "hf"
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{checkpoint}: neither an HF directory (config.json) nor one with an export (hf/config.json); a run "
            "writes its export when it finishes"
        )
    resolved = path.resolve()
    for parent in (resolved, *list(resolved.parents)[:3]):  # RUN/checkpoints/step_x/hf is the deepest
        if (parent / "config.yaml").is_file():
            return _with_run_config(path, parent / "config.yaml")
    return CheckpointSource(path)


def _with_run_config(path: Path, config_file: Path) -> CheckpointSource:
    try:
        run: Mapping[str, Any] = yaml.safe_load(config_file.read_text())
        rollout, data = run.get("rollout", {}), run.get("data", {})
        return CheckpointSource(
            path,
            template=data.get("template", "nano" if run.get("stage") == "base" else "r1_zero"),
            stop=tuple(rollout.get("stop", DEFAULT_STOP)),
            max_tokens=rollout.get("max_response_tokens"),
            reward=RewardConfig.model_validate(run.get("reward", {})),
        )
    except (yaml.YAMLError, AttributeError, TypeError, ValidationError) as error:
        raise ConfigError(f"{config_file}: not the config of a run ({error})") from error


def evaluate_checkpoint(
    checkpoint: Path,
    data: Path,
    *,
    num_samples: int = 1,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int | None = None,
    num_prompts: int | None = None,
    template: str | None = None,
    seed: int = 0,
    output: Path | None = None,
    engine: EngineName = "vllm",
) -> EvaluationResult:
    """Evaluate a checkpoint on a prompt file; with `output`, store the result there as JSON.

    max_tokens: of a response; None: the run's own, else what the model's context leaves (at most 32768). num_prompts:
    the first so many; None: all. Raises CheckpointError, DataError, ConfigError, GenerationError.
    """
    source = find_checkpoint(checkpoint)
    try:
        config = EvaluateConfig(
            data=data, num_prompts=num_prompts, num_samples=num_samples, temperature=temperature, top_p=top_p, seed=seed
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{problem['loc'][0]} = {problem['input']}: {problem['msg']}") from error
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"output {output}: its directory does not exist")  # found out before the work, not after
    tokenizer, context = load_tokenizer(source.path), context_length(source.path)
    prompt_config = DataConfig(prompts=(data,), template=template or source.template, max_prompt_tokens=context - 1)
    prompts = load_prompts(prompt_config, tokenizer)[:num_prompts]
    sampling = _sampling(source, tokenizer, context, [p.token_ids for p in prompts], max_tokens)
    with _open_engine(source.path, prompts, sampling, engine) as generator, contextlib.closing(
        RewardScorer(source.reward, max_response_tokens=sampling.max_tokens)
    ) as scorer:
        result = evaluate_prompts(generator, tokenizer, prompts, config, scorer, sampling)
    origin = {"checkpoint": str(source.path), "data": str(data), "template": prompt_config.template}
    result = dataclasses.replace(result, settings={**result.settings, **origin})
    if output is not None:
        write_result(result, output)
    return result


def generate_text(
    checkpoint: Path,
    prompt: str,
    *,
    num_samples: int = 1,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int | None = None,
    seed: int = 0,
    template: str | None = None,
    engine: EngineName = "vllm",
) -> list[str]:
    """Sample responses to one question, posed in the run's template (or `template`). Errors: as evaluate_checkpoint."""
    source = find_checkpoint(checkpoint)
    tokenizer, context = load_tokenizer(source.path), context_length(source.path)
    token_ids = tuple(tokenizer.encode_prompt(render(template or source.template, prompt)))
    sampling = _sampling(source, tokenizer, context, [token_ids], max_tokens)
    sampling = dataclasses.replace(sampling, temperature=temperature, top_p=top_p)
    posed = Prompt("prompt", prompt, (), "text", None, token_ids)
    with _open_engine(source.path, [posed], sampling, engine) as generator:
        (responses,) = generator.generate([GenerationRequest(token_ids, num_samples, seed, sampling)])
    return [tokenizer.decode(response.token_ids) for response in responses]


def context_length(path: Path) -> int:
    """Tokens that the model of an HF directory can attend to. CheckpointError when its config does not say."""
    context = read_config(path).get("max_position_embeddings")
    if not isinstance(context, int):
        raise CheckpointError(f"{path}/config.json: max_position_embeddings is missing: the context length is unknown")
    return context


def _sampling(
    source: CheckpointSource,
    tokenizer: Tokenizer,
    context: int,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
) -> SamplingSettings:
    """Stops and response length. ConfigError when the longest prompt and the response do not fit into the context."""
    room = context - max(map(len, prompts), default=0)
    chosen = max_tokens if max_tokens is not None else min(source.max_tokens or DEFAULT_MAX_TOKENS, room)
    if room < 1:
        raise ConfigError(
            f"the longest prompt fills the model's context of {context} tokens; shorten the prompts, or choose --template"
        )
    if not 1 <= chosen <= room:
        raise ConfigError(
            f"max_tokens = {chosen}: the longest prompt leaves {room} of the model's {context} tokens; "
            f"choose between 1 and {room}, or shorten the prompts"
        )
    stop_ids, stop_strings = stop_settings(source.stop, tokenizer)
    return SamplingSettings(max_tokens=chosen, stop_token_ids=stop_ids, stop_strings=stop_strings)


@contextlib.contextmanager
def _open_engine(
    path: Path, prompts: Sequence[Prompt], sampling: SamplingSettings, name: EngineName
) -> Iterator[GenerationEngine]:
    """A generator with the checkpoint's weights, just long enough for these prompts; closed at the end."""
    config = read_config(path)
    dtype = config.get("torch_dtype", config.get("dtype"))
    settings = EngineSettings(
        model_path=path,
        max_model_len=max((len(p.token_ids) for p in prompts), default=1) + sampling.max_tokens,
        dtype="float32" if dtype == "float32" else "bfloat16",
        weights="checkpoint",
        tokenizer_path=path,
    )
    if name == "transformers":
        from r1mega.rollout.transformers_engine import TransformersEngine as Engine
    else:
        from r1mega.rollout.vllm_engine import VllmEngine as Engine
    engine = Engine(settings)
    try:
        yield engine
    finally:
        engine.close()
