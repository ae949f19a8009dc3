"""samples.jsonl: a few sampled responses, with their prompts and rewards, for a person to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega.files import JsonLinesWriter, read_json_lines
from r1mega.types import RolloutGroup

SAMPLES_FILE = "samples.jsonl"


class SamplesWriter:
    """Writes RUN_DIR/samples.jsonl, one line a response. resume_step and enabled: as in MetricsWriter."""

    def __init__(self, run_dir: Path, *, resume_step: int | None = None, enabled: bool = True):
        self._lines = JsonLinesWriter(Path(run_dir) / SAMPLES_FILE, resume_step) if enabled else None

    def write(self, step: int, groups: Sequence[RolloutGroup], limit: int) -> None:
        """Append the first response of the first `limit` groups."""
        if self._lines is not None:
            self._lines.write(*(sample_record(step, group, 0) for group in groups[:limit] if group.responses))

    def write_lines(self, *records: Mapping[str, Any]) -> None:
        """Append samples that are no rollouts, in the form of `sample_record`."""
        if self._lines is not None:
            self._lines.write(*records)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def __enter__(self) -> SamplesWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sample_record(step: int, group: RolloutGroup, index: int) -> dict[str, Any]:
    """The line of one response."""
    response, reward = group.responses[index], group.rewards[index]
    return {
        "step": step,
        "prompt_id": group.prompt.id,
        "question": group.prompt.question,
        "answers": list(group.prompt.answers),
        "response": group.texts[index],
        "tokens": len(response.token_ids),
        "finish_reason": response.finish_reason,
        "reward": reward.value,
        "parts": dict(reward.parts),
        "status": str(reward.status),
    }


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of a samples.jsonl (or of the one in a run directory); DataError when missing or damaged."""
    path = Path(path)
    return read_json_lines(path / SAMPLES_FILE if path.is_dir() else path)
