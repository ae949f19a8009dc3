"""Sampling without a trainer: many responses a prompt, shared out over generators, and durable sample by sample.

A sample's seed follows from the run's seed, its prompt's id and its number alone, so it does not matter which rank draws it,
in which batch, or in which of several starts. What is drawn is appended to RUN_DIR/raw/<name>_rank.jsonl; a run that is
started again, with however many ranks, draws what is missing.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1mega.data.tokenizer import Tokenizer
from r1mega.errors import DataError
from r1mega.observe.files import JsonLinesWriter, read_json_lines, write_atomic
from r1mega.rollout.engine import GenerationEngine, sample_seed
from r1mega.rollout.sampler import Scorer, response_text
from r1mega.stages.runtime import Runtime
from r1mega.types import GenerationRequest, Prompt, Response, Reward, RewardStatus, SamplingSettings

FLUSH_RECORDS, FLUSH_SECONDS = 256, 1.0
"""Finished samples are written (and synced) at the latest when there are so many, or so long after the first."""
MAX_UNSCORED = 64
"""Responses whose scores may still be in the making when later ones come in."""
EVERYTHING = 2**62


@dataclass(frozen=True, slots=True)
class SampledText:
    """One response as it is stored. prompt: index into the prompts; text: with the prefix; tokens: the sampled ones."""

    prompt: int
    sample: int
    text: str
    tokens: int
    finish_reason: str
    status: str
    parts: dict[str, float]


class Sampling:
    """Draws `num_samples` responses to each prompt. All ranks call `run` together.

    prefixes: tokens at the end of each prompt that belong to its response (usually none). scores_while_sampling: False for
    a scorer that needs the generator itself (a colocated judge): a window's samples are then scored, and stored, at its end.
    """

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Sequence[int]],
        num_samples: int,
        sampling: SamplingSettings,
        *,
        tp: int,
        window: int,
        scores_while_sampling: bool = True,
    ):
        self._runtime, self._name, self._directory = runtime, name, runtime.run_dir / "raw"
        self._prompts, self._prefixes, self._num_samples, self._sampling = prompts, prefixes, num_samples, sampling
        self._window, self._tp = window, tp
        self._max_unscored = MAX_UNSCORED if scores_while_sampling else EVERYTHING
        self._replica, self._num_replicas = dist.get_rank() // tp, dist.get_world_size() // tp
        self._contributes = dist.get_rank() % tp == 0
        self._done: dict[tuple[int, int], SampledText] = {}
        self._pending: list[dict[str, Any]] = []
        self._oldest = 0.0

    @property
    def num_windows(self) -> int:
        return -(-len(self._prompts) // self._window)

    def begin(self) -> int:
        """Read what earlier starts drew; the number of samples that are missing. A collective call, before any is drawn.

        DataError when those starts had other prompts.
        """
        path, asked = self._directory / f"{self._name}.json", {"prompts": len(self._prompts), "sha256": self._digest()}
        if path.exists() and json.loads(path.read_text()) != asked:
            raise DataError(
                f"{self._directory}: its samples answer other prompts: data.prompts, the ways of asking or the tokenizer have "
                "changed; put them back, or use another run_dir"
            )
        self._done = {(s.prompt, s.sample): s for s in read_samples(self._directory, self._name)}
        self._runtime.barrier()  # all have read before the first one writes
        if self._runtime.is_main:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(asked) + "\n")
        return len(self._prompts) * self._num_samples - len(self._done)

    def _digest(self) -> str:
        """Of the prompts, in their order, as the model sees them."""
        digest = hashlib.sha256()
        for prompt, prefix in zip(self._prompts, self._prefixes, strict=True):
            digest.update(f"{prompt.id}\0{len(prompt.token_ids)}\0{len(prefix)}\0".encode())
            digest.update(array("q", prompt.token_ids).tobytes())
        return digest.hexdigest()

    def finished_windows(self) -> int:
        """Windows, from the first on, of which nothing is missing."""
        for window in range(self.num_windows):
            if any((p, s) not in self._done for p in self._window_prompts(window) for s in range(self._num_samples)):
                return window
        return self.num_windows

    def run(self, engine: GenerationEngine, tokenizer: Tokenizer, scorer: Scorer | None) -> bool:
        """Draw what is missing; False when asked to stop before the end (what is drawn is kept)."""
        runtime = self._runtime
        writer = None
        if self._contributes:
            self._directory.mkdir(parents=True, exist_ok=True)
            writer = JsonLinesWriter(self._directory / f"{self._name}_{runtime.rank:05d}.jsonl", EVERYTHING)
        try:
            for window in range(self.finished_windows(), self.num_windows):
                if not self._run_window(window, engine, tokenizer, scorer, writer):
                    return False
        finally:
            if writer is not None:
                self._flush(writer)
                writer.close()
        runtime.barrier()
        return True

    def _run_window(
        self, window: int, engine: GenerationEngine, tokenizer: Tokenizer, scorer: Scorer | None,
        writer: JsonLinesWriter | None,
    ) -> bool:  # fmt: skip
        runtime = self._runtime
        prompts = self._window_prompts(window)[self._replica :: self._num_replicas]
        mine = [(prompt, sample) for prompt in prompts for sample in range(self._num_samples)]
        todo = [key for key in mine if key not in self._done]
        runtime.timer.start_step()
        with runtime.timer.phase("rollout"):
            drawn = list(self._draw(todo, engine, tokenizer, scorer, writer, window))
        if writer is not None:
            self._flush(writer)
        earlier = [self._done[key] for key in mine if key in self._done] if self._contributes else []
        metrics = _metrics([*earlier, *drawn]) | runtime.timer.finish_step()
        metrics["tokens/rollout_per_second"] = sum(s.tokens for s in drawn) / max(metrics["time/rollout_seconds"], 1e-9)
        stopping = runtime.stop_requested()
        if not stopping and scorer is not None:  # the steps of a run are the windows of its scored samples
            runtime.write_metrics(window + 1, metrics)
        return not stopping

    def _window_prompts(self, window: int) -> range:
        return range(window * self._window, min((window + 1) * self._window, len(self._prompts)))

    def _draw(
        self, todo: Sequence[tuple[int, int]], engine: GenerationEngine, tokenizer: Tokenizer, scorer: Scorer | None,
        writer: JsonLinesWriter | None, window: int,
    ) -> Iterator[SampledText]:  # fmt: skip
        """Samples in the order in which they finish; ends early when this rank is asked to stop."""
        waiting: deque[tuple[int, int, Response, str, int | None]] = deque()
        for completion in engine.stream([self._request(p, s) for p, s in todo]) if todo else ():
            if not self._contributes:
                continue
            prompt, sample = todo[completion.request_index]
            response = completion.response
            text = response_text(tokenizer, response, self._prefixes[prompt])
            ticket = None if scorer is None else scorer.submit(self._prompts[prompt], response, text)
            waiting.append((prompt, sample, response, text, ticket))
            if len(waiting) > self._max_unscored:
                yield self._record(waiting.popleft(), scorer, writer, window)
            if self._tp == 1 and self._runtime.stop_received():  # the ranks of one generator stop together, between windows
                break
        while waiting:
            yield self._record(waiting.popleft(), scorer, writer, window)

    def _request(self, prompt: int, sample: int) -> GenerationRequest:
        seed = random.Random(f"{self._runtime.config.seed}/{self._name}/{self._prompts[prompt].id}").getrandbits(63)
        return GenerationRequest(self._prompts[prompt].token_ids, 1, sample_seed(seed, sample), self._sampling)

    def _record(self, item: tuple, scorer: Scorer | None, writer: JsonLinesWriter, window: int) -> SampledText:
        prompt, sample, response, text, ticket = item
        reward = Reward(None, {}, RewardStatus.UNJUDGED) if scorer is None else scorer.result(ticket)
        record = {
            "step": window + 1, "prompt": prompt, "sample": sample, "text": text, "tokens": len(response.token_ids),
            "finish_reason": response.finish_reason, "status": str(reward.status), "parts": dict(reward.parts),
        }  # fmt: skip
        if not self._pending:
            self._oldest = time.monotonic()
        self._pending.append(record)
        if len(self._pending) >= FLUSH_RECORDS or time.monotonic() - self._oldest > FLUSH_SECONDS:
            self._flush(writer)
        return _sampled(record)

    def _flush(self, writer: JsonLinesWriter) -> None:
        pending, self._pending = self._pending, []
        writer.write(*pending)


def _metrics(samples: Sequence[SampledText]) -> dict[str, float]:
    """Of a window's samples, over all ranks."""
    sums = torch.zeros(5, dtype=torch.float64)
    for sample in samples:
        accuracy = sample.parts.get("accuracy", 0.0)
        sums += torch.tensor([1, sample.tokens, sample.finish_reason == "length", sample.status == "ok", accuracy]).double()
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


def read_samples(directory: Path, name: str) -> list[SampledText]:
    """All stored samples of this name, in the order of prompts and samples, whichever ranks drew them."""
    found = {}
    for path in sorted(directory.glob(f"{name}_*.jsonl")):
        for record in read_json_lines(path):
            sample = _sampled(record)
            found.setdefault((sample.prompt, sample.sample), sample)
    return [found[key] for key in sorted(found)]


def _sampled(record: dict[str, Any]) -> SampledText:
    return SampledText(**{name: record[name] for name in SampledText.__slots__})
