"""Format reward: exactly one `<think>...</think>`, then exactly one `<answer>...</answer>`, and nothing else."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_TAG_LIKE = re.compile(r"<\s{0,8}/?\s{0,8}(?:think|answer)\b[^<>]{0,64}>", re.IGNORECASE)
_VISIBLE = re.compile(r"[^\W_\u115f\u1160\u3164\uffa0]|[∅∞]")  # Hangul fillers are letters that nobody sees


@dataclass(frozen=True, slots=True)
class FormatVerdict:
    """value in [0, 1]; problems: what is wrong, empty for a well-formed response."""

    value: float
    problems: tuple[str, ...]


def check_format(
    text: str, mode: Literal["strict", "graded"] = "strict", prompt_opens_think: bool = False
) -> FormatVerdict:
    """Strict: 1 or 0. Graded: a quarter for each tag that occurs exactly once, half at most while anything else is
    wrong.

    prompt_opens_think: the prompt already ended in `<think>`, so the response must not open it again.
    """
    if prompt_opens_think:
        text = "<think>" + text
    problems = _problems(text)
    if not problems:
        return FormatVerdict(1.0, ())
    if mode == "strict":
        return FormatVerdict(0.0, problems)
    own = TAGS[1:] if prompt_opens_think else TAGS
    share = sum(text.count(tag) == 1 for tag in own) / len(own)
    return FormatVerdict(0.5 * share, problems)


def _problems(text: str) -> tuple[str, ...]:
    counts = {tag: text.count(tag) for tag in TAGS}
    problems = [
        f"{tag} occurs {count} times" if count else f"{tag} is missing" for tag, count in counts.items() if count != 1
    ]
    # compatibility forms and invisible characters make tags that only look like tags
    folded = (
        text
        if text.isascii()
        else "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    )
    if len(_TAG_LIKE.findall(folded)) > sum(counts.values()):
        problems.append("a tag in another spelling")
    if problems:
        return tuple(problems)
    positions = [text.index(tag) for tag in TAGS]
    if positions != sorted(positions):
        return ("the tags are out of order",)
    before, thinking, between, answer, after = re.split("|".join(TAGS), text)
    if not _VISIBLE.search(thinking):
        problems.append("the reasoning is empty")
    if not _VISIBLE.search(answer):
        problems.append("the answer is empty")
    for name, part in (
        ("before <think>", before),
        ("between </think> and <answer>", between),
        ("after </answer>", after),
    ):
        if part.strip():
            problems.append(f"text {name}")
    return tuple(problems)
