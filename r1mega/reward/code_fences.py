"""The program in a response: its fenced blocks, wherever they stand."""

from __future__ import annotations

import re
from collections.abc import Mapping

from r1mega.sandbox.policy import Language

_FENCE = re.compile(
    r"^(?:(?P<lead>[ \t]*(?:(?:>|[-*+]|\d{1,9}[.)])[ \t]+|>)*)|[^\n`]{1,500}[ \t*:])"
    r"(?P<fence>`{3,}|~{3,})[ \t]*(?P<label>[\w+#.-]*)[^\n]*$",
    re.MULTILINE,
)
LANGUAGES: Mapping[Language, tuple[str, ...]] = {
    "python": ("python", "py", "python3"),
    "cpp": ("cpp", "c++", "cc", "cxx", "c"),
}


def code_in(response: str, language: Language = "python") -> str | None:
    """The program: the last fenced block of the final answer (one labelled with the language first), else all of
    the final answer. None: nothing is there. What stands before `</think>` is reasoning and never the answer. A block in
    a list item or a quotation loses what its lines begin with there; one may begin at a line's end, if it is labelled.
    """
    text = response.rsplit("</think>", 1)[-1]
    if "<answer>" in text and "</answer>" in text:
        inner = text[text.rfind("<answer>") + len("<answer>") :]
        text = inner[: inner.find("</answer>")] if "</answer>" in inner else text
    text = text.replace("\r\n", "\n")
    blocks: list[tuple[str, str]] = []
    position = 0
    while opening := _FENCE.search(text, position):
        fence, label = opening["fence"], opening["label"].lower()
        if opening["lead"] is None and not (
            label in LANGUAGES[language] and opening[0].rstrip().lower().endswith(label)
        ):
            position = opening.end()
            continue
        ending = rf"^[ \t>]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*$"
        closing = re.compile(ending, re.MULTILINE).search(text, opening.end())
        end = closing.start() if closing else len(text)
        blocks.append((label, _unquoted(text[opening.end() + 1 : end], opening["lead"] or "")))
        if closing is None:
            break
        position = closing.end()
    labelled = [code for label, code in blocks if label in LANGUAGES[language]]
    code = labelled[-1] if labelled else blocks[-1][1] if blocks else text
    code = code.strip("\n")
    return code if code.strip() else None


def _unquoted(block: str, lead: str) -> str:
    """Lines without the quotation marks and the white space that the fence itself stands behind."""
    lines = block.split("\n")
    for _ in range(lead.count(">")):
        lines = [re.sub(r"^[ \t]*> ?", "", line) for line in lines]
    inner = lead.rpartition(">")[2].removeprefix(" ") if ">" in lead else lead
    return outdented("\n".join(lines), len(inner.expandtabs(4))) if inner else "\n".join(lines)


def outdented(block: str, most: int | None = None) -> str:
    """Lines without as much white space as the first has (columns, at most `most`), as far as each has it."""
    lines = block.split("\n")
    indents = [line[: len(line) - len(line.lstrip(" \t"))].expandtabs(4) for line in lines]
    width = next((len(indent) for indent, line in zip(indents, lines, strict=True) if line.strip()), 0)
    width = width if most is None else min(width, most)
    if width == 0:
        return block
    return "\n".join(indent[width:] + line.lstrip(" \t") for indent, line in zip(indents, lines, strict=True))
