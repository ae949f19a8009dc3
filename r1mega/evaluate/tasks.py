"""The evaluation tasks by name: how a file becomes prompts, how they are worded, and how often they are sampled."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from r1mega.config.stages.evaluate import LONGEST_ANSWER
from r1mega.data.record import PromptRecord, UniqueIds, check_keys
from r1mega.data.rows import MMLU_COLUMNS, Row, first_cells, read_rows
from r1mega.data.template import render
from r1mega.data.tokenizer import Tokenizer
from r1mega.errors import DataError
from r1mega.evaluate import forms
from r1mega.evaluate.forms import FormOptions
from r1mega.types import Prompt

logger = logging.getLogger(__name__)

PLAIN = "{{ question }}"
BOXED = "{{ question }}\nPlease reason step by step, and put your final answer within \\boxed{}."  # of the R1 release
CHOICE = (
    "Answer the following multiple choice question. Think step by step, and put the letter of your choice, and nothing "
    "else, within \\boxed{}.\n\n{{ question }}"
)
FUNCTION = (
    "Complete the following Python function. Answer with the whole function, its imports included, in one block of "
    "```python.\n\n{{ question }}"
)
PROGRAM = "Solve the following programming problem in Python. Answer with one block of ```python.\n\n{{ question }}"


@dataclass(frozen=True, slots=True)
class Task:
    """parse: a row of its files -> a record (None: cannot be judged, left out). wording: a Jinja2 text around the
    question, inside of the model's own template. num_samples: k of pass@1 and cons@k, by the size of the set (paper: 4
    to 64); temperature, top_p and max_tokens: the paper's. columns: of a CSV without a header line.
    """

    name: str
    parse: Callable[[Row, FormOptions], PromptRecord | None]
    wording: str
    num_samples: int
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = LONGEST_ANSWER
    columns: tuple[str, ...] | None = None


TASKS = {
    task.name: task
    for task in (
        Task("gsm8k", forms.question_answer, BOXED, num_samples=4),
        Task("math500", forms.question_answer, BOXED, num_samples=4),
        Task("aime24", forms.question_answer, BOXED, num_samples=64),
        Task("aime25", forms.question_answer, BOXED, num_samples=64),
        Task("math", forms.question_answer, BOXED, num_samples=4),
        Task("mmlu", forms.mmlu, CHOICE, num_samples=4, columns=MMLU_COLUMNS),
        Task("gpqa", forms.gpqa, CHOICE, num_samples=8),
        Task("humaneval", forms.humaneval, FUNCTION, num_samples=8),
        Task("mbpp", forms.mbpp, PROGRAM, num_samples=4),
        Task("livecodebench", forms.livecodebench, PROGRAM, num_samples=8),
        Task("codeforces", forms.codeforces, PROGRAM, num_samples=8),
        Task("ifeval", forms.ifeval, PLAIN, num_samples=4),
        Task("swe_bench", forms.swe_bench, PLAIN, num_samples=1),  # a predictions file holds one patch an instance
        Task("prompts", forms.own_prompt, PLAIN, num_samples=4),
    )
}
"""By name. `math` and `prompts` take any file of their form."""


def load_task(
    task: Task, path: Path, options: FormOptions, num_prompts: int | None = None, wording: str | None = None
) -> tuple[PromptRecord, ...]:
    """The records of a file, their questions in the task's wording (or `wording`), the first `num_prompts`.

    Ids that occur again get a suffix, so that each is unique. Raises DataError for a bad row (file:line) and when no
    record is left.
    """
    records: list[PromptRecord] = []
    unique = UniqueIds()
    left_out = 0
    for row in read_rows(path, _columns(task, path)):
        if num_prompts is not None and len(records) == num_prompts:
            break
        record = task.parse(row, options)
        if record is None:
            left_out += 1
            continue
        check_keys(record)
        question = render(wording or task.wording, record.question)
        records.append(dataclasses.replace(record, id=unique(record.id), question=question))
    if left_out:
        logger.warning("%s: %d rows of %s cannot be judged here and were left out", task.name, left_out, path)
    if not records:
        raise DataError(f"{path}: no row of task {task.name} is left")
    return tuple(records)


def pose(records: tuple[PromptRecord, ...], template: str, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """The records in the model's own template (data/template.py), tokenised."""
    return tuple(
        Prompt(
            r.id, r.question, r.answers, r.kind, r.language,
            tuple(tokenizer.encode_prompt(render(template, r.question))), r.metadata,
        )
        for r in records
    )  # fmt: skip


def _columns(task: Task, path: Path) -> tuple[str, ...] | None:
    """Those of the task when a CSV's first line is not a header that names the question."""
    if task.columns is None or not (cells := first_cells(path)):
        return None
    return None if "question" in [cell.lower() for cell in cells[:2]] else task.columns
