"""Stage `cold_start`: R1-Zero asked in several ways; what is right is made readable, verified again, and kept."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1mega.checkpoint.hf import read_config
from r1mega.config.model_files import context_length
from r1mega.config.stages.cold_start import ColdStartStage, Prompting
from r1mega.data.filters import Candidate, FilterCount, apply_filters
from r1mega.data.rewrite import rewrite
from r1mega.data.selection import at_most_per_prompt
from r1mega.data.sft import read_lines
from r1mega.data.template import render, render_text
from r1mega.data.tokenizer import load_tokenizer
from r1mega.errors import DataError
from r1mega.platform.groups import share_out
from r1mega.rollout.sampler import stop_settings
from r1mega.stages.data_factory import DataFactory
from r1mega.stages.runtime import Runtime
from r1mega.stages.sampling import PosedPrompt
from r1mega.types import Deal, Prompt, Response, Reward, RewardStatus, SamplingSettings

logger = logging.getLogger(__name__)

BEFORE_REWRITING = ("unscored", "truncated", "low accuracy")
"""Filters that rewriting could not help with; the others wait for its result."""


def run(config: ColdStartStage, runtime: Runtime) -> int:
    """Write RUN_DIR/data. Returns the exit code (85: what was drawn is kept, start again for the rest)."""
    factory = DataFactory(config, runtime)
    posed = pose(config, factory, factory.load_prompts())
    if not factory.sample(posed):
        return runtime.stopped()
    first = [(name, takes) for name, takes in factory.filters if name in BEFORE_REWRITING]
    correct, funnel = apply_filters(factory.candidates(posed), first)  # on every rank alike
    rewritten = [(c, rewrite(c.response, config.rewrite, c.language)) for c in correct]
    candidates = [dataclasses.replace(c, response=text) for c, text in rewritten if text is not None]
    funnel.append(FilterCount("no reasoning and summary", len(correct), len(correct) - len(candidates)))
    if (path := config.rewrite.model.path) is not None:
        result = _rewrite_by_model(config, path, factory, candidates)
        if result is None:
            return runtime.stopped()
        funnel.append(FilterCount("not rewritten by the model", len(candidates), len(candidates) - len(result)))
        candidates = result

    verified = _verified(config, factory, {p.prompt.id: p.prompt for p in posed}, candidates)

    def select(deal: Deal) -> dict[str, Any]:
        kept, counts = factory.passing(verified, deal)
        funnel.extend(FilterCount(f"rewritten: {c.name}", c.seen, c.taken) for c in counts)
        kept = factory.distinct(kept, funnel, deal)
        kept, count = at_most_per_prompt(kept, config.max_per_prompt)
        funnel.append(count)
        if config.max_samples is not None:
            funnel.append(FilterCount("beyond max_samples", len(kept), max(0, len(kept) - config.max_samples)))
            kept = kept[: config.max_samples]
        return factory.write(kept, funnel, {"prompts": len(posed), "sampled": funnel[0].seen})

    return factory.finish(factory.select(select))


def pose(config: ColdStartStage, factory: DataFactory, prompts: Sequence[Prompt]) -> list[PosedPrompt]:
    """Each prompt in one of the ways of asking: a seeded draw by their shares. What is too long with its examples is an error,
    or left out with a warning, by data.on_long_prompt.
    """
    rng = random.Random(f"prompting/{config.seed}")
    ways = rng.choices(range(len(config.prompting)), [way.share for way in config.prompting], k=len(prompts))
    shots = [_shots(config, way) for way in config.prompting]
    posed = [
        _posed(config, factory, prompt, config.prompting[way], shots[way], f"prompting {way + 1}")
        for prompt, way in zip(prompts, ways, strict=True)
    ]
    kept = [p for p in posed if p is not None]
    if len(kept) < len(posed):
        logger.warning(
            "%d prompts longer than data.max_prompt_tokens with their examples were skipped", len(posed) - len(kept)
        )
    if not kept:
        raise DataError(f"no prompt is left within data.max_prompt_tokens = {config.data.max_prompt_tokens}")
    return kept


def _shots(config: ColdStartStage, way: Prompting) -> str:
    """The examples of a few-shot file, each as a question in the template and its response."""
    template = way.template or config.data.template
    text = ""
    for where, item in read_lines(way.few_shot) if way.few_shot else ():
        if not isinstance(item.get("question"), str) or not isinstance(item.get("response"), str):
            raise DataError(f"{where}: an example needs 'question' and 'response'")
        text += render(template, item["question"]) + _spaced(item["response"]) + way.separator
    return text


def _spaced(response: str) -> str:
    return response if response[:1].isspace() else f" {response}"


def _posed(
    config: ColdStartStage, factory: DataFactory, prompt: Prompt, way: Prompting, shots: str, name: str
) -> PosedPrompt | None:
    """None: too long with its examples, and data.on_long_prompt says to skip."""
    text = shots + render(way.template or config.data.template, prompt.question)
    prefix = tuple(factory.tokenizer.encode(way.response_prefix)) if way.response_prefix else ()
    token_ids = (*factory.tokenizer.encode_prompt(text), *prefix)
    if len(token_ids) > config.data.max_prompt_tokens:
        if config.data.on_long_prompt == "skip":
            return None
        raise DataError(
            f"{name}: prompt {prompt.id} has {len(token_ids)} tokens with its examples, data.max_prompt_tokens is "
            f"{config.data.max_prompt_tokens}; raise it, give fewer examples, or set data.on_long_prompt=skip"
        )
    return PosedPrompt(dataclasses.replace(prompt, token_ids=token_ids), prefix, name)


def _rewrite_by_model(
    config: ColdStartStage, path: Path, factory: DataFactory, candidates: Sequence[Candidate]
) -> list[Candidate] | None:
    """What the model in `path` made of each, in the form again; those that its context has no room for, that it cut or left
    without form are gone. None: stopped.
    """
    model = config.rewrite.model
    tokenizer, context = load_tokenizer(path), context_length(read_config(path))
    longest = math.inf if context is None else context - model.max_tokens - 1
    texts = [
        render_text(model.prompt, {"question": c.question, "response": c.response}, key="rewrite.model.prompt")
        for c in candidates
    ]
    asked = [
        (c, Prompt(c.id, c.question, (), c.kind, c.language, token_ids))
        for c, text in zip(candidates, texts, strict=True)
        if len(token_ids := tuple(tokenizer.encode_prompt(text))) <= longest
    ]
    stop_ids, stop_strings = stop_settings(config.rollout.stop, tokenizer)
    settings = SamplingSettings(model.temperature, 1.0, model.max_tokens, stop_ids, stop_strings)
    posed = [PosedPrompt(prompt) for _, prompt in asked]
    if not factory.resample("rewritten", posed, config.model.model_copy(update={"path": path}), settings):
        return None
    result = []
    for (candidate, _), (_, graded) in zip(asked, factory.samples("rewritten", posed, 1), strict=True):
        sample = graded.sample
        text = None if sample.truncated else rewrite(sample.text, config.rewrite, candidate.language)
        if text is not None:
            result.append(dataclasses.replace(candidate, response=text))
    return result


def _verified(
    config: ColdStartStage, factory: DataFactory, prompts: dict[str, Prompt], candidates: Sequence[Candidate]
) -> list[Candidate]:
    """The candidates with the rewards and lengths of their rewritten responses, shared out over the generators' ranks."""

    def score(share: Sequence[Candidate]) -> list[tuple[int, Reward]]:
        lengths, tickets = [], []
        for candidate in share:
            token_ids = tuple(factory.tokenizer.encode(candidate.response))
            response = Response(token_ids, (0.0,) * len(token_ids), "stop")
            lengths.append(len(token_ids))
            tickets.append(scorer.submit(prompts[candidate.prompt_id], response, candidate.response))
        return [(length, scorer.result(ticket)) for length, ticket in zip(lengths, tickets, strict=True)]

    with factory.scorer(generates=False) as (engine, scorer):
        together = 1 if engine is None else config.rollout.tp  # the ranks of a generator ask it together
        found = share_out(candidates, score, "the verification of what was rewritten", tp=together)
    return [
        dataclasses.replace(c, tokens=length, scored=reward.status == RewardStatus.OK, parts=dict(reward.parts))
        for c, (length, reward) in zip(candidates, found, strict=True)
    ]
