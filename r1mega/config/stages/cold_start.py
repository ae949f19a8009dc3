"""Stage `cold_start`: a small set of readable reasoning, made from R1-Zero's. The SFT on it is a stage `sft`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from r1mega.config.data_factory import DataFactoryStage
from r1mega.config.model_files import context_length
from r1mega.config.schema import NonNegative, Positive, PositiveInt, Section
from r1mega.config.validate import is_given, missing_file_problems


class Prompting(Section):
    """One way of asking. share: of the prompts, relative to the other ways'."""

    template: str | None = None  # None: data.template
    few_shot: Path | None = None  # SFT lines that stand before the question, as examples of long reasoning
    separator: str = "\n\n"  # between examples
    response_prefix: str = ""  # the response's own beginning, given to the model
    share: Positive = 1.0


class RewriteRule(Section):
    """re.sub(pattern, replace). language: only in responses to prompts of that language; None: in all."""

    pattern: str
    replace: str = ""
    language: str | None = None


class RewriteModel(Section):
    """A model that rewrites what the rules have left. None of its output is trusted: it is verified again."""

    path: Path | None = None  # an HF directory; None: no such step
    prompt: str = (
        "Rewrite this solution so that it is easy to read, in one language, without changing what it concludes. Keep "
        "the tags.\n\nProblem: {{ question }}\n\nSolution: {{ response }}\n\nRewritten solution:"
    )  # Jinja2
    temperature: NonNegative = 0.0
    max_tokens: PositiveInt = 8192  # what does not fit into its context beside the prompt is left out, and counted


class RewriteConfig(Section):
    """From a correct response to a readable one, in this order. What comes out is verified again."""

    repair_tags: bool = True  # a tag that was left out is put where it must have been
    rules: tuple[RewriteRule, ...] = ()
    model: RewriteModel = RewriteModel()
    form: str = "<think>\n{{ reasoning }}\n</think>\n<answer>{{ summary }}</answer>"
    # Jinja2; paper: |special_token|reasoning|special_token|summary


class ColdStartStage(DataFactoryStage):
    """Samples of R1-Zero by several ways of asking, filtered, rewritten, and filtered again (recipe: stage 1)."""

    outputs: ClassVar[tuple[str, ...]] = ("data/train.jsonl", "data/train.parquet", "data/card.json", "data/card.md")

    stage: Literal["cold_start"]
    prompting: tuple[Prompting, ...] = (Prompting(),)
    rewrite: RewriteConfig = RewriteConfig()
    max_per_prompt: PositiveInt = 1
    max_samples: PositiveInt | None = 10_000  # paper: thousands

    def problems(self, hf: dict[str, Any], world: int) -> Iterator[str]:
        """See Stage. Also few-shot files, rewriting rules and the model that rewrites."""
        yield from super().problems(hf, world)
        yield from missing_file_problems(("prompting.few_shot", p.few_shot) for p in self.prompting if p.few_shot)
        for rule in self.rewrite.rules:
            try:
                re.compile(rule.pattern)
            except re.error as error:
                yield f"rewrite.rules: {rule.pattern!r} is no regular expression ({error})"
        if (path := self.rewrite.model.path) is not None and not is_given(path / "config.json"):
            yield f"rewrite.model.path = {path}: no HF model directory (config.json is missing)"
        elif path is not None and (path / "config.json").is_file():
            context = context_length(json.loads((path / "config.json").read_text()))
            if context is not None and self.rewrite.model.max_tokens >= context:
                key = f"rewrite.model.max_tokens = {self.rewrite.model.max_tokens}"
                yield f"{key} leaves no room for a prompt in the model's context of {context}"
