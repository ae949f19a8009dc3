"""When a job whose rank died starts again by itself: there is something new to go on from, nobody has to answer first, and it
is not the same fault over and over. RUN_DIR/restarts.jsonl has a line for each.

    python -m r1mega.observe.restarts RUN_DIR CODE    for launch/slurm.sh: the seconds to wait; exit code 1 to stay ended
    python -m r1mega.observe.restarts RUN_DIR         exit code 0 where a checkpoint is newer than what the last start went on from
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from r1mega.config.schema import RestartConfig
from r1mega.errors import EXIT_FILE, EXIT_SAVED_FOR_REQUEUE, EXIT_STALLED, R1MegaError
from r1mega.files import JsonLinesWriter, read_json_lines
from r1mega.observe.run import RunDirectory

FOR_A_PERSON = frozenset({0, *range(2, 10), EXIT_FILE, EXIT_STALLED, EXIT_SAVED_FOR_REQUEUE, 128 + 2, 128 + 15})
"""Exit codes that another start would not change: done, the typed errors of config, data, checkpoint ... (r1mega/errors.py), and
ends that were asked for (saved, SIGINT, SIGTERM), and a rank that stands still: who stopped it, or what holds it, is still on this
machine, which is the only one. Others are a rank's death by a signal, an error of a library or device, and waiting in vain.
"""
HOUR = 3600.0


def seconds_until_restart(
    run_dir: Path, code: int, config: RestartConfig, *, clock: Callable[[], float] = time.time
) -> float | None:
    """None: the job stays ended. Else how long to wait, and the restart is written down.

    It needs a checkpoint newer than what the last start went on from, and fewer than `config.per_hour` restarts within the
    hour. The first waits `config.backoff_seconds`, each further one of the hour twice as long as the one before. A file that cannot
    be read or written is told: the job stays ended, with the exit code that it had.
    """
    if code in FOR_A_PERSON:
        return None
    try:
        return _seconds_until_restart(run_dir, code, config, clock())
    except (R1MegaError, OSError) as error:
        print(f"exit code {code}, and no start by itself: {error}", file=sys.stderr, flush=True)
        return None


def _seconds_until_restart(run_dir: Path, code: int, config: RestartConfig, now: float) -> float | None:
    path = run_dir / "restarts.jsonl"
    before = read_json_lines(path) if path.exists() else []
    newest = newest_checkpoint(run_dir)
    if newest <= max([last_start(run_dir), *(line["step"] for line in before)]):
        return None
    # by the distance: lines of a clock that was set back since are not of this hour for as long as it was ahead
    recent = [line for line in before if abs(now - line["time"]) < HOUR]
    if len(recent) >= config.per_hour:
        return None
    writer = JsonLinesWriter(path, before[-1]["step"] if before else None)
    writer.write({"step": newest, "time": now, "code": code})
    writer.close()
    return config.backoff_seconds * 2 ** len(recent)


def newest_checkpoint(run_dir: Path) -> int:
    """The step of the newest that was written to its end (its manifest is the last file); 0 without any. Nothing is verified: the
    next start does that, and takes the one before.
    """
    manifests = (run_dir / "checkpoints").glob("step_*/manifest.json")
    steps = [manifest.parent.name.removeprefix("step_") for manifest in manifests]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def last_start(run_dir: Path) -> int:
    """The step that the newest start of the run went on from; 0 without any."""
    directory = RunDirectory(run_dir)
    starts = directory.read_environment().get("starts", []) if directory.environment.exists() else []
    return starts[-1]["step"] if starts else 0


def main(arguments: Sequence[str]) -> int:
    """The exit code; see the head of this file."""
    run_dir = Path(arguments[0])
    try:
        if len(arguments) == 1:
            return int(newest_checkpoint(run_dir) <= last_start(run_dir))
        config = RestartConfig.model_validate(RunDirectory(run_dir).read_config().get("restart", {}))
        seconds = seconds_until_restart(run_dir, int(arguments[1]), config)
    except (R1MegaError, OSError) as error:
        print(f"{run_dir}: no start by itself: {error}", file=sys.stderr)
        return 1
    if seconds is not None:
        print(f"{seconds:.0f}")
    return int(seconds is None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
