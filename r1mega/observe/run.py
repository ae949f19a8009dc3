"""The run directory: who owns it, what it was told, what made it, and where it stands.

RUN_DIR/config.yaml        the resolved config        RUN_DIR/metrics.jsonl   one line a step
RUN_DIR/environment.json   versions, commit, platform RUN_DIR/samples.jsonl   sampled responses
RUN_DIR/status.json        running, finished, ...     RUN_DIR/tensorboard/    events
RUN_DIR/lock               held while a run is alive  RUN_DIR/evaluations.jsonl one line an evaluation
RUN_DIR/inputs.json        what it has read (see inputs.py)
RUN_DIR/checkpoints/       step_NNNNNN                RUN_DIR/nonfinite/      what made a gradient not finite
RUN_DIR/watch/             where each rank is, stacks RUN_DIR/rollouts/       what RL sampled (rollout/journal.py)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from r1mega.config.load import unknown_keys, with_defaults
from r1mega.config.stages import stage_model
from r1mega.config.yaml_text import dump_yaml
from r1mega.errors import ConfigError, DataError, R1MegaError
from r1mega.files import write_atomic
from r1mega.observe.environment import describe_environment

log = logging.getLogger(__name__)

State = Literal["running", "finished", "interrupted", "failed"]

LAYOUT_KEYS = (
    "parallel", "weights", "rollout.tp", "rollout.ep", "rollout.dp", "rollout.dcp", "rollout.kv_cache_bytes",
    "rollout.gpu_memory_utilization", "rollout.max_batched_tokens", "rollout.sleep",
)  # fmt: skip
"""Config keys that say how a run is spread over processes and passes, which is what its memory follows from: what it computes is the
same, up to rounding.
"""
_PACKING_KEYS = ("update.microbatch_tokens", "update.min_microbatches")
"""The same, but for the auxiliary loss of the routers, which takes a microbatch for one sequence."""
CHANGEABLE_KEYS = (
    "steps", "threads", "timeouts", "watchdog", "restart", "observe", "checkpoint", "memory", "evaluate", "tasks", "others",
    "model.recompute", "model.dispatcher", "model.megatron", "optimizer.overlap_grad_reduce", "optimizer.overlap_param_gather",
    "optimizer.skip_nonfinite", "rollout.durable", "rollout.work_sharing", "rollout.max_kept_ids", *LAYOUT_KEYS,
)  # fmt: skip
"""Config keys (with all below them) that may differ when a run is started again; any other makes it another run."""


def layout_keys(config: Mapping[str, object]) -> tuple[str, ...]:
    """Of a resolved config (JSON types): those that change what it computes by rounding alone."""
    model = config.get("model")
    has_loss = isinstance(model, Mapping) and model.get("sequence_aux_loss_coefficient", 0.0) > 0
    return LAYOUT_KEYS if has_loss else (*LAYOUT_KEYS, *_PACKING_KEYS)


PLACE_VARIABLE = "R1MEGA_SAY_RUN_DIR"

_locked_here: set[Path] = set()  # POSIX locks do not exclude within one process: this set does


class RunDirectory:
    """Paths of a run directory, and its small files. Only rank 0 locks and writes; every rank may use the paths."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.status = self.path / "status.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.report = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.lock_file = self.path / "lock"
        self.inputs = self.path / "inputs.json"
        self.wandb_id = self.path / "wandb_id"
        self.watch = self.path / "watch"
        self.pace = self.path / "pace.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Make the directory and own it for the block. ConfigError when another live run owns it.

        The kernel frees the lock when its process dies, however it dies: what a dead run left is taken over. (A POSIX
        record lock: children do not inherit it, and NFS carries it between hosts.)
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir {self.path}: cannot be made ({error}); choose another run_dir") from error
        identity = self.path.resolve()
        if identity in _locked_here:
            raise ConfigError(f"run_dir {self.path}: another run of this process has it; choose another run_dir")
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._acquire(descriptor)
            _locked_here.add(identity)
            yield
            os.ftruncate(descriptor, 0)
        finally:
            _locked_here.discard(identity)
            os.close(descriptor)

    def _acquire(self, descriptor: int) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 4096).decode(errors="replace").strip() or "unknown"
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"run_dir {self.path}: in use by another run ({holder}); stop that run or choose another run_dir"
                ) from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            log.warning("%s: this file system has no locks; a second run here would not be noticed", self.path)
        if left := os.pread(descriptor, 4096, 0).decode(errors="replace").strip():
            log.info("%s: taking over from a run that did not end cleanly (%s)", self.path, left)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode(), 0)

    def check_place(self) -> None:
        """ConfigError when the directory could not be made or written."""
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            kind = "may not be written" if nearest.is_dir() else "is a file"
            if nearest == self.path and nearest.is_dir():
                raise ConfigError(
                    f"run_dir {self.path}: may not be written; mend its permissions, or mount its file system for writing, to go on "
                    "with what is there, or choose another run_dir"
                )
            raise ConfigError(f"run_dir {self.path}: cannot be made ({nearest} {kind}); choose another run_dir")

    def say_place(self) -> None:
        """Into the file that the variable R1MEGA_SAY_RUN_DIR names, for launch/slurm.sh: where this directory is. A file that cannot be
        written (a container without its directory) is told: the job then does not start its ranks again by itself.
        """
        if place := os.environ.get(PLACE_VARIABLE):
            try:
                write_atomic(Path(place), f"{self.path.absolute()}\n")
            except (R1MegaError, OSError) as error:
                log.warning("%s: the job will not start its ranks again by itself: %s", place, error)

    def check_config(self, config: Mapping[str, Any]) -> None:
        """ConfigError when the directory holds a run whose config differs in a key outside CHANGEABLE_KEYS and `layout_keys` (see
        `config_changes`). One that ended before it made anything is no run: it may be started again with a mended config.
        """
        if not self.config.exists() or not self.holds_work():
            return
        changed = config_changes(self.read_config(), config, self.config)
        fixed = [line for key, line in changed if not is_below(key, (*CHANGEABLE_KEYS, *layout_keys(config)))]
        if fixed:
            raise ConfigError(
                f"run_dir {self.path} holds a run with another config:\n  " + "\n  ".join(fixed) + "\n"
                "choose another run_dir, or remove this one to start over"
            )

    def holds_work(self) -> bool:
        """Whether there is anything but what every start writes first, and files and directories without content."""
        first = {
            self.config,
            self.environment,
            self.status,
            self.lock_file,
            self.path / "tensorboard",
            self.inputs,
            self.wandb_id,
            self.watch,
        }
        return any(_has_content(path) for path in self.path.iterdir() if path not in first)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Store the resolved config (JSON types) after `check_config`."""
        self.check_config(config)
        write_atomic(self.config, dump_yaml(config))

    def read_config(self) -> dict[str, Any]:
        """The stored config; DataError when there is none or it is damaged."""
        try:
            config = yaml.safe_load(self.config.read_text())
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: not a run directory (it has no config.yaml)") from error
        except yaml.YAMLError as error:
            raise DataError(f"{self.config}: damaged ({error})") from error
        if not isinstance(config, dict):
            raise DataError(f"{self.config}: damaged (not a mapping)")
        return config

    def write_environment(self, step: int = 0, world_size: int = 1, ranks_per_machine: int | None = None) -> None:
        """Store what runs here now, on how many processes, of them on each machine (None: unknown); `starts` gains one entry
        (time, step, commit) each time the run is started.
        """
        environment = describe_environment()
        starts = self.read_environment().get("starts", []) if self.environment.exists() else []
        starts.append({"time": _now(), "step": step, "git_commit": environment["git_commit"]})
        sizes = {"world_size": world_size, "ranks_per_machine": ranks_per_machine}
        _write_json(self.environment, {**environment, **sizes, "starts": starts})

    def read_environment(self) -> dict[str, Any]:
        return _read_json(self.environment)

    def write_status(self, state: State, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Say where the run stands; metrics: its final (or latest) numbers."""
        _write_json(
            self.status,
            {"state": state, "step": step, "time": _now(), "pid": os.getpid(), "metrics": dict(metrics or {})},
        )

    def write_pace(self, step_seconds: float, save_seconds: float, warning_seconds: int) -> None:
        """Of the longest step and save of this start, and how long before its end a job of this run wants to be warned; for
        launch/slurm.sh, which warns it itself, and `r1mega plan --calibrate`.
        """
        pace = {"step_seconds": step_seconds, "save_seconds": save_seconds, "warning_seconds": warning_seconds}
        _write_json(self.pace, pace)

    def read_pace(self) -> dict[str, float]:
        """What `write_pace` wrote; DataError where there is none yet in this start."""
        return _read_json(self.pace)

    def read_status(self) -> dict[str, Any]:
        return _read_json(self.status)


def _has_content(path: Path) -> bool:
    """Of a file, or of any below a directory; also what cannot be looked at."""
    try:
        return any(map(_has_content, path.iterdir())) if path.is_dir() else path.stat().st_size > 0
    except OSError:
        return True


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any], source: Path) -> list[tuple[str, str]]:
    """(dotted key, what has changed) between the stored config of a run, in `source`, and today's; sorted.

    What an older program did not know yet, it did as the default says. A key that this program does not know (any more) is a
    change, unless nothing was set there.
    """
    if "stage" not in new or old.get("stage") != new["stage"]:
        return sorted(differences(old, new))
    model = stage_model(new["stage"])
    unknown = unknown_keys(old, model, source)
    found = differences(with_defaults(old, model), with_defaults(new, model))
    changed = [(key, line) for key, line in found if not is_below(key, [gone for gone, _, _ in unknown])]
    advice = "if what it says still holds, take it out of that file, or rename it there"
    return sorted(
        changed + [(key, f"{text} (it is {value}; {advice})") for key, value, text in unknown if value is not None]
    )


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, "key: old -> new") of every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in {**old, **new}:
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        if list(old) != list(new):
            yield key, f"{key}: {list(old)} -> {list(new)}"
    elif old != new:
        yield key, f"{key}: {old} -> {new}"


def is_below(key: str, keys: Iterable[str]) -> bool:
    """Whether the dotted `key` is one of `keys` or below one of them."""
    return any(f"{key}.".startswith(f"{other}.") for other in keys)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
