"""Stage `evaluate`: tasks x checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from r1mega.config.layout import generator_problems
from r1mega.config.model_files import context_length, identity
from r1mega.config.schema import NonNegative, PositiveInt, Section, Stage
from r1mega.config.validate import is_given, missing_file_problems, weights_problems

Form = Literal[
    "gsm8k", "math500", "aime24", "aime25", "math", "mmlu", "gpqa", "humaneval", "mbpp", "livecodebench", "codeforces",
    "ifeval", "swe_bench", "prompts",
]  # fmt: skip
"""The tasks of r1mega/evaluate/tasks.py."""
LONGEST_ANSWER = 32768
"""Tokens of a response where neither the config nor the run that is evaluated says (paper)."""


class TaskConfig(Section):
    """A task and its file. What is None is the task's own (the paper's sampling, k by the size of the set)."""

    data: Path  # JSONL, JSON, CSV or Parquet with the field names as published
    form: Form | None = None  # None: the task of the key's name
    num_prompts: PositiveInt | None = None  # the first so many; None: all
    num_samples: PositiveInt | None = None  # k
    temperature: NonNegative | None = None  # 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: PositiveInt | None = None  # of a response; None: as the checkpoint's run, else 32768 or what is left
    wording: str | None = None  # a Jinja2 text with {{ question }}, around each question
    since: str | None = None  # livecodebench: contests from this date (ISO) on
    until: str | None = None  # livecodebench: up to this date


class GeneratorConfig(Section):
    """The generator; see RolloutConfig for the keys."""

    engine: Literal["vllm", "transformers"] = "vllm"
    tp: PositiveInt = 1
    ep: PositiveInt = 1
    dp: PositiveInt | None = None
    dcp: PositiveInt = 1
    max_num_seqs: PositiveInt = 256
    max_batched_tokens: PositiveInt = 8192
    kv_cache_bytes: PositiveInt | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8


class EvaluateStage(Stage):
    """Samples each task with each checkpoint (model.path, then `others`), grades, and writes results.json.

    Tasks, other checkpoints and larger num_samples may be added to a finished run: what is there is not drawn again.
    """

    outputs: ClassVar[tuple[str, ...]] = ("results.json", "results.md")

    stage: Literal["evaluate"]
    tasks: dict[str, TaskConfig | None]  # null takes one away that an included file has
    others: tuple[Path, ...] = ()  # more checkpoints: HF or run directories
    template: str | None = None  # data/template.py; None: the one of the run that wrote the checkpoint, else r1_zero
    rollout: GeneratorConfig = GeneratorConfig()

    @property
    def chosen(self) -> dict[str, TaskConfig]:
        """The tasks that are not null."""
        return {name: task for name, task in self.tasks.items() if task is not None}

    def asked(self) -> dict[str, Any]:
        """What a finished run has answered, as JSON types."""
        return self.model_dump(mode="json", include={"model": {"path"}, "others": True, "tasks": True})

    def is_finished_at(self, step: int) -> bool:
        """Not when a checkpoint has been written anew, or grades failed, which the next start tries again."""
        stored = json.loads((self.run_dir / self.outputs[0]).read_text())
        entries = [entry for checkpoint in stored["checkpoints"] for entry in checkpoint["tasks"].values()]
        checkpoints = {Path(e["settings"]["checkpoint"]): e["settings"]["identity"] for e in entries}
        anew = any(path.is_dir() and identity(path) != before for path, before in checkpoints.items())
        return stored.get("asked") == self.asked() and not anew and not any(e.get("num_failed") for e in entries)

    def problems(self, hf: dict[str, Any], world: int) -> Iterator[str]:
        """See Stage. Weights, data files and the keys of each task."""
        yield from weights_problems(self.model.path, hf)
        yield from missing_file_problems((f"tasks.{name}.data", task.data) for name, task in self.chosen.items())
        context = context_length(hf) if hf else None
        if not self.chosen:
            yield "tasks: none is named"
        for name, task in self.chosen.items():
            if task.form is None and name not in get_args(Form):
                yield f"tasks.{name}: no task is called so; set tasks.{name}.form to one of {', '.join(get_args(Form))}"
            if context is not None and task.max_tokens is not None and task.max_tokens >= context:
                key = f"tasks.{name}.max_tokens = {task.max_tokens}"
                yield f"{key} leaves no room for a prompt in the model's context of {context}"
            if task.wording is not None and "{{" not in task.wording:
                yield f"tasks.{name}.wording: has no {{{{ question }}}}"
            if "/" in name or name.startswith("."):
                yield f"tasks.{name}: the name becomes a directory; use letters, digits and _"
        for path in self.others:
            if path.is_file() or not is_given(path):
                yield f"others: {path} is no directory; give an HF directory or a run directory"
        yield from generator_problems(self.rollout, world, hf, together=False)
