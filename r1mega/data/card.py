"""The data card, as JSON and Markdown: what came in, what each filter took, the mix, lengths, languages, licences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1mega.data.filters import Candidate, FilterCount
from r1mega.data.rows import content_hash, read_rows
from r1mega.errors import DataError
from r1mega.files import write_atomic

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that went in. lines: its rows, bad ones too; sha256: of its content; licence: 'unknown'
    when nobody said.
    """

    path: str
    role: str
    lines: int
    licence: str
    sha256: str


def describe_file(path: Path, role: str, licences: Mapping[str, str]) -> InputFile:
    """role: prompts, general or evaluation."""
    path = Path(path)
    return InputFile(str(path), role, _count_rows(path), licences.get(str(path), "unknown"), content_hash(path))


def _count_rows(path: Path) -> int:
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    bad: list[DataError] = []
    return sum(1 for _ in read_rows(path, on_bad_line=bad.append)) + len(bad)


def build_card(
    *,
    title: str,
    made_by: Mapping[str, Any],
    inputs: Sequence[InputFile],
    funnel: Sequence[FilterCount],
    kept: Sequence[Candidate],
) -> dict[str, Any]:
    """The card as JSON types. The same data give the same card: it holds no time and no machine."""
    return {
        "title": title,
        "made_by": dict(made_by),
        "inputs": [asdict(file) for file in inputs],
        "funnel": [asdict(count) for count in funnel],
        "samples": len(kept),
        "prompts": len({c.prompt_id for c in kept}),
        "mix": _shares(kept, _part),
        "kinds": _shares(kept, lambda c: c.kind),
        "languages": _shares(kept, lambda c: c.language or "unknown"),
        "sources": _shares(kept, lambda c: c.source),
        "licences": _shares(kept, lambda c: c.licence),
        "response_tokens": {name: _quantiles(group) for name, group in _groups(kept).items()},
    }


def write_card(card: Mapping[str, Any], directory: Path) -> None:
    """directory/card.json and directory/card.md."""
    write_atomic(directory / "card.json", json.dumps(card, ensure_ascii=False, indent=1) + "\n")
    write_atomic(directory / "card.md", card_markdown(card))


def card_markdown(card: Mapping[str, Any]) -> str:
    """The card for a reader."""
    parts = [f"# {card['title']}\n\n{card['samples']} samples of {card['prompts']} prompts.\n"]
    parts.append(_table("Made by", ("key", "value"), [(k, v) for k, v in card["made_by"].items()]))
    files = [(f["role"], f["path"], f["lines"], f["licence"], f["sha256"][:12]) for f in card["inputs"]]
    parts.append(_table("Inputs", ("role", "file", "lines", "licence", "sha256"), files))
    funnel = [(f["name"], f["seen"], f["taken"], _percent(f["taken"], f["seen"])) for f in card["funnel"]]
    parts.append(_table("What each filter took", ("filter", "in", "taken", "share"), funnel))
    for name in ("mix", "kinds", "languages", "sources", "licences"):
        rows = [(key, count, _percent(count, card["samples"])) for key, count in card[name].items()]
        parts.append(_table(name.capitalize(), (name, "samples", "share"), rows))
    lengths = [(name, *values.values()) for name, values in card["response_tokens"].items()]
    parts.append(_table("Length of responses (tokens)", ("part", *_quantile_names()), lengths))
    return "\n".join(parts)


def _part(candidate: Candidate) -> str:
    """Of the mix. What was sampled is reasoning, also where a judge stood in for a rule (kind `general`)."""
    return "general" if candidate.merged else "reasoning"


def _shares(kept: Sequence[Candidate], name: Callable[[Candidate], str]) -> dict[str, int]:
    return dict(sorted(Counter(map(name, kept)).items()))


def _groups(kept: Sequence[Candidate]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for candidate in kept:
        groups.setdefault(_part(candidate), []).append(candidate.tokens)
    return dict(sorted(groups.items()))


def _quantile_names() -> list[str]:
    return [f"{q:.0%}" for q in QUANTILES]


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    """The value below which a share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return {name: ordered[round(q * (len(ordered) - 1))] for name, q in zip(_quantile_names(), QUANTILES, strict=True)}


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"
