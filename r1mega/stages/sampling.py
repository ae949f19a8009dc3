"""Sampling without a trainer: many responses a prompt, shared out over generators, in windows of prompts.

A sample's seed follows from the run's seed, its prompt's id and its number alone, so it does not matter which rank draws it,
in which batch, or in which of several starts. What is drawn is kept with its grade in RUN_DIR/raw/NAME (`rollout.store`); a
run that is started again, with however many ranks, draws what is missing.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from r1mega.data.tokenizer import Tokenizer
from r1mega.errors import ConfigError, DataError
from r1mega.platform.groups import GeneratorPlace, wait_for_all
from r1mega.rollout.draw import Draw, GradedSample, Key, Sample, draw_samples, grade_samples
from r1mega.rollout.engine import sample_seed
from r1mega.rollout.sampler import Scorer
from r1mega.rollout.store import SampleStore, prompt_digest
from r1mega.stages.runtime import Runtime
from r1mega.types import GenerationEngine, Prompt, RewardStatus, SamplingSettings

MAX_UNGRADED = 64
"""Responses whose grades may still be in the making when later ones come in; a kill loses these."""


@dataclass(frozen=True, slots=True)
class PosedPrompt:
    """A prompt as it is posed: its tokens end in `prefix`, the beginning of the response. source: the way of asking."""

    prompt: Prompt
    prefix: tuple[int, ...] = ()
    source: str = ""


class Sampling:
    """Draws `num_samples` responses to each prompt. All ranks call `run` together.

    scores_while_sampling: False for a scorer that needs the generator itself (a colocated judge): a window's samples are
    then scored, and stored, at its end. Samples whose grades failed in an earlier start are graded again, from their texts.
    """

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        posed: Sequence[PosedPrompt],
        num_samples: int,
        sampling: SamplingSettings,
        *,
        tp: int,
        window: int,
        scores_while_sampling: bool = True,
    ):
        self._runtime, self._name, self._posed, self._sampling = runtime, name, posed, sampling
        draws = [draw for p in posed for draw in sample_draws(p, runtime.config.seed, name, num_samples)]
        size = window * num_samples
        self._windows = [draws[first : first + size] for first in range(0, len(draws), size)]
        self._tp, self._max_ungraded = tp, MAX_UNGRADED if scores_while_sampling else sys.maxsize
        self._place = GeneratorPlace.of_this_rank(tp)
        self._scores = self._place.is_first or not scores_while_sampling  # the ranks of a generator ask it together
        self._store = sample_store(runtime.run_dir, name, posed, runtime.rank)
        self._done: dict[Key, GradedSample] = {}
        self._failed: dict[Key, Sample] = {}

    @property
    def num_windows(self) -> int:
        return len(self._windows)

    def begin(self) -> int:
        """Read what earlier starts drew; the number of samples that are not drawn yet. A collective call, before any is drawn.

        DataError when those starts had other prompts, or were of a version that kept samples in another form.
        """
        raw = self._store.directory.parent
        if any(raw.glob(f"{self._name}_*.jsonl")):
            raise DataError(
                f"{raw}: {self._name}_*.jsonl are samples of an earlier version, in a form that is no longer read; end the "
                "run with that version, use another run_dir, or remove them to draw anew"
            )
        digests = "".join(f"{p.prompt.id}\0{prompt_digest(p.prompt)}\0" for p in self._posed)
        try:
            settings = {"prompts": hashlib.sha256(digests.encode()).hexdigest()}
            self._store.check_settings(settings, write=self._runtime.is_main)
        except ConfigError as error:
            raise DataError(
                f"{self._store.directory}: its samples answer other prompts: data.prompts, the ways of asking or the "
                "tokenizer have changed; put them back, or use another run_dir"
            ) from error
        samples, grades = self._store.read()
        self._done = {key: GradedSample(samples[key], reward) for key, reward in grades.items()}
        self._failed = {key: sample for key, sample in samples.items() if key not in grades}
        self._runtime.barrier()  # all have read before the first one writes
        return sum(map(len, self._windows)) - len(samples)

    @property
    def num_failed(self) -> int:
        """Samples that an earlier start drew and could not grade."""
        return len(self._failed)

    def finished_windows(self) -> int:
        """Windows, from the first on, of which nothing is missing."""
        unfinished = (i for i, window in enumerate(self._windows) if any(draw.key not in self._done for draw in window))
        return next(unfinished, self.num_windows)

    def run(self, engine: GenerationEngine | None, tokenizer: Tokenizer, scorer: Scorer | None) -> bool:
        """Draw and grade what is missing; False when asked to stop before the end (what is drawn is kept). engine: None when
        all is drawn.
        """
        with self._store.opened():
            for window in range(self.finished_windows(), self.num_windows):
                if not self._run_window(window, engine, tokenizer, scorer):
                    return False
        self._runtime.barrier()
        return True

    def _run_window(
        self, window: int, engine: GenerationEngine | None, tokenizer: Tokenizer, scorer: Scorer | None
    ) -> bool:
        runtime = self._runtime
        draws = self._windows[window]
        share = [draws[i] for i in self._place.block(len(draws))]
        missing = [draw for draw in share if draw.key not in self._done and draw.key not in self._failed]
        drawn: list[GradedSample] = []
        runtime.timer.start_step()
        regraded = self._grade_again(share, tokenizer, scorer) if scorer is not None and self._scores else []
        with runtime.timer.phase("rollout"):
            for graded in () if engine is None else draw_samples(
                engine, tokenizer, scorer if self._scores else None, missing, self._sampling,
                should_stop=lambda: self._tp == 1 and runtime.signalled,  # ranks of one generator stop between windows
                max_ungraded=self._max_ungraded,
            ):  # fmt: skip
                if self._place.is_first:
                    self._store.write_sample(graded.sample, graded.reward)
                    drawn.append(graded)
        self._store.sync()
        wait_for_all("rollout", f"the samples of window {window + 1}")
        earlier = [self._done[draw.key] for draw in share if draw.key in self._done] if self._place.is_first else []
        metrics = _metrics([*earlier, *regraded, *drawn]) | runtime.timer.finish_step()
        tokens = sum(graded.sample.length for graded in drawn)
        metrics["tokens/rollout_per_second"] = tokens / max(metrics["time/rollout_seconds"], 1e-9)
        stopping = runtime.stop_requested()
        if not stopping and scorer is not None:  # the steps of a run are the windows of its scored samples
            runtime.write_metrics(window + 1, metrics)
        return not stopping

    def _grade_again(self, share: Sequence[Draw], tokenizer: Tokenizer, scorer: Scorer) -> list[GradedSample]:
        """This rank's samples of a window whose grades failed before, from their texts: the tokens are the tokenizer's, as they
        were not kept. When told to stop, those that are left keep their failed grades.
        """
        graded = []
        failed = [(draw.prompt, self._failed[draw.key]) for draw in share if draw.key in self._failed]
        for found in grade_samples(scorer, failed, tokenizer, self._max_ungraded):
            if self._place.is_first:
                if found.reward.status != RewardStatus.FAILED:
                    self._store.write_grade(found)
                graded.append(found)
            if self._tp == 1 and self._runtime.signalled:  # ranks of one generator stop between windows
                break
        return graded


def sample_draws(posed: PosedPrompt, run_seed: int, name: str, num_samples: int) -> list[Draw]:
    """All samples of a prompt. Their seeds follow from the run's seed, the name, the prompt's id and their numbers."""
    seed = random.Random(f"{run_seed}/{name}/{posed.prompt.id}").getrandbits(63)
    return [Draw(posed.prompt, index, sample_seed(seed, index), posed.prefix) for index in range(num_samples)]


def sample_store(run_dir: Path, name: str, posed: Sequence[PosedPrompt], rank: int) -> SampleStore:
    """Where the samples of this name are kept."""
    return SampleStore(run_dir / "raw" / name, rank, [p.prompt for p in posed])


def _metrics(samples: Sequence[GradedSample]) -> dict[str, float]:
    """Of a window's samples, over all ranks."""
    sums = torch.zeros(5, dtype=torch.float64)
    for graded in samples:
        sample, reward = graded.sample, graded.reward
        scored, accuracy = reward.status == RewardStatus.OK, reward.parts.get("accuracy", 0.0)
        sums += torch.tensor([1, sample.length, sample.truncated, scored, accuracy]).double()
    dist.all_reduce(sums)  # on a CPU tensor: the default group carries those on either platform
    count, tokens, truncated, scored, accuracy = sums.tolist()
    metrics = {
        "tokens/rollout": tokens,
        "response/length_mean": tokens / max(count, 1),
        "response/truncated_fraction": truncated / max(count, 1),
        "group/num_sampled": count,
    }
    if scored:
        metrics |= {"reward/accuracy": accuracy / scored, "reward/excluded_fraction": 1 - scored / count}
    return metrics
