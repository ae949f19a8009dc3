"""Two checkpoints on the same problems: paired differences, from what their evaluations left on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.errors import ConfigError, DataError
from r1mega.evaluate.metrics import Estimate, McNemar, mcnemar, paired_bootstrap, sign_flip_test
from r1mega.evaluate.result import EvaluationResult, read_result
from r1mega.evaluate.table import Table

RESULTS_FILE = "results.json"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Second against first on the prompts that both answered.

    first, second: pass@1 on those prompts. difference: second - first with its bootstrap interval; p_value: of no
    difference, by flipping signs within prompts; test: McNemar's exact one, on the first samples alone.
    """

    num_prompts: int
    first: float
    second: float
    difference: Estimate
    p_value: float
    test: McNemar


def compare_results(first: EvaluationResult, second: EvaluationResult) -> Comparison:
    """Pair two results by prompt id. DataError when they share no judged prompt, or an id stands for two questions."""
    by_id = {row.prompt_id: row for row in first.rows if row.judged}
    pairs = [(by_id[row.prompt_id], row) for row in second.rows if row.judged and row.prompt_id in by_id]
    if not pairs:
        raise DataError("the two results share no prompt: compare checkpoints on the same data file")
    for a, b in pairs:
        if (a.question, a.golds) != (b.question, b.golds):
            raise DataError(f"prompt {a.prompt_id} is another question in the second result: not the same data file")
    means = [[math.fsum(row.judged) / len(row.judged) for row in side] for side in zip(*pairs, strict=True)]
    heads = [[row.judged[0] for row in side] for side in zip(*pairs, strict=True)]
    return Comparison(
        len(pairs),
        math.fsum(means[0]) / len(pairs),
        math.fsum(means[1]) / len(pairs),
        paired_bootstrap(*means),
        sign_flip_test(*means),
        mcnemar(*heads),
    )


def read_results(path: Path, checkpoint: str | None = None) -> tuple[str, dict[str, EvaluationResult]]:
    """(name, results by task) of one checkpoint, from the run directory of an evaluation, its results.json, or the
    output file of `r1mega eval` (whose task is called "prompts").

    checkpoint: which one, where there are several. Raises DataError, ConfigError.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    try:
        stored: Mapping[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(stored, dict) or "checkpoints" not in stored:
        result = read_result(path)
        return str(result.settings.get("checkpoint", path)), {"prompts": result}
    names = [entry["name"] for entry in stored["checkpoints"]]
    if checkpoint is None and len(names) > 1:
        raise ConfigError(f"{path} has several checkpoints: say which by --first or --second, of {', '.join(names)}")
    if checkpoint is not None and checkpoint not in names:
        raise ConfigError(f"{path} has no checkpoint {checkpoint!r}; it has {', '.join(names)}")
    entry = stored["checkpoints"][names.index(checkpoint) if checkpoint is not None else 0]
    results = {name: read_result(path.parent / task["file"]) for name, task in entry["tasks"].items()}
    return entry["name"], results


def comparison_table(
    first: tuple[str, Mapping[str, EvaluationResult]], second: tuple[str, Mapping[str, EvaluationResult]]
) -> Table:
    """A row for each judged task that both have. DataError when there is none."""
    columns = ("task", "problems", first[0], second[0], "difference", "95% interval", "p", "only first", "only second")
    rows = []
    for name, result in first[1].items():
        if name not in second[1] or result.accuracy is None or second[1][name].accuracy is None:
            continue
        c = compare_results(result, second[1][name])
        rows.append((
            name, str(c.num_prompts), f"{c.first:.4f}", f"{c.second:.4f}", f"{c.difference.value:+.4f}",
            f"{c.difference.low:+.4f} to {c.difference.high:+.4f}", f"{c.p_value:.4f}", str(c.test.only_first),
            str(c.test.only_second),
        ))  # fmt: skip
    if not rows:
        raise DataError(f"no task is judged in both: {', '.join(first[1])} and {', '.join(second[1])}")
    return Table(f"{second[0]} against {first[0]}", columns, tuple(rows))
