"""The outcome of an evaluation: a row a prompt, the summary over them, files and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r1mega.errors import DataError
from r1mega.evaluate.metrics import Estimate, McNemar, majority, mcnemar, paired_bootstrap, pass_at_1, pass_at_k
from r1mega.observe.files import write_atomic
from r1mega.reward.extract import final_answer
from r1mega.reward.math import decide
from r1mega.types import RewardStatus, RolloutGroup


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One prompt and its samples. correct, well_formed: None where the reward could not be computed.

    consensus: the majority answer, None when no sample has one; consensus_correct: its verdict (no answer is wrong),
    None for prompts without a gold answer, such as code, or when no member of the majority was judged.
    """

    prompt_id: str
    question: str
    golds: tuple[str, ...]
    kind: str
    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
    answers: tuple[str | None, ...]
    correct: tuple[bool | None, ...]
    well_formed: tuple[bool | None, ...]
    consensus: str | None
    consensus_correct: bool | None

    @property
    def judged(self) -> tuple[bool, ...]:
        """The verdicts that there are."""
        return tuple(verdict for verdict in self.correct if verdict is not None)


def evaluation_row(group: RolloutGroup) -> EvaluationRow:
    """Grade a scored group. A sample is correct when its accuracy part is 1, well formed when its format part is 1."""
    answers = tuple(final_answer(text) for text in group.texts)
    correct = tuple(_part(reward, "accuracy") for reward in group.rewards)
    members = majority(answers, _equal_by_rule) if group.prompt.answers else []
    verdict = next((correct[i] for i in members if correct[i] is not None), None)
    if group.prompt.answers and not members:
        verdict = False
    return EvaluationRow(
        prompt_id=group.prompt.id,
        question=group.prompt.question,
        golds=group.prompt.answers,
        kind=group.prompt.kind,
        texts=group.texts,
        lengths=tuple(len(response.token_ids) for response in group.responses),
        truncated=tuple(response.finish_reason == "length" for response in group.responses),
        answers=answers,
        correct=correct,
        well_formed=tuple(_part(reward, "format") for reward in group.rewards),
        consensus=answers[members[0]] if members else None,
        consensus_correct=verdict,
    )


def _part(reward: Any, name: str) -> bool | None:
    return reward.parts[name] >= 1.0 if reward.status == RewardStatus.OK and name in reward.parts else None


def _equal_by_rule(first: str, second: str) -> bool:
    """Equality of two answers on the math reward's fast path; what only algebra could decide counts as different."""
    return decide((first,), second).equal is True


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Rows and how they came about. settings: checkpoint, data, sampling (JSON types); seconds: wall time."""

    rows: tuple[EvaluationRow, ...]
    num_samples: int
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> Estimate | None:
        """pass@1 over the prompts with at least one judged sample; None when there is none."""
        judged = [row.judged for row in self.rows if row.judged]
        return pass_at_1(judged) if judged else None

    @property
    def consensus(self) -> float | None:
        """cons@k: accuracy of the majority answers; None without prompts that have gold answers."""
        return _mean([row.consensus_correct for row in self.rows])

    def pass_at(self, k: int) -> float | None:
        """pass@k over the prompts with at least k judged samples; None when there is none."""
        judged = [row.judged for row in self.rows if len(row.judged) >= k]
        return _mean([pass_at_k(len(verdicts), sum(verdicts), k) for verdicts in judged])

    @property
    def excluded_fraction(self) -> float:
        """Samples whose reward could not be computed."""
        verdicts = [verdict for row in self.rows for verdict in row.correct]
        return verdicts.count(None) / len(verdicts) if verdicts else 0.0

    def metrics(self) -> dict[str, float]:
        """The summary under the names of observe/registry.py; what is not defined is left out."""
        accuracy = self.accuracy
        values = {
            "eval/accuracy": accuracy and accuracy.value,
            "eval/accuracy_low": accuracy and accuracy.low,
            "eval/accuracy_high": accuracy and accuracy.high,
            "eval/format": _mean([verdict for row in self.rows for verdict in row.well_formed]),
            "eval/length_mean": _mean([length for row in self.rows for length in row.lengths]),
            "eval/truncated_fraction": _mean([cut for row in self.rows for cut in row.truncated]),
            "eval/excluded_fraction": self.excluded_fraction,
            "eval/prompts": float(len(self.rows)),
        }
        if self.num_samples > 1:
            values["eval/consensus"] = self.consensus
            values[f"eval/pass_at_{self.num_samples}"] = self.pass_at(self.num_samples)
        return {name: value for name, value in values.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Summary first, then settings and rows: what `write_result` stores."""
        return {
            "summary": self.metrics(),
            "settings": dict(self.settings),
            "num_samples": self.num_samples,
            "seconds": self.seconds,
            "rows": [asdict(row) for row in self.rows],
        }


def merge_results(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """One result of those of several ranks (disjoint prompts, the same settings). Sums are exact, so its metrics do
    not depend on how the prompts were divided.
    """
    rows = tuple(sorted((row for result in results for row in result.rows), key=lambda row: row.prompt_id))
    return EvaluationResult(rows, results[0].num_samples, max(r.seconds for r in results), results[0].settings)


def write_result(result: EvaluationResult, path: Path) -> None:
    """Store a result as one JSON file (atomically)."""
    write_atomic(path, json.dumps(result.to_json(), ensure_ascii=False, indent=1) + "\n")


def read_result(path: Path) -> EvaluationResult:
    """A stored result; DataError when the file is missing or something else."""
    try:
        stored = json.loads(Path(path).read_text())
        rows = tuple(
            EvaluationRow(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
            for row in stored["rows"]
        )
        return EvaluationResult(rows, stored["num_samples"], stored["seconds"], stored["settings"])
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the results file of an evaluation ({error!r})") from error


@dataclass(frozen=True, slots=True)
class Comparison:
    """Second against first on the prompts that both answered. difference: of pass@1; test: of the first samples."""

    num_prompts: int
    difference: Estimate
    test: McNemar


def compare_results(first: EvaluationResult, second: EvaluationResult) -> Comparison:
    """Pair two results by prompt id. DataError when they share no judged prompt."""
    judged = {row.prompt_id: row.judged for row in first.rows if row.judged}
    pairs = [(judged[r.prompt_id], r.judged) for r in second.rows if r.judged and r.prompt_id in judged]
    if not pairs:
        raise DataError("the two results share no prompt: compare checkpoints on the same data file")
    means = [[math.fsum(verdicts) / len(verdicts) for verdicts in side] for side in zip(*pairs, strict=True)]
    heads = [[verdicts[0] for verdicts in side] for side in zip(*pairs, strict=True)]
    return Comparison(len(pairs), paired_bootstrap(*means), mcnemar(*heads))


def format_table(result: EvaluationResult) -> str:
    """The summary for a terminal."""
    accuracy, values = result.accuracy, result.metrics()
    lines = [("prompts x samples", f"{len(result.rows)} x {result.num_samples}")]
    if accuracy is not None:
        lines.append(("pass@1", f"{accuracy.value:.4f}  (95% interval {accuracy.low:.4f} - {accuracy.high:.4f})"))
    if result.num_samples > 1:
        for label, name in (("pass", f"eval/pass_at_{result.num_samples}"), ("cons", "eval/consensus")):
            if name in values:
                lines.append((f"{label}@{result.num_samples}", f"{values[name]:.4f}"))
    for label, name, form in (
        ("format", "eval/format", "{:.4f}"),
        ("length", "eval/length_mean", "{:.1f} tokens"),
        ("truncated", "eval/truncated_fraction", "{:.4f}"),
    ):
        if name in values:
            lines.append((label, form.format(values[name])))
    if result.excluded_fraction > 0:
        lines.append(("not judged", f"{result.excluded_fraction:.4f} of the samples (reward failed; not counted)"))
    lines.append(("time", f"{result.seconds:.1f} s"))
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
