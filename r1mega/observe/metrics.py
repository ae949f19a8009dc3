"""One line of metrics a step: metrics.jsonl always, TensorBoard and W&B beside it."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1mega.errors import DataError, PlatformError
from r1mega.files import JsonLinesWriter, read_json_lines, write_atomic
from r1mega.observe.registry import find_metric

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id"
WRITTEN_AS_NULL = "written as null"
"""The end of the warning for a value that is not finite."""


class MetricsWriter:
    """Writes RUN_DIR/metrics.jsonl (appended and synced a line at a time) and its optional mirrors.

    resume_step: the step whose state the run goes on from; later lines are cut off, TensorBoard purges later events.
    None: the run starts afresh and earlier lines go. Write the line of a step before saving that step's checkpoint:
    then no line is missing after kill -9. Ranks other than 0 pass enabled=False and write nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ):
        self._lines: JsonLinesWriter | None = None
        self._tensorboard = self._wandb = None
        self._warned: set[str] = set()
        if not enabled:
            return
        run_dir = Path(run_dir)
        self._lines = JsonLinesWriter(run_dir / METRICS_FILE, resume_step)
        if tensorboard:
            self._tensorboard = _open_tensorboard(run_dir, resume_step)
        if wandb_project is not None:
            self._wandb = _open_wandb(run_dir, wandb_project, config, afresh=resume_step is None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
        """Append the line of `step` and return it. Values: numbers, tensors and arrays of one element, or None for
        a metric that does not apply (null).

        A value that is not finite becomes null, with a warning. Raises ValueError when `step` does not grow or a value
        is not a number.
        """
        record: dict[str, float | int | None] = {"step": int(step)}
        for name in sorted(metrics):
            if name != "step":
                record[name] = self._number(name, metrics[name], step)
        if self._lines is None:
            return record
        if self._lines.last_step is not None and step <= self._lines.last_step:
            raise ValueError(f"metrics of step {step} after those of step {self._lines.last_step}: steps must grow")
        self._lines.write(record)
        finite = {name: value for name, value in record.items() if name != "step" and value is not None}
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(finite, step=step)
        return record

    @property
    def last(self) -> dict[str, Any] | None:
        """The last line written, an earlier start's at first; None without any, and where nothing is written."""
        return None if self._lines is None else self._lines.last

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _number(self, name: str, value: Any, step: int) -> float | int | None:
        if find_metric(name) is None and name not in self._warned:
            self._warned.add(name)
            log.warning("metric %s is not in the table of r1mega/observe/registry.py; written all the same", name)
        if value is None:  # a quantity that this model does not have
            return None
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"metric {name} of step {step} is {value!r}, not a number")
        if not math.isfinite(value):
            log.warning("metric %s of step %d is %s; %s", name, step, value, WRITTEN_AS_NULL)
            return None
        return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl (or of the one in a run directory), without a last line that was cut short.

    Values that were not finite are None. Raises DataError when the file is missing or damaged.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    lines = read_json_lines(path)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int):
            raise DataError(f"{path}:{number}: 'step' is {line.get('step')!r}, not a number of steps; remove the line")
    return lines


def _open_tensorboard(run_dir: Path, resume_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise PlatformError(
            f"observe.tensorboard is on, but TensorBoard does not load ({error}): pip install tensorboard, "
            "or set observe.tensorboard=false"
        ) from error
    return SummaryWriter(run_dir / "tensorboard", purge_step=0 if resume_step is None else resume_step + 1)


def _open_wandb(run_dir: Path, project: str, config: Mapping[str, Any] | None, *, afresh: bool):
    """The run's own in the project, however its directory is called: its id is kept in RUN_DIR/wandb_id. One that an earlier
    version began has the directory's name for its id.
    """
    try:
        import wandb
    except ImportError as error:
        raise PlatformError(
            f"observe.wandb_project is {project!r}, but wandb is not installed: pip install wandb, or unset the key"
        ) from error
    name, kept = run_dir.resolve().name, run_dir / WANDB_ID_FILE
    if afresh or not kept.exists():
        write_atomic(kept, f"{name}-{secrets.token_hex(4)}" if afresh else name)
    return wandb.init(
        project=project, id=kept.read_text(), name=name, dir=run_dir, config=dict(config or {}), resume="allow"
    )
