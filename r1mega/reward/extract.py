"""The final answer of a response: last well-formed `\\boxed{}`, `<answer>...</answer>` or GSM8K's `#### 42`."""

from __future__ import annotations

import re
from typing import Literal

from r1mega.reward.expression.compare import same_answer
from r1mega.reward.expression.tokens import UnreadableError

AnswerForm = Literal["any", "boxed", "tag"]
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(
    r"-?\\[dtc]?frac\s*\d\s*\d|-?\\sqrt\s*\d|-?\\[A-Za-z]+(?=\s*[^A-Za-z\s])|-?\\[A-Za-z]+|[\w.,/-]+"
)  # after \boxed without braces
_JOINING = r"(?:\b(?:and(?:\s+finally)?|or(?:\s+else)?|also|as\s+well\s+as)\b|或者?|[和与及])"
_NAME = (  # of what a box is the value: x =, \alpha =, x_1 = $, f(1) =
    r"(?:(?<![A-Za-z\\])(?P<name>(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w\}?)?(?:\(-?\w\))?)\s*=\s*(?:\$|\\\()?\s*)"
)
_BETWEEN_BOXES = re.compile(  # of one answer: x = \boxed{1}, \text{ and } y = \boxed{2}; lines of a list
    rf"(?:[\s,;.、，；。/|&$*•]|-(?=\s)|\\[\\()\[\],; ]|\\(?:quad|qquad|lor|vee)(?![A-Za-z])|{_JOINING}"
    rf"|\\(?:text|mathrm|textbf|mbox)\s*\{{[\s,;]*{_JOINING}?[\s,;]*\}})*+{_NAME}?"
)
_NAME_BEFORE = re.compile(rf"{_NAME}$")
_MAX_NAME = 40  # characters before a box that may name it
_HASHES = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_HASHED_NUMBER = re.compile(r"[-+−]?\s*\\?\$?\s*[-+−]?[\d,]*\.?\d+(?:/\d+)?\s*(?:\\?%)?\.?")
_TURN_END = re.compile(r"(?:<\|\w{1,32}\|>|</s>)\s*$")
MAX_BOXES = 32  # looked at from the end: a response that repeats an open box must not cost quadratic time
MAX_BOX_CHARS = 10_000
_CLOSE_TAG = "</answer>"
_OPEN_TAG = "<answer>"
_THINK_END = "</think>"
_WHOLE_TAG = re.compile(r"^\s*<answer>(.*)</answer>\s*$", re.DOTALL)


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` whose braces close (or `\\boxed 5`); None when there is none."""
    for match in reversed(list(_BOX.finditer(text))[-MAX_BOXES:]):
        if (box := _content(text, match.end())) is not None:
            return box[0]
    return None


def boxed_answer(text: str) -> str | None:
    """Content of the last box; where an answer has a box for each item (`\\boxed{2}, \\boxed{3} and \\boxed{5}`),
    that of all of them as a list. Boxes belong together when nothing but commas, bullets, 'and', 'or' and names (`y =`)
    stands between them; the same answer twice is one. Where all are named, and not all alike, each keeps its name.
    """
    items: list[str] = []
    names: list[tuple[str, str]] = []
    begin = 0  # of the group's box that was met last
    for match in reversed(list(_BOX.finditer(text))[-MAX_BOXES:]):
        box = _content(text, match.end())
        if box is None:
            if items:
                break
            continue
        content, end = box
        if items and not (match.start() < end <= begin and _BETWEEN_BOXES.fullmatch(text, end, begin)):
            break
        if content.strip() not in items and not (items and _same_content(content.strip(), items[0])):
            items.insert(0, content.strip())
        begin = match.start()
        name = _NAME_BEFORE.search(text, max(0, begin - _MAX_NAME), begin)
        names.insert(0, (name["name"] if name else "", content.strip()))
    if len(dict(names)) > 1 and all(name for name, _ in names):
        return ", ".join(content if "=" in content else f"{name} = {content}" for name, content in names)
    return ", ".join(items) if items else None


def _same_content(content: str, other: str) -> bool:
    """x = 7 and 7, 1/2 and 0.5."""
    try:
        return same_answer(content, other) is True and same_answer(other, content) is True
    except (UnreadableError, RecursionError):
        return False


def _content(text: str, start: int) -> tuple[str, int] | None:
    """What the box whose command ends at `start` holds, and where it ends; None where its braces do not close."""
    if text[start : start + 1] == "{":
        end = _closing_brace(text, start)
        return None if end is None else (text[start + 1 : end], end + 1)
    bare = _BARE.match(text, start)
    if not bare:
        return None
    end = bare.end()
    while bare.group().lstrip("-").startswith("\\") and text[end : end + 1] == "{":  # \boxed\frac{1}{2}
        closing = _closing_brace(text, end)
        if closing is None:
            return None
        end = closing + 1
    content = text[start:end].rstrip(".,")
    return content, start + len(content)


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


def last_hashed(text: str) -> str | None:
    """What follows the last `####` in GSM8K's own form: a number alone on the rest of the line, or whatever stands on
    the last line. A heading of Markdown is none.
    """
    for match in reversed(list(_HASHES.finditer(text))[-MAX_BOXES:]):
        content = _TURN_END.sub("", match.group(1)).strip()
        if content and (_HASHED_NUMBER.fullmatch(content) or not text[match.end() :].strip()):
            return content
    return None


def final_answer(text: str, form: AnswerForm = "any") -> str | None:
    """The final answer in the asked form. Reasoning never counts as an answer: what stands before `</think>`, all of
    it while an opened `<think>` is not closed.

    'any': the tag when there is one, else the box, else what follows `####`. A box inside the tag is unwrapped. None:
    no well-formed answer.
    """
    if _THINK_END in text:
        text = text[text.rfind(_THINK_END) + len(_THINK_END) :]
    elif "<think>" in text:
        return None
    if form != "boxed":
        tagged = last_tagged(text)
        if tagged is not None:
            boxed = boxed_answer(tagged)
            return (tagged if boxed is None else boxed).strip()
        if form == "tag" or _OPEN_TAG in text:
            return None
    found = boxed_answer(text)
    if found is None and form == "any" and not _BOX.search(text):
        found = last_hashed(text)
    return None if found is None else found.strip()
