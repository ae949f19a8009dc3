"""What each step sampled and scored, on disk before the step ends, so that a start after a kill reads it.

    RUN_DIR/rollouts/step_000012/0-of-2.jsonl    what generator 0 of two sampled in step 12, a line a response and one a reward

A response has one segment a step: the tokens that the step added to it. Its key is its step, the seed of its group and its
number, which say with the run's config what is sampled. Each generator's first rank writes, all of its ranks read.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from r1mega.config.schema import RolloutConfig
from r1mega.files import JsonLinesWriter, read_json_lines
from r1mega.platform.groups import GeneratorPlace
from r1mega.types import Response, Reward, RewardStatus

SYNC_SECONDS = 0.25
"""A line that comes sooner than this after the last sync is in the file at once, and on disk with the next one: a fast
generator does not wait for the disk at every sample."""

_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True)
class Place:
    """Of a segment: the step that sampled it, the seed of its group, its number in it."""

    step: int
    seed: int
    index: int

    def line(self) -> dict[str, int]:
        return {"step": self.step, "seed": self.seed, "index": self.index}


@dataclass(frozen=True, slots=True)
class Segment:
    """What a step added to a response: its new tokens, and whether they end it. reward: of a whole response, if it had one."""

    response: Response
    reward: Reward | None = None


class RolloutJournal:
    """The segments of a run's steps. What earlier starts wrote is read once, when it is made; all ranks make it before any
    writes to it.
    """

    def __init__(
        self, run_dir: Path, place: GeneratorPlace, *, start: int = 0, max_staleness: int = 0, durable: bool = True
    ):
        """start: the last saved step; max_staleness: how many steps before it its unfinished responses may have begun, which
        older ones are removed. durable: False keeps nothing. Raises DataError for a damaged file.
        """
        self._directory, self._checkpoints = Path(run_dir) / "rollouts", Path(run_dir) / "checkpoints"
        self._name = f"{place.replica}-of-{place.num_replicas}.jsonl"
        self._writes, self._prunes = durable and place.is_first, place.is_first and place.replica == 0
        self._max_staleness = max_staleness
        self._writer: JsonLinesWriter | None = None
        self._synced = 0.0
        self._read: dict[Place, Segment] = {}
        for step, directory in self._steps() if durable else ():
            if step > start - max_staleness:
                for path in self._files_to_read(directory):
                    self._read_file(path)

    def take(self, place: Place) -> Segment | None:
        """What an earlier start wrote of it, once; None: nothing."""
        return self._read.pop(place, None)

    def write(self, place: Place, response: Response) -> None:
        """A segment; a later one of the same place counts. Safe from a kill of the process when this returns."""
        line: dict[str, object] = {"tokens": response.token_ids, "log_probs": response.log_probs}
        line["finish_reason"] = response.finish_reason
        if response.routed_experts is not None:
            line["routed_experts"] = _pack(response.routed_experts)
        self._append(place, line)

    def write_reward(self, place: Place, reward: Reward) -> None:
        """Of a response that the segment at `place` ends. One that failed is left out: the next start tries again."""
        if reward.status != RewardStatus.FAILED:
            self._append(place, {"reward": reward_line(reward)})

    def finish_step(self) -> None:
        """All that was written is on disk."""
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        """All that was written is on disk, and the file closed."""
        if self._writer is not None:
            self._writer.sync()
            self._writer.close()
            self._writer = None

    def _append(self, place: Place, values: Mapping[str, object]) -> None:
        if not self._writes:
            return
        directory = self._directory / f"step_{place.step:06d}"
        if self._writer is None or self._writer.path.parent != directory:
            self.close()
            self._forget()
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = JsonLinesWriter(directory / self._name, sys.maxsize)
        self._writer.write({**place.line(), **values}, sync=False)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._writer.sync()
            self._synced = time.monotonic()

    def _forget(self) -> None:
        """Remove steps that no start will ask for: the oldest checkpoint is newer, and so is all that is unfinished in it."""
        saved = [int(m[1]) for path in self._checkpoints.glob("step_*") if (m := _STEP.fullmatch(path.name))]
        if self._prunes and saved:
            for step, directory in self._steps():
                if step <= min(saved) - self._max_staleness:
                    shutil.rmtree(directory, ignore_errors=True)

    def _steps(self) -> list[tuple[int, Path]]:
        found = ((_STEP.fullmatch(path.name), path) for path in self._directory.glob("step_*"))
        return sorted((int(match[1]), path) for match, path in found if match)

    def _files_to_read(self, directory: Path) -> list[Path]:
        """This generator's own, where there were as many; otherwise those of all."""
        paths = sorted(directory.glob("*-of-*.jsonl"))
        own = directory / self._name
        alike = all(path.name.partition("-")[2] == own.name.partition("-")[2] for path in paths)
        return [path for path in paths if path == own] if alike else paths

    def _read_file(self, path: Path) -> None:
        for line in read_json_lines(path):
            place = Place(line["step"], line["seed"], line["index"])
            if "reward" in line:
                if place in self._read:
                    self._read[place] = replace(self._read[place], reward=read_reward(line["reward"]))
                continue
            routed = line.get("routed_experts")
            response = Response(
                tuple(line["tokens"]),
                tuple(line["log_probs"]),
                line["finish_reason"],
                None if routed is None else _unpack(routed),
            )
            self._read[place] = Segment(response)


def reward_line(reward: Reward) -> dict[str, object]:
    """As it is kept in a line of JSON."""
    return {"value": reward.value, "parts": dict(reward.parts), "status": str(reward.status), "reason": reward.reason}


def read_reward(line: Mapping[str, Any]) -> Reward:
    """What `reward_line` made a line of."""
    return Reward(line["value"], line["parts"], RewardStatus(line["status"]), line["reason"])


def _pack(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def _unpack(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def open_journal(rollout: RolloutConfig, run_dir: Path, start: int) -> RolloutJournal:
    """Of this rank, in a run that goes on after step `start`. Raises as the class does."""
    staleness = rollout.partial.max_staleness if rollout.partial.is_on else 0
    place = GeneratorPlace.of_this_rank(rollout.tp)
    return RolloutJournal(run_dir, place, start=start, max_staleness=staleness, durable=rollout.durable)
