"""What the data-making stages (cold_start, rejection_sampling) share: prompts, an engine, scored samples, the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from r1mega.config.data_factory import DataFactoryStage
from r1mega.config.schema import ModelConfig, RolloutConfig
from r1mega.data.card import InputFile, build_card, describe_file, write_card
from r1mega.data.duplicates import signatures
from r1mega.data.filters import Candidate, FilterCount, apply_filters, build_filters, first_takers
from r1mega.data.prompts import load_prompts
from r1mega.data.record import UniqueIds
from r1mega.data.selection import contaminated, text_of, without_contamination, without_duplicates, write_data
from r1mega.data.tokenizer import Tokenizer, load_tokenizer
from r1mega.platform import groups
from r1mega.reward.compose import RewardScorer
from r1mega.rollout.build import engine_settings, open_engine
from r1mega.rollout.draw import GradedSample
from r1mega.rollout.sampler import sampling_settings
from r1mega.stages.runtime import Runtime
from r1mega.stages.sampling import PosedPrompt, Sampling, sample_store
from r1mega.types import Deal, GenerationEngine, Prompt, RewardStatus, SamplingSettings

T = TypeVar("T")
LAST_STEP = 2**62
"""Samples are scored as a run's last step would be: parts that count from a later step on do count."""


class DataFactory:
    """Samples prompts and turns the samples into candidates."""

    def __init__(self, config: DataFactoryStage, runtime: Runtime):
        self.config, self.runtime = config, runtime
        self.tokenizer: Tokenizer = load_tokenizer(config.model.path)
        self.licences: dict[str, str] = {}
        """By prompt id."""
        self.filters = build_filters(config.filters)
        duplicates = config.duplicates
        self._filter = functools.partial(first_takers, self.filters)
        self._sign = functools.partial(signatures, duplicates.ngram, duplicates.num_permutations)
        self._find_contaminated = functools.partial(contaminated, config.decontaminate)

    def load_prompts(self) -> list[Prompt]:
        """The prompts of all files (config.max_prompts of them: a seeded choice), in order, with unique ids."""
        config, prompts, unique, seen = self.config, [], UniqueIds(), set()
        for path in config.data.prompts:
            for prompt in load_prompts(config.data.model_copy(update={"prompts": (path,)}), self.tokenizer):
                identity = unique(f"{path}:{prompt.id}" if prompt.id in seen else prompt.id)
                prompt = dataclasses.replace(prompt, id=identity)
                seen.add(identity)
                self.licences[prompt.id] = str(
                    prompt.metadata.get("licence") or config.licences.get(str(path), "unknown")
                )
                prompts.append(prompt)
        if config.max_prompts is not None and config.max_prompts < len(prompts):
            chosen = random.Random(f"prompts/{config.seed}").sample(range(len(prompts)), config.max_prompts)
            prompts = [prompts[i] for i in sorted(chosen)]
        return prompts

    def sample(self, posed: Sequence[PosedPrompt]) -> bool:
        """Draw and score config.rollout.group_size responses to each; False when asked to stop before the end."""
        rollout = self.config.rollout
        settings = sampling_settings(rollout, self.tokenizer, trains=False)
        sampling = self._sampling("samples", posed, rollout.group_size, settings)
        missing, finished = sampling.begin(), sampling.finished_windows()
        self.runtime.begin(sampling.num_windows, finished or None)
        if not missing and not sampling.num_failed:
            return True
        with (
            self.scorer(generates=missing > 0) as (engine, scorer),
            self.runtime.progress(total=sampling.num_windows, done=finished),
        ):
            return sampling.run(engine, self.tokenizer, scorer)

    @contextlib.contextmanager
    def scorer(self, *, generates: bool) -> Iterator[tuple[GenerationEngine | None, RewardScorer]]:
        """The stage's rewards, and the generator: when it is wanted, or the judge is the policy itself. A collective call."""
        config = self.config
        with contextlib.ExitStack() as stack:
            engine = None
            if generates or self._judges_by_policy:
                engine = stack.enter_context(self.engine(config.model, config.data.max_prompt_tokens, config.rollout))
            scorer = stack.enter_context(
                RewardScorer(
                    config.reward, max_response_tokens=config.rollout.max_response_tokens, engine=engine,
                    tokenizer=self.tokenizer,
                )
            )  # fmt: skip
            scorer.step = LAST_STEP
            yield engine, scorer

    @property
    def _judges_by_policy(self) -> bool:
        judge = self.config.reward.judge
        return judge.weight > 0 and judge.engine == "policy"

    def _sampling(
        self, name: str, posed: Sequence[PosedPrompt], num_samples: int, settings: SamplingSettings
    ) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            self.runtime, name, posed, num_samples, settings, tp=rollout.tp, window=rollout.num_prompts,
            scores_while_sampling=self.config.reward.judge.engine != "policy",
        )  # fmt: skip

    def resample(self, name: str, posed: Sequence[PosedPrompt], model: ModelConfig, settings: SamplingSettings) -> bool:
        """Draw one unscored response to each from another model; False when asked to stop before the end."""
        sampling = self._sampling(name, posed, 1, settings)
        if not sampling.begin():
            return True
        longest = max(len(p.prompt.token_ids) for p in posed)
        rollout = self.config.rollout.model_copy(update={"max_response_tokens": settings.max_tokens})
        with self.engine(model, longest, rollout) as engine:
            return sampling.run(engine, load_tokenizer(model.path), None)

    @contextlib.contextmanager
    def engine(self, model: ModelConfig, max_prompt_tokens: int, rollout: RolloutConfig) -> Iterator[GenerationEngine]:
        """A generator with the weights of model.path, closed at the end."""
        longest = max_prompt_tokens + rollout.max_response_tokens + 1
        settings = engine_settings(
            model.path, model.dtype, longest, rollout, weights="checkpoint", kv_cache_dtype=rollout.kv_cache_dtype
        )
        with open_engine(settings, rollout.engine) as engine:
            yield engine

    def samples(
        self, name: str, posed: Sequence[PosedPrompt], num_samples: int
    ) -> list[tuple[PosedPrompt, GradedSample]]:
        """What `sample` ("samples") or `resample` drew, in the order of prompts and samples."""
        stored = sample_store(self.runtime.run_dir, name, posed, self.runtime.rank).read_graded()
        return [(p, stored[p.prompt.id, index]) for p in posed for index in range(num_samples)]

    def candidates(self, posed: Sequence[PosedPrompt]) -> list[Candidate]:
        """All samples of `sample`."""
        template = self.config.data.template
        return [
            Candidate(
                id=f"{p.prompt.id}/{s.index}", prompt_id=p.prompt.id, question=p.prompt.question, response=s.text,
                kind=p.prompt.kind, language=p.prompt.language, template=template, source=p.source,
                tokens=s.length + len(p.prefix), truncated=s.truncated, scored=graded.reward.status == RewardStatus.OK,
                parts=dict(graded.reward.parts), licence=self.licences[p.prompt.id],
            )
            for p, graded in self.samples("samples", posed, self.config.rollout.group_size)
            for s in (graded.sample,)
        ]  # fmt: skip

    # ------------------------------------------------------------------ from candidates to files

    def select(self, make: Callable[[Deal], T]) -> T:
        """What `make` returns on rank 0, on every rank; what it deals out (`passing`, `distinct`) all ranks work on."""
        return groups.lead(make, (self._filter, self._sign, self._find_contaminated))

    def passing(self, candidates: Sequence[Candidate], deal: Deal) -> tuple[list[Candidate], list[FilterCount]]:
        """What passes all filters, and their counts."""
        return apply_filters(candidates, self.filters, deal(self._filter, candidates))

    def distinct(self, kept: list[Candidate], funnel: list[FilterCount], deal: Deal) -> list[Candidate]:
        """Without near-duplicates and contamination; appends their counts."""
        self.runtime.note(f"{len(kept)} samples passed the filters; now those that are alike")
        signed = deal(self._sign, [text_of(c) for c in kept])
        kept, count = without_duplicates(kept, self.config.duplicates, signed)
        funnel.append(count)
        kept, count = without_contamination(kept, self.config.decontaminate, deal(self._find_contaminated, kept))
        funnel.append(count)
        return kept

    def write(
        self, kept: Sequence[Candidate], funnel: Sequence[FilterCount], made_by: dict[str, Any],
        further: Sequence[InputFile] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """RUN_DIR/data: the card first, so that an empty result can be understood."""
        config, directory = self.config, self.runtime.run_dir / "data"
        directory.mkdir(parents=True, exist_ok=True)
        inputs = [describe_file(path, "prompts", config.licences) for path in config.data.prompts]
        inputs += [
            *further,
            *(describe_file(path, "evaluation", config.licences) for path in config.decontaminate.files),
        ]
        rollout = config.rollout
        made_by = {
            "stage": config.stage, "checkpoint": str(config.model.path), "samples a prompt": rollout.group_size,
            "temperature": rollout.temperature, "top_p": rollout.top_p, "max_response_tokens": rollout.max_response_tokens,
            "seed": config.seed, **made_by,
        }  # fmt: skip
        made_by |= {key: value for key in ("top_k", "min_p") if (value := getattr(rollout, key))}
        card = build_card(title=f"Data of {config.stage}", made_by=made_by, inputs=inputs, funnel=funnel, kept=kept)
        write_card(card, directory)
        write_data(kept, directory)
        return card

    def finish(self, card: dict[str, Any]) -> int:
        """The exit code of a finished stage."""
        data: Path = self.runtime.run_dir / "data"
        summary = {"samples": card["samples"], "data": str(data / "train.jsonl"), "card": str(data / "card.md")}
        return self.runtime.finished(summary)
