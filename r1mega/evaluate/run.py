"""Evaluations by a generator: of prompts (in a training loop), and of a checkpoint on disk (from the command line)."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from r1mega.config.rewards import RewardConfig
from r1mega.config.schema import DataConfig, EvaluateConfig
from r1mega.config.stages.evaluate import LONGEST_ANSWER
from r1mega.data.prompts import load_prompts, scan_prompts
from r1mega.data.template import render
from r1mega.data.tokenizer import Tokenizer, load_tokenizer, response_text
from r1mega.errors import ConfigError
from r1mega.evaluate.result import EvaluationResult, evaluation_rows, write_result
from r1mega.evaluate.source import CheckpointSource, checkpoint_dtype, context_length, find_checkpoint
from r1mega.files import check_writable
from r1mega.reward.compose import VERIFIED, RewardScorer
from r1mega.rollout.build import EngineName, open_engine
from r1mega.rollout.draw import Draw, draw_samples
from r1mega.rollout.engine import EngineSettings
from r1mega.rollout.sampler import Scorer, stop_settings
from r1mega.types import GenerationEngine, GenerationRequest, Prompt, SamplingSettings


def evaluate_prompts(
    engine: GenerationEngine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    scorer: Scorer,
    sampling: SamplingSettings,
) -> EvaluationResult:
    """Sample config.num_samples responses a prompt and grade them.

    sampling: its stops and max_tokens; temperature and top-p are the config's, which cuts nothing else. A prompt's samples do not depend on the
    other prompts (`evaluation_draw`): ranks may divide the prompts (`prompts[rank::size]`) and join their
    results by `merge_results`.
    """
    begun = time.perf_counter()
    sampling = dataclasses.replace(
        sampling, temperature=config.temperature, top_p=config.top_p, top_k=None, min_p=None, max_kept=None
    )
    draws = [evaluation_draw(prompt, index, config.seed) for prompt in prompts for index in range(config.num_samples)]
    graded = draw_samples(engine, tokenizer, scorer, draws, sampling)
    rows = evaluation_rows(prompts, graded, config.num_samples)
    settings = {**dataclasses.asdict(sampling), "seed": config.seed}
    return EvaluationResult(rows, config.num_samples, time.perf_counter() - begun, settings)


def evaluation_draw(prompt: Prompt, index: int, seed: int) -> Draw:
    """Sample number `index` of a prompt, by the evaluation's seed, the prompt's id and the index alone."""
    name = f"evaluate/{seed}/{prompt.id}" + (f"/{index}" if index else "")
    return Draw(prompt, index, random.Random(name).getrandbits(63))


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
    config = _checked(
        data=data, num_prompts=num_prompts, num_samples=num_samples, temperature=temperature, top_p=top_p, seed=seed
    )
    if output is not None:
        try:
            check_writable(output)
        except OSError as error:
            reason = error.strerror if output.absolute().parent.is_dir() else "its directory does not exist"
            raise ConfigError(f"output {output}: cannot be written ({reason})") from error
    tokenizer, context = load_tokenizer(source.path), context_length(source.path)
    prompt_config = DataConfig(prompts=(data,), template=template or source.template, max_prompt_tokens=context - 1)
    scan_prompts(
        prompt_config, source.path, has_keys=False
    )  # a kind that nothing judges is told before a generator starts
    prompts = load_prompts(prompt_config, tokenizer, has_keys=False)[:num_prompts]
    sampling = response_limits(source, tokenizer, context, [p.token_ids for p in prompts], max_tokens)
    settings = checkpoint_settings(source.path, [p.token_ids for p in prompts], sampling)
    with open_engine(settings, engine) as generator, open_scorer(source.reward) as scorer:
        result = evaluate_prompts(generator, tokenizer, prompts, config, scorer, sampling)
    origin = {"checkpoint": str(source.path), "data": str(data), "template": prompt_config.template}
    result = dataclasses.replace(result, settings={**result.settings, **origin})
    if output is not None:
        write_result(result, output)
    return result


def _checked(**values: object) -> EvaluateConfig:
    """The settings of an evaluation, from the command line. ConfigError for one that is out of its range."""
    try:
        return EvaluateConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{problem['loc'][0]} = {problem['input']}: {problem['msg']}") from error


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
    _checked(num_samples=num_samples, temperature=temperature, top_p=top_p, seed=seed)
    tokenizer, context = load_tokenizer(source.path), context_length(source.path)
    token_ids = tuple(tokenizer.encode_prompt(render(template or source.template, prompt)))
    sampling = response_limits(source, tokenizer, context, [token_ids], max_tokens)
    sampling = dataclasses.replace(sampling, temperature=temperature, top_p=top_p)
    with open_engine(checkpoint_settings(source.path, [token_ids], sampling), engine) as generator:
        (responses,) = generator.generate([GenerationRequest(token_ids, num_samples, seed, sampling)])
    return [response_text(tokenizer, response) for response in responses]


def response_limits(
    source: CheckpointSource,
    tokenizer: Tokenizer,
    context: int,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    default: int = LONGEST_ANSWER,
) -> SamplingSettings:
    """Stops and response length: max_tokens, else the run's own, else `default` as far as the context has room.

    ConfigError when the longest prompt and the response do not fit into the context.
    """
    room = context - max(map(len, prompts), default=0)
    chosen = max_tokens if max_tokens is not None else min(source.max_tokens or default, room)
    if room < 1:
        raise ConfigError(
            f"the longest prompt fills the model's context of {context} tokens; shorten the prompts, or choose "
            "another template"
        )
    if not 1 <= chosen <= room:
        raise ConfigError(
            f"max_tokens = {chosen}: the longest prompt leaves {room} of the model's {context} tokens; "
            f"choose between 1 and {room}, or shorten the prompts"
        )
    stop_ids, stop_strings = stop_settings(source.stop, tokenizer)
    return SamplingSettings(max_tokens=chosen, stop_token_ids=stop_ids, stop_strings=stop_strings)


def checkpoint_settings(path: Path, prompts: Sequence[Sequence[int]], sampling: SamplingSettings) -> EngineSettings:
    """A generator with the checkpoint's weights, just long enough for these prompts."""
    longest = max(map(len, prompts), default=1) + sampling.max_tokens
    return EngineSettings(path, longest, dtype=checkpoint_dtype(path), weights="checkpoint", tokenizer_path=path)


def open_scorer(reward: RewardConfig) -> RewardScorer:
    """Accuracy and format alone, as the run's config has them: what an evaluation reads, and a text suffices for it."""
    judged = RewardConfig(**{name: getattr(reward, name) for name in (*VERIFIED, "pool", "sandbox")})
    return RewardScorer(judged, max_response_tokens=1)  # a length that no judged part looks at
