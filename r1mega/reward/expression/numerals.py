"""Numbers written in words: 'twenty-one', 'two thirds', 'three and a half', '二十五', '三分之二'."""

from __future__ import annotations

import re
from fractions import Fraction

_ONES = dict(
    zip(
        (
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen"
        ).split(),
        range(20),
        strict=True,
    )
)
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
    "hundredth": 100,
    "thousandth": 1000,
}
PART_WORDS = frozenset([*(part + "s" for part in _PARTS if part not in ("half", "quarter")), "half", "halves"])
NUMBER_WORDS = frozenset([*_ONES, *_TENS])
_CHINESE_DIGITS = {**dict(zip("零一二三四五六七八九", range(10), strict=True)), "〇": 0, "两": 2}
_CHINESE_POWERS = {"十": 10, "百": 100, "千": 1000}
_CHINESE = "".join(_CHINESE_DIGITS) + "".join(_CHINESE_POWERS) + "万亿"
_CHINESE_NUMERAL = re.compile(
    f"(百分之)?([{_CHINESE}]+|[0-9.]+)(?:分之([{_CHINESE}]+|[0-9]+))?([个只人本条张次种件头匹棵支]?)"
)
_MAX_WORDS = 16


_MIXED = re.compile(r"(\d{1,15}) and ([a-z][a-z -]*)")  # 2 and a half


def spelled_out(text: str) -> str | None:
    """Digits for a text that is one number in words, a fraction as LaTeX; None for any other text."""
    if not text or text[0] in "0123456789\\$+-(":
        if "分之" in text:
            return _chinese(text)
        part = _english(f"zero and {mixed[2]}") if (mixed := _MIXED.fullmatch(text)) else None
        return None if mixed is None or part is None or part >= 1 else _written(int(mixed[1]) + part)
    value = _english(text) if text.isascii() else None
    if value is None:
        return None if text.isascii() else _chinese(text)
    return _written(value)


def _written(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _english(text: str) -> Fraction | None:
    words = re.sub(r"[-,\s]+", " ", text.strip().lower()).split(" ")
    if len(words) > _MAX_WORDS:
        return None
    negative = words[0] in ("negative", "minus") and len(words) > 1
    words = words[1:] if negative else words
    value = _mixed(words)
    return value if value is None or not negative else -value


def _mixed(words: list[str]) -> Fraction | None:
    """'seven', 'two thirds', 'seven and two thirds', 'three and a half'."""
    part = _PARTS.get("half" if words[-1] == "halves" else words[-1].removesuffix("s"))
    if part is None:
        return _whole(words)
    at = len(words) - 1 - words[::-1].index("and") if "and" in words else -1
    top = words[at + 1 : -1]
    count = Fraction(1) if top in (["a"], ["an"]) else _whole(top)
    if count is None or at == 0:
        return None
    whole = Fraction(0) if at < 0 else _whole(words[:at])
    return None if whole is None else whole + count / part


def _whole(words: list[str]) -> Fraction | None:
    """A cardinal below 10**15; the grammar 'one hundred (and) five thousand' is kept, 'one two' is no number."""
    total = group = 0
    room = 1000  # the next word must be smaller than this
    seen = False
    for word in words:
        if word in _ONES or word in _TENS:
            value = _ONES.get(word, _TENS.get(word, 0))
            if value >= room or (room == 10 and value == 0):
                return None
            group += value
            room = 10 if word in _TENS else 0
        elif word == "hundred" and 0 < group < 100 and room < 100:
            group *= 100
            room = 100
        elif word in _POWERS and group and (total == 0 or total % (1000 * _POWERS[word]) == 0):
            total += group * _POWERS[word]
            group, room = 0, 1000
        elif word != "and" or not seen or room not in (100, 1000):
            return None
        seen = True
    return Fraction(total + group) if seen and words[-1] != "and" else None


def _chinese(text: str) -> str | None:
    match = _CHINESE_NUMERAL.fullmatch(text.strip(" 。"))
    if not match:
        return None
    percent, first, second, noun = match.groups()
    values = [_chinese_value(part) for part in (first, second) if part]
    if None in values or (percent and second):
        return None
    written = f"\\frac{{{values[1]}}}{{{values[0]}}}" if second else str(values[0])
    return written + ("%" if percent else "") + noun


def _chinese_value(text: str) -> str | None:
    """'一百零五' -> '105'; digits stay what they are."""
    if text[0].isascii():
        return text
    if text[0] in "万亿":
        return None
    total = section = digit = 0
    for char in text:
        if char in _CHINESE_DIGITS:
            if digit:
                return None  # digits read out one by one are not understood
            digit = _CHINESE_DIGITS[char]
        elif char in _CHINESE_POWERS:
            section += (digit or 1) * _CHINESE_POWERS[char]
            digit = 0
        else:
            total = (total + section + digit) * (10**4 if char == "万" else 10**8)
            section = digit = 0
    return str(total + section + digit)
