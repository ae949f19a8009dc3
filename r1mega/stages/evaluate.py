"""Stage `evaluate`: checkpoints x tasks, shared by the ranks, resumable to the sample.

RUN_DIR/results.json, results.md      the summary             RUN_DIR/CHECKPOINT/TASK/result.json   every sample
RUN_DIR/CHECKPOINT/TASK/predictions.jsonl                     patches, for the SWE-bench harness
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from r1mega.config.model_files import identity
from r1mega.config.rewards import PATCH_KIND
from r1mega.config.stages.evaluate import EvaluateStage, TaskConfig
from r1mega.data.record import PromptRecord
from r1mega.data.tokenizer import Tokenizer, load_tokenizer
from r1mega.evaluate.forms import FormOptions
from r1mega.evaluate.patch import write_predictions
from r1mega.evaluate.result import EvaluationResult, evaluation_rows, write_result
from r1mega.evaluate.run import evaluation_draw, open_scorer, response_limits
from r1mega.evaluate.source import CheckpointSource, checkpoint_names, context_length, find_checkpoint
from r1mega.evaluate.table import results_table
from r1mega.evaluate.tasks import TASKS, load_task, pose
from r1mega.files import write_atomic
from r1mega.observe.progress import StageProgress, is_quiet
from r1mega.platform.groups import GeneratorPlace, timeout, wait_for_all
from r1mega.rollout.build import engine_settings, open_engine
from r1mega.rollout.draw import Draw, Sample, draw_samples, grade_samples
from r1mega.rollout.sampler import Scorer
from r1mega.rollout.store import SampleStore
from r1mega.stages.runtime import Runtime
from r1mega.types import GenerationEngine, Prompt, RewardStatus, SamplingSettings


@dataclass(frozen=True, slots=True)
class _Unit:
    """One checkpoint on one task."""

    task: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingSettings
    num_samples: int
    settings: dict[str, Any]
    store: SampleStore

    def keys(self) -> list[tuple[Prompt, int]]:
        """All samples, in order."""
        return [(prompt, index) for prompt in self.prompts for index in range(self.num_samples)]


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    name: str
    source: CheckpointSource
    tokenizer: Tokenizer
    units: tuple[_Unit, ...]


@dataclass(frozen=True, slots=True)
class _Share:
    """This rank's part of a unit: drawn earlier without a grade, and not drawn yet."""

    ungraded: list[tuple[Prompt, Sample]]
    missing: list[Draw]


def run(config: EvaluateStage, runtime: Runtime) -> int:
    """Evaluate all that the config names and was not evaluated before. Returns the exit code."""
    stage = _Evaluation(config, runtime)
    checkpoints = stage.plan()
    runtime.begin(len(checkpoints))
    results: list[dict[str, Any]] = []
    for step, checkpoint in enumerate(checkpoints, start=1):
        results.append({"name": checkpoint.name, "path": str(checkpoint.source.path), "tasks": {}})
        if stage.evaluate(checkpoint, results):
            return runtime.stopped(step - 1)
        entries = results[-1]["tasks"].items()
        runtime.write_metrics(
            step,
            {f"eval/{task}/{name[5:]}": v for task, entry in entries for name, v in entry["metrics"].items()},
        )
    if runtime.is_main and not is_quiet():
        results_table(results, "evaluation").print()
    return runtime.finished({"results": str(runtime.run_dir / config.outputs[0])})


class _Evaluation:
    """What the units of one run share."""

    def __init__(self, config: EvaluateStage, runtime: Runtime):
        self._config, self._runtime = config, runtime
        self._place = GeneratorPlace.of_this_rank(config.rollout.tp)
        self._writes = self._place.is_first  # the ranks of one generator see the same samples
        self._should_stop = _stop_check(runtime, config.rollout.tp)

    # ---------------------------------------------------------------------------------------------- what there is to do

    def plan(self) -> list[_Checkpoint]:
        """All files read and checked, before any generator starts. Raises DataError, ConfigError, CheckpointError."""
        config = self._config
        sources = [find_checkpoint(path) for path in (config.model.path, *config.others)]
        records = {name: self._records(name, task) for name, task in config.chosen.items()}
        names = checkpoint_names([source.path for source in sources])
        return [self._checkpoint(name, source, records) for name, source in zip(names, sources, strict=True)]

    def _records(self, name: str, task: TaskConfig) -> tuple[PromptRecord, ...]:
        options = FormOptions(self._config.seed, task.since, task.until)
        return load_task(TASKS[task.form or name], task.data, options, task.num_prompts, task.wording)

    def _checkpoint(
        self, name: str, source: CheckpointSource, records: dict[str, tuple[PromptRecord, ...]]
    ) -> _Checkpoint:
        tokenizer, context = load_tokenizer(source.path), context_length(source.path)
        template = self._config.template or source.template
        common = {"checkpoint": str(source.path), "identity": identity(source.path), "template": template}
        units = []
        for key, task in self._config.chosen.items():
            default = TASKS[task.form or key]
            prompts = pose(records[key], template, tokenizer)
            limits = response_limits(
                source, tokenizer, context, [p.token_ids for p in prompts], task.max_tokens, default.max_tokens
            )
            sampling = dataclasses.replace(
                limits,
                temperature=default.temperature if task.temperature is None else task.temperature,
                top_p=task.top_p or default.top_p,
            )
            settings = {**common, "seed": self._config.seed, **json.loads(json.dumps(dataclasses.asdict(sampling)))}
            store = SampleStore(self._runtime.run_dir / name / key, self._runtime.rank, prompts)
            store.check_settings(settings, write=self._runtime.is_main)
            units.append(_Unit(key, prompts, sampling, task.num_samples or default.num_samples, settings, store))
        return _Checkpoint(name, source, tokenizer, tuple(units))

    # -------------------------------------------------------------------------------------------------------- doing it

    def evaluate(self, checkpoint: _Checkpoint, results: list[dict[str, Any]]) -> bool:
        """Draw and grade what is missing, and add each task's figures to the last of `results`. True: told to stop."""
        self._runtime.barrier()  # settings are written, and all of an earlier checkpoint's samples
        shares, left, done = [], 0, 0
        for unit in checkpoint.units:
            share, num_left = self._share(unit)
            shares.append(share)
            left += num_left
            done += len(unit.keys()) - num_left
        self._runtime.barrier()  # all have read what was there: now files may change
        with contextlib.ExitStack() as stack:
            engine = scorer = None
            if left or any(share.ungraded for share in shares):
                scorer = stack.enter_context(open_scorer(checkpoint.source.reward))
            if left:
                engine = stack.enter_context(self._engine(checkpoint))
            progress = StageProgress(f"{checkpoint.name}", done + left, done, rank=self._runtime.rank)
            with progress:
                for unit, share in zip(checkpoint.units, shares, strict=True):
                    begun = time.perf_counter()
                    if scorer is not None:
                        self._complete(unit, share, engine, checkpoint.tokenizer, scorer, progress)
                    wait_for_all("rollout", f"the samples of {unit.task}")
                    if self._runtime.stop_requested():
                        return True
                    self._finish(unit, checkpoint, results, time.perf_counter() - begun)
        return False

    def _share(self, unit: _Unit) -> tuple[_Share, int]:
        """(this rank's part of what is left, samples left to draw over all ranks); every rank reads the same."""
        samples, grades = unit.store.read()
        ungraded = [
            (prompt, samples[prompt.id, index])
            for prompt, index in unit.keys()  # noqa: SIM118  a method of its own
            if (prompt.id, index) in samples and (prompt.id, index) not in grades
        ]
        draws = (evaluation_draw(prompt, index, self._config.seed) for prompt, index in unit.keys())  # noqa: SIM118
        missing = [draw for draw in draws if draw.key not in samples]
        mine = slice(self._place.replica, None, self._place.num_replicas)
        return _Share(ungraded[mine] if self._writes else [], missing[mine]), len(missing)

    def _complete(
        self, unit: _Unit, share: _Share, engine: GenerationEngine | None, tokenizer: Tokenizer, scorer: Scorer,
        progress: StageProgress,
    ) -> None:  # fmt: skip
        def keep(sample: Sample) -> None:
            if self._writes:
                unit.store.write_sample(sample)
            progress.advance(
                min(progress.total, progress.done + self._place.num_replicas)
            )  # the others are about as far

        with unit.store.opened():
            for graded in grade_samples(scorer, share.ungraded):
                unit.store.write_grade(graded)
            if engine is None:  # nothing is left to draw
                return
            for graded in draw_samples(
                engine, tokenizer, scorer if self._writes else None, share.missing, unit.sampling, on_sample=keep,
                should_stop=self._should_stop,
            ):  # fmt: skip
                if self._writes:
                    unit.store.write_grade(graded)

    def _finish(self, unit: _Unit, checkpoint: _Checkpoint, results: list[dict[str, Any]], seconds: float) -> None:
        """Rank 0 reads what all ranks have written, and writes the unit's result and the summary so far."""
        self._runtime.barrier()
        entry: dict[str, Any] = {"metrics": {}}
        if self._runtime.is_main:
            graded = unit.store.read_graded()
            rows = evaluation_rows(unit.prompts, graded.values(), unit.num_samples)
            result = EvaluationResult(rows, unit.num_samples, seconds, unit.settings)
            path = unit.store.directory / "result.json"
            write_result(result, path)
            entry = {
                "num_prompts": len(rows),
                "num_samples": unit.num_samples,
                "num_failed": sum(g.reward.status == RewardStatus.FAILED for g in graded.values()),
                "metrics": result.metrics(),
                "file": str(path.relative_to(self._runtime.run_dir)),
                "settings": unit.settings,
            }
            if all(prompt.kind == PATCH_KIND for prompt in unit.prompts):
                predictions = unit.store.directory / "predictions.jsonl"
                write_predictions(rows, checkpoint.name, predictions)
                entry["predictions"] = str(predictions.relative_to(self._runtime.run_dir))
        results[-1]["tasks"][unit.task] = entry
        if self._runtime.is_main:
            self._write_summary(results)

    def _write_summary(self, results: list[dict[str, Any]]) -> None:
        summary = {"asked": self._config.asked(), "checkpoints": results}
        json_path, markdown_path = (self._runtime.run_dir / name for name in self._config.outputs)
        write_atomic(markdown_path, results_table(results, "evaluation").markdown())
        write_atomic(json_path, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")

    @contextlib.contextmanager
    def _engine(self, checkpoint: _Checkpoint) -> Iterator[GenerationEngine]:
        """One generator for all tasks: as long as the longest prompt and response of any."""
        rollout, path = self._config.rollout, checkpoint.source.path
        longest = max(len(p.token_ids) + unit.sampling.max_tokens for unit in checkpoint.units for p in unit.prompts)
        settings = engine_settings(path, self._config.model.dtype, longest, rollout, weights="checkpoint")
        with open_engine(settings, rollout.engine) as engine:
            yield engine


def _stop_check(runtime: Runtime, tp: int) -> Callable[[], bool]:
    """Whether to stop drawing. Ranks of one generator must stop after the same sample, so they agree; generators are
    independent of each other: each stops when its own ranks get the signal, which a scheduler sends to all.
    """
    if tp == 1:
        return lambda: runtime.signalled
    groups = [
        dist.new_group(range(first, first + tp), backend="gloo", timeout=timeout("rollout"))
        for first in range(0, dist.get_world_size(), tp)
    ]
    group = groups[runtime.rank // tp]

    def agreed() -> bool:
        flag = torch.tensor([float(runtime.signalled)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        return bool(flag.item())

    return agreed
