"""The text and the JSON that bytes of a data file hold."""

from __future__ import annotations

import json
import re
from typing import Any

from r1mega.errors import DataError

_WIDE = (
    ("UTF-32", re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff")),
    ("UTF-16", re.compile(rb"\xff\xfe|\xfe\xff")),
    ("UTF-32LE", re.compile(rb"[^\0]\0\0\0")),
    ("UTF-32BE", re.compile(rb"\0\0\0[^\0]")),
    ("UTF-16LE", re.compile(rb"(?:[^\0]\0){2}")),
    ("UTF-16BE", re.compile(rb"(?:\0[^\0]){2}")),
)
"""Encodings of more than a byte a character, by the first bytes: a byte order mark, or two Latin characters without one."""


def parse_json(content: bytes, where: str) -> Any:
    """The value of a text of JSON, with a byte order mark or without. DataError for what is none, or is no text."""
    try:
        value = json.loads(decode(content, where))
        if b"\\ud" in content.lower():  # half of a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    return value


def decode(content: bytes, where: str) -> str:
    """UTF-8 without the byte order mark that some editors put before it. DataError for another encoding."""
    if encoding := wide_encoding(content):
        raise DataError(other_encoding(where, encoding, "OLD"))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1}); a file of Excel or Windows becomes UTF-8 by: "
            "iconv -f CP1252 -t UTF-8 OLD > NEW"
        ) from error


def wide_encoding(head: bytes) -> str | None:
    """The encoding of more than a byte a character that a file or line begins in, if one."""
    return next((name for name, start in _WIDE if start.match(head)), None)


def other_encoding(where: object, encoding: str, old: object) -> str:
    """What to tell of a text in such an encoding, and how it is written anew. old: the file to name for that."""
    return f"{where}: {encoding} text; write it anew: iconv -f {encoding} -t UTF-8 {old} > NEW"
