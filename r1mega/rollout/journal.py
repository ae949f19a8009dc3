"""What each step sampled and scored, on disk before the step ends, so that a start after a kill reads it.

    RUN_DIR/rollouts/step_000012/start_3-0-of-2.jsonl    what generator 0 of two sampled in step 12, after the run's third start

A line a response and one a reward. A response has one segment a step: the tokens that the step added to it. Its key is its
step, the seed of its group and its number, which say with the run's config what is sampled. Each generator's first rank
writes, all of its ranks read.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1mega.config.schema import RolloutConfig
from r1mega.errors import DataError
from r1mega.files import JsonLinesWriter, Record, scan_json_lines, sync_path
from r1mega.platform.groups import GeneratorPlace
from r1mega.types import KeptIds, Response, Reward, RewardStatus

SYNC_SECONDS = 0.25
"""A line that comes sooner than this after the last sync is in the file at once, and on disk with a later one: a fast
generator does not wait for the disk at every sample."""

_STEP = re.compile(r"step_(\d+)")
_FILE = re.compile(r"start_(\d+)-(\d+)-of-(\d+)\.jsonl")


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


@dataclass(frozen=True, slots=True)
class _Line:
    """Where a line is: of which start, in which file, at which byte."""

    start: int
    path: Path
    offset: int


class RolloutJournal:
    """The segments of a run's steps. Where those of earlier starts are is found out once, when it is made; all ranks make it
    before any writes to it.
    """

    def __init__(
        self, run_dir: Path, place: GeneratorPlace, *, start: int = 0, max_staleness: int = 0, durable: bool = True,
        tells_kept: bool = False,
    ):  # fmt: skip
        """start: the last saved step; max_staleness: how many steps before it its unfinished responses may have begun, which
        older ones are removed. durable: False keeps nothing. tells_kept: tokens are of no use without the ids that they were drawn from,
        which an older program did not write. Raises DataError for a damaged file.
        """
        self._directory, self._checkpoints = Path(run_dir) / "rollouts", Path(run_dir) / "checkpoints"
        self._place, self._writes = place, durable and place.is_first
        self._max_staleness, self._tells_kept = max_staleness, tells_kept
        self._writer: JsonLinesWriter | None = None
        self._synced = 0.0
        self._segments: dict[Place, _Line] = {}
        self._rewards: dict[Place, _Line] = {}
        self._held: set[tuple[int, int]] = set()  # (step, seed), see `holds`
        steps = self._steps() if durable else []
        self._start = 1 + max((number for _, directory in steps for number, *_ in _files(directory)), default=0)
        for step, directory in steps:
            if step > start - max_staleness:
                for number, path in self._files_to_read(directory):
                    self._read_file(number, path)
                found = {(step, there.seed) for there in self._segments if there.step == step}
                if not self._is_alike(directory):
                    found = {(_, seed) for _, seed in found if seed % place.num_replicas == place.replica}
                self._held |= found

    def begin_step(self, step: int) -> None:
        """Nothing of an earlier one will be asked for."""
        for lines in (self._segments, self._rewards):
            for place in [place for place in lines if place.step < step]:
                del lines[place]

    def holds(self, step: int, seed: int) -> bool:
        """Whether this generator goes on with what an earlier start had of that step's group: one does of those that have read it."""
        return (step, seed) in self._held

    def take(self, place: Place, begun: int) -> Segment | None:
        """What an earlier start wrote of it, the latest that did, once; None: nothing, or nothing that goes on from `begun`
        tokens, or that this run can train on. Raises DataError for a damaged file.
        """
        line, reward = self._segments.pop(place, None), self._rewards.pop(place, None)
        if line is None:
            return None
        values = _read_line(line, place)
        if values["begun"] != begun:
            return None
        routed, kept = values.get("routed_experts"), values.get("kept")
        if self._tells_kept and kept is None and values["tokens"]:
            return None
        response = Response(
            tuple(values["tokens"]),
            tuple(map(float, values["log_probs"])),
            values["finish_reason"],
            None if routed is None else _unpack(routed),
            kept=None if kept is None else KeptIds(*map(_unpack, kept)),
        )
        if reward is None or reward.start < line.start:  # that was of what an earlier start sampled
            return Segment(response)
        return Segment(response, read_reward(_read_line(reward, place)["reward"]))

    def write(self, place: Place, response: Response, begun: int) -> None:
        """A segment that goes on from `begun` tokens; the last of the same place counts. Safe from a kill of the process when
        this returns.
        """
        line: dict[str, object] = {"begun": begun, "tokens": response.token_ids}
        line["log_probs"] = [_number(value) for value in response.log_probs]
        line["finish_reason"] = response.finish_reason
        if response.routed_experts is not None:
            line["routed_experts"] = _pack(response.routed_experts)
        if response.kept is not None:
            line["kept"] = [_pack(response.kept.counts), _pack(response.kept.ids)]
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
        """All that was written is on disk, and the file closed. Steps go that no start will ask for."""
        if self._writer is not None:
            self._writer.sync()
            self._writer.close()
            self._writer = None
            self._forget()

    def _append(self, place: Place, values: Mapping[str, object]) -> None:
        if not self._writes:
            return
        directory = self._directory / f"step_{place.step:06d}"
        if self._writer is None or self._writer.path.parent != directory:
            self.close()
            directory.mkdir(parents=True, exist_ok=True)
            for parent in (self._directory, self._directory.parent):
                sync_path(parent)
            name = f"start_{self._start}-{self._place.replica}-of-{self._place.num_replicas}.jsonl"
            self._writer = JsonLinesWriter(directory / name, sys.maxsize)
        self._writer.write({**place.line(), **values}, sync=False)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._writer.sync()
            self._synced = time.monotonic()

    def _forget(self) -> None:
        """Remove steps that no start will ask for: the oldest checkpoint is newer, and so is all that is unfinished in it."""
        saved = [int(m[1]) for path in self._checkpoints.glob("step_*") if (m := _STEP.fullmatch(path.name))]
        if self._place.replica == 0 and saved:
            for step, directory in self._steps():
                if step <= min(saved) - self._max_staleness:
                    shutil.rmtree(directory, ignore_errors=True)

    def _steps(self) -> list[tuple[int, Path]]:
        found = ((_STEP.fullmatch(path.name), path) for path in self._directory.glob("step_*"))
        return sorted((int(match[1]), path) for match, path in found if match)

    def _files_to_read(self, directory: Path) -> list[tuple[int, Path]]:
        """(start, path), earliest start first: this generator's own where there always were as many, otherwise those of all."""
        alike = self._is_alike(directory)
        return [
            (start, path)
            for start, replica, _, path in _files(directory)
            if not alike or replica == self._place.replica
        ]

    def _is_alike(self, directory: Path) -> bool:
        """Whether there always were as many generators as now."""
        return all(of == self._place.num_replicas for _, _, of, _ in _files(directory))

    def _read_file(self, start: int, path: Path) -> None:
        for offset, line in scan_json_lines(path):
            try:
                place = Place(line["step"], line["seed"], line["index"])
            except KeyError as error:
                raise DataError(f"{path}: at byte {offset}: a line without {error}; remove {path.parent}") from None
            lines = self._rewards if "reward" in line else self._segments
            lines[place] = _Line(start, path, offset)


def _files(directory: Path) -> list[tuple[int, int, int, Path]]:
    """(start, generator, of how many, path) of a step's files, earliest start first."""
    found = ((_FILE.fullmatch(path.name), path) for path in directory.glob("start_*"))
    return sorted((int(match[1]), int(match[2]), int(match[3]), path) for match, path in found if match)


def _read_line(line: _Line, place: Place) -> Record:
    """Raises DataError when it is not the one that was there."""
    try:
        with open(line.path, "rb") as file:
            file.seek(line.offset)
            values = json.loads(file.readline())
        if {**values, **place.line()} == values:
            return values
    except (OSError, ValueError) as error:
        raise DataError(f"{line.path}: at byte {line.offset}: {error}; something changed it since the start") from error
    raise DataError(f"{line.path}: at byte {line.offset}: another line than at the start; something changed it since")


def reward_line(reward: Reward) -> dict[str, object]:
    """As it is kept in a line of JSON. What UTF-8 cannot hold of the reason is written as an escape."""
    value = None if reward.value is None else _number(reward.value)
    reason = reward.reason.encode(errors="backslashreplace").decode()
    parts = {name: _number(part) for name, part in reward.parts.items()}
    return {"value": value, "parts": parts, "status": str(reward.status), "reason": reason}


def read_reward(line: Mapping[str, Any]) -> Reward:
    """What `reward_line` made a line of."""
    value = None if line["value"] is None else float(line["value"])
    parts = {name: float(part) for name, part in line["parts"].items()}
    return Reward(value, parts, RewardStatus(line["status"]), line["reason"])


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: as the text that `float` reads."""
    return value if math.isfinite(value) else str(value)


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
    return RolloutJournal(
        run_dir,
        place,
        start=start,
        max_staleness=staleness,
        durable=rollout.durable,
        tells_kept=rollout.cuts_vocabulary,
    )
