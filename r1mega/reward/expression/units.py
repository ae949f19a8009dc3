"""Units and count nouns behind an answer: told apart by name, converted exactly where both sides name one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from r1mega.reward.expression.numerals import NUMBER_WORDS, PART_WORDS
from r1mega.reward.expression.text import AND_MARK, CLOSE_TEXT, OPEN_TEXT, OR_MARK

_UNIT_NAMES = {
    "cm": "cm centimeter centimeters centimetre centimetres 厘米",
    "mm": "mm millimeter millimeters millimetre millimetres 毫米",
    "dm": "dm decimeter decimeters decimetre decimetres 分米",
    "m": "m meter meters metre metres 米",
    "km": "km kilometer kilometers kilometre kilometres 千米 公里",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "mi h": "mph",
    "km h": "kph kmh",
    "g": "g gram grams 克",
    "kg": "kg kilogram kilograms 千克 公斤",
    "mg": "mg milligram milligrams",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "ton": "ton tons",
    "tonne": "tonne tonnes 吨",
    "s": "s sec secs second seconds 秒",
    "min": "min mins minute minutes 分钟",
    "h": "h hr hrs hour hours 小时",
    "day": "day days 天",
    "week": "week weeks 周",
    "month": "month months 月",
    "year": "year years 年",
    "L": "L l liter liters litre litres 升",
    "mL": "mL ml milliliter milliliters 毫升",
    "gal": "gal gallon gallons",
    "usd": "dollar dollars usd",
    "cent": "cent cents",
    "eur": "euro euros eur",
    "cny": "yuan rmb 元",
    "N": "N newton newtons",
    "J": "J joule joules",
    "W": "W watt watts",
    "Hz": "Hz hertz",
    "rad": "rad rads radian radians",
    "deg": "degree degrees deg degs 度",
    "celsius": "celsius centigrade 摄氏度",
    "fahrenheit": "fahrenheit",
    "percent": "percent pct percents",
    "sq": "sq square 平方",
    "cu": "cu cubic 立方",
    "per": "per",
    "": "unit units",
}
_UNITS = {word: name for name, words in _UNIT_NAMES.items() for word in words.split()}
_FACTORS = {
    name: (dimension, Fraction(factor))
    for dimension, factors in {
        "metre": {"mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": "1", "km": "1000"},
        "inch": {"in": "1", "ft": "12", "yd": "36", "mi": "63360"},
        "gram": {"mg": "1/1000", "g": "1", "kg": "1000", "tonne": "1000000"},
        "ounce": {"oz": "1", "lb": "16"},
        "second": {"s": "1", "min": "60", "h": "3600", "day": "86400", "week": "604800"},
        "litre": {"mL": "1/1000", "L": "1"},
        "dollar": {"cent": "1/100", "usd": "1"},
    }.items()
    for name, factor in factors.items()
}
SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
    "quadrillion": 10**15,
    "dozen": 12,
    "百": 10**2,
    "千": 10**3,
    "万": 10**4,
    "亿": 10**8,
}
HEDGES = frozenset(
    "not no none nor either neither never wrong incorrect false untrue unknown cannot except without least most "
    "more less fewer greater smaller over under nearly almost "
    "between maybe perhaps possibly probably might may could would if unless than above below up plus minus times "
    "half double twice triple squared cubed factorial factorials negative score gross mod modulo choose "
    "and or to through but instead rather etc doubt fail fails "
    "a.m p.m a.m. p.m. am pm".split()
)
CHANGES_VALUE = HEDGES | PART_WORDS | NUMBER_WORDS
"""Words that make another number, or none, of the number beside them."""
_BODY_TAIL = re.compile(
    r"^(?P<body>.*?(?:[\d)\]}!%]|\\pi|[A-Za-z](?=\s*"
    + OPEN_TEXT
    + r")))(?P<tail>\s*(?:"
    + OPEN_TEXT
    + "[^"
    + CLOSE_TEXT
    + r"]*"
    + CLOSE_TEXT
    + r"|[^\W\d_][A-Za-z./]*|[\u4e00-\u9fff]+|\s|/)++)(?:\^\{?(?P<power>-?[1-9])\}?)?\s*$"
)
WORD = re.compile(r"[A-Za-z][A-Za-z.]*|[\u4e00-\u9fff]+")
_NUMERIC_BODY = re.compile(r"^[\s\d.,+\-*/{}()^]*(?:\\(?:frac|sqrt|pi|cdot|times|approx)[\s\d.,+\-*/{}()^]*)*$")
_DOLLARS = re.compile(r"\\\$|^[^$]*\$\s*-?\d[^$]*$")


@dataclass(frozen=True, slots=True)
class Quantity:
    """An answer without its unit. unit: canonical ('cm 2'), '' for a nameless or unknown one, None when there is
    none.
    """

    body: str
    unit: str | None
    scale: int = 1


def currency(text: str) -> str | None:
    """The unit that a raw answer names by a sign: '\\$5', '$5' (a lone dollar sign begins no formula), '5 €'."""
    if "€" in text:
        return "eur"
    return "usd" if "$" in text and _DOLLARS.search(text) else None


def common_measure(unit: str, other: str) -> tuple[Fraction, Fraction] | None:
    """Factors that bring two different units to one, None where they measure different things."""
    (name, _, power), (other_name, _, other_power) = unit.partition(" "), other.partition(" ")
    one, two = _FACTORS.get(name), _FACTORS.get(other_name)
    if one is None or two is None or one[0] != two[0] or power != other_power or not (power or "1").isdigit():
        return None
    exponent = int(power or 1)
    return one[1] ** exponent, two[1] ** exponent


def _chinese_words(word: str) -> list[str]:
    """Longest known prefixes of a run of Chinese characters: '平方厘米' -> ['平方', '厘米']."""
    words: list[str] = []
    while word:
        known = next((word[:n] for n in range(len(word), 0, -1) if word[:n] in _UNITS or word[:n] in SCALES), None)
        if known is None:
            return [*words, word]
        words.append(known)
        word = word[len(known) :]
    return words


def _named(word: str) -> str | None:
    """Canonical unit of a word; a single letter keeps its case: 5 m is a length, 5 M is not."""
    word = word.rstrip(".")
    return _UNITS.get(word, _UNITS.get(word.lower()) if len(word) > 1 else None)


@lru_cache(maxsize=8192)
def split_unit(text: str) -> Quantity:
    """Separate a trailing unit or count noun from a cleaned answer; nothing is split where the tail may change the
    value.
    """
    match = _BODY_TAIL.match(text)
    if not match or AND_MARK in match["tail"] or OR_MARK in match["tail"]:
        return Quantity(text, None)
    body, tail = match["body"], match["tail"]
    marked = OPEN_TEXT in tail
    words = [w for word in WORD.findall(tail) for w in (_chinese_words(word) if word[0] > "\u4e00" else [word])]
    scale = 1
    while words and words[0].rstrip(".").lower() in SCALES:
        scale *= SCALES[words.pop(0).rstrip(".").lower()]
    lowered = [word.lower() for word in words]
    if any(word in CHANGES_VALUE or word.rstrip(".") in CHANGES_VALUE or word in SCALES for word in lowered):
        return Quantity(text, None)
    names = [_named(word) for word in words]
    if not marked and not _plausible_unit(body, tail, words, names):
        return Quantity(text, None)
    if names[:1] == ["deg"] and names[1:] in (["celsius"], ["fahrenheit"]):
        names = names[1:]
    if names[:1] == ["deg"]:
        return Quantity(body + r"^\circ", None, scale)
    if names[:1] == ["percent"]:
        return Quantity(body + "%", None, scale)
    known = [name for name in names if name is not None]
    if len(known) < len(names):
        return Quantity(body, "", scale)
    power = match["power"] or ("2" if "sq" in known else "3" if "cu" in known else "")
    unit = " ".join(n for n in known if n not in ("sq", "cu", "per", "")) if words else None
    return Quantity(body, f"{unit} {power}".strip() if unit else unit, scale)


def _plausible_unit(body: str, tail: str, words: list[str], names: list[str | None]) -> bool:
    """Words that are not inside \\text{} are a unit when known, or count nouns after a plain number and a space."""
    numeric = bool(_NUMERIC_BODY.match(body))
    spaced = tail[0].isspace()
    for word, name in zip(words, names, strict=True):
        if name is not None and (len(word) > 1 or (spaced and numeric) or word > "\u4e00"):
            continue
        if numeric and word > "\u4e00" or (numeric and spaced and len(word) >= 3 and word.rstrip(".").isalpha()):
            continue
        return False
    return True
