"""Samples and grades of one checkpoint on one task, on disk the moment they are there.

    DIR/settings.json              what the samples depend on
    DIR/samples-RANK.jsonl         a line a response          DIR/grades-RANK.jsonl      a line a graded response
    DIR/result.json                written at the end

Each rank appends to its own files and reads those of all, so a later start may have another number of ranks. Without
its grades files a directory is graded anew, from the texts, without generating anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega.errors import ConfigError, DataError
from r1mega.evaluate.sampling import GradedSample, Sample
from r1mega.observe.files import JsonLinesWriter, read_json_lines, write_atomic
from r1mega.types import Prompt, Reward, RewardStatus

Key = tuple[str, int]
"""(prompt id, sample index)."""

SETTINGS_FILE = "settings.json"


class SampleStore:
    """The files of one directory. Once every rank has left `opened`, any may read what all have written."""

    def __init__(self, directory: Path, rank: int):
        self.directory = Path(directory)
        self._rank = rank
        self._samples: JsonLinesWriter | None = None
        self._grades: JsonLinesWriter | None = None

    def check_settings(self, settings: Mapping[str, Any], *, write: bool) -> None:
        """ConfigError when the directory's samples were drawn by other settings; otherwise note them (if `write`)."""
        path = self.directory / SETTINGS_FILE
        if path.exists():
            stored = json.loads(path.read_text())
            changed = [f"{k}: {stored.get(k)} -> {v}" for k, v in settings.items() if stored.get(k) != v]
            if changed:
                raise ConfigError(
                    f"{self.directory} holds samples of other settings:\n  " + "\n  ".join(changed) + "\n"
                    "choose another run_dir, or remove this directory to draw them anew"
                )
        elif write:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(dict(settings), ensure_ascii=False, indent=1) + "\n")

    def read(self, prompts: Sequence[Prompt], *, failed: bool = False) -> tuple[dict[Key, Sample], dict[Key, Reward]]:
        """All ranks' samples and grades of these prompts; rewards that failed only if asked for (the next start tries
        them again). DataError when a prompt is not the one that was sampled.
        """
        digests = {prompt.id: prompt_digest(prompt) for prompt in prompts}
        samples: dict[Key, Sample] = {}
        for path in sorted(self.directory.glob("samples-*.jsonl")):
            for line in read_json_lines(path):
                if line["prompt_id"] not in digests:
                    continue  # asked for by an earlier start
                if line["prompt"] != digests[line["prompt_id"]]:
                    raise DataError(
                        f"{path}: prompt {line['prompt_id']} was another one when it was sampled (the data file or the "
                        f"tokenizer has changed); remove {self.directory} to draw anew"
                    )
                key = (line["prompt_id"], line["index"])
                samples[key] = Sample(*key, line["text"], line["length"], line["truncated"])
        grades: dict[Key, Reward] = {}
        for path in sorted(self.directory.glob("grades-*.jsonl")):
            for line in read_json_lines(path):
                key = (line["prompt_id"], line["index"])
                reward = Reward(line["value"], line["parts"], RewardStatus(line["status"]), line["reason"])
                if key not in samples or (reward.status == RewardStatus.FAILED and (not failed or key in grades)):
                    continue
                grades[key] = reward
        return samples, grades

    @contextlib.contextmanager
    def opened(self, writes: bool = True) -> Iterator[None]:
        """This rank's files open to append to them (if it writes); a line that a kill cut short goes."""
        if not writes:
            yield
            return
        self._samples = JsonLinesWriter(self.directory / f"samples-{self._rank:05d}.jsonl", sys.maxsize)
        self._grades = JsonLinesWriter(self.directory / f"grades-{self._rank:05d}.jsonl", sys.maxsize)
        try:
            yield
        finally:
            self._samples.close()
            self._grades.close()
            self._samples = self._grades = None

    def write_sample(self, prompt: Prompt, sample: Sample) -> None:
        """Durable when this returns."""
        step = (self._samples.last_step or 0) + 1
        self._samples.write(
            {
                "step": step, "prompt_id": sample.prompt_id, "index": sample.index, "prompt": prompt_digest(prompt),
                "length": sample.length, "truncated": sample.truncated, "text": sample.text,
            }
        )  # fmt: skip

    def write_grade(self, graded: GradedSample) -> None:
        """Durable when this returns."""
        sample, reward = graded.sample, graded.reward
        step = (self._grades.last_step or 0) + 1
        self._grades.write(
            {
                "step": step, "prompt_id": sample.prompt_id, "index": sample.index, "value": reward.value,
                "parts": dict(reward.parts), "status": str(reward.status), "reason": reward.reason,
            }
        )  # fmt: skip


def prompt_digest(prompt: Prompt) -> str:
    """Of a prompt's tokens: what its samples continue."""
    return hashlib.sha256(json.dumps(list(prompt.token_ids)).encode()).hexdigest()[:16]
