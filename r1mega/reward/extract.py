"""The final answer of a response: last well-formed `\\boxed{}` or `<answer>...</answer>`."""

from __future__ import annotations

import re
from typing import Literal

AnswerForm = Literal["any", "boxed", "tag"]
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
MAX_BOXES = 32  # looked at from the end: a response that repeats an open box must not cost quadratic time
MAX_BOX_CHARS = 10_000
_CLOSE_TAG = "</answer>"
_OPEN_TAG = "<answer>"
_THINK_END = "</think>"
_WHOLE_TAG = re.compile(r"^\s*<answer>(.*)</answer>\s*$", re.DOTALL)


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` whose braces close (or `\\boxed 5`); None when there is none."""
    for match in reversed(list(_BOX.finditer(text))[-MAX_BOXES:]):
        start = match.end()
        if start < len(text) and text[start] == "{":
            end = _closing_brace(text, start)
            if end is not None:
                return text[start + 1 : end]
        elif start > match.start() and (bare := re.match(r"[\w.,/-]+", text[start:])) and text[start - 1].isspace():
            return bare.group().rstrip(".,")
    return None


def _closing_brace(text: str, start: int) -> int | None:
    depth = 0
    position = start
    while position < min(len(text), start + MAX_BOX_CHARS):
        char = text[position]
        if char == "\\":
            position += 1  # \{ and \} do not group
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def last_tagged(text: str) -> str | None:
    """Content of the last closed `<answer>...</answer>`; None when there is none or it holds another tag."""
    end = text.rfind(_CLOSE_TAG)
    start = text.rfind(_OPEN_TAG, 0, max(end, 0))
    if start < 0 or end < 0:
        return None
    content = text[start + len(_OPEN_TAG) : end]
    return (
        None
        if "<answer>" in content or "</answer>" in content or "<think>" in content or _THINK_END in content
        else content
    )


def final_text(text: str, prompt_opens_think: bool = False) -> str:
    """What the user reads: the text after the reasoning, without answer tags. Empty while the reasoning is open."""
    if (prompt_opens_think or "<think>" in text) and _THINK_END not in text:
        return ""
    rest = text.rpartition(_THINK_END)[2]
    match = _WHOLE_TAG.match(rest)
    return (match.group(1) if match else rest).strip()


def final_answer(text: str, form: AnswerForm = "any") -> str | None:
    """The final answer in the asked form. Reasoning never counts as an answer: what stands before `</think>`, all of
    it while an opened `<think>` is not closed.

    'any': the tag when there is one, else the box. A box inside the tag is unwrapped. None: no well-formed answer.
    """
    if _THINK_END in text:
        text = text[text.rfind(_THINK_END) + len(_THINK_END) :]
    elif "<think>" in text:
        return None
    if form != "boxed":
        tagged = last_tagged(text)
        if tagged is not None:
            boxed = last_boxed(tagged)
            return (tagged if boxed is None else boxed).strip()
        if form == "tag" or _OPEN_TAG in text:
            return None
    boxed = last_boxed(text)
    return None if boxed is None else boxed.strip()
