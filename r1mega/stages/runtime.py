"""What every stage needs around its loop: process groups, run directory, metrics, checkpoints, orderly ends."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from r1mega import platform
from r1mega.checkpoint.hf import write_hf
from r1mega.checkpoint.store import CheckpointStore, deciding_keys
from r1mega.checkpoint.workers import Alone, TorchWorkers
from r1mega.config.schema import CheckpointConfig, Stage, TrainingStage
from r1mega.ending import exit_code, is_told_by_the_first
from r1mega.errors import EXIT_SAVED_FOR_REQUEUE, CheckpointError, FreshProcessNeeded, R1MegaError
from r1mega.observe.inputs import check_inputs, record_inputs
from r1mega.observe.metrics import MetricsWriter
from r1mega.observe.performance import RATED, performance, stragglers
from r1mega.observe.progress import StageProgress, tell
from r1mega.observe.registry import PHASES
from r1mega.observe.run import RunDirectory
from r1mega.observe.samples import SamplesWriter
from r1mega.observe.trace import BETWEEN, OTHER, PhaseTimer, rss_bytes
from r1mega.platform import groups, processors
from r1mega.platform.launcher import prepare_restart, reserve_port
from r1mega.platform.memory import device_used_bytes, peak_probes
from r1mega.platform.peaks import peak_tflops
from r1mega.platform.signals import StopRequest
from r1mega.platform.stacks import record_collectives
from r1mega.platform.watchdog import Place, Watchdog, prepare_directory
from r1mega.types import RolloutGroup

if TYPE_CHECKING:
    from r1mega.train.policy import Policy
    from r1mega.train.trainer import Trainer

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MEMORY = (
    *(
        f"memory/{phase}_{kind}_peak_bytes"
        for phase in (*PHASES, "evaluate", OTHER, BETWEEN)
        for kind in ("host", "device")
    ),
    "memory/device_used_bytes",
)
"""What a line says of memory, if it is known: the same names on every rank."""

WARNING_MARGIN = 1.5
"""Of the warning that a job wants before its end, over a step and a save."""


class Stopped(Exception):
    """Asked to stop before the end, after `step`, whose state is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass(frozen=True, slots=True)
class _Files:
    """What a run writes as it goes on."""

    metrics: MetricsWriter
    samples: SamplesWriter


class Runtime:
    """One run of one stage on this rank. Open it with `Runtime.open`; stages call the methods in their loop."""

    def __init__(self, config: Stage, directory: RunDirectory, stop: StopRequest):
        self.config, self.directory, self.run_dir = config, directory, directory.path
        self.rank = dist.get_rank()
        self.is_main = self.rank == 0
        self._here = here = platform.current()
        self.timer = PhaseTimer(
            synchronize=torch.cuda.synchronize if here.name == "cuda" else None, memory=peak_probes(here)
        )
        self.peak_tflops = _peak_tflops(config)
        """Of this rank's device, for shares of it; None: unknown."""
        self._stop = stop
        self._store: CheckpointStore | None = None
        self._files: _Files | None = None
        self._progress: StageProgress | None = None
        self._last: dict[str, Any] = {}
        self._step = self._total_steps = 0
        self._at_step, self._doing = 0, "start"  # for the watchdog
        self._step_seconds = self._save_seconds = 0.0  # the longest of this start

    @classmethod
    @contextlib.contextmanager
    def open(cls, config: Stage) -> Iterator[Runtime]:
        """Start process groups, take the run directory, listen to SIGTERM and SIGUSR2; undo all of it at the end."""
        directory = RunDirectory(config.run_dir)
        record_collectives(directory.watch)
        groups.init_parallel(config.parallel, config.seed, config.timeouts)
        own = processors.own_share()
        torch.set_num_threads(config.threads or own)
        with contextlib.ExitStack() as stack:
            watch = stack.enter_context(contextlib.ExitStack())  # closed last
            stack.callback(groups.destroy)
            runtime = cls(config, directory, stack.enter_context(StopRequest()))
            runtime.broadcast(lambda: runtime._take_directory(stack))
            watch.enter_context(runtime._watchdog())
            stack.callback(runtime._close)
            runtime.broadcast(lambda: check_inputs(config, renew=True))
            runtime.broadcast(lambda: record_inputs(config))
            try:
                with groups.peers_named():
                    yield runtime
            except FreshProcessNeeded:  # what was done is kept; raised on every rank in the same place
                prepare_restart(runtime.broadcast(reserve_port))
                raise
            except BaseException as error:
                text = "" if is_told_by_the_first(error) else f"{type(error).__name__}: {error}\n"
                runtime._stop.decide(exit_code(error), text)
                if runtime.is_main:
                    try:
                        directory.write_status("failed", runtime._step, runtime._last)
                    except OSError as error:  # on a full disk, say: what ended the run is the error to tell
                        logger.warning("%s: could not be written (%s)", directory.status, error.strerror)
                raise

    # ------------------------------------------------------------------ the loop of a training stage

    def steps(
        self,
        trainer: Trainer,
        start: int,
        total: int,
        progress: Callable[[], Mapping[str, Any]] = dict,
        *,
        before_save: Callable[[], None] = lambda: None,
    ) -> Iterator[int]:
        """The steps after `start` (done), up to `total`: each is timed, and saved after it where that is due.

        progress: what a checkpoint keeps beside weights and optimizer, asked for at each save. before_save: makes room for
        it. Raises Stopped, saved, when asked to stop before the end.
        """
        every = self._checkpoint.every_steps
        with self.progress(total=total, done=start):
            for step in range(start + 1, total + 1):
                self._at_step = step
                self.timer.start_step()
                began = time.monotonic()
                yield step
                self._step_seconds = max(self._step_seconds, time.monotonic() - began)
                stopping = self.stop_requested()
                if step % every == 0 or step == total or stopping:
                    before_save()
                    self.save(trainer, step, progress())
                if stopping and step < total:
                    self._finish_saves()  # whatever closing may do, the state is whole before
                    raise Stopped(step)

    def export(self, policy: Policy, hf_config: Mapping[str, Any], *, tokenizer_from: Path) -> Path:
        """The trained model as RUN_DIR/hf, whose path this is; every rank writes a share of its files. A collective call."""
        workers = TorchWorkers() if dist.get_world_size() > 1 else Alone()
        with self.busy_with("export"):
            return write_hf(
                self.run_dir / "hf", policy.hf_tensors(), hf_config, tokenizer_from=tokenizer_from, workers=workers
            )

    # ------------------------------------------------------------------ resume and checkpoints

    def restore(self, trainer: Trainer, hf_config: Mapping[str, Any], total_steps: int) -> tuple[int, dict[str, Any]]:
        """(last saved step, its progress record) after loading it into the trainer; (0, {}) for a fresh run.

        Opens the metric files, cut back to that step.
        """
        checkpoint, trainer.evidence = self._checkpoint, self.run_dir / "nonfinite"
        store = self._store = CheckpointStore(
            self.run_dir, keep=checkpoint.keep, architecture=deciding_keys(hf_config),
            asynchronous=checkpoint.async_save,
        )  # fmt: skip
        path = store.latest()
        progress: dict[str, Any] = {}
        if path is not None:
            state, progress = store.load(path, trainer.sharded_state(is_loading=True))
            trainer.load_sharded_state(state)
            self._step = progress["step"]
            if self._step > total_steps:
                raise CheckpointError(
                    f"{path} is past the {total_steps} steps of this config; ask for more, or use another run_dir"
                )
        self.begin(total_steps, self._step if path is not None else None)
        return self._step, progress

    def begin(self, total_steps: int, resume: int | None = None) -> None:
        """Open the metric files, cut back to step `resume` (None: afresh), and say that the run is on. A stage that trains
        calls `restore`, which does this.
        """
        self._total_steps = total_steps
        observe = self.config.observe
        metrics = MetricsWriter(
            self.run_dir, resume_step=resume, tensorboard=observe.tensorboard, wandb_project=observe.wandb_project,
            config=self.config.model_dump(mode="json"), enabled=self.is_main,
        )  # fmt: skip
        self._last = metrics.last or {}
        self._files = _Files(metrics, SamplesWriter(self.run_dir, resume_step=resume, enabled=self.is_main))
        if self.is_main:
            self.directory.write_environment(self._step, dist.get_world_size(), _ranks_per_machine())
            self.directory.write_status("running", self._step)
            if resume is not None:
                tell(f"resuming {self.run_dir} from step {resume}")

    def save(self, trainer: Trainer, step: int, progress: Mapping[str, Any]) -> None:
        """Checkpoint `step`; its metrics line is written by then, so none is missing after a kill."""
        if self._store is None:
            raise RuntimeError("restore() opens the checkpoints first")
        began = time.monotonic()
        with self.busy_with("save"):
            self._store.save(step, trainer.sharded_state(is_loading=False), progress)
        own = time.monotonic() - began + self._store.background_seconds  # a stop waits for that too
        self._save_seconds = max(self._save_seconds, own)
        if self.is_main and self._step_seconds:
            self.directory.write_pace(self._step_seconds, self._save_seconds, self._wanted_warning())

    # ------------------------------------------------------------------ what the loop reports

    @contextlib.contextmanager
    def progress(self, total: int, done: int) -> Iterator[Runtime]:
        """Show a progress bar that `write_metrics` moves."""
        self._doing = BETWEEN
        with StageProgress(self.config.stage, total, done, rank=self.rank) as self._progress:
            yield self

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The line of `step`: metrics.jsonl, TensorBoard, progress bar. Only rank 0 writes; a collective call."""
        metrics = {**metrics, **self._performance(metrics), "memory/rss_bytes": rss_bytes()}
        self._last = self._opened.metrics.write(step, metrics)
        self._step = step
        if self._progress is not None:
            self._progress.update(step, metrics)

    def _performance(self, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        """`perf/...` by the slowest rank's times, which rank that is in each phase, and the fullest rank's memory."""
        times = {phase: metrics.get(f"time/{phase}_seconds", 0.0) for phase in dict.fromkeys((*PHASES, *RATED))}
        memory = self.timer.take_peaks()
        if self._here.name == "cuda":
            memory["memory/device_used_bytes"] = device_used_bytes()
        own = torch.tensor([*times.values(), *(memory.get(name, 0) for name in _MEMORY)], dtype=torch.float64)
        every = own.new_empty(dist.get_world_size(), own.numel())
        dist.all_gather_into_tensor(every.view(-1), own)
        seconds = dict(zip(times, every.T.tolist(), strict=False))
        fullest = dict(zip(_MEMORY, every.amax(0)[len(times) :].tolist(), strict=True))
        slowest = {phase: max(values) for phase, values in seconds.items()}
        rates = performance(metrics, slowest, dist.get_world_size(), self.peak_tflops)
        return rates | stragglers(seconds) | {name: int(value) for name, value in fullest.items() if value}

    def write_samples(self, step: int, local_groups: Sequence[RolloutGroup]) -> None:
        """Some of rank 0's responses, on the steps that observe.samples_every_steps names, the first and the last."""
        observe = self.config.observe
        if self.is_main and ((step - 1) % observe.samples_every_steps == 0 or step == self._total_steps):
            self._opened.samples.write(step, local_groups, observe.samples_per_step)

    def write_sample_lines(self, *records: Mapping[str, Any]) -> None:
        """Samples that are no rollouts (held-out ones of SFT), in the form of observe.samples.sample_record; on rank 0."""
        self._opened.samples.write_lines(*records)

    def broadcast(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; what it raises there (an R1MegaError, an OSError) is raised on every rank."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except (R1MegaError, OSError) as error:
                outcome[1] = error
        groups.wait_for_all("startup", "what rank 0 prepares for all")
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def note(self, text: str) -> None:
        """A line for the person at the terminal, on rank 0."""
        if self._progress is not None:
            self._progress.note(text)
        elif self.is_main:
            tell(text)

    # ------------------------------------------------------------------ where this rank is

    def _watchdog(self) -> Watchdog:
        def say(text: str) -> None:
            self.directory.write_status("failed", self._step, self._last)

        return Watchdog(
            self.directory.watch, self.config.watchdog, self._place, rank=self.rank, world=dist.get_world_size(),
            timeouts=self.config.timeouts, on_verdict=say,
        )  # fmt: skip

    def _place(self) -> Place:
        """Asked by the watchdog's thread."""
        phase = self.timer.innermost or self._doing
        return Place(max(self._at_step, self._step), self.timer.part, phase, self.timer.turns)

    @contextlib.contextmanager
    def busy_with(self, what: str) -> Iterator[None]:
        """Between steps: what the watchdog is told that this rank does, where no phase of a step is open."""
        before, self._doing = self._doing, what
        try:
            yield
        finally:
            self._doing = before

    # ------------------------------------------------------------------ ends

    def barrier(self) -> None:
        dist.barrier()

    @property
    def signalled(self) -> bool:
        """Whether this rank was told to stop; between steps ask `stop_requested`, which agrees with the others."""
        return self._stop.requested

    def stop_requested(self) -> bool:
        """Whether any rank was told to stop (SIGTERM, SIGUSR2). A collective call."""
        return self._stop.agreed()

    def stopped(self, step: int | None = None) -> int:
        """The exit code of a run that saved its state and can be started again. step: None: the last with metrics."""
        step = self._step if step is None else step
        self._finish_saves()
        if self.is_main:
            self.directory.write_status("interrupted", step, self._last)
            tell(f"stopped after step {step}; state saved, start again to go on{self._warning()}")
        return EXIT_SAVED_FOR_REQUEUE

    def _wanted_warning(self) -> int:
        """Seconds."""
        return math.ceil(WARNING_MARGIN * (self._step_seconds + self._save_seconds))

    def _warning(self) -> str:
        """How long before its end a job of this run has to be told, by what was measured since the start."""
        if not self._step_seconds:
            return ""
        wanted = self._wanted_warning()
        return (
            f" (steps took up to {self._step_seconds:.1f} s, saves {self._save_seconds:.1f} s: "
            f"warn it {wanted} s before its end, sbatch --signal=B:USR1@{wanted})"
        )

    def finished(self, summary: Mapping[str, Any]) -> int:
        """Mark the run as finished; the exit code."""
        self._finish_saves()
        self._stop.decide(0)  # asked to stop from here on, it need not be started again
        if self.is_main:
            self.directory.write_status("finished", self._step, self._last)
            for name, value in summary.items():
                tell(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
        return 0

    def _finish_saves(self) -> None:
        if self._store is not None:
            before, began = self._store.background_seconds, time.monotonic()
            with self.busy_with("save"):
                self._store.wait()
            left = time.monotonic() - began  # of a save beside the steps, at their end; longer ones are counted
            self._save_seconds += max(0.0, left - before)

    def _take_directory(self, stack: contextlib.ExitStack) -> None:
        """Until that stack's end nobody else runs in it. On rank 0."""
        stack.enter_context(self.directory.lock())
        self.directory.write_config(self.config.model_dump(mode="json"))
        prepare_directory(self.directory.watch)
        self.directory.pace.unlink(missing_ok=True)  # an earlier start's: no job is warned before its first step
        self.directory.say_place()

    def _close(self) -> None:
        self._doing = "end"
        if self._files is not None:
            self._files.metrics.close()
            self._files.samples.close()

    @property
    def _opened(self) -> _Files:
        if self._files is None:
            raise RuntimeError("restore() or begin() opens the metric files first")
        return self._files

    @property
    def _checkpoint(self) -> CheckpointConfig:
        """How a stage that trains keeps its state."""
        if not isinstance(self.config, TrainingStage):
            raise TypeError(f"stage {self.config.stage} does not train: its config is no TrainingStage")
        return self.config.checkpoint


def _ranks_per_machine() -> int | None:
    """Of this run; None: its launcher does not say."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    return int(ranks) if ranks else None


def _peak_tflops(config: Stage) -> float | None:
    """Of this rank's device, for the model's type; what the config says of it counts first."""
    if config.observe.peak_tflops is not None or platform.current().name != "cuda":
        return config.observe.peak_tflops
    return peak_tflops(torch.cuda.get_device_name(), config.model.dtype, fp8=config.model.fp8 != "off")
