"""Results as tables, for a terminal and as Markdown: of one evaluation, of checkpoints and tasks, of comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from r1mega.evaluate.result import EvaluationResult

NO_VALUE = "–"
WIDEST = 200


@dataclass(frozen=True, slots=True)
class Table:
    """A heading and rows of cells, all texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A Markdown table; the title is not part of it."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)

    def print(self, stream: IO[str] | None = None) -> None:
        """The same for a terminal or a log; columns without a value are left out."""
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        kept = [i for i in range(len(self.columns)) if any(row[i] != NO_VALUE for row in self.rows)]
        table = RichTable(title=self.title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
        for i in kept:
            heading = self.columns[i].replace(" ", "\n")  # narrow columns; nothing else is folded, and nothing cut
            table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(row[i]) for i in kept))
        Console(file=stream, width=WIDEST).print(table)


def results_table(checkpoints: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Of the `checkpoints` of a results.json: a row a checkpoint and task."""
    figures = ("pass@1", "95% interval", "pass@k", "cons@k", "tokens", "cut", "rating")
    columns = ("task", "checkpoint", "problems x k", *figures)
    names = list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint["tasks"]))
    rows = [
        (name, checkpoint["name"], *_cells(checkpoint["tasks"][name]))
        for name in names
        for checkpoint in checkpoints
        if name in checkpoint["tasks"]
    ]
    return Table(title, columns, tuple(rows))


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    values, k = entry["metrics"], entry["num_samples"]

    def cell(name: str, form: str = "{:.3f}") -> str:
        return form.format(values[name]) if name in values else NO_VALUE

    low, high = cell("eval/accuracy_low"), cell("eval/accuracy_high")
    rating = cell("eval/rating", "{:.0f}")
    if rating != NO_VALUE:
        rating += f" ({cell('eval/rating_low', '{:.0f}')}-{cell('eval/rating_high', '{:.0f}')})"
    return (
        f"{entry['num_prompts']} x {k}",
        cell("eval/accuracy") if "eval/accuracy" in values else "not judged here",
        f"{low}-{high}" if low != NO_VALUE else NO_VALUE,
        cell(f"eval/pass_at_{k}"),
        cell("eval/consensus"),
        cell("eval/length_mean", "{:.0f}"),
        cell("eval/truncated_fraction"),
        rating,
    )


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
