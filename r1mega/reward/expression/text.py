"""Clean-up of answer texts before parsing: character variants, LaTeX spacing, text boxes, lists in words, units,
prose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

OPEN_TEXT, CLOSE_TEXT = "\u27e6", "\u27e7"  # mark the content of \text{...}; these brackets do not occur in answers

_SYMBOLS = {
    "。": ".",
    "、": ",",
    "，": ",",
    "；": ";",
    "：": ":",
    "（": "(",
    "）": ")",
    "【": "[",
    "】": "]",
    "｛": r"\{",
    "｝": r"\}",
    "〈": r"\langle ",
    "〉": r"\rangle ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "−": "-",
    "–": "-",
    "—": "-",
    "‐": "-",
    "‑": "-",
    "×": r"\times ",
    "÷": r"\div ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "√": r"\sqrt ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≡": "=",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "∖": r"\setminus ",
    "π": r"\pi ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "δ": r"\delta ",
    "θ": r"\theta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "σ": r"\sigma ",
    "φ": r"\phi ",
    "ω": r"\omega ",
    "′": "'",
    "’": "'",
    "‘": "'",
    "∠": r"\angle ",
    "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}",
    "⅛": r"\frac{1}{8}",
    "⅙": r"\frac{1}{6}",
    "\u00a0": " ",
    "\u2009": " ",
    "\u202f": " ",
    "\u2002": " ",
    "\u2003": " ",
    "\u3000": " ",
    "\u200b": "",
    "\ufeff": "",
    "€": "",
    "£": "",
    "¥": "",
    "￥": "",
    "％": "%",
    "\t": " ",
    "\n": " ",
    "\r": " ",
}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n", strict=True))
_TRANSLATION = str.maketrans({**{chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}, **_SYMBOLS})
_UNUSUAL = re.compile(r"[^ -~]|[\t\n\r]")
_SUPERSCRIPT_RUN = re.compile("[" + "".join(_SUPERSCRIPTS) + "]+")

_TEXT_BOX = re.compile(
    r"\\(text|mbox|textbf|textit|textrm|textnormal|texttt|textsf|textup|hbox|mathrm|operatorname\*?|mathit|rm)"
    r"\s*\{([^{}]*)\}"
)
_FONT = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathsf|mathcal|bold|ensuremath|underline|boxed|fbox|phantom)\s*(?=\{)")
_DROPPED = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits|bf|it|phantom|"
    r"triangle|bigtriangleup)(?![A-Za-z])\.?"
)
_SPACES = re.compile(r"(?<!\\)\\(?:quad|qquad|enspace|thinspace|hspace\{[^}]*\}|[,:;> ])|~")
_FOR_INTEGERS = re.compile(
    r"(?<![\s,;(])[\s,;(]++(?:for\s+|where\s+)?(?:"
    + OPEN_TEXT
    + "[^"
    + CLOSE_TEXT
    + "]*"
    + CLOSE_TEXT
    + r"\s*)?[kmn]\s*\\in\s*"
    r"(?:\\mathbb\s*\{?[ZN]\}?|\\mathbf\s*\{?[ZN]\}?|[ZN])(?:[_^]\{?[+*]\}?)*\s*\)?\s*$"
)
_THOUSANDS_MARK = re.compile(r"(?<=\d)\s*(?:\{,\}\s*|,\s*\\!\s*|\\!\s*,\s*)(?:\\!\s*)?(?=\d)")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_AND_BOX = re.compile(OPEN_TEXT + r"\s*,?\s*(?:and|or|and/or)\s*,?\s*" + CLOSE_TEXT)
_AND_WORD = re.compile(r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|或|和|与|及")
_SPACED_DIGITS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d]| *\d)")
_BOX = re.compile(OPEN_TEXT + "([^" + CLOSE_TEXT + "]*)" + CLOSE_TEXT)
_NUMBER_WORDS = dict(
    zip(
        ("zero one two three four five six seven eight nine ten eleven twelve").split(),
        map(str, range(13)),
        strict=True,
    )
)


def _box(match: re.Match[str]) -> str:
    """\\text{...}: numbers and formulas written as text are unwrapped, words stay marked, lists are split."""
    command, content = match.groups()
    if content.strip().lower() in _NUMBER_WORDS:
        return f" {_NUMBER_WORDS[content.strip().lower()]} "
    if not re.search(r"[^\W\d_]", content) or (command in ("mathrm", "mathit", "rm") and len(content.strip()) == 1):
        return f" {content} "
    choice = re.fullmatch(r"\s*\(?\s*([A-Za-z])\s*\)?[.,]?\s*", content)
    if choice:
        return f"{OPEN_TEXT}{choice.group(1)}{CLOSE_TEXT}"
    if re.fullmatch(r"\s*\w[\w ]*(,\s*\w[\w ]*)+", content):
        return ", ".join(f"{OPEN_TEXT}{part.strip()}{CLOSE_TEXT}" for part in content.split(","))
    return f"{OPEN_TEXT}{content}{CLOSE_TEXT}"


@lru_cache(maxsize=8192)
def clean(text: str) -> str:
    """One spelling for what is written in many: ASCII characters, \\frac, plain spaces, ';' between list items."""
    if text.strip(" .").lower() in _NUMBER_WORDS:
        return _NUMBER_WORDS[text.strip(" .").lower()]
    if _UNUSUAL.search(text):
        text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m.group()) + "}", text)
        text = text.translate(_TRANSLATION)
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "%").replace("**", "^")
    if "\\" in text:
        text = _TEXT_BOX.sub(_box, text)
        text = _THOUSANDS_MARK.sub("", text)
        text = _SPACES.sub(" ", _DROPPED.sub("", _FRACTIONS.sub(r"\\frac", _FONT.sub("", text.replace("\\!", "")))))
        text = text.replace(r"\(", " ").replace(r"\)", " ").replace(r"\[", " ")
        text = re.sub(r"(?<!\\)\\\]", " ", text)
        text = _FOR_INTEGERS.sub("", _AND_BOX.sub(";", text))
    elif "{,}" in text:
        text = _THOUSANDS_MARK.sub("", text)
    text = _AND_WORD.sub(";", text) if re.search(r"and|or|[或和与及]", text) else text
    if " " in text:
        text = _SPACED_DIGITS.sub(lambda m: m.group().replace(" ", ""), text)
    text = re.sub(r"(?<=\d)\s*(?:\.{3,}|\\l?dots|…)$", "...", text.strip(" \n^"))
    while len(text) > 1 and text[-1] in ".,;:" and not text.endswith("..."):
        text = text[:-1].rstrip()
    return text


# --- units ------------------------------------------------------------
_UNIT_NAMES = {
    "cm": "cm centimeter centimeters centimetre centimetres 厘米",
    "mm": "mm millimeter millimeters millimetre millimetres 毫米",
    "m": "m meter meters metre metres 米",
    "km": "km kilometer kilometers kilometre kilometres 千米 公里",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "mph": "mph",
    "kph": "kph",
    "g": "g gram grams 克",
    "kg": "kg kilogram kilograms 千克 公斤",
    "mg": "mg milligram milligrams",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "ton": "ton tons tonne tonnes 吨",
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
    "rad": "rad radian radians",
    "deg": "degree degrees deg degs 度",
    "percent": "percent pct percents",
    "sq": "sq square 平方",
    "cu": "cu cubic 立方",
    "per": "per",
    "": "unit units",
}
_UNITS = {word: name for name, words in _UNIT_NAMES.items() for word in words.split()}
SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
    "百": 10**2,
    "千": 10**3,
    "万": 10**4,
    "亿": 10**8,
}
HEDGES = frozenset(
    "not no none nor either neither wrong incorrect unknown cannot except without least most "
    "more less fewer greater smaller over under "
    "between maybe perhaps possibly probably if unless than above below up plus minus times "
    "half double twice or and to through "
    "a.m p.m a.m. p.m. am pm".split()
)
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
_WORD = re.compile(r"[A-Za-z][A-Za-z.]*|[\u4e00-\u9fff]+")
_NUMERIC_BODY = re.compile(r"^[\s\d.,+\-*/{}()^]*(?:\\(?:frac|sqrt|pi|cdot|times|approx)[\s\d.,+\-*/{}()^]*)*$")


@dataclass(frozen=True, slots=True)
class Quantity:
    """An answer without its unit. unit: canonical ('cm 2'), '' for a nameless or unknown one, None when there is
    none.
    """

    body: str
    unit: str | None
    scale: int = 1


def _chinese_words(word: str) -> list[str]:
    """Longest known prefixes of a run of Chinese characters: '平方厘米' -> ['平方', '厘米']."""
    words = []
    while word:
        known = next((word[:n] for n in range(len(word), 0, -1) if word[:n] in _UNITS or word[:n] in SCALES), None)
        if known is None:
            return [*words, word]
        words.append(known)
        word = word[len(known) :]
    return words


@lru_cache(maxsize=8192)
def split_unit(text: str) -> Quantity:
    """Separate a trailing unit or count noun from a cleaned answer; nothing is split where the tail may change the
    value.
    """
    match = _BODY_TAIL.match(text)
    if not match:
        return Quantity(text, None)
    body, tail = match["body"], match["tail"]
    marked = OPEN_TEXT in tail
    words = [w for word in _WORD.findall(tail) for w in (_chinese_words(word) if word[0] > "\u4e00" else [word])]
    scale = 1
    while words and words[0].rstrip(".").lower() in SCALES:
        scale *= SCALES[words.pop(0).rstrip(".").lower()]
    lowered = [word.lower() for word in words]
    if any(word in HEDGES or word.rstrip(".") in HEDGES or word in SCALES for word in lowered):
        return Quantity(text, None)
    names = [
        _UNITS.get(word.rstrip("."), _UNITS.get(low.rstrip("."))) for word, low in zip(words, lowered, strict=True)
    ]
    if not marked and not _plausible_unit(body, tail, words, names):
        return Quantity(text, None)
    if names[:1] == ["deg"]:
        return Quantity(body + r"^\circ", None, scale)
    if names[:1] == ["percent"]:
        return Quantity(body + "%", None, scale)
    if any(name is None for name in names):
        return Quantity(body, "", scale)
    power = match["power"] or ("2" if "sq" in names else "3" if "cu" in names else "")
    unit = " ".join(n for n in names if n not in ("sq", "cu", "")) if words else None
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


# --- prose ------------------------------------------------------------
_LEAD = re.compile(
    r"^\s*=\s*|^\W*(?:(?:so|thus|therefore|hence|then)\b,?\s*)?(?:the\s+|my\s+|"
    r"our\s+)?(?:(?:final|correct|right|required|total)\s+)?"
    r"(?:answer|result|value|solution|choice|option|ans)s?\b\s*(?:is|are|:|=|be)+\s*:?\s*|"
    r"^(?:最终)?答案\s*(?:是|为|:|：|=)+\s*|^\s*答\s*[:：]\s*",
    re.IGNORECASE,
)
_APPROXIMATELY = re.compile(r"^\s*(?:\\approx|approximately|about|roughly)(?![A-Za-z])\s*", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PROSE_NUMBER = re.compile(r"(?<![\w.^_\\/*+=<>-])[-+]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?![\w^_\\/*+=<>(])")


def without_lead(text: str) -> str:
    """'The answer is: 12' -> '12'; '\\approx 8.24' -> '8.24'."""
    return _APPROXIMATELY.sub("", _LEAD.sub("", text, count=1), count=1)


def from_prose(text: str) -> str | None:
    """The one formula or the one number of a plain sentence, or None when there is none, several, or a hedge around
    it.
    """
    if not re.search(r"[A-Za-z]{2,}\s+[A-Za-z]", text):
        return None
    formulas = list(_FORMULA.finditer(text))
    if len(formulas) == 1:
        rest = text[: formulas[0].start()] + " " + text[formulas[0].end() :]
        found = next(group for group in formulas[0].groups() if group)
    elif not formulas and "\\" not in text:
        numbers = list(_PROSE_NUMBER.finditer(text))
        if len(numbers) != 1:
            return None
        rest = text[: numbers[0].start()] + " " + text[numbers[0].end() :]
        found = numbers[0].group()
    else:
        return None
    words = {word.lower().rstrip(".") for word in _WORD.findall(rest)}
    blocked = (
        words & HEDGES or words & SCALES.keys() or words & _NUMBER_WORDS.keys() or re.search(r"[\d\\*/^=<>%]", rest)
    )
    return None if blocked else found


def words_of(text: str) -> str:
    """Letters and digits of a verbal answer in lower case, without leading articles: 'The  Circle.' -> 'circle'."""
    return re.sub(
        r"[^\w]+", "", re.sub(r"^\W*(?:the|an?)\s+(?=\w{2})", "", text.strip(), flags=re.IGNORECASE)
    ).casefold()
