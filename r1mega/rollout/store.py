"""Samples and grades on disk, by prompt and number, from the moment they are there.

    DIR/settings.json              what the samples depend on
    DIR/samples-RANK.jsonl         a line a response (with its grade, if it was kept with it)
    DIR/grades-RANK.jsonl          a line a response that was graded later

Each rank appends to its own files and reads those of all, so a later start may have another number of ranks. Without
its grades files a directory is graded anew, from the texts, without generating anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega.errors import ConfigError, DataError
from r1mega.files import JsonLinesWriter, read_json_lines, write_atomic
from r1mega.rollout.draw import GradedSample, Key, Sample
from r1mega.rollout.journal import SYNC_SECONDS, read_reward, reward_line
from r1mega.types import Prompt, Reward, RewardStatus

SETTINGS_FILE = "settings.json"


class SampleStore:
    """The samples of some prompts in one directory. Once every rank has left `opened`, any may read what all wrote."""

    def __init__(self, directory: Path, rank: int, prompts: Sequence[Prompt]):
        self.directory = Path(directory)
        self._rank = rank
        self._digests = {prompt.id: prompt_digest(prompt) for prompt in prompts}
        self._writers: dict[str, JsonLinesWriter] = {}
        self._synced = 0.0

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

    def read(self, *, failed: bool = False) -> tuple[dict[Key, Sample], dict[Key, Reward]]:
        """All ranks' samples and grades of the prompts; rewards that failed only if asked for (the next start tries
        them again). DataError when a prompt is not the one that was sampled.
        """
        samples: dict[Key, Sample] = {}
        grades: dict[Key, Reward] = {}

        def note_grade(line: dict[str, Any]) -> None:
            reward = read_reward(line)
            key = (line["prompt_id"], line["index"])
            if key in samples and (reward.status != RewardStatus.FAILED or (failed and key not in grades)):
                grades[key] = reward

        for path in sorted(self.directory.glob("samples-*.jsonl")):
            for line in read_json_lines(path):
                key = (line["prompt_id"], line["index"])
                if key[0] not in self._digests:
                    continue  # asked for by an earlier start
                if line["prompt"] != self._digests[key[0]]:
                    raise DataError(
                        f"{path}: prompt {key[0]} was another one when it was sampled (the data file or the "
                        f"tokenizer has changed); remove {self.directory} to draw anew"
                    )
                samples[key] = Sample(*key, line["text"], line["length"], line["truncated"])
                if "status" in line:
                    note_grade(line)
        for path in sorted(self.directory.glob("grades-*.jsonl")):
            for line in read_json_lines(path):
                note_grade(line)
        return samples, grades

    def read_graded(self) -> dict[Key, GradedSample]:
        """All ranks' samples that have a grade, a failed one included."""
        samples, grades = self.read(failed=True)
        return {key: GradedSample(samples[key], reward) for key, reward in grades.items()}

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Where to write. All lines are on disk at its end; a line that a kill cut short goes from a file written to."""
        try:
            yield
        finally:
            self.sync()
            for writer in self._writers.values():
                writer.close()
            self._writers.clear()

    def write_sample(self, sample: Sample, reward: Reward | None = None) -> None:
        """Safe from a kill when this returns. reward: to keep the sample with its grade, or not at all."""
        line = {"prompt_id": sample.prompt_id, "index": sample.index, "prompt": self._digests[sample.prompt_id]}
        line |= {"length": sample.length, "truncated": sample.truncated, "text": sample.text}
        self._write("samples", line if reward is None else line | reward_line(reward))

    def write_grade(self, graded: GradedSample) -> None:
        """The grade of a sample that was written before. Safe from a kill when this returns."""
        self._write(
            "grades", {"prompt_id": graded.sample.prompt_id, "index": graded.sample.index, **reward_line(graded.reward)}
        )

    def sync(self) -> None:
        """Bring all lines to disk now."""
        for writer in self._writers.values():
            writer.sync()
        self._synced = time.monotonic()

    def _write(self, kind: str, line: dict[str, Any]) -> None:
        if kind not in self._writers:
            self._writers[kind] = JsonLinesWriter(self.directory / f"{kind}-{self._rank:05d}.jsonl", sys.maxsize)
        writer = self._writers[kind]
        writer.write({"step": (writer.last_step or 0) + 1, **line}, sync=False)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()


def prompt_digest(prompt: Prompt) -> str:
    """Of a prompt's tokens: what its samples continue."""
    return hashlib.sha256(json.dumps(list(prompt.token_ids)).encode()).hexdigest()[:16]
