"""Which sampled responses become data: one named filter a reason, each counting what it takes."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from r1mega.config.data_factory import FilterConfig
from r1mega.data.language import chain_of_thought, language_share, mixes_languages
from r1mega.data.words import ngrams, split_words

LINE_KEYS = (
    "id", "prompt_id", "question", "response", "kind", "language", "template", "source", "licence", "tokens",
)  # fmt: skip
"""What a line of a data file holds of a candidate."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response that may become a training sample.

    scored: whether its reward has a value; parts: the reward's, unweighted. tokens: of the response. merged: taken from a file
    of general data, not sampled.
    """

    id: str
    prompt_id: str
    question: str
    response: str
    kind: str
    language: str | None
    template: str
    source: str
    tokens: int
    truncated: bool = False
    scored: bool = True
    parts: dict[str, float] = field(default_factory=dict)
    licence: str = "unknown"
    merged: bool = False

    def line(self) -> dict[str, Any]:
        """The sample as a line of a data file."""
        return {name: getattr(self, name) for name in LINE_KEYS}


Takes = Callable[[Candidate], bool]
"""Whether a filter takes the candidate out."""

_CODE_BLOCK = re.compile(r"```|~~~|^(?: {4}|\t)(?:def|for|while|if|import|class|return)\b", re.MULTILINE)
_PARAGRAPHS = re.compile(r"\n\s*\n|\n")
_TAG = re.compile(r"</?\s*(?:think|answer)\s*>", re.IGNORECASE)


def build_filters(config: FilterConfig) -> list[tuple[str, Takes]]:
    """(name, filter) in the order in which they run; those that the config switches off are left out."""
    filters: list[tuple[str, Takes | None]] = [
        ("unscored", lambda c: not c.scored),
        ("truncated", (lambda c: c.truncated) if config.truncated else None),
        *((f"low {name}", _below(name, least)) for name, least in config.min_parts.items()),
        ("length", lambda c: not config.min_tokens <= c.tokens <= (config.max_tokens or math.inf)),
        ("unreadable", (lambda c: is_unreadable(c.response)) if config.unreadable else None),
        ("mixed language", (lambda c: mixes_languages(c.response)) if config.mixed_language else None),
        ("other language", _off_language(config.min_language_share) if config.min_language_share > 0 else None),
        ("long paragraph", _longer_paragraph(config.max_paragraph_chars) if config.max_paragraph_chars else None),
        ("code block", (lambda c: has_code_block(c.response)) if config.code_blocks else None),
        ("repetition", lambda c: repeated_share(c.response, config.repetition_ngram) > config.max_repeated_share),
    ]
    return [(name, takes) for name, takes in filters if takes is not None]


@dataclass(frozen=True, slots=True)
class FilterCount:
    """A step of the funnel: what came in, what it took."""

    name: str
    seen: int
    taken: int


def first_takers(filters: Sequence[tuple[str, Takes]], candidates: Sequence[Candidate]) -> list[int]:
    """For each candidate, the place of the first filter that takes it; the number of filters for one that passes all."""
    return [next((i for i, (_, takes) in enumerate(filters) if takes(c)), len(filters)) for c in candidates]


def apply_filters(
    candidates: Sequence[Candidate], filters: Sequence[tuple[str, Takes]], takers: Sequence[int] | None = None
) -> tuple[list[Candidate], list[FilterCount]]:
    """What passes all filters, in order, and the count of each; a candidate counts at the first that takes it. takers: what
    `first_takers` says, where it was asked elsewhere.
    """
    takers = first_takers(filters, candidates) if takers is None else takers
    taken, seen, counts = Counter(takers), len(candidates), []
    for place, (name, _) in enumerate(filters):
        counts.append(FilterCount(name, seen, taken[place]))
        seen -= taken[place]
    return [c for c, taker in zip(candidates, takers, strict=True) if taker == len(filters)], counts


def is_unreadable(response: str) -> bool:
    """Control or replacement characters, reasoning without a letter or digit, or with tags inside."""
    reasoning = chain_of_thought(response)
    if any(unicodedata.category(c) in ("Cc", "Co", "Cs", "Cn") and c not in "\n\t\r" for c in response):
        return True
    wordless = not any(map(str.isalnum, reasoning))
    return wordless or "\N{REPLACEMENT CHARACTER}" in response or bool(_TAG.search(reasoning))


def has_code_block(response: str) -> bool:
    """Fenced code, or lines that are indented code, in the reasoning."""
    return bool(_CODE_BLOCK.search(chain_of_thought(response)))


def longest_paragraph(response: str) -> int:
    """Characters of the longest paragraph (a line, or lines up to an empty one) of the reasoning."""
    return max(len(part) for part in _PARAGRAPHS.split(chain_of_thought(response)))


def repeated_share(response: str, ngram: int) -> float:
    """The share of the response's word n-grams that occurred before in it, in [0, 1)."""
    grams = ngrams(split_words(response), ngram)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _below(part: str, least: float) -> Takes:
    """Prompts whose kind has no such part pass."""
    return lambda c: c.parts.get(part, least) < least


def _longer_paragraph(limit: int) -> Takes:
    return lambda c: longest_paragraph(c.response) > limit


def _off_language(least: float) -> Takes:
    """Prompts without a language pass."""
    return lambda c: c.language is not None and language_share(chain_of_thought(c.response), c.language) < least
